"""Resident memory stays flat over three epochs of pictures, by the numbers of the run's own log."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from chiasm.data.loader import Renderer
from chiasm.data.mixture import Entry, Mixture
from chiasm.train.log import read_log
from chiasm.train.loop import StageRun
from chiasm.train.recipe import Stage

PICTURES, SIDES, BATCH = 32, (640, 480), 4
MIB = 2**20
KEPT = PICTURES * SIDES[0] * SIDES[1] * 3 / MIB  # of an epoch, if every decoded picture were kept


def run(folder: Path, leaks: bool) -> list[float]:
    """The largest resident size of each of three epochs, in MiB. ``leaks``: every decoded picture is kept."""
    from PIL import Image
    from tiny_run import source, tiny_vlm, write_pictures

    write_pictures(folder, PICTURES)
    for file in (folder / "pictures").iterdir():
        pixels = np.random.default_rng(len(file.name)).integers(0, 256, (*SIDES[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    kept = []

    class Keeping(Renderer):
        def sample(self, example):
            paths = [medium.data for message in example.messages for medium in message.media]
            kept.extend(np.asarray(Image.open(path)).copy() for path in paths if leaks)
            return super().sample(example)

    vlm = tiny_vlm(folder)
    stage = Stage(name="s", lr=1e-3, epochs=3, batch_size=BATCH, log_every=1)
    mixture, out = Mixture({"colors": Entry(source=source(folder))}), folder / "run"
    StageRun(vlm.model, Keeping(vlm.processor), stage, mixture, out, console=Console(file=io.StringIO())).fit()
    log = [r for r in read_log(out / "log.jsonl") if "usage/memory_gib" in r]
    assert [r["epoch"] for r in log] == sorted([0, 1, 2] * (PICTURES // BATCH))
    return [max(1024 * r["usage/memory_gib"] for r in log if r["epoch"] == epoch) for epoch in range(3)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the system does not tell what is resident now")
@pytest.mark.parametrize("leaks", [False, True])
def test_memory_is_flat_over_three_epochs(tmp_path: Path, leaks: bool):
    words = [sys.executable, __file__, str(tmp_path), str(int(leaks))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    epochs = json.loads(done.stdout.splitlines()[-1])
    growth = epochs[2] - epochs[0]
    if leaks:  # what a leak would look like: two epochs' pictures
        assert growth > KEPT, epochs
    else:
        assert growth < KEPT / 2, epochs


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2] == "1")))

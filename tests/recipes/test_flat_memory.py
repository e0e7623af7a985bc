"""Resident memory stays flat over three epochs of pictures, by the numbers of the run's own log."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from chiasm.data.loader import Renderer
from chiasm.data.mixture import Entry, Mixture
from chiasm.train import widths
from chiasm.train.log import read_log
from chiasm.train.loop import StageRun
from chiasm.train.recipe import Stage

PICTURES, SIDES, BATCH = 32, (640, 480), 4
TALKS, LONGEST = 192, 150  # samples of packed rows, and the characters of their longest answer
KERNELS = 40  # MiB that the kernels of the few new widths after the first epoch may take
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
    return peaks(out, PICTURES // BATCH)


def packed(folder: Path, any_width: bool) -> list[float]:
    """The same of packed rows in bfloat16, samples of all lengths in another order each epoch.

    ``any_width``: rows are not filled up to few widths, and oneDNN keeps as many kernels as it does by itself.
    """
    from tiny_run import source, tiny_vlm, write_pictures

    write_pictures(folder, 8)
    draw = random.Random(0)
    letters = [draw.choices("abcdefgh ", k=draw.randint(1, LONGEST)) for _ in range(TALKS)]
    turns = [
        [("human", "<image>\nSay!" if i % 3 else "Say!"), ("gpt", "a" + "".join(w))] for i, w in enumerate(letters)
    ]
    records = [
        {"id": f"t{i}", "conversations": [{"from": role, "value": value} for role, value in t]}
        | ({"image": f"{i % 8}.png"} if i % 3 else {})
        for i, t in enumerate(turns)
    ]
    (folder / "talks.json").write_text(json.dumps(records))
    if any_width:
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], widths.SMALL = "1024", 0
    vlm = tiny_vlm(folder)
    stage = Stage(name="s", lr=1e-3, epochs=3, batch_size=8, log_every=1, dtype="bf16", pack=True)
    mixture = Mixture({"talks": Entry(source=source(folder) | {"file": str(folder / "talks.json")})})
    out = folder / "run"
    renderer = Renderer(vlm.processor, None, True)
    StageRun(vlm.model, renderer, stage, mixture, out, console=Console(file=io.StringIO())).fit()
    return peaks(out, TALKS // 8)


def peaks(out: Path, steps: int) -> list[float]:
    """The largest resident size of each of three epochs of ``steps``, in MiB, by the log."""
    log = [r for r in read_log(out / "log.jsonl") if "usage/memory_gib" in r]
    assert [r["epoch"] for r in log] == sorted([0, 1, 2] * steps)
    return [max(1024 * r["usage/memory_gib"] for r in log if r["epoch"] == epoch) for epoch in range(3)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the system does not tell what is resident now")
@pytest.mark.parametrize("leaks", [False, True])
def test_memory_is_flat_over_three_epochs(tmp_path: Path, leaks: bool):
    epochs = measured(run, tmp_path, leaks)
    growth = epochs[2] - epochs[0]
    if leaks:  # what a leak would look like: two epochs' pictures
        assert growth > KEPT, epochs
    else:
        assert growth < KEPT / 2, epochs


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the system does not tell what is resident now")
@pytest.mark.parametrize("any_width", [False, True])
def test_packed_rows_in_bfloat16_are_flat_over_three_epochs(tmp_path: Path, any_width: bool):
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 products on this processor")
    epochs = measured(packed, tmp_path, any_width)
    growth = epochs[2] - epochs[0]
    assert (growth > KERNELS) if any_width else (growth < KERNELS), epochs


def measured(what: Callable[[Path, bool], list[float]], folder: Path, planted: bool) -> list[float]:
    """In a process of its own."""
    words = [sys.executable, __file__, what.__name__, str(folder), str(int(planted))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps({"run": run, "packed": packed}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3] == "1")))

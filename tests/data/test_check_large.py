"""A check of 100,000 samples: time, and memory that a hundred bytes a sample explain. Run by ``make test-slow``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

COUNT, PICTURES = 100_000, 1_000

CODE = """
import resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tiny_run import model_config, tokenizer_folder
from chiasm.data.check import check_all
from chiasm.data.mixture import Entry, Mixture
from chiasm.train.recipe import ModelSpec
from chiasm.data.check import Way
from chiasm.train.ways import open_processor

folder = Path(sys.argv[1])
spec = ModelSpec(config=model_config(), tokenizer=str(tokenizer_folder(folder / "tokenizer")))
way = Way(open_processor(spec), 512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
entry = Entry(source={"type": "llava_json", "file": str(folder / "train.jsonl"), "images": str(folder)})
begun = time.perf_counter()
found = check_all(Mixture({"all": entry}), {"all": way}, out=folder, workers=int(sys.argv[3]))
seconds = time.perf_counter() - begun
own = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(found.samples, found.bad, sum(found.counts.values()), round(seconds, 1))
print(round(own, 1), round(before / 1024), round(worker))  # megabytes: grown here, at the start, the largest worker
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_a_hundred_thousand_samples(tmp_path):
    for i in range(PICTURES):
        Image.new("RGB", (20 + i % 40, 20 + i // 40), (i % 256, i // 256, 9)).save(tmp_path / f"{i}.png")
    with (tmp_path / "train.jsonl").open("w") as file:
        for i in range(COUNT):
            said = [
                {"from": "human", "value": f"<image>\nWhat is in picture {i}?"},
                {"from": "gpt", "value": "red " * 9},
            ]
            file.write(json.dumps({"id": f"s{i}", "image": f"{i % PICTURES}.png", "conversations": said}) + "\n")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"id": "last", "image": "none.png", "conversations": []}\n')
    kit = str(Path(__file__).parents[1] / "recipes")
    ran = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), kit, "2"], capture_output=True, text=True, check=True
    )
    print(ran.stdout)
    samples, bad, found, _, own, before, worker = map(float, ran.stdout.split())
    assert (samples, bad, found) == (COUNT + 1, 1, 1)
    assert own < 200 and worker < before + 200, ran.stdout

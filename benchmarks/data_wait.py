"""Does training wait for its data, and does its memory grow? Real JPEG files, with and without data workers.

    python benchmarks/data_wait.py                  # every case; a few minutes on two cores
    python benchmarks/data_wait.py --shape tiny --epochs 1

The share of a step's time that passes in waiting is the one of the run's own log (``data_wait``), after the first
batch. Memory is the resident size of the process and its workers, the largest of each epoch. The data: LLaVA JSON over
pictures of 640 × 480 made here, and, where ``--photos`` is there, questions on real photographs of 768 × 512 and more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import limits, results
from train_data import write_data, write_model

HERE = Path(__file__).parent


def one(setting: dict[str, Any]) -> dict[str, Any]:
    """One run in this process."""
    import torch
    from rich.console import Console

    from chiasm import vlm as models
    from chiasm.data.loader import Renderer
    from chiasm.data.mixture import Entry, Mixture
    from chiasm.report.run import StageReport
    from chiasm.train.loop import StageRun
    from chiasm.train.recipe import Stage

    torch.set_num_threads(setting["threads"])
    vlm = models.load(setting["model"], dtype="float32")
    length: dict[str, Any] = {key: setting[key] for key in ("steps", "epochs") if setting.get(key)}
    settings = {"dtype": "bf16", "pack": True, "log_every": 1, "batch_size": 8, "workers": setting["workers"]}
    stage = Stage(name="wait", plan="instruct", lr=1e-4, **length, **settings)
    source = {"type": "llava_json", "file": setting["file"], "images": setting["images"]}
    out = Path(setting["out"])
    mixture = Mixture({"data": Entry(source=source)})
    run = StageRun(
        *(vlm.model, Renderer(vlm.processor, None, True), stage, mixture, out), console=Console(file=sys.stderr)
    )
    run.fit()
    log = StageReport.read(out, stage.dump()).log
    peaks: dict[int, float] = {}
    for record in log:
        peaks[record["epoch"]] = max(peaks.get(record["epoch"], 0.0), 1024 * record["usage/memory_gib"])
    seconds = sorted(record["seconds_per_step"] for record in log[1:])
    found = {"share": run.waits.share, "first_s": run.waits.first, "step_s": seconds[len(seconds) // 2]}
    return found | {"memory_mib": [round(peaks[epoch]) for epoch in sorted(peaks)], "steps": run.steps}


def write_photos(photos: Path, file: Path) -> None:
    """The photographs' questions and captions in LLaVA's form."""
    records = []
    for photo in json.loads((photos / "photos.json").read_text()):
        pairs = [("Describe the picture.", c) for c in photo["captions"]]
        pairs += [(q["question"], q["answer"]) for q in photo["qa"]]
        for i, (question, answer) in enumerate(pairs):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            records.append({"id": f"{photo['id']}-{i}", "image": photo["file"], "conversations": turns})
    file.write_text(json.dumps(records))


def call(setting: dict[str, Any]) -> dict[str, Any]:
    """A run in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(lines[0].removeprefix("RESULT "))


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=["tiny", "135M"])
    parser.add_argument("--epochs", type=float, default=3, help="of the tiny shape; the other runs 4 steps")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--photos", type=Path, default=HERE.parents[1] / "shared" / "data" / "photos")
    parser.add_argument("--note", default="", help="what the table should say about the machine")
    parser.add_argument("--out", type=Path, default=results())
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(one(json.loads(options.one))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "made", 96, 2)
        data = {"LLaVA JSON, 640 × 480, 30 % text only": (folder / "made" / "data.json", folder / "made")}
        if options.photos.is_dir():
            write_photos(options.photos, folder / "photos.json")
            data["questions on photographs"] = (folder / "photos.json", options.photos)
        else:
            print(f"data_wait: there is no {options.photos}, so real photographs are left out", flush=True)
        for shape in options.shape or ["tiny", "135M"]:
            write_model(folder / shape, shape)
            for (name, (file, images)), workers in ((d, w) for d in data.items() for w in options.workers):
                setting = {"model": str(folder / shape), "file": str(file), "images": str(images), "workers": workers}
                setting |= {"threads": options.threads, "out": str(folder / f"run-{len(rows)}")}
                length = {"epochs": options.epochs} if shape == "tiny" else {"steps": 4}
                rows.append({"shape": shape, "data": name, "workers": workers} | call(setting | length))
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    write(rows, options)


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """``data_wait.json`` and ``data_wait.md``."""
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"threads": options.threads, "note": options.note, "limits": limits(), "rows": rows}
    (options.out / "data_wait.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    lines = [
        "# Waiting for data, and memory over epochs",
        "",
        f"`python benchmarks/data_wait.py`: stage 2 in bf16, packed batches of 8, {options.threads} thread(s) for the "
        f"training process. {options.note} Without workers all of a batch's making is waiting. Memory is the largest "
        "resident size of each epoch, workers included; what they share with the training process counts twice.",
        "",
        "| shape | data | workers | steps | s/step | waited for data | first batch, s | MiB by epoch |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        numbers = f"{row['steps']} | {row['step_s']:.2f} | {row['share']:.1%} | {row['first_s']:.2f}"
        memory = ", ".join(map(str, row["memory_mib"]))
        lines.append(f"| {row['shape']} | {row['data']} | {row['workers']} | {numbers} | {memory} |")
    (options.out / "data_wait.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[6:]))


if __name__ == "__main__":
    main()

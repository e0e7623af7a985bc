"""Training: Chiasm against transformers' ``Trainer`` with the same weights, samples, order, precision and batches.

    python benchmarks/train.py                    # every case; tables and JSON in benchmarks/results
    python benchmarks/train.py --case mixed-135M  # one of them

Each peer runs in a process of its own, in turns, with the same number of threads; the first step is not counted. Times
are processor seconds of the training process (wall time stands beside them), so that other programs on the machine
disturb them little. Pictures are opened in the training process by both, so that nothing is hidden in workers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from train_data import SHAPES, write_data, write_model

HERE = Path(__file__).parent
PEERS = ("transformers", "chiasm")


@dataclass(frozen=True)
class Case:
    """One comparison. Steps before ``since`` are not counted."""

    name: str
    shape: str
    stage: int
    precision: str
    steps: int
    what: str
    options: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    since: int = 1
    lr: float = 1e-3
    batch: int = 8


MIXED = "mixed instruct data, 30 % text only, tower frozen"
CASES = [
    Case("parity-tiny-1", "tiny", 1, "float32", 5, "captions, connector trained"),
    Case("parity-tiny-2", "tiny", 2, "float32", 5, MIXED),
    Case("mixed-tiny", "tiny", 2, "bf16", 6, MIXED, {"pack": True}),
    Case("mixed-135M", "135M", 2, "bf16", 3, MIXED, {"pack": True}),
    Case("align-135M", "135M", 1, "bf16", 3, "captions, connector trained, nothing stored", {"pack": True}),
    Case(
        *("cached-small-lm", "small-lm", 1, "bf16", 9, "captions, features stored, from the second epoch on"),
        options={"pack": True, "feature_cache": "features"},
        limit=24,
        since=3,
    ),
]


def run_case(case: Case, folder: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Both peers in turns; the fastest of the repeats of each step counts."""
    model, data = folder / case.shape, folder / f"data{case.stage}"
    if not model.exists():
        write_model(model, case.shape)
    if not data.exists():
        write_data(data, 96, case.stage)
    setting = asdict(case) | {"model": str(model), "data": str(data), "threads": threads, "workers": 0}
    setting["samples"] = str(folder / f"{case.name}.pt")
    setting["options"] = {k: str(folder / v) if k == "feature_cache" else v for k, v in case.options.items()}
    call("render", setting, folder)
    results: dict[str, list[dict[str, Any]]] = {peer: [] for peer in PEERS}
    rates = []
    for number in range(repeats):
        for peer in PEERS:
            rates.append(rate(torch.bfloat16 if case.precision == "bf16" else torch.float32))
            setting["out"] = str(folder / f"out-{case.name}-{peer}-{number}")
            results[peer].append(call(peer, setting, folder))
    return summary(case, results, max(rates), torch.load(setting["samples"]))


def rate(dtype: torch.dtype, n: int = 1024) -> float:
    """Arithmetic of a square matrix product for each second of processor time, in GFLOP/s: the ceiling of a step."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    best = float("inf")
    for _ in range(20):
        begun = time.process_time()
        a @ b
        best = min(best, time.process_time() - begun)
    return 2 * n**3 / best / 1e9


def call(peer: str, setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a peer and read what it prints."""
    path = folder / "setting.json"
    path.write_text(json.dumps(setting))
    environment = os.environ | {"OMP_NUM_THREADS": str(setting["threads"])}
    command = [sys.executable, str(HERE / "train_peers.py"), peer, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{peer} failed: {done.stderr[-2000:]}")
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(found[0].removeprefix("RESULT ")) if found else {}


def summary(case: Case, results: dict[str, list[dict[str, Any]]], ceiling: float, samples: list[Any]) -> dict[str, Any]:
    """The numbers of a case."""
    steps = range(case.since, case.steps)
    counted = [samples[step * case.batch : (step + 1) * case.batch] for step in steps]
    tokens = sum(len(s["input_ids"]) for batch in counted for s in batch)
    padded = sum(len(batch) * max(len(s["input_ids"]) for s in batch) for batch in counted)
    losses = [run["losses"] for peer in PEERS for run in results[peer]]
    row: dict[str, Any] = {"case": case.name, **asdict(case), "tokens": tokens, "padded": padded}
    row["loss_difference"] = max(abs(a - b) for other in losses for a, b in zip(losses[0], other, strict=True))
    row["matrix_gflops"], work = ceiling, arithmetic(case, counted)
    for peer in PEERS:
        times = {
            kind: sum(min(run[kind][step] for run in results[peer]) for step in steps)
            for kind in ("seconds", "cpu_seconds")
        }
        row[peer] = {
            "cpu_s_per_step": times["cpu_seconds"] / len(steps),
            "wall_s_per_step": times["seconds"] / len(steps),
            "samples_per_cpu_s": len(steps) * case.batch / times["cpu_seconds"],
            "tokens_per_cpu_s": tokens / times["cpu_seconds"],
            "share_of_matrix_rate": work / 1e9 / times["cpu_seconds"] / ceiling,
            "peak_mib": min(run["peak_mib"] for run in results[peer]),
            "losses": results[peer][0]["losses"],
        }
    theirs, ours = row["transformers"], row["chiasm"]
    row["speed"] = theirs["cpu_s_per_step"] / ours["cpu_s_per_step"]
    row["speed_by_wall_time"] = theirs["wall_s_per_step"] / ours["wall_s_per_step"]
    row["memory"] = ours["peak_mib"] / theirs["peak_mib"]
    return row


def arithmetic(case: Case, batches: list[list[Any]]) -> float:
    """Operations that the task itself needs: matrix products at real tokens, the head at targets, the tower once.

    Two for each weight and token forwards, two more where gradients pass through, two more where weights learn.
    """
    text, vision = SHAPES[case.shape]["text"], SHAPES[case.shape]["vision"]
    dim, kv = text["hidden_size"], text["hidden_size"] * text["num_key_value_heads"] // text["num_attention_heads"]
    layer = dim * (2 * dim + 2 * kv + 3 * text["intermediate_size"])
    passes = 6 if case.stage == 2 else 4
    total = 0.0
    for sample in (s for batch in batches for s in batch):
        length, targets = len(sample["input_ids"]), int((sample["labels"] != -100).sum())
        total += passes * length * text["num_hidden_layers"] * layer
        total += passes / 2 * 2 * length**2 * dim * text["num_hidden_layers"]  # causal: half of all pairs
        total += passes * targets * dim * text["vocab_size"]
        if sample["paths"]:
            width, patches = vision["hidden_size"], (vision["image_size"] // vision["patch_size"]) ** 2
            block = 4 * width**2 + 2 * width * vision["intermediate_size"]
            stored = "feature_cache" in case.options
            total += 0 if stored else 2 * patches * (vision["num_hidden_layers"] - 1) * (block + 2 * patches * width)
            total += 6 * (patches * (width * dim + dim * dim))
    return total


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = "| case | precision | speed | by wall time | Trainer s/step | Chiasm s/step | tokens/s | memory | Trainer MiB | Chiasm MiB | share of matrix rate | largest loss difference |"  # noqa: E501
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in rows:
        theirs, ours = row["transformers"], row["chiasm"]
        cells = [
            f"{row['case']}: {row['what']}",
            row["precision"],
            f"**{row['speed']:.2f}×**",
            f"{row['speed_by_wall_time']:.2f}×",
            f"{theirs['cpu_s_per_step']:.2f}",
            f"{ours['cpu_s_per_step']:.2f}",
            f"{ours['tokens_per_cpu_s']:.0f}",
            f"**{row['memory']:.2f}×**",
            f"{theirs['peak_mib']:.0f}",
            f"{ours['peak_mib']:.0f}",
            f"{theirs['share_of_matrix_rate']:.0%} → {ours['share_of_matrix_rate']:.0%}",
            f"{row['loss_difference']:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]], out: Path, threads: int) -> None:
    """``train.json`` and ``train.md``; cases measured before stay."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "train.json"
    kept = {row["case"]: row for row in (json.loads(file.read_text()) if file.exists() else [])}
    kept |= {row["case"]: row | {"threads": threads, "torch": torch.__version__} for row in rows}
    ordered = [kept[case.name] for case in CASES if case.name in kept]
    file.write_text(json.dumps(ordered, indent=1))
    (out / "train.md").write_text("# Training against transformers' `Trainer`\n\n" + table(ordered))


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where models and data are kept; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            if not options.case or case.name in options.case:
                row = run_case(case, folder, options.repeats, options.threads)
                write([row], options.out, options.threads)
                print(table([row]), flush=True)


if __name__ == "__main__":
    main()

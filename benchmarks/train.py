"""Training: Chiasm against transformers' ``Trainer`` with the same weights, samples, order, precision and batches.

    python benchmarks/train.py                    # every case; tables and JSON in benchmarks/results
    python benchmarks/train.py --case mixed-135M  # one of them

Each peer runs in a process of its own, in turns, with the same number of threads; the first step is not counted. Times
are those of the clock on the wall; processor time, which other programs disturb less, stands beside them, and so does
the share of the machine that other programs took meanwhile. Pictures are opened in the training process by both, so
that nothing is hidden in workers. Of each case one more run of Chiasm is profiled: what the time of a step went into.
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
from machine import matrix_rate, results
from train_data import SHAPES, write_data, write_model
from train_profile import GROUPS

HERE = Path(__file__).parent
PEERS = ("transformers", "chiasm")
QUIET = 10  # percent of the machine that others may take before a ratio of wall times means little


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
    method: str | None = None  # of the language model: adapters with ``peft`` on the other side


LORA = "lora(r=16, alpha=32)"
MIXED = "mixed instruct data, 30 % text only, tower frozen"
CASES = [
    Case("parity-tiny-1", "tiny", 1, "float32", 5, "captions, connector trained"),
    Case("parity-tiny-2", "tiny", 2, "float32", 5, MIXED),
    Case("parity-tiny-lora", "tiny", 2, "float32", 5, "the same with LoRA r=16, connector trained; peft", method=LORA),
    Case("mixed-tiny", "tiny", 2, "bf16", 6, MIXED, {"pack": True}),
    Case("mixed-135M", "135M", 2, "bf16", 3, MIXED, {"pack": True}),
    Case("align-135M", "135M", 1, "bf16", 3, "captions, connector trained, nothing stored", {"pack": True}),
    Case("lora-135M", "135M", 2, "bf16", 3, "mixed, LoRA r=16, connector trained; peft", {"pack": True}, method=LORA),
    Case(
        *("cached-small-lm", "small-lm", 1, "bf16", 9, "captions, features stored, from the second epoch on"),
        options={"pack": True, "feature_cache": "features"},
        limit=24,
        since=3,
    ),
]


def run_case(case: Case, folder: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Both peers in turns; the fastest of the repeats of each step counts. Then Chiasm under the profiler."""
    model, data = folder / case.shape, folder / f"data{case.stage}"
    if not model.exists():
        write_model(model, case.shape)
    if not data.exists():
        write_data(data, 96, case.stage)
    setting = asdict(case) | {"model": str(model), "data": str(data), "threads": threads, "workers": 0}
    setting |= {"samples": str(folder / f"{case.name}.pt"), "adapter": str(folder / f"{case.name}-adapter")}
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    results: dict[str, list[dict[str, Any]]] = {peer: [] for peer in (*PEERS, "profile")}
    rates, before = [], Load()
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        for number, peer in [(0, "render"), *((n, peer) for n in range(repeats) for peer in PEERS), (0, "profile")]:
            rates.append(matrix_rate(dtype))
            out = Path(runs) / f"{peer}-{number}"
            stored = {"feature_cache": str(out / "features")} if "feature_cache" in case.options else {}
            found = call(peer, setting | {"out": str(out), "options": case.options | stored}, folder)
            results.setdefault(peer, []).append(found)
            print(f"  {case.name}: {peer} {number + 1}, {sum(found.get('seconds', [])):.1f} s of training", flush=True)
    row = summary(case, results, max(rates), torch.load(setting["samples"]))
    return row | {"others_percent": before.others()}


class Load:
    """How busy other programs keep the machine, from here on. 0 where the system does not tell."""

    def __init__(self) -> None:
        self.begun, self.all, self.own = time.perf_counter(), self._all(), self._own()

    def others(self) -> float:
        """Percent of the machine's processor time that went to other programs."""
        there = (time.perf_counter() - self.begun) * (os.cpu_count() or 1)
        return round(100 * max(0.0, self._all() - self.all - (self._own() - self.own)) / there, 1)

    @staticmethod
    def _own() -> float:
        return sum(os.times()[:4])

    @staticmethod
    def _all() -> float:
        try:
            user, nice, system, _, _, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
        except (OSError, ValueError):
            return 0.0
        return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


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
    row["gflop_per_step"] = {name: value / 1e9 / len(steps) for name, value in work.items()}
    for peer in PEERS:
        times = {
            kind: sum(min(run[kind][step] for run in results[peer]) for step in steps)
            for kind in ("seconds", "cpu_seconds")
        }
        row[peer] = {
            "s_per_step": times["seconds"] / len(steps),
            "cpu_s_per_step": times["cpu_seconds"] / len(steps),
            "samples_per_s": len(steps) * case.batch / times["seconds"],
            "tokens_per_s": tokens / times["seconds"],
            "share_of_matrix_rate": sum(work.values()) / 1e9 / times["seconds"] / ceiling,
            "peak_mib": min(run["peak_mib"] for run in results[peer]),
            "base_mib": min(run["base_mib"] for run in results[peer]),
            "losses": results[peer][0]["losses"],
        }
    theirs, ours = row["transformers"], row["chiasm"]
    row["speed"] = theirs["s_per_step"] / ours["s_per_step"]
    row["speed_by_processor_time"] = theirs["cpu_s_per_step"] / ours["cpu_s_per_step"]
    row["memory"] = ours["peak_mib"] / theirs["peak_mib"]
    row["memory_over_imports"] = (ours["peak_mib"] - ours["base_mib"]) / (theirs["peak_mib"] - theirs["base_mib"])
    row["profile"] = {name: results["profile"][0]["profile"][name] for name in GROUPS}
    return row


def arithmetic(case: Case, batches: list[list[Any]]) -> dict[str, float]:
    """Operations that the task itself needs: matrix products at real tokens, the head at targets, the tower once.

    Two for each weight and token forwards, two more where gradients pass through, two more where weights learn.
    """
    text, vision = SHAPES[case.shape]["text"], SHAPES[case.shape]["vision"]
    dim, kv = text["hidden_size"], text["hidden_size"] * text["num_key_value_heads"] // text["num_attention_heads"]
    layer = dim * (2 * dim + 2 * kv + 3 * text["intermediate_size"])
    full = case.stage == 2 and not case.method
    passes = 6 if full else 4
    total = dict.fromkeys(("layers", "attention", "head", "tower"), 0.0)
    for sample in (s for batch in batches for s in batch):
        length, targets = len(sample["input_ids"]), int((sample["labels"] != -100).sum())
        total["layers"] += passes * length * text["num_hidden_layers"] * layer
        # causal: half of all pairs; three products for each of the two, whether weights learn or not
        total["attention"] += 6 * length**2 * dim * text["num_hidden_layers"]
        total["head"] += passes * targets * dim * text["vocab_size"]
        if sample["paths"]:
            width, patches = vision["hidden_size"], (vision["image_size"] // vision["patch_size"]) ** 2
            block = 4 * width**2 + 2 * width * vision["intermediate_size"]
            stored = "feature_cache" in case.options
            once = 2 * patches * (vision["num_hidden_layers"] - 1) * (block + 2 * patches * width)
            total["tower"] += 0 if stored else once
            total["layers"] += 6 * (patches * (width * dim + dim * dim))
    return total


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = "| case | precision | threads | speed | by processor time | Trainer s/step | Chiasm s/step | Chiasm tokens/s | memory | over imports | Trainer MiB | Chiasm MiB | share of matrix rate | largest loss difference | others' share |"  # noqa: E501
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in rows:
        theirs, ours, quiet = row["transformers"], row["chiasm"], row["others_percent"] <= QUIET
        cells = [
            f"{row['case']}: {row['what']}",
            row["precision"],
            str(row["threads"]),
            f"{row['speed']:.2f}×" if quiet else f"({row['speed']:.2f}×)",
            f"{row['speed_by_processor_time']:.2f}×",
            f"{theirs['s_per_step']:.2f}",
            f"{ours['s_per_step']:.2f}",
            f"{ours['tokens_per_s']:.0f}",
            f"{row['memory']:.2f}×",
            f"{row['memory_over_imports']:.2f}×",
            f"{theirs['peak_mib']:.0f}",
            f"{ours['peak_mib']:.0f}",
            f"{theirs['share_of_matrix_rate']:.0%} → {ours['share_of_matrix_rate']:.0%}",
            f"{row['loss_difference']:.1e}",
            f"{row['others_percent']:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def eaters(row: dict[str, Any]) -> str:
    """What the time of a profiled step went into, beside what its arithmetic takes at the rate of a square product."""
    lines = ["| part of a step | ms | share | its arithmetic at the matrix rate, ms |", "|---|---:|---:|---:|"]
    whole = sum(row["profile"].values())
    for name, seconds in sorted(row["profile"].items(), key=lambda item: -item[1]):
        work = row["gflop_per_step"].get(name)
        ideal = f"{1000 * work / row['matrix_gflops']:.0f}" if work else ""
        lines.append(f"| {GROUPS[name]} | {1000 * seconds:.0f} | {seconds / whole:.0%} | {ideal} |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """``train.json`` and ``train.md``; cases measured before stay."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "train.json"
    kept = {row["case"]: row for row in (json.loads(file.read_text()) if file.exists() else [])}
    kept |= {row["case"]: row for row in rows}
    ordered = [kept[case.name] for case in CASES if case.name in kept]
    file.write_text(json.dumps(ordered, indent=1))
    (out / "train.md").write_text(page(ordered))


NOTES = """Speed and times by the clock on the wall, the fastest of the repeats of each step. Memory is the largest
resident size of each process; *over imports* is the same without what was resident after each peer's own imports. The
share of the matrix rate is the arithmetic that the task needs (real tokens, head at targets, tower once) over what a
1024 × 1024 product of the same type reaches with as many threads. *Others' share* is the part of the machine that other
programs took while the case ran; where it is over 10 % the speed stands in brackets: read the one by processor time.
"""


def page(rows: list[dict[str, Any]]) -> str:
    """``train.md``."""
    parts = ["# Training against transformers' `Trainer`", table(rows), NOTES, "## What a step's time goes into"]
    for row in rows:
        parts += [f"### {row['case']}", eaters(row)]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where models and data are kept; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=results())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            if not options.case or case.name in options.case:
                row = run_case(case, folder, options.repeats, options.threads)
                row |= {"threads": options.threads, "torch": torch.__version__}
                write([row], options.out)
                print(table([row]), flush=True)


if __name__ == "__main__":
    main()

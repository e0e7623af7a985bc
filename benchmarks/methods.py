"""Every training method on one task: parameters, memory, time, accuracy.

    python benchmarks/methods.py [--steps 150] [--base-steps 200]

A small model learns captions of the playground, whole. Then each method teaches its language model questions, from that
same base, with the same data, order, steps and learning rate schedule; connector and tower stay frozen, so that the
methods alone are compared. Each runs in a process of its own, whose peak of resident memory is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from machine import limits

ROOT = Path(__file__).resolve().parents[1]
METHODS = {  # name → (action on the language model, learning rate)
    "none (the base model)": (None, 0.0),
    "full": ("train", 2e-3),
    "lora r=4": ("lora(r=4, alpha=8)", 5e-3),
    "lora r=16": ("lora(r=16, alpha=32)", 5e-3),
    "qlora r=16": ("qlora(r=16, alpha=32)", 5e-3),
    "adapter 8": ("adapter(bottleneck=8)", 5e-3),
    "prefix 16": ("prefix(tokens=16)", 2e-2),
    "prompt 16": ("prompt(tokens=16)", 5e-2),
}


def recipe(out: Path, model: dict, stage: dict, tasks: list[str] | None, limit: int) -> dict:
    """A run of one stage on playground questions (or captions), scored on its test split."""
    source = {"type": "playground", "length": 20000, **({"tasks": tasks} if tasks else {})}
    return {
        "name": "methods",
        "out": str(out),
        "model": model,
        "device": "cpu",
        "data": {"train": {"source": source | {"split": "train", "turns": 3, "seed": 5}}},
        "held_out": {"test": {"source": source | {"split": "test", "length": limit}}},
        "stages": [{"batch_size": 16, "check_samples": 16, "log_every": 10, "bucket": 8} | stage],
        "eval": {"batch_size": 64, "max_new_tokens": 12, "shuffled": False, "examples": 0},
    }


def one(values: dict) -> None:
    """Run a recipe in this process and print what it took."""
    from chiasm.train import Recipe, train

    def status(key: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

    base = status("VmRSS:")
    begun = time.perf_counter()
    train(Recipe.parse(values))
    seconds = time.perf_counter() - begun
    out = Path(values["out"])
    stage = values["stages"][0]["name"]
    rows = json.loads((out / stage / "plan.json").read_text())
    log = [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]
    steps = [r["seconds_per_step"] for r in log if "seconds_per_step" in r]
    results = json.loads((out / "results.json").read_text())
    found = {
        "trained": sum(r["parameters"] for r in rows if r["lr"] is not None),
        "all": sum(r["parameters"] for r in rows),
        "seconds": round(seconds, 1),
        "step_ms": round(1000 * sorted(steps)[len(steps) // 2], 1),
        "peak_mb": round((status("VmHWM:") - base) / 1e6, 1),
        "loss": round(next(r["loss"] for r in reversed(log) if "loss" in r), 4),
        "results": results,
    }
    print("RESULT " + json.dumps(found))


def start(values: dict) -> dict:
    """A recipe in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(values)], capture_output=True, text=True, cwd=ROOT
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-3000:])
    return json.loads(lines[0].removeprefix("RESULT "))


def accuracy(results: dict) -> float:
    """The share of right answers over all tasks."""
    rows = [row for row in results["table"] if row["true"] is not None]
    return sum(row["n"] * row["true"] for row in rows) / sum(row["n"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        return one(json.loads(options.one))
    demo = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())["model"]
    model = {"config": demo["config"], "tokenizer": demo["tokenizer"], "weights": {"lm": demo["weights"]["lm"]}}
    stage = {"name": "base", "plan": "end_to_end", "steps": options.base_steps, "lr": 1.5e-3}
    base = options.runs / "base"
    if not (base / "model" / "config.json").is_file():
        start(recipe(base, model, stage, ["caption"], 64))
    rows = []
    for name, (action, lr) in METHODS.items():
        table = {"*": "freeze", "connectors" if action is None else "lm": action or "train"}
        stage = {"name": "tune", "plan": table, "steps": options.steps if action else 1, "lr": lr or 1e-12}
        out = options.runs / name.replace(" ", "-")
        found = start(recipe(out, {"folder": str(base / "model")}, stage, None, options.limit))
        rows.append({"method": name, "plan": action or "nothing"} | found)
        print(name, {k: v for k, v in found.items() if k != "results"}, accuracy(found["results"]), flush=True)
    write(rows, options)


def write(rows: list[dict], options: argparse.Namespace) -> None:
    """The results as JSON and as a table."""
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    facts = {"steps": options.steps, "base_steps": options.base_steps, "torch": torch.__version__, "limits": limits()}
    (folder / "methods.json").write_text(json.dumps({"settings": facts, "rows": rows}, indent=1) + "\n")
    lines = [
        "# Training methods, measured",
        "",
        f"`python benchmarks/methods.py`: {options.steps} steps of 16 samples from one base model that has learned "
        "captions only; the language model is taught the playground's questions by each method. Peak is the process's "
        "resident memory over that of its imports (most of it the interpreter's own libraries at this size); a step's "
        f"time is the median, on a machine that did other work too. {options.limit} held-out questions: a difference "
        "under 6 points of accuracy is chance.",
        "",
        "| method | plan for `lm` | trained | of all | step, ms | peak, MB | last loss | exact answers |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        share = accuracy(row["results"])
        base = row["plan"] == "nothing"
        numbers = (
            f"{row['trained']:,}",
            f"{row['trained'] / row['all']:.1%}",
            row["step_ms"],
            row["peak_mb"],
            row["loss"],
        )
        shown = ("0", "0 %", "", "", "") if base else numbers
        lines.append(f"| {row['method']} | `{row['plan']}` | {' | '.join(map(str, shown))} | {share:.1%} |")
    (folder / "methods.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

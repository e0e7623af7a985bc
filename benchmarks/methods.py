"""Every training method on one task: parameters, memory, time, accuracy.

    python benchmarks/methods.py [--steps 200] [--base-steps 150] [--only lora-r=4 ...] [--times]

The base is the demo's model after its first stage: the connector has learned from captions what the shipped tower sees,
the shipped language model has never been trained with a picture. Then each method teaches that language model to answer
questions about pictures, from the same base, with the same data, order, steps and schedule; connector and tower stay
frozen, so that the methods alone are compared. Each runs in a process of
its own, whose peak of resident memory is measured. What is there already is not run again (``--again`` does);
``--times`` measures step times alone, for a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import limits, results

ROOT = Path(__file__).resolve().parents[1]
METHODS: dict[str, tuple[str | None, float]] = {  # name → (action on the language model, learning rate)
    "none (the base model)": (None, 0.0),
    "full": ("train", 1e-3),
    "lora r=4": ("lora(r=4, alpha=8)", 5e-3),
    "lora r=8": ("lora(r=8, alpha=16)", 5e-3),
    "qlora r=8": ("qlora(r=8, alpha=16)", 5e-3),
    "adapter 8": ("adapter(bottleneck=8)", 5e-3),
    "prefix 16": ("prefix(tokens=16)", 8e-2),
    "prompt 16": ("prompt(tokens=16)", 5e-2),
}
QUESTIONS = [
    "scene_qa",
    "scene_count",
    "scene_turns",
    "digit_qa",
    "chart_qa",
    "reading",
    "document",
    "comparison",
    "clip",
]


def recipe(out: Path, model: dict, stages: list[dict], tasks: dict[str, Any], limit: int) -> dict:
    """A run over ``tasks`` of the playground, scored on the questions of its test split."""
    source = {"type": "playground", "length": 100000, "split": "train"}
    return {
        "name": "methods",
        "out": str(out),
        "model": model,
        "device": "cpu",
        "data": {"train": {"source": source | tasks}},
        "held_out": {"test": {"source": source | {"split": "test", "length": limit, "tasks": QUESTIONS}}},
        "stages": [{"batch_size": 16, "check_samples": 16, "log_every": 10, "bucket": 16} | stage for stage in stages],
        "eval": {"batch_size": 64, "max_new_tokens": 12, "shuffled": False, "examples": 0},
    }


def one(values: dict) -> None:
    """Run a recipe in this process and print what it took."""
    from chiasm.train import Recipe, train

    def status(key: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

    base = status("VmRSS:")
    begun = time.perf_counter()
    train(Recipe.parse(values), force=True)  # a folder of the benchmark's own
    seconds = time.perf_counter() - begun
    out = Path(values["out"])
    stage = values["stages"][-1]["name"]
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
        "table": results["table"],
        "receipt": results["receipt"]["recipe"],
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


def accuracy(row: dict) -> float:
    """The share of right answers over all questions."""
    rows = [r for r in row["table"] if r["true"] is not None and r["task"] != "all"]
    return sum(r["n"] * r["true"] for r in rows) / sum(r["n"] for r in rows)


def base_model(options: argparse.Namespace) -> Path:
    """The folder of the base model; trained where it is not there yet."""
    demo = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    out = options.runs / "base"
    if not (out / "model" / "config.json").is_file():
        captions = demo["data"]["captions"]["source"]
        align = {k: v for k, v in demo["stages"][0].items() if k != "data"} | {"steps": options.base_steps}
        start(recipe(out, demo["model"], [align], {"tasks": captions["tasks"], "turns": 2, "seed": 11}, 45))
    return out / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base-steps", type=int, default=150)
    parser.add_argument("--limit", type=int, default=540)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--only", nargs="*", help="folder names of methods, as lora-r=4")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no further row is begun")
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        return one(json.loads(options.one))
    options.end = time.perf_counter() + 60 * options.minutes
    model = {"folder": str(base_model(options))}
    rows = []
    for name, (action, lr) in METHODS.items():
        out = options.runs / name.split(" (")[0].replace(" ", "-")
        file = out / "row.json"
        wanted = options.only is None or out.name in options.only
        wanted = wanted and time.perf_counter() < options.end
        if wanted and options.times and action:
            stage = {"name": "tune", "plan": {"*": "freeze", "lm": action}, "steps": 24, "lr": lr, "log_every": 2}
            row = json.loads(file.read_text())
            row["quiet_ms"] = start(recipe(out / "time", model, [stage], {"tasks": QUESTIONS, "turns": 3}, 9))[
                "step_ms"
            ]
            file.write_text(json.dumps(row))
        elif wanted and (options.again or not file.is_file()):
            plan = {"*": "freeze", "connectors" if action is None else "lm": action or "train"}
            stage = {"name": "tune", "plan": plan, "steps": options.steps if action else 1, "lr": lr or 1e-12}
            found = start(recipe(out, model, [stage], {"tasks": QUESTIONS, "turns": 3, "seed": 5}, options.limit))
            file.write_text(json.dumps({"method": name, "plan": action or "nothing"} | found))
        if file.is_file():
            rows.append(json.loads(file.read_text()))
            told = {k: v for k, v in rows[-1].items() if k not in ("table", "receipt")}
            print(told, f"{accuracy(rows[-1]):.1%}", flush=True)
    write(rows, options)


def write(rows: list[dict], options: argparse.Namespace) -> None:
    """The results as JSON and as a table."""
    folder = results()
    facts = {"steps": options.steps, "base_steps": options.base_steps, "questions": options.limit}
    facts |= {"torch": torch.__version__, "limits": limits()}
    (folder / "methods.json").write_text(json.dumps({"settings": facts, "rows": rows}, indent=1) + "\n")
    error = 200 * (0.25 / options.limit) ** 0.5
    quiet = all("quiet_ms" in row for row in rows if row["plan"] != "nothing")
    rates = ", ".join(f"{name} {lr:g}" for name, (_, lr) in METHODS.items() if lr)
    lines = [
        "# Training methods, measured",
        "",
        "`python benchmarks/methods.py`: the demo's model after its first stage "
        f"({options.base_steps} steps of the connector on captions; the language model has never been trained with a "
        "picture). Then each method teaches that language model to answer questions about pictures, "
        f"{options.steps} steps of 16 samples from that same base; the rest stays frozen. One thread. {options.limit} "
        f"held-out questions of {len(QUESTIONS)} kinds, exact answers: under {error:.0f} points apart is chance. "
        f"Learning rates: {rates} (those of prefix and prompt are the best of three). Peak is the process's resident "
        "memory over that of its imports, most of it the interpreter's own libraries at this size. "
        "A step's time is the median"
        + (", on a quiet machine." if quiet else ", on a machine that did other work too."),
        "",
        "| method | plan for `lm` | trained | of all | step, ms | peak, MB | last loss | exact answers |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        base = row["plan"] == "nothing"
        share = f"{row['trained'] / row['all']:.1%}"
        time_ms = row["quiet_ms"] if quiet and not base else row["step_ms"]
        numbers = (f"{row['trained']:,}", share, time_ms, row["peak_mb"], row["loss"])
        shown = ("0", "0 %", "", "", "") if base else numbers
        lines.append(f"| {row['method']} | `{row['plan']}` | {' | '.join(map(str, shown))} | {accuracy(row):.1%} |")
    (folder / "methods.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Every bridge between a picture and a language model, side by side: same tower, language model, data and steps.

    python benchmarks/bridges.py [--align 250] [--instruct 900] [--limit 1100] [--rows mlp qformer ...]
    python benchmarks/bridges.py --gather       (the table of the rows that were run at other times)

The demo's two stages on the playground: the bridge alone learns captions, then the bridge and the language model learn
questions; the tower stays frozen. Nothing but the bridge differs. Every row runs in a process of
its own, whose peak of resident memory is measured, and is scored by task with the pictures that belong to the questions
and, as a blind control, with those of other questions. On two quiet cores a row takes about five minutes at the steps
above (the demo takes four), all of them a little over an hour; the time goes by the steps. A row is kept in its run's
folder, and after every row all that were kept with the same settings go to ``benchmarks/results/bridges.json`` and
``bridges.md``: the table may be made row by row, and a row that is run again replaces the one before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from machine import limits

ROOT = Path(__file__).resolve().parents[1]
BODY = {"dim": 128, "depth": 4, "heads": 4, "mlp": 512}
TEXT = {"text": {"vocab": 881, "positions": 128}, "instruction": True}
DETAIL = {"layer": 2}  # a second look at the same tower: an earlier layer, for gates
RATE = 4e-3  # of the first stage; the second has half of it
BRIDGES: dict[str, dict[str, Any]] = {  # name → what differs from the demo's model
    "linear": {"connector": {"type": "linear"}},
    "mlp": {"connector": {"type": "mlp"}},
    "pixel_shuffle": {},
    "qformer": {"connector": {"type": "qformer", "queries": 9, **BODY}},
    "qformer, reads the instruction": {"connector": {"type": "qformer", "queries": 9, **BODY, **TEXT}},
    "resampler": {"connector": {"type": "resampler", "queries": 9, "depth": 4, "heads": 4, "head_dim": 32}},
    "dynamic": {"connector": {"type": "dynamic", "keep": 27, "then": {"type": "mlp"}}},
    "hierarchical": {
        "connector": {"type": "hierarchical", "frame": BODY, "frame_queries": 9, "frames": 8, "queries": 9,
                      "clip": BODY | {"depth": 2, "cross_every": 1}}},
    "multiscale": {"connector": {"type": "multiscale", "queries": 9, "strides": [3, 1], "body": BODY | {"depth": 2}}},
    "mqt": {"connector": {"type": "mqt", "queries": 9, "heads": 4}},
    "gate, convex": {"connector": {"type": "gate", "mode": "convex"}, "detail": True},
    "gate, tanh": {"connector": {"type": "gate", "mode": "residual_tanh"}, "detail": True},
    "cross-attention": {
        "connector": {"type": "resampler", "queries": 9, "depth": 2, "heads": 4, "head_dim": 32, "project": False},
        "fusion": {"type": "cross_attention", "placement": {"every": 2}, "blocks": {"heads": 4, "head_dim": 32}}},
}  # fmt: skip
GROUPS = {
    "scenes": ("scene",), "digits": ("digit",), "charts": ("chart",), "reading": ("reading", "document"),
    "two pictures": ("comparison",), "clips": ("clip",),
}  # fmt: skip


def recipe(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The demo's recipe with one bridge in the place of its own."""
    values = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    values.pop("tiny", None)
    changes = BRIDGES[name]
    model = values["model"]["config"]["model"]
    model |= changes.get("fusion", {})
    if "connector" in changes:
        model["connectors"]["image"] = changes["connector"]
    if changes.get("detail"):
        model["encoders"]["detail"] = model["encoders"]["image"] | DETAIL
        values["model"]["weights"]["encoders.detail"] = values["model"]["weights"]["encoders.image"]
        for stream in model["media"].values():
            stream["encoders"] = ["image", "detail"]
    if model["connectors"]["image"].get("instruction"):
        values["model"]["instruction_tokenizer"] = values["model"]["tokenizer"]
        values["model"]["config"]["processing"]["instruction"] = {"max_length": 128}
    values["held_out"]["playground"]["source"]["length"] = options.limit
    first, second = values["stages"]
    first |= {"steps": options.align, "lr": RATE, "warmup_ratio": 0.1, "batch_size": options.batch, "proof": "tell"}
    bridge = {"connectors": RATE / 2, **({"cross": RATE / 2} if "fusion" in changes else {})}
    plan = {"*": "train", "encoders": "freeze", **bridge}
    second |= {"steps": options.instruct, "plan": plan, "batch_size": options.batch, "proof": "tell"}
    values["eval"] |= {"examples": 0, "shuffled": True}
    return values | {"name": name, "out": str(folder(name, options)), "device": "cpu"}


def folder(name: str, options: argparse.Namespace) -> Path:
    """Where the run of a row lies."""
    return options.runs / name.replace(", ", "-").replace(" ", "-")


def one(values: dict[str, Any]) -> None:
    """Run a recipe in this process and print what it took.

    On one thread, time is that of the processor, which other work on the machine does not lengthen.
    """
    if torch.get_num_threads() == 1:
        time.perf_counter = time.process_time  # read by the loop too
    from chiasm.train import Recipe, train

    def status(key: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

    base, begun = status("VmRSS:"), time.perf_counter()
    vlm = train(Recipe.parse(values), force=True)  # a folder of the benchmark's own
    seconds, out = time.perf_counter() - begun, Path(values["out"])
    logs = [[json.loads(line) for line in (out / s["name"] / "log.jsonl").open()] for s in values["stages"]]
    logs = [[record for record in log if "loss" in record] for log in logs]
    plan = json.loads((out / values["stages"][0]["name"] / "plan.json").read_text())
    found = {
        "bridge": sum(row["parameters"] for row in plan if row["lr"] is not None),
        "tokens": tokens(vlm),
        "seconds": round(seconds, 1),
        "step_ms": [round(1000 * median(r["seconds_per_step"] for r in log), 1) for log in logs],
        "peak_mb": round((status("VmHWM:") - base) / 1e6, 1),
        "loss": [round(log[-1]["loss"], 4) for log in logs],
        "table": json.loads((out / "results.json").read_text())["table"],
    }
    print("RESULT " + json.dumps(found))


def tokens(vlm: Any) -> dict[str, int]:
    """Tokens of the sequence that a picture and a clip of four frames take, and vectors looked at beside it."""
    from chiasm.types import Layout

    config, size = vlm.config.model, (3, 72, 72)
    layouts = {"picture": ("image", Layout(1, size)), "clip": ("video", Layout(4, size))}
    found = {name: config.count(kind, layout) for name, (kind, layout) in layouts.items()}
    beside = getattr(config, "vectors", None)
    return found | ({"beside": beside("image", Layout(1, size))} if beside else {})


def start(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(values)], capture_output=True, text=True, cwd=ROOT
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-3000:])
    return json.loads(lines[0].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--align", type=int, default=250, help="steps of the first stage")
    parser.add_argument("--instruct", type=int, default=900, help="steps of the second stage")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=1100, help="held-out questions")
    parser.add_argument("--gather", action="store_true", help="run nothing, write the table of the rows kept")
    parser.add_argument("--rows", nargs="+", choices=list(BRIDGES), default=list(BRIDGES))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bridges")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--note", default="", help="about the machine, into the results")
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        return one(json.loads(options.one))
    for name in () if options.gather else options.rows:
        row = {"name": name, "settings": settings(options)} | start(recipe(name, options))
        (folder(name, options) / "row.json").write_text(json.dumps(row))
        print(f"{name}: {row['seconds']} s, {share(row, 'true'):.1%}, blind {share(row, 'shuffled'):.1%}", flush=True)
        write(gathered(options), options)
    if options.gather:
        write(gathered(options), options)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a table have in common, besides the machine."""
    return {key: getattr(options, key) for key in ("align", "instruct", "batch", "limit")} | {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def gathered(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that were kept, in the table's order. Those of other settings are left out, and told."""
    kept = [folder(name, options) / "row.json" for name in BRIDGES]
    rows = [json.loads(path.read_text()) for path in kept if path.exists()]
    for row in rows:
        if row["settings"] != settings(options):
            print(f"left out, of other settings: {row['name']} {row['settings']}", flush=True)
    rows = [row for row in rows if row["settings"] == settings(options)]
    if not rows:
        raise SystemExit(f"no row of {settings(options)} in {options.runs}")
    return rows


def share(row: dict[str, Any], pictures: str, prefixes: tuple[str, ...] | None = None) -> float:
    """The share of right answers over all tasks, or those that begin so."""
    tasks = [t for t in row["table"] if t["task"] != "all" and (prefixes is None or t["task"].startswith(prefixes))]
    tasks = [t for t in tasks if t[pictures] is not None]  # a single question of a task has no other's picture
    return sum(t["n"] * t[pictures] for t in tasks) / max(1, sum(t["n"] for t in tasks))


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The results as JSON and as a table."""
    options.out.mkdir(parents=True, exist_ok=True)
    facts = settings(options) | {"note": options.note, "limits": limits()}
    (options.out / "bridges.json").write_text(json.dumps({"settings": facts, "rows": rows}, indent=1) + "\n")
    (options.out / "bridges.md").write_text(page(rows, options))


def page(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The table in Markdown."""
    n = sum(t["n"] for t in rows[0]["table"] if t["task"] != "all")
    chance = 196 * (0.25 / max(1, n)) ** 0.5  # two standard errors of a share, in points
    head = ["bridge", "tokens", "of a clip", "trained in it", "step, ms", "peak, MB", "minutes"]
    head += [*GROUPS, "all", "blind"]
    lines = [
        "# Bridges, measured",
        "",
        f"`python benchmarks/bridges.py --align {options.align} --instruct {options.instruct}`: the same frozen tower, "
        "the same language model, data, order and steps of "
        f"{options.batch} samples, on {torch.get_num_threads()} thread(s); the bridge alone learns captions, then "
        "bridge and language model learn questions. "
        f"Exact answers to {n} held-out questions, by kind: differences under {chance:.0f} points (all) are chance. "
        "*Blind* is the same model with the pictures of other questions: what is beyond it comes from looking. Tokens "
        "are those of the sequence; cross-attention looks at its vectors beside it. A step's time is the median of "
        f"the second stage; peak is resident memory beyond the libraries'. {options.note}",
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
    ]
    for row in rows:
        beside = f" (+{row['tokens']['beside']})" if "beside" in row["tokens"] else ""
        cells = [row["name"], f"{row['tokens']['picture']}{beside}", row["tokens"]["clip"], f"{row['bridge']:,}"]
        cells += [row["step_ms"][1], row["peak_mb"], f"{row['seconds'] / 60:.1f}"]
        cells += [f"{share(row, 'true', prefixes):.1%}" for prefixes in GROUPS.values()]
        cells += [f"**{share(row, 'true'):.1%}**", f"{share(row, 'shuffled'):.1%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    gaps = {row["name"]: 100 * (share(row, "true") - share(row, "shuffled")) for row in rows}
    unseen = [name for name, gap in gaps.items() if gap < 2 * chance]
    least = min(gaps, key=gaps.__getitem__)
    told = f"Every bridge looks: the smallest distance to its blind control is {gaps[least]:.0f} points ({least})."
    if unseen:
        told = f"Not shown to look, less than {2 * chance:.0f} points above the blind control: {', '.join(unseen)}."
    return "\n".join([*lines, "", told]) + "\n"


if __name__ == "__main__":
    main()

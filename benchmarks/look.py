"""Does heat lie on the object that was asked about? For a model that was trained on the playground (``make demo``).

    python benchmarks/look.py runs/demo/model

Scenes of two to four objects, a question about one of them that names it, and only answers that are right. The picture
is cut into the nine cells that objects stand in; heat is summed in each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import chiasm
from chiasm.data.sources.playground.scenes import Scene, Scenes, Thing, paint
from chiasm.data.sources.playground.world import Question

DEMO = Path("runs/demo/model")
KINDS = ("color", "shape", "what")


def target(scene: Scene, question: Question) -> Thing | None:
    """The object that the answer is about, where only one fits it."""
    told = {"color": lambda t: t.color, "shape": lambda t: t.name, "what": lambda t: f"{t.color} {t.name}"}[
        question.kind
    ]
    found = [thing for thing in scene if question.answer.endswith(told(thing))]
    return found[0] if len(found) == 1 else None


def cells(values: Tensor) -> Tensor:
    """Shares of the nine cells."""
    rows, columns = values.shape
    edge = (
        [(i * rows // 3, (i + 1) * rows // 3) for i in range(3)],
        [(i * columns // 3, (i + 1) * columns // 3) for i in range(3)],
    )
    sums = torch.stack([values[a:b, c:d].sum() for a, b in edge[0] for c, d in edge[1]])
    return sums / sums.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", type=Path, default=DEMO, help="a folder of a model trained on the playground"
    )
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "look.json")
    arguments = parser.parse_args()
    if not arguments.model.is_dir():
        print(f"look: skipped, there is no {arguments.model}; `make demo` trains it")
        return
    vlm = chiasm.load(arguments.model, dtype="float32")
    rng, family = Random(arguments.seed), Scenes()
    sums = {method: [0.0, 0.0, 0.0] for method in ("attention", "gradient")}
    asked = right = 0
    chance = 0.0
    while asked < arguments.questions:
        scene = family.sample(rng, "test")
        question = family.ask(scene, rng.choice(KINDS), rng)
        thing = target(scene, question) if question and len(scene) > 1 else None
        if thing is None:
            continue
        asked += 1
        parts = [{"type": "image", "image": paint(scene, 72, rng)}, {"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": parts}]
        answer = vlm.generate(messages, max_new_tokens=8)
        if answer.strip() != question.answer:
            continue
        right += 1
        places = [other.place for other in scene]
        chance += 1 / len(places)
        for method, found in sums.items():
            shares = cells(vlm.look(messages, answer, method=method).heats[0].values)
            found[0] += int(shares.argmax()) == thing.place
            found[1] += max(places, key=lambda place: float(shares[place])) == thing.place
            found[2] += float(shares[thing.place])
    result = {"asked": asked, "right": right, "chance among the objects": round(chance / max(1, right), 3)}
    names = ("brightest of 9 cells", "brightest of the objects", "share of the heat")
    result |= {
        m: {name: round(v / max(1, right), 3) for name, v in zip(names, found, strict=True)}
        for m, found in sums.items()
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("heat lies on the object asked about", *names)
    for method in sums:
        table.add_row(method, *(f"{100 * result[method][name]:.0f} %" for name in names))
    table.add_row("chance", "11 %", f"{100 * result['chance among the objects']:.0f} %", "11 %")
    Console().print(table)
    Console().print(f"{right} of {asked} questions answered right; the others are left out")


if __name__ == "__main__":
    main()

"""When does BLIP-2's first stage learn to match? First weights, learning rate and wrong pairs, side by side.

    python benchmarks/stage1.py                                # drawn objects ("a red ring"); minutes on one core
    python benchmarks/stage1.py --data captions --steps 900    # the playground's captions of whole scenes

The demo's frozen tower, a narrow Q-Former from nothing, the three published tasks. Pictures that are asked about were
never trained on. Two of three pairs are wrong: who calls all wrong is right in 66.7 % of them. Results go to
``benchmarks/results/stage1.json`` and ``.md``, those of ``--data captions`` beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn

import chiasm
from chiasm import registry
from chiasm.data.sources.playground.scenes import SHAPES
from chiasm.data.sources.playground.shapes import draw_shape
from chiasm.data.sources.playground.world import COLORS
from chiasm.processing.collate import collate
from chiasm.train.objectives import objective
from chiasm.types import Batch, Sample, Tokens

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "src" / "chiasm" / "weights"
SIDE = 72
TOWER = {"type": "vit", "image_size": SIDE, "patch": 8, "dim": 128, "depth": 4, "heads": 4, "mlp": 512, "cls": False,
         "activation": "gelu_tanh"}  # fmt: skip


def build(dim: int, queries: int) -> Any:
    """A first stage of width ``dim`` over the demo's tower."""
    bridge = {"type": "qformer", "queries": queries, "dim": dim, "depth": 4, "heads": 4, "mlp": 4 * dim}
    bridge |= {"project": False, "text": {"vocab": 1024, "positions": 96}}
    front_end = {"type": "image", "placeholder": None, "size": SIDE, "fit": "squash", "resample": "bilinear"}
    template = {"type": "turns", "user_text": False, "media_suffix": "", "answer": {"end": "<|end|>"}}
    config = {
        "model": {"type": "query_text", "encoders": {"image": TOWER}, "connectors": {"image": bridge}, "dim": 32,
                  "start": 1000},
        "processing": {"template": template, "media": {"image": front_end | {"mean": [0.5] * 3, "std": [0.5] * 3}}},
    }  # fmt: skip
    torch.manual_seed(0)
    vlm = chiasm.build(config, tokenizer=str(WEIGHTS / "tiny-lm"))
    vlm.load_part("encoders.image", WEIGHTS / "tiny-tower")
    vlm.model.encoders.requires_grad_(False)
    return vlm


def objects(seed: int, count: int) -> list[Any]:
    """One drawn object each, somewhere, of some size; its colour and shape are its caption."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        color, shape = draw.choice(list(COLORS)), draw.choice(SHAPES)
        picture = Image.new("RGB", (SIDE, SIDE), (draw.randrange(225, 256),) * 3)
        x, y, radius = draw.uniform(20, 52), draw.uniform(20, 52), draw.uniform(9, 18)
        draw_shape(ImageDraw.Draw(picture), shape, x, y, radius, COLORS[color])
        content = [{"type": "image", "image": picture}]
        found.append([{"role": "user", "content": content}, {"role": "assistant", "content": f"a {color} {shape}"}])
    return found


def captions(split: str, count: int) -> list[Any]:
    """Scenes of the playground with their captions, which name every object, its place, size and colour."""
    source = registry.get("source", "playground")
    made = source(source.Config(tasks=["caption"], split=split, length=count, seed=5))
    return [made[i].messages for i in range(count)]


class Pairs:
    """Rendered pairs whose pictures went through the tower once."""

    def __init__(self, vlm: Any, talks: list[Any], name: str):
        self.name, self.fill = name, vlm.processor.fill_id
        self.samples: list[Sample] = [vlm.processor(t, id=f"{name}{i}", train=True) for i, t in enumerate(talks)]
        with torch.no_grad():
            spans = range(0, len(self.samples), 64)
            each = [torch.cat([s.media[0].inputs for s in self.samples[i : i + 64]]) for i in spans]
            self.features = torch.cat([vlm.model.encoders["image"](pixels).x for pixels in each])

    def batch(self, rows: list[int]) -> Batch:
        """The pairs of some rows, with stored features."""
        made = collate([self.samples[i] for i in rows], pad_id=self.fill)
        made.media["image"].keys = [f"{self.name}{i}" for i in rows]
        made.media["image"].features = {"image": Tokens(self.features[rows])}
        return made


@torch.no_grad()
def judged(model: Any, held: Pairs, hardness: float, size: int) -> dict[str, float]:
    """Shares of pairs judged rightly, wrong ones drawn with ``hardness``, and the loss of contrast."""
    model.eval()
    loss_of, total = objective({"type": "blip2_stage1", "hardness": hardness}), {"right": 0.0, "pairs": 0.0, "c": 0.0}
    rows = range(0, len(held.samples) - size + 1, size)
    for start in rows:
        parts = loss_of(model, held.batch(list(range(start, start + size)))).parts
        right, pairs = map(float, parts["matching_accuracy"])
        total = {"right": total["right"] + right, "pairs": total["pairs"] + pairs,
                 "c": total["c"] + float(parts["contrast"][0]) / size}  # fmt: skip
    model.train()
    return {"matching": total["right"] / total["pairs"], "contrast": total["c"] / len(rows)}


def run(
    vlm: Any, learn: Pairs, held: Pairs, lr: float, hardness: float, deviation: float | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Train the three tasks for ``args.steps``. ``deviation``: of first weights, in place of the rule's."""
    if deviation is not None:
        for module in [*vlm.model.bridge.body.modules(), vlm.model.words.dense]:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=deviation)
    loss_of = objective({"type": "blip2_stage1", "hardness": hardness})
    params = [p for p in vlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    draw, order, begun, left = random.Random(1), list[int](), time.process_time(), None
    vlm.train()
    for step in range(args.steps):
        if len(order) < args.batch:
            order = draw.sample(range(len(learn.samples)), len(learn.samples))
        rows, order = order[: args.batch], order[args.batch :]
        loss = loss_of(vlm.model, learn.batch(rows))
        (loss.total / loss.weight).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (0.1 * args.steps)) * (1 - step / args.steps)
        optimizer.step()
        optimizer.zero_grad()
        if left is None and step % 25 == 24 and judged(vlm.model, held, 0.0, args.batch)["matching"] > 0.75:
            left = step + 1
    seconds = time.process_time() - begun
    hard, even = (judged(vlm.model, held, h, args.batch) for h in (1.0, 0.0))
    return {"lr": lr, "hardness": hardness, "deviation": deviation or "0.02 √(768/dim)", "hard": hard["matching"],
            "even": even["matching"], "contrast": hard["contrast"], "left": left, "seconds": seconds,
            "parameters": sum(p.numel() for p in params)}  # fmt: skip


def page(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The table in Markdown."""
    what = "one drawn object" if args.data == "objects" else "the playground's captions"
    head = ["first weights' deviation", "learning rate", "wrong pairs in training", "right, hard pairs",
            "right, even pairs", "contrast", "prior left at step", "seconds"]  # fmt: skip
    lines = [
        f"`python benchmarks/stage1.py --data {args.data} --steps {args.steps}`: {what}, width {args.dim}, "
        f"{rows[0]['parameters']:,} trained parameters, {args.samples} pairs to learn from in batches of {args.batch}, "
        f"{args.held // args.batch * args.batch} held out, one thread, one seed, on a busy machine. Two of three pairs "
        f"are wrong, so the prior is 66.7 %; contrast at chance is {torch.tensor(float(args.batch)).log():.2f}. The "
        "prior counts as left when more than 75 % of even pairs are judged rightly, looked at every 25 steps.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
    ]
    for row in rows:
        wrong = "hard, as published" if row["hardness"] == 1 else "even"
        cells = [row["deviation"], f"{row['lr']:g}", wrong, f"{row['hard']:.1%}", f"{row['even']:.1%}"]
        cells += [f"{row['contrast']:.2f}", row["left"] or "never", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("objects", "captions"), default="objects")
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--held", type=int, default=240)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--hardness", type=float, nargs="+", default=[1.0, 0.0])
    parser.add_argument("--deviation", nargs="+", default=["0.02", "rule"], help="numbers, or 'rule'")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    pairs: list[Pairs] = []
    for deviation, lr, hardness in itertools.product(args.deviation, args.lr, args.hardness):
        vlm = build(args.dim, args.queries)
        if not pairs:
            made = (
                (objects(1, args.samples), objects(2, args.held))
                if args.data == "objects"
                else (captions("train", args.samples), captions("test", args.held))
            )
            pairs = [Pairs(vlm, talks, name) for talks, name in zip(made, ("learn", "held"), strict=True)]
        given = None if deviation == "rule" else float(deviation)
        rows.append(run(vlm, pairs[0], pairs[1], lr, hardness, given, args))
        print(rows[-1], flush=True)
        name = "stage1" if args.data == "objects" else "stage1-captions"
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}.json").write_text(json.dumps({"options": options, "rows": rows}, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(page(rows, args))


if __name__ == "__main__":
    main()

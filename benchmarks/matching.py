"""Do ViLT, ALBEF, VLMo and BEiT-3 use their pictures? Each tiny form against a blind twin, in one table.

    python benchmarks/matching.py --steps 600          # questions about drawn shapes; minutes on one core
    python benchmarks/matching.py --data SHAPES --steps 3000 --out runs/matching
    python benchmarks/matching.py --data nlvr --steps 3000 --out runs/matching

A twin is the same model with the same weights at the start, the same samples in the same order, and grey pictures.
With ``--words`` a third has its pictures and always the same words: what is right then is right by the picture alone.
Held-out pictures were never trained on. SHAPES (Andreas et al., arXiv:1511.02799) is there with 42 questions and up to
64 pictures of each, twelve of which are held out; the others are shown in all colours and mirrored.
Results go to ``benchmarks/results/matching.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import chiasm
from chiasm import registry
from chiasm.data.sources.playground.scenes import SHAPES
from chiasm.data.sources.playground.shapes import draw_shape
from chiasm.data.sources.playground.world import COLORS
from chiasm.train.objectives import objective
from chiasm.types import Batch

NETS = {"ViLT": "vilt-b32-vqa", "ALBEF": "albef-nlvr2", "VLMo": "vlmo-base-vqa", "BEiT-3": "beit3-base-vqa"}
QUESTIONS = {"color": "what color is it?", "shape": "what shape is it?"}
PURE = ("red", "green", "blue")
TOKENIZER = "src/chiasm/weights/tiny-lm"


def shapes(seed: int, count: int) -> list[dict[str, Any]]:
    """Questions about one drawn object that fills most of a dark picture: its colour or its shape."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        color, shape, kind = draw.choice(list(COLORS)), draw.choice(SHAPES), draw.choice(list(QUESTIONS))
        picture = Image.new("RGB", (32, 32), (draw.randrange(40),) * 3)
        x, y, radius = draw.uniform(13, 19), draw.uniform(13, 19), draw.uniform(9, 13)
        draw_shape(ImageDraw.Draw(picture), shape, x, y, radius, COLORS[color] if color != "black" else (255, 255, 255))
        found.append(
            sample([{"type": "image", "image": picture}], QUESTIONS[kind], color if kind == "color" else shape)
        )
    return found


def nlvr(folder: str, splits: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    """People's sentences about pictures of shapes, true or false."""
    source = registry.get("source", "nlvr")
    made = source(source.Config(folder=folder, splits=splits, question="{sentence}"))
    order = random.Random(0).sample(range(len(made)), min(count, len(made)))
    return [sample(made[i].messages[0].media, made[i].messages[0].text, made[i].answers[0]) for i in order]


def yes_or_no(folder: str, held: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """SHAPES: yes/no questions about nine cells of coloured shapes; of each question ``held`` pictures are held out."""
    by_question: dict[str, dict[bytes, tuple[Any, str]]] = {}
    for part in ("train.tiny", "train.small", "val", "test"):
        file = np.load(Path(folder) / "shapes_dataset" / f"{part}.npz")
        asked = (Path(folder) / "shapes_dataset" / f"{part}.query_str.txt").read_text().splitlines()
        for pixels, answer, question in zip(file["images"], file["answers"], asked, strict=True):
            told = (pixels, "true" if answer else "false")
            by_question.setdefault(question, {})[pixels.tobytes()] = told  # a picture twice is one
    learn: list[tuple[Any, str, str]] = []
    out, hidden, draw = [], set(), random.Random(0)
    for question, told_of in by_question.items():
        found = list(told_of.values())
        draw.shuffle(found)
        for pixels, answer in found[:held]:
            out.append(sample([{"type": "image", "image": Image.fromarray(pixels)}], question + "?", answer))
            hidden.add((question, pixels.tobytes()))
        learn += [seen for pixels, answer in found[held:] for seen in alike(pixels, question, answer)]
    learn = [x for x in learn if (x[1], x[0].tobytes()) not in hidden]
    draw.shuffle(learn)
    return [sample([{"type": "image", "image": Image.fromarray(x)}], q + "?", y) for x, q, y in learn], out


def alike(pixels: Any, question: str, answer: str) -> Iterator[tuple[Any, str, str]]:
    """The same question in other colours and from the other side: red, green and blue exchanged, and left and right."""
    for order in itertools.permutations(range(3)):
        names = {PURE[channel]: PURE[place] for place, channel in enumerate(order)}
        for sides in ({}, {"left": "right", "right": "left"}):
            words = " ".join((names | sides).get(word, word) for word in question.split())
            turned = pixels[:, ::-1] if sides else pixels
            yield np.ascontiguousarray(turned[:, :, list(order)]), words, answer


def sample(media: Any, text: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": [*media, text]}, {"role": "assistant", "content": answer}],
        "text": text,
    }


def model(preset: str, labels: list[str], dim: int, size: int, patch: int) -> Any:
    """A tiny form with a head over ``labels``, one picture of ``size`` pixels a sample."""
    config = chiasm.preset(preset, tiny=True, vocab=1024)
    changes: dict[str, Any] = {
        "model.tasks.classes": len(labels), "model.images": 1, "model.dim": dim, "model.mlp": 2 * dim,
        "processing.labels": labels, "processing.template": {"type": "pair", "length": 32, "read": "user"},
        "processing.media.image": {"type": "image", "placeholder": None, "size": size, "fit": "squash",
                                   "mean": [0.5] * 3, "std": [0.5] * 3},
    }  # fmt: skip
    if config.model.type == "albef":
        changes |= {"model.vision.image_size": size, "model.vision.dim": dim, "model.vision.mlp": 2 * dim}
        changes |= {"model.vision.patch": patch, "model.text_positions": 64}
    else:
        changes |= {"model.image_size": size, "model.patch": patch, "model.text_positions": 64}
    if config.model.type == "modality_experts":
        changes["model.text_distance"] = 64
    torch.manual_seed(0)
    vlm = chiasm.build(config.edit(**changes), tokenizer=TOKENIZER)
    for module in vlm.model.modules():  # deviations of 0.02 are for a width of 768: here what gets through is as large
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.weight.data *= (768 / dim) ** 0.5
    return vlm


def batches(processor: Any, samples: list[dict[str, Any]], size: int) -> list[Batch]:
    return [
        processor.batch([s["messages"] for s in samples[i : i + size]]) for i in range(0, len(samples) - size + 1, size)
    ]


def hide(batch: Batch, what: str) -> Batch:
    """The batch without its pictures, or with the first sample's words in every row."""
    if what == "pictures":
        batch.media["image"].inputs = torch.zeros_like(batch.media["image"].inputs)
    elif what == "words":
        batch.input_ids = batch.input_ids[:1].expand_as(batch.input_ids).clone()
        batch.segment_ids = batch.segment_ids[:1].expand_as(batch.segment_ids).clone()
    return batch


def train(vlm: Any, learn: list[Batch], held: list[Batch], steps: int, lr: float) -> dict[str, float]:
    """Cross-entropy over the labels for ``steps``; the share of held-out questions that is answered right."""
    loss_of = objective("classes")
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    begun = time.perf_counter()
    vlm.train()
    for step in range(steps):
        loss = loss_of(vlm.model, learn[step % len(learn)])
        (loss.total / loss.weight).backward()
        torch.nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begun
    vlm.eval()
    right = total = 0
    with torch.no_grad():
        for batch in held:
            right += int((vlm.model.classify(batch).argmax(1) == batch.scores.argmax(1)).sum())
            total += len(batch.ids)
    return {"accuracy": right / total, "n": total, "seconds": seconds}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    labels, size, patch = ["true", "false"], 64, 8
    if args.data == "shapes":
        labels, size = [*COLORS, *SHAPES], 32
        learn, held = shapes(1, args.samples), shapes(2, args.held)
    elif args.data == "SHAPES":
        size, patch = 30, 10  # a cell is a patch
        learn, held = yes_or_no(args.folder or "../shared/data/shapes_vqa", 12)
        args.samples, args.held = len(learn), len(held)
    else:
        folder = args.folder or "../shared/data/nlvr"
        learn, held = nlvr(folder, ("test", "hidden"), args.samples), nlvr(folder, ("dev",), args.held)
    rows = []
    for name, preset in NETS.items():
        if args.only not in (None, name):
            continue
        row: dict[str, Any] = {"model": name}
        for twin in ("", "pictures", "words") if args.words else ("", "pictures"):
            vlm = model(preset, labels, args.dim, size, patch)
            row["parameters"] = vlm.num_parameters()
            if twin != "pictures":  # the blind twin's are those of the whole, with grey pictures
                made = [batches(vlm.processor, part, args.batch) for part in (learn, held)]
            made = [[hide(b, twin) for b in part] for part in made]
            row[f"without {twin}" if twin else "whole"] = train(vlm, *made, args.steps, args.lr)
        print(row, flush=True)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    runs = {"whole": "right", "without pictures": "blind twin", "without words": "without words"}
    runs = {key: words for key, words in runs.items() if key in rows[0]}
    head = ["model", "parameters", *runs.values(), "seconds of training"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        shares = [f"{100 * row[key]['accuracy']:.1f} %" for key in runs]
        cells = [row["model"], f"{row['parameters']:,}", *shares, f"{row['whole']['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    told = (
        f"`python benchmarks/matching.py --data {args.data} --steps {args.steps}`: {args.samples} samples, batches of "
        f"{args.batch}, {rows[0]['whole']['n']} held-out questions, one thread, on a busy machine."
    )
    return "\n".join([told, "", *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("shapes", "SHAPES", "nlvr"), default="shapes")
    parser.add_argument("--folder", help="of NLVR or SHAPES; default: in ../shared/data")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--held", type=int, default=384)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--only", choices=tuple(NETS), help="one of the models")
    parser.add_argument("--words", action="store_true", help="also a twin without words")
    parser.add_argument("--out", default="benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "matching.json").write_text(json.dumps({"options": vars(args), "rows": rows}, indent=1))
    (out / "matching.md").write_text(table(rows, args))
    print(table(rows, args))


if __name__ == "__main__":
    main()

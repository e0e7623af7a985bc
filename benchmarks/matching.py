"""Do ViLT, ALBEF, VLMo and BEiT-3 use their pictures? Each tiny form against a blind twin, in one table.

    python benchmarks/matching.py --steps 600          # questions about drawn shapes; minutes on one core
    python benchmarks/matching.py --data SHAPES        # drawn pictures, then the real ones; about ten minutes a model
    python benchmarks/matching.py --data nlvr --steps 150

A twin is the same model with the same weights at the start, the same samples in the same order, and grey pictures.
With ``--words`` a third has its pictures and always the same words: what is right then is right by the picture alone.
Held-out pictures were never trained on. SHAPES (Andreas et al., arXiv:1511.02799) is there with 42 questions and 64
pictures of each: too few to learn to see from. So models are pre-trained on pictures drawn after its rules
(``shapes_like.py``) and fine-tuned on those real ones that are not held out, in all colours and from all sides.
Results go to ``benchmarks/results/matching.json`` and ``.md``, of SHAPES and NLVR with their names behind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import shapes_like as like
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
STAGES = (0.1, (0,)), (0.5, (0, 1, 1)), (0.4, (0, 1, 1, 2))  # shares of the drawn batches, and steps in a question
SETTINGS: dict[str, dict[str, Any]] = {  # what is not said on the command line
    "shapes": {"steps": 200, "batch": 32, "dim": 48, "lr": 3e-3, "held": 384, "size": 32, "patch": 8},
    "nlvr": {"steps": 150, "batch": 32, "dim": 48, "lr": 3e-3, "held": 384, "size": 64, "patch": 8},
    # a cell is a patch, black is 0; of each of the 42 questions 12 pictures are held out
    "SHAPES": {"steps": 2400, "drawn": 2100, "batch": 64, "dim": 64, "lr": 1e-3, "held": 12, "size": 30, "patch": 10,
               "depth": 4, "heads": 4, "mean": 0.0, "deviation": 0.3, "gain": 1.8, "tables": 1.0, "warm": 0.03},
}  # fmt: skip
COMMON = {"drawn": 0, "depth": None, "heads": 4, "mean": 0.5, "deviation": 0.5, "gain": 1.0, "tables": 0.0, "warm": 0.1}
PLACES = [(row, column) for row in range(3) for column in range(3)]
TABLES = ("words", "positions", "kinds", "cls")  # whose deviation can be another
TOKENIZER = "src/chiasm/weights/tiny-lm"

Samples = list[dict[str, Any]]
Stream = Callable[[int], Iterator[Samples]]  # batches of a size, each with new samples


def shapes(seed: int, count: int) -> Samples:
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


def nlvr(folder: str, splits: tuple[str, ...], count: int) -> Samples:
    """People's sentences about pictures of shapes, true or false."""
    source = registry.get("source", "nlvr")
    made = source(source.Config(folder=folder, splits=splits, question="{sentence}"))
    order = random.Random(0).sample(range(len(made)), min(count, len(made)))
    return [sample(made[i].messages[0].media, made[i].messages[0].text, made[i].answers[0]) for i in order]


def shapes_stages(folder: str, held: int, drawn: int) -> tuple[Stream, Samples]:
    """SHAPES: ``drawn`` batches of drawn pictures, then the real ones, turned; and the real ones that are held out.

    Drawn ones begin with questions about one cell, then one step is added, then a second.
    """
    seen, hidden = like.split(folder, held)

    def asked(size: int) -> Iterator[Samples]:
        draw = random.Random(1)
        for share, steps in STAGES:
            source = like.drawn(draw, steps)
            for _ in range(round(share * drawn)):
                yield [told(asked) | {"scene": cells} for asked, cells in itertools.islice(source, size)]
        while True:
            yield [told(like.turned(draw.choice(seen), draw)) for _ in range(size)]

    return asked, [told(one) for one in hidden]


def told(asked: like.Asked) -> dict[str, Any]:
    """A picture of SHAPES with its question."""
    pixels, text, right = asked
    return sample([{"type": "image", "image": Image.fromarray(pixels)}], text + "?", "true" if right else "false")


def sample(media: Any, text: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": [*media, text]}, {"role": "assistant", "content": answer}],
        "text": text,
    }


def model(preset: str, labels: list[str], args: argparse.Namespace) -> Any:
    """A tiny form with a head over ``labels``, one picture of ``args.size`` pixels a sample."""
    config, dim = chiasm.preset(preset, tiny=True, vocab=1024), args.dim
    changes: dict[str, Any] = {
        "model.tasks.classes": len(labels), "model.images": 1, "model.dim": dim, "model.mlp": 2 * dim,
        "model.text_positions": 64,
        "processing.labels": labels, "processing.template": {"type": "pair", "length": 32, "read": "user"},
        "processing.media.image": {"type": "image", "placeholder": None, "size": args.size, "fit": "squash",
                                   "mean": [args.mean] * 3, "std": [args.deviation] * 3},
    }  # fmt: skip
    kind, tower = config.model.type, "vision." if config.model.type == "albef" else ""
    changes |= {f"model.{tower}image_size": args.size, f"model.{tower}patch": args.patch, "model.heads": args.heads}
    if kind == "albef":
        changes |= {"model.vision.dim": dim, "model.vision.mlp": 2 * dim, "model.vision.heads": args.heads}
        changes |= {"model.vision.depth": args.depth - 1, "model.fusion_depth": args.depth - 1} if args.depth else {}
    elif args.depth:
        changes["model.depth"] = args.depth
    if kind == "modality_experts":
        changes["model.text_distance"] = 64
        changes |= {"model.layer_scale": None} if args.depth else {}  # 0.1 is for twelve blocks and many more steps
    torch.manual_seed(0)
    vlm = chiasm.build(config.edit(**changes), tokenizer=TOKENIZER)
    widen(vlm.model, dim, args)
    return vlm


def widen(model: Any, dim: int, args: argparse.Namespace) -> None:
    """Deviations of 0.02 are for a width of 768: here as much gets through, and more where ``args`` say so."""
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.weight.data *= (768 / dim) ** 0.5 * (args.gain if isinstance(module, torch.nn.Linear) else 1.0)
    for name, parameter in model.named_parameters() if args.tables else ():
        if any(table in name for table in TABLES) and "norm" not in name:
            torch.nn.init.normal_(parameter, std=args.tables)


def feed(processor: Any, learn: Samples | Stream, size: int, what: str) -> Iterator[tuple[Batch, Samples]]:
    """Batches without end and what they are of, the same for whole and twin; ``what`` is hidden."""
    if isinstance(learn, list):
        yield from itertools.cycle([(hide(batch, what), []) for batch in batches(processor, learn, size)])
    else:
        yield from ((hide(processor.batch([s["messages"] for s in part]), what), part) for part in learn(size))


class Cells(torch.nn.Module):
    """While pictures are drawn, what stands where is known, and each patch learns to say it.

    It says what stands in its cell and in those next to it, and whether it is what the question asks for. ALBEF's
    patches have not heard the question: there the fused text's first vector is compared with theirs to point.
    """

    def __init__(self, model: Any, dim: int):
        super().__init__()
        self.deaf = model.config.type == "albef"
        self.head = torch.nn.Linear(dim, 30 if self.deaf else 31)
        self.point = torch.nn.Linear(dim, dim + 1) if self.deaf else None
        self.states: list[Any] = []  # of the patches, as the model last saw them [B, 9, D]
        self.asking: list[Any] = []  # the text's first vector [B, D]
        if self.deaf:
            fuse = model.body.fuse
            model.body.fuse = lambda text, mask, images: self.fused(fuse(text, mask, images), images[0])
        else:
            joint = model.joint
            model.joint = lambda *given: self.watch(joint(*given))

    def watch(self, joint: Any) -> Any:
        self.keep(joint.hidden[:, joint.picture])
        return joint

    def fused(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        self.keep(image)
        self.asking = [text[:, 0]]
        return text

    def keep(self, states: torch.Tensor) -> None:
        self.states = [states[:, 1:]]  # without the class vector

    def forward(self, samples: Samples) -> torch.Tensor:
        """The loss of a sample's nine cells, once for what is there and once for what is asked for."""
        found = []
        for sample in samples:
            right = like.pointed(sample["scene"], sample["text"].rstrip("?"))
            found.append([[*like.around(sample["scene"], place), place in right] for place in PLACES])
        said, known = self.head(self.states[0]), torch.tensor(found).float()  # [B, 9, 30 or 31], [B, 9, 31]
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        pointed = said[..., -1]  # [B, 9]
        if self.point is not None:
            asking = self.point(self.asking[0])  # [B, D + 1]
            pointed = (self.states[0] @ asking[:, :-1, None])[..., 0] + asking[:, -1:]
        return 9 * (loss(said[..., :30], known[..., :30]) + loss(pointed, known[..., 30]))


def batches(processor: Any, samples: Samples, size: int) -> list[Batch]:
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


def train(vlm: Any, learn: Iterator[tuple[Batch, Samples]], args: argparse.Namespace) -> float:
    """Cross-entropy over the labels, and over cells where they are known; the seconds of CPU that it took."""
    loss_of = objective("classes")
    cells = Cells(vlm.model, args.dim) if args.drawn else torch.nn.Module()
    parameters = [*vlm.parameters(), *cells.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98))
    begun = time.process_time()
    vlm.train()
    for step, (batch, samples) in enumerate(itertools.islice(learn, args.steps)):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / (args.warm * args.steps)) * (1 - step / args.steps)
        found = loss_of(vlm.model, batch)
        loss = found.total / found.weight
        if samples and "scene" in samples[0]:
            loss = loss + cells(samples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 199:
            told = {name: round(float(hits / count), 3) for name, (hits, count) in found.parts.items()}
            print(step + 1, round(float(loss.detach()), 3), told, round(time.process_time() - begun), flush=True)
    return time.process_time() - begun


def judged(vlm: Any, held: list[Batch]) -> dict[str, float]:
    """The share of held-out questions that is answered right."""
    vlm.eval()
    with torch.no_grad():
        hits = [vlm.model.classify(batch).argmax(1) == batch.scores.argmax(1) for batch in held]
    right = torch.cat(hits)
    return {"accuracy": float(right.float().mean()), "n": len(right)}


def prepared(args: argparse.Namespace) -> tuple[list[str], Samples | Stream, Samples]:
    """The labels, what is learned and what is held out."""
    if args.data == "shapes":
        return [*COLORS, *SHAPES], shapes(1, args.samples), shapes(2, args.held)
    if args.data == "SHAPES":
        learn, held = shapes_stages(args.folder or "../shared/data/shapes_vqa", args.held, args.drawn)
        return ["true", "false"], learn, held
    folder = args.folder or "../shared/data/nlvr"
    parts = nlvr(folder, ("test", "hidden"), args.samples), nlvr(folder, ("dev",), args.held)
    return ["true", "false"], *parts


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    labels, learn, held = prepared(args)
    rows = []
    for name, preset in NETS.items():
        if args.only not in (None, name):
            continue
        row: dict[str, Any] = {"model": name, "steps": args.steps, "drawn": args.drawn}
        for twin in ("", "pictures", "words") if args.words else ("", "pictures"):
            vlm = model(preset, labels, args)
            row["parameters"] = vlm.num_parameters()
            seconds = train(vlm, feed(vlm.processor, learn, args.batch, twin), args)
            found = judged(vlm, [hide(batch, twin) for batch in batches(vlm.processor, held, 12)])
            row[f"without {twin}" if twin else "whole"] = found | {"seconds": seconds}
            print(name, twin, row, flush=True)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    runs = {"whole": "right", "without pictures": "blind twin", "without words": "without words"}
    runs = {key: words for key, words in runs.items() if key in rows[0]}
    head = ["model", "parameters", "steps", *runs.values(), "CPU seconds of training"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        shares = [f"{100 * row[key]['accuracy']:.1f} %" for key in runs]
        steps = f"{row['steps']:,}" + (f", {row['drawn']:,} of them drawn" if row["drawn"] else "")
        cells = [row["model"], f"{row['parameters']:,}", steps, *shares, f"{row['whole']['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    learned = "the first on drawn pictures" if args.drawn else f"{args.samples} samples"
    told = (
        f"`python benchmarks/matching.py --data {args.data}`: batches of {args.batch}, {learned}; "
        f"{rows[0]['whole']['n']} held-out questions; one thread, on a busy machine."
    )
    return "\n".join([told, "", *lines]) + "\n"


def merged(rows: list[dict[str, Any]], options: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """With ``--only``: what an earlier run, with the same options but for steps, found of the other models stays."""
    stored = json.loads(file.read_text()) if options["only"] and file.exists() else {"options": {}, "rows": []}
    same = all(
        stored["options"].get(key) == value
        for key, value in options.items()
        if key not in ("only", "out", "steps", "drawn")
    )
    found = {row["model"]: row for row in (stored["rows"] if same else []) + rows}
    return [found[name] for name in NETS if name in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("shapes", "SHAPES", "nlvr"), default="shapes")
    parser.add_argument("--folder", help="of NLVR or SHAPES; default: in ../shared/data")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--held", type=int, help="samples; of SHAPES: pictures of each question")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--drawn", type=int, help="SHAPES: so many of the steps are on drawn pictures")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--only", choices=tuple(NETS), help="one of the models")
    parser.add_argument("--words", action="store_true", help="also a twin without words")
    parser.add_argument("--out", default="benchmarks/results")
    args = parser.parse_args()
    for key, value in (COMMON | SETTINGS[args.data]).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    torch.set_num_threads(1)
    rows, out = run(args), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    name = "matching" if args.data == "shapes" else f"matching-{args.data}"
    rows = merged(rows, vars(args), out / f"{name}.json")
    (out / f"{name}.json").write_text(json.dumps({"options": vars(args), "rows": rows}, indent=1) + "\n")
    (out / f"{name}.md").write_text(table(rows, args))
    print(table(rows, args))


if __name__ == "__main__":
    main()

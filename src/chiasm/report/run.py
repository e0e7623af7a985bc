"""A training run as one HTML file: scores, loss curves, held-out examples with their pictures, the plan, the recipe."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from chiasm.data.base import Example
from chiasm.data.shuffle import media_of
from chiasm.processing.base import Place
from chiasm.processing.open import open_picture
from chiasm.report.curve import Line, curve

MOST_PICTURES = 4  # of one example
SIDE = 240  # pixels of a picture's longer side


@dataclass
class StageReport:
    """What a stage left: its settings, its plan, its log."""

    name: str
    settings: dict[str, Any]
    plan: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    proof: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, settings: dict[str, Any]) -> StageReport:
        """From a stage's folder."""
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        plan = folder / "plan.json"
        rows = json.loads(plan.read_text()) if plan.is_file() else []
        proof = json.loads((folder / "proof.json").read_text()) if (folder / "proof.json").is_file() else {}
        return cls(folder.name, settings, rows, [json.loads(line) for line in lines], proof)

    @property
    def steps(self) -> int:
        """The last step of the log."""
        return self.log[-1]["step"] if self.log else 0

    @property
    def trained(self) -> int:
        """Parameters that were learned."""
        return sum(row["parameters"] for row in self.plan if row["lr"])

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(row["parameters"] for row in self.plan)

    def last(self, key: str) -> float | None:
        """The newest value of a key of the log."""
        return next((r[key] for r in reversed(self.log) if key in r), None)

    @property
    def data_wait(self) -> float | None:
        """The share of the steps' time that passed in waiting for data, the first line of the log left out."""
        lines = [(r["data_wait"], r["seconds_per_step"], r["step"]) for r in self.log if "data_wait" in r]
        spans = [(w, each * (step - before[2])) for before, (w, each, step) in pairwise(lines) if step > before[2]]
        total = sum(seconds for _, seconds in spans)
        return sum(w * seconds for w, seconds in spans) / total if total else None

    @property
    def reading(self) -> dict[str, Any]:
        """The newest reading of the image-use meter: ``told`` and ``blind``; empty where there is none."""
        found = next((r for r in reversed(self.log) if "image_use/verdict" in r), None)
        return {"told": found["image_use/told"], "blind": found["image_use/verdict"] == "blind"} if found else {}

    def by_source(self) -> list[tuple[str, float]]:
        """The newest training loss of each data source."""
        keys = dict.fromkeys(key for record in self.log for key in record if key.startswith("loss/source/"))
        return [(key.removeprefix("loss/source/"), float(self.last(key) or 0.0)) for key in keys]

    def lines(self) -> list[Line]:
        """The curves of the loss."""
        names = (
            ("training loss", "train", "loss"),
            ("held-out loss with shuffled pictures", "mixed", "held_out/loss_shuffled"),
            ("held-out loss", "held", "held_out/loss"),
        )
        found = [(n, kind, [(r["step"], r[key]) for r in self.log if key in r]) for n, kind, key in names]
        return [Line(n, kind, points, smooth=kind == "train") for n, kind, points in found if points]

    def svg(self) -> Markup:
        """The loss curves."""
        return curve(self.lines(), f"loss of stage {self.name} by step")


@dataclass(frozen=True)
class Shown:
    """A held-out example in the report."""

    id: str
    task: str
    question: str
    prediction: str
    target: str
    score: float
    shuffled: str | None
    pictures: list[str]
    earlier: list[tuple[str, str]] = field(default_factory=list)  # (role, text) of the turns before the question
    queries: list[str] = field(default_factory=list)  # what each query of the connector looks at, one sheet a kind


def write_report(
    path: Path,
    title: str,
    stages: Sequence[StageReport],
    rows: Sequence[tuple[str, int, float, float | None]],
    shown: Sequence[Shown],
    receipt: dict[str, Any],
    recipe: str,
) -> Path:
    """Write the page; it refers to no other file. ``rows`` are (task, examples, true score, shuffled score)."""
    env = Environment(loader=PackageLoader("chiasm.report", "pages"), autoescape=True, trim_blocks=True)
    env.filters.update(percent=lambda x: f"{100 * x:.1f}", short=_short)
    page = env.get_template("run.html").render(
        title=title,
        stages=stages,
        rows=rows,
        total=rows[-1] if rows else None,
        shown=shown,
        receipt=json.dumps(receipt, indent=2, ensure_ascii=False),
        recipe=recipe,
    )
    path.write_text(page, encoding="utf-8")
    return path


def picture_urls(example: Example) -> list[str]:
    """The first pictures of an example (frames of a clip) as small data URLs."""
    found: list[str] = []
    for index, medium in enumerate(media_of(example)):
        frames = medium.data if medium.kind == "video" and isinstance(medium.data, (list, tuple)) else [medium.data]
        for frame in frames if medium.kind in ("image", "video") and len(found) < MOST_PICTURES else ():
            if len(found) < MOST_PICTURES and not (medium.kind == "video" and isinstance(frame, str)):
                found.append(picture_url(open_picture(frame, Place(example.id, index, len(media_of(example))))))
    return found


def picture_url(picture: Image.Image) -> str:
    """A picture, small, as a data URL."""
    picture = picture.convert("RGB")
    small = max(picture.size) <= SIDE
    if not small:
        picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG" if small else "JPEG", **({} if small else {"quality": 82}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def sheet_url(picture: Image.Image) -> str:
    """A sheet of small pictures as a data URL, in its own size."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"

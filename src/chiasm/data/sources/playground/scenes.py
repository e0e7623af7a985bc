"""Shape scenes: up to four coloured shapes on a grid of three by three places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from PIL import Image as Pictures
from PIL import ImageDraw

from chiasm.data.sources.playground.shapes import draw_shape
from chiasm.data.sources.playground.world import COLORS, Family, Question, Split, article, listed
from chiasm.types import Image, Media

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
SCALE = {"small": 0.165, "large": 0.28}  # width of a shape as a share of the picture's
OVERSAMPLE = 3  # shapes are drawn this many times larger and averaged, so that their edges are smooth


@dataclass(frozen=True)
class Thing:
    """One object: a shape, or a handwritten digit (``ink`` is then the index of the stored handwriting)."""

    name: str
    color: str
    size: str
    place: int
    ink: int | None = None

    @property
    def row(self) -> int:
        """0 at the top."""
        return self.place // 3

    @property
    def column(self) -> int:
        """0 at the left."""
        return self.place % 3

    @property
    def words(self) -> str:
        """``small red circle``; a digit has no size word."""
        return " ".join(w for w in (self.size, self.color, self.name) if w)


Scene = tuple[Thing, ...]


class Scenes(Family):
    """Colour, shape, size, place, count and relations."""

    name = "scene"
    kinds: tuple[str, ...] = (
        *("color", "shape", "where", "what", "size"),
        *("count_all", "count_color", "count_shape"),
        *("relation", "relative_color", "relative_shape"),
    )
    balanced: ClassVar[dict[str, tuple[str, ...]]] = {
        "size": SIZES,
        "count_all": ("1", "2", "3", "4"),
        "count_color": ("0", "1", "2", "3"),
        "count_shape": ("0", "1", "2", "3"),
        "relation": ("yes", "no"),
    }

    def sample(self, rng: Random, split: Split) -> Scene:
        """One to four objects. Half of the scenes repeat colours or shapes, so that counting has something to count."""
        colors, shapes = list(COLORS), list(SHAPES)
        theme = rng.random()
        if theme < 0.3:
            colors = rng.sample(colors, 2)
        elif theme < 0.6:
            shapes = rng.sample(shapes, 2)
        places = sorted(rng.sample(range(9), rng.randint(1, 4)))
        return tuple(Thing(rng.choice(shapes), rng.choice(colors), rng.choice(SIZES), place) for place in places)

    def describe(self, thing: Scene) -> str:
        """``at the top left a small red circle and at the center a large blue star``."""
        return listed([f"at the {PLACES[t.place]} {article(t.words)}" for t in thing])

    def shorthand(self, thing: Scene) -> str | None:
        """``void smallredcircle void …``: nine words, row by row."""
        return shorthand(thing)

    def draw(self, thing: Scene, size: int, rng: Random) -> tuple[Media, ...]:
        """One picture; places, sizes and the background vary a little."""
        return (Image(paint(thing, size, rng)),)

    def ask(self, thing: Scene, kind: str, rng: Random) -> Question | None:
        """A question of this kind, or None."""
        if kind == "count_all":
            return Question(kind, "How many objects are there?", str(len(thing)))
        if kind == "count_color":
            color = _spread(rng, thing, "color", list(COLORS))
            return Question(kind, f"How many {color} objects are there?", str(sum(t.color == color for t in thing)))
        if kind == "count_shape":
            shape = _spread(rng, thing, "name", list(SHAPES))
            return Question(kind, f"How many {plural(shape)} are there?", str(sum(t.name == shape for t in thing)))
        if kind in ("relation", "relative_color", "relative_shape"):
            return _relation(thing, kind, rng)
        return _attribute(thing, kind, rng)


class Singles(Scenes):
    """Scenes of one object, named by colour and shape: labels for classification.

    A single object is the same thing as a scene of one, so that the splits of both agree.
    """

    name = "single"
    kinds = ("name",)
    balanced: ClassVar[dict[str, tuple[str, ...]]] = {}
    labels = tuple(f"{c} {s}" for c in COLORS for s in SHAPES)

    def sample(self, rng: Random, split: Split) -> Scene:
        """One object."""
        return (Thing(rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(SIZES), rng.randrange(9)),)

    def ask(self, thing: Scene, kind: str, rng: Random) -> Question | None:
        """The only question."""
        return Question(kind, "What is shown?", f"{thing[0].color} {thing[0].name}")


def shorthand(scene: Scene) -> str:
    """One word for each place, row by row: size, colour and name of what is there, written together; else ``void``."""
    found = {t.place: t.words.replace(" ", "") for t in scene}
    return " ".join(found.get(place, "void") for place in range(9))


def _attribute(scene: Scene, kind: str, rng: Random) -> Question | None:
    """Colour, shape, size or place of one object, named by what is not asked."""
    target = rng.choice(scene)
    place = f"object at the {PLACES[target.place]}"
    if kind == "what":
        return Question(kind, f"What is at the {PLACES[target.place]}?", article(f"{target.color} {target.name}"))
    if kind == "where":
        name = refer(target, scene, rng, ("color", "name"), ("size", "name"), ("size", "color", "name"))
        return name and Question(kind, f"Where is the {name}?", PLACES[target.place])  # type: ignore[return-value]
    if kind == "color":
        name = refer(target, scene, rng, ("name",), ("size", "name"), other=place)
        return Question(kind, f"What color is the {name}?", target.color)
    if kind == "shape":
        name = refer(target, scene, rng, ("color",), ("size", "color"), other=place)
        return Question(kind, f"What shape is the {name}?", target.name)
    name = refer(target, scene, rng, ("name",), ("color", "name"), other=place)
    return Question("size", f"What size is the {name}?", target.size)


def _relation(scene: Scene, kind: str, rng: Random) -> Question | None:
    """How two objects stand to each other, or what stands in a relation to one."""
    if len(scene) < 2:
        return None
    target, anchor = rng.sample(scene, 2)
    relation = rng.choice(RELATIONS)
    anchor_name = refer(anchor, scene, rng, ("color", "name"), ("size", "color", "name"))
    if anchor_name is None:
        return None
    if kind == "relation":
        name = refer(target, scene, rng, ("color", "name"), ("size", "color", "name"))
        if name is None or not (related(target, anchor, relation) or related(anchor, target, relation)):
            return None
        answer = "yes" if related(target, anchor, relation) else "no"
        return Question(kind, f"Is the {name} {relation} the {anchor_name}?", answer)
    found = [t for t in scene if t is not anchor and related(t, anchor, relation)]
    if len(found) != 1:
        return None
    asked, answer = ("color", found[0].color) if kind == "relative_color" else ("shape", found[0].name)
    return Question(kind, f"What {asked} is the object {relation} the {anchor_name}?", answer)


def related(a: Thing, b: Thing, relation: str) -> bool:
    """Whether ``a`` stands in this relation to ``b``, by columns and rows of the grid."""
    if relation == "left of":
        return a.column < b.column
    if relation == "right of":
        return a.column > b.column
    return a.row < b.row if relation == "above" else a.row > b.row


def refer(target: Thing, scene: Scene, rng: Random, *choices: Sequence[str], other: str | None = None) -> str | None:
    """Words that name the target and nothing else in the scene, from one of the ``choices`` of attributes, or
    ``other``."""
    names = []
    for attributes in choices:
        if sum(all(getattr(t, a) == getattr(target, a) for a in attributes) for t in scene) == 1:
            words = [getattr(target, a) for a in attributes] + ([] if "name" in attributes else ["object"])
            names.append(" ".join(words))
    if other is not None and (not names or rng.random() < 0.25):
        return other
    return rng.choice(names[:2]) if names else None


def _spread(rng: Random, scene: Scene, attribute: str, values: list[str]) -> str:
    """A value to count, such that the counts a scene offers are about equally likely (zero included)."""
    counts: dict[int, list[str]] = {}
    for value in values:
        counts.setdefault(sum(getattr(t, attribute) == value for t in scene), []).append(value)
    return rng.choice(counts[rng.choice(sorted(counts))])


def plural(shape: str) -> str:
    """``crosses``, ``circles``."""
    return shape + ("es" if shape.endswith("s") else "s")


def background(rng: Random) -> tuple[int, int, int]:
    """A light grey with a slight tint."""
    base = rng.randint(222, 250)
    return tuple(min(255, base + rng.randint(-4, 4)) for _ in range(3))  # type: ignore[return-value]


def paint(scene: Scene, size: int, rng: Random, shift: dict[int, tuple[float, float]] | None = None) -> Pictures.Image:
    """The scene's shapes on a plain ground, ``size`` × ``size``.

    ``shift`` moves objects, by index, in shares of the picture.
    """
    canvas = size * OVERSAMPLE
    picture = Pictures.new("RGB", (canvas, canvas), background(rng))
    pen = ImageDraw.Draw(picture)
    for index, thing in enumerate(scene):
        if thing.ink is not None:
            continue
        dx, dy = (shift or {}).get(index, (0.0, 0.0))
        x = ((thing.column + 0.5) / 3 + dx + rng.uniform(-0.025, 0.025)) * canvas
        y = ((thing.row + 0.5) / 3 + dy + rng.uniform(-0.025, 0.025)) * canvas
        radius = SCALE[thing.size] * rng.uniform(0.94, 1.06) * canvas / 2
        draw_shape(pen, thing.name, x, y, radius, vary(COLORS[thing.color], rng))
    return picture.reduce(OVERSAMPLE)


def vary(color: tuple[int, int, int], rng: Random) -> tuple[int, int, int]:
    """The colour with a little noise, the same for a whole object."""
    return tuple(max(0, min(255, c + rng.randint(-10, 10))) for c in color)  # type: ignore[return-value]


def recolored(scene: Scene, index: int, **changes: object) -> Scene:
    """The scene with one object changed."""
    return (*scene[:index], replace(scene[index], **changes), *scene[index + 1 :])  # type: ignore[arg-type]

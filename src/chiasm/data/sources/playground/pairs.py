"""Two-picture comparisons and short clips."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from chiasm.data.sources.playground.scenes import PLACES, SHAPES, Scene, Scenes, Thing, paint, recolored, shorthand
from chiasm.data.sources.playground.world import COLORS, Family, Question, Split, article
from chiasm.types import Image, Media, Video

FRAMES = 4
TRAVEL = 0.46  # how far a moving shape goes in a clip, as a share of the picture
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Pair:
    """Two scenes that differ in one object's colour, shape or size, or in one object that is only in one of them."""

    first: Scene
    second: Scene
    change: str


class Pairs(Family):
    """What changed from the first picture to the second; what is where in which."""

    name = "pair"
    kinds = ("change", "color_in", "count_in", "same")
    balanced: ClassVar[dict[str, tuple[str, ...]]] = {
        "change": ("color", "shape", "added", "removed"),
        "same": ("yes", "no"),
        "count_in": ("1", "2", "3"),
    }
    caption_question = "Describe the two pictures."

    def sample(self, rng: Random, split: Split) -> Pair:
        """A scene of one to three objects and the same scene with one change."""
        places = sorted(rng.sample(range(9), rng.randint(1, 3)))
        first: Scene = tuple(
            Thing(name, color, "large", place)
            for name, color, place in zip(rng.sample(SHAPES, 3), rng.sample(list(COLORS), 3), places)
        )
        i = rng.randrange(len(first))
        change = rng.choice(("color", "shape", "added", "removed", "nothing"))
        if change == "color":
            free = [c for c in COLORS if all(c != t.color for t in first)]
            return Pair(first, recolored(first, i, color=rng.choice(free)), change)
        if change == "shape":
            free = [s for s in SHAPES if all(s != t.name for t in first)]
            return Pair(first, recolored(first, i, name=rng.choice(free)), change)
        if change in ("added", "removed") and len(first) > 1:
            less = first[:i] + first[i + 1 :]
            return Pair(less, first, change) if change == "added" else Pair(first, less, change)
        return Pair(first, first, "nothing")

    def describe(self, thing: Pair) -> str:
        """``first at the top a large red circle; second at the top a large blue circle``."""
        return f"first {Scenes().describe(thing.first)}; second {Scenes().describe(thing.second)}"

    def shorthand(self, thing: Pair) -> str | None:
        """Twice nine words."""
        return f"{shorthand(thing.first)} {shorthand(thing.second)}"

    def draw(self, thing: Pair, size: int, rng: Random) -> tuple[Media, ...]:
        """Two pictures."""
        return (Image(paint(thing.first, size, rng)), Image(paint(thing.second, size, rng)))

    def ask(self, thing: Pair, kind: str, rng: Random) -> Question | None:
        """A question of this kind, or None."""
        which, scene = rng.choice((("first", thing.first), ("second", thing.second)))
        target = rng.choice(scene)
        if kind == "color_in":
            return Question(kind, f"What color is the {target.name} in the {which} picture?", target.color)
        if kind == "count_in":
            return Question(kind, f"How many objects are in the {which} picture?", str(len(scene)))
        if kind == "same":
            return Question(kind, "Are the two pictures the same?", "yes" if thing.change == "nothing" else "no")
        if thing.change == "nothing":
            return None
        return Question("change", "What changed, color, shape, added or removed?", thing.change)


@dataclass(frozen=True)
class Clip:
    """Objects of which one moves straight in a direction."""

    moving: Thing
    still: Thing
    direction: str


class Clips(Family):
    """Which shape moves, and where to."""

    name = "clip"
    kinds = ("moves_where", "moving_color", "moving_shape")
    balanced: ClassVar[dict[str, tuple[str, ...]]] = {"moves_where": tuple(DIRECTIONS)}
    caption_question = "Describe the clip."

    def sample(self, rng: Random, split: Split) -> Clip:
        """Two objects; the moving one starts so that it stays in the picture and passes no one."""
        direction = rng.choice(list(DIRECTIONS))
        dx, dy = DIRECTIONS[direction]
        lane, other = rng.sample(range(3), 2)
        start = 2 if dx + dy < 0 else 0
        place = lane * 3 + start if dx else start * 3 + lane
        rest = other * 3 + rng.randrange(3) if dx else rng.randrange(3) * 3 + other
        names, colors = rng.sample(SHAPES, 2), rng.sample(list(COLORS), 2)
        return Clip(Thing(names[0], colors[0], "large", place), Thing(names[1], colors[1], "large", rest), direction)

    def describe(self, thing: Clip) -> str:
        """``a red circle at the top left moves right and a blue star stays at the bottom``."""
        move, still = thing.moving, thing.still
        return (
            f"{article(move.color)} {move.name} at the {PLACES[move.place]} moves {thing.direction} and "
            f"{article(still.color)} {still.name} stays at the {PLACES[still.place]}"
        )

    def draw(self, thing: Clip, size: int, rng: Random) -> tuple[Media, ...]:
        """One clip of four frames, one frame a second. The camera does not shake: every frame has the same noise."""
        dx, dy = DIRECTIONS[thing.direction]
        state, frames = rng.getstate(), []
        for frame in range(FRAMES):
            rng.setstate(state)
            share = TRAVEL * 1.3 * frame / (FRAMES - 1)
            frames.append(paint((thing.moving, thing.still), size, rng, {0: (dx * share, dy * share)}))
        return (Video(tuple(frames), fps=1.0),)

    def ask(self, thing: Clip, kind: str, rng: Random) -> Question | None:
        """A question of this kind."""
        if kind == "moves_where":
            return Question(kind, f"Where does the {thing.moving.color} {thing.moving.name} move?", thing.direction)
        if kind == "moving_color":
            return Question(kind, "What color is the moving object?", thing.moving.color)
        return Question("moving_shape", "What shape is the moving object?", thing.moving.name)

"""The contracts: what flows from a conversation to an answer, with shapes.

Letters used in the whole package: ``B`` batch, ``T`` sequence length, ``N`` tokens of one medium, ``U`` units of one
medium (tiles of an image, frames of a video), ``K`` queries, ``D`` width, ``H`` heads, ``V`` vocabulary.

    messages ──processing──▶ Sample ──collate / pack──▶ Batch ──fusion model──▶ Output

Nothing in this file imports torch at run time, so that the command line starts quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from chiasm.errors import DataError, nearest

if TYPE_CHECKING:
    from torch import Tensor

ROLES = ("system", "user", "assistant", "tool")


# ------------------------------------------------------------------------------------------------ parts of a message


@dataclass(frozen=True)
class Text:
    """Plain text. A special token spelled in it stays text: media and control tokens are never found by scanning."""

    text: str


@dataclass(frozen=True)
class Media:
    """A part that is not text. ``data`` is whatever the front end of its ``kind`` can open.

    A new modality subclasses this with its own ``kind`` and registers the class: ``register("modality", "graph")``.
    """

    data: Any
    kind: ClassVar[str] = ""


@dataclass(frozen=True)
class Image(Media):
    """A picture: a path, a PIL image, encoded bytes, an array ``[height, width, 3]`` of uint8, or a data URL."""

    kind: ClassVar[str] = "image"


@dataclass(frozen=True)
class Video(Media):
    """A clip: a path, or a sequence of pictures. ``fps`` (frames/second) is needed only for a sequence."""

    fps: float | None = None
    kind: ClassVar[str] = "video"


@dataclass(frozen=True)
class Audio(Media):
    """A sound: a path or samples ``[n]`` with their ``rate`` (Hz)."""

    rate: int | None = None
    kind: ClassVar[str] = "audio"


@dataclass(frozen=True)
class Graph(Media):
    """A graph, for instance a molecule given as SMILES."""

    kind: ClassVar[str] = "graph"


@dataclass(frozen=True)
class Series(Media):
    """A time series ``[n, channels]``."""

    kind: ClassVar[str] = "series"


@dataclass(frozen=True)
class Box:
    """A region ``(x0, y0, x1, y1)`` in pixels of the original picture number ``image`` of the conversation."""

    xyxy: tuple[float, float, float, float]
    image: int = 0


Part = Text | Media | Box


@dataclass(frozen=True)
class Call:
    """A tool that an assistant calls. ``arguments`` is a JSON object as text; ``id`` is what its result names."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn. ``train`` says whether an assistant turn is learned from (None: every assistant turn is).

    An assistant's turn may hold ``calls``; a turn of role "tool" is what came of the call with the id ``answers``.
    """

    role: str
    parts: tuple[Part, ...]
    train: bool | None = None
    calls: tuple[Call, ...] = ()
    answers: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"unknown role {self.role!r}; {nearest(self.role, ROLES)}", "role")

    @property
    def text(self) -> str:
        """The text parts joined, without the media."""
        return "".join(p.text for p in self.parts if isinstance(p, Text))

    @property
    def media(self) -> tuple[Media, ...]:
        """The media parts in order."""
        return tuple(p for p in self.parts if isinstance(p, Media))


# ------------------------------------------------------------------------------------------- a rendered conversation


@dataclass(frozen=True)
class Piece:
    """A run of a rendered conversation: text of a user, a literal of the template, or a medium.

    Only in a ``literal`` do control tokens count. ``train``: what overlaps this run is learned from. ``medium`` is the
    index of a medium among all media of the conversation; ``text`` is then its placeholder token, or empty.
    """

    text: str = ""
    literal: bool = False
    train: bool = False
    medium: int | None = None


@dataclass(frozen=True)
class Encoding:
    """The tokens of some pieces. Token ``i`` overlaps the pieces ``spans[i][0] .. spans[i][1]`` (both included).

    A medium is exactly one token whose id is that of its placeholder, or -1 where the tokenizer has none.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


# ----------------------------------------------------------------------------------------------- tensors of a sample


@dataclass(frozen=True)
class Layout:
    """How a medium was cut into units: all that is needed to count its tokens and to put them together again.

    ``shape`` is the shape of one unit (for a picture ``(3, height, width)``), ``grid`` the (rows, columns) of tiles
    that follow the base tile ((0, 0): there are none), or of the patches of a unit that is a list of patches,
    ``original`` the (height, width) in pixels before any change.
    """

    units: int
    shape: tuple[int, ...]
    grid: tuple[int, int] = (0, 0)
    original: tuple[int, int] = (0, 0)


@dataclass
class MediaItem:
    """One medium of one sample, ready for its encoder."""

    kind: str
    inputs: Tensor  # [U, *layout.shape]; [0, *layout.shape] where its features are stored
    layout: Layout
    slots: Tensor | None = None  # [N] positions in the sample's input_ids that its tokens take
    key: str = ""  # what a frozen encoder's features of it are stored under; empty: they are not
    cond: Tensor | None = None  # [L] ids of the instruction, for connectors that read it
    ragged: bool = False  # sizes differ: in a batch zeros fill up to the largest, on the right and below

    def __repr__(self) -> str:
        held = "slots not known yet" if self.slots is None else f"{len(self.slots)} tokens"
        return f"MediaItem({self.kind} of {shaped(self.inputs)}, {held})"


@dataclass
class Answers:
    """Different answers of several people to the questions of a batch, padded on the right."""

    ids: Tensor  # [A, S] long, with the tokens that open and end a text
    mask: Tensor  # [A, S] bool
    shares: Tensor  # [A] of the people who gave this answer, 0 to 1
    owners: Tensor  # [A] long: the row of the question


@dataclass
class Sample:
    """A rendered conversation."""

    id: str
    input_ids: Tensor  # [T] long; placeholders where media go
    loss_mask: Tensor  # [T] bool: True where the token is a target. Made while rendering.
    media: list[MediaItem] = field(default_factory=list)
    target_ids: Tensor | None = None  # [S] long: the decoder's side, for encoder-decoder language models only
    source: str = ""  # the data source it came from
    scores: Tensor | None = None  # [C] how right each label is, for models that classify
    masked_ids: Tensor | None = None  # [T] long: input_ids with hidden words, for objectives that fill them
    masked: Tensor | None = None  # [T] bool: which are hidden
    answers: Answers | None = None  # for models that write them; all are this sample's
    lost: int = 0  # tokens of the text that were left out because it was too long
    origin: Callable[[Any], str] | None = None  # shows it in a notebook

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def __repr__(self) -> str:
        media = "".join(f", {item.kind} of {shaped(item.inputs)}" for item in self.media)
        return f"Sample({self.id!r}, {len(self)} tokens, {int(self.loss_mask.sum())} of them targets{media})"

    def _repr_html_(self) -> str | None:
        return self.origin and self.origin(self)


@dataclass
class Condition:
    """The instruction, for connectors that read it: ids of the connector's own vocabulary, a row for each unit."""

    ids: Tensor  # [U, L] long
    mask: Tensor  # [U, L] bool, False at padding


@dataclass
class MediaBatch:
    """All media of one kind in a batch, units of all items one after the other."""

    inputs: Tensor  # [sum of units, *shape]; of ragged items the largest shape, each layout says its own
    layouts: list[Layout]  # one per item
    slots: Tensor  # [sum of counts] flat positions in [B*T]
    counts: list[int]  # tokens of each item
    owners: list[int]  # index in Batch.ids of each item
    keys: list[str] = field(default_factory=list)  # of each item, where features are stored
    given: list[int] = field(default_factory=list)  # units of each item that stand in inputs, with keys only
    features: dict[str, Tokens] | None = None  # encoder → [all units, N, D]; given, no encoder runs
    cond: Condition | None = None  # one row per item

    def __repr__(self) -> str:
        return f"MediaBatch({len(self.layouts)} media in {shaped(self.inputs)}, {self.slots.numel()} tokens)"


@dataclass
class Batch:
    """What a model sees. Padded ``[B, T]`` (either side), or packed ``[1, T]`` with several segments in the row."""

    input_ids: Tensor  # [B, T] long
    positions: Tensor  # [B, T] long, counted inside each segment
    segment_ids: Tensor  # [B, T] long; 0 is padding, 1.. number the conversations in a row
    loss_mask: Tensor  # [B, T] bool
    media: dict[str, MediaBatch] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)  # the sample ids, so that every error can name the sample
    target_ids: Tensor | None = None  # [B, S] encoder-decoder models only
    target_mask: Tensor | None = None  # [B, S] bool, False at padding
    sources: list[str] = field(default_factory=list)
    labelled: bool = True  # False: no token is a target (generation)
    labels: Tensor | None = None  # [n] flat positions in [B*T] whose next token is a target; found when a batch moves
    scores: Tensor | None = None  # [B, C] how right each label is
    masked_ids: Tensor | None = None  # [B, T] long: input_ids with hidden words
    masked: Tensor | None = None  # [B, T] bool: which are hidden
    answers: Answers | None = None  # what people answered, for models that write answers
    origin: Callable[[Any], str] | None = None  # shows it in a notebook

    def __repr__(self) -> str:
        media = "".join(f", {len(m.layouts)} x {kind} in {shaped(m.inputs)}" for kind, m in self.media.items())
        held, targets = int((self.segment_ids != 0).sum()), int(self.loss_mask.sum())
        return f"Batch({shaped(self.input_ids)} positions, {held} hold tokens, {targets} are targets{media})"

    def _repr_html_(self) -> str | None:
        return self.origin and self.origin(self)

    def to(self, device: Any, dtype: Any = None) -> Batch:
        """A copy on ``device``; floating media tensors also change to ``dtype``."""

        def move(x: Any) -> Any:
            if not hasattr(x, "to"):
                return x
            floating = getattr(x, "is_floating_point", lambda: False)()
            return x.to(device, dtype=dtype if floating else None, non_blocking=True)

        media = {
            kind: replace(
                m,
                inputs=move(m.inputs),
                slots=move(m.slots),
                cond=None if m.cond is None else Condition(move(m.cond.ids), move(m.cond.mask)),
            )
            for kind, m in self.media.items()
        }
        return Batch(
            move(self.input_ids),
            move(self.positions),
            move(self.segment_ids),
            move(self.loss_mask),
            media,
            self.ids,
            move(self.target_ids),
            move(self.target_mask),
            self.sources,
            self.labelled,
            move(self.label_positions()) if str(device).split(":")[0] != "cpu" else None,
            None if self.scores is None else self.scores.to(device),
            move(self.masked_ids),
            move(self.masked),
            None if self.answers is None else Answers(*(x.to(device) for x in vars(self.answers).values())),
            self.origin,
        )

    def label_positions(self) -> Tensor:
        """The flat positions ``[n]`` in ``[B·T]`` whose next token is a target of the same segment."""
        if self.labels is not None:
            return self.labels
        same = self.segment_ids[:, 1:] == self.segment_ids[:, :-1]  # [B, T-1]
        rows, columns = (self.loss_mask[:, 1:] & same).nonzero(as_tuple=True)
        return rows * self.input_ids.shape[1] + columns


# ------------------------------------------------------------------------------------------------ tensors of a model


@dataclass
class Tokens:
    """Feature vectors: what encoders give and connectors map. One row per unit (tile, frame) or per medium."""

    x: Tensor  # [B, N, D]
    mask: Tensor | None = None  # [B, N] bool, True where the vector counts; None: all do
    grid: tuple[int, int] | None = None  # (rows, columns) where the N vectors form a grid, row by row
    runs: tuple[int, ...] | None = None  # units of each medium, for connectors that join them


@dataclass
class Output:
    """What a fusion model returns. ``logits`` only at the positions that were asked for.

    ``logits="all"`` gives ``[B, T, V]``, ``"last"`` ``[B, V]``, ``"labels"`` ``[n, V]`` together with ``targets [n]``
    and ``target_rows [n]`` (which row of ``Batch.ids`` each belongs to). ``"states"`` gives, with the same targets, the
    vectors ``states [n, D]`` that the logits are made of, and ``head``, which makes them: training runs it in chunks.
    """

    hidden: Tensor  # [B, T, D]
    logits: Tensor | None = None
    targets: Tensor | None = None
    target_rows: Tensor | None = None
    states: Tensor | None = None
    head: Callable[[Tensor], Tensor] | None = None
    named: dict[str, Any] = field(default_factory=dict)  # "image/features", "image/projected", "image/merged", ...

    def __repr__(self) -> str:
        given = ("hidden", "logits", "targets", "states")
        told = [f"{name} {shaped(getattr(self, name))}" for name in given if getattr(self, name) is not None]
        return f"Output({', '.join([*told, *self.named])})"


def shaped(x: Tensor) -> str:
    """The shape of a tensor, in words."""
    return "[" + ", ".join(map(str, x.shape)) + "]"


# ---------------------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Count:
    """Number of tokens a unit gives at some stage, and their grid where they have one."""

    tokens: int
    grid: tuple[int, int] | None = None


Conversation = Sequence[Message | Mapping[str, Any]]

"""Retrieval by protocol: how often the right text is among the first K of all texts, and the right picture.

Protocol: Karpathy's splits of COCO and Flickr30k (Karpathy & Fei-Fei, arXiv:1412.2306): a picture's captions are all
right for it, a caption has one picture; R@K is the share of queries with a right one among the first K.

A wrong one that scores exactly as high as the best right one counts as before it, so that a model that scores all alike
finds nothing. Scores by two towers and scores by a matching model over their first candidates (ViLT, ALBEF, BLIP) are
different measurements, and stand in columns of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import DataError, nearest

KS = (1, 5, 10)
CHUNK = 512
"""Queries whose scores with everything are in memory at once."""

Matcher = Callable[[Sequence[int], Sequence[int]], Tensor]
"""(numbers of pictures [n], numbers of texts [n]) → how well each pair matches ``[n]``, higher is better."""


@dataclass
class Pairs:
    """Pictures, texts, and which belong together: ``owners[t]`` are the pictures that text ``t`` is right for."""

    images: list[Any]
    texts: list[str]
    owners: list[list[int]]
    name: str = ""

    @classmethod
    def of(cls, pairs: Sequence[tuple[Any, str]], name: str = "") -> Pairs:
        """From (picture, text) pairs; a text that several pictures share is one text, right for all of them."""
        texts = list(dict.fromkeys(text for _, text in pairs))
        place = {text: i for i, text in enumerate(texts)}
        owners: list[list[int]] = [[] for _ in texts]
        for i, (_, text) in enumerate(pairs):
            owners[place[text]].append(i)
        return cls([image for image, _ in pairs], texts, owners, name)


@dataclass
class Recalls:
    """R@K both ways, in shares of queries: ``text`` is a picture's search for its texts, ``image`` the other."""

    text: dict[int, float]
    image: dict[int, float]

    @property
    def total(self) -> float:
        """The sum of all (``rsum``), in shares."""
        return sum(self.text.values()) + sum(self.image.values())


@dataclass
class Retrieval:
    """The result of two towers, and of a matching model over their first candidates where there is one."""

    pairs: Pairs
    towers: Recalls
    reranked: Recalls | None = None
    candidates: int | None = None
    ranks: dict[str, list[int]] = field(default_factory=dict)  # of every query by the towers: "text", "image"

    def rows(self) -> list[tuple[str, float, float | None]]:
        """``(measure, two towers, re-ranked)``."""
        found = []
        for way, told in (("text", "picture → text"), ("image", "text → picture")):
            own, other = getattr(self.towers, way), getattr(self.reranked, way) if self.reranked else {}
            found += [(f"{told}, R@{k}", own[k], other.get(k)) for k in own]
        return [*found, ("sum", self.towers.total, self.reranked.total if self.reranked else None)]


def recall(
    images: Tensor, texts: Tensor, pairs: Pairs, matcher: Matcher | None = None, candidates: int = 128
) -> Retrieval:
    """``images [I, D]``, ``texts [T, D]``: unit vectors of ``pairs``. ``matcher`` scores each query's first
    ``candidates`` again; what it does not see comes behind all of them.
    """
    right = [list(o) for o in pairs.owners]  # pictures of each text
    back: list[list[int]] = [[] for _ in pairs.images]
    for text, owners in enumerate(right):
        for image in owners:
            back[image].append(text)
    lonely = next((i for i, found in enumerate(back) if not found), None)
    if lonely is not None:
        raise DataError(f"picture {lonely + 1} of {len(back)} ({pairs.images[lonely]}) has 0 texts; leave it out")
    ways: dict[str, tuple[list[int], list[int]]] = {}
    for way, queries, others, wanted in (("text", images, texts, back), ("image", texts, images, right)):
        match = _towards(matcher, way)
        ways[way] = ranks(queries, others, wanted, match, candidates)
    towers = Recalls(*(shares(ways[way][0]) for way in ("text", "image")))
    again = Recalls(*(shares(ways[way][1]) for way in ("text", "image"))) if matcher else None
    return Retrieval(pairs, towers, again, candidates if matcher else None, {way: r[0] for way, r in ways.items()})


def _towards(matcher: Matcher | None, way: str) -> Matcher | None:
    """The matcher with the query first, whichever it is."""
    if matcher is None or way == "text":
        return matcher
    return lambda texts, images: matcher(images, texts)


def ranks(
    queries: Tensor,
    others: Tensor,
    wanted: Sequence[Sequence[int]],
    match: Matcher | None = None,
    candidates: int = 128,
) -> tuple[list[int], list[int]]:
    """The rank (from 1) of the best right one of each query among ``others``, by vectors and by ``match``."""
    plain, again = [], []
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ others.T  # [q, N]
        right = torch.zeros_like(scores, dtype=torch.bool)
        for row, columns in enumerate(wanted[start : start + CHUNK]):
            right[row, list(columns)] = True
        plain += _rank(scores, right)
        if match is None:
            continue
        top = scores.topk(min(candidates, scores.shape[1])).indices  # [q, c]
        asked = torch.arange(start, start + len(scores)).repeat_interleave(top.shape[1])
        matched = match(asked.tolist(), top.flatten().tolist()).view_as(top).to(scores.dtype)  # [q, c]
        again += _rank(torch.full_like(scores, -torch.inf).scatter_(1, top, matched), right)
    return plain, again


def _rank(scores: Tensor, right: Tensor) -> list[int]:
    """``scores``, ``right [q, N]`` → the rank of the best right one; wrong ones of the same score come before it."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # [q, 1]
    return (((scores >= best) & ~right).sum(1) + 1).tolist()


def shares(found: Sequence[int]) -> dict[int, float]:
    """R@1, R@5 and R@10 of some ranks."""
    return {k: sum(rank <= k for rank in found) / max(1, len(found)) for k in KS}


def evaluate(
    vlm: Any,
    pairs: Pairs,
    matcher: Matcher | None = None,
    candidates: int = 128,
    batch: int = 64,
    workers: int = 0,
    advance: Callable[[int, int], None] | None = None,
) -> Retrieval:
    """Embed and compare. ``advance(done, of)`` is told of pictures. Raises DataError for one that cannot be read."""
    from chiasm.infer import embed

    parts = []
    for rows, vectors in embed.stream(vlm.model, vlm.processor, pairs.images, "image", batch, workers):
        parts.append(vectors)
        if advance:
            advance(rows[-1] + 1, len(pairs.images))
    texts = vlm.embed(texts=pairs.texts, batch=batch)  # [T, D]
    return recall(torch.cat(parts), texts, pairs, matcher, candidates)


# ------------------------------------------------------------------------------------------------------------- files


def read_protocol(file: str | Path, images: str | Path, split: str = "test", per_image: int | None = 5) -> Pairs:
    """A protocol file: Karpathy's ``dataset_*.json``, or the lists of ALBEF and BLIP (``coco_karpathy_test.json``).

    ``images`` is the folder that the file's paths begin in. ``per_image`` captions of each picture are used, as
    published (a few COCO pictures have six or seven); None: all. Raises DataError.
    """
    path, folder = Path(file), Path(images)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    records = _karpathy(path, values, split) if isinstance(values, Mapping) else _listed(path, values)
    pairs = Pairs([], [], [], f"{path.stem} {split}")
    for name, captions in records:
        if not captions:
            raise DataError(f"{path}: picture {name!r} has 0 captions")
        pairs.images.append(str(folder / name))
        for caption in captions[:per_image]:
            pairs.texts.append(caption)
            pairs.owners.append([len(pairs.images) - 1])
    missing = [image for image in pairs.images if not Path(image).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(pairs.images)} pictures of {path} are not there, the first is {missing[0]}; "
            "name the folder that the file's paths begin in with --images"
        )
    return pairs


def _karpathy(path: Path, values: Mapping[str, Any], split: str) -> list[tuple[str, list[str]]]:
    images = values.get("images")
    if not isinstance(images, list):
        raise DataError(f"{path}: has no list 'images'; a protocol file of Karpathy's has one")
    found = [i for i in images if i.get("split") == split]
    if not found:
        known = sorted({str(i.get("split")) for i in images})
        raise DataError(f"{path}: holds 0 pictures of split {split!r}; {nearest(split, known)}")
    return [("/".join(filter(None, (i.get("filepath", ""), i["filename"]))), _raw(i["sentences"])) for i in found]


def _raw(sentences: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(s["raw"]).strip() for s in sentences]


def _listed(path: Path, values: Any) -> list[tuple[str, list[str]]]:
    if not isinstance(values, list) or not all(
        isinstance(v, Mapping) and {"image", "caption"} <= v.keys() for v in values
    ):
        raise DataError(f"{path}: is no protocol file: a table with 'images', or a list of 'image' and 'caption'")
    return [(v["image"], [v["caption"]] if isinstance(v["caption"], str) else list(v["caption"])) for v in values]

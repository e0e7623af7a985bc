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
"""(numbers of pictures [n], in their order, numbers of texts [n]) → how well each pair matches ``[n]``: more is better.
"""


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
    shortened: int = 0  # texts that were longer than the towers read, and lost their end as in the published runs

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
    """``images [I, D]``, ``texts [T, D]``: unit vectors of ``pairs``; of several vectors of a picture, ``[I, K, D]``
    (BLIP-2's queries), the nearest counts. ``matcher`` scores each query's first ``candidates`` again; what it does not
    see comes behind all of them.
    """
    right = [list(o) for o in pairs.owners]  # pictures of each text
    back: list[list[int]] = [[] for _ in pairs.images]
    for text, owners in enumerate(right):
        for image in owners:
            back[image].append(text)
    lonely = next((i for i, found in enumerate(back) if not found), None)
    if lonely is not None:
        raise DataError(f"picture {lonely + 1} of {len(back)} ({pairs.images[lonely]}) has 0 texts; leave it out")
    ways = {"text": (images, texts, back), "image": (texts, images, right)}
    plain = {way: ranks(*given) for way, given in ways.items()}
    towers = Recalls(*(shares(plain[way]) for way in ("text", "image")))
    if matcher is None:
        return Retrieval(pairs, towers, ranks=plain)
    again = _reranked(ways, matcher, candidates)
    return Retrieval(pairs, towers, Recalls(*(shares(again[way]) for way in ("text", "image"))), candidates, plain)


def ranks(queries: Tensor, others: Tensor, wanted: Sequence[Sequence[int]]) -> list[int]:
    """The rank (from 1) of the best right one of each query among ``others``, by their vectors."""
    found = []
    for start in range(0, len(queries), CHUNK):
        scores = alike(queries[start : start + CHUNK], others)  # [q, N]
        right = torch.zeros_like(scores, dtype=torch.bool)
        for row, columns in enumerate(wanted[start : start + CHUNK]):
            right[row, list(columns)] = True
        found += _rank(scores, right)
    return found


def alike(queries: Tensor, others: Tensor) -> Tensor:
    """``queries [q, D]``, ``others [N, D]`` → cosines ``[q, N]``; of several vectors each (``[q, K, D]``) the best."""
    if queries.ndim == 3:
        return torch.stack([alike(each, others) for each in queries.unbind(1)]).amax(0)
    if others.ndim == 3:
        return torch.stack([queries @ each.T for each in others.unbind(1)]).amax(0)
    return queries @ others.T


def _reranked(
    ways: Mapping[str, tuple[Tensor, Tensor, Sequence[Sequence[int]]]], matcher: Matcher, candidates: int
) -> dict[str, list[int]]:
    """The ranks by ``matcher``, which is asked about each pair once, the pairs of a picture one after the other."""
    first = {}  # way → the numbers of each query's candidates [q, c]
    for way, (queries, others, _) in ways.items():
        c = min(candidates, len(others))
        parts = [alike(q, others).topk(c).indices for q in queries.split(CHUNK)]
        first[way] = torch.cat(parts)
    count = len(ways["text"][1])  # texts
    asked = {}  # way → the pairs, as picture · texts + text [q, c]
    for way, columns in first.items():
        rows = torch.arange(len(columns)).unsqueeze(1)
        asked[way] = rows * count + columns if way == "text" else columns * count + rows
    pairs = torch.cat([numbers.flatten() for numbers in asked.values()]).unique()  # sorted: by picture
    scores = matcher((pairs // count).tolist(), (pairs % count).tolist())  # [pairs]
    found: dict[str, list[int]] = {}
    for way, columns in first.items():
        wanted = ways[way][2]
        mine = scores[torch.searchsorted(pairs, asked[way])]  # [q, c]
        found[way] = []
        for row in range(len(columns)):
            right = torch.isin(columns[row], torch.tensor(list(wanted[row])))  # [c]
            if bool(right.any()):
                found[way] += _rank(mine[row : row + 1], right.unsqueeze(0))
            else:  # behind everything that is wrong
                found[way].append(len(ways[way][1]) - len(wanted[row]) + 1)
    return found


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
    workers: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> Retrieval:
    """Embed and compare. ``advance(done, of)`` is told of pictures. Raises DataError for one that cannot be read."""
    from chiasm.infer import embed

    parts = []
    for rows, vectors in embed.stream(vlm.model, vlm.processor, pairs.images, "image", batch, workers):
        parts.append(vectors)
        if advance:
            advance(rows[-1] + 1, len(pairs.images))
    cut: set[int] = set()
    order = sorted(range(len(pairs.texts)), key=lambda i: len(pairs.texts[i]))  # near-equal lengths together
    told = lambda number, given, kept: cut.add(number)  # noqa: E731
    found, places = [], []
    for rows, vectors in embed.stream(
        vlm.model, vlm.processor, (pairs.texts[i] for i in order), "text", batch, workers, truncate=told
    ):
        found.append(vectors)
        places += [order[row] for row in rows]
    texts = torch.cat(found)[torch.tensor(places).argsort()]  # [T, D]
    result = recall(torch.cat(parts), texts, pairs, matcher, candidates)
    result.shortened = len(cut)
    return result


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

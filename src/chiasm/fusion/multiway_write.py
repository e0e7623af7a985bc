"""Captions of a multiway model, written by filling one hidden word at a time.

Paper: BEiT-3 (arXiv:2208.10442). Reference: ``CaptioningHandler`` of microsoft/unilm ``beit3`` 768a3c8, whose beam
search keeps its states; here the words so far are read anew at each step, which gives the same words.

Differences by design: every step keeps ``beams`` candidates (the reference looks at three times as many before it drops
ended ones); scores are divided by ``length ** length_penalty`` when a caption ends, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chiasm.fusion.multiway import Multiway
from chiasm.fusion.pair import Pictures, Words
from chiasm.nn.modes import evaluating


@torch.no_grad()
def caption(
    model: Multiway,
    pictures: Pictures,
    start: int,
    hidden: int,
    end: int,
    longest: int = 32,
    beams: int = 3,
    length_penalty: float = 0.6,
) -> list[list[int]]:
    """The words of each picture's caption, without ``start`` and ``end``; ``hidden`` is the mask token's id."""
    with evaluating(model):
        rows = [torch.tensor([row]) for row in range(len(pictures.pixels))]
        return [_one(model, pictures.pick(row), (start, hidden, end), longest, beams, length_penalty) for row in rows]


def _one(
    model: Multiway, picture: Pictures, marks: tuple[int, int, int], longest: int, beams: int, penalty: float
) -> list[int]:
    start, hidden, end = marks
    going: list[tuple[float, list[int]]] = [(0.0, [start])]
    ended: list[tuple[float, list[int]]] = []
    for _ in range(longest):
        scores = next_words(model, picture, [words for _, words in going], hidden)  # [beams, V]
        found = []
        for (total, words), row in zip(going, scores, strict=True):
            best = row.topk(min(2 * beams, len(row)))
            found += [(total + float(s), [*words, int(w)]) for s, w in zip(best.values, best.indices, strict=True)]
        found.sort(key=lambda pair: -pair[0])
        ended += [(s / len(words) ** penalty, words[1:-1]) for s, words in found[:beams] if words[-1] == end]
        going = [pair for pair in found if pair[1][-1] != end][:beams]
        best_end = max((score for score, _ in ended), default=None)
        if best_end is not None and len(ended) >= beams and best_end >= going[0][0] / (len(going[0][1]) + 1) ** penalty:
            break
    ended += [] if ended else [(score, words[1:]) for score, words in going]
    return max(ended, key=lambda pair: pair[0])[1]


def next_words(model: Multiway, picture: Pictures, words: list[list[int]], hidden: int) -> Tensor:
    """Log-shares of the next word ``[n, V]`` after ``n`` beginnings of one length, read at a hidden word's place."""
    ids = torch.tensor([[*row, hidden] for row in words], device=picture.pixels.device)  # [n, T + 1]
    same = picture.pick(torch.zeros(len(words), dtype=torch.long))
    joint = model.joint(Words(ids, torch.ones_like(ids, dtype=torch.bool)), same, causal=True)
    return model.word_head(joint.hidden[:, -1]).float().log_softmax(-1)

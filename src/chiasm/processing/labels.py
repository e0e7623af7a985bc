"""What people answered, as classes (a list of labels, and how right each of them is) or as texts that are written.

Sources: VQA's soft scores as ``make_arrow`` of dandelin/ViLT 762fd39 and ``create_dataset_example`` of BEiT-3 give
them: one, two, three and four of ten people who say the same are 0.3, 0.6, 0.9 and 1. Written answers as
``vqa_dataset.py`` of salesforce/ALBEF b9727e4: each different one once, with the share of people who gave it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import DataError, nearest
from chiasm.types import Answers, Message, Piece, Sample


def tell(sample: Sample, config: Any, tokenizer: Any, messages: Sequence[Message], answers: Sequence[str]) -> None:
    """Put into the sample what its ``ProcessingConfig`` asks for: scores of ``labels``, or ``answers`` as tokens."""
    if config.labels:
        sample.scores = scores(config.labels, messages, answers, f"sample {sample.id!r}")
    if config.answers:
        sample.answers = written(tokenizer, messages, answers, f"sample {sample.id!r}")


def written(tokenizer: Any, messages: Sequence[Message], answers: Sequence[str], where: str) -> Answers | None:
    """Different answers in the order in which they came, opened and ended as the tokenizer does (or with EOS).

    Without ``answers`` the last turn is the only one, if it is an answer; else None. Raises DataError for an empty one.
    """
    turn = messages[-1]
    given = Counter(answers or ([turn.text.strip()] if turn.role == "assistant" else []))
    if not given:
        return None
    if not all(text.strip() for text in given):
        raise DataError(f"{where}: one of {given.total()} answers is empty; leave it out", "empty")
    end = tokenizer.suffix or [i for i in (tokenizer.eos_id,) if i is not None]
    rows = [[*tokenizer.prefix, *tokenizer.encode_pieces([Piece(text)]).ids, *end] for text in given]
    width = max(map(len, rows))
    return Answers(
        torch.tensor([row + [0] * (width - len(row)) for row in rows]),  # [A, S]
        torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows]),
        torch.tensor([count / given.total() for count in given.values()]),
        torch.zeros(len(rows), dtype=torch.long),
    )


def joined(samples: Sequence[Sample]) -> Answers | None:
    """The answers of a batch, with the row of each. None where no sample has any; DataError where only some do."""
    found = [s.answers for s in samples if s.answers is not None]
    if not found:
        return None
    if len(found) != len(samples):
        lacking = next(s.id for s in samples if s.answers is None)
        raise DataError(f"sample {lacking!r}: has no answer but {len(found)} of {len(samples)} samples of the batch do")
    width = max(a.ids.shape[1] for a in found)
    ids, mask = (
        torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in side])
        for side in ([a.ids for a in found], [a.mask for a in found])
    )  # [A, S] each
    owners = torch.arange(len(found)).repeat_interleave(torch.tensor([len(a.ids) for a in found]))  # [A]
    return Answers(ids, mask, torch.cat([a.shares for a in found]), owners)


def scores(labels: Sequence[str], messages: Sequence[Message], answers: Sequence[str], where: str) -> Tensor | None:
    """How right each label is ``[C]``, 0 to 1, from people's ``answers`` or else from the last turn, an answer.

    None where there is neither. Several answers of which none is a label give zeros: every class is wrong. Raises
    DataError where the one answer is none of the labels.
    """
    if len(answers) > 1:
        given = Counter(answers)
        return torch.tensor([min(1.0, 0.3 * given[label]) if given[label] < 4 else 1.0 for label in labels])
    turn = messages[-1]
    answer = answers[0] if answers else turn.text.strip() if turn.role == "assistant" else None
    if answer is None:
        return None
    if answer not in labels:
        raise DataError(
            f"{where}: the answer {answer!r} is none of the {len(labels)} labels; {nearest(answer, labels)}"
        )
    found = torch.zeros(len(labels))  # [C]
    found[list(labels).index(answer)] = 1.0
    return found

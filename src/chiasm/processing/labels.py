"""Answers as classes: a list of labels, and for each sample how right each of them is.

Source: VQA's soft scores as ``make_arrow`` of dandelin/ViLT 762fd39 and ``create_dataset_example`` of BEiT-3 give them:
one, two, three and four of ten people who say the same are 0.3, 0.6, 0.9 and 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from chiasm.errors import DataError, nearest
from chiasm.types import Message


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

"""Evaluation: generate over held-out examples, score, and the same with other examples' pictures.

``evaluate(vlm, examples)`` gives a ``Result`` (table by task, every answer, a receipt). ``evaluate_recipe(vlm, recipe,
out)`` does it for a recipe's held-out sources, with true and with shuffled pictures, and writes ``results.json``,
``answers.jsonl`` and ``report.html`` into ``out``.
"""

from __future__ import annotations

from typing import Any

from chiasm.eval import metrics as metrics
from chiasm.eval.runner import Answer as Answer
from chiasm.eval.runner import Comparison as Comparison
from chiasm.eval.runner import Result as Result
from chiasm.eval.runner import compare as compare
from chiasm.eval.runner import evaluate as evaluate
from chiasm.eval.runner import held_out as held_out


def evaluate_recipe(vlm: Any, recipe: Any, out: Any, **changes: Any) -> Comparison:
    """Score a model on a recipe's held-out sources and write the results into the folder ``out``.

    ``changes`` override the recipe's ``eval`` table: ``limit``, ``batch_size``, ``max_new_tokens``, ``shuffled``.
    Raises ConfigError where the recipe has no held-out source.
    """
    from chiasm.eval.write import evaluate_recipe as run

    return run(vlm, recipe, out, **changes)

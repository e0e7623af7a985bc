"""Metrics: ``(prediction, accepted answers) → score in [0, 1]``. One file each family, one import line here."""

from chiasm.eval.metrics import choices as choices
from chiasm.eval.metrics import text as text
from chiasm.eval.metrics import vqa as vqa

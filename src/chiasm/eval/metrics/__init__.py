"""Metrics: ``(prediction, accepted answers) → score``, in [0, 1] but for CIDEr. One file and one line here a family.

A metric that scores captions by a whole set has ``over`` besides: see ``chiasm.eval.metrics.captions``.
"""

from chiasm.eval.metrics import captions as captions
from chiasm.eval.metrics import choices as choices
from chiasm.eval.metrics import gqa as gqa
from chiasm.eval.metrics import speech as speech
from chiasm.eval.metrics import text as text
from chiasm.eval.metrics import vqa as vqa

"""What is minimised: ``(model, batch) → Loss``, or a loss over a whole step. One file each, one import line here."""

from chiasm.train.objectives import blip2 as blip2
from chiasm.train.objectives import contrastive as contrastive
from chiasm.train.objectives import next_token as next_token
from chiasm.train.objectives.base import objective as objective

"""What is minimised: ``(model, batch) → Loss``. One file each, one import line here."""

from chiasm.train.objectives import next_token as next_token

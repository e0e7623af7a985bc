"""What is minimised: ``(model, batch) → Loss``, or a loss over a whole step. One file each, one import line here."""

from chiasm.train.objectives import aligned as aligned
from chiasm.train.objectives import answers as answers
from chiasm.train.objectives import assignment as assignment
from chiasm.train.objectives import blip2 as blip2
from chiasm.train.objectives import classes as classes
from chiasm.train.objectives import contrastive as contrastive
from chiasm.train.objectives import masked_captions as masked_captions
from chiasm.train.objectives import masked_data as masked_data
from chiasm.train.objectives import masked_words as masked_words
from chiasm.train.objectives import matching as matching
from chiasm.train.objectives import momentum as momentum
from chiasm.train.objectives import next_token as next_token
from chiasm.train.objectives import pretraining as pretraining
from chiasm.train.objectives import ranking as ranking
from chiasm.train.objectives import vokens as vokens
from chiasm.train.objectives.base import objective as objective

"""Search among pictures and texts by the vectors of a model of two towers.

``Index`` keeps vectors, what they belong to, and the mark of the model that made them; ``chiasm index`` and ``chiasm
search`` are its two verbs.
"""

from chiasm.retrieve.index import Hit as Hit
from chiasm.retrieve.index import Index as Index
from chiasm.retrieve.index import Update as Update

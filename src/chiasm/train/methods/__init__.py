"""Methods that train a part by few parameters: transforms of a built model, one file and one import line each."""

from chiasm.train.methods import adapters as adapters
from chiasm.train.methods import lora as lora
from chiasm.train.methods import prefix as prefix
from chiasm.train.methods import prompt as prompt
from chiasm.train.methods import qlora as qlora
from chiasm.train.methods import rows as rows

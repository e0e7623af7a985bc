"""Training: ``train(recipe) → VLM``.

``load_recipe(path, overrides, tiny)`` reads a YAML file; ``train(recipe, vlm=None, resume=False)`` runs its stages and
its evaluation, and writes into ``recipe.out``: for each stage ``<stage>/log.jsonl``, ``<stage>/checkpoints`` and
``<stage>/model``, then ``model`` (the last stage's), ``results.json``, ``answers.jsonl`` and ``report.html``.
"""

from chiasm.train import objectives as objectives
from chiasm.train.recipe import EvalSpec as EvalSpec
from chiasm.train.recipe import ModelSpec as ModelSpec
from chiasm.train.recipe import Recipe as Recipe
from chiasm.train.recipe import Stage as Stage
from chiasm.train.recipe import load_recipe as load_recipe
from chiasm.train.run import train as train

"""Classification without training: a class is the mean of its prompts' vectors, and a picture belongs to the nearest.

Paper: CLIP (arXiv:2103.00020, section 3.1.4). Reference: ``notebooks/Prompt_Engineering_for_ImageNet.ipynb`` of
openai/CLIP d05afc4: each prompt's vector is made unit length, then their mean is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.errors import ConfigError, DataError, nearest
from chiasm.infer.embed import embed

Templates = str | Sequence[str] | None


def classify(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    labels: Sequence[str],
    templates: Templates = None,
    independent: bool = False,
    batch: int = 64,
    workers: int | None = None,
) -> Tensor:
    """Probabilities ``[n, labels]`` of each picture, float32: a softmax over the labels.

    ``templates``: texts with ``{}`` where the label goes, or the name of a set (``template_sets``); None: the label
    alone. ``independent``: each label for itself, by the sigmoid of a model that was trained with one (SigLIP).
    Raises DataError for labels, templates or pictures that cannot be used; ConfigError.
    """
    weights = class_vectors(model, processor, labels, templates, batch)  # [labels, D]
    check_choice(labels, independent)
    pictures = embed(model, processor, images=images, batch=batch, workers=workers)  # [n, D]
    return probabilities(model, pictures, weights, independent)


@torch.inference_mode()
def probabilities(model: Any, pictures: Tensor, classes: Tensor, independent: bool = False) -> Tensor:
    """``pictures [n, D]``, ``classes [labels, D]`` → probabilities ``[n, labels]``, by the model's own scale."""
    if independent and model.bias is None:
        raise ConfigError(
            "independent probabilities need a model trained with the sigmoid loss, which has a bias; this one "
            "compares: leave independent out"
        )
    training = model.training
    model.eval()  # the published bound of the scale holds
    scale = float(model.scale())
    model.train(training)
    scores = scale * pictures @ classes.T  # [n, labels]
    return (scores + float(model.bias)).sigmoid() if independent else scores.softmax(-1)


def class_vectors(
    model: Any, processor: Any, labels: Sequence[str], templates: Templates = None, batch: int = 256
) -> Tensor:
    """One vector of unit length for each label, ``[labels, D]``: the mean over its prompts, each of unit length."""
    labels, forms = check_labels(labels), template_set(templates)
    prompts = [form.replace("{}", label) for label in labels for form in forms]
    vectors = embed(model, processor, texts=prompts, batch=batch)  # [labels*forms, D]
    return F.normalize(vectors.unflatten(0, (len(labels), len(forms))).mean(1), dim=-1)  # [labels, D]


def check_labels(labels: Sequence[str]) -> list[str]:
    """The labels without white space around them. Raises DataError for none, an empty one, or one that is there twice.

    The published class names of a data set are taken as they are.
    """
    if isinstance(labels, str):
        raise DataError(f"labels is one text, {labels[:40]!r}; give a list of them")
    found = [label.strip() if isinstance(label, str) else label for label in labels]
    if not found:
        raise DataError("there are 0 labels; give at least one")
    for number, label in enumerate(found):
        if not isinstance(label, str) or not label:
            raise DataError(f"label {number + 1} of {len(found)} is empty; write one, or take it out")
    first = {label: number for number, label in reversed(list(enumerate(found)))}
    twice = next((number for number, label in enumerate(found) if first[label] != number), None)
    if twice is not None and found not in _data()["classes"].values():  # two of ImageNet's names are there twice
        label = found[twice]
        raise DataError(
            f"label {twice + 1} of {len(found)}, {label!r}, is label {first[label] + 1} too: they would share their "
            "probability; take one out"
        )
    return found


def check_choice(labels: Sequence[str], independent: bool) -> None:
    """Raises DataError for one label alone that shares its probability with no other: it would always be certain."""
    if len(labels) == 1 and not independent:
        raise DataError(
            f"there is one label, {labels[0]!r}: its probability is 1 whatever a picture shows; give another beside "
            "it, or judge it for itself (independent, for models with a sigmoid loss)"
        )


def template_set(templates: Templates) -> list[str]:
    """The texts of ``templates``: of a set's name, or as given. Raises DataError where one has no place for a label."""
    if templates is None:
        return ["{}"]
    if isinstance(templates, str):
        if "{}" in templates:
            return [templates]
        known = template_sets()
        if templates not in known:
            raise DataError(f"unknown template set {templates!r}; {nearest(templates, known)}")
        return known[templates]
    forms = list(templates)
    if not forms:
        raise DataError("there are 0 templates; give at least one, for instance 'a photo of a {}.'")
    for form in forms:
        if not isinstance(form, str) or "{}" not in form:
            raise DataError(
                f"template {form!r} has no '{{}}' where the label goes; write for instance 'a photo of {{}}'"
            )
    return forms


def template_sets() -> dict[str, list[str]]:
    """The published sets of prompts by name: ``imagenet`` (80), ``imagenet-7`` and those of CLIP's other data sets."""
    return dict(_data()["templates"])


def class_names(name: str) -> list[str]:
    """The published class names of a data set (``imagenet``: 1,000, two of them twice). Raises DataError."""
    known = _data()["classes"]
    if name not in known:
        raise DataError(f"there are no class names of {name!r}; {nearest(name, known)}")
    return list(known[name])


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    """``prompts.json``: from openai/CLIP d05afc4 (MIT), the notebook named above and ``data/prompts.md``."""
    return json.loads(files("chiasm.infer").joinpath("prompts.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

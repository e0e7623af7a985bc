"""Pictures of a folder sorted into classes: by words alone, or by a linear layer over the vectors of a few examples.

Paper: CLIP (arXiv:2103.00020, sections 3.1 and 3.2). Reference: openai/CLIP d05afc4: the notebook on prompts, and the
README's linear probe (logistic regression with C = 0.316 over ``encode_image``).

A folder whose pictures stand in one folder a class (ImageNet's layout) is also scored: top-1 and top-5.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.infer import embed, zero_shot
from chiasm.retrieve.index import pictures

IMAGENET = 1000  # classes; their folders are called by WordNet's numbers, in the order of the published names
TOP = 5

Progress = Callable[[int, int], None]
Judge = Callable[[Tensor], Tensor]  # vectors [n, D] → probabilities [n, classes]


@dataclass(frozen=True)
class Answer:
    """One picture: its most likely classes with their probabilities, and the true one where it is known."""

    name: str
    top: tuple[tuple[int, float], ...]
    truth: int | None = None


@dataclass
class Result:
    """All pictures of a folder. ``labels`` are the names of the classes that answers count from 0."""

    folder: Path
    labels: list[str]
    how: str
    answers: list[Answer] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    hits: dict[int, int] = field(default_factory=lambda: {1: 0, TOP: 0})

    @property
    def judged(self) -> int:
        """Pictures whose true class is known."""
        return sum(answer.truth is not None for answer in self.answers)

    def accuracy(self, k: int = 1) -> float | None:
        """Share of them whose true class is among the ``k`` likeliest (1 or 5); None where none is known."""
        return self.hits[k] / self.judged if self.judged else None

    def classes(self) -> list[tuple[str, int, int]]:
        """For each class with true members: its name, how many, and how many were found."""
        rows: dict[int, list[int]] = {}
        for answer in self.answers:
            if answer.truth is not None:
                row = rows.setdefault(answer.truth, [0, 0])
                row[0] += 1
                row[1] += answer.top[0][0] == answer.truth
        return [(self.labels[index], *counts) for index, counts in sorted(rows.items())]  # type: ignore[misc]

    def record(self) -> dict[str, Any]:
        """The result as JSON values, without the single pictures."""
        scores = {f"top{k}": self.accuracy(k) for k in self.hits} if self.judged else {}
        return {
            "folder": str(self.folder), "how": self.how, "labels": self.labels, "pictures": len(self.answers),
            "judged": self.judged, "broken": len(self.broken), "seconds": self.seconds, **scores,
        }  # fmt: skip


def zero_shot_folder(
    vlm: Any,
    folder: Path,
    labels: Sequence[str] | None = None,
    templates: zero_shot.Templates = "plain",
    independent: bool = False,
    **options: Any,
) -> Result:
    """Classify by words. Without ``labels`` the folders in ``folder`` are the classes (ImageNet's by their names).

    ``options``: ``top``, ``batch``, ``workers``, ``progress``. Broken pictures are listed. Raises DataError.
    """
    files, found = listed(folder)
    names, places = classes_of(folder, found, labels)
    vectors = zero_shot.class_vectors(vlm.model, vlm.processor, names, templates)
    zero_shot.check_choice(names, independent)

    def judge(given: Tensor) -> Tensor:
        return zero_shot.probabilities(vlm.model, given, vectors, independent)

    forms = len(zero_shot.template_set(templates))
    how = f"{len(names)} classes by {forms} prompt{'s' if forms > 1 else ''} each"
    result = Result(folder, list(names), how)
    return _judged(vlm, result, files, places, judge, True, **options)


def probe_folder(
    vlm: Any, folder: Path, train: Path, c: float = 0.316, iterations: int = 1000, **options: Any
) -> Result:
    """Classify by a logistic regression over the vectors of ``train``, a folder of one folder a class.

    Raises DataError; ConfigError where scikit-learn is missing.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ConfigError("the linear probe needs scikit-learn: pip install 'chiasm[demo]'") from None
    if train.resolve() == folder.resolve():
        raise DataError(f"{train}: the probe would be judged by the pictures it is fitted to; give it another folder")
    shown, names = listed(train)
    labels = sorted(names)
    shown = [file for file in shown if class_of(file) in names]
    if len(labels) < 2:
        raise DataError(f"{train}: holds pictures of {len(labels)} classes; a probe needs a folder for each of two")
    batch = {key: options[key] for key in ("batch", "workers") if key in options}
    rows: list[int] = []
    vectors: list[Tensor] = []
    lost: list[tuple[str, str]] = []
    paths = [str(train / name) for name in shown]
    for numbers, found in embed.stream(
        vlm.model, vlm.processor, paths, broken=lambda n, e: lost.append((shown[n], str(e))), unit=False, **batch
    ):
        rows += numbers
        vectors.append(found)
    truth = [labels.index(class_of(shown[row])) for row in rows]
    if len(set(truth)) < 2:
        raise DataError(f"{train}: readable pictures of {len(set(truth))} classes; a probe needs two")
    fitted = LogisticRegression(C=c, max_iter=iterations).fit(torch.cat(vectors).numpy(), truth)

    def judge(given: Tensor) -> Tensor:
        shares = torch.zeros(len(given), len(labels))
        shares[:, fitted.classes_] = torch.from_numpy(fitted.predict_proba(given.numpy())).float()
        return shares

    files, found_in = listed(folder)
    places = {name: labels.index(name) for name in found_in if name in labels}
    how = f"logistic regression (C={c:g}) over the vectors of {len(rows)} pictures of {len(labels)} classes"
    result = Result(folder, labels, how, broken=lost)
    return _judged(vlm, result, files, places, judge, False, **options)


def listed(folder: Path) -> tuple[list[str], list[str]]:
    """The picture files of a folder and its folders, by name; and the folders that stand directly in it and hold any.

    Raises DataError where there is none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder; give one that holds pictures")
    files = [name for name, _ in pictures(folder)]
    if not files:
        raise DataError(f"{folder}: holds 0 pictures (.jpg, .png, ...); give a folder that holds some")
    return files, sorted({class_of(name) for name in files} - {""})


def class_of(name: str) -> str:
    """The first folder in a picture's name; empty where it stands in none."""
    return name.split("/")[0] if "/" in name else ""


def classes_of(folder: Path, found: list[str], labels: Sequence[str] | None) -> tuple[list[str], dict[str, int]]:
    """The labels, and which of them each folder is. Raises DataError where there are neither labels nor folders."""
    if labels is not None:
        names = zero_shot.check_labels(labels)
        known = {name.casefold(): index for index, name in reversed(list(enumerate(names)))}
        return names, {f: known[_spelled(f)] for f in found if _spelled(f) in known}
    if not found:
        raise DataError(f"{folder}: has no folders to take the classes from; give labels")
    if len(found) == IMAGENET and all(name.startswith("n") and name[1:].isdigit() for name in found):
        return zero_shot.class_names("imagenet"), {name: index for index, name in enumerate(found)}
    return [name.replace("_", " ") for name in found], {name: index for index, name in enumerate(found)}


def _spelled(folder: str) -> str:
    return folder.replace("_", " ").casefold()


def _judged(
    vlm: Any,
    result: Result,
    files: list[str],
    places: dict[str, int],
    judge: Judge,
    unit: bool,
    top: int = TOP,
    batch: int = 64,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Run the pictures through, a batch at a time, and keep the likeliest classes of each."""
    began = time.perf_counter()
    paths: Iterator[str] = (str(result.folder / name) for name in files)
    kept = min(max(top, TOP), len(result.labels))
    for rows, vectors in embed.stream(
        vlm.model, vlm.processor, paths, "image", batch, workers,
        lambda n, e: result.broken.append((files[n], str(e))), unit,
    ):  # fmt: skip
        shares, classes = judge(vectors).topk(kept)  # [n, kept]
        for row, values, indices in zip(rows, shares.tolist(), classes.tolist(), strict=True):
            truth = places.get(class_of(files[row]))
            if truth is not None:
                for k in result.hits:
                    result.hits[k] += truth in indices[:k]
            pairs = tuple(zip(indices[:top], values[:top], strict=True))
            result.answers.append(Answer(files[row], pairs, truth))
        if progress is not None:
            progress(len(result.answers) + len(result.broken), len(files))
    result.seconds = time.perf_counter() - began
    return result

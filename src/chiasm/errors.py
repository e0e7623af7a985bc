"""The package's errors. Each message names the sample or key, both numbers, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ChiasmError(Exception):
    """Anything this package refuses to do, said in one line that a user can act on."""


class ConfigError(ChiasmError):
    """A configuration that is not what its part understands."""


class RegistryError(ChiasmError):
    """An unknown or doubly registered name."""


class DataError(ChiasmError):
    """A sample that cannot be used as it is.

    ``fault`` names the kind of fault (``chiasm.data.check.kinds``), so that faults are counted without reading texts.
    """

    def __init__(self, message: str, fault: str = ""):
        super().__init__(message)
        self.fault = fault


class CheckpointError(ChiasmError):
    """A checkpoint whose tensors are not exactly those of the model, or that may not be opened."""


class FingerprintError(CheckpointError):
    """The prompt or the pixels of a checkpoint are no longer those it was saved with."""


class NumberError(ChiasmError):
    """Scores or vectors that a model gave and that are NaN or infinite."""


MANY = 40  # names are told of in one error


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean ...`` with the nearest known names, or the list of them."""
    names = sorted(known)
    close = get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    if len(names) > MANY:
        return f"known: {', '.join(names[:MANY])} and {len(names) - MANY} more"
    return "known: " + (", ".join(names) if names else "none")

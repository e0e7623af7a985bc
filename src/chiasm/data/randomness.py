"""Random states of Python, NumPy and torch: forked around a run, saved with it, and set by position where data is made.

A random choice made while a sample is prepared depends on the seed and on the place of its micro-batch alone, never on
what was prepared before it: not on the number of workers, and not on where a run was resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextlib.contextmanager
def forked(*key: object) -> Iterator[None]:
    """Generators seeded from ``key`` inside, and as they were afterwards. On CUDA and MPS too where they are in use."""
    kept, accelerators = state(), accelerator_states()
    try:
        seed = number(*key)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
    finally:
        restore(kept | accelerators)


@contextlib.contextmanager
def placed(*key: object) -> Iterator[None]:
    """As ``forked``, for the CPU's generators only: cheap enough for every micro-batch."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        seed = number(*key)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def number(*key: object) -> int:
    """A number below 2⁶³ that depends on ``key`` only; a single whole number stands for itself."""
    if len(key) == 1 and isinstance(key[0], int):
        return key[0]
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


def state() -> dict[str, Tensor]:
    """The state of the CPU's generators, as tensors."""
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state()
    assert version == 3 and kind == "MT19937"
    return {
        "rng/cpu": torch.get_rng_state(),
        "rng/python": torch.tensor(words, dtype=torch.int64),
        "rng/python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "rng/numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "rng/numpy_place": torch.tensor([place, has_gauss], dtype=torch.int64),
        "rng/numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }


def accelerator_states() -> dict[str, Tensor]:
    """The state of the generator of CUDA or MPS, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"rng/cuda": torch.cuda.get_rng_state()}
    if torch.backends.mps.is_available():
        return {"rng/mps": torch.mps.get_rng_state()}
    return {}


def restore(saved: dict[str, Any]) -> None:
    """Put saved states back; a state that is not there is left alone."""
    if "rng/cpu" in saved:
        torch.set_rng_state(saved["rng/cpu"])
    if "rng/python" in saved:
        gauss = saved["rng/python_gauss"].tolist()
        random.setstate((3, tuple(saved["rng/python"].tolist()), gauss[0] if gauss else None))
    if "rng/numpy" in saved:
        place, has_gauss = saved["rng/numpy_place"].tolist()
        keys = saved["rng/numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, place, has_gauss, float(saved["rng/numpy_gauss"][0])))
    if "rng/cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["rng/cuda"])
    if "rng/mps" in saved and torch.backends.mps.is_available():
        torch.mps.set_rng_state(saved["rng/mps"])

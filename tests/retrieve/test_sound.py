"""Vectors that are NaN are none: every search and every class would be arbitrary, and look like one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from retrieve_kit import picture, towers

from chiasm.errors import NumberError


@pytest.mark.parametrize("workers", [0, None])
def test_nan_is_told(tmp_path: Path, workers: int | None) -> None:
    vlm = towers()
    images = [str(picture(tmp_path / f"{i}.png", i)) for i in range(3)]
    assert torch.isfinite(vlm.embed(images=images, workers=workers)).all()
    with torch.no_grad():
        next(vlm.model.encoders["image"].parameters()).fill_(float("nan"))
    with pytest.raises(NumberError, match=r"image \d: what the model makes of it is NaN"):
        vlm.embed(images=images, workers=workers)
    with pytest.raises(NumberError):
        vlm.classify(images=images, labels=["a", "b"], workers=workers)
    assert torch.isfinite(vlm.embed(texts=["a", "b"])).all()

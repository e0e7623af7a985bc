"""Pictures cut into square patches, each mapped to a vector (Dosovitskiy et al., arXiv:2010.11929)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from chiasm.errors import DataError
from chiasm.nn.packed import used_for


def patch_grid(shape: Sequence[int], channels: int, patch: int) -> tuple[int, int]:
    """(rows, columns) of whole patches in a picture of ``shape (channels, height, width)``; what is left over is cut.

    Raises DataError where the shape is not that of such a picture.
    """
    if len(shape) != 3 or shape[0] != channels:
        raise DataError(f"a picture of shape ({channels}, height, width) was expected, got {tuple(shape)}")
    rows, columns = shape[1] // patch, shape[2] // patch
    if rows < 1 or columns < 1:
        raise DataError(f"a picture of {shape[1]}x{shape[2]} pixels holds no patch of {patch}x{patch}; resize it first")
    return rows, columns


class Patches(nn.Conv2d):
    """A convolution whose stride is its kernel: one vector for each patch, row by row.

    Pixels right of and below the last whole patch are not read, as with ``padding="valid"`` in SigLIP.
    """

    def __init__(self, channels: int, dim: int, patch: int, bias: bool = True):
        super().__init__(channels, dim, kernel_size=patch, stride=patch, bias=bias)
        self.patch = patch

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:  # type: ignore[override]
        """``pixels [U, C, height, width]`` → ``[U, rows·columns, D]``, grid ``(rows, columns)``. Raises DataError."""
        if pixels.ndim != 4:
            raise DataError(
                f"pictures of shape [units, {self.in_channels}, height, width] were expected, got {list(pixels.shape)}"
            )
        grid = patch_grid(pixels.shape[1:], self.in_channels, self.patch)
        pixels = pixels.to(self.weight.dtype)
        packed = used_for(self, pixels)
        if packed is not None:
            return packed.product(self, self._cut(pixels, *grid)).view(len(pixels), -1, self.out_channels), grid
        x = super().forward(pixels)  # [U, D, rows, columns]
        return x.flatten(2).transpose(1, 2), grid  # [U, rows*columns, D]

    def _cut(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """The numbers of each patch in a row: ``[U*rows*columns, C*patch*patch]``."""
        whole = pixels[:, :, : rows * self.patch, : columns * self.patch]
        patches = whole.unflatten(3, (columns, self.patch)).unflatten(2, (rows, self.patch))  # [U, C, r, p, c, p]
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)

"""The compiled kernels of decoding and of search on CPUs: built once with the system's C++ compiler, and done without
where none is.

The source stands in ``chiasm/nn/native``. It is compiled for this very processor into the user's cache folder
(``CHIASM_CACHE``, ``XDG_CACHE_HOME`` or ``~/.cache``), under a name that depends on the source, the compiler's options
and the processor. ``CHIASM_NATIVE=0`` turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

SOURCE = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w")
KINDS = {torch.float32: 0, torch.bfloat16: 1}
INT8, INT4 = 2, 3
PANEL = 16
"""Outputs that integer weights are stored together for."""
LARGE = 1 << 21
"""Bytes of a large page."""
SMALL = 1 << 28
_moved = WeakIdKeyDictionary()


class Matrix(ctypes.Structure):
    """A weight matrix, as ``matrix.h`` has it."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weights", "scales", "bias")],
        *[(name, ctypes.c_int64) for name in ("n", "k", "stride")],
        *[(name, ctypes.c_int32) for name in ("kind", "padding")],
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels of decoding; None where they are turned off or no compiler makes them."""
    found = compiled("step")
    if found is not None:
        found.chiasm_work.restype = ctypes.c_void_p
        found.chiasm_free.argtypes = [ctypes.c_void_p]
    return found


@functools.cache
def compiled(name: str) -> ctypes.CDLL | None:
    """The library made from ``native/NAME.cpp``; None where kernels are turned off or no compiler makes them."""
    if os.environ.get("CHIASM_NATIVE", "1") == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    try:
        path = None if compiler is None else _built(compiler, name)
        return None if path is None else ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


class Work:
    """The memory that calls of one thread work in."""

    def __init__(self) -> None:
        self.library = library()
        assert self.library is not None
        self.place = ctypes.c_void_p(self.library.chiasm_work())

    def __del__(self) -> None:
        if ctypes is not None and self.library is not None and self.place:
            self.library.chiasm_free(self.place)
            self.place = ctypes.c_void_p()


def dense(weight: Tensor, bias: Tensor | None, keep: list[Tensor]) -> Matrix | None:
    """A matrix ``[n, k]`` of float32 or bfloat16; None for others. ``keep`` gets what must stay alive."""
    if weight.dtype not in KINDS or weight.device.type != "cpu" or weight.stride(1) != 1:
        return None
    keep.append(weight)
    rows = weight.stride(0) * weight.element_size()
    return Matrix(weight.data_ptr(), None, floats(bias, keep), *weight.shape, rows, KINDS[weight.dtype], 0)


def floats(values: Tensor | None, keep: list[Tensor]) -> int | None:
    """The address of ``values`` in float32, or None."""
    if values is None:
        return None
    keep.append(values.detach().float().contiguous())
    return keep[-1].data_ptr()


def linear(matrix: Matrix, work: Work, x: Tensor) -> Tensor:
    """``x [..., k]`` float32 or bfloat16 → ``[..., n]`` in its type."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # [m, k]
    out = rows.new_empty(len(rows), matrix.n)
    assert work.library is not None
    work.library.chiasm_linear(
        ctypes.byref(matrix),
        work.place,
        ctypes.c_int64(len(rows)),
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int32(KINDS[x.dtype]),
        ctypes.c_int32(torch.get_num_threads()),
    )
    return out.view(*x.shape[:-1], matrix.n)


def products(vectors: Tensor, queries: Tensor) -> Tensor:
    """``vectors [n, D]``, ``queries [m, D]`` int8 without -128 → their products ``[m, n]``, whole numbers in int32."""
    native = compiled("nearest")
    if native is None or not len(vectors) or vectors.stride() != (vectors.shape[1], 1):
        return torch.cat([torch._int_mm(vectors, q.unsqueeze(1)) for q in queries], 1).T  # [m, n]
    queries = queries.contiguous()
    out = torch.empty(len(queries), len(vectors), dtype=torch.int32)
    native.chiasm_products(
        ctypes.c_void_p(vectors.data_ptr()),
        ctypes.c_int64(len(vectors)),
        ctypes.c_int64(vectors.shape[1]),
        ctypes.c_void_p(queries.data_ptr()),
        ctypes.c_int64(len(queries)),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int32(torch.get_num_threads()),
    )
    return out


@functools.cache
def tower() -> ctypes.CDLL | None:
    """The kernels of towers in bfloat16; None where there are none for this processor."""
    found = compiled("tower")
    return found if found is not None and found.chiasm_has_tower() else None


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, causal: bool) -> Tensor:
    """``q``, ``k``, ``v [B, N, H*Dh]`` bfloat16, ``mask [B, N]`` bool → ``[B, N, H*Dh]``; see ``native/tower.cpp``.

    A row that may see nothing gets zeros.
    """
    native = tower()
    assert native is not None
    q, k, v = (x.contiguous() for x in (q, k, v))
    mask = None if mask is None else mask.contiguous()
    out = torch.empty_like(q)
    native.chiasm_attention(
        *(ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, out)),
        ctypes.c_void_p(None if mask is None else mask.data_ptr()),
        *(ctypes.c_int64(n) for n in (q.shape[0], q.shape[1], heads, q.shape[2] // heads)),
        ctypes.c_int32(causal),
        ctypes.c_int32(torch.get_num_threads()),
    )
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``x [..., D]``, ``weight`` and ``bias`` ``[D]`` bfloat16 → the normalised ``[..., D]``, summed in float32."""
    native, x = tower(), x.contiguous()
    assert native is not None
    out = torch.empty_like(x)
    native.chiasm_layer_norm(
        *(ctypes.c_void_p(t.data_ptr()) for t in (x, weight, bias, out)),
        *(ctypes.c_int64(n) for n in (x.numel() // x.shape[-1], x.shape[-1])),
        ctypes.c_float(eps),
        ctypes.c_int32(torch.get_num_threads()),
    )
    return out


ACTIVATIONS = {"quick_gelu": 0, "gelu_tanh": 1, "silu": 2}


def activate_(x: Tensor, name: str) -> Tensor:
    """``x`` bfloat16, contiguous, with an activation of ``ACTIVATIONS`` in its place."""
    native = tower()
    assert native is not None
    native.chiasm_activate(
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(x.numel()),
        ctypes.c_int32(ACTIVATIONS[name]),
        ctypes.c_int32(torch.get_num_threads()),
    )
    return x


def state(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    """What changes when a tensor is moved, cast or changed in place: what was made from its values is then stale.

    torch does not count what is written through ``.data``, and tensors of inference are taken never to change.
    """
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype


def plain(x: Tensor) -> bool:
    """Whether a tensor can be given to the kernels of towers: bfloat16 in memory here, and nothing that follows it."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and tower() is not None
    )


def large_pages(tensors: Iterable[Tensor]) -> None:
    """Ask the system to move tensors, those of some megabytes together, to large pages; they are read a quarter faster.

    Nothing but speed changes. Where the system has none it does nothing.
    """
    found = library()
    spans = []
    for tensor in tensors:
        if tensor not in _moved:
            _moved[tensor] = True
            first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
            spans.append((first // LARGE * LARGE, -(-last // LARGE) * LARGE))
    joined: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if joined and first <= joined[-1][1]:
            first, last = joined[-1][0], max(last, joined.pop()[1])
        joined.append((first, last))
    for first, last in joined:
        if found is not None:
            found.chiasm_large_pages(ctypes.c_void_p(first), ctypes.c_int64(last - first), ctypes.c_int32(False))


def larger_pages(tensor: Tensor) -> None:
    """Ask the system to give large pages to what will be written of a tensor of ``SMALL`` bytes at most.

    A larger one would take much more memory than is used of it.
    """
    found, size = library(), tensor.numel() * tensor.element_size()
    first, last = -(-tensor.data_ptr() // LARGE) * LARGE, (tensor.data_ptr() + size) // LARGE * LARGE
    if found is not None and size <= SMALL and first < last:
        found.chiasm_large_pages(ctypes.c_void_p(first), ctypes.c_int64(last - first), ctypes.c_int32(True))


def _built(compiler: str, source: str) -> Path:
    file = SOURCE / f"{source}.cpp"
    files = [file, *sorted(SOURCE.glob("*.h"))]
    told = (compiler, *FLAGS, _processor(), *(file.read_text() for file in files))
    name = hashlib.sha256("\0".join(told).encode()).hexdigest()[:24]
    folder = _folder()
    path = folder / f"{source}-{name}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            command = [compiler, *FLAGS, "-shared", str(file), "-o", aside]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            os.replace(aside, path)
        finally:
            Path(aside).unlink(missing_ok=True)
    return path


def _folder() -> Path:
    own = os.environ.get("CHIASM_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chiasm"
    return base / "native"


def _processor() -> str:
    """What the processor can do: a shared home may serve several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

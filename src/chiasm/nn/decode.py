"""One decoding step of ``lm.decoder.Decoder`` as a single call of the compiled kernels.

It reads the module's own weights where they lie (norms and biases are copied to float32) and writes keys and values
into the caches it is given. ``Compiled.of`` gives None for anything it does not know exactly: wrapped or replaced
layers, other types, other devices. Everything then runs in torch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from chiasm.nn.kernels import (
    INT8,
    KINDS,
    PANEL,
    Matrix,
    Work,
    dense,
    floats,
    large_pages,
    larger_pages,
    library,
    state,
    tower,
)
from chiasm.nn.quant import Quantized
from chiasm.nn.rope import frequency_tables

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ROWS, MANY = {torch.float32: 32, torch.bfloat16: 256}, 1 << 20
"""Tokens up to which this is faster than torch's matrix products; integers are multiplied here, however many, and
bfloat16 too where the processor has products of it."""
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
LARGE_HEAD = 1 << 24
"""Bytes of a head from which on a shortlist is kept for it: a smaller one stays in the processor's caches."""


class Layer(ctypes.Structure):
    """As ``step.cpp`` has it."""

    _fields_ = [
        *[(name, Matrix) for name in MATRICES],
        *[(name, ctypes.c_void_p) for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm", "keys", "values")],
    ]


class Shortlist(ctypes.Structure):
    """As ``shortlist.h`` has it."""

    _fields_ = [("w", Matrix), ("off", ctypes.c_void_p), ("length", ctypes.c_void_p)]


class Model(ctypes.Structure):
    """As ``step.cpp`` has it."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("layers", "embedding", "norm", "frequencies")],
        ("head", Matrix),
        ("list", Shortlist),
        *[(name, ctypes.c_int64) for name in ("depth", "dim", "heads", "kv_heads", "width", "rotary", "mlp")],
        *[(name, ctypes.c_int64) for name in ("capacity", "window")],
        *[(name, ctypes.c_float) for name in ("eps", "amplitude")],
        *[(name, ctypes.c_int32) for name in ("embedding_kind", "cache_kind", "activation", "padding")],
    ]


class Compiled:
    """A decoder and its caches, ready for ``step``."""

    def __init__(self, lm: Any, pool: Tensor):
        """``pool [layers, 2, slots, H_kv, L, Dh]``: keys and values."""
        c, self.keep = lm.config, [pool]
        larger_pages(pool)
        layers = (Layer * c.depth)()
        for index, block in enumerate(lm.layers):
            self._fill(layers[index], block, pool[index, 0], pool[index, 1])
        frequencies = frequency_tables(c.rotary, c.rope_theta, c.rope_scaling)[0]
        self.layers, self.work, self.vocab = layers, Work(), lm.vocab
        matrices = [matrix for block in lm.layers for matrix in _matrices(block)]
        most = ROWS if tower() is None else {**ROWS, torch.bfloat16: MANY}
        self.rows = min(MANY if type(matrix) is Quantized else most[matrix.weight.dtype] for matrix in matrices)
        head = self._matrix(lm.lm_head) if lm.lm_head is not None else dense(lm.embedding.weight, None, self.keep)
        assert head is not None
        large = head.kind in KINDS.values() and head.n * head.stride >= LARGE_HEAD
        self.head = (lm.embedding if lm.lm_head is None else lm.lm_head).weight if large else None
        self.keep.append(lm.embedding.weight)
        large_pages(tensor for tensor in self.keep[1:] if tensor.numel() >= 1 << 16)
        self.model = Model(
            ctypes.addressof(layers),
            lm.embedding.weight.data_ptr(),
            floats(lm.norm.weight, self.keep),
            floats(frequencies, self.keep),
            head,
            Shortlist(),
            *(c.depth, c.dim, c.heads, c.kv_heads or c.heads, c.width, c.rotary, c.mlp, pool.shape[4]),
            c.sliding_window or 0,
            c.norm_eps,
            lm.rope.amplitude,
            KINDS[lm.embedding.weight.dtype],
            KINDS[pool.dtype],
            ACTIVATIONS.index(c.activation),
            0,
        )

    @classmethod
    def of(cls, lm: Any, pool: Tensor) -> Compiled | None:
        """The compiled step, or None where the kernels or the model do not allow it."""
        if library() is None or pool.device.type != "cpu" or pool.dtype not in KINDS or not readable(lm):
            return None
        return cls(lm, pool)

    def step(
        self,
        ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        wanted: Tensor,
        threads: int,
        x: Tensor | None = None,
        prompt: bool = False,
        best: int | None = None,
    ) -> Tensor:
        """``ids [m]`` int64; ``slots``, ``positions`` ``[m]`` int32; rows ``wanted [r]`` int32 → logits ``[r, V]``.

        ``x [m, D]`` float32 stands for the ids' vectors where some are media's. ``prompt``: the rows are a prompt's,
        many and in order; their sums are taken in another order than those of single tokens, and faster. ``best``: as
        many of the highest logits of each row are asked for; others may be minus infinity, which spares half of the
        head's bytes (``native/shortlist.h``).
        """
        logits = torch.empty(len(wanted), self.vocab)
        assert self.work.library is not None
        self.work.library.chiasm_step(
            ctypes.byref(self.model),
            self.work.place,
            ctypes.c_int64(len(ids)),
            *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (ids, x, slots, positions, wanted)),
            ctypes.c_int64(len(wanted)),
            ctypes.c_int64(self._listed(best)),
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_int32(threads),
            ctypes.c_int32(prompt),
        )
        return logits

    def _fill(self, into: Layer, block: Any, keys: Tensor, values: Tensor) -> None:
        for name, module in zip(MATRICES, _matrices(block), strict=True):
            setattr(into, name, self._matrix(module))
        attn = block.attn
        into.attn_norm = floats(block.attn_norm.weight, self.keep)
        into.mlp_norm = floats(block.mlp_norm.weight, self.keep)
        into.q_norm = None if attn.q_norm is None else floats(attn.q_norm.weight, self.keep)
        into.k_norm = None if attn.k_norm is None else floats(attn.k_norm.weight, self.keep)
        into.keys, into.values = keys.data_ptr(), values.data_ptr()

    def _listed(self, best: int | None) -> int:
        """``best``, with a shortlist of these very weights in ``model``; 0 where all logits are computed."""
        if best is None or self.head is None:
            return 0
        held, now = _lists.get(self.head), state(self.head)
        if held is None or held[0] != now:
            held = _lists[self.head] = now, _shortlist(self.model.head)
        self.list = self.model.list = held[1]
        return best

    def _matrix(self, module: Any) -> Matrix:
        if isinstance(module, Quantized):
            self.keep += module.tensors()
            return module.matrix()
        found = dense(module.weight, module.bias, self.keep)
        assert found is not None
        return found


_lists = WeakIdKeyDictionary()
"""Weight of a head → its state, and the shortlist made of it."""


def _shortlist(head: Matrix) -> Shortlist:
    """A copy of a head in eight bits, and how far it may be off."""
    native, rows, wide = library(), -(-head.n // PANEL) * PANEL, -(-head.k // 64) * 64
    assert native is not None
    packed = torch.empty(rows, wide, dtype=torch.uint8)
    larger_pages(packed)
    tensors = packed, torch.empty(rows), torch.empty(head.n), torch.empty(head.n)
    copy, scales, off, length = (tensor.data_ptr() for tensor in tensors)
    native.chiasm_shorten(
        ctypes.byref(head),
        *(ctypes.c_void_p(place) for place in (copy, scales, off, length)),
        ctypes.c_int32(torch.get_num_threads()),
    )
    found = Shortlist(Matrix(copy, scales, None, head.n, head.k, wide, INT8, 0), off, length)
    found.tensors = tensors  # they stay alive with it
    return found


def readable(lm: Any) -> bool:
    """Whether the kernels know every part of a decoder: plain or quantized matrices of types they read."""
    if lm.extra or lm.rope.varies or type(lm.embedding) is not nn.Embedding:
        return False
    kinds = lambda *modules: len({_kind(module) for module in modules}) == 1 and _kind(modules[0]) is not None  # noqa: E731
    for block in lm.layers:
        q, k, v, o, gate, up, down = _matrices(block)
        if not (kinds(q, k, v) and kinds(o) and kinds(gate, up) and kinds(down)):
            return False
    return lm.embedding.weight.dtype in KINDS and (lm.lm_head is None or _kind(lm.lm_head) is not None)


def _matrices(block: Any) -> tuple[Any, ...]:
    attn, mlp = block.attn, block.mlp
    return attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _kind(module: Any) -> Any:
    if type(module) is Quantized:
        return module.bits
    if type(module) is nn.Linear and module.weight.dtype in KINDS and module.weight.stride(1) == 1:
        return module.weight.dtype
    return None


__all__ = ["Compiled", "readable"]

"""llama.cpp as a peer of the inference benchmark: our decoder's weights in its file format, run by its own library.

Needs the packages ``gguf`` and ``llama-cpp-python``, the latter built for this processor
(``CMAKE_ARGS=-DGGML_NATIVE=ON``). Without them the benchmark leaves this peer out.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

NEEDED = ("gguf", "llama_cpp")


def missing() -> list[str]:
    """Packages that this peer needs and that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def write_gguf(lm: Any, path: Path, kind: str) -> None:
    """The weights of ``lm`` (our decoder, of the plain Llama kind, in any float type) as ``kind`` ("Q8_0", "BF16")."""
    import gguf

    c = lm.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.depth)
    writer.add_feed_forward_length(c.mlp)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads or c.heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.width)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab)
    writer.add_tokenizer_model("none")

    def put(name: str, weight: torch.Tensor) -> None:
        values = weight.detach().float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            how = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, how), raw_dtype=how)

    def paired(weight: torch.Tensor) -> torch.Tensor:
        """That file format turns neighbours together; ours (and transformers') the two halves of a head."""
        return weight.unflatten(0, (-1, 2, c.width // 2)).transpose(1, 2).flatten(0, 2)

    put("token_embd.weight", lm.embedding.weight)
    for i, block in enumerate(lm.layers):
        put(f"blk.{i}.attn_norm.weight", block.attn_norm.weight)
        put(f"blk.{i}.attn_q.weight", paired(block.attn.q_proj.weight))
        put(f"blk.{i}.attn_k.weight", paired(block.attn.k_proj.weight))
        put(f"blk.{i}.attn_v.weight", block.attn.v_proj.weight)
        put(f"blk.{i}.attn_output.weight", block.attn.o_proj.weight)
        put(f"blk.{i}.ffn_norm.weight", block.mlp_norm.weight)
        for ours, theirs in (("gate_proj", "ffn_gate"), ("up_proj", "ffn_up"), ("down_proj", "ffn_down")):
            put(f"blk.{i}.{theirs}.weight", getattr(block.mlp, ours).weight)
    put("output_norm.weight", lm.norm.weight)
    if lm.lm_head is not None:
        put("output.weight", lm.lm_head.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """One model file, asked by token ids: its library has no part in templates and tokenizers here."""

    def __init__(self, path: Path, threads: int, positions: int = 640):
        import llama_cpp as api

        self.api, self.log = api, api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self.log, ctypes.c_void_p())
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp did not load {path.name}")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = positions, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, params)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def begin(self, ids: list[int]) -> np.ndarray:
        """Compute a prompt from nothing; the logits after it."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        return self.advance(ids)

    def advance(self, ids: list[int]) -> np.ndarray:
        """More tokens; the logits ``[V]`` after them."""
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp could not compute a batch")
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocab,))

    def answer(self, ids: list[int], tokens: int) -> None:
        """A whole request: the prompt and the likeliest ``tokens`` after it."""
        logits = self.begin(ids)
        for _ in range(tokens - 1):
            logits = self.advance([int(logits.argmax())])
        logits.argmax()

    def weight_bytes(self) -> int:
        """Bytes of all weights. Every token reads them: a tied head is the table of embeddings."""
        return int(self.api.llama_model_size(self.model))

    def close(self) -> None:
        """Give the memory back."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

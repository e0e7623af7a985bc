"""Any causal or encoder-decoder language model of transformers, driven by vectors instead of token ids.

Reference: transformers (4.57 and later). The model is built from its configuration, without a download; its weights
come with the rest of the checkpoint, under ``model.*`` and the names transformers gives them.

Differences by design: padding and packing are told by segments. Rows of one segment go through the model's own
padding mask; packed rows get the block-diagonal mask, and a model that cannot take one is refused instead of mixing
conversations. What a model does between its last norm and its logits (T5's scaling, Gemma's soft cap) is compared
with the model's own logits once.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.lm.base import LM, Cross, LMConfig
from chiasm.nn.masks import causal_mask
from chiasm.nn.modes import evaluating
from chiasm.nn.reach import key_biases, unreached
from chiasm.registry import register


@register("lm", "hf")
class HFLM(LM):
    """Wraps ``AutoModelForCausalLM`` or, where the configuration says encoder-decoder, ``AutoModelForSeq2SeqLM``."""

    class Config(LMConfig):
        """``config``: the model's ``config.json``, with its ``model_type``."""

        type: str = "hf"
        config: dict[str, Any]

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = build(config.config)
        theirs = self.model.config
        table = self.model.get_input_embeddings().weight
        self.vocab, self.dim = table.shape
        self.encoder_decoder = bool(theirs.is_encoder_decoder)
        relative = hasattr(theirs, "relative_attention_num_buckets")  # T5: no limit on positions
        self.max_positions = None if relative else getattr(theirs, "max_position_embeddings", None)
        self.start_id = getattr(theirs, "decoder_start_token_id", None)
        self._takes_positions = "position_ids" in inspect.signature(self.model.base_model.forward).parameters
        self._head_checked = self._packing_checked = False
        self._unused: list[str] | None = None
        self.register_load_state_dict_post_hook(_after_loading)

    def embed(self, ids: Tensor) -> Tensor:
        """``ids [B, T]`` → ``[B, T, D]``."""
        return self.model.get_input_embeddings()(ids)

    def forward(
        self, x: Tensor, positions: Tensor, segments: Tensor, cache: HFCache | None = None, cross: Cross | None = None
    ) -> Tensor:
        """``x [B, T, D]``, ``positions``, ``segments`` ``[B, T]`` → final hidden states ``[B, T, D]``."""
        if cross:
            raise ConfigError("lm 'hf' has no place for cross-attention between its layers: use lm 'decoder' or 'gpt'")
        self._check_head(x)
        past = None
        if cache is not None:
            cache.advance(segments)
            past = cache.inner
        if packed(segments):
            if cache is not None:
                raise DataError("packed rows cannot be continued from a cache: generate from a padded batch")
            self._check_packing(x)
            mask = additive(causal_mask(segments, positions, segments, positions, self._window()), x.dtype)
        else:
            mask = (segments if cache is None else cache.segments) != 0  # [B, L]
        return self._run(x, positions, mask, past)

    def head(self, hidden: Tensor) -> Tensor:
        """``hidden [..., D]`` → logits ``[..., V]``, with what the model does before and after its last matrix."""
        theirs = self.model.config
        if getattr(theirs, "scale_decoder_outputs", False):  # T5, where the head is the embedding
            hidden = hidden * theirs.d_model**-0.5
        logits = self.model.get_output_embeddings()(hidden)  # [..., V]
        if getattr(theirs, "logits_scaling", None):  # Granite
            logits = logits / theirs.logits_scaling
        if getattr(theirs, "logit_scale", None):  # Cohere
            logits = logits * theirs.logit_scale
        cap = getattr(theirs, "final_logit_softcapping", None)  # Gemma 2
        return cap * torch.tanh(logits / cap) if cap else logits

    def encode(self, x: Tensor, segments: Tensor) -> Tensor:
        """``x [B, T, D]`` → memory ``[B, T, D]``. Rows are moved to the left, where the model counts columns from."""
        if packed(segments):
            raise DataError("an encoder-decoder model cannot take packed rows: make the batch with pack=False")
        order = (segments == 0).long().argsort(dim=1, stable=True)  # [B, T]
        back = order.argsort(dim=1)
        mask = (segments != 0).gather(1, order)
        x = x.gather(1, order.unsqueeze(-1).expand_as(x))
        memory = self.model.get_encoder()(inputs_embeds=x, attention_mask=mask).last_hidden_state  # [B, T, D]
        return memory.gather(1, back.unsqueeze(-1).expand_as(memory))

    def decode(self, ids: Tensor, memory: Tensor, segments: Tensor, cache: HFCache | None = None) -> Tensor:
        """Decoder ids ``[B, S]``, memory ``[B, T, D]`` → hidden ``[B, S, D]``."""
        if cache is not None:
            cache.advance(torch.ones_like(ids))
        output = self.model.get_decoder()(
            input_ids=ids,
            encoder_hidden_states=memory,
            encoder_attention_mask=segments != 0,
            past_key_values=None if cache is None else cache.inner,
            use_cache=cache is not None,
        )
        return output.last_hidden_state  # [B, S, D]

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> HFCache:
        """Room for ``capacity`` positions of ``batch`` rows."""
        return HFCache(batch, capacity, device, self.encoder_decoder)

    def unused(self) -> list[str]:
        """Names of the parameters that the logits do not depend on."""
        if self._unused is None:
            with torch.device("meta"):
                shapes = HFLM(self.config)
            self._unused = unreached(shapes, _logits)
        return self._unused

    def without_effect(self) -> list[str]:
        """Biases of attention's keys, which softmax cancels."""
        return [f"model.{name}" for name in key_biases(self.model)]

    def steady(self, shortest: int, longest: int) -> bool:
        """Whether a cache filled at ``shortest`` positions still holds at ``longest``: frequencies may change."""
        theirs = self.model.config
        rope = getattr(theirs, "rope_parameters", None) or getattr(theirs, "rope_scaling", None) or {}
        kinds = {table.get("rope_type", "default") for table in [rope, *rope.values()] if isinstance(table, dict)}
        if "longrope" in kinds:
            original = rope.get("original_max_position_embeddings", theirs.max_position_embeddings)
            return longest <= original or shortest > original
        return "dynamic" not in kinds or longest <= theirs.max_position_embeddings

    def _run(self, x: Tensor, positions: Tensor, mask: Tensor, past: Any = None) -> Tensor:
        extra = {"position_ids": positions} if self._takes_positions else {}
        output = self.model.base_model(
            inputs_embeds=x, attention_mask=mask, past_key_values=past, use_cache=past is not None, **extra
        )
        return output.last_hidden_state  # [B, T, D]

    def _window(self) -> int | None:
        """The sliding window where all layers have one. Raises DataError where only some do."""
        theirs = self.model.config
        kinds = set(getattr(theirs, "layer_types", None) or ())
        if len(kinds) > 1:
            raise DataError(
                f"packed rows: {theirs.model_type} mixes {', '.join(sorted(kinds))}; turn packing off for it"
            )
        if kinds == {"full_attention"}:
            return None
        return getattr(theirs, "sliding_window", None)

    @torch.no_grad()
    def _check_head(self, x: Tensor) -> None:
        """Once: the model's own logits of two positions equal ``head`` of its hidden states."""
        if self._head_checked or x.device.type == "meta":
            return
        self._head_checked = True
        probe = torch.linspace(-1, 1, 2 * x.shape[-1], device=x.device).to(x.dtype).view(1, 2, -1)  # [1, 2, D]
        with evaluating(self.model):
            ones = torch.ones(1, 2, dtype=torch.long, device=x.device)
            ours = self.head(self._run(probe, ones.cumsum(1) - 1, ones != 0))
            theirs = self.model(inputs_embeds=probe, attention_mask=ones).logits
        if not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
            gap = float((ours - theirs).abs().max())
            raise ConfigError(
                f"{self.model.config.model_type}: its logits are not its head on its last states (they differ by "
                f"{gap:.3g}); lm 'hf' does not know what it does between them: add it to HFLM.head"
            )

    @torch.no_grad()
    def _check_packing(self, x: Tensor) -> None:
        """Once: packed probes give what they give alone. Raises DataError for models that see across segments."""
        if self._packing_checked or x.device.type == "meta":
            return
        probe = torch.linspace(-1, 1, 5 * x.shape[-1], device=x.device).to(x.dtype).view(1, 5, -1).sin()  # [1, 5, D]
        segments = torch.tensor([[1, 1, 2, 2, 2]], device=x.device)
        positions = torch.tensor([[0, 1, 0, 1, 2]], device=x.device)
        with evaluating(self.model):
            mask = additive(causal_mask(segments, positions, segments, positions, self._window()), x.dtype)
            try:
                together = self._run(probe, positions, mask)[:, 2:]
            except (ValueError, RuntimeError, IndexError) as error:
                raise DataError(
                    f"{self.model.config.model_type} takes no packed rows ({error}): turn packing off"
                ) from None
            alone = self._run(probe[:, 2:], positions[:, 2:], segments[:, 2:] != 0)
        if not torch.allclose(together.float(), alone.float(), rtol=1e-2, atol=1e-2 * float(alone.abs().max())):
            raise DataError(
                f"{self.model.config.model_type} lets packed conversations see each other (hidden states differ by "
                f"{float((together - alone).abs().max()):.3g}): turn packing off"
            )
        self._packing_checked = True


class HFCache:
    """A cache of transformers with the segments of its columns and a fixed capacity."""

    def __init__(self, batch: int, capacity: int, device: torch.device, encoder_decoder: bool):
        from transformers import DynamicCache, EncoderDecoderCache

        self.inner = EncoderDecoderCache(DynamicCache(), DynamicCache()) if encoder_decoder else DynamicCache()
        self.segments = torch.zeros(batch, 0, dtype=torch.long, device=device)  # [B, length]
        self.capacity = capacity

    @property
    def length(self) -> int:
        """Columns taken."""
        return self.segments.shape[1]

    def advance(self, segments: Tensor) -> None:
        """Note the segments ``[B, T]`` of the next columns. Raises DataError when they don't fit."""
        if len(segments) != len(self.segments):
            raise DataError(f"the cache holds {len(self.segments)} rows, {len(segments)} were given: reorder it first")
        if self.length + segments.shape[1] > self.capacity:
            raise DataError(
                f"the cache has room for {self.capacity} positions; {self.length} are taken and {segments.shape[1]} "
                "more were given: make it larger with new_cache(batch, capacity)"
            )
        self.segments = torch.cat((self.segments, segments), dim=1)

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was; ``rows [B']`` may repeat rows or leave some out."""
        self.segments = self.segments.index_select(0, rows)
        self.inner.batch_select_indices(rows)


def _logits(lm: HFLM) -> Tensor:
    """Logits ``[1, 2, V]`` of a model on the ``meta`` device, from the ids of two words."""
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    x = lm.embed(ids)  # [1, 2, D]
    if not lm.encoder_decoder:
        return lm.head(lm.model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state)  # [1, 2, V]
    memory = lm.model.get_encoder()(inputs_embeds=x).last_hidden_state  # [1, 2, D]
    found = lm.model.get_decoder()(input_ids=ids, encoder_hidden_states=memory, use_cache=False)
    return lm.head(found.last_hidden_state)  # [1, 2, V]


def build(values: dict[str, Any]) -> Any:
    """The model of a transformers configuration, freshly initialised. Raises ConfigError."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("lm 'hf' needs transformers: pip install 'chiasm[hf]'") from None
    values = dict(values)
    name = values.pop("model_type", None)
    if name is None:
        raise ConfigError("lm 'hf': its config needs 'model_type', as a transformers config.json has it")
    values = {k: v for k, v in values.items() if k not in ("architectures", "torch_dtype", "dtype", "auto_map")}
    try:
        config = transformers.AutoConfig.for_model(name, **values)
        kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        model = kind.from_config(config, dtype=torch.get_default_dtype())
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"lm 'hf': transformers cannot build {name!r}: {str(error).splitlines()[0]}") from None
    if values.get("tie_word_embeddings") is False:
        _untie(model)
    return model


def _untie(model: Any) -> None:
    """Give the head a matrix of its own. transformers 5 ties T5's whatever its configuration says, until it loads."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is table.weight:
        head.weight = torch.nn.Parameter(torch.empty_like(table.weight))
        torch.nn.init.normal_(head.weight, std=0.02)
        model.config.tie_word_embeddings = False


def fill_buffers(model: Any) -> None:
    """Compute the buffers no checkpoint holds (rotary frequencies) where the model was built on the meta device."""
    device = next(model.parameters()).device
    for module in model.modules():
        lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.device.type == "meta"]
        if lost and device.type != "meta":
            for name in lost:
                old = getattr(module, name)
                module.register_buffer(name, torch.empty_like(old, device=device), persistent=False)
            kept = [(parameter, parameter.detach().clone()) for parameter in module.parameters(recurse=False)]
            model._init_weights(module)
            with torch.no_grad():  # Gemma's embedding owns such a buffer: its loaded weight must stay
                for parameter, values in kept:
                    parameter.copy_(values)


def _after_loading(lm: HFLM, _: Any) -> None:
    fill_buffers(lm.model)


def packed(segments: Tensor) -> bool:
    """Whether any row of ``[B, T]`` holds more than one segment."""
    most = segments.amax(dim=1, keepdim=True)
    return bool(((segments != 0) & (segments != most)).any())


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers added to attention scores: 0 where it is True, the lowest of ``dtype`` elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


__all__ = ["HFLM", "HFCache"]

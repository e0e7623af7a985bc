"""Every registered encoder, connector, language model, merge and way of joining, tiny, and what they make together.

The public names alone are used: a plain configuration, ``chiasm.build``, ``processor.batch``, ``generate``, ``save``,
``load``. A combination works, or is refused by one error of the package that names the parts and says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

import chiasm
from chiasm import registry
from chiasm.errors import ChiasmError, ConfigError

SIDE = 32
BODY = {"dim": 16, "depth": 2, "heads": 2, "mlp": 20}
TOKENS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
HF_LLAMA = {
    **{"model_type": "llama", **TOKENS, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512},
}
HF_T5 = {
    **{"model_type": "t5", **TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2},
    "decoder_start_token_id": 2,
}
HF_VIT = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {"type": "vit", "image_size": SIDE, "patch": 8, **BODY}

# key → (configuration, front end of its units, kind of media)
ENCODERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "vit": (VIT, {"type": "image", "size": SIDE}, "image"),
    "vit/cls": ({**VIT, "select": "cls"}, {"type": "image", "size": SIDE}, "image"),
    "vit/cls_patch": ({**VIT, "select": "cls_patch"}, {"type": "image", "size": SIDE}, "image"),
    "resnet": ({"type": "resnet", "blocks": [1, 1, 1, 1], "width": 8}, {"type": "image", "size": 64}, "image"),
    "efficientnet": (
        {"type": "efficientnet", "width": 0.5, "stages": [{"channels": 16}, {"channels": 24, "stride": 2}]},
        {"type": "image", "size": SIDE},
        "image",
    ),
    "hf": (
        {"type": "hf", "config": {"model_type": "vit", **HF_VIT, "image_size": SIDE, "patch_size": 8}},
        {"type": "image", "size": SIDE},
        "image",
    ),
    "naflex": (
        {"type": "naflex", "side": 4, "patch": 8, **BODY},
        {"type": "naflex", "patch": 8, "patches": 16},
        "image",
    ),
    "text": ({"type": "text", "vocab": 300, **BODY, "positions": 16}, {"type": "image", "size": SIDE}, "image"),
    "bert": ({"type": "bert", "vocab": 300, **BODY, "positions": 16}, {"type": "image", "size": SIDE}, "image"),
}
FORMER = {"dim": 16, "depth": 2, "heads": 2, "mlp": 20, "cross_every": 1}
# Sizes of connectors that are large as they stand; one without a line here is taken as it is.
SIZES: dict[str, dict[str, Any]] = {
    "neighbours": {"factor": 4},
    "dynamic": {"keep": 5},
    "hierarchical": {"frame": FORMER, "clip": FORMER, "frame_queries": 3, "frames": 2, "queries": 3},
    "mqt": {"queries": 4, "heads": 2},
    "multiscale": {"queries": 3, "strides": [2, 1], "body": FORMER},
    "timeline": {**FORMER, "units": 2, "queries": 3},
    "resampler": {"queries": 3, "depth": 1, "heads": 2, "head_dim": 4},
    "map_head": {"heads": 2, "mlp": 12},
    "clip_pool": {"grid": [4, 4], "heads": 2},
    "qformer": {"queries": 3, **FORMER},
}


def _ours(kind: str) -> list[str]:
    """The registered names of a kind, without those of other tests."""
    return [n for n in registry.names(kind) if registry.get(kind, n).__module__.startswith("chiasm.")]


CONNECTORS = {name: SIZES.get(name, {}) for name in _ours("connector")}
LMS: dict[str, dict[str, Any]] = {
    "decoder": {"type": "decoder", "vocab": 300, **BODY, "max_positions": 512},
    "gpt": {"type": "gpt", "vocab": 300, **BODY, "max_positions": 512},
    "hf": {"type": "hf", "config": HF_LLAMA},
    "hf/t5": {"type": "hf", "config": HF_T5},
}
MERGES: dict[str, dict[str, Any]] = {name: {} for name in _ours("merge")}
FUSIONS: dict[str, dict[str, Any]] = {
    "splice": {},
    "cross_attention": {"placement": {"every": 1}, "blocks": {"heads": 2, "head_dim": 8, "gate_start": 0.5}},
    "vokens": {"vokens": {"first": 290, "number": 2, "features": 3, "dim": 8, "depth": 1, "heads": 2, "mlp": 8}},
}
DEFAULT = {"encoder": "vit", "connector": "mlp", "lm": "decoder", "merge": "flat", "fusion": "splice"}
TABLES = {"encoder": ENCODERS, "connector": CONNECTORS, "lm": LMS, "merge": MERGES, "fusion": FUSIONS}


def configuration(**chosen: str) -> dict[str, Any]:
    """A plain configuration, as a person would write it."""
    names = {**DEFAULT, **chosen}
    encoder, front, kind = ENCODERS[names["encoder"]]
    fusion, connector = names["fusion"], names["connector"]
    model: dict[str, Any] = {
        "type": fusion,
        **FUSIONS[fusion],
        "encoders": {"image": encoder},
        "connectors": {"image": {"type": connector, **CONNECTORS[connector]}},
        "lm": LMS[names["lm"]],
        "media": {kind: {"merge": {"type": names["merge"], **MERGES[names["merge"]]}}},
    }
    processing: dict[str, Any] = {"template": "vicuna_v1", "media": {kind: front}}
    if names["lm"] == "hf/t5":
        processing["target"] = "decoder"
    return {"model": model, "processing": processing}


def picture(size: tuple[int, int]) -> Image.Image:
    """A ramp of (width, height) pixels."""
    return Image.linear_gradient("L").convert("RGB").resize(size)


def conversation(answered: bool) -> list[dict[str, Any]]:
    """A question about a picture that is no square."""
    content = [{"type": "image", "image": picture((50, 40))}, {"type": "text", "text": "What?"}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return [*turns, {"role": "assistant", "content": "A ramp."}] if answered else turns


def outcome(tokenizer: Path, folder: Path | None = None, **chosen: str) -> str:
    """ "works", or the words of the refusal. Anything else is raised: a crash, or a model that is wrong."""
    values = configuration(**chosen)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vlm = chiasm.build(values, tokenizer=tokenizer)
    except ConfigError as error:
        return str(error)
    for parameter in vlm.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    try:
        batch = vlm.processor.batch([conversation(True), _plain()], train=True)
    except ChiasmError as error:
        return f"late: {error}"
    output = vlm.model(batch, logits="labels")
    torch.nn.functional.cross_entropy(output.logits.float(), output.targets).backward()
    dead = [name for name, p in vlm.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    assert not dead, f"gradients that are no numbers: {dead[:3]}"
    seen = [n for n, p in vlm.named_parameters() if n.startswith("connectors.") and p.grad is not None and p.grad.any()]
    assert seen, "the picture's way got no gradient"
    text = vlm.eval().generate(conversation(False), max_new_tokens=2)
    assert isinstance(text, str)
    if folder is not None:
        again = chiasm.load(vlm.save(folder))
        with torch.no_grad():
            first, second = (m.model(batch, logits="labels").logits for m in (vlm, again))
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)  # memory lies otherwise: other rounding
        assert again.generate(conversation(False), max_new_tokens=2) == text
    return "works"


def _plain() -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]

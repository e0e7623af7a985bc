"""Names of the authors' checkpoints of VLMo ↔ names of ``modality_experts``, and its table carried to another size.

Source: ``multiway_transformer.py`` and ``vlmo_module.py`` of microsoft/unilm 768a3c8. The tensors stand under
``state_dict``, ``module`` or ``model`` of the file.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from chiasm.convert.maps import COMPUTED
from chiasm.convert.rules import AnyRule, Drop, rename, split, squeeze
from chiasm.errors import CheckpointError

_KINDS = {"text": "text", "imag": "image", "vl": "both"}
_HEADS = {
    "itc_image_proj": "image",
    "itc_text_proj": "text",
    "itc_vl_image_proj": "image_both",
    "itc_vl_text_proj": "text_both",
}
_INDEX = ("relative_position_index", "text_relative_position_index", "text_imag_relative_position_index")


def vlmo(dim: int, biases: bool = True, classifier: str = "vqa_classifier") -> list[AnyRule]:
    """A checkpoint of width ``dim``; ``biases``: places are biases. ``classifier`` is which of the heads is read."""
    theirs, ours = "transformer.blocks.{i}.", "blocks.{i}."
    experts = [
        rename(f"{theirs}{a}_{x}.{{{rest}}}", f"{ours}{b}.{y}.{{{rest}}}")
        for a, b, rest in (("norm2", "norm2", "leaf"), ("mlp", "mlp", "rest"))
        for x, y in _KINDS.items()
    ]
    embeddings = "text_embeddings."
    unused = "BERT's positions, which this size does not use: it has biases"
    positions = rename(embeddings + "position_embeddings.weight", "text.positions.weight")
    return [
        rename(embeddings + "word_embeddings.weight", "text.words.weight"),
        Drop(embeddings + "position_embeddings.weight", unused) if biases else positions,
        rename(embeddings + "token_type_embeddings.weight", "text.kinds.weight"),
        rename(embeddings + "LayerNorm.{leaf}", "text.norm.{leaf}"),
        Drop(embeddings + "position_ids", COMPUTED),
        Drop(embeddings + "token_type_ids", COMPUTED),
        *(Drop(name, COMPUTED) for name in _INDEX),
        rename("token_type_embeddings.weight", "kinds.weight"),
        rename("relative_position_bias_table", "biases"),
        squeeze("transformer.cls_token", "cls", leading=2),
        squeeze("transformer.pos_embed", "positions"),
        rename("transformer.patch_embed.proj.{leaf}", "patch.{leaf}"),
        split(theirs + "attn.qkv.weight", [ours + f"attn.{x}.weight" for x in "qkv"], [dim] * 3),
        rename(theirs + "attn.q_bias", ours + "attn.q.bias"),
        rename(theirs + "attn.v_bias", ours + "attn.v.bias"),
        rename(theirs + "attn.proj.{leaf}", ours + "attn.out.{leaf}"),
        rename(theirs + "norm1.{leaf}", ours + "norm1.{leaf}"),
        rename(theirs + "gamma_1", ours + "gamma1"),
        rename(theirs + "gamma_2", ours + "gamma2"),
        *experts,
        rename("transformer.norm.{leaf}", "norm.{leaf}"),
        rename("pooler.dense.{leaf}", "pooler.dense.{leaf}"),
        rename("mlm_score.transform.dense.{leaf}", "word_scores.dense.{leaf}"),
        rename("mlm_score.transform.LayerNorm.{leaf}", "word_scores.norm.{leaf}"),
        rename("mlm_score.decoder.weight", "word_scores.decoder.weight"),
        rename("mlm_score.bias", "word_scores.decoder.bias"),
        rename("itm_score.fc.{leaf}", "match_scores.{leaf}"),
        *(rename(f"{x}.fc.weight", f"projections.{y}.weight") for x, y in _HEADS.items()),
        rename("logit_scale", "logit_scale"),
        rename("logit_vl_scale", "logit_scale_both"),
        rename(classifier + ".{i}.{leaf}", "classifier.{i}.{leaf}"),
    ]


def carried(table: Tensor, old: int, new: int) -> Tensor:
    """The table of biases ``[rows, heads·depth]`` of pictures of ``old`` patches a side, for ``new`` a side.

    Source distances are spread as a geometric progression that ends where the target's do, and the plane of each head
    is read there by bicubic splines through all its points; the other rows stay. The reference does so with
    ``scipy.interpolate.interp2d``, which SciPy has removed; splines through the points are the same thing.

    Raises CheckpointError where SciPy is missing or the table is of another size.
    """
    try:
        from scipy.interpolate import RectBivariateSpline
    except ImportError as error:
        raise CheckpointError("carrying VLMo's table to another size needs SciPy: pip install scipy") from error
    side, target = 2 * old - 1, 2 * new - 1
    if len(table) <= side * side:
        raise CheckpointError(f"a table of {len(table)} rows holds no plane of {side} by {side} distances")
    if old == new:
        return table
    at = _spread(side, target)
    half = target // 2
    wanted = np.arange(-half, half + 0.1, 1.0)
    planes = table[: side * side].double().T.reshape(-1, side, side).numpy()
    found = [RectBivariateSpline(at, at, plane, kx=3, ky=3, s=0)(wanted, wanted).reshape(-1) for plane in planes]
    moved = torch.from_numpy(np.stack(found, 1)).to(table.dtype)  # [target*target, heads*depth]
    return torch.cat((moved, table[side * side :]))


def _spread(side: int, target: int) -> np.ndarray:
    """Where the source's distances lie among the target's: steps that grow by one factor, found by halving."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        total = (1 - ratio ** (side // 2)) / (1 - ratio)
        low, high = (low, ratio) if total > target // 2 else (ratio, high)
    steps = np.cumsum(ratio ** np.arange(side // 2))
    return np.concatenate([-steps[::-1], [0.0], steps])

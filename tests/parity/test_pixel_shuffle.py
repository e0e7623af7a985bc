"""The order of channels of pixel shuffle is Idefics3's and SmolVLM's."""

from __future__ import annotations

import pytest
import torch

from chiasm.connectors.pixel_shuffle import PixelShuffle, space_to_depth
from chiasm.types import Tokens

modeling = pytest.importorskip("transformers.models.idefics3.modeling_idefics3")


@pytest.mark.parametrize("factor", [2, 3])
def test_order(factor: int):
    side = 4 * factor
    x = torch.randn(2, side * side, 5, generator=torch.Generator().manual_seed(0))
    expected = modeling.Idefics3Connector.pixel_shuffle(None, x, factor)
    assert torch.equal(space_to_depth(x, (side, side), factor), expected)


def test_connector():
    from transformers import Idefics3Config

    config = Idefics3Config(
        vision_config={"hidden_size": 6, "num_attention_heads": 2},
        text_config={"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2},
        scale_factor=2,
    )
    theirs = modeling.Idefics3Connector(config)
    ours = PixelShuffle(PixelShuffle.Config(factor=2), {"image": 6}, 8)
    ours.load_state_dict({"layers.0.weight": theirs.modality_projection.proj.weight})
    x = torch.randn(3, 36, 6, generator=torch.Generator().manual_seed(0))
    tokens = ours(Tokens(x, grid=(6, 6)))
    torch.testing.assert_close(tokens.x, theirs(x), atol=1e-6, rtol=0)
    assert tokens.grid == (3, 3)

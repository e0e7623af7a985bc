"""Authors' files of fused models in, and fused models as the second judges of a retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import chiasm
from chiasm.convert.engine import export_tensors
from chiasm.convert.io import Loaded
from chiasm.errors import CheckpointError, ConfigError
from chiasm.eval.matcher import matcher
from chiasm.eval.retrieval import Pairs, recall
from chiasm.presets.original_fused import read_original, rules_of

TOKENIZER = "src/chiasm/weights/tiny-lm"


def small(name: str, seed: int = 0) -> Any:
    config = chiasm.preset(name, tiny=True, vocab=1024)
    if config.processing.masking:
        config = config.edit(**{"processing.masking.token": "<unk>"})
    torch.manual_seed(seed)
    vlm = chiasm.build(config, tokenizer=TOKENIZER).eval()
    for tensor in [*vlm.parameters(), *(b for b in vlm.model.buffers() if b.is_floating_point())]:
        tensor.data += 0.05 * torch.randn_like(tensor)
    return vlm


def authors_file(vlm: Any, path: Path, wrap: str, prefix: str = "") -> Path:
    """The model's tensors under the authors' names, as their trainers save them."""
    tensors = export_tensors(vlm.state_dict(), rules_of(vlm.config.model, Loaded("", {})))
    for side in ("text_encoder", "text_encoder_m", "text_decoder"):
        if f"{side}.cls.predictions.bias" in tensors:
            tensors[f"{side}.cls.predictions.decoder.bias"] = tensors[f"{side}.cls.predictions.bias"]
            table = tensors[f"{side}.bert.embeddings.word_embeddings.weight"]
            tensors[f"{side}.cls.predictions.decoder.weight"] = table
    torch.save({wrap: {prefix + name: tensor for name, tensor in tensors.items()}, "epoch": 3}, path)
    return path


@pytest.mark.parametrize(
    ("name", "wrap", "prefix"),
    [
        ("vilt-b32", "state_dict", ""),
        ("albef", "model", ""),
        ("albef-vqa", "model", ""),
        ("albef-nlvr2", "model", ""),
        ("vlmo-base", "module", "module."),
        ("vlmo-base-plus-nlvr2", "state_dict", ""),
        ("beit3-base-vqa", "model", ""),
        ("beit3-large-nlvr2", "module", ""),
        ("beit3-base-captions", "model", ""),
    ],
)
def test_authors_files(name: str, wrap: str, prefix: str, tmp_path: Path) -> None:
    source, target = small(name, 0), small(name, 1)
    path = authors_file(source, tmp_path / "weights.pth", wrap, prefix)
    with pytest.raises(CheckpointError, match="is a pickle"):
        read_original(target, path)
    read_original(target, path, allow_pickle=True)
    wanted = source.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in target.state_dict().items())
    assert "weights.pth (the authors' layout)" in target.config.provenance.history[-1]
    held = torch.load(path, weights_only=True)
    held[wrap].pop(next(iter(held[wrap])))
    torch.save(held, path)
    with pytest.raises(CheckpointError, match="1 tensors of the model are not in the file"):
        read_original(target, path, allow_pickle=True)


@pytest.mark.parametrize("name", ["vilt-b32-retrieval", "albef-retrieval", "beit3-base-retrieval"])
def test_a_fused_model_judges_candidates(name: str) -> None:
    vlm = small(name)
    colors = ("red", "green", "blue", "white")
    images = [Image.new("RGB", (40 + 8 * i, 40), color) for i, color in enumerate(colors)]
    pairs = Pairs.of([(image, f"a {color} picture") for image, color in zip(images, colors, strict=True)])
    judge = matcher(vlm, pairs, batch=3)
    found = judge([0, 1, 2, 3, 0], [0, 1, 2, 3, 3])
    talk = [{"role": "user", "content": [{"type": "image", "image": images[0]}, "a white picture"]}]
    with torch.no_grad():
        assert torch.allclose(found[4], vlm.model.match(vlm.processor.batch([talk]))[0], atol=1e-5)
    vectors = torch.nn.functional.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    judged = recall(vectors, vectors.flip(0), pairs, judge, candidates=4)
    grid = judge([i for i in range(4) for _ in range(4)], list(range(4)) * 4).view(4, 4)
    best = float((grid.argmax(1) == torch.arange(4)).float().mean())
    assert judged.reranked is not None and judged.reranked.text[1] == pytest.approx(best)


def test_a_model_that_matches_nothing_is_refused() -> None:
    class Mute:
        model = torch.nn.Linear(1, 1)
        config = type("C", (), {"model": type("M", (), {"type": "splice"})})

    with pytest.raises(ConfigError, match="does not judge pairs"):
        matcher(Mute(), Pairs([], [], []))

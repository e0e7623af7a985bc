"""LAVIS's files of BLIP-2 and InstructBLIP, in and out.

LAVIS cannot be installed here. Its names are written down in this file, from its source, as a map from those of
transformers; transformers' converter makes the two agree, so a file made by this map from a random model of
transformers must give that model's outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_folders import photo
from query_kit import CONFIG, batch, folder_of_transformers
from test_blip2_hf import QUESTIONS, make, talk
from torch import Tensor

import chiasm
from chiasm.compose import build_model
from chiasm.connectors.qformer import unimodal
from chiasm.errors import CheckpointError, ConfigError
from chiasm.fusion.query_text import QueryText
from chiasm.model_config import VLMConfig
from chiasm.presets import lavis
from chiasm.types import Condition, Tokens
from chiasm.vlm import VLM
from parity.weights import randomise

PIECES = [  # in this order, on the names of transformers
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("vision_model.encoder.layers", "visual_encoder.blocks"),
    ("vision_model.post_layernorm", "ln_vision"),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.qkv.", ".attn.qkv."),
    ("qformer.embeddings.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    ("qformer.embeddings.", "Qformer.bert.embeddings."),
    ("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    ("qformer.encoder.", "Qformer.bert.encoder."),
    (".crossattention.attention.", ".crossattention.self."),
    (".attention.attention.", ".attention.self."),
    ("vision_projection.", "vision_proj."),
    ("text_projection.", "text_proj."),
]


def as_lavis(state: dict[str, Tensor], lm: str = "") -> dict[str, Tensor]:
    """A state of transformers under LAVIS's names; the bias of keys must be 0."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, rest = name.partition("language_model.")
        if rest and not head:
            result[f"{lm}_model.{rest}"] = tensor
            continue
        name = name.replace("language_projection.", f"{lm}_proj.")
        if name.startswith("embeddings."):
            name = "qformer." + name
        for theirs, old in PIECES:
            name = name.replace(theirs, old)
        if name.endswith(".attn.qkv.bias"):
            q, k, v = tensor.chunk(3)
            assert not k.any()
            result |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            result[name] = tensor
    return result


@torch.no_grad()
def without_key_bias(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith("self_attn.qkv.bias"):
            parameter.chunk(3)[1].zero_()
    return model


KINDS = {"opt": "opt", "t5": "t5", "instruct": "llm", "instruct t5": "t5"}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("lavis") / "folder"
    kit = make(request.param, folder)
    without_key_bias(kit.model).save_pretrained(folder)
    kit.vlm, kit.lm = chiasm.load(folder), KINDS[request.param]
    kit.file = folder.parent / "blip2.pth"
    kit.state = as_lavis(kit.model.state_dict(), kit.lm)
    torch.save({"model": kit.state, "epoch": 3, "optimizer": {"state": {}}}, kit.file)
    return kit


def blank(vlm: VLM, seed: int = 5) -> VLM:
    """A model of the same configuration with other weights."""
    config = VLMConfig.parse(vlm.config.dump())
    return VLM(config, randomise(build_model(config.model), seed), vlm.processor)  # type: ignore[arg-type]


@torch.no_grad()
def logits(vlm: VLM) -> Tensor:
    given = vlm.processor.batch([talk(QUESTIONS[0], photo(40, 30), "a cat")], train=True)
    return vlm.model(given).logits


def test_a_whole_file_gives_the_model_of_transformers(made: Any):
    vlm = blank(made.vlm)
    assert (logits(vlm) - logits(made.vlm)).abs().max() > 1e-3
    assert lavis.load(vlm, made.file, allow_pickle=True) == []
    torch.testing.assert_close(logits(vlm), logits(made.vlm), atol=1e-6, rtol=1e-6)
    assert "(LAVIS)" in vlm.config.provenance.history[-1]


def test_what_is_written_is_what_was_read(made: Any, tmp_path: Path):
    made.vlm.export(tmp_path / "out", format="lavis")
    found = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["model"]
    ties = {name for name in made.state if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    assert found.keys() - ties == made.state.keys() - ties
    for name in found.keys() - ties:
        assert torch.equal(found[name], made.state[name]), name
    again = blank(made.vlm)
    lavis.load(again, tmp_path / "out" / "model.pth", allow_pickle=True)
    assert torch.equal(logits(again), logits(made.vlm))


def test_a_file_of_what_was_trained_leaves_the_frozen_parts(made: Any, tmp_path: Path):
    trained = {n: t for n, t in made.state.items() if not n.startswith(("visual_encoder.", made.lm + "_model."))}
    torch.save({"model": trained}, tmp_path / "bridge.pth")
    vlm = blank(made.vlm)
    assert lavis.load(vlm, tmp_path / "bridge.pth", allow_pickle=True) == ["encoders.image", "lm"]
    vlm.load_part("encoders.image", made.folder).load_part("lm", made.folder)
    lavis.load(vlm, tmp_path / "bridge.pth", allow_pickle=True)
    torch.testing.assert_close(logits(vlm), logits(made.vlm), atol=1e-6, rtol=1e-6)
    alone = blank(made.vlm)  # the connector by itself, as a recipe's weights name it
    alone.load_part("connectors.image", tmp_path / "bridge.pth", allow_pickle=True)
    for name, tensor in alone.model.connectors.state_dict().items():
        assert torch.equal(tensor, made.vlm.model.connectors.state_dict()[name])


def test_a_file_that_is_not_whole(made: Any, tmp_path: Path):
    broken = {n: t for n, t in made.state.items() if n != "query_tokens"}
    torch.save({"model": broken | {"stray": torch.ones(1)}}, tmp_path / "broken.pth")
    with pytest.raises(
        CheckpointError, match=r"'stray'.*1 tensors of the model are not in the file.*query_tokens"
    ) as e:
        lavis.load(blank(made.vlm), tmp_path / "broken.pth", allow_pickle=True)
    assert "\n" not in str(e.value)
    with pytest.raises(CheckpointError, match="pass allow_pickle=True"):
        lavis.load(blank(made.vlm), made.file)


CLIP_PIECES = [  # LAVIS's CLIP is OpenAI's: the names of transformers, and theirs
    ("vision_model.embeddings.class_embedding", "class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("vision_model.embeddings.patch_embedding", "conv1"),
    ("vision_model.pre_layrnorm", "ln_pre"),
    ("vision_model.encoder.layers", "transformer.resblocks"),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
]


@torch.no_grad()
def test_a_file_with_clips_tower(tmp_path: Path):
    """``vit_model: clip_L``: cut before its last block and with LAVIS's norm it gives transformers' hidden states."""
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=14,
        patch_size=4,
    )
    theirs = randomise(transformers.CLIPVisionModel(config), 3)
    state: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Tensor]] = {}
    for name, tensor in theirs.state_dict().items():
        if ".layers.3." in name or "post_layernorm" in name or "position_ids" in name:
            continue
        if (head := name.partition(".self_attn."))[1] and "out_proj" not in name:
            letter, leaf = head[2].split("_proj.")
            rows.setdefault(f"{head[0]}.attn.in_proj_{leaf}", {})[letter] = tensor
            continue
        state[name] = tensor
    state |= {name: torch.cat([parts[x] for x in "qkv"]) for name, parts in rows.items()}
    state = {name if name.startswith("vision_model") else "vision_model." + name: t for name, t in state.items()}
    for old, new in CLIP_PIECES:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    state = {"visual_encoder." + name: tensor for name, tensor in state.items()}

    vlm_config = chiasm.preset("blip2-clip-l-opt-2.7b", tiny=True)
    tower = vlm_config.model.encoders["image"].edit(image_size=14, mlp=64, depth=3)
    vlm_config = vlm_config.edit(**{"model.encoders.image": tower, "processing.media.image.size": 14})
    model = randomise(build_model(vlm_config.model), 5)
    ours = VLM(vlm_config, model, None)  # type: ignore[arg-type]
    ours.export(tmp_path / "out", format="lavis")
    written = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["model"]
    assert {n for n in written if n.startswith("visual_encoder.")} == state.keys()
    norm = torch.nn.LayerNorm(32, eps=1e-5)
    norm.weight.normal_()
    torch.save(
        {"model": written | state | {"ln_vision.weight": norm.weight, "ln_vision.bias": norm.bias}}, tmp_path / "x.pth"
    )
    assert lavis.load(ours, tmp_path / "x.pth", allow_pickle=True) == []
    pixels = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    expected = norm(theirs(pixels, output_hidden_states=True).hidden_states[3])
    found = model.encoders["image"](pixels).x
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.shape == (2, 10, 32) and (found[0] - found[1]).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------- between stages


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """LAVIS's ``blip2_pretrained``: the tower, the Q-Former with its text half, the heads, tied words."""
    kit = folder_of_transformers(tmp_path_factory.mktemp("first") / "folder")
    state = as_lavis(without_key_bias(kit.model).state_dict())
    g, words = torch.Generator().manual_seed(9), state["Qformer.bert.embeddings.word_embeddings.weight"]
    heads = {"transform.dense.weight": (24, 24), "transform.dense.bias": (24,), "bias": (80,)}
    heads |= {"transform.LayerNorm.weight": (24,), "transform.LayerNorm.bias": (24,)}
    cls = {"Qformer.cls.predictions." + n: torch.randn(shape, generator=g) for n, shape in heads.items()}
    cls |= {"Qformer.cls.predictions.decoder.weight": words.clone()}
    cls |= {"Qformer.cls.predictions.decoder.bias": cls["Qformer.cls.predictions.bias"].clone()}
    kit.state = (
        state | cls | {"temp": torch.tensor(0.05), "Qformer.bert.embeddings.position_ids": torch.arange(20)[None]}
    )
    kit.file = tmp_path_factory.mktemp("first") / "blip2_pretrained.pth"
    torch.save({"model": kit.state}, kit.file)
    config = VLMConfig.parse(kit.vlm.config.dump()).edit(model=CONFIG)
    kit.ours = VLM(config, randomise(build_model(config.model), 4), None)  # type: ignore[arg-type]
    lavis.load(kit.ours, kit.file, allow_pickle=True)
    return kit


@torch.no_grad()
def test_the_first_stage_gives_the_retrieval_model_of_transformers(first: Any):
    given, theirs = batch(), first.model
    inputs = {"pixel_values": given.media["image"].inputs, "input_ids": given.input_ids}
    match = theirs(**inputs, attention_mask=given.segment_ids, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(first.ours.model.pairs(given)[0], match, atol=1e-5, rtol=1e-5)
    assert float(first.ours.model.heat()) == pytest.approx(0.05)


def test_the_first_stage_is_written_as_it_was_read(first: Any, tmp_path: Path):
    first.ours.export(tmp_path / "out", format="lavis")
    found = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["model"]
    assert found.keys() == first.state.keys() - {"Qformer.bert.embeddings.position_ids"}
    assert all(torch.equal(found[name], first.state[name]) for name in found)


def test_words_and_their_twin_must_be_equal(first: Any, tmp_path: Path):
    state = first.state | {"Qformer.cls.predictions.decoder.weight": torch.zeros(80, 24)}
    torch.save({"model": state}, tmp_path / "untied.pth")
    with pytest.raises(CheckpointError, match=r"must be equal to 'Qformer.bert.embeddings.word_embeddings.weight'"):
        lavis.load(first.ours, tmp_path / "untied.pth", allow_pickle=True)


def bridge(**changes: Any) -> dict[str, Any]:
    """The connector of a later stage, with the sizes of the first."""
    values = {k: v for k, v in CONFIG["connectors"]["image"].items() if k not in ("project", "text")}
    return values | changes


def later(vlm: VLM, **changes: Any) -> VLM:
    lm = {"type": "decoder", "vocab": 90, "dim": 16, "depth": 1, "heads": 2, "mlp": 20, "max_positions": 64}
    model = {"type": "splice", "encoders": CONFIG["encoders"], "connectors": {"image": bridge(**changes)}, "lm": lm}
    config = vlm.config.model_copy(update={"model": VLMConfig.parse(vlm.config.dump() | {"model": model}).model})
    return VLM(config, randomise(build_model(config.model), 6), None)  # type: ignore[arg-type]


READS = {"text": {"vocab": 80, "positions": 20}, "instruction": True}


@pytest.mark.parametrize("source", ["own", "lavis"])
def test_the_second_stage_takes_the_queries_of_the_first(first: Any, source: str, tmp_path: Path):
    """Its text half is left behind, the projection stays as it was made."""
    path = first.ours.save(tmp_path / "own") if source == "own" else first.file
    second = later(first.ours)
    before = second.model.connectors["image"].proj.weight.clone()
    second.load_part("connectors.image", path, allow_pickle=True)
    mine, theirs = second.model.connectors["image"].state_dict(), first.ours.model.connectors["image"].state_dict()
    assert mine.keys() - theirs.keys() == {"proj.weight", "proj.bias"}
    assert all(torch.equal(mine[name], theirs[name]) for name in mine.keys() & theirs.keys())
    assert torch.equal(second.model.connectors["image"].proj.weight, before)


def test_a_second_stage_without_its_text_half_is_one_clear_error(first: Any, tmp_path: Path):
    """Into the first stage, and into InstructBLIP: where LAVIS leaves a random text half (fusion.md B13)."""
    second = later(first.ours)
    second.load_part("connectors.image", first.file, allow_pickle=True)
    folder = second.save(tmp_path / "second")
    without = {n: t for n, t in as_lavis(first.model.state_dict()).items() if "embeddings.word" not in n}
    torch.save({"model": without}, tmp_path / "second.pth")
    for vlm in (first.ours, later(first.ours, **READS)):
        with pytest.raises(CheckpointError, match="holds no text half of it: BLIP-2's second stage drops it"):
            vlm.load_part("connectors.image", folder)
    with pytest.raises(CheckpointError, match="holds no text half of the query transformer"):
        lavis.load(first.ours, tmp_path / "second.pth", allow_pickle=True)


def test_instructblip_takes_a_half_from_each_stage(first: Any, tmp_path: Path):
    second = later(first.ours)
    randomise(second.model, 8)
    folder, pretrained = second.save(tmp_path / "second"), first.ours.save(tmp_path / "first")
    reads = later(first.ours, **READS)
    reads.load_part("connectors.image.text_half", pretrained).load_part("connectors.image.query_half", folder)
    found = reads.model.connectors["image"].state_dict()
    text, queries = (m.model.connectors["image"].state_dict() for m in (first.ours, second))
    for name, tensor in found.items():
        half = text if ".text_" in name or name.startswith("body.text.") else queries
        assert torch.equal(tensor, half[name]), name
    with pytest.raises(ConfigError, match=r"connectors\.image has no text half"):
        second.load_part("connectors.image.text_half", pretrained)
    with pytest.raises(ConfigError, match="which has no query_half"):
        second.load_part("encoders.image.query_half", pretrained)


def test_another_size_is_refused(first: Any, tmp_path: Path):
    pretrained = first.ours.save(tmp_path / "first")
    with pytest.raises(CheckpointError, match="depth is 2 here, 3 there"):
        later(first.ours, depth=2).load_part("connectors.image", pretrained)


def test_what_lavis_has_no_place_for(first: Any, tmp_path: Path):
    odd = later(first.ours)
    config = odd.config.edit(**{"model.encoders.image.select": "patch"})
    vlm = VLM(config, build_model(config.model), None)
    with pytest.raises(CheckpointError, match="LAVIS has no place for this tower"):
        vlm.export(tmp_path / "out", format="lavis")
    with pytest.raises(CheckpointError, match="a first stage without a head for words"):
        first.vlm.export(tmp_path / "out", format="lavis")


def test_the_first_stage_begins_with_bert(first: Any, tmp_path: Path):
    """Both perceptrons are BERT's, of which LAVIS's query half is a copy; what it looks with stays as it was made."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
    config = transformers.BertConfig(**sizes, vocab_size=77, max_position_embeddings=20)
    bert = randomise(transformers.BertModel(config), 2)
    bert.save_pretrained(tmp_path / "bert")
    model = build_model(QueryText.Config.parse(CONFIG))
    vlm = VLM(first.ours.config, model, None)  # type: ignore[arg-type]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    vlm.load_part("connectors.image", tmp_path / "bert")
    bridge, theirs = model.connectors["image"].body, bert.state_dict()
    for i, layer in enumerate(bridge.layers):
        for mine in (layer.query_mlp, layer.text_mlp):
            assert torch.equal(mine.fc1.weight, theirs[f"encoder.layer.{i}.intermediate.dense.weight"])
            assert torch.equal(mine.fc2.bias, theirs[f"encoder.layer.{i}.output.dense.bias"])
        assert torch.equal(layer.query_norm.weight, theirs[f"encoder.layer.{i}.output.LayerNorm.weight"])
        assert layer.query_mlp.fc1.weight.data_ptr() != layer.text_mlp.fc1.weight.data_ptr()
    words = theirs["embeddings.word_embeddings.weight"]
    torch.testing.assert_close(bridge.text.words.weight[77:], words.mean(0).expand(3, -1))
    for name in ("connectors.image.queries", "connectors.image.body.layers.2.cross.k.weight"):
        assert torch.equal(model.state_dict()[name], before[name])
    ids = torch.arange(3, 9)[None]
    text = Condition(ids, torch.ones_like(ids).bool())
    types = theirs["embeddings.token_type_embeddings.weight"][0]  # BERT adds them, a Q-Former has none
    expected = bert(inputs_embeds=bert.embeddings.word_embeddings(ids) - types).last_hidden_state
    none = bridge.text.words.weight.new_zeros(1, 0, 24)
    found = bridge(none, Tokens(none.new_zeros(1, 1, 32)), text, unimodal(0, text.mask))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="hidden_size is 16 here, 24 there"):
        small = QueryText.Config.parse(CONFIG | {"connectors": {"image": bridge_of(dim=16)}})
        VLM(first.ours.config, build_model(small), None).load_part("connectors.image", tmp_path / "bert")  # type: ignore[arg-type]


def bridge_of(**changes: Any) -> dict[str, Any]:
    return CONFIG["connectors"]["image"] | changes  # type: ignore[no-any-return]

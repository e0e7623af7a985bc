"""Language models of transformers through embeddings, against the same models run by transformers."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from lm_weights import randomise

from chiasm.errors import ConfigError, DataError
from chiasm.lm.hf import HFLM

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "gpt2": {"model_type": "gpt2", **TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "opt": {
        **{"model_type": "opt", **TOKENS, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 40, "word_embed_proj_dim": 24},
    },
    "llama": {
        **{"model_type": "llama", **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40},
    },
    "mistral": {
        **{"model_type": "mistral", **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40, "sliding_window": 4},
    },
    "gemma2": {
        **{"model_type": "gemma2", **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 40},
        **{"sliding_window": 4, "final_logit_softcapping": 3.0},
    },
    "granite": {
        **{"model_type": "granite", **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40, "logits_scaling": 3.0},
    },
}
SEQ2SEQ = {
    "t5": {
        **{"model_type": "t5", **TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        **{"decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16},
    },
    "flan_t5": {
        **{"model_type": "t5", **TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        **{"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    },
    "bart": {
        **{"model_type": "bart", **TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
        **{"max_position_embeddings": 40, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
    },
}
LENGTH = 16


def pair(name: str) -> tuple[torch.nn.Module, HFLM]:
    """A random model run by transformers, and ours with the same weights."""
    config = {**CONFIGS, **SEQ2SEQ}[name]
    lm = HFLM(HFLM.Config(config=config))
    randomise(lm)
    theirs = copy.deepcopy(lm.model)
    return theirs.eval(), lm.eval()


def tokens(rows: int, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(lm: HFLM, ids: torch.Tensor, segments: torch.Tensor | None = None, cache=None) -> torch.Tensor:
    segments = torch.ones_like(ids) if segments is None else segments
    x = lm.embed(ids).masked_fill((segments == 0).unsqueeze(-1), 0)
    positions = ((segments != 0).cumsum(1) - 1).clamp(min=0)
    return lm.head(lm(x, positions, segments, cache=cache))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name):
    theirs, lm = pair(name)
    ids = tokens(2)
    expected = theirs(input_ids=ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(run(lm, ids), expected, **TOLERANCE)
    assert lm.vocab == 61 and lm.dim == lm.embed(ids).shape[-1] and lm.max_positions == 40


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padded_and_cached_equal_separate(name, side):
    _, lm = pair(name)
    ids, lengths, wide = tokens(3), (9, 4, 6), torch.arange(9)
    segments = torch.stack([(wide >= 9 - n if side == "left" else wide < n).long() for n in lengths])
    prompt = torch.zeros(3, 9, dtype=torch.long)
    for i, n in enumerate(lengths):
        prompt[i, segments[i] == 1] = ids[i, :n]
    if side == "right" and name in ("mistral", "gemma2"):
        return  # a window of columns: the engine pads on the left
    cache = lm.new_cache(3, LENGTH, torch.device("cpu"), torch.float32)
    logits = run(lm, prompt, segments, cache)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(logits[i][segments[i] == 1], run(lm, ids[i : i + 1, :n])[0], **TOLERANCE)
    for step in range(5):
        positions = torch.tensor(lengths).unsqueeze(1) + step
        fresh = ids.gather(1, positions)
        logits = lm.head(lm(lm.embed(fresh), positions, torch.ones_like(fresh), cache=cache))
        for i, n in enumerate(lengths):
            torch.testing.assert_close(logits[i, 0], run(lm, ids[i : i + 1, : n + step + 1])[0, -1], **TOLERANCE)
    cache.reorder(torch.tensor([2, 0]))
    positions = torch.tensor([[6 + 5], [9 + 5]])
    fresh = ids[torch.tensor([2, 0])].gather(1, positions)
    logits = lm.head(lm(lm.embed(fresh), positions, torch.ones_like(fresh), cache=cache))
    torch.testing.assert_close(logits[0, 0], run(lm, ids[2:, :12])[0, -1], **TOLERANCE)
    with pytest.raises(DataError, match="room for 16 positions; 15 are taken and 2 more"):
        run(lm, ids[:2, :2], cache=cache)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral", "granite"])
@torch.no_grad()
def test_packed_equals_separate(name):
    _, lm = pair(name)
    ids = tokens(1, 17)
    segments = torch.tensor([[1] * 7 + [2] * 3 + [3] * 5 + [0] * 2])
    positions = torch.tensor([[*range(7), *range(3), *range(5), 0, 0]])
    logits = lm.head(lm(lm.embed(ids), positions, segments))
    assert logits.isfinite().all()
    for start, stop in ((0, 7), (7, 10), (10, 15)):
        torch.testing.assert_close(logits[:, start:stop], run(lm, ids[:, start:stop]), **TOLERANCE)


@torch.no_grad()
def test_models_that_cannot_be_packed_refuse():
    _, lm = pair("gemma2")
    ids, segments = tokens(1, 4), torch.tensor([[1, 1, 2, 2]])
    with pytest.raises(DataError, match=r"mixes full_attention, sliding_attention; turn packing off"):
        lm(lm.embed(ids), torch.tensor([[0, 1, 0, 1]]), segments)
    config = {"model_type": "bloom", **TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    bloom = randomise(HFLM(HFLM.Config(config=config)))
    with pytest.raises(DataError, match=r"bloom.*turn packing off"):
        bloom(bloom.embed(ids), torch.tensor([[0, 1, 0, 1]]), segments)


@pytest.mark.parametrize("name", SEQ2SEQ)
@torch.no_grad()
def test_encoder_decoder_equals_transformers(name):
    theirs, lm = pair(name)
    assert lm.encoder_decoder
    ids, targets = tokens(2, 9), tokens(2, 6, seed=2)
    targets[:, 0] = lm.start_id
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    expected = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=targets).logits
    assert expected.std() > 0.15
    memory = lm.encode(lm.embed(ids), mask)
    torch.testing.assert_close(lm.head(lm.decode(targets, memory, mask)), expected, **TOLERANCE)
    left = torch.cat((ids[1:, 6:], ids[1:, :6]), dim=1)  # the second row, padded on the left
    memory_left = lm.encode(lm.embed(left), mask[1:].flip(1))
    torch.testing.assert_close(memory_left[:, 3:], memory[1:, :6], **TOLERANCE)
    cache = lm.new_cache(2, 6, torch.device("cpu"), torch.float32)
    for step in range(6):
        hidden = lm.decode(targets[:, step : step + 1], memory, mask, cache=cache)
        torch.testing.assert_close(lm.head(hidden)[:, 0], expected[:, step], **TOLERANCE)
    with pytest.raises(DataError, match="cannot take packed rows"):
        lm.encode(lm.embed(ids), torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]] * 2))


@pytest.mark.parametrize("name", [*CONFIGS, *SEQ2SEQ])
@torch.no_grad()
def test_built_on_meta_and_filled(name):
    """Buffers that no checkpoint holds come back with the weights."""
    _, lm = pair(name)
    with torch.device("meta"):
        empty = HFLM(lm.config)
    empty.load_state_dict(lm.state_dict(), assign=True)
    empty.eval()
    ids = tokens(1)
    if lm.encoder_decoder:
        ours, theirs = (m.encode(m.embed(ids), torch.ones_like(ids)) for m in (empty, lm))
    else:
        ours, theirs = run(empty, ids), run(lm, ids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_every_parameter_gets_a_gradient():
    for name in ("gpt2", "llama"):
        _, lm = pair(name)
        lm.train()
        run(lm, tokens(2)).square().mean().backward()
        assert lm.training and all(m.training for m in lm.modules())  # the one-time probe put training mode back
        for parameter_name, parameter in lm.named_parameters():
            # Softmax ignores what is equal in all keys, so the key bias is the one weight without effect.
            assert parameter.grad is not None, parameter_name


def test_bad_configurations_are_refused():
    with pytest.raises(ConfigError, match="needs 'model_type'"):
        HFLM(HFLM.Config(config={"vocab_size": 3}))
    with pytest.raises(ConfigError, match="'lama'"):
        HFLM(HFLM.Config(config={"model_type": "lama"}))
    with pytest.raises(ConfigError, match="cross-attention"):
        _, lm = pair("gpt2")
        ids = tokens(1, 2)
        lm(lm.embed(ids), ids, torch.ones_like(ids), cross={0: lambda x: x})
    assert hf.__version__

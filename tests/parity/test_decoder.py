"""The decoder against the models of transformers that it stands for, and against itself: packed, padded, cached."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from lm_weights import llama_state, randomise, rename_llama
from safetensors.torch import load_file

from chiasm.errors import ConfigError, DataError
from chiasm.lm.decoder import Decoder

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OURS = {
    "vocab": 61,
    "dim": 48,
    "mlp": 80,
    "depth": 3,
    "heads": 6,
    "kv_heads": 2,
    "max_positions": 64,
}
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [1.5, 2.0, 2.7, 4.0]
ROPE = {
    "plain": (None, None, 64),
    "linear": ({"type": "linear", "factor": 2.5}, None, 64),
    "llama3": (
        {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        None,
        64,
    ),
    "yarn": ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, None, 64),
    "yarn_mscale": (
        {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.5,
            "mscale_all_dim": 0.7,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        None,
        64,
    ),
    "dynamic_short": ({"type": "dynamic", "factor": 3.0}, None, 64),
    "dynamic_long": ({"type": "dynamic", "factor": 3.0}, None, 16),
}


def family(name: str) -> tuple[torch.nn.Module, Decoder]:
    """A tiny random model of transformers, and the decoder with its weights."""
    kind, _, rest = name.partition("/")
    ours, theirs = dict(OURS), dict(SIZES)
    if kind == "llama":
        scaling, _, positions = ROPE[rest or "plain"]
        ours |= {"max_positions": positions, "norm_eps": 1e-6}
        theirs |= {"max_position_embeddings": positions, "rms_norm_eps": 1e-6}
        if scaling:
            ours["rope_scaling"] = scaling
            theirs["rope_scaling"] = {"rope_type" if k == "type" else k: v for k, v in scaling.items()}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**theirs))
    elif kind == "llama_biased":
        ours |= {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_eps": 1e-6, "head_dim": 10}
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(**theirs, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-6, head_dim=10)
        )
    elif kind == "smollm":
        ours |= {"tied": True, "kv_heads": 3, "rope_theta": 1e5}
        theirs |= {"num_key_value_heads": 3, "rms_norm_eps": 1e-5}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**theirs, tie_word_embeddings=True, rope_theta=1e5))
    elif kind == "mistral":
        ours |= {"sliding_window": 5, "norm_eps": 1e-6}
        model = hf.MistralForCausalLM(hf.MistralConfig(**theirs, sliding_window=5, rms_norm_eps=1e-6))
    elif kind == "qwen2":
        ours |= {"qkv_bias": True, "norm_eps": 1e-6, "rope_theta": 1e6, "tied": True}
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**theirs, rope_theta=1e6, tie_word_embeddings=True))
    elif kind == "qwen3":
        ours |= {"qk_norm": True, "norm_eps": 1e-6, "head_dim": 12}
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**theirs, head_dim=12))
    elif kind == "phi3":
        original = int(rest)
        scaling = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
        ours |= {"rope_scaling": scaling | {"original_max_position_embeddings": original}}
        theirs |= {"original_max_position_embeddings": original, "rope_scaling": scaling}
        model = hf.Phi3ForCausalLM(hf.Phi3Config(**theirs, sliding_window=7, rms_norm_eps=1e-5))
        ours |= {"sliding_window": 7}
    elif kind == "phi_partial":
        ours |= {"rotary_share": 0.5, "norm_eps": 1e-5}
        model = hf.Phi3ForCausalLM(hf.Phi3Config(**theirs, partial_rotary_factor=0.5, rms_norm_eps=1e-5))
    randomise(model)
    decoder = Decoder(Decoder.Config(**ours)).eval()
    decoder.load_state_dict(llama_state(model, tied=bool(ours.get("tied"))))
    return model, decoder


NAMES = [
    *(f"llama/{scaling}" for scaling in ROPE),
    *("llama_biased", "smollm", "mistral", "qwen2", "qwen3", "phi3/16", "phi3/48", "phi_partial"),
]
LENGTH = 24


def run(decoder: Decoder, ids: torch.Tensor, segments: torch.Tensor | None = None, cache=None) -> torch.Tensor:
    segments = torch.ones_like(ids) if segments is None else segments
    x = decoder.embed(ids).masked_fill((segments == 0).unsqueeze(-1), 0)
    return decoder.head(decoder(x, positions_of(segments), segments, cache=cache))


def positions_of(segments: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in segments.tolist():
        seen: dict[int, int] = {}
        rows.append([])
        for number in row:
            rows[-1].append(seen.get(number, 0) if number else 0)
            seen[number] = seen.get(number, 0) + 1
    return torch.tensor(rows)


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name):
    model, decoder = family(name)
    ids = tokens()
    expected = model(ids).logits
    assert expected.std() > 0.5  # a model whose logits are flat would prove nothing
    torch.testing.assert_close(run(decoder, ids), expected, **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_packed_padded_left_and_right_equal_separate(name):
    _, decoder = family(name)
    ids = tokens(3)
    lengths = (LENGTH, 9, 17)
    alone = [run(decoder, ids[i : i + 1, :n]) for i, n in enumerate(lengths)]
    columns = torch.arange(LENGTH)
    right = torch.stack([(columns < n).long() for n in lengths])
    left = torch.stack([(columns >= LENGTH - n).long() for n in lengths])
    for i, n in enumerate(lengths):
        rolled = ids.clone()
        rolled[i, LENGTH - n :] = ids[i, :n]
        torch.testing.assert_close(run(decoder, ids, right)[i, :n], alone[i][0], **TOLERANCE)
        torch.testing.assert_close(run(decoder, rolled, left)[i, LENGTH - n :], alone[i][0], **TOLERANCE)
    packed = torch.cat([ids[i, :n] for i, n in enumerate(lengths)] + [torch.zeros(3, dtype=torch.long)]).unsqueeze(0)
    segments = torch.tensor([[1] * lengths[0] + [2] * lengths[1] + [3] * lengths[2] + [0] * 3])
    logits = run(decoder, packed, segments)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0, :-3], torch.cat([a[0] for a in alone]), **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("phi3/16", "llama/dynamic_long")])
@torch.no_grad()
def test_cached_equals_uncached(name, side):
    """Prefill of a padded batch, then tokens one at a time and in a run of three, with each row's own positions."""
    _, decoder = family(name)
    assert decoder.steady(1, LENGTH)
    ids, lengths = tokens(3), (14, 5, 9)
    prompt, wide = torch.zeros(3, 14, dtype=torch.long), torch.arange(14)
    segments = torch.stack([(wide >= 14 - n if side == "left" else wide < n).long() for n in lengths])
    for i, n in enumerate(lengths):
        prompt[i, segments[i] == 1] = ids[i, :n]
    cache = decoder.new_cache(3, LENGTH, torch.device("cpu"), torch.float32)
    run(decoder, prompt, segments, cache)
    starts = torch.tensor(lengths)
    for step, width in ((0, 1), (1, 1), (2, 3), (5, 1), (6, 1), (7, 1), (8, 1), (9, 1)):
        positions = starts.unsqueeze(1) + step + torch.arange(width)
        fresh = ids.gather(1, positions)
        logits = decoder.head(decoder(decoder.embed(fresh), positions, torch.ones_like(fresh), cache=cache))
        for i, n in enumerate(lengths):
            whole = run(decoder, ids[i : i + 1, : n + step + width])
            torch.testing.assert_close(logits[i], whole[0, -width:], **TOLERANCE)


def test_a_cache_that_would_cross_a_change_of_frequencies_is_known():
    _, phi = family("phi3/16")
    assert phi.steady(1, 16) and phi.steady(17, 64) and not phi.steady(16, 17)
    _, dynamic = family("llama/dynamic_long")
    assert dynamic.steady(1, 16) and not dynamic.steady(17, 18)
    assert family("llama/yarn")[1].steady(1, 10**6)


@torch.no_grad()
def test_a_reordered_cache_continues_each_row():
    _, decoder = family("qwen3")
    ids = tokens(2)
    cache = decoder.new_cache(2, LENGTH, torch.device("cpu"), torch.float32)
    run(decoder, ids[:, :7], cache=cache)
    order = torch.tensor([1, 0, 1])
    cache.reorder(order)
    positions = torch.full((3, 1), 7)
    fresh = ids[order, 7:8]
    logits = decoder.head(decoder(decoder.embed(fresh), positions, torch.ones_like(fresh), cache=cache))
    torch.testing.assert_close(logits[:, 0], run(decoder, ids[:, :8])[order, -1], **TOLERANCE)


@torch.no_grad()
def test_a_full_cache_says_both_numbers():
    _, decoder = family("qwen2")
    cache = decoder.new_cache(2, 10, torch.device("cpu"), torch.float32)
    run(decoder, tokens(2, 8), cache=cache)
    with pytest.raises(DataError, match=r"room for 10 positions; 8 are taken and 3 more"):
        run(decoder, tokens(2, 3), cache=cache)
    with pytest.raises(DataError, match="holds 2 rows, 1 were given"):
        run(decoder, tokens(1, 1), cache=cache)


def test_every_parameter_gets_a_gradient():
    for name in ("llama_biased", "qwen3", "smollm"):
        _, decoder = family(name)
        logits = run(decoder, tokens())
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
        for parameter_name, parameter in decoder.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, (name, parameter_name)


@torch.no_grad()
def test_cross_hooks_run_before_their_layer():
    """A hook before layer 1 equals the same change made by hand between layers 0 and 1."""
    _, decoder = family("qwen2")
    ids = tokens(1)
    seen = []
    cross = {1: lambda x: seen.append(x) or x + 0.5 * x.flip(-1)}
    ones = torch.ones_like(ids)
    hooked = decoder(decoder.embed(ids), positions_of(ones), ones, cross=cross)
    expected = []
    handle = decoder.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 0.5 * args[0].flip(-1), *args[1:]))
    expected = decoder(decoder.embed(ids), positions_of(ones), ones)
    handle.remove()
    torch.testing.assert_close(hooked, expected)
    assert len(seen) == 1 and not torch.allclose(hooked, decoder(decoder.embed(ids), positions_of(ones), ones))


def test_building_on_meta_keeps_the_frequencies():
    """Frequencies are no buffer, so a model built on meta and filled later has them."""
    _, real = family("llama/yarn")
    with torch.device("meta"):
        decoder = Decoder(real.config)
    decoder.load_state_dict(real.state_dict(), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(run(decoder, tokens()), run(real, tokens()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "dim 48 is no multiple of heads 5"),
        ({"kv_heads": 4}, "heads 6 is no multiple of kv_heads 4"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' needs original_max_position_embeddings"),
        ({"rope_scaling": {"type": "linear", "factr": 2.0}}, "factr.*did you mean 'factor'"),
        ({"rotary_share": 0.9}, "rotary_share 0.9 of head_dim 8 is 7"),
        ({"slidingwindow": 3}, "did you mean 'sliding_window'"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Decoder.Config.parse(OURS | change)


@pytest.mark.data
@torch.no_grad()
def test_stories260k_reproduces_its_expected_logits_and_text(shared_data):
    folder = shared_data / "weights" / "stories260K"
    theirs = json.loads((folder / "config.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    config = Decoder.Config(
        vocab=theirs["vocab_size"],
        dim=theirs["hidden_size"],
        depth=theirs["num_hidden_layers"],
        heads=theirs["num_attention_heads"],
        kv_heads=theirs["num_key_value_heads"],
        mlp=theirs["intermediate_size"],
        norm_eps=theirs["rms_norm_eps"],
        max_positions=theirs["max_position_embeddings"],
        tied=True,
    )
    decoder = Decoder(config).eval()
    decoder.load_state_dict(rename_llama(load_file(folder / "model.safetensors"), tied=True))
    prompt = torch.tensor([expected["prompt_ids_for_logits"]])
    logits = run(decoder, prompt)
    golden = torch.tensor(expected["last_position_logits_float32"])  # written with five decimals
    torch.testing.assert_close(logits[0, -1], golden, rtol=1e-5, atol=2e-5)
    assert logits[0].argmax(-1).tolist() == expected["per_position_argmax"]
    ids = expected["greedy_token_ids"]
    cache = decoder.new_cache(1, len(ids), torch.device("cpu"), torch.float32)
    written = ids[:1]
    for position in range(len(ids) - 1):
        token, place = torch.tensor([[written[-1]]]), torch.tensor([[position]])
        hidden = decoder(decoder.embed(token), place, torch.ones_like(token), cache=cache)
        written.append(int(decoder.head(hidden)[0, -1].argmax()))
    assert written == ids

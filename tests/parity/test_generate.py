"""Generation against transformers, and against itself: batched, cached, streamed, stopped."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from lm_weights import llama_state, randomise, rename_llama
from safetensors.torch import load_file
from toys import DECODER, Bytes, chat, conversations, model
from transformers.generation import logits_process as theirs

from chiasm.errors import ConfigError, DataError
from chiasm.infer.engine import Answer, Engine, generate
from chiasm.infer.sampling import Options, invert, keep_top_k, keep_top_p, penalise
from chiasm.infer.steps import Afresh, Cached
from chiasm.lm.tokenizer import Tokenizer

SIZES = {
    **{"vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 96},
    **{"rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
}


def llama(seed: int = 0):
    """The same random Llama run by transformers and inside a Splice."""
    reference = randomise(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)), seed)
    ours = model(seed=seed)
    ours.lm.load_state_dict(llama_state(reference, tied=False))
    return reference, ours


def reference_ids(reference, ids: list[int], stops: tuple[int, ...], **options) -> list[int]:
    prompt = torch.tensor([ids])
    output = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), eos_token_id=list(stops) or None, pad_token_id=0, **options
    )
    new = output[0].tolist()[0 if reference.config.is_encoder_decoder else len(ids) :]
    new = new[1:] if reference.config.is_encoder_decoder else new
    end = next((i for i, token in enumerate(new) if token in stops), len(new))
    return new[:end]


def prompts(count: int, seed: int) -> list[list[int]]:
    return [c[0]["ids"] for c in conversations(count, seed, pictures=False)]


def answer_ids(ours, stops: tuple[int, ...], batch: list[list[int]], **options) -> list[list[int]]:
    details = generate(ours, Bytes(stops), [chat(*ids) for ids in batch], return_details=True, **options)
    return [answer.ids for answer in details]


# ------------------------------------------------------------------------------------------------- choosing a token


@pytest.mark.parametrize("k", [1, 3, 64, 100])
def test_top_k_equals_transformers(k, rng):
    scores = torch.randn(5, 64, generator=rng).round(decimals=1)  # rounded: ties happen
    torch.testing.assert_close(keep_top_k(scores, k), theirs.TopKLogitsWarper(k)(None, scores), rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999, 1.0])
def test_top_p_equals_transformers(p, rng):
    scores = 3 * torch.randn(5, 64, generator=rng)
    torch.testing.assert_close(keep_top_p(scores, p), theirs.TopPLogitsWarper(p)(None, scores), rtol=0, atol=0)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty, rng):
    scores, ids = torch.randn(5, 64, generator=rng), torch.randint(0, 64, (5, 9), generator=rng)
    seen = torch.zeros(5, 64, dtype=torch.bool).scatter(1, ids, True)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores.clone())
    torch.testing.assert_close(penalise(scores, seen, penalty), expected, rtol=0, atol=0)


def test_draws_follow_the_probabilities(rng):
    """Evenly spread draws hit each id as often as its probability says."""
    probabilities = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.25, 0.0])
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = invert(probabilities.expand(1000, -1), draws).bincount(minlength=6)
    assert counts.tolist() == [0, 250, 500, 0, 250, 0]
    assert invert(probabilities.expand(2, -1), torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)).tolist() == [1, 4]


# ------------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_equals_transformers(seed, penalty):
    reference, ours = llama(seed)
    batch, stops = prompts(6, seed), (5, 9, 23, 40)
    options = {"max_new_tokens": 24, "repetition_penalty": penalty}
    expected = [reference_ids(reference, ids, stops, do_sample=False, **options) for ids in batch]
    assert answer_ids(ours, stops, batch, **options) == expected
    assert len({len(ids) for ids in expected}) > 1  # some stop early, some do not


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beams_equal_transformers(beams, length_penalty):
    reference, ours = llama(3)
    batch = prompts(5, beams)
    for stops, penalty in (((5,), 1.0), ((5, 9, 23), 1.0), ((5, 9), 1.3), ((), 1.0)):
        options = {"max_new_tokens": 12, "num_beams": beams, "repetition_penalty": penalty}
        options["length_penalty"] = length_penalty
        expected = [reference_ids(reference, ids, stops, do_sample=False, **options) for ids in batch]
        assert answer_ids(ours, stops, batch, **options) == expected


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_encoder_decoder_equals_transformers(beams, use_cache):
    config = {
        **{"model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2},
        **{"num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    }
    ours = model({"type": "hf", "config": config})
    batch, stops = prompts(5, 1), (5, 9, 11)
    options = {"max_new_tokens": 10, "num_beams": beams, "repetition_penalty": 1.2}
    expected = [reference_ids(ours.lm.model, ids, stops, do_sample=False, **options) for ids in batch]
    assert answer_ids(ours, stops, batch, use_cache=use_cache, **options) == expected
    assert len({tuple(ids) for ids in expected}) > 1


def test_a_change_of_rotary_frequencies_on_the_way_is_computed_afresh():
    """Phi-3's long factors set in after 16 positions: transformers drops its cache there, we do without one."""
    scaling = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 2.7, 4.0]}
    lm = {**DECODER, "rope_scaling": scaling | {"original_max_position_embeddings": 16}}
    sizes = {**SIZES, "rms_norm_eps": 1e-6, "original_max_position_embeddings": 16, "rope_scaling": scaling}
    reference = randomise(hf.Phi3ForCausalLM(hf.Phi3Config(**sizes)))
    ours = model(lm)
    ours.lm.load_state_dict(llama_state(reference, tied=False))
    for ids in ([7, 8, 9, 10, 11, 12, 13, 14], list(range(3, 23))):
        uncached = reference_ids(reference, ids, (), do_sample=False, max_new_tokens=14, use_cache=False)
        assert answer_ids(ours, (), [ids], max_new_tokens=14) == [uncached]
    engine, options = Engine(ours, Bytes(())), Options(max_new_tokens=14)
    kinds = []
    for length in (8, 20):
        run = engine.start(Bytes().batch([chat(*range(3, 3 + length))]), options)
        with torch.inference_mode():
            kinds.append(type(engine.steps(run)))
    assert kinds == [Afresh, Cached]


# ------------------------------------------------------------------------------------------------- against itself


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 0.9, "top_p": 0.9, "seed": 5},
        {"temperature": 1.5, "top_k": 20, "seed": 6, "repetition_penalty": 1.1},
        {"num_beams": 3, "repetition_penalty": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_batched_equals_single(rows, options):
    """Random lengths, 0 to 3 pictures each, in an order that is not that of their lengths."""
    ours, processor = model(seed=rows), Bytes((5, 9, 23))
    batch = conversations(rows, seed=rows)
    alone = [generate(ours, processor, c, max_new_tokens=14, return_details=True, **options) for c in batch]
    together = generate(ours, processor, batch, max_new_tokens=14, return_details=True, **options)
    for a, b in zip(alone, together, strict=True):
        assert (a.ids, a.text, a.reason, a.prompt_tokens) == (b.ids, b.text, b.reason, b.prompt_tokens)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0, "seed": 1}], ids=str)
def test_cached_equals_uncached(options):
    ours, processor = model(), Bytes((5, 9))
    batch = conversations(4, seed=2)
    cached, uncached = (
        [
            a.ids
            for a in generate(ours, processor, batch, return_details=True, use_cache=c, max_new_tokens=16, **options)
        ]
        for c in (True, False)
    )
    assert cached == uncached


def test_the_answer_depends_on_the_picture():
    ours, processor = model(), Bytes(())
    texts = {generate(ours, processor, chat(3, {seed}, 4), max_new_tokens=12) for seed in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize("beams", [1, 2])
def test_a_poisoned_padding_embedding_reaches_no_answer(beams):
    ours, batch = model(), conversations(4, seed=4)
    assert len({len(c[0]["ids"]) for c in batch}) > 1
    with torch.no_grad():
        ours.lm.lm_head.weight[63] = (
            0  # so that the poisoned token is not among the best: fed back it would rightly spoil
        )
    clean = generate(ours, Bytes((5,)), batch, max_new_tokens=10, num_beams=beams)
    with torch.no_grad():
        ours.lm.embedding.weight[63] = float("nan")
    batch_of_nan = Bytes((5,), pad_id=63).batch(batch)
    assert (batch_of_nan.input_ids == 63).any()
    hidden = ours(batch_of_nan, logits="all")
    assert hidden.hidden.isfinite().all() and hidden.logits.isfinite().all()
    assert generate(ours, Bytes((5,), pad_id=63), batch, max_new_tokens=10, num_beams=beams) == clean


def test_seeds():
    ours, processor = model(), Bytes(())
    question = chat(3, 4, 5)
    options = {"max_new_tokens": 12, "temperature": 2.0, "return_details": True}
    first, again = (generate(ours, processor, question, seed=3, **options) for _ in range(2))
    assert first == again and first.seed == 3
    assert generate(ours, processor, question, seed=4, **options).ids != first.ids
    drawn = generate(ours, processor, [question, question], **options)
    assert drawn[0].seed != drawn[1].seed and drawn[0].ids != drawn[1].ids
    assert generate(ours, processor, question, seed=drawn[1].seed, **options).ids == drawn[1].ids
    state = torch.random.get_rng_state()
    generate(ours, processor, question, **options)
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is left alone


# ------------------------------------------------------------------------------------------------- streams and stops


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 0}, {"num_beams": 2}], ids=str)
def test_pieces_joined_are_the_text(options):
    ours, processor = model(), Bytes((5,))
    batch = conversations(3, seed=9)
    texts = generate(ours, processor, batch, max_new_tokens=12, **options)
    joined = ["", "", ""]
    for row, piece in generate(ours, processor, batch, max_new_tokens=12, stream=True, **options):
        assert piece or options.get("num_beams")
        joined[row] += piece
    assert joined == texts
    assert "".join(generate(ours, processor, batch[0], max_new_tokens=12, stream=True, **options)) == texts[0]


def test_modes_are_put_back_and_nothing_leaks_out_of_a_stream():
    ours, processor = model(), Bytes(())
    ours.train()
    ours.lm.eval()
    before = {name: module.training for name, module in ours.named_modules()}
    pieces = generate(ours, processor, chat(3, 4), max_new_tokens=4, stream=True)
    next(pieces)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert not ours.training
    pieces.close()
    assert {name: module.training for name, module in ours.named_modules()} == before
    generate(ours, processor, chat(3, 4), max_new_tokens=4)
    assert {name: module.training for name, module in ours.named_modules()} == before
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_string_ends_the_text_before_it(beams):
    """The stop string is three tokens of the answer that is given without it."""
    ours, options = model(), {"max_new_tokens": 16, "num_beams": beams, "return_details": True}
    processor = Bytes((), shift=60)
    whole = generate(ours, processor, chat(3, 8, {2}), **options)
    assert whole.reason == "length" and len(whole.text) == 16
    stop = whole.text[5:8]
    cut = generate(ours, processor, chat(3, 8, {2}), stop=[stop, "never"], **options)
    if beams == 1:
        assert cut.text == whole.text[: whole.text.find(stop)] and cut.reason == "stop_string"
    assert stop not in cut.text
    own = generate(ours, Bytes((), (stop,), shift=60), chat(3, 8, {2}), **options)
    assert own.text == cut.text
    if beams == 1:
        pieces = list(generate(ours, processor, chat(3, 8, {2}), max_new_tokens=16, stop=stop, stream=True))
        assert "".join(pieces) == cut.text and len(pieces) > 1


def test_a_stop_id_ends_the_answer_and_is_left_out():
    ours = model()
    whole = generate(ours, Bytes(()), chat(3, 8), max_new_tokens=16, return_details=True)
    stop = whole.ids[6]
    cut = generate(ours, Bytes((stop,)), chat(3, 8), max_new_tokens=16, return_details=True)
    assert cut.ids == whole.ids[: whole.ids.index(stop)] and cut.reason == "stop"


def test_an_answer_may_be_empty():
    ours = model()
    first = generate(ours, Bytes(()), chat(3, 8), max_new_tokens=1, return_details=True).ids[0]
    assert generate(ours, Bytes((first,)), chat(3, 8), return_details=True) == Answer("", [], "stop", prompt_tokens=2)
    assert generate(ours, Bytes((first,)), chat(3, 8)) == ""
    assert list(generate(ours, Bytes((first,)), chat(3, 8), stream=True)) == []
    assert generate(ours, Bytes(()), []) == []


# ------------------------------------------------------------------------------------------------- room and bad input


def test_positions_end_an_answer_or_refuse_a_prompt():
    ours = model({**DECODER, "max_positions": 20})
    answers = generate(ours, Bytes(()), [chat(*range(3, 18)), chat(4)], max_new_tokens=8, return_details=True)
    assert [(len(a.ids), a.reason) for a in answers] == [(5, "positions"), (8, "length")]
    with pytest.raises(DataError, match=r"sample '1': the prompt takes 22 positions, the language model has 20"):
        generate(ours, Bytes(()), [chat(3), chat(*range(3, 21), {1})])
    with pytest.raises(DataError, match=r"sample '0': the prompt takes 20 positions"):
        generate(ours, Bytes(()), chat(*range(3, 23)), stream=True)  # before the first piece is asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens.*greater than or equal to 1, got 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p"),
        ({"top_k": 5}, "give a temperature above 0"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams=2 needs temperature=0"),
        ({"max_tokens": 5}, "unknown key 'max_tokens'"),
        ({"stop": [""]}, "empty stop string"),
        ({"stream": True, "return_details": True}, "details come without it"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        generate(model(), Bytes(()), chat(3), **options)


def test_right_padding_is_refused():
    ours, processor = model(), Bytes(())
    batch = processor.batch([chat(3), chat(3, 4)], padding_side="right")
    with pytest.raises(DataError, match=r"sample '0'.*pad on the left"):
        Engine(ours, processor).start(batch, Options())


@pytest.mark.data
@pytest.mark.parametrize("rows", [1, 3])
def test_stories260k_tells_its_story(shared_data, rows):
    """A trained model and its tokenizer: 200 greedy tokens from BOS alone, as llama2.c's own test expects them."""
    folder = shared_data / "weights" / "stories260K"
    config, expected = (json.loads((folder / name).read_text()) for name in ("config.json", "expected.json"))
    ours = model(
        {
            **{"type": "decoder", "vocab": 512, "dim": 64, "depth": 5, "heads": 8, "kv_heads": 4, "tied": True},
            **{"mlp": config["intermediate_size"], "max_positions": config["max_position_embeddings"]},
        }
    )
    ours.lm.load_state_dict(rename_llama(load_file(folder / "model.safetensors"), tied=True))
    tokenizer = Tokenizer.from_folder(folder)
    processor = Bytes((2,))
    processor.decode = tokenizer.decode
    batch = [chat(1), chat(1, 403, 407, 261), chat(1, 403)][:rows]
    answers = generate(ours, processor, batch, max_new_tokens=200, return_details=True)
    assert [1, *answers[0].ids] == expected["greedy_token_ids"]
    assert answers[0].text.strip() == expected["greedy_text"].strip()
    for question, answer in zip(batch, answers, strict=True):
        whole = [*question[0]["ids"], *answer.ids]
        assert whole[:201] == expected["greedy_token_ids"]

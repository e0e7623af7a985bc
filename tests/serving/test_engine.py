"""The engine: batched, cached, chunked, guessed, streamed answers are those of one whole computation; nothing stays."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import re
import threading
import time

import pytest
import torch
from PIL import Image as Pillow
from transformers.generation import logits_process as theirs

from chiasm.errors import DataError
from chiasm.infer.answer import Writer, guess
from chiasm.infer.constraints import Choices
from chiasm.infer.kept import Kept
from chiasm.infer.sampling import Sampling, keep_min_p
from chiasm.infer.service import QueueFull, Request, Service, Stopped
from chiasm.nn import decode
from chiasm.types import Image, Message, Text

WORDS = tuple(re.findall(r"\w+", "what is on the left of it and why does nobody see the small bright one there"))


def picture(seed: int) -> Pillow.Image:
    data = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Pillow.fromarray(data.numpy())


def asked(seed: int, pictures: int | None = None) -> list[Message]:
    """A conversation of one to three turns with zero to two of five pictures."""
    rng = random.Random(seed)
    messages = []
    for turn in range(rng.randint(1, 3)):
        if turn:
            messages.append(Message("assistant", (Text(" ".join(rng.choices(WORDS, k=2))),)))
        parts: list = [Text(" ".join(rng.choices(WORDS, k=rng.randint(1, 6))))]
        for _ in range(rng.randint(0, 2) if pictures is None else pictures):
            parts.insert(rng.randint(0, len(parts)), Image(picture(rng.randint(0, 4))))
        messages.append(Message("user", tuple(parts)))
    return messages


def chosen(seed: int) -> Sampling:
    ways = [{}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 9, "top_p": 0.8}, {"repetition_penalty": 1.3}]
    return Sampling(max_new_tokens=4 + seed % 9, seed=seed, **ways[seed % 4])


def alone(vlm, request: Request) -> str:
    """The answer from the whole sequence computed afresh for every token, without slots or caches."""
    values = request.sampling.model_dump()
    return vlm.generate(list(request.messages), use_cache=False, **values)


@pytest.fixture
def serve(vlm):
    """Makes services that are stopped at the end of the test."""
    made: list[Service] = []

    def start(**options) -> Service:
        made.append(Service(vlm, **{"slots": 4, "max_length": 480, "threads": 1, **options}))
        made[-1].start()
        return made[-1]

    yield start
    for service in made:
        service.stop()


def texts(service: Service, requests: list[Request]) -> list[str]:
    return [handle.result(120)[0] for handle in [service.submit(request) for request in requests]]


# ------------------------------------------------------------------------------------------------- equal answers


def test_64_mixed_requests_with_cancellations_are_answered_as_alone(vlm, serve):
    requests = [Request(asked(seed), chosen(seed), id=str(seed)) for seed in range(64)]
    expected = [alone(vlm, request) for request in requests]
    assert len(set(expected)) > 50
    before = threading.active_count()
    service = serve(slots=6, chunk=40, prefix_cache_bytes=1 << 20)
    rng = random.Random(0)
    given_up = {i: rng.choice((0, 0, 1, 2, 3, 4)) for i in rng.sample(range(64), 24)}
    handles = []
    for index, request in enumerate(requests):
        handles.append(service.submit(request))
        if given_up.get(index) == 0:  # at once, while most wait: later ones may be done before a reader comes to them
            handles[-1].cancel()
    found: list[str] = [""] * 64

    def read(index: int) -> None:
        for count, piece in enumerate(handles[index]):
            if given_up.get(index) == count:
                handles[index].cancel()
            found[index] += piece.text

    readers = [threading.Thread(target=read, args=(index,)) for index in range(64)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
    for index, handle in enumerate(handles):
        assert handle.finish is not None
        if handle.finish.reason == "cancelled":
            assert index in given_up and expected[index].startswith(found[index])
        else:
            assert found[index] == expected[index], index
    assert sum(handle.finish.reason == "cancelled" for handle in handles) >= 5
    stats = service.stats()
    assert (stats["running"], stats["waiting"], stats["kv_tokens"]) == (0, 0, 0)
    assert sorted(service.scheduler.slots.free) == list(range(6))
    assert stats["prefix_cache_bytes"] <= 1 << 20
    service.stop()
    assert not service.healthy and threading.active_count() == before
    gc.collect()


@pytest.mark.parametrize("options", [{"chunk": 7}, {"prefix_cache_bytes": 0}, {"slots": 1}, {}])
def test_chunks_caches_and_slots_change_nothing(vlm, serve, options):
    requests = [Request(asked(seed), chosen(seed)) for seed in range(100, 108)]
    assert texts(serve(**options), requests) == [alone(vlm, request) for request in requests]


def test_a_shortlist_of_the_best_tokens_changes_no_answer(vlm, serve, monkeypatch):
    monkeypatch.setattr(decode, "LARGE_HEAD", 0)
    ways = [{}, {"ignore_eos": True}, {"min_tokens": 4}, {"prompt_lookup": 4}, {"logprobs": 2}, {"temperature": 0.8}]
    requests = [
        Request(asked(300 + n), Sampling(max_new_tokens=8, seed=n, **ways[n % (3 if n < 12 else 6)])) for n in range(24)
    ]
    listed = []
    step = decode.Compiled.step
    monkeypatch.setattr(decode.Compiled, "step", lambda *args: listed.append(args[-1]) or step(*args))
    assert texts(serve(), requests) == [alone(vlm, request) for request in requests]
    assert {1, None} <= set(listed) and any(best and best > 1 for best in listed)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 20, "qk_norm": True, "qkv_bias": True}])
def test_torch_alone_and_the_kernels_agree(tmp_path, monkeypatch, options):
    from serving_kit import tiny

    vlm = tiny(tmp_path / "tokenizer", **{f"model.lm.{name}": value for name, value in options.items()})
    requests = [Request(asked(seed), chosen(seed)) for seed in range(200, 206)]
    expected = [alone(vlm, request) for request in requests]
    for compiled in (True, False):
        service = Service(vlm, slots=3, max_length=480, threads=1, chunk=64)
        if not compiled:
            service.scheduler.slots.compiled = None
            with torch.inference_mode():
                service.scheduler.slots.pool.zero_()
        elif service.scheduler.slots.compiled is None:
            continue  # no compiler here
        service.start()
        assert texts(service, requests) == expected
        service.stop()


def test_streamed_in_a_thread_or_a_loop_equals_the_whole(serve):
    service = serve()
    request = Request(asked(3), Sampling(max_new_tokens=20))
    whole, finish = service.submit(request).result(60)
    assert "".join(piece.text for piece in service.submit(request)) == whole

    async def read() -> tuple[str, list[int]]:
        found, ids = "", []
        async for piece in service.submit(request):
            found, ids = found + piece.text, [*ids, *piece.ids]
        return found, ids

    found, ids = asyncio.run(read())
    assert found == whole and len(ids) == finish.completion_tokens == 20
    assert finish.reason == "length" and finish.seconds_to_first > 0


# ------------------------------------------------------------------------------------------------- remembered


def test_a_second_question_on_a_picture_copies_its_beginning(serve):
    service, none = serve(), serve(prefix_cache_bytes=0, feature_cache_bytes=0)
    opening = Text(" ".join(WORDS * 2))

    def question(text: str, seed: int, salt: str = "") -> Request:
        parts = (opening, Image(picture(seed)), Text(text))
        return Request([Message("user", parts)], Sampling(max_new_tokens=6), salt=salt)

    first, second = question("what is it", 1), question("and why there", 1)
    other = question("what is it", 2)
    results = [service.submit(request).result(60) for request in (first, second, other)]
    assert results[0][1].cached_tokens == 0
    assert results[1][1].cached_tokens >= 160
    # Another picture shares only what stands before it.
    assert results[2][1].cached_tokens <= results[1][1].cached_tokens
    assert [text for text, _ in results] == texts(none, [first, second, other])
    salted = question("what is it", 1, salt="another user")
    assert service.submit(salted).result(60)[1].cached_tokens == 0
    assert service.submit(salted).result(60)[1].cached_tokens > 0
    assert service.stats()["feature_hits"] == 0  # nobody learns that another user sent this picture
    other = [Message("system", (Text("be short"),)), Message("user", (Image(picture(1)), Text("hm")))]
    service.submit(Request(other, Sampling(max_new_tokens=1))).result(60)
    assert service.stats()["feature_hits"] == 1 and none.stats()["cached_tokens"] == 0


def test_all_that_two_prompts_have_in_common_is_copied(serve):
    service, none = serve(), serve(prefix_cache_bytes=0)

    def question(text: str) -> Request:
        return Request([Message("user", (Image(picture(1)), Text(text)))], Sampling(max_new_tokens=6))

    requests = [question("what is it " + " ".join(WORDS)), question("what is it not"), question("what is it not")]
    one, two, _ = (service._prepare(request)[0] for request in requests)
    both = min(len(one), len(two))
    common = int((one.ids[:both] == two.ids[:both]).int().cumprod(0).sum())
    results = [service.submit(request).result(60) for request in requests]
    cached = [finish.cached_tokens for _, finish in results]
    assert cached[:2] == [0, common] and cached[2] >= common and common % 16
    assert [text for text, _ in results] == texts(none, requests)


def test_the_next_turn_begins_with_the_answer(serve):
    service = serve()
    messages = asked(7, pictures=1)
    text, first = service.submit(Request(messages, Sampling(max_new_tokens=40))).result(60)
    following = [*messages, Message("assistant", (Text(text.strip()),)), Message("user", (Text("why"),))]
    _, second = service.submit(Request(following, Sampling(max_new_tokens=3))).result(60)
    assert second.cached_tokens >= first.prompt_tokens // 16 * 16


def test_changed_weights_are_not_answered_from_memory(tmp_path):
    from serving_kit import tiny

    vlm = tiny(tmp_path / "tokenizer")
    service = Service(vlm, slots=2, max_length=300, threads=1, feature_cache_bytes=0)
    service.start()
    request = Request(asked(11, pictures=0), Sampling(max_new_tokens=6))
    service.submit(request).result(60)
    with torch.no_grad():
        vlm.model.lm.layers[0].attn.v_proj.weight.mul_(-1)
    text, finish = service.submit(request).result(60)
    service.stop()
    assert finish.cached_tokens == 0 and text == alone(vlm, request)


def test_generate_remembers_between_calls_where_it_is_told_to(tmp_path, monkeypatch):
    """The second question encodes nothing and computes less; changed weights, and forgetting, begin afresh."""
    from serving_kit import tiny

    vlm = tiny(tmp_path)
    encoded = []
    inner = type(vlm.model).encode
    monkeypatch.setattr(type(vlm.model), "encode", lambda *args: encoded.append(1) or inner(*args))
    first = [Message("user", (Image(picture(1)), Text("what is on the left of it and why? " * 2)))]
    second = [Message("user", (Image(picture(1)), Text("what is on the left of it and why? no")))]
    plain = [vlm.generate(messages, max_new_tokens=6) for messages in (first, second)]
    assert len(encoded) == 2 and vlm.memory is None
    vlm.remember(1 << 20, 1 << 20)
    assert [vlm.generate(messages, max_new_tokens=6) for messages in (first, second)] == plain
    assert len(encoded) == 3 and 0 < vlm.memory.prefixes.bytes <= 1 << 20
    assert vlm.generate([second, first], max_new_tokens=6) == plain[::-1] and len(encoded) == 3
    assert "".join(vlm.generate(first, max_new_tokens=6, stream=True)) == plain[0] and len(encoded) == 3
    with torch.no_grad():
        next(vlm.model.connectors.parameters()).mul_(-1)
    changed = vlm.generate(second, max_new_tokens=6)
    assert len(encoded) == 4
    vlm.remember(0, 0)
    assert vlm.generate(second, max_new_tokens=6) == changed and len(encoded) == 5 and vlm.memory is None


def test_ten_questions_on_one_picture_share_one_prefill(vlm, serve, monkeypatch):
    service, seen = serve(slots=10), []
    encode = type(vlm.model).encode
    monkeypatch.setattr(type(vlm.model), "encode", lambda *args: seen.append(1) or encode(*args))
    opening = (Text(" ".join(WORDS * 2)), Image(picture(1)))
    requests = [
        Request([Message("user", (*opening, Text(word)))], Sampling(max_new_tokens=4))
        for word in sorted(set(WORDS))[:10]
    ]
    handles = [service.submit(request) for request in requests]
    finishes = [handle.result(60)[1] for handle in handles]
    assert len(seen) == 1
    assert sum(finish.cached_tokens == 0 for finish in finishes) == 1


def test_kept_bytes_are_bounded_and_the_longest_unused_goes():
    kept = Kept(100)
    for name in (b"a", b"b", b"c"):
        kept.put(name, torch.zeros(10))
        kept.get(b"a")
    assert b"a" in kept and b"b" not in kept and b"c" in kept and kept.bytes == 80
    kept.put(b"d", torch.zeros(26))
    assert b"d" not in kept


# ------------------------------------------------------------------------------------------------- choosing


def writer(vlm, **values) -> Writer:
    sampling = Sampling(**{"max_new_tokens": 50, **values})
    return Writer(vlm.processor, sampling, torch.tensor([7, 8, 9, 9]), sampling.max_new_tokens, 260)


def test_penalties_equal_the_formulas_and_transformers(vlm, rng):
    scores = 4 * torch.randn(260, generator=rng)
    ids = torch.tensor([40, 41, 40, 42])
    w = writer(
        vlm, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.3, logit_bias={50: 30.0, 51: -5.0}
    )
    for token in ids.tolist():  # forced: the bias makes each the choice in turn
        w._bias = (torch.tensor([token]), torch.tensor([1000.0]))
        assert w.choose(scores) == token
        w.push(token)
    w._bias = (torch.tensor([50, 51]), torch.tensor([30.0, -5.0]))
    whole = torch.cat((torch.tensor([7, 8, 9, 9]), ids)).unsqueeze(0)
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.3)(whole, scores.unsqueeze(0).clone())[0]
    for token, count in ((40, 2), (41, 1), (42, 1)):
        expected[token] -= 0.7 + 0.4 * count
    expected[50] += 30
    expected[51] -= 5
    given = []
    w.sampler = lambda row, _: given.append(row[0]) or row.argmax()
    w.choose(scores)
    torch.testing.assert_close(given[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_min_p_equals_transformers(p, rng):
    scores = 3 * torch.randn(5, 64, generator=rng)
    torch.testing.assert_close(keep_min_p(scores, p), theirs.MinPLogitsWarper(p)(None, scores), rtol=0, atol=0)


def test_min_tokens_and_ignore_eos_hide_the_stop_ids(vlm):
    stop = vlm.processor.stop_ids[0]
    scores = torch.zeros(260)
    scores[stop], scores[70] = 9.0, 5.0
    least, never = writer(vlm, min_tokens=2), writer(vlm, ignore_eos=True)
    for w, expected in ((least, [70, 70, stop]), (never, [70] * 3)):
        found = []
        for _ in range(3):
            found.append(w.choose(scores))
            w.push(found[-1])
        assert found == expected
    assert least.reason == "stop" and not never.reason


def test_logprobs_are_those_of_the_whole_sequence(vlm, serve):
    request = Request(asked(5), Sampling(max_new_tokens=12, temperature=1.0, seed=4, logprobs=5))
    pieces = list(serve().submit(request))
    told = [entry for piece in pieces for entry in piece.logprobs]
    ids = [i for piece in pieces for i in piece.ids]
    assert [entry.id for entry in told] == ids and len(ids) == 12
    batch = vlm.processor.batch([request.messages], add_generation_prompt=True)
    x = vlm.model.splice(batch, {})
    x = torch.cat((x, vlm.model.lm.embed(torch.tensor([ids]))), dim=1)
    positions = torch.arange(x.shape[1]).unsqueeze(0)
    with torch.inference_mode():
        hidden = vlm.model.lm(x, positions, torch.ones_like(positions))
        expected = vlm.model.lm.head(hidden)[0, -len(ids) - 1 : -1].log_softmax(-1)
    for row, entry in zip(expected, told, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.id]), abs=1e-4)
        assert [i for i, *_ in entry.top] == row.topk(5).indices.tolist()
        assert sum(math.exp(value) for _, value, *_ in entry.top) <= 1 + 1e-6
    assert b"".join(entry.bytes for entry in told).decode("utf-8", "replace") == "".join(p.text for p in pieces)


def test_a_stop_string_over_several_tokens_is_never_shown(serve):
    service, request = serve(), asked(6)
    whole = service.submit(Request(request, Sampling(max_new_tokens=30, temperature=1.0, seed=1))).result(60)[0]
    stop = whole[8:12]
    sampling = Sampling(max_new_tokens=30, temperature=1.0, seed=1, stop=(stop,), logprobs=0)
    handle = service.submit(Request(request, sampling))
    pieces = list(handle)
    text = "".join(piece.text for piece in pieces)
    assert text == whole[: whole.index(stop)] and handle.finish.reason == "stop"
    ids = [i for piece in pieces for i in piece.ids]
    assert len(ids) == sum(len(piece.logprobs) for piece in pieces)
    assert service.vlm.processor.decode(ids) == text


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_choices_are_the_only_answers(serve, temperature):
    options = ["yes", "yes, but", "no"]
    requests = [
        Request(asked(seed), Sampling(temperature=temperature, seed=seed), Choices(options)) for seed in range(8)
    ]
    found = texts(serve(), requests)
    assert set(found) <= set(options)
    assert temperature == 0 or len(set(found)) > 1


@pytest.mark.parametrize("options", [{}, {"prefix_cache_bytes": 0}])
def test_guessed_tokens_change_nothing_and_save_steps(vlm, serve, options):
    service = serve(slots=1, **options)
    for seed in range(5):
        sampling = Sampling(max_new_tokens=60)
        plain = service.submit(Request(asked(seed), sampling)).result(60)[0]
        before = service.stats()
        guessed = Request(asked(seed), sampling.model_copy(update={"prompt_lookup": 6}))
        assert service.submit(guessed).result(60)[0] == plain
        after = service.stats()
        right = after["guessed_right"] - before["guessed_right"]
        assert after["steps"] - before["steps"] <= 60 - right + 4
    assert service.stats()["guessed_right"] > 0
    assert guess([5, 6, 7, 8, 5, 6], 2) == [7, 8] and guess([1, 2, 3], 4) == []


# ------------------------------------------------------------------------------------------------- limits and ends


def test_a_full_queue_refuses_at_once_and_takes_again_later(serve):
    service = serve(slots=1, max_queue_requests=2, max_queue_tokens=10_000)
    long = Request(asked(1), Sampling(max_new_tokens=200, ignore_eos=True))
    handles, begun = [], time.monotonic()
    with pytest.raises(QueueFull, match=r"[23] requests") as told:
        while True:  # two, or three where the first has its slot already
            handles.append(service.submit(long))
    assert told.value.reason == "requests" and time.monotonic() - begun < 60 and len(handles) >= 2
    for handle in handles:
        handle.cancel()
    for handle in handles[1:]:
        assert handle.result(60)[1].reason == "cancelled"
    assert handles[0].result(60)[1].reason in ("cancelled", "length")  # it ran at once: it may have come to its end
    assert service.submit(Request(asked(1), Sampling(max_new_tokens=1))).result(60)[1].reason == "length"
    few = serve(slots=1, max_queue_tokens=100)
    with pytest.raises(QueueFull) as told:
        for _ in range(9):
            handles.append(few.submit(long))
    assert told.value.reason == "tokens"


def test_cancellation_takes_effect_within_a_step(serve):
    service = serve(slots=1)
    handle = service.submit(Request(asked(2), Sampling(max_new_tokens=300, ignore_eos=True)))
    pieces = iter(handle)
    next(pieces)
    handle.cancel()
    at = service.stats()["steps"]
    handle.result(60)
    assert service.stats()["steps"] - at <= 2


def test_what_cannot_be_answered_is_refused_at_once(serve):
    service = serve(max_length=240)
    long = [Message("user", (Text(" ".join(WORDS * 3)),))]
    with pytest.raises(DataError, match="a slot has 240"):
        service.submit(Request(long))
    with pytest.raises(DataError, match="logit_bias"):
        service.submit(Request([Message("user", (Text("hi"),))], Sampling(logit_bias={260: 1.0})))
    _, finish = service.submit(Request([Message("user", (Text("hi"),))], Sampling(max_new_tokens=400))).result(60)
    assert finish.reason == "length" and finish.prompt_tokens + finish.completion_tokens == 240


def test_an_answer_may_be_continued(vlm, serve):
    service = serve()
    begun = [*asked(4, pictures=1), Message("assistant", (Text("the left"),))]
    whole, finish = service.submit(Request(begun, Sampling(max_new_tokens=5), continue_final=True)).result(60)
    assert len(whole) > 0
    assert finish.prompt_tokens == service.count(begun[:-1]) + len("the left")
    with pytest.raises(DataError, match="assistant"):
        service.submit(Request(asked(4), continue_final=True))


def test_draining_ends_what_was_accepted(serve):
    service = serve(slots=1)
    handles = [service.submit(Request(asked(1), Sampling(max_new_tokens=20, ignore_eos=True))) for _ in range(3)]
    service.stop(drain=60)
    assert [handle.finish.reason for handle in handles] == ["length"] * 3
    with pytest.raises(Stopped):
        service.submit(Request(asked(1)))
    abandoned = serve(slots=1)
    handle = abandoned.submit(Request(asked(1), Sampling(max_new_tokens=300, ignore_eos=True)))
    abandoned.stop()
    assert handle.finish is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_one_step_or_of_all_is_told(serve, monkeypatch):
    service = serve(slots=2)
    step, faults = service.scheduler.slots.run, []

    def failing(runs, best=None):
        if len(faults) < 1:
            faults.append(1)
            raise RuntimeError("no memory")
        return step(runs, best)

    monkeypatch.setattr(service.scheduler.slots, "run", failing)
    request = Request(asked(1), Sampling(max_new_tokens=3))
    assert isinstance(service.submit(request).result(60)[1].error, RuntimeError)
    assert service.submit(request).result(60)[1].reason == "length"
    assert sorted(service.scheduler.slots.free) == [0, 1] and service.healthy

    monkeypatch.setattr(service.scheduler, "step", lambda: exec("raise SystemExit"))
    handle = service.submit(request)
    assert isinstance(handle.result(60)[1].error, Stopped)
    service._thread.join(10)
    assert not service.healthy
    with pytest.raises(Stopped):
        service.submit(request)


# ------------------------------------------------------------------------------------------------- quantized


def test_a_quantized_model_answers_and_is_judged_and_not_saved(tmp_path):
    from serving_kit import tiny

    import chiasm
    from chiasm.errors import CheckpointError

    sizes = {"model.lm.dim": 64, "model.lm.mlp": 128}
    tiny(tmp_path / "tokenizer", **sizes).save(tmp_path / "model")
    vlm = chiasm.load(tmp_path / "model", dtype="bfloat16")
    prompts = [[*asked(seed), Message("assistant", (Text("on the left of it"),))] for seed in range(3)]
    told = vlm.quantize("int8", prompts)
    assert 0 < told.kl < 0.05 and told.agreement > 0.9 and told.positions > 150
    assert "KL" in str(told)
    with pytest.raises(CheckpointError, match="quantized"):
        vlm.save(tmp_path / "copy")
    other = chiasm.load(tmp_path / "model", dtype="bfloat16", quantize="int8")
    service = Service(other, slots=2, max_length=300, threads=1)
    service.start()
    request = Request(asked(1), Sampling(max_new_tokens=8))
    assert service.submit(request).result(60)[0] == vlm.generate(asked(1), max_new_tokens=8)
    service.stop()

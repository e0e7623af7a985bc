"""One engine for every model that writes text: in slots, or through its own caches, streamed, whole and cancelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serving_kit import data_url, encoded, picture, ready, serving, shows
from test_reliability import until
from test_streaming import raw

from chiasm.train import load_recipe
from chiasm.train.model import open_model

ROOT = Path(__file__).parents[2]
LANGUAGE = {"model.lm.config.vocab_size": 1024, "processing.template": "simple"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "our decoder": ("minigpt4", {}),
    "Flamingo": ("flamingo", {}),
    "BLIP-2 with OPT": ("blip2", {}),
    "BLIP-2 with T5": ("blip2", {"model.preset": "blip2-flan-t5-xl", "model.overrides": LANGUAGE}),
    "BLIP-2's first stage": ("blip2-stage1", {}),
}


@pytest.fixture(scope="module", params=list(MODELS))
def told(request: Any) -> tuple[str, Any]:
    """A recipe's tiny form with weights of which none is zero: gates that begin shut are open."""
    recipe, changes = MODELS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        loaded = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", {"out": "unused", **changes}, tiny=True)
        vlm = open_model(loaded.model, loaded.seed, "cpu")
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            drawn = torch.Generator().manual_seed(len(name) + parameter.numel())
            parameter += 0.05 * torch.randn(parameter.shape, generator=drawn)
    return request.param, vlm.eval()


def asked(text: str, seed: int) -> list[dict[str, Any]]:
    return shows({"url": data_url(encoded(picture((40, 30), seed)))}, text)


def test_answers_are_those_of_generate_streamed_and_whole(told) -> None:
    name, vlm = told
    served = ready(vlm)
    assert (served.service.scheduler.slots is not None) == (name == "our decoder")
    fields = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    with serving(served) as running:
        seen = {}
        for seed in (1, 2):
            message = {"role": "user", "content": [{"type": "image", "image": picture((40, 30), seed)}, "a red"]}
            expected = vlm.generate([message], max_new_tokens=6, ignore_eos=True)
            reply = running.chat(asked("a red", seed), **fields)
            assert reply.status == 200 and reply.text == expected, reply.body
            assert running.chat(asked("a red", seed), stream=True, **fields).text == expected
            choice = running.chat(asked("a red", seed), logprobs=True, **fields).json["choices"][0]
            seen[seed] = [token["logprob"] for token in choice["logprobs"]["content"]]
        assert seen[1] != pytest.approx(seen[2], abs=1e-4), "the picture does not matter"
        twice = running.chat(asked("a red", 1), **{**fields, "n": 2, "temperature": 1, "seed": 5})
        assert len({choice["message"]["content"] for choice in twice.json["choices"]}) == 2
        usage = running.chat(asked("a red", 1), **fields).json["usage"]
        assert usage["completion_tokens"] == 6 and usage["prompt_tokens"] > 0


def test_who_leaves_stops_the_computation(told) -> None:
    _, vlm = told
    served = ready(vlm)
    with serving(served) as running:
        for stream in (True, False):
            before = served.service.stats()["generated_tokens"]
            messages = [{"role": "user", "content": asked("a red", 1)}]
            connection = raw(running, stream=stream, max_tokens=60, ignore_eos=True, messages=messages)
            until(lambda before=before: served.service.stats()["generated_tokens"] > before)
            connection.close()
            running.idle(20)
        finished = served.service.stats()["finished"]
        assert finished.get("cancelled", 0) + finished.get("length", 0) == 2 and "error" not in finished

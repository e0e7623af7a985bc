"""Point 10: whatever a user types, pictures stay where the request put them, and no token of the template is forged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_kit import CONFIG, data_url, encoded, picture, ready, serving

import chiasm
from chiasm.model_config import VLMConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

TOKENIZERS = {  # a tokenizer of the golden tests → a template that it fits
    "qwen": "qwen_2",
    "gpt2": "qwen_2",
    "mistral": "vicuna_v1",
    "llama": "vicuna_v1",
    "words": "vicuna_v1",
}


def made(name: str, root: Path, data: Path) -> Path:
    """The folder of one of them."""
    import tokenizer_kit as kit

    data = data / "weights" / "tokenizers"
    pieces = data / "mistral" / "tokenizer.model.v1"
    makers = {
        "qwen": lambda: kit.qwen(root, data),
        "gpt2": lambda: kit.gpt2(root, data),
        "mistral": lambda: kit.spm(root, pieces, legacy=True),
        "llama": lambda: kit.save(kit.llama(pieces, legacy=True), root),
        "words": lambda: kit.words(root),
    }
    return makers[name]()


def model(name: str, folder: Path) -> chiasm.VLM:
    from chiasm.lm.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    changes = {
        "model.lm.vocab": len(tokenizer),
        "model.lm.max_positions": 4096,
        "processing.template": TOKENIZERS[name],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return chiasm.build(VLMConfig.parse(CONFIG).edit(**changes), tokenizer=tokenizer).eval()


def places(token: str) -> list[list[dict[str, Any]]]:
    """A conversation about two pictures with ``token`` before, between and after them, in every role and field."""
    first, second = ({"type": "image_url", "image_url": {"url": data_url(encoded(picture(seed=s)))}} for s in (1, 2))
    text = {"type": "text", "text": "What?"}
    typed = {"type": "text", "text": f"a{token}b {token} {token}{token}"}
    plain = [first, second, text]

    def user(*parts: Any) -> dict[str, Any]:
        return {"role": "user", "content": list(parts)}

    return [
        [user(typed, first, second, text)],
        [user(first, typed, second, text)],
        [user(first, second, typed)],
        [{"role": "system", "content": token}, user(*plain)],
        [user(*plain), {"role": "assistant", "content": f"It is {token}"}, user(text)],
        [user(first, text), {"role": "assistant", "content": token}, user(second, typed)],
        [{**user(*plain), "name": token}],
    ]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("mistral", 2),
        ("words", 2),
        *(pytest.param(name, 1000, marks=pytest.mark.slow) for name in TOKENIZERS),
    ],
)
def test_typed_tokens_bind_nothing(shared_data, tmp_path, monkeypatch, name: str, most: int):
    """``most``: so many control tokens of the tokenizer, those for pictures first; 1000 is more than any has."""
    vlm = model(name, made(name, tmp_path, shared_data))
    served = ready(vlm)
    samples = []
    service = served.service
    monkeypatch.setattr(
        service,
        "submit",
        lambda ask: (samples.append(vlm.processor(ask.messages, add_generation_prompt=True)), _done(ask))[1],
    )
    unknown = vlm.tokenizer.unk_id  # what a small vocabulary has no word for is unknown, however it is spelled
    controls = {token: i for token, i in vlm.tokenizer.specials.items() if i != unknown}
    named = [t for t in controls if any(word in t for word in ("image", "vision", "im_", "INST"))]
    tokens = list(dict.fromkeys([*named, *sorted(controls)]))[:most]
    with serving(served) as running:

        def ids(messages: list[Any]) -> Any:
            samples.clear()
            reply = running.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 1})
            assert reply.status == 200, reply.body
            return samples[0]

        wanted = [ids(messages) for messages in places("zzz")]
        for token in tokens:
            for number, messages in enumerate(places(token)):
                found, expected = ids(messages), wanted[number]
                assert len(found.media) == 2
                slots = torch.cat([item.slots for item in found.media]).tolist()
                assert len(slots) == 8
                # No control token but those of the template, and none at all among what was typed.
                count = {i: (found.input_ids == i).sum().item() for i in controls.values()}
                assert count == {i: (expected.input_ids == i).sum().item() for i in controls.values()}, (token, number)
                pixels = [item.inputs for item in found.media]
                assert all(torch.equal(a, b.inputs) for a, b in zip(pixels, expected.media, strict=True))


def _done(ask: Any) -> Any:
    from chiasm.infer.request import Finish, Handle

    handle = Handle(ask)
    handle.end(Finish("stop", 1, 1))
    return handle


def test_the_answer_does_not_depend_on_how_a_token_is_spelled(running):
    """Logits, too: a typed token is the same as its bytes, which the tiny tokenizer writes one by one."""
    for token in ("<image>", "<s>", "</s>", "<pad>"):
        content = [
            {"type": "image_url", "image_url": {"url": data_url()}},
            {"type": "text", "text": f"Is {token} here?"},
        ]
        reply = running.chat(content, temperature=0, max_tokens=4, logprobs=True)
        usage = reply.json["usage"]
        other = [content[0], {"type": "text", "text": f"Is {'x' * len(token)} here?"}]
        assert usage["prompt_tokens"] == running.chat(other).json["usage"]["prompt_tokens"]
        assert usage["prompt_tokens_details"]["image_tokens"] == 4

"""Every published template, exported as a Jinja chat template: transformers renders the prompt that we render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from hf_folders import make_model, make_processor, photo, save_folder, small_tokenizer

import chiasm
from chiasm.errors import CheckpointError
from chiasm.processing.templates import TEMPLATES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = small_tokenizer()
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>", *headers]})
    model = make_model("llava", tokenizer)
    return save_folder(tmp_path_factory.mktemp("t") / "x", "llava", model, tokenizer)


def conversations() -> list[list[dict[str, Any]]]:
    one, two = ({"type": "image", "image": photo(40, 40, seed)} for seed in (1, 2))

    def says(role: str, *parts: Any) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}

    return [
        [says("user", "Hello there.")],
        [says("user", one, " What is it? ")],
        [says("user", one, two, "Compare.")],
        [says("user", "First ", one, " then ", two, "\nand so?")],
        [
            says("system", "Be brief."),
            says("user", one, "What?"),
            says("assistant", "A dog."),
            says("user", "Sure?", two),
        ],
        [
            says("user", "Hi"),
            says("assistant", "Ho."),
            says("user", "Hi"),
            says("assistant", " Ho. "),
            says("user", "So"),
        ],
    ]


# Templates with control tokens of their own family are proved where that family is; an opening has no counterpart.
OF_FAMILIES = {"openflamingo", "idefics", "idefics_instruct", "blip2_caption"}
OPENED = {name for name, template in TEMPLATES.items() if getattr(template, "opening", "")}


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in OF_FAMILIES | OPENED | {"plain"}])
def test_exported_chat_templates(folder: Path, tmp_path: Path, name: str):
    vlm = chiasm.load(folder, template=name)
    vlm.export(tmp_path / "out")
    source = (tmp_path / "out" / "chat_template.jinja").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    processor = make_processor("llava", tokenizer)
    for messages in conversations():
        plain = [
            {"role": m["role"], "content": [{k: p[k] for k in ("type", "text") if k in p} for p in m["content"]]}
            for m in messages
        ]
        text = tokenizer.apply_chat_template(plain, chat_template=source, tokenize=False, add_generation_prompt=True)
        assert text == vlm.processor.prompt(messages)
        pictures = [p["image"] for m in messages for p in m["content"] if p["type"] == "image"]
        ids = processor(text=text, images=pictures or None, return_tensors="pt").input_ids
        assert ids[0].tolist() == vlm.processor(messages, add_generation_prompt=True).input_ids.tolist()
    again = chiasm.load(tmp_path / "out")
    assert again.config.processing.template.type == "jinja"
    for messages in conversations():
        ours, theirs = (v.processor(messages, add_generation_prompt=True).input_ids for v in (vlm, again))
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", sorted(OPENED))
def test_a_template_with_an_opening_is_refused(folder: Path, tmp_path: Path, name: str):
    with pytest.raises(CheckpointError, match="cannot be written as a chat template"):
        chiasm.load(folder, template=name).export(tmp_path / "out")


def test_a_template_without_questions_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="user_text=False"):
        chiasm.load(folder, template="plain").export(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())

"""Every template: its exact string, its labels for several tokenizers and turns, its stops."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from tokenizer_kit import Dot, count_dot

from chiasm.errors import ConfigError, DataError
from chiasm.processing.processor import ProcessingConfig, Processor, trained_text
from chiasm.processing.template import TurnsTemplate
from chiasm.processing.templates import TEMPLATES
from chiasm.types import Message, Text

pytestmark = pytest.mark.data
TOKENIZERS = [
    *("gpt2", "qwen", "mistral-spm", "mistral-spm-new", "mistral-v3"),
    *("stories", "llama", "llama-new", "llama-prepend"),
]
V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
V0 = V1.replace("user", "human")
LLAMA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
QWEN = "You are a helpful assistant."
QWEN25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
IS, IE = "<|im_start|>", "<|im_end|>"
SH, EH, EOT = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
# The strings of llava.md section 4, for the turns I U1 / A1 / U2 and a generation prompt; E is the tokenizer's EOS.
STRINGS = {
    "v0": f"{V0}###Human: <image>\nU1###Assistant: A1###Human: U2###Assistant:",
    "v0_train": f"{V0}\n\n### Human: <image>\nU1\n### Assistant: A1\n### Human: U2\n### Assistant:",
    "v1": f"{V1} USER: <image>\nU1 ASSISTANT: A1</s>USER: U2 ASSISTANT:",
    "llava_v1": f"{V0} USER: <image>\nU1 ASSISTANT: A1</s>USER: U2 ASSISTANT:",
    "llava_llama_2": f"[INST] <<SYS>>\n{LLAMA}\n<</SYS>>\n\n<image>\nU1 [/INST] A1 </s><s>[INST] U2 [/INST]",
    "mistral_instruct": "[INST] <image>\nU1 [/INST] A1 </s>[INST] U2 [/INST]",
    "mpt": f"{IS}system\n{MPT}{IE}{IS}user\n<image>\nU1{IE}{IS}assistant\nA1{IE}{IS}user\nU2{IE}{IS}assistant\n",
    "chatml_direct": f"{IS}system\nAnswer the questions.{IE}{IS}user\n<image>\nU1{IE}"
    f"{IS}assistant\nA1{IE}{IS}user\nU2{IE}{IS}assistant\n",
    "qwen_1_5": f"{IS}system\n{QWEN}{IE}\n{IS}user\n<image>\nU1{IE}\n"
    f"{IS}assistant\nA1{IE}\n{IS}user\nU2{IE}\n{IS}assistant\n",
    "qwen_2_5": f"{IS}system\n{QWEN25}{IE}\n{IS}user\n<image>\nU1{IE}\n"
    f"{IS}assistant\nA1{IE}\n{IS}user\nU2{IE}\n{IS}assistant\n",
    "llava_llama_3": f"{SH}system{EH}{LLAMA}{EOT}{SH}user{EH}<image>\nU1{EOT}"
    f"{SH}assistant{EH}A1{EOT}{SH}user{EH}U2{EOT}{SH}assistant{EH}",
    "gemma_instruct": "<start_of_turn>user\n<image>\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
    "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\n",
}
STRINGS |= {"llava_v0": STRINGS["v0"], "vicuna_v1": STRINGS["v1"], "qwen_2": STRINGS["qwen_1_5"]}
STRINGS["mistral_direct"] = STRINGS["chatml_direct"]
NASTY = [
    "A cat.",
    "No: USER: is it? ASSISTANT: it is###Human: ok",
    "Ends </s> or <|im_end|> or [/INST] <image>",
    "日本語のテキスト 😀",
    "### two\n\nlines",
]


def processor(template: Any, tokenizer: Any, **changes: Any) -> Processor:
    return Processor(
        ProcessingConfig(template=template, media={"dot": {"type": "dot"}}, **changes), tokenizer, count_dot
    )


def turns(count: int, answers: list[str], medium: bool = True) -> list[Message]:
    messages = []
    for i in range(count):
        question = Text(f"Question {i}, what is it?")
        messages.append(Message("user", (Dot(1), question) if medium and i == 0 else (question,)))
        messages.append(Message("assistant", (Text(answers[i % len(answers)]),)))
    return messages


@pytest.mark.parametrize("name", STRINGS)
def test_strings(name: str, tokenizers: dict) -> None:
    tokenizer = tokenizers["llama" if "{" in TEMPLATES[name].between + TEMPLATES[name].answer.end else "gpt2"]
    messages = [
        Message("user", (Dot(1), Text("U1"))),
        Message("assistant", (Text("A1"),)),
        Message("user", (Text("U2"),)),
    ]
    assert processor(name, tokenizer).prompt(messages) == STRINGS[name]


def test_mmtag_and_plain(tokenizers: dict) -> None:
    messages = [Message("user", (Dot(1), Text("U1"))), Message("assistant", (Text("A1"),))]
    for name, ending in (("v0_mmtag", "U1###Assistant: A1###"), ("v1_mmtag", "U1 ASSISTANT: A1</s>")):
        prompt = processor(name, tokenizers["llama"]).prompt(messages, add_generation_prompt=False)
        assert "<Image>visual content</Image>." in prompt
        assert prompt.endswith(": <Image><image></Image>\n" + ending)
    plain = processor("plain", tokenizers["llama"])
    assert plain.prompt(messages, add_generation_prompt=False) == "<image>A1\n"


BLIP = {
    "blip2_opt": "<image><s>Question: what? Short answer:A1\n",
    "instructblip": "<image><s>Question: what? Short answer: A1</s>",
    "blip2_t5": "<image>Question: what? Short answer:A1</s>",
}


@pytest.mark.parametrize(("name", "expected"), BLIP.items())
def test_blip_prompts(name: str, expected: str, tokenizers: dict) -> None:
    """The prompt is the user's own; the picture stands first of all."""
    question = Message("user", (Text("Question: what? Short answer:"), Dot(1)))
    messages = [question, Message("assistant", (Text("A1"),))]
    assert processor(name, tokenizers["llama"]).prompt(messages, add_generation_prompt=False) == expected


FAKE = "<fake_token_around_image>"
SHOTS = (
    Message("user", (Dot(1), Text("Output:"))),
    Message("assistant", (Text("A1"),)),
    Message("user", (Text("between"), Dot(1), Dot(1), Text("Output:"))),
)
FLAMINGO = {  # texts, pictures side by side, and an answer before: what stands between pictures is never learned
    "openflamingo": "<image>Output:⟦A1<|endofchunk|>⟧between<image><image>Output:",
    "idefics": f"User:{FAKE}<image>{FAKE}Output:\nAssistant:⟦ A1\n⟧"
    f"User:between{FAKE}<image>{FAKE}<image>{FAKE}Output:\nAssistant:",
    "idefics_instruct": f"User:{FAKE}<image>{FAKE}Output:<end_of_utterance>\nAssistant:⟦ A1<end_of_utterance>⟧\n"
    f"User:between{FAKE}<image>{FAKE}<image>{FAKE}Output:<end_of_utterance>\nAssistant:",
}


@pytest.mark.parametrize(("name", "expected"), FLAMINGO.items())
def test_flamingo_prompts(name: str, expected: str) -> None:
    """As OpenFlamingo's evaluation and the examples of Idefics' processor write them; learned is between ⟦ and ⟧."""
    made = TurnsTemplate(TEMPLATES[name], {}, {"dot": "<image>"})
    text = ""
    for piece in made.render(SHOTS, True, "here"):
        text += f"⟦{piece.text}⟧" if piece.train and piece.text else piece.text
    assert text.replace("⟧⟦", "") == expected
    assert {token for token in (FAKE, "<|endofchunk|>", "<end_of_utterance>") if token in expected} == {*made.controls}


def test_every_template_is_covered() -> None:
    assert TEMPLATES.keys() - STRINGS.keys() == {
        *(*BLIP, *FLAMINGO, "blip2_caption"),
        *("v0_mmtag", "v1_mmtag", "plain", "simple", "bare"),
    }


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_labels(name: str, tokenizer: str, tokenizers: dict) -> None:
    own = tokenizers[tokenizer]
    if lacking := set(TEMPLATES[name].controls) - own.specials.keys():
        with pytest.raises(ConfigError, match="does not have as control tokens") as error:
            processor(name, own)
        assert all(repr(token) in str(error.value) for token in lacking)
        return
    made = processor(name, own)
    writes_bos = "{bos}" in TEMPLATES[name].between + TEMPLATES[name].opening
    if "bos_token" not in own.tokens and writes_bos:
        with pytest.raises(ConfigError, match="bos token, which it does not have"):
            made(turns(2, NASTY), "s")
        return
    answer = made.config.template.answer
    end = answer.end.replace("{eos}", own.tokens["eos_token"])
    for count in range(1, 6):
        if name == "plain" and count > 1:
            continue  # one caption; a second would follow the first directly
        answers = NASTY[count - 1 :] + NASTY[: count - 1]
        for system in (None, "", "Be brief."):
            messages = turns(count, answers)
            if system is not None:
                messages.insert(0, Message("system", (Text(system),)))
            sample = made(messages, "s", train=True)
            learned = list(trained_text(made, sample))
            assert len(learned) == count
            for text, true in zip(learned, answers[:count], strict=True):
                if tokenizer == "stories":  # its model folds white space and has no other round trip
                    true = own.decode(own.encode(true))
                    assert text.replace(" ", "").replace("\n", "").endswith(end.replace(" ", "").replace("\n", ""))
                    continue
                # what the model must say after the prompt: lead, answer, end, and nothing else
                assert text.lstrip(" ") == (true + end).lstrip(" "), (system, count)
                assert text in (answer.lead + true + end, true + end, " " + true + end)
            # slots hold the medium, and it is never learned
            slots = sample.media[0].slots
            assert slots is not None and len(slots) == 5 and not sample.loss_mask[slots].any()
            # generation continues exactly where training began to learn
            prompt = made(messages[:-1], "s", add_generation_prompt=True)
            if (name, tokenizer) == ("llava_llama_3", "gpt2"):
                continue  # GPT-2's rule splits two newlines before a letter, and joins them at the end of a prompt
            assert sample.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
            assert bool(sample.loss_mask[len(prompt)])
            assert not prompt.loss_mask[-1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_word_level_labels(name: str, tokenizers: dict) -> None:
    tokenizer = tokenizers["words"]
    if TEMPLATES[name].controls:
        return  # refused, see test_labels
    made = processor(name, tokenizer)
    sample = made(turns(1, ["A cat is it ."]), "s", train=True)
    learned = sample.input_ids[sample.loss_mask].tolist()
    words = tokenizer.encode("A cat is it .")
    assert learned[: len(words)] == words
    if "{eos}" in made.config.template.answer.end:
        assert learned[len(words) :] == [tokenizer.eos_id]
        assert made.stop_ids == (tokenizer.eos_id,)


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS, "words"])
def test_bos_once(tokenizer: str, tokenizers: dict) -> None:
    own = tokenizers[tokenizer]
    sample = processor("v1", own)(turns(1, ["yes"]), "s")
    assert sample.input_ids[: len(own.prefix)].tolist() == own.prefix
    if own.bos_id is not None:
        assert (sample.input_ids == own.bos_id).sum() == len(own.prefix)
        written = processor(TEMPLATES["v1"].edit(bos="{bos}"), own)(turns(1, ["yes"]), "s")
        assert (written.input_ids == own.bos_id).sum() == 1


def test_stops(tokenizers: dict) -> None:
    assert processor("qwen_1_5", tokenizers["qwen"]).stop_ids == (151645,)
    assert processor("v1", tokenizers["llama"]).stop_ids == (2,)
    assert processor("v0", tokenizers["llama"]).stop_strings == ("###",)
    with pytest.raises(ConfigError, match=r"answer\.end is empty"):
        processor({"type": "turns", "answer": {"end": ""}}, tokenizers["llama"])
    with pytest.raises(ConfigError, match="bos token, which it does not have"):
        processor(TEMPLATES["v1"].edit(bos="{bos}"), tokenizers["gpt2"])(turns(1, ["a"]), "s")


def test_untrained_turns(tokenizers: dict) -> None:
    messages = turns(2, ["one", "two"])
    messages[1] = Message("assistant", messages[1].parts, train=False)
    made = processor("v1", tokenizers["llama"])
    assert list(trained_text(made, made(messages, "s", train=True))) == ["two</s>"]


def test_llava_qwen_rule(tokenizers: dict) -> None:
    """preprocess_qwen: targets are whole answer turns, and 198, <|im_start|>, <|im_end|> wherever they stand."""
    tokenizer = tokenizers["qwen"]
    made = processor(TEMPLATES["qwen_1_5"].edit(loss="llava_qwen"), tokenizer)
    sample = made(turns(2, ["one", "two"]), "s", train=True)
    special = {198, 151644, 151645}
    inside = False
    ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
    for i, (index, learned) in enumerate(zip(ids, mask, strict=True)):
        if index == 151644:
            inside = ids[i + 1] == tokenizer.encode("assistant")[0]
        assert learned == (inside or index in special), i
    assert sum(mask) > sum(processor("qwen_1_5", tokenizer)(turns(2, ["one", "two"]), "s").loss_mask.tolist())


def test_media_places(tokenizers: dict) -> None:
    own = tokenizers["qwen"]
    inline = (Text("Compare "), Dot(1), Text(" with "), Dot(2), Text("."))
    asked = "<|im_start|>user\nCompare <image> with <image>.<|im_end|>"
    assert asked in processor("qwen_1_5", own).prompt([Message("user", inline)])
    assert "USER: <image>\n<image>\nCompare  with . ASS" in processor("v1", tokenizers["llama"]).prompt(
        [Message("user", inline)]
    )
    front = (Dot(1), Dot(2), Text("Which?"))
    assert "user\n<image>\n<image>\nWhich?<|im_end|>" in processor("qwen_1_5", own).prompt([Message("user", front)])
    newline = (Dot(1), Text("\n"), Dot(2), Text("\nWhich?"))
    assert "user\n<image>\n<image>\nWhich?<|im_end|>" in processor("qwen_1_5", own).prompt([Message("user", newline)])


def test_roles(tokenizers: dict) -> None:
    made = processor("v1", tokenizers["llama"])
    user, answer = Message("user", (Text("a"),)), Message("assistant", (Text("b"),))
    for bad in ([answer], [user, user], [user, answer, answer], [user, Message("system", (Text("s"),))]):
        with pytest.raises(DataError, match=r"sample 'x': turn \d is from"):
            made(bad, "x")
    with pytest.raises(DataError, match="is an answer already"):
        made([user, answer], "x", add_generation_prompt=True)
    with pytest.raises(DataError, match="no user turn"):
        made([Message("system", (Text("s"),))], "x")


def test_config_saves_data_and_pickles(tokenizers: dict) -> None:
    made = processor("v1", tokenizers["llama"])
    again = ProcessingConfig.parse(made.config.dump())
    assert again == made.config and again.dump()["template"]["answer"]["prompt"] == "ASSISTANT:"
    other = pickle.loads(pickle.dumps(made))
    messages = turns(2, NASTY)
    assert other(messages, "s").input_ids.tolist() == made(messages, "s").input_ids.tolist()

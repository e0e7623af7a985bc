"""File sources: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chiasm.data.base import Example, with_answer
from chiasm.data.mixture import Entry, Mixture
from chiasm.data.shuffle import media_of, shuffled
from chiasm.data.sources.llava_json import LlavaJson
from chiasm.data.sources.messages import Messages
from chiasm.data.sources.photos import CocoCaptions, VqaJson
from chiasm.errors import ConfigError, DataError, RegistryError
from chiasm.types import Image, Message, Text, Video


def llava(tmp_path: Path, *records: dict, **config) -> LlavaJson:
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records))
    return LlavaJson(LlavaJson.Config(file=str(file), **config))


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": value} for role, value in turns]


def test_llava_json_as_published(tmp_path):
    source = llava(
        tmp_path,
        {
            "id": "000000033471",
            "image": "coco/train2017/000000033471.jpg",
            "conversations": talk(
                ("human", "<image>\nWhat is on the bus?"), ("gpt", "An ad."), ("human", "Sure?"), ("gpt", "Yes.")
            ),
        },
        {
            "id": 7,
            "image": ["a.jpg", "b.jpg"],
            "conversations": talk(("human", "From <image> to <image>?"), ("gpt", "It grew.")),
        },
        {"id": "t", "conversations": talk(("human", "Hi"), ("gpt", "Hello."))},
        {
            "id": "v",
            "video": "clip.mp4",
            "conversations": talk(("human", "<video>\nWhat happens?"), ("gpt", "A jump.")),
        },
        {"id": "s", "conversations": talk(("gpt", "left over"), ("human", "Hi"), ("gpt", "Hello."))},
        images="images",
        videos="videos",
    )
    one, two, text, video, late = (source[i] for i in range(5))
    assert one.messages[0].parts == (Image("images/coco/train2017/000000033471.jpg"), Text("\nWhat is on the bus?"))
    assert [m.role for m in one.messages] == ["user", "assistant", "user", "assistant"]
    assert two.id == "7"
    assert two.messages[0].parts == (
        Text("From "),
        Image("images/a.jpg"),
        Text(" to "),
        Image("images/b.jpg"),
        Text("?"),
    )
    assert text.messages == (Message("user", (Text("Hi"),)), Message("assistant", (Text("Hello."),)))
    assert video.messages[0].parts == (Video("videos/clip.mp4"), Text("\nWhat happens?"))
    assert [m.role for m in late.messages] == ["user", "assistant"]


def test_one_name_and_a_list_of_one_are_the_same(tmp_path):
    conversations = talk(("human", "<image>\nWhat?"), ("gpt", "That."))
    a = llava(tmp_path, {"id": "x", "image": "a.jpg", "conversations": conversations})[0]
    b = llava(tmp_path, {"id": "x", "image": ["a.jpg"], "conversations": conversations})[0]
    assert a == b


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conversations": talk(("human", "<image><image> What?"), ("gpt", "That."))},
            r"'x': has 2 placeholders .* but 1 media",
        ),
        ({"image": ["a.jpg", "b.jpg"]}, r"'x': has 1 placeholders .* but 2 media"),
        (
            {"conversations": talk(("humn", "<image>"), ("gpt", "That."))},
            "'x', turn 1: unknown role 'humn'; did you mean 'human'",
        ),
        ({"conversations": [{"from": "human"}]}, "turn 1: missing key 'value'"),
    ],
)
def test_llava_json_refuses(tmp_path, change, message):
    record = {"id": "x", "image": "a.jpg", "conversations": talk(("human", "<image>\nWhat?"), ("gpt", "That."))}
    with pytest.raises(DataError, match=message):
        llava(tmp_path, record | change)[0]


def test_json_that_is_none_names_the_line(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"id": "1", "messages": [{"role": "user", "content": "a"}]}\n{"id": oops}\n')
    with pytest.raises(DataError, match="line 2, column 8"):
        Messages(Messages.Config(file=str(tmp_path / "data.jsonl")))[1]
    with pytest.raises(DataError, match="cannot be read"):
        Messages(Messages.Config(file=str(tmp_path / "none.jsonl")))


def test_messages(tmp_path):
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What <image> is it?"}]
    record = {
        "id": "1",
        "messages": [{"role": "user", "content": content}],
        "answers": ["cat", "a cat"],
        "task": "animals",
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    source = Messages(Messages.Config(file=str(tmp_path / "data.jsonl"), media="pictures"))
    asked = Message("user", (Image("pictures/a.png"), Text("What <image> is it?")))
    assert source[0] == Example("1", (asked,), "", "animals", ("cat", "a cat"))
    assert with_answer(source[0]).messages[-1] == Message("assistant", (Text("cat"),))
    (tmp_path / "data.jsonl").write_text(json.dumps(record | {"anwers": []}))
    with pytest.raises(DataError, match=r"sample '1': unknown key 'anwers'; did you mean 'answers'"):
        Messages(Messages.Config(file=str(tmp_path / "data.jsonl")))[0]


@pytest.mark.data
def test_photos_of_the_shared_data(shared_data):
    folder = shared_data / "photos"
    common = dict(questions=str(folder / "vqa_questions.json"), annotations=str(folder / "vqa_annotations.json"))  # noqa: C408
    common |= {"index": str(folder / "captions_coco_format.json"), "images": str(folder)}
    whole, train, held = (VqaJson(VqaJson.Config(**common, split=s)) for s in ("all", "train", "held_out"))
    assert len(whole) == 93 == len(train) + len(held) and 0 < len(held) < 40
    assert not {m.data for e in _all(train) for m in media_of(e)} & {m.data for e in _all(held) for m in media_of(e)}
    example = whole[0]
    assert example.messages[0].text.startswith("What color is the door?") and example.answers == ("red",) * 10
    assert all(Path(m.data).is_file() for e in _all(whole) for m in media_of(e))
    captions = CocoCaptions(CocoCaptions.Config(file=common["index"], images=str(folder)))
    pictures = CocoCaptions(CocoCaptions.Config(file=common["index"], images=str(folder), per="picture"))
    assert (len(captions), len(pictures)) == (62, 31) and len(pictures[0].answers) == 2


@pytest.mark.data
def test_nlvr_of_the_shared_data(shared_data):
    from chiasm.data.sources.nlvr import Nlvr
    from chiasm.processing.base import Place
    from chiasm.processing.open import open_picture

    source = Nlvr(Nlvr.Config(folder=str(shared_data / "nlvr"), splits=("test", "hidden")))
    assert len(source) == 1975 and len(Nlvr(Nlvr.Config(folder=str(shared_data / "nlvr")))) == 989
    example = source[3]
    picture = open_picture(media_of(example)[0].data, Place(example.id, 0, 1))
    assert picture.size == (400, 100) and example.answers[0] in ("true", "false")
    assert sum(source[i].answers == ("true",) for i in range(990)) == round(0.562 * 990)


def _all(source):
    return [source[i] for i in range(len(source))]


def two_sources(tmp_path: Path, **weights: float) -> Mixture:
    entries = {}
    for name, size in (("a", 10), ("b", 4)):
        file = tmp_path / f"{name}.json"
        file.write_text(
            json.dumps([{"id": i, "conversations": talk(("human", "q"), ("gpt", "a"))} for i in range(size)])
        )
        entries[name] = Entry(source={"type": "llava_json", "file": str(file)}, weight=weights.get(name, 1.0))
    return Mixture(entries, seed=3)


def test_weights_are_how_often_an_example_comes(tmp_path):
    mixture = two_sources(tmp_path, a=0.5, b=2)
    assert len(mixture) == 5 + 8
    seen: dict[tuple[int, int], int] = {}
    for epoch in range(2):
        for ref in map(tuple, mixture.order(epoch).tolist()):
            seen[ref] = seen.get(ref, 0) + 1
    assert seen == {(0, i): 1 for i in range(10)} | {(1, i): 4 for i in range(4)}
    assert mixture.order(0).tolist() != mixture.order(2).tolist()
    assert mixture[1, 2].source == "b"


def test_mixture_refuses(tmp_path):
    with pytest.raises(ConfigError, match="unknown data source 'c'; known: a, b"):
        two_sources(tmp_path).only(("c",))
    with pytest.raises(RegistryError, match="unknown source 'llava_jsn'; did you mean 'llava_json'"):
        Entry.parse({"source": {"type": "llava_jsn"}})
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="'a' holds 0 examples"):
        Mixture({"a": Entry(source={"type": "llava_json", "file": str(tmp_path / "a.json")})})


def examples(*pictures: str, task: str = "t") -> list[Example]:
    return [
        Example(f"{task}{i}", (Message("user", (Image(p), Text("?"))),), task=task, answers=("x",))
        for i, p in enumerate(pictures)
    ]


def test_shuffled_is_a_derangement_of_pictures():
    given = examples(*"aaabbcdd") + examples(*"efg", task="u") + [Example("text", (Message("user", (Text("?"),)),))]
    mixed = shuffled(given, seed=1)
    assert [e.id for e in mixed] == [e.id for e in given[:-1]]
    for old, new in zip(given, mixed, strict=False):
        assert media_of(old)[0].data != media_of(new)[0].data
        assert (media_of(new)[0].data in "abcd") == (old.task == "t") and new.messages[0].text == "?"
    assert sorted(media_of(e)[0].data for e in mixed) == sorted("aaabbcddefg")
    assert mixed == shuffled(given, seed=1) != shuffled(given, seed=2)


def test_shuffled_leaves_out_what_has_no_other_picture():
    assert shuffled(examples(*"aaa")) == []
    assert len(shuffled(examples(*"aaaab"))) == 2

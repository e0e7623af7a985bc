"""The playground: the same everywhere, no thing in two splits, answers that the question alone does not give away."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from chiasm.config import Config
from chiasm.data.mixture import Entry
from chiasm.data.shuffle import media_of
from chiasm.data.sources.playground import CAPTION_TASKS, LABEL_TASKS, QUESTION_TASKS, SCENE_AND_DIGIT_TASKS, TASKS
from chiasm.data.sources.playground.digits import handwriting, handwriting_split, pool
from chiasm.data.sources.playground.scenes import Thing, related
from chiasm.data.sources.playground.source import DIGITS, FAMILIES, Playground, PlaygroundText
from chiasm.data.sources.playground.world import SPLITS, chance, invent, split_of
from chiasm.errors import ConfigError, DataError


def source(**changes) -> Playground:
    return Playground(Playground.Config(**changes))


def words(example) -> list[tuple[str, str]]:
    return [(m.role, m.text) for m in example.messages]


def pixels(example) -> list[bytes]:
    found = []
    for medium in media_of(example):
        pictures = [medium.data] if medium.kind == "image" else medium.data
        found += [picture.tobytes() for picture in pictures]
    return found


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_valid_examples(task):
    for split in SPLITS:
        made = source(tasks=(task,), split=split, length=6, size=48)
        for example in (made[i] for i in range(6)):
            assert example.task == task and example.source == "playground"
            roles = [m.role for m in example.messages]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) >= 2
            assert example.answers == (example.messages[-1].text,)
            assert all(m.text.strip() for m in example.messages)
            for medium in media_of(example):
                pictures = [medium.data] if medium.kind == "image" else medium.data
                assert all(p.size == (48, 48) and p.mode == "RGB" for p in pictures)
            assert len(set(pixels(example))) >= 1
    ids = [made[i].id for i in range(6)]
    assert len(set(ids)) == 6


def test_many_turns_many_images_and_video_are_there():
    turns = source(tasks=("scene_turns",), length=4)[1]
    assert len(turns.messages) == 6 and len(media_of(turns)) == 1
    assert [m.kind for m in media_of(source(tasks=("comparison",), length=1)[0])] == ["image", "image"]
    clip = media_of(source(tasks=("clip",), length=1)[0])[0]
    assert clip.kind == "video" and len(clip.data) == 4 and clip.fps == 1.0


def test_a_task_named_twice_gives_other_examples():
    made = source(tasks=("scene_qa", "digit_qa", "scene_qa"), length=30)
    examples = [made[i] for i in range(30)]
    assert len({e.id for e in examples}) == 30
    assert [e.id for e in examples if e.task == "scene_qa"] == [
        source(tasks=("scene_qa",), length=20)[i].id for i in range(20)
    ]


def test_code_words_say_as_much_as_the_description():
    """In the share told in code words, nine words stand for the nine places, each a token's worth."""
    told = PlaygroundText(PlaygroundText.Config(tasks=("scene_qa", "digit_qa"), length=20, shorthand=1.0))
    for i in range(20):
        scene = told.compose(i)[0]
        words = told[i].messages[0].text.split()[:9]
        assert [w != "void" for w in words] == [any(t.place == p for t in scene) for p in range(9)]
        assert {w for w in words if w != "void"} == {t.words.replace(" ", "") for t in scene}


def test_an_example_depends_on_configuration_and_index_only():
    forward, backward = source(turns=4), source(turns=4)
    there = [forward[i] for i in range(24)]
    back = [backward[i] for i in reversed(range(24))][::-1]
    for a, b in zip(there, back, strict=True):
        assert a.id == b.id and words(a) == words(b) and pixels(a) == pixels(b)
    assert words(source(turns=4, seed=1)[0]) != words(there[0]) or pixels(source(turns=4, seed=1)[0]) != pixels(
        there[0]
    )


def test_another_process_makes_the_same_pictures():
    code = (
        "import hashlib; from chiasm.data.sources.playground import Playground as P\n"
        "s = P(P.Config(tasks=('scene_qa', 'digit_qa', 'reading'), length=3)); h = hashlib.sha256()\n"
        "for i in range(3):\n"
        "    e = s[i]; h.update(e.messages[0].media[0].data.tobytes()); h.update(repr(e.messages[1].text).encode())\n"
        "print(h.hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1 and len(runs.pop().strip()) == 64


def test_no_thing_is_in_two_splits():
    """Thousands of things of every family: each lies in the split that its words hash to, and none lies in two."""
    for family in FAMILIES:
        seen: dict[str, set[str]] = {}
        for split in SPLITS:
            rng = chance("overlap", family.name, split)
            seen[split] = {
                family.describe(invent(family, "caption", n, split, rng)[0])
                for n in range(400 if split == "train" else 150)
            }
            assert all(split_of(d) == split for d in seen[split])
        assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
        assert not seen["validation"] & seen["test"]


def test_handwriting_never_crosses_splits():
    owned = {split: {i for indices in pool(split).values() for i in indices} for split in SPLITS}
    assert sum(len(o) for o in owned.values()) == len(handwriting()[1]) == 1797
    assert not owned["train"] & owned["test"] and not owned["train"] & owned["validation"]
    rng = chance("ink")
    for split in SPLITS:
        drawn = {t.ink for _ in range(200) for t in DIGITS.sample(rng, split) if t.ink is not None}
        assert drawn <= owned[split] and all(handwriting_split(i) == split for i in drawn)
    labels = handwriting()[1]
    assert all(str(labels[t.ink]) == t.name for t in DIGITS.sample(rng, "train") if t.ink is not None)


def counted(tasks, number: int) -> tuple[dict[str, Counter], dict[str, Counter]]:
    """Answers by kind and by question text, over ``number`` examples of each task of the test split."""
    kinds, texts = defaultdict(Counter), defaultdict(Counter)
    for task in tasks:
        made = PlaygroundText(PlaygroundText.Config(tasks=(task,), split="test", length=number))
        for i in range(number):
            last = made.compose(i)[2][-1]
            kinds[f"{task}/{last.kind}"][last.answer] += 1
            texts[last.text][last.answer] += 1
    return kinds, texts


def test_no_answer_is_given_by_the_kind_of_question():
    kinds, _ = counted(QUESTION_TASKS, 480)
    for kind, answers in kinds.items():
        share = answers.most_common(1)[0][1] / answers.total()
        if set(answers) <= {"yes", "no"}:
            assert abs(answers["yes"] - answers["no"]) <= 1, f"{kind}: {answers}"
        assert share <= 0.51, f"{kind}: {answers.most_common(3)}"


def test_a_reader_of_the_question_alone_does_badly():
    """Even one that knows, for every question text of the test itself, the answer that comes most often."""
    _, texts = counted(SCENE_AND_DIGIT_TASKS, 1500)
    frequent = {t: a for t, a in texts.items() if a.total() >= 8}
    right = sum(a.most_common(1)[0][1] for a in frequent.values())
    total = sum(a.total() for a in frequent.values())
    assert total > 3000
    assert right / total <= 0.40, f"{right / total:.3f} of {total}"


def test_pictures_change_with_answers():
    """The same question about different pictures: other answers, other pixels."""
    made = source(tasks=("scene_count",), length=60)
    by_answer = {}
    for i in range(0, 60, 3):
        by_answer.setdefault(made[i].answers[0], pixels(made[i])[0])
    assert set(by_answer) == {"1", "2", "3", "4"} and len(set(by_answer.values())) == 4


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_what_is_drawn_depends_on_the_thing(family):
    """Equal chance, another thing: other pixels. Equal thing, equal chance: the same."""
    rng = chance("draw", family.name)
    things = {}
    while len(things) < 12:
        thing = family.sample(rng, "train")
        things[family.describe(thing)] = thing
    drawn = {}
    for description, thing in things.items():
        media = family.draw(thing, 64, chance("same"))
        assert [m.kind for m in media] == [m.kind for m in family.draw(thing, 64, chance("same"))]
        flat = [p for m in media for p in ([m.data] if m.kind == "image" else m.data)]
        drawn[description] = b"".join(p.tobytes() for p in flat)
    assert len(set(drawn.values())) == 12


def test_relations_are_those_of_the_grid():
    left, right = Thing("circle", "red", "small", 0), Thing("square", "blue", "small", 5)
    assert related(left, right, "left of") and related(left, right, "above")
    assert related(right, left, "right of") and related(right, left, "below")
    assert not related(right, left, "left of") and not related(left, left, "above")


def test_the_same_world_in_words():
    pictures, text = source(length=44, turns=3), PlaygroundText(PlaygroundText.Config(length=44, turns=3))
    for i in range(44):
        a, b = pictures[i], text[i]
        assert [m.text for m in a.messages[1:]] == [m.text for m in b.messages[1:]]
        assert b.messages[0].text.endswith(a.messages[0].text) and len(b.messages[0].text) > len(a.messages[0].text)
        assert not media_of(b)


def test_captions_name_everything():
    example = source(tasks=("caption",), length=1)[0]
    assert example.messages[-1].text.startswith("A") and example.messages[-1].text.endswith(".")
    assert set(CAPTION_TASKS) | set(QUESTION_TASKS) | set(LABEL_TASKS) == set(TASKS)


def test_bad_configurations_say_what_is_near():
    with pytest.raises(ConfigError, match=r"no task 'scene_q'.*scene_qa"):
        Entry.parse({"source": {"type": "playground", "tasks": ["scene_q"]}})
    with pytest.raises(ConfigError, match="splt"):
        Entry.parse({"source": {"type": "playground", "splt": "test"}})
    with pytest.raises(DataError, match="example 5 was asked for, there are 5"):
        source(length=5)[5]
    assert issubclass(Playground.Config, Config)

"""Questions in the layout of VQA v2 and captions in the layout of COCO: one picture, one short text.

Sources: visualqa.org "VQA Input Questions/Annotations Format" (v2.0); cocodataset.org "Caption Annotations".
"""

from __future__ import annotations

from typing import Any, Literal

from chiasm.data.base import Example, Source
from chiasm.data.sources.records import SplitConfig, beside, need, read_json
from chiasm.errors import DataError
from chiasm.registry import register
from chiasm.types import Image, Message, Text


class VqaJsonConfig(SplitConfig):
    """``questions`` and ``annotations`` are VQA-v2 files. A picture's name is looked up in ``index`` (any file with
    COCO's ``images`` list), or made from ``image_name`` and the picture's number.
    """

    type: str = "vqa_json"
    questions: str
    annotations: str
    images: str = ""
    index: str | None = None
    image_name: str = "COCO_train2014_{:012d}.jpg"
    instruction: str = "\nAnswer the question using a single word or phrase."
    task: str = "vqa"


@register("source", "vqa_json")
class VqaJson(Source):
    """One example for each question: its target is the annotators' most common answer, all of theirs are accepted."""

    Config = VqaJsonConfig

    def __init__(self, config: VqaJsonConfig):
        super().__init__(config)
        names = _names(config.index) if config.index else None
        found = {a["question_id"]: a for a in need(read_json(config.annotations), "annotations", config.annotations)}
        self.rows: list[tuple[str, str, dict[str, Any]]] = []
        for record in need(read_json(config.questions), "questions", config.questions):
            where = f"{config.questions}, question {record.get('question_id')!r}"
            annotation = found.get(need(record, "question_id", where))
            if annotation is None:
                raise DataError(f"{where}: has no annotation among the {len(found)} of {config.annotations}")
            picture = _name(names, config.image_name, need(record, "image_id", where), where)
            if config.holds(picture):
                self.rows.append((picture, need(record, "question", where), annotation))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        picture, question, annotation = self.rows[index]
        target = annotation["multiple_choice_answer"]
        answers = tuple(a["answer"] for a in annotation.get("answers", ())) or (target,)
        asked = (Image(beside(self.config.images, picture)), Text(question + self.config.instruction))
        messages = (Message("user", asked), Message("assistant", (Text(target),)))
        return Example(
            f"{self.config.task}/{annotation['question_id']}", messages, task=self.config.task, answers=answers
        )


class CocoCaptionsConfig(SplitConfig):
    """``file`` holds COCO's ``images`` and ``annotations``. ``per`` says what an example is: each caption, or each
    picture (with all its captions accepted, for evaluation).
    """

    type: str = "coco_captions"
    file: str
    images: str = ""
    prompt: str = "Describe the image in one sentence."
    per: Literal["caption", "picture"] = "caption"
    task: str = "caption"


@register("source", "coco_captions")
class CocoCaptions(Source):
    """One example for each caption, or for each picture."""

    Config = CocoCaptionsConfig

    def __init__(self, config: CocoCaptionsConfig):
        super().__init__(config)
        names = _names(config.file)
        captions: dict[str, list[str]] = {}
        for record in need(read_json(config.file), "annotations", config.file):
            where = f"{config.file}, caption {record.get('id')!r}"
            picture = _name(names, "", need(record, "image_id", where), where)
            captions.setdefault(picture, []).append(need(record, "caption", where))
        kept = {picture: texts for picture, texts in captions.items() if config.holds(picture)}
        self.rows = [
            (picture, text, tuple(texts))
            for picture, texts in kept.items()
            for text in (texts if config.per == "caption" else texts[:1])
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        picture, text, texts = self.rows[index]
        asked = (Image(beside(self.config.images, picture)), Text(self.config.prompt))
        messages = (Message("user", asked), Message("assistant", (Text(text),)))
        return Example(f"{self.config.task}/{picture}/{index}", messages, task=self.config.task, answers=texts)


def _names(path: str) -> dict[Any, str]:
    return {row["id"]: row["file_name"] for row in need(read_json(path), "images", path)}


def _name(names: dict[Any, str] | None, pattern: str, number: Any, where: str) -> str:
    if names is None:
        return pattern.format(number)
    if number not in names:
        raise DataError(f"{where}: its picture {number!r} is not among the {len(names)} pictures listed")
    return names[number]

"""NLVR: a sentence that people wrote about a picture of coloured shapes, true or false (Suhr et al., ACL 2017).

Pictures are read out of tar archives in place: nothing is unpacked.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Literal

from chiasm.data.base import Example, Source, SourceConfig
from chiasm.data.sources.records import need, read_records
from chiasm.errors import DataError
from chiasm.registry import register
from chiasm.types import Image, Message, Text


class NlvrConfig(SourceConfig):
    """``folder`` holds ``manifest.jsonl`` (id, split, image, sentence, label) and the archives with the pictures."""

    type: str = "nlvr"
    folder: str
    splits: tuple[Literal["dev", "test", "hidden"], ...] = ("dev",)
    archives: tuple[str, ...] = ("dev_images.tar", "test_hidden_images_perm0.tar")
    question: str = "{sentence}\nIs this true or false?"


@register("source", "nlvr")
class Nlvr(Source):
    """One example for each sentence; the answer is ``true`` or ``false``."""

    Config = NlvrConfig

    def __init__(self, config: NlvrConfig):
        super().__init__(config)
        folder = Path(config.folder)
        self.records = [r for r in read_records(str(folder / "manifest.jsonl")) if r.get("split") in config.splits]
        self.places = {name: place for archive in config.archives for name, place in _index(folder / archive).items()}
        for record in self.records:
            where = f"{folder / 'manifest.jsonl'}, sample {record.get('id')!r}"
            if need(record, "image", where) not in self.places:
                raise DataError(f"{where}: its picture {record['image']!r} is not in {', '.join(config.archives)}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        archive, offset, size = self.places[record["image"]]
        with archive.open("rb") as file:
            file.seek(offset)
            picture = file.read(size)
        answer = json.dumps(bool(record["label"]))
        asked = (Image(picture), Text(self.config.question.format(sentence=record["sentence"].strip())))
        messages = (Message("user", asked), Message("assistant", (Text(answer),)))
        return Example(f"nlvr/{record['split']}/{record['id']}", messages, task="nlvr", answers=(answer,))

    def hint(self, index: int) -> int:
        """Characters of the sentence, and the picture."""
        return 512 + len(self.records[index]["sentence"])


def _index(path: Path) -> dict[str, tuple[Path, int, int]]:
    """Where each file of an uncompressed tar archive lies. Raises DataError."""
    try:
        with tarfile.open(path, "r:") as archive:
            return {m.name: (path, m.offset_data, m.size) for m in archive if m.isfile()}
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read as a tar archive: {error}") from None

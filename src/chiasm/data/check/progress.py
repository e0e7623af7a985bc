"""What a check has done so far, on disk: a killed check goes on where it was and does nothing twice."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from chiasm.data.check.examine import PICTURE, ROW, Part
from chiasm.data.check.kinds import Finding


class Progress:
    """Parts of a check in a JSONL file, one line each. ``key`` stands for the data and the way it is looked at.

    A file of another key is begun anew; a last line that a kill cut is dropped.
    """

    def __init__(self, path: Path, key: str, fresh: bool = False):
        self.path, self.key = path, key
        self.parts: list[Part] = []
        whole = 0
        if path.is_file() and not fresh:
            whole = self._read()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: BinaryIO = path.open("r+b" if whole else "wb")
        self.file.seek(whole)
        self.file.truncate()
        if not whole:
            self._line({"key": key})

    def add(self, part: Part) -> None:
        """Write a part down; what is written survives a kill."""
        self._line(_dump(part))
        self.parts.append(part)

    def close(self, remove: bool = False) -> None:
        """Close the file, and remove it once the check is whole."""
        self.file.close()
        if remove:
            self.path.unlink()

    def _line(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def _read(self) -> int:
        """The parts of the file; returns the bytes of its whole lines, 0 where the file belongs to another check."""
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    record = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    record = None
                if record is None or (number == 0 and record.get("key") != self.key):
                    break
                if number:
                    self.parts.append(_load(record))
                whole += len(line)
        return whole


def _dump(part: Part) -> dict[str, Any]:
    arrays = {name: base64.b64encode(getattr(part, name).tobytes()).decode() for name in ("rows", "pictures")}
    return {
        "source": part.source,
        "start": part.start,
        **arrays,
        "findings": [[f.source, f.index, f.id, f.kind, f.message] for f in part.findings],
    }


def _load(record: dict[str, Any]) -> Part:
    rows, pictures = (
        np.frombuffer(base64.b64decode(record[name]), kind) for name, kind in (("rows", ROW), ("pictures", PICTURE))
    )
    return Part(record["source"], record["start"], rows, pictures, [Finding(*f) for f in record["findings"]])

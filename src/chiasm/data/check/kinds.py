"""What can be wrong with a sample. A fault would stop training; a remark is worth a look and stops nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of finding. ``title`` is for people, ``remedy`` says what to do about it."""

    title: str
    remedy: str
    fault: bool = True


# The keys are ``DataError.fault``; an error without one is a "record".
KINDS: dict[str, Kind] = {
    "record": Kind("record that cannot be read", "mend the line or leave it out"),
    "role": Kind("unknown role", "name the turns as the format wants it"),
    "placeholders": Kind("placeholders and media differ", "write one placeholder for each picture, where it belongs"),
    "missing_picture": Kind("missing file", "check the path and the folder it should be in"),
    "picture_is_folder": Kind("folder instead of a file", "give the path of one file"),
    "empty_picture": Kind("file of 0 bytes", "restore the file"),
    "broken_picture": Kind("file that cannot be decoded", "restore or convert the file"),
    "oversized_picture": Kind("picture above the pixel cap", "shrink the picture, or raise max_pixels"),
    "medium": Kind("medium that cannot be used", "leave the sample out, or choose a model that takes it"),
    "box": Kind("box that cannot be written", "give boxes in pixels of the original picture"),
    "empty_answer": Kind("empty answer", "give the answer a text, or mark it 'train': false"),
    "no_target": Kind("nothing to learn from", "add an assistant turn that is trained"),
    "too_long": Kind("longer than max_length allows", "raise max_length, or use fewer or smaller media"),
    "truncated": Kind("end cut off at max_length", "raise max_length, or shorten the text", fault=False),
    "odd_picture": Kind("tiny or very long picture", "look at it: it is often an icon or a separator", fault=False),
    "duplicate_picture": Kind("the same picture under another name", "keep one of them", fault=False),
    "duplicate_id": Kind("id used before in its source", "give every sample its own id", fault=False),
    "leaked": Kind("held-out sample that is trained on", "take it out of the training data", fault=False),
    "duplicate_sample": Kind("the same sample again", "keep one of them", fault=False),
}


@dataclass(frozen=True)
class Finding:
    """One thing found in one sample. ``source`` is its source's name, ``index`` its number there."""

    source: str
    index: int
    id: str
    kind: str
    message: str

    @property
    def fault(self) -> bool:
        """Whether it would stop training."""
        return KINDS[self.kind].fault

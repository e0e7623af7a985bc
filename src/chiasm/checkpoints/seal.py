"""The configuration that a folder was saved with, kept beside it, so that an edited ``config.json`` is noticed.

Another ``rope_theta``, activation or layer fits the same tensors and gives another model. The fingerprint therefore
holds a copy of what the configuration said of the network, its methods and its processing; loading compares key by key.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.config import diff
from chiasm.errors import CheckpointError, ConfigError
from chiasm.model_config import VLMConfig

KEY = "config"  # in fingerprint.json
WORDS = "tokenizer_files"  # in fingerprint.json
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "instruction_tokenizer.json")
SEALED = ("model", "methods", "processing")  # weights and provenance are free
TOLD = 5  # keys that an error names

OLDER = (
    "its fingerprint was written before configurations were part of it, so an edit of config.json cannot be noticed; "
    "saving the model again adds it"
)
RESTORE = (
    "Restore config.json (fingerprint.json holds what it said), or, if you mean it, load with ignore_fingerprint=True "
    "(--ignore-fingerprint), which is recorded"
)
log = logging.getLogger("chiasm")


def seal(config: VLMConfig) -> dict[str, Any]:
    """What is kept of a configuration, as JSON values."""
    values = config.dump()
    return {key: values[key] for key in SEALED}


def words_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of the files that say which id each word has, by name."""
    found = (folder / name for name in VOCABULARIES)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found if path.is_file()}


def reworded(folder: Path, stored: Mapping[str, Any]) -> str | None:
    """The vocabulary's file that is not the one that was saved, or None. Probes alone would miss a rare word."""
    now = words_of(folder)
    for name, was in stored.get(WORDS, now).items():
        if now.get(name) != was:
            here = now.get(name, "none")
            return f"{name} is not the file that was saved: its SHA-256 was {was[:12]}, is {here[:12]} now"
    return None


def edited(config: VLMConfig, stored: Mapping[str, Any]) -> str | None:
    """The keys of a configuration that are not what was ``stored``, with both values, or None."""
    kept = stored.get(KEY)
    if not isinstance(kept, Mapping):
        raise CheckpointError(f"the {KEY!r} of the fingerprint holds {type(kept).__name__}, a table was expected")
    now = seal(config)
    try:  # read as config.json is read, so that keys which are new in this version have their defaults on both sides
        before = seal(VLMConfig.parse({**config.dump(), **kept}))
    except ConfigError:  # written for a part that is no longer there
        before = dict(kept)
    found = diff(*({**side, "methods": dict(enumerate(side["methods"]))} for side in (before, now)))
    told = [f"{key} was {was!r:.200}, is {now!r:.200} now" for key, (was, now) in list(found.items())[:TOLD]]
    more = f" and {len(found) - TOLD} more keys" if len(found) > TOLD else ""
    return f"its configuration was edited after it was saved: {'; '.join(told)}{more}" if found else None

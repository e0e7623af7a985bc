"""What is done to a text before a text tower's tokenizer sees it.

``"clip"``: OpenAI's CLIP (ftfy, HTML entities twice, white space collapsed, lower case). ``"siglip"``: big_vision's
``canonicalize`` as transformers has it (lower case, ASCII punctuation taken out, white space collapsed).
``"lower"``: lower case alone (SigLIP 2). ``"albef"``: lower case, punctuation taken out, hyphens and slashes as spaces,
at most 30 words (``pre_caption``). ``"none"``.
Reference: openai/CLIP ``simple_tokenizer.py`` d05afc4; ``SiglipTokenizer`` of transformers 5.23.
"""

from __future__ import annotations

import html
import re
import string
from collections.abc import Callable
from typing import Any, Literal

from chiasm.errors import ConfigError

Cleaning = Literal["none", "clip", "siglip", "lower", "albef"]
_PLAIN = re.compile(r"[\t\n\r\x20-\x25\x27-\x7e]*")  # printable ASCII without "&": ftfy changes nothing there
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def cleaner(how: Cleaning) -> Callable[[str], str]:
    """The function of this name."""
    named: dict[str, Callable[[str], str]] = {"none": str, "clip": _clip, "siglip": _siglip, "lower": str.lower}
    return (named | {"albef": _albef})[how]


def _clip(text: str) -> str:
    if not _PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(_ftfy().fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip().lower()


def _albef(text: str, most: int = 30) -> str:
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower()).replace("-", " ").replace("/", " ")
    return " ".join(re.sub(r"\s{2,}", " ", text.replace("<person>", "person")).strip().split(" ")[:most])


def _siglip(text: str) -> str:
    return re.sub(r"\s+", " ", text.translate(_PUNCTUATION)).lower().strip()


def _ftfy() -> Any:
    """The library that OpenAI's CLIP mends text with; plain English text never needs it."""
    try:
        import ftfy
    except ImportError:
        raise ConfigError(
            "this text has characters beyond plain ASCII, or '&', which CLIP's tokenizer cleans with the ftfy library: "
            "pip install 'chiasm[clip]'"
        ) from None
    return ftfy

"""Names of annotators: their spelling, and the identity that decides whether two spellings are one person."""

from __future__ import annotations

import re
import unicodedata

MAX_NAME_LENGTH = 80
JOINERS = "\u200c\u200d"
"""Invisible, but part of the spelling of emoji and of some scripts."""
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Invisible characters whose Unicode category is not that of format characters."""


def annotator_name(text: str) -> str:
    """Return an annotator's name in NFC, without extra spaces, control characters and invisible characters.

    Raises:
        ValueError: if it is empty or too long.
    """
    visible = (c for c in " ".join(text.split()) if c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    name = " ".join(unicodedata.normalize("NFC", "".join(visible)).split())
    if not 0 < len(name) <= MAX_NAME_LENGTH or not identity(name):
        raise ValueError(f"the annotator's name has {len(name)} characters. Expected 1 to {MAX_NAME_LENGTH}")
    return name


def identity(name: str) -> str:
    """Return the part of a name that tells people apart: case-folded, without anything invisible."""
    visible = INVISIBLE.sub("", name).translate(dict.fromkeys(map(ord, JOINERS)))
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", visible).casefold())
    return " ".join(folded.split())

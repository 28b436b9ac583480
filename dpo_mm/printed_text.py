"""Text for the terminal: control characters of datasets and models as escapes, and paths quoted for a shell."""

from __future__ import annotations

import re
import shlex
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except for tab and newline, marks that change the direction of text, and halves of characters."""


def printable(text: str) -> str:
    r"""Return a text with its control characters as escapes, such as \x1b."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def quoted(path: Any) -> str:
    """Quote a path for a command to copy. A name that begins with a dash is not read as an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)

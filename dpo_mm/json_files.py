"""Read the JSON files that dpo-mm has written. A damaged file gives an error with its path and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path, *, fix: str) -> dict[str, Any]:
    """Read a JSON object in UTF-8.

    Args:
        path: file.
        fix: what to do if it is damaged, as a sentence.

    Raises:
        ValueError: if the content is not a JSON object. It names the file and the fix.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). {fix}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (not a JSON object). {fix}")
    return value

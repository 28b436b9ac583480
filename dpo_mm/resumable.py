"""Make long work resumable: atomic files and recorded settings."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_mm.content_key import check_ingredients

TEMPORARY = re.compile(r"\..+\.[0-9a-f]+\.part")
"""Names of temporary files and folders. They are random, because containers on a shared disk have equal process ids."""
PLAN_FILE = "mining.json"
"""Default name of the record of a folder's settings."""


def temporary_path(path: Path) -> Path:
    """Return a new name for a temporary file or folder next to a path."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


@contextlib.contextmanager
def atomic_write(path: Path, *, fix: str | None = None) -> Iterator[Path]:
    """Context manager that gives a temporary file in the same folder and renames it to `path` at the end.

    If anything fails, the temporary file is removed and `path` is unchanged.

    Args:
        path: file to write.
        fix: advice for the user if writing fails.

    Raises:
        OSError: if `fix` is given and writing fails. The message contains the path, the reason and the fix.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if fix is None:
            raise
        reason = f"could not write {path}: {error.strerror or error}"
        raise OSError(error.errno, f"{reason}. {fix[:1].upper()}{fix[1:]}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_settings_unchanged(
    folder: Path, kind: str, parts: Mapping[str, Any], *, done: str, flag: str = "output_dir", file: str = PLAN_FILE
) -> None:
    """Record what decides the content of a folder's work in the folder, and refuse to continue it with anything else.

    The settings `output_dir` and `batch_size` may change.

    Args:
        folder: output folder. It is created.
        kind: kind of work, a key of `dpo_mm.content_key.INGREDIENTS`.
        parts: its ingredients by name, as values that JSON can hold.
        done: participle for the error, for example "mined".
        flag: name of the setting that chooses the folder, for the error.
        file: name of the record in the folder.

    Raises:
        ValueError: if the folder was begun with other settings. The error names them.
    """
    check_ingredients(kind, parts)
    folder.mkdir(parents=True, exist_ok=True)
    plan = {**parts["settings"], **{name: value for name, value in parts.items() if name != "settings"}}
    settings, record = json.loads(json.dumps(plan)), folder / file
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else settings
    free = ("output_dir", "batch_size")
    changed = [
        f"{name}: {before.get(name)!r:.200} -> {value!r:.200}"
        for name, value in settings.items()
        if name not in free and before.get(name) != value
    ]
    if changed:
        raise ValueError(f"{folder} was {done} with other settings ({', '.join(changed)}). Choose another {flag}")
    with atomic_write(record) as temporary:
        temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")

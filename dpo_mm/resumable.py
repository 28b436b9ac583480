"""Write files atomically: a file is the old or the new one, and never an incomplete one."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = re.compile(r"\..+\.[0-9a-f]+\.part")
"""Names of temporary files and folders. They are random, because containers on a shared disk have equal process ids."""


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

"""Write files atomically: a file is the old or the new one, and never an incomplete one."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

TEMPORARY = re.compile(r"\..+\.[0-9a-f]+\.part")
"""Names of temporary files and folders. They are random, because containers on a shared disk have equal process ids."""
FIX = "free space or choose another folder, and run the same command again"


def temporary_path(path: Path) -> Path:
    """Return a new name for a temporary file or folder next to a path."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


class UnwrittenError(OSError):
    """A file that could not be written. The message has its path, the reason and the fix."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def explain_unwritten(path: Path | str, *, fix: str = FIX) -> Iterator[None]:
    """Context manager that turns every error of a full or broken disk into one OSError with the path and the fix.

    torch and safetensors report a full disk by errors of their own.

    Args:
        path: file or folder that the block writes.
        fix: advice for the user, a sentence.

    Raises:
        OSError: if writing fails. An error that names a file elsewhere, such as an input, is raised unchanged.
    """
    try:
        yield
    except UnwrittenError:
        raise
    except OSError as error:
        if error.filename is not None and not _is_near(error.filename, Path(path)):
            raise
        raise _unwritten(path, error.strerror or str(error), fix, error.errno or errno.EIO) from error
    except Exception as error:
        if "inline_container" in str(error):
            raise _unwritten(path, "torch could not write all of it, the disk is full or broken", fix) from error
        if type(error).__name__ == "SafetensorError":
            raise _unwritten(path, str(error), fix) from error
        raise


def _is_near(name: str | bytes | int, path: Path) -> bool:
    """Return True if a file is in the folder of `path`, or a folder above it."""
    if isinstance(name, int):
        return True
    file, folder = Path(os.fsdecode(name)).absolute(), path.absolute().parent
    return file == folder or folder in file.parents or file in folder.parents


def _unwritten(path: Path | str, reason: str, fix: str, number: int = errno.EIO) -> UnwrittenError:
    path = Path(path)
    shown = path.parent.parent / path.name if TEMPORARY.fullmatch(path.parent.name) else path
    return UnwrittenError(number, f"could not write {shown}: {reason}. {fix[:1].upper()}{fix[1:]}")


@contextlib.contextmanager
def atomic_write(path: Path, *, fix: str = FIX) -> Iterator[Path]:
    """Context manager that gives a temporary file in the same folder and renames it to `path` at the end.

    If anything fails, the temporary file is removed and `path` is unchanged.

    Args:
        path: file to write.
        fix: advice for the user if writing fails.

    Raises:
        OSError: if writing fails. The message contains the path, the reason and the fix.
    """
    temporary = temporary_path(path)
    try:
        with explain_unwritten(path, fix=fix):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def share_files(folder: Path) -> None:
    """Let everyone read the files of a folder who may read the folder. safetensors makes files for their owner only."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def set_aside(path: Path) -> None:
    """Rename a file or folder that is in the way and not ours to remove."""
    if os.path.lexists(path):
        renamed = path.with_name(f"{path.name}.{secrets.token_hex(4)}.old")
        logger.warning("%s has changed or was not made by this command. It is now %s", path, renamed)
        path.rename(renamed)

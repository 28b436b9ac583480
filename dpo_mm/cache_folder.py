"""Folder of stored work that can be made again: encoded pairs, reference log-probs, and the judges' files."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Return $DPO_MM_CACHE, or dpo-mm in the user's cache folder.

    If the user has no home directory, or cannot write it, it is a folder in the temporary folder.
    """
    if given := os.environ.get("DPO_MM_CACHE"):
        return Path(given)
    return _default(os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))


@functools.cache
def _default(cache: str | None, home: str | None) -> Path:
    try:
        folder = Path(cache or Path.home() / ".cache") / "dpo-mm"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        pass
    return _own_folder(Path(tempfile.gettempdir()) / f"dpo-mm-{_user()}")


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _own_folder(folder: Path) -> Path:
    """Create a folder that only this user can read. If another user has made one of that name, take a new name."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if folder.is_dir() and not folder.is_symlink() and status.st_uid == _user() and not status.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="dpo-mm-"))

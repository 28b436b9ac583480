"""Folder of stored work that can be made again: encoded pairs, reference log-probs, and the judges' files."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

from dpo_mm.files.resumable import explain_unwritten


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


def create_cache(folder: Path) -> None:
    """Create a folder of the cache. Raise OSError with the fix if it cannot be written."""
    with explain_unwritten(folder, fix="Set DPO_MM_CACHE to a folder that you can write"):
        folder.mkdir(parents=True, exist_ok=True)


def set_hub_cache() -> None:
    """Set HF_HOME to a folder of the cache for a user who cannot write the default one. Call it before the libraries load."""
    if "HF_HOME" in os.environ or "XDG_CACHE_HOME" in os.environ:
        return
    home = Path(os.path.expanduser("~"))  # "~" if the user has no home directory
    default = home / ".cache" / "huggingface"
    exists = next((path for path in (default, *default.parents) if path.exists()), default)
    if str(home) == "~" or not (default.is_dir() or (exists.is_dir() and os.access(exists, os.W_OK))):
        os.environ["HF_HOME"] = str(cache_folder() / "huggingface")


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

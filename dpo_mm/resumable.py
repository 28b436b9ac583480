"""Make long work resumable: atomic files, recorded settings, clean exit on SIGTERM."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import signal
import sys
import threading
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
    before = json.loads(record.read_text()) if record.exists() else settings
    free = ("output_dir", "batch_size")
    changed = [
        f"{name}: {before.get(name)!r:.200} -> {value!r:.200}"
        for name, value in settings.items()
        if name not in free and before.get(name) != value
    ]
    if changed:
        raise ValueError(f"{folder} was {done} with other settings ({', '.join(changed)}). Choose another {flag}")
    with atomic_write(record) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))


@contextlib.contextmanager
def exit_cleanly_on_sigterm() -> Iterator[None]:
    """Context manager in which SIGTERM ends the process with status 143 and a message.

    Work that was completed before is on disk. It does nothing if a handler is already set, or outside the main thread.
    """

    def stop(number: int, frame: Any) -> None:
        print("interrupted by SIGTERM. Completed work is saved, and the same command resumes it", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StopRequest:
    """A request to stop, set by SIGTERM, for work that completes and saves its current part before it ends."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Context manager in which the first SIGTERM sets `requested` and the second ends the process at once.

        It does nothing outside the main thread, because only that can handle signals.
        """

        def request(number: int, frame: Any) -> None:
            self.requested = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        try:
            before = signal.signal(signal.SIGTERM, request)
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

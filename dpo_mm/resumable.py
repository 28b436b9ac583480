"""What lets work be cut and go on: files that are whole or not there, folders that know what they are made with, the shards
that are left, and an end when asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PLAN_FILE = "mining.json"


@contextlib.contextmanager
def atomic_write(path: Path, *, fix: str | None = None) -> Iterator[Path]:
    """A file beside `path` to write to, renamed to it in the end; gone where anything fails.

    fix: what a user can do about it; with it an OSError says that `path` could not be written, why, and this.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        if fix is None:
            raise
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}; {fix}") from error
    finally:
        beside.unlink(missing_ok=True)


def check_settings_unchanged(
    folder: Path, plan: Mapping[str, Any], *, done: str, flag: str = "output_dir", file: str = PLAN_FILE
) -> None:
    """Note the settings that a folder is made with; where it goes and how much at once are free to change.

    done, flag: what was done to it and which setting names it, for the error.
    Raises ValueError where it was begun with other settings, and which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now, kept = json.loads(json.dumps(plan)), folder / file
    before = json.loads(kept.read_text()) if kept.exists() else now
    free = ("output_dir", "batch_size")
    changed = [
        f"{k}: {before.get(k)!r:.200} -> {v!r:.200}" for k, v in now.items() if k not in free and before.get(k) != v
    ]
    if changed:
        raise ValueError(f"{folder} was {done} with other settings ({'; '.join(changed)}); choose another {flag}")
    with atomic_write(kept) as beside:
        beside.write_text(json.dumps(now, indent=1))


def missing_shards(places: Sequence[Path]) -> list[int]:
    """The shards that this process (RANK of WORLD_SIZE) has still to make, by number."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return [number for number in range(rank, len(places), world) if not places[number].exists()]


@contextlib.contextmanager
def exit_cleanly_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the process with status 143, what is finished is there; a handler that is set is left alone."""

    def stop(number: int, frame: Any) -> None:
        print("stopped as asked; what was finished is kept, the same command goes on from there", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StopRequest:
    """A request to stop that SIGTERM sets, for work that finishes a part and saves before it ends."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Context manager in which the first SIGTERM sets `requested` and the second ends the process at once.

        It does nothing outside the main thread, which alone can handle signals.
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

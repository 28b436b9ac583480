"""Output folders: a command changes only what it made itself, and one process at a time writes to a folder.

A folder of ours has a record of its kind and settings (a key of RECORDS), written before any other file, and COMPLETE
when its result is finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_mm.assets import resolve_asset
from dpo_mm.files.checksums import (
    COMPLETE,
    changed_files,
    complete_files,
    made_files,
    remove_unchanged_files,
    write_complete,
)
from dpo_mm.files.content_key import check_ingredients, file_hash
from dpo_mm.files.resumable import TEMPORARY, atomic_write, explain_unwritten, share_files, temporary_path
from dpo_mm.process.process_rank import process_rank

RECORDS = {
    "dpo_mm.json": "a training run",
    "mining.json": "mined pairs",
    "comparison.json": "a comparison",
    "rounds.json": "rounds of a recipe",
    "import.json": "an imported dataset",
    "samples.json": "images to label",
    "scoring.json": "scores of judges",
    "export.json": "an exported run",
}
"""Record of each kind of output folder, and what the folder is called in errors."""
LOCK = ".lock"
KIND = "kind"
FREE_TO_CHANGE = ("output_dir", "output", "batch_size", "workers", "resume", "overwrite", "server", "server_timeout")
"""Settings that do not decide a result."""
REMOVAL_TIMEOUT_S = 600.0
"""Seconds that other processes wait for the first one to remove an earlier result."""
STALE_S = 3600.0
"""Age in seconds from which a temporary file of a folder that processes share is a killed process's."""


@dataclass(frozen=True)
class OutputKind:
    """Kind of an output folder.

    Args:
        record: name of the file with the settings, a key of RECORDS.
        done: participle for errors, for example "mined".
        flag: setting that chooses the folder, for errors.
        results: files that the command writes into the folder at its end, see `write_results`.
        parts: patterns of subfolders with files of the command.
        free: settings that may differ from the recorded ones.
        defaults: values of settings that a record lacks because an earlier version wrote it.
    """

    record: str
    done: str
    flag: str = "output_dir"
    results: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    free: tuple[str, ...] = FREE_TO_CHANGE
    defaults: Mapping[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def output_folder(
    folder: Path,
    kind: OutputKind,
    settings: Mapping[str, Any],
    *,
    inputs: Sequence[str | None] = (),
    overwrite: bool = False,
    continues: bool = False,
) -> Iterator[bool]:
    """Context manager in which this process may write to a folder. Enter it before any work that takes long.

    The folder is created and its settings are recorded. The first process (RANK 0) locks it and removes the temporary files
    of killed processes.

    Args:
        folder: output folder.
        kind: kind of output.
        settings: everything that decides the result, by name, as values for JSON.
        inputs: files, folders and bundled assets that the command reads. Other names are ignored.
        overwrite: remove an earlier result of this kind first, unless a file of it has changed. Unfinished work of the same
            settings is continued.
        continues: a finished result is continued.

    Yields:
        True if the folder has the finished result of these settings. Nothing is locked or written then.

    Raises:
        ValueError: if the folder is an input, has files that dpo-mm did not make, has another result, or another process
            writes to it.
    """
    first = process_rank().is_first
    plain = {KIND: RECORDS[kind.record], **json.loads(json.dumps(settings))}
    refuse_foreign_folder(folder, kind, inputs=inputs)
    if not overwrite and _is_finished(folder, kind, plain) and not continues:
        yield True
        return
    is_new = not folder.exists()
    with explain_unwritten(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_output(folder / LOCK, folder, kind.flag) if first else contextlib.nullcontext():
            refuse_foreign_folder(folder, kind, inputs=inputs)  # again, now that no other process can change it
            finished = not overwrite and _is_finished(folder, kind, plain) and not continues
            if not finished:
                _prepare(folder, kind, plain, overwrite=overwrite)
            try:
                yield finished
            except BaseException:
                if not finished and _has_no_work(folder, kind):
                    (folder / kind.record).unlink(missing_ok=True)
                raise
    finally:
        if is_new and first:
            with contextlib.suppress(OSError):  # it has files
                folder.rmdir()


def _prepare(folder: Path, kind: OutputKind, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Remove an earlier result and temporary files of killed processes, and record the settings."""
    has_other_result = lambda: overwrite and bool(differences(folder, kind, settings) or complete_files(folder))
    if process_rank().is_first:
        if has_other_result():
            _remove_result(folder, kind)
        remove_stale_files(folder.glob(".*"))
    deadline = time.monotonic() + REMOVAL_TIMEOUT_S
    while not process_rank().is_first and has_other_result():
        if time.monotonic() > deadline:
            raise ValueError(f"{folder}: the first process (RANK 0) has not removed the earlier result. Start it too")
        time.sleep(0.1)
    recorded = [folder / COMPLETE, *(path / kind.record for pattern in kind.parts for path in folder.glob(pattern))]
    if not any(path.is_file() for path in recorded):
        _write_record(folder / kind.record, settings)


def settings_of(work: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings to record for a kind of stored work.

    Args:
        work: a key of `dpo_mm.files.content_key.INGREDIENTS`.
        parts: its ingredients by name.
    """
    check_ingredients(work, parts)
    return {**parts["settings"], **{name: value for name, value in parts.items() if name != "settings"}}


def _write_record(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a folder, unless they are in it already."""
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


# Checks, which change nothing


def refuse_foreign_folder(folder: Path, kind: OutputKind, *, inputs: Sequence[str | None] = ()) -> None:
    """Raise ValueError if a folder is not for the output of a command: an input, or with files of others.

    Args:
        folder, kind, inputs: as in `output_folder`.
    """
    other = f"Choose another {kind.flag}"
    refuse_input(folder, inputs, other, is_folder=True)
    if folder.is_symlink():
        raise ValueError(f"{kind.flag} {folder} is a link. Give the folder that it points to")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{kind.flag} {folder} is not a folder. {other}")
    if read_record(folder / kind.record) is not None:
        return
    for record, name in RECORDS.items():
        if record != kind.record and read_record(folder / record) is not None:
            raise ValueError(f"{folder} contains {name}. {other}")
    foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path))
    if kind.record in foreign and read_record(folder / kind.record) is not None:
        return  # another process of the run has written it since the look above
    if foreign:
        names = ", ".join([*foreign[:3], *(["..."] if len(foreign) > 3 else [])])
        hint = f", or restore {folder / kind.record} if it is of dpo-mm: it is damaged" * (kind.record in foreign)
        raise ValueError(f"{folder} has files that dpo-mm did not make ({names}). {other}{hint}")


def _is_ours(path: Path) -> bool:
    """Return True for hidden files, which no command replaces, and for subfolders with a record."""
    if path.name.startswith("."):
        return True
    return path.is_dir() and not path.is_symlink() and any(read_record(path / name) is not None for name in RECORDS)


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the settings of a folder of ours, None if the file does not exist or another program wrote it."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.get(KIND) == RECORDS[path.name] else None


def refuse_input(output: Path, inputs: Iterable[str | None], other: str, *, is_folder: bool) -> None:
    """Raise ValueError if an output is an input, or lies in an input folder that it would change.

    A file changes a folder if the folder has files of its type.
    """
    resolved = output.resolve()
    for name in inputs:
        source = Path(resolve_asset(name)) if name else None
        if source is None or not source.exists():
            continue
        real = source.resolve()
        if real == resolved or (output.exists() and output.samefile(source)):
            raise ValueError(f"{output} is an input of the command ({name}). {other}")
        if source.is_dir() and real in resolved.parents:
            suffixes = {path.suffix for path in source.iterdir() if path.is_file()}
            if is_folder or output.suffix in suffixes:
                raise ValueError(f"{output} lies in an input of the command ({name}). {other}")


def _is_finished(folder: Path, kind: OutputKind, settings: Mapping[str, Any]) -> bool:
    """Return True if a folder has the finished result of these settings, False if it has none yet or a file is missing.

    Raises:
        ValueError: if it has another result, or a file of the result has changed.
    """
    if read_record(folder / kind.record) is None or _has_no_work(folder, kind):
        return False
    if changed := differences(folder, kind, settings):
        raise ValueError(
            f"{folder} was {kind.done} with other settings ({', '.join(changed)}). Choose another {kind.flag}, or replace it with "
            "--overwrite"
        )
    result = complete_files(folder)
    if names := changed_files(folder, result, missing=False):
        raise ValueError(f"{folder}: {names[0]} has changed since it was written. Choose another {kind.flag}")
    foreign = [name for name in kind.results if name not in result and os.path.lexists(folder / name)]
    if foreign:
        raise ValueError(
            f"{folder / foreign[0]} exists, and dpo-mm did not make it, or {COMPLETE} is damaged. Move it, or choose another {kind.flag}"
        )
    return bool(result) and all((folder / name).is_file() for name in result if not name.endswith(".md"))


def differences(folder: Path, kind: OutputKind, settings: Mapping[str, Any]) -> list[str]:
    """Settings that decide the result and differ from those of the folder's record, as text."""
    record = read_record(folder / kind.record)
    before = {**kind.defaults, **record} if record else {}
    named = (_changes(name, before.get(name), value) for name, value in settings.items() if name not in kind.free)
    return [change for changes in named for change in changes]


def _changes(name: str, before: Any, value: Any) -> list[str]:
    """Return what differs between two values of a setting, as text. Values within a group have its name before theirs."""
    if isinstance(before, dict) and isinstance(value, dict):
        inner = (_changes(f"{name}.{key}", before.get(key), value.get(key)) for key in before | value)
        return [change for changes in inner for change in changes]
    return [] if before == value else [f"{name}: {before!r:.200} -> {value!r:.200}"]


def _has_no_work(folder: Path, kind: OutputKind) -> bool:
    """Return True if nothing of this kind was made in a folder yet. It may have subfolders of other kinds."""
    return all(
        path.name in (kind.record, LOCK)
        or TEMPORARY.match(path.name)
        or (path.is_dir() and _is_ours(path) and not any(path.match(pattern) for pattern in kind.parts))
        for path in folder.iterdir()
    )


# Changes


@contextlib.contextmanager
def write_results(folder: Path) -> Iterator[Path]:
    """Context manager that gives a temporary folder. At its end, the files and folders in it become the result of `folder`.

    COMPLETE is written first, so that an interruption leaves no file that it does not list.
    """
    temporary = temporary_path(folder / "result")
    try:
        temporary.mkdir()
        yield temporary
        share_files(temporary)
        if files := sorted(path for path in temporary.rglob("*") if path.is_file()):
            write_complete(folder, {path.relative_to(temporary).as_posix(): file_hash(path) for path in files})
        for path in sorted(temporary.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_result(folder: Path, kind: OutputKind) -> None:
    """Remove the files of an earlier result, if all of them are unchanged.

    Raises:
        ValueError: if one has changed. Then nothing is removed.
    """
    folders = [folder, *(path for pattern in kind.parts for path in folder.glob(pattern) if path.is_dir())]
    for part in folders:
        if names := changed_files(part, made_files(part), missing=False):
            raise ValueError(
                f"{part / names[0]} has changed since it was written, and overwrite removes only unchanged files. Move it, or "
                f"choose another {kind.flag}"
            )
    for part in reversed(folders):
        remove_unchanged_files(part)
        if read_record(part / kind.record):
            (part / kind.record).unlink()
        if part != folder:
            with contextlib.suppress(OSError):  # it has other files
                part.rmdir()


def remove_stale_files(paths: Iterable[Path], *, shared: bool = False) -> None:
    """Remove temporary files and folders of killed processes.

    Args:
        paths: files and folders. Those with other names are left.
        shared: other processes may write to the folder, as those of one run do. Then only what is older than STALE_S is
            removed.
    """
    shared = shared or process_rank().count > 1
    for path in paths:
        with contextlib.suppress(OSError):  # another process removed it, or it is not ours to remove
            if TEMPORARY.match(path.name) and (not shared or time.time() - path.lstat().st_mtime > STALE_S):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def lock_output(path: Path, output: Path, flag: str) -> Iterator[None]:
    """Hold the lock of an output. The process id of its holder is in the file.

    Raises:
        ValueError: if another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = path.read_text(encoding="utf-8") if path.is_file() else ""
        raise ValueError(
            f"{output} is in use by process {holder or '(unknown)'}. Wait for it, or choose another {flag}"
        ) from None
    try:
        with explain_unwritten(path):
            path.write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()

"""Output files: a command replaces only a file that dpo-mm wrote, and only with `overwrite`.

An output file has its checksum in a hidden file next to it.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dpo_mm.files.checksums import checksum_path, is_unchanged, write_with_checksum
from dpo_mm.files.content_key import file_hash
from dpo_mm.files.outputs import LOCK, lock_output, refuse_input, remove_stale_files
from dpo_mm.files.resumable import explain_unwritten, temporary_path
from dpo_mm.process.process_rank import process_rank


def _refuse_foreign_file(path: Path, *, inputs: Iterable[str | None] = ()) -> None:
    """Raise ValueError if a file is not for the output of a command: an input, no regular file, or not ours.

    Args:
        path, inputs: as in `output_files`.
    """
    other = "Choose another output"
    refuse_input(path, inputs, other, is_folder=False)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"output {path} is a link, a folder or a device. Expected a file. {other}")
    if path.exists() and not is_unchanged(path):
        raise ValueError(f"{path} exists, and dpo-mm did not make it or it has changed since. {other}")


@contextlib.contextmanager
def output_files(paths: Sequence[Path], *, inputs: Iterable[str | None] = ()) -> Iterator[None]:
    """Context manager in which this process may write files with `write_file`. Enter it before any work that takes long.

    Args:
        paths: output files. The first has the lock.
        inputs: files, folders and bundled assets that the command reads. Other names are ignored.

    Raises:
        ValueError: if a file is an input, dpo-mm did not make it, or another process writes to it.
    """
    inputs = tuple(inputs)
    for path in paths:
        _refuse_foreign_file(path, inputs=inputs)
    first = paths[0]
    first.parent.mkdir(parents=True, exist_ok=True)
    lock = (
        lock_output(first.with_name(f".{first.name}{LOCK}"), first, "output")
        if process_rank().is_first
        else contextlib.nullcontext()
    )
    with lock:
        for path in paths:
            _refuse_foreign_file(path, inputs=inputs)
            for file in (path, checksum_path(path)):
                remove_stale_files(path.parent.glob(f".{glob.escape(file.name)}.*"))
        yield


@contextlib.contextmanager
def write_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Context manager that gives a temporary file and renames it to an output file, with its checksum next to it.

    An output file with the same content is unchanged.

    Raises:
        ValueError: if it has another content, unless overwrite.
    """
    temporary = temporary_path(path)
    try:
        with explain_unwritten(path):
            yield temporary
        if path.exists():
            if file_hash(path) == file_hash(temporary):
                return
            if not overwrite:
                raise ValueError(f"{path} has another result. Choose another output, or replace it with --overwrite")
            path.unlink()
        with write_with_checksum(path) as final:
            temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)

"""Wait for the shards that other processes of a run write into a folder that all of them see."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dpo_mm.process.process_rank import wait_for_others

SHARED_CACHE = "set DPO_MM_CACHE to one on a shared disk"


def wait_for_files(paths: Iterable[Path], folder: Path, *, fix: str = SHARED_CACHE) -> None:
    """Wait until all files exist. Polling has no time limit for the whole, unlike a barrier of processes.

    Args:
        paths: the files.
        folder: folder in which they appear.
        fix: end of the error.

    Raises:
        ValueError: if no new file appears in the folder for half an hour, see `wait_for_others`.
    """
    expected = list(paths)
    missing = lambda: next((str(path) for path in expected if not path.exists()), None)
    wait_for_others(missing, lambda: sum(1 for _ in folder.iterdir()), fix=fix)

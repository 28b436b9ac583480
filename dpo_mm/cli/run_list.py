"""List the training runs below a folder, with the comparisons that were made of them. Only files that runs wrote are read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpo_mm.config import TrainConfig, as_dict, default_settings
from dpo_mm.files.checksums import COMPLETE
from dpo_mm.files.content_key import RECORDS_OF_TRAINING
from dpo_mm.files.outputs import KIND, RECORDS

_, RUN_FILE, LOG_FILE = RECORDS_OF_TRAINING
COMPARISON_FILE, METRICS_FILE = "comparison.json", "metrics.json"
INSIDE_RUN = re.compile(r"checkpoint-\d+|\..*")
"""Names of folders that belong to a run and have a record like it."""
NOT_COMPARED = ("output_dir", "run_name", "logging_dir", "report_to", "resume", "overwrite", "workers")
"""Settings that do not tell runs apart."""
ALWAYS_NAMED = ("model", "objective")
"""Settings that are named even if they are the same in all runs."""


@dataclass(frozen=True)
class ComparedRun:
    """A comparison of a run with its base: its folder, its verdict, and its primary metric."""

    folder: str
    verdict: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    date: str

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self.low:+.3f} to {self.high:+.3f})"
        return f"{self.metric} {self.difference:+.3f}{interval}"


@dataclass(frozen=True)
class ListedRun:
    """A training run.

    Args:
        folder: its folder, below the listed one.
        finished: whether it has its result.
        step: last step of the log of a finished run, or of the newest checkpoint of another one. 0: none.
        steps: steps of the settings.
        date: when its result or its settings were written, as 2026-11-28 09:30.
        settings: by name.
        comparisons: the newest first.
    """

    folder: str
    finished: bool
    step: int
    steps: int
    date: str
    settings: Mapping[str, Any]
    comparisons: tuple[ComparedRun, ...] = ()

    @property
    def progress(self) -> str:
        """Steps of a finished run, or how far another one has come."""
        if self.finished:
            return f"{self.step:,}"
        return f"unfinished, {self.step:,} of {self.steps:,}"


class RunList(NamedTuple):
    """Runs by folder, and a line for each file that is not readable."""

    runs: tuple[ListedRun, ...]
    damaged: tuple[str, ...]

    def differing(self) -> list[str]:
        """Names of the settings that differ between the runs, in the order of TrainConfig."""
        names = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in NOT_COMPARED]
        values = lambda name: {json.dumps(run.settings.get(name), sort_keys=True) for run in self.runs}
        return [name for name in names if len(values(name)) > 1]

    def common(self) -> dict[str, str]:
        """Model and objective, if they are the same in all runs."""
        first = self.runs[0].settings if self.runs else {}
        return {name: shown(first.get(name)) for name in ALWAYS_NAMED if first and name not in self.differing()}

    def as_dict(self) -> dict[str, Any]:
        """Return the runs as plain values for JSON."""
        return {"runs": [as_dict(run) for run in self.runs], "damaged": list(self.damaged)}


def shown(value: Any) -> str:
    """Return a setting as text for a table."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {number}" for name, number in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def list_runs(folder: str | Path) -> RunList:
    """List the training runs in a folder and below it.

    Args:
        folder: an existing folder.

    Raises:
        ValueError: if it is no folder, or has no run.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder. Give a folder with output folders of dpo-mm train")
    runs: dict[Path, ListedRun] = {}
    compared: list[tuple[list[Path], ComparedRun]] = []
    damaged: list[str] = []
    for place in _folders(root):
        if (place / RUN_FILE).is_file() and (run := _read(place, root, _run, damaged)):
            runs[place.resolve()] = run
        is_compared = (place / COMPARISON_FILE).is_file() and (place / METRICS_FILE).is_file()
        if is_compared and (pair := _read(place, root, _comparison, damaged)):
            compared.append(pair)
    if not runs and not damaged:
        raise ValueError(f"{folder}: no training run in or below it. Expected folders with {RUN_FILE}")
    for places, comparison in sorted(compared, key=lambda pair: pair[1].date, reverse=True):
        for place in [place for place in places if place in runs][:1]:
            run = runs[place]
            runs[place] = dataclasses.replace(run, comparisons=(*run.comparisons, comparison))
    return RunList(tuple(runs[place] for place in sorted(runs)), tuple(damaged))


def _folders(root: Path) -> Iterator[Path]:
    for parent, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not INSIDE_RUN.fullmatch(name))
        yield Path(parent)


def _read(place: Path, root: Path, read: Any, damaged: list[str]) -> Any:
    """Read a run or a comparison. A file that is not readable gives a line, and a record of something else nothing."""
    try:
        return read(place, root)
    except _DamagedFileError as error:
        damaged.append(str(error))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, StopIteration, OSError) as error:
        damaged.append(
            f"{place}: an entry of its files is missing or of another type ({type(error).__name__}: {error})"
        )
    return None


class _DamagedFileError(Exception):
    """A file that is not JSON of the expected kind."""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _DamagedFileError(f"{path}: not readable ({type(error).__name__}). The rest is listed") from error
    if not isinstance(content, dict):
        raise _DamagedFileError(f"{path}: not readable (no JSON object). The rest is listed")
    return content


def _run(place: Path, root: Path) -> ListedRun | None:
    record = _json(place / RUN_FILE)
    if record.get(KIND) != RECORDS[RUN_FILE]:
        return None
    known = default_settings(TrainConfig) | record
    settings = {field.name: known[field.name] for field in dataclasses.fields(TrainConfig) if field.name in known}
    finished = (place / COMPLETE).is_file()
    step = _last_step(_json(place / LOG_FILE), int(record["steps"])) if finished else _newest_checkpoint(place)
    written = place / (COMPLETE if finished else RUN_FILE)
    return ListedRun(_below(place, root), finished, step, int(record["steps"]), _date(written), settings)


def _last_step(log: dict[str, Any], steps: int) -> int:
    """Last step in the log of a finished run, or its steps if it was too short to log one."""
    return max((int(entry.get("step", 0)) for entry in log["history"]), default=steps)


def _newest_checkpoint(place: Path) -> int:
    names = (path.name.removeprefix("checkpoint-") for path in place.glob("checkpoint-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _comparison(place: Path, root: Path) -> tuple[list[Path], ComparedRun] | None:
    """Return a comparison, and the folders in which its adapter may be now: where it was, and inside the comparison's."""
    record, metrics = _json(place / COMPARISON_FILE), _json(place / METRICS_FILE)
    if record.get(KIND) != RECORDS[COMPARISON_FILE] or not record.get("adapter"):
        return None
    adapter = Path(str(record["adapter"]))
    primary = next(row for row in metrics["comparisons"] if row["headline"])
    numbers = [None if primary[name] is None else float(primary[name]) for name in ("difference", "low", "high")]
    if any(number is not None and not math.isfinite(number) for number in numbers):
        raise ValueError("a number is not finite")
    difference, low, high = numbers
    result = ComparedRun(
        _below(place, root), str(metrics["verdict"]), str(primary["metric"]), float(difference or 0), low, high, _date(place / METRICS_FILE)
    )  # fmt: skip
    return [adapter.resolve(), (place / adapter.name).resolve(), (place.parent / adapter.name).resolve()], result


def _below(place: Path, root: Path) -> str:
    return place.relative_to(root).as_posix()


def _date(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))

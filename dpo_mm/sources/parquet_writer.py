"""Canonical rows as Parquet, a shard at a time: written aside, then renamed; a run that was cut goes on with its shard.

`import.json` beside the shards says what was imported, how far it came, and what was left out and why.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_mm.resumable import atomic_write

if TYPE_CHECKING:
    from datasets import Features

Row = dict[str, Any]
PROGRESS = "import.json"
SHARD_ROWS, SHARD_BYTES, GROUP_BYTES = 10_000, 2**28, 2**25
"""Of a shard at most, and of what is held in memory before it goes into the shard as a group."""


class LeftOut(NamedTuple):
    """What a converter yields instead of a row; reasons are counted, so they say nothing of the row itself."""

    reason: str


Item = Row | LeftOut


@dataclass
class ImportState:
    """What import.json holds. units: raw rows (or items, of sets that are grouped) that are done with."""

    settings: dict[str, Any]
    units: int = 0
    rows: int = 0
    shards: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    preferences: dict[str, int] = field(default_factory=dict)
    complete: bool = False

    def save(self, folder: Path) -> None:
        with atomic_write(folder / PROGRESS) as beside:
            beside.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False))


def resume(folder: Path, settings: dict[str, Any]) -> ImportState:
    """Where an import into a folder stands. Raises ValueError where the folder holds something else."""
    file = folder / PROGRESS
    for left in folder.glob(".part-*"):  # of a run that was killed
        left.unlink()
    if file.exists():
        held = ImportState(**json.loads(file.read_text()))
        if not held.units:  # nothing was written yet
            held.settings = settings
        odd = [name for name in settings if held.settings.get(name) != settings[name]]
        if odd:
            name = odd[0]
            raise ValueError(
                f"{folder} holds an import with {name} {held.settings.get(name)!r}, not {settings[name]!r}; "
                "take another folder, or remove it"
            )
        return held
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is there and holds no import; take an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    fresh = ImportState(settings)
    fresh.save(folder)  # what is unpacked here before the first shard is there is ours too
    return fresh


def write(
    units: Iterable[list[Item]],
    folder: Path,
    features: Features,
    state: ImportState,
    *,
    limit: int | None,
    finish: Callable[[Row], Item],
    advance: Callable[[int], None],
) -> ImportState:
    """Write what the units hold after those that are done. finish: fetches a row's pictures, or says why not.

    Raises OSError where the disk is full; what was written stays, and the next run goes on from it.
    """
    shard = _Shard(folder, features, state)
    try:
        for unit in units:
            if limit is not None and shard.rows_so_far >= limit:
                break
            for item in unit:
                item = item if isinstance(item, LeftOut) else finish(item)
                if isinstance(item, LeftOut):
                    shard.leave_out(item.reason)
                elif limit is None or shard.rows_so_far < limit:
                    shard.add(item)
            shard.end_unit()
            advance(1)
        shard.close()
    finally:
        shard.discard()
    state.complete = True
    state.save(folder)
    return state


class _Shard:
    """The shard that is being written; what it adds to the state counts once it has its name."""

    def __init__(self, folder: Path, features: Features, state: ImportState) -> None:
        self.folder, self.features, self.state = folder, features, state
        self._fresh()

    def _fresh(self) -> None:
        self.rows: list[Row] = []
        self.held, self.bytes, self.count, self.units = 0, 0, 0, 0
        self.left_out: Counter[str] = Counter()
        self.preferences: Counter[str] = Counter()
        self.writer: Any = None
        self.name = f"part-{len(self.state.shards):05}.parquet"
        self.aside = self.folder / f".{self.name}.{os.getpid()}"

    @property
    def rows_so_far(self) -> int:
        return self.state.rows + self.count

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] += 1
        self.state.examples.setdefault(reason, f"raw row {self.state.units + self.units}")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.count += 1
        self.held += _size(row)
        if "preference" in row:
            self.preferences[row["preference"]] += 1
        if self.held > GROUP_BYTES:
            self._flush()

    def end_unit(self) -> None:
        self.units += 1
        if self.count >= SHARD_ROWS or self.bytes + self.held >= SHARD_BYTES:
            self.close()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.rows:
            return
        schema = self.features.arrow_schema
        table = pa.Table.from_pylist([{name: row.get(name) for name in self.features} for row in self.rows], schema)
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.aside, schema, use_dictionary=False, write_statistics=False)
        self.writer.write_table(table)
        self.bytes, self.held, self.rows = self.bytes + self.held, 0, []

    def close(self) -> None:
        self._flush()
        if self.writer is not None:
            self.writer.close()
            self.aside.replace(self.folder / self.name)
            self.state.shards.append(self.name)
        self.state.units += self.units
        self.state.rows += self.count
        for name, counts in (("left_out", self.left_out), ("preferences", self.preferences)):
            setattr(self.state, name, dict(Counter(getattr(self.state, name)) + counts))
        self.state.save(self.folder)
        self._fresh()

    def discard(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.aside.unlink(missing_ok=True)


def _size(row: Row) -> int:
    """Bytes of a row's pictures, and a guess at the rest."""
    cells: Iterator[Any] = iter([row.get("image_a"), row.get("image_b"), *(row.get("images") or [])])
    return 2000 + sum(len(cell["bytes"] or b"") for cell in cells if cell)

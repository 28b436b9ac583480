"""Write rows as Parquet shards. An interrupted import resumes with the shard that it was writing.

A shard is written to a temporary file and then renamed. `import.json` in the same folder records the import's settings,
its progress, and the rows that were left out, by reason.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_mm.data.lazy_images import source_cells
from dpo_mm.data.parquet import PAGE_CHECKSUMS
from dpo_mm.data.row_files import IMPORT_STATE
from dpo_mm.errors import name_row
from dpo_mm.files.content_key import file_hash
from dpo_mm.files.outputs import LOCK, RECORDS, OutputKind, lock_output, read_record, refuse_foreign_folder
from dpo_mm.files.resumable import atomic_write, explain_unwritten, set_aside, temporary_path
from dpo_mm.sources.raw_rows import ORIGIN

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

Row = dict[str, Any]
INPUT_HASH = "input_hash"
"""Setting with the hash of the files that decide the rows. Imports of earlier versions have none."""
IMPORT = OutputKind(IMPORT_STATE, "imported", flag="folder")
UNFINISHED = re.compile(r"\.part-\d+\.parquet\..+")
SHARD_ROWS, SHARD_BYTES, GROUP_BYTES = 10_000, 2**28, 2**25
"""Largest number of rows and of bytes of a shard, and the number of bytes in memory before a row group is written."""
ROWS_AS_OBJECTS = 256
"""Rows that are Python objects at a time. With thousands of them the garbage collector takes a third of the time."""


class ChangedImportError(ValueError):
    """An import whose files are missing or have changed since they were written."""


class LeftOut(NamedTuple):
    """A row that a converter leaves out. Rows are counted by reason, so a reason does not quote the row.

    Args:
        reason: why, without a name of the row.
        where: name of the row, and of its image. "" if it is not known.
    """

    reason: str
    where: str = ""


Item = Row | LeftOut


def row_name(row: Row) -> str:
    """Return the name of a converted row for errors: file and row, or its id."""
    return str(row.get(ORIGIN) or f"row {row.get('id')}")


@dataclass
class ImportState:
    """Contents of import.json.

    Args:
        settings: settings of the import.
        units: number of raw rows that are done, or of items if the rows are grouped.
        rows: number of rows written.
        shards: names of the complete shards.
        left_out: number of rows left out, by reason.
        examples: first row left out, by reason.
        preferences: number of rows by preference, of image pairs.
        complete: True if all rows are written.
        checksums: checksum of each shard.
        kind: name of this kind of folder.
    """

    settings: dict[str, Any]
    units: int = 0
    rows: int = 0
    shards: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    preferences: dict[str, int] = field(default_factory=dict)
    complete: bool = False
    checksums: dict[str, str] = field(default_factory=dict)
    kind: str = RECORDS[IMPORT_STATE]

    def save(self, folder: Path) -> None:
        """Write the state to the import's folder."""
        with atomic_write(folder / IMPORT_STATE) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")


@contextlib.contextmanager
def open_import(
    folder: Path, settings: dict[str, Any], *, inputs: Sequence[str] = (), overwrite: bool = False
) -> Iterator[ImportState]:
    """Context manager that loads the state of an import, or starts one in an empty or new folder, and locks the folder.

    Args:
        folder: output folder.
        settings: settings of the import.
        inputs: what the import reads.
        overwrite: remove an earlier import first, if its files are unchanged. An unfinished one with these settings is
            continued.

    Raises:
        ValueError: if the folder contains something else, or an import with other settings, or another process writes to it.
    """
    has_files = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if has_files and read_record(folder / IMPORT_STATE) is None:
        if (folder / IMPORT_STATE).is_file():
            raise ChangedImportError(f"{folder / IMPORT_STATE} is damaged. Remove {folder} and import again")
        raise ValueError(f"{folder} exists and is not an import folder. Choose an empty or a new folder")
    refuse_foreign_folder(folder, IMPORT, inputs=inputs)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_output(folder / LOCK, folder, IMPORT.flag):
        state = _load_state(folder, settings, overwrite=overwrite)
        for path in folder.glob(".part-*"):  # of a run that was killed
            if UNFINISHED.fullmatch(path.name):
                path.unlink()
        yield state


def _load_state(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> ImportState:
    record = read_record(folder / IMPORT_STATE)
    if record is not None:
        state = _state_of(record, folder)
        if not state.shards:  # nothing was written yet
            state = ImportState(settings)
        state.settings.setdefault(INPUT_HASH, settings.get(INPUT_HASH))
        changed = [name for name in settings if state.settings.get(name) != settings[name]]
        if changed and not overwrite:
            name = changed[0]
            other = f"with {name} {state.settings.get(name)!r}, not {settings[name]!r}"
            if name == INPUT_HASH:
                other = f"of {settings['path']} before its files changed"
            raise ValueError(
                f"{folder} contains an import {other}. Choose another folder, or replace it with --overwrite"
            )
        if not overwrite and (name := _changed_shard(folder, state)):
            problem = "has changed since it was written" if (folder / name).is_file() else "is missing"
            raise ChangedImportError(
                f"{folder / name} {problem}. Import again with --overwrite, or choose another folder"
            )
        if not overwrite or not (changed or state.complete):
            return state
        _remove_shards(folder, state)
    state = ImportState(settings)
    state.save(folder)  # it marks the folder as ours before archives are unpacked into it
    return state


def _state_of(record: dict[str, Any], folder: Path) -> ImportState:
    """Return the contents of import.json. Raise ValueError if an entry is missing or not known."""
    try:
        return ImportState(**record)
    except TypeError as error:
        raise ChangedImportError(
            f"{folder / IMPORT_STATE} is damaged ({error}). Remove {folder} and import again"
        ) from None


def _changed_shard(folder: Path, state: ImportState) -> str:
    """Return the name of a shard that is missing, or that has changed since the import was complete. "" if there is none."""
    for name in state.shards:
        path, checksum = folder / name, state.checksums.get(name)
        if not path.is_file() or (state.complete and checksum and file_hash(path) != checksum):
            return name
    return ""


def _remove_shards(folder: Path, state: ImportState) -> None:
    """Remove the files of an import. Raise ValueError if one has changed."""
    paths = [folder / name for name in state.shards if (folder / name).is_file()]
    for path in paths:
        if file_hash(path) != state.checksums.get(path.name):
            raise ValueError(f"{path} has changed since it was written. Move it, or choose another folder")
    for path in paths:
        path.unlink()


def write_shards(
    units: Iterable[list[Item]],
    folder: Path,
    features: Features,
    state: ImportState,
    *,
    limit: int | None,
    finish: Callable[[Row], Item],
    advance: Callable[[int], None],
) -> ImportState:
    """Write the remaining rows of an import as shards.

    Args:
        units: converted items of each raw row that is not done.
        folder: output folder.
        features: columns of the rows.
        state: state of the import. It is updated and saved after each shard.
        limit: largest number of rows. None: all.
        finish: loads a row's images and completes it, or returns the reason to leave it out.
        advance: called with 1 after each unit.

    Raises:
        OSError: if the disk is full. Complete shards stay, and the next run resumes after them.
    """
    shard = _Shard(folder, features, state)
    try:
        for unit in units:
            if limit is not None and shard.rows_so_far >= limit:
                break
            for item in unit:
                item = item if isinstance(item, LeftOut) else finish(item)
                if isinstance(item, LeftOut):
                    shard.leave_out(item)
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
    """The shard that is being written. Its counts are added to the state when it is complete."""

    def __init__(self, folder: Path, features: Features, state: ImportState) -> None:
        self.folder, self.schema, self.state = folder, features.arrow_schema, state
        self._reset()

    def _reset(self) -> None:
        self.rows: list[Row] = []
        self.tables: list[pa.Table] = []
        self.pending_bytes, self.written_bytes, self.count, self.units = 0, 0, 0, 0
        self.left_out: Counter[str] = Counter()
        self.preferences: Counter[str] = Counter()
        self.writer: Any = None
        self.name = f"part-{len(self.state.shards):05}.parquet"
        self.temporary_path = temporary_path(self.folder / self.name)

    @property
    def rows_so_far(self) -> int:
        return self.state.rows + self.count

    def leave_out(self, item: LeftOut) -> None:
        self.left_out[item.reason] += 1
        where = item.where or f"raw row {self.state.units + self.units}"
        self.state.examples.setdefault(item.reason, where.encode(errors="backslashreplace").decode())  # lone surrogates

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.count += 1
        self.pending_bytes += _estimated_bytes(row)
        if "preference" in row:
            preference = str(row["preference"])
            names = {"a": "liked or chosen", "b": "disliked"} if "image_b" not in row else {}
            self.preferences[names.get(preference, preference)] += 1
        if self.pending_bytes > GROUP_BYTES:
            self._flush()
        elif len(self.rows) >= ROWS_AS_OBJECTS:
            self._convert_rows()

    def end_unit(self) -> None:
        self.units += 1
        if self.count >= SHARD_ROWS or self.written_bytes + self.pending_bytes >= SHARD_BYTES:
            self.close()

    def _convert_rows(self) -> None:
        if self.rows:
            self.tables.append(to_table(self.rows, self.schema))
            self.rows = []

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._convert_rows()
        if not self.tables:
            return
        table = pa.concat_tables(self.tables)
        with explain_unwritten(self.folder / self.name):
            if self.writer is None:
                options = {"use_dictionary": False, "write_statistics": False, **PAGE_CHECKSUMS}
                self.writer = pq.ParquetWriter(self.temporary_path, self.schema, **options)
            self.writer.write_table(table)
        self.written_bytes, self.pending_bytes, self.tables = self.written_bytes + self.pending_bytes, 0, []

    def close(self) -> None:
        self._flush()
        if self.writer is not None:
            with explain_unwritten(self.folder / self.name):
                self.writer.close()
                self.state.checksums[self.name] = file_hash(self.temporary_path)
                if _other_file(self.folder / self.name, self.state.checksums[self.name]):
                    set_aside(self.folder / self.name)
                self.temporary_path.replace(self.folder / self.name)
            self.state.shards.append(self.name)
        self.state.units += self.units
        self.state.rows += self.count
        for name, counts in (("left_out", self.left_out), ("preferences", self.preferences)):
            setattr(self.state, name, dict(Counter(getattr(self.state, name)) + counts))
        self.state.save(self.folder)
        self._reset()

    def discard(self) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError):  # the disk is full
                self.writer.close()
        self.temporary_path.unlink(missing_ok=True)


def to_table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    """Convert rows to a table.

    Raises:
        RowError: if a value has another type than its column. It names the row and the column.
    """
    import pyarrow as pa

    try:
        columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
        return pa.Table.from_arrays(columns, schema=schema)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        for row in rows:
            for field in schema:
                with name_row(f"{row_name(row)}, column {field.name}", f"Expected {field.type}"[:200]):
                    pa.array([row.get(field.name)], field.type)
        raise


def _other_file(path: Path, checksum: str) -> bool:
    """Return True if a file exists that is not the shard with this checksum, as after a kill before the state was saved."""
    return path.is_file() and file_hash(path) != checksum


def _estimated_bytes(row: Row) -> int:
    """Bytes of a row's images, plus an estimate for the other columns."""
    cells = [row.get("image_a"), row.get("image_b"), *(row.get("images") or []), *source_cells(row)]
    return 2000 + sum(len(cell["bytes"] or b"") for cell in cells if cell)

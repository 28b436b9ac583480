"""Open the files of a preference dataset: Parquet, a folder saved by `datasets`, or a dataset of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_mm.data.row_paths import confine_rows, is_regular, regular_files
from dpo_mm.files.cache_folder import cache_folder, create_cache
from dpo_mm.files.content_key import content_hash
from dpo_mm.files.outputs import read_record
from dpo_mm.files.resumable import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

MAX_BYTES_IN_MEMORY = 2**24
"""Parquet files up to this total size are read into memory."""
SPREADSHEETS = (".tsv", ".txt", ".xls", ".xlsx", ".ods")
"""Suffixes of tables that people export from a spreadsheet, and that are not read."""
MINING_SETTINGS, MINED_PAIRS = "mining.json", "pairs.parquet"
"""Files of a folder with mined pairs. Its shards have the same rows as its pairs."""
IMPORT_STATE = "import.json"
"""Record of a folder with an imported dataset."""


def open_rows(path: str) -> Dataset:
    """Open a preference dataset. The paths in its rows lead only to files of the dataset, see `dpo_mm.data.row_paths`.

    Args:
        path: a Parquet file, a folder of Parquet files, a folder saved by `datasets`, or a hub id.

    Raises:
        ValueError: if there is no such dataset, or it is not readable.
    """
    from datasets import load_dataset
    from huggingface_hub import constants

    folder = Path(path)
    if (folder / "dataset_info.json").exists() and (folder / "state.json").exists():
        return confine_rows(_load_saved(folder), folder)
    if folder.is_file() or folder.is_dir():
        files = [folder] if folder.is_file() else _split_files(folder)
        if not files:
            raise ValueError(
                f"{path}: no *.parquet in this folder. A preference dataset is Parquet with the columns prompt, image_a, image_b, "
                "preference"
            )
        try:
            rows = _read_parquet(files)
        except Exception as error:
            if isinstance(error, OSError) and (
                error.filename or error.errno
            ):  # of the file, or of its copy in the cache
                raise
            if folder.suffix.lower() in SPREADSHEETS:
                raise ValueError(f"{path}: tables in this format are not read. Save it as CSV with commas") from error
            raise ValueError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:200]})") from error
        return confine_rows(rows, folder if folder.is_dir() else folder.parent)
    if folder.exists():
        raise ValueError(f"{path}: not a regular file. Give a Parquet file or a folder of Parquet files")
    if path.count("/") != 1 or path.startswith((".", "/")) or folder.suffix:
        raise ValueError(
            f"{path}: no such file or folder. Give a Parquet file, a folder of Parquet files, a bundled dataset or a hub id"
        )
    try:
        rows = load_dataset(path, split="train")
    except ConnectionError as error:
        raise ValueError(
            f"{path}: no such folder, and no dataset that the hub gave ({type(error).__name__}). Check the path, or go online"
        ) from error
    return confine_rows(rows, Path(constants.HF_HUB_CACHE))  # type: ignore[arg-type]


def _load_saved(folder: Path) -> Dataset:
    """Load a dataset that `datasets` saved.

    Raises:
        ValueError: if it is damaged, or names files outside the folder.
    """
    from datasets import load_from_disk

    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        named = [entry["filename"] for key in ("_data_files", "_indices_data_files") for entry in state.get(key) or ()]
        outside = [name for name in named if not is_regular(folder / name, folder)]
        if outside:
            raise ValueError(f"state.json names {outside[0]!r}, which is not a regular file of the folder")
        return load_from_disk(str(folder)).flatten_indices()  # type: ignore[return-value]
    except Exception as error:
        raise ValueError(
            f"{folder}: not readable as a dataset saved by datasets ({' '.join(str(error).split())[:200]})"
        ) from error


SPLIT = re.compile(r"^(train|training|test|validation|valid|val|dev|eval)(?=[-_.\d])", re.IGNORECASE)
"""Begin of a Parquet file's name that holds one split of a dataset."""


def parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files with the rows of a folder. In a folder of mined pairs, the shards are not among them.

    Raises:
        ValueError: if the mining of pairs in this folder was interrupted, or an import into it is not finished.
    """
    record = read_record(folder / IMPORT_STATE)
    if record is not None and not (record.get("complete") and record.get("rows")):
        raise ValueError(f"{folder}: the import into this folder is not finished. Run its command again")
    files = regular_files(folder, "*.parquet")
    if not (folder / MINING_SETTINGS).is_file():
        return files
    mined = [file for file in files if file.name == MINED_PAIRS]
    if files and not mined:
        raise ValueError(f"{folder}: the mining of these pairs was interrupted. Run its command again to resume")
    return mined


def _split_files(folder: Path) -> list[Path]:
    """Parquet files of a folder: those of the split `train` if the names have splits, else all.

    Raises:
        ValueError: if the names have several splits and none is `train`, or mining was interrupted.
    """
    files = parquet_files(folder) or regular_files(folder, "data/*.parquet")
    splits = {file: match[1].lower() if (match := SPLIT.match(file.name)) else "" for file in files}
    training = [file for file in files if splits[file] in ("train", "training")]
    if not training and len(set(splits.values())) > 1:
        raise ValueError(
            f"{folder}: files of several splits ({', '.join(sorted({split or 'without a split' for split in splits.values()}))}) "
            "and none is train. Name the file to use"
        )
    return training or files


def _read_parquet(files: list[Path]) -> Dataset:
    """Read small files into memory, and map large ones from a copy in the cache. Checksums of pages are verified."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    if sum(file.stat().st_size for file in files) > MAX_BYTES_IN_MEMORY:
        return Dataset.from_file(str(_mapped_copy(files)))
    tables = [pq.read_table(file, page_checksum_verification=True) for file in files]
    for table in tables:
        table.validate(full=True)  # Parquet does not check that its texts are UTF-8
    table = pa.concat_tables(tables, promote_options="default")
    return Dataset(table, fingerprint=generate_random_fingerprint())  # the default is a hash of all bytes


def _mapped_copy(files: list[Path]) -> Path:
    """Copy Parquet files into one Arrow file of the cache, unless it exists, and return its path.

    Its name has paths, sizes and times of the files, so that changed files get a new copy.

    Raises:
        OSError: if the copy cannot be written. It names the file and the fix.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sources = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    copy = cache_folder() / "rows" / f"{content_hash(sources)}.arrow"
    if copy.is_file():
        return copy
    create_cache(copy.parent)
    parts = [pq.ParquetFile(file, page_checksum_verification=True) for file in files]
    schema = pa.unify_schemas([part.schema_arrow for part in parts], promote_options="default")
    with (
        atomic_write(copy, fix="free space or set DPO_MM_CACHE to another disk") as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_stream(file, schema) as stream,
    ):
        for part in parts:
            for table in _tables(part):
                complete = pa.concat_tables([table, schema.empty_table()], promote_options="default")
                stream.write_table(complete.select(schema.names).cast(schema))
    return copy


def _tables(file: pq.ParquetFile) -> Iterator[pa.Table]:
    """Yield the row groups of a Parquet file. Raises ValueError if they are damaged."""
    try:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, use_threads=False)
            table.validate(full=True)
            yield table
    except OSError as error:
        raise ValueError(str(error)) from error

"""Find the source that a dataset belongs to, by the names of its folders and columns.

A dataset is not guessed: if several sources fit, or none, the error names what is there and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_mm.data.image_files import IMAGE_SUFFIXES
from dpo_mm.data.parquet import open_parquet
from dpo_mm.data.row_files import IMPORT_STATE
from dpo_mm.data.row_sides import has_one_image, row_with_sides
from dpo_mm.data.schema import REQUIRED
from dpo_mm.data.text_files import table_suffix
from dpo_mm.files.outputs import read_record
from dpo_mm.sources import SOURCES
from dpo_mm.sources.pair_folders import KOHYA_FOLDERS, TWO_FOLDERS, FolderPair, folder_pairs
from dpo_mm.sources.raw_rows import (
    CAPTION_TABLES,
    TABLE_SUFFIXES,
    Origin,
    Row,
    check_columns,
    find_origin,
    first_rows,
    images_below,
    rename_columns,
    split_folder,
)

EXPECTED = {
    "custom-images": "prompt, image_a, image_b, preference",
    "captioned-images": "file_name, text",
    "custom-responses": "prompt, chosen, rejected, image",
    "trl": "chosen, rejected",
    "llama-factory": "conversations or instruction, chosen, rejected",
    "ms-swift": "messages, rejected_response",
    "chat": "messages",
    "pickapic": "caption, jpg_0, jpg_1, label_0, label_1",
}
"""Columns of each format, for errors."""
NAMES = {
    "pickapic": "rows as Pick-a-Pic's",
    "custom-images": "table of images",
    "custom-responses": "table of responses",
    "trl": "rows as TRL's",
    "llama-factory": "rows as LLaMA-Factory's",
    "ms-swift": "rows as ms-swift's",
    "chat": "chats",
    "captioned-images": "captioned images",
    "kohya-folders": "kohya's w/l folders",
}
FORMS = {".csv": "CSV", ".jsonl": "JSON lines", ".json": "JSON", ".parquet": "Parquet"}
SPLIT = "train"


class Detected(NamedTuple):
    """Source of a dataset, and what it is in words, such as "better/worse folders"."""

    source: str
    words: str


def detect_source(path: str, *, columns: Mapping[str, str] | None = None) -> Detected | None:
    """Find the source of a dataset.

    Args:
        path: a folder, a file or a hub id.
        columns: new names of columns by the dataset's own names.

    Returns:
        The source, or None if the dataset has the row schema already or is of no kind that could be imported, such as a file
        that does not exist.

    Raises:
        ValueError: if no source fits, or several do. The error says what is there and what was expected.
    """
    local = Path(path)
    if local.is_file():
        suffix = table_suffix(local)
        return _source_of_table(path, columns) if suffix in TABLE_SUFFIXES else None
    if not local.exists():
        is_hub = path.count("/") == 1 and not path.startswith((".", "/")) and not local.suffix
        return _source_on_hub(path, columns) if is_hub else None
    is_import = read_record(local / IMPORT_STATE) is not None  # finished or not: the loader reports it
    if not local.is_dir() or is_import or (local / "state.json").exists() or _has_own_rows(local, columns):
        return None
    return _source_of_folder(local, columns)


def _source_of_folder(folder: Path, columns: Mapping[str, str] | None) -> Detected | None:
    """Source of a folder: of its subfolders, its captions or its tables."""
    root, pairs = split_folder(folder, SPLIT), _pairs_below(folder)
    inside = [side for pair in pairs for side in pair]
    files = [file for file in sorted(root.rglob("*")) if not _is_hidden(file.relative_to(root))]
    outside = [file for file in files if not any(side in file.parents for side in inside)]
    tables = [file for file in outside if table_suffix(file) in TABLE_SUFFIXES and file.is_file()]
    captions = [file for file in tables if file.name in CAPTION_TABLES and "file_name" in _columns(file)]
    images = (file for file in outside if file.suffix.lower() in IMAGE_SUFFIXES)
    captioned = next((file for file in images if file.with_suffix(".txt").exists()), None)
    found = []
    if pairs:
        names = {pair.names for pair in pairs}
        source = "kohya-folders" if names == {"w/l"} else "two-folders"
        words = NAMES.get(source, f"{pairs[0].names} folders")
        found.append((Detected(source, words), " and ".join(f"{side.relative_to(root)}/" for side in pairs[0])))
        if len(names) > 1:
            found.append((found[0][0], " and ".join(f"{side.relative_to(root)}/" for side in pairs[-1])))
    elif captions:
        found.append((Detected("captioned-images", NAMES["captioned-images"]), captions[0].name))
    if captioned and not captions:
        shown = f"{captioned.relative_to(root)} with its text file"
        found.append((Detected("captioned-images", NAMES["captioned-images"]), shown))
    if rest := [file for file in tables if file not in captions]:
        found.append((Detected("", ""), rest[0].relative_to(root).as_posix()))
    if len(found) > 1:
        raise ValueError(
            f"{folder}: mixed layouts ({', and '.join(what for _, what in found)}). Give one of them: name its file, or move the "
            "other"
        )
    if not found:
        has = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{folder}: no preference data in this folder (it contains {has}). Expected *.parquet, CSV, JSON or JSON lines, better/ "
            "and worse/ with images of the same names, w/ and l/, or images with a text file each"
        )
    return found[0][0] if found[0][0].source else _source_of_table(str(folder), columns)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _pairs_below(folder: Path) -> list[FolderPair]:
    pairs = folder_pairs(folder, SPLIT, TWO_FOLDERS) + folder_pairs(folder, SPLIT, KOHYA_FOLDERS)
    return [pair for pair in pairs if images_below(pair.better) or images_below(pair.worse)]


def _has_own_rows(folder: Path, columns: Mapping[str, str] | None) -> bool:
    """Return True if the loader reads the Parquet files of a folder."""
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    names = _columns(files[0]) if files and not columns else None
    return names is not None and (not names or has_own_columns(names))  # the loader reports a file that is not readable


def has_own_columns(columns: Sequence[str]) -> bool:
    """Return True for the columns of the row schema."""
    names = set(row_with_sides(dict.fromkeys(columns)))
    return names.issuperset(REQUIRED) or names.issuperset(("prompt", "chosen", "rejected"))


def _columns(file: Path) -> list[str]:
    """Names of the columns of a table, [] if it is not readable."""
    import pyarrow as pa

    try:
        if file.suffix == ".parquet":
            return list(open_parquet(file).schema_arrow.names)
        return list(dict.fromkeys(name for row in first_rows(Origin(file.parent, (file,))) for name in row))
    except (ValueError, pa.ArrowException):
        return []


def _source_of_table(path: str, columns: Mapping[str, str] | None) -> Detected | None:
    """Source of a file or a folder of tables."""
    origin = find_origin(path, split=SPLIT, patterns=(), whole=False)
    is_parquet = origin.files[0].suffix == ".parquet"
    if is_parquet and not columns:
        names = _columns(origin.files[0])
        if not names or has_own_columns(names):  # the loader reads it, or reports that it is damaged
            return None
    rows = first_rows(origin)
    source = _source_of_rows(path, rows, columns, loader=is_parquet, form=FORMS[table_suffix(origin.files[0])])
    if source is None:
        return None
    return Detected(source, f"{NAMES[source]}, {FORMS[table_suffix(origin.files[0])]}")


def _source_on_hub(path: str, columns: Mapping[str, str] | None) -> Detected | None:
    """Source of a dataset on the hub, from the table of sources or its first rows."""
    named = next((name for name, source in SOURCES.items() if source.hub == path), None)
    if named:
        return Detected(named, f"{named} of the hub")
    try:
        rows = first_rows(Origin(Path(path), (), path, SPLIT))
    except Exception:  # not reachable: the loader may have it in its cache, or reports it
        return None
    if not columns and has_own_columns(list(dict.fromkeys(name for row in rows for name in row))):
        return None
    source = _source_of_rows(path, rows, columns, loader=True, form="")
    return None if source is None else Detected(source, f"{NAMES[source]}, of the hub")


def _source_of_rows(
    path: str, rows: list[Row], columns: Mapping[str, str] | None, *, loader: bool, form: str
) -> str | None:
    """Name the source of raw rows.

    Args:
        path: the dataset, for errors.
        rows: its first rows.
        columns: new names of columns by the dataset's own names.
        loader: return None if no source fits and `columns` is not given, so that the loader reports it.
        form: form of the file, such as CSV.
    """
    if not rows:
        header = " below a line with the names of its columns" if form == "CSV" else ""
        raise ValueError(f"{path}: the dataset is empty. Expected at least one row{header}")
    if columns:
        check_columns(rows, columns, path)
    renamed = list(rename_columns(rows, columns or {}))
    names = dict.fromkeys(name for row in renamed for name in row)
    fitting = _fitting_sources(set(names), renamed)
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and loader and not columns:
        return None
    shown = ", ".join(str(name)[:40] for name in list(names)[:12])
    if fitting:
        raise ValueError(
            f"{path}: its columns ({shown}) fit {' and '.join(fitting)}. Import it with one of them: dpo-mm import "
            f"{fitting[0]} {path} OUT"
        )
    has = f"its first line is {shown!r}, which is no header that is known" if form == "CSV" else f"has columns {shown}"
    expected = "; ".join(EXPECTED.values())
    raise ValueError(f"{path}: {has}. Expected {expected}. Rename columns with --columns theirs=ours")


def _fitting_sources(names: set[str], rows: list[Row]) -> list[str]:
    """Sources whose columns the rows have."""
    sides, chat = {"chosen", "rejected"} <= names, bool({"messages", "conversations"} & names)
    texts = {"prompt", "completion"} <= names or {"prompt", "response"} <= names
    turns = any(
        isinstance(row.get(name), list | dict)
        for row in rows
        for name in ("prompt", "chosen", "rejected", "completion")
    )
    single_turn = any(isinstance(row.get("chosen"), str | dict) for row in rows)
    fits = {
        "pickapic": {"caption", "jpg_0", "jpg_1", "label_0", "label_1"} <= names,
        "custom-images": names.issuperset(REQUIRED) or ("prompt" in names and has_one_image(list(names)) and not chat),
        "captioned-images": "file_name" in names and bool({"text", "caption"} & names) and not (sides or chat),
        "llama-factory": sides
        and "prompt" not in names
        and ("instruction" in names or "conversations" in names or ("messages" in names and single_turn)),
        "ms-swift": "messages" in names and bool({"rejected_response", "rejected_messages"} & names),
        "chat": chat and not sides and not {"rejected_response", "rejected_messages"} & names and not texts,
    }
    if sides and not fits["llama-factory"]:
        fits["trl"] = turns or "prompt" not in names or bool({"system", "tools"} & names)
        fits["custom-responses"] = not fits["trl"]
    elif texts or ({"prompt", "chosen"} <= names and not sides):
        fits["trl"] = turns or bool({"system", "tools"} & names)
        fits["custom-responses"] = not fits["trl"]
    return [name for name, fit in fits.items() if fit]

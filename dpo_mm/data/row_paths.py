"""Paths in the rows of a dataset. They lead to files in the folder of the dataset and to no other file of the user.

A loaded row has its path as `FOLDER/./PATH`, the notation of rsync: FOLDER is that of the dataset, and PATH is as the row has
it. `read_file` opens such a path only if it is a regular file in FOLDER, and does not leave it by `..`, as an absolute path or
through a link. A path without the mark comes from the user's own code and is not checked.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

MARK = "/./"
MAX_FILE_BYTES = 2**28
"""Largest size of an image file. Larger files are refused."""
IMAGE_COLUMNS = ("image", "images", "image_a", "image_b", "image_source")
"""Columns whose texts are paths of images."""
CELL = {"bytes", "path"}
"""Keys of an image as `datasets` stores it."""
LONGEST_SHOWN, LONGEST_NAME = 80, 255
HUB_REPOSITORY = re.compile(r"(models|datasets)--.+")


@functools.lru_cache(maxsize=64)
def folder_roots(folder: Path) -> tuple[Path, ...]:
    """Return the folders in which the files of a dataset may be: its own, or the repository in the hub's cache.

    The files of a repository in the hub's cache are links to its subfolder `blobs`.
    """
    from huggingface_hub import constants

    resolved = folder.resolve()
    if folder == Path(constants.HF_HUB_CACHE):  # a dataset of the hub, loaded by `datasets`
        from datasets import config

        return resolved, Path(config.HF_DATASETS_CACHE).resolve()
    repository = resolved.parent.parent
    is_snapshot = resolved.parent.name == "snapshots" and HUB_REPOSITORY.fullmatch(repository.name)
    return (repository,) if is_snapshot else (resolved,)


def resolve_inside(path: str | Path, folder: str | Path) -> Path:
    """Resolve a path relative to a folder, with its links.

    Args:
        path: a path from a row, or a name from a listing of the folder.
        folder: the dataset's folder.

    Raises:
        ValueError: if the path is a URL, is not a path, or leads out of the folder.
    """
    shown = f"{str(path)[:LONGEST_SHOWN]!r}"
    if "://" in str(path):
        raise ValueError(f"its path {shown} is a URL, and URLs are not fetched. Download the file")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in str(path).encode(errors="replace").decode().split("/")):
        raise ValueError(
            f"its path {shown} is too long. If it is the image itself in base64, `dpo-mm import` decodes it"
        )
    try:
        target = Path(os.path.realpath(Path(folder) / path))
    except (ValueError, UnicodeError) as error:  # a null byte or a surrogate
        raise ValueError(f"its path {shown} is not a path ({error})") from None
    if not any(target.is_relative_to(root) for root in folder_roots(Path(folder))):
        raise ValueError(
            f"its path {shown} leads out of the folder of the dataset, and only files in it are opened. Copy the file there"
        )
    return target


def read_regular_file(file: Path) -> bytes:
    """Read a regular file of at most MAX_FILE_BYTES.

    Raises:
        ValueError: if it is a folder, a pipe, a device, or larger.
        OSError: if it cannot be read.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file.name!r} is not a regular file (it is a folder, a pipe or a device)")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"{file.name!r} has {status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
    return file.read_bytes()


def read_file(path: str | Path) -> bytes:
    """Read the file of a path in a loaded row, see the module's text.

    Raises:
        ValueError: if it leads out of its folder, or is not a regular file of a moderate size.
        OSError: if it cannot be read.
    """
    folder, mark, inner = str(path).partition(MARK)
    try:
        return read_regular_file(resolve_inside(inner, folder) if mark else Path(path))
    except UnicodeError as error:
        raise ValueError(f"its path {str(path)[:LONGEST_SHOWN]!r} is not a path ({error})") from None


def is_regular(file: Path, folder: Path) -> bool:
    """Return True if a listed file of a folder is a regular file in it, and no link leads out."""
    try:
        return stat.S_ISREG(resolve_inside(file.absolute(), folder).stat().st_mode)
    except (OSError, ValueError):
        return False


def check_regular(file: Path, folder: Path) -> Path:
    """Return a listed file of a folder.

    Raises:
        ValueError: if it is not a regular file (a folder, a pipe), or is a link that leads out of the folder.
    """
    if not is_regular(file, folder):
        raise ValueError(
            f"{file}: not a regular file of this folder (it is a folder, a pipe, or a link to another folder). "
            "Remove it, or copy the file here"
        )
    return file


def regular_files(folder: Path, pattern: str) -> list[Path]:
    """List the files of a folder that match a pattern, sorted. Raises ValueError as `check_regular`."""
    return [check_regular(file, folder) for file in sorted(folder.glob(pattern))]


def confine(value: Any, folder: Path, *, is_path: bool = False) -> Any:
    """Mark the paths of the images in a value of a row.

    Args:
        value: a value of a row: an image as {bytes, path}, a list or dict that contains images, or anything else.
        folder: the dataset's folder.
        is_path: True if texts are paths too, as in IMAGE_COLUMNS.
    """
    if isinstance(value, dict):
        if value.keys() == CELL:
            path = value["path"]
            return {**value, "path": f"{folder}{MARK}{path}"} if path and not value["bytes"] else value
        return {name: confine(item, folder) for name, item in value.items()}
    if isinstance(value, list):
        return [confine(item, folder, is_path=is_path) for item in value]
    return f"{folder}{MARK}{value}" if is_path and isinstance(value, str) and value else value


def confine_row(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Mark the paths of the images in a row."""
    return {name: confine(value, folder, is_path=name in IMAGE_COLUMNS) for name, value in row.items()}


def confine_rows(rows: Dataset, folder: Path) -> Dataset:
    """Mark the paths of the images in a dataset. Images that the rows contain are not copied."""
    import pyarrow as pa
    from datasets import Dataset

    table: Any = rows.data
    for number, name in enumerate(table.column_names):
        column = table.column(number)
        if any(_has_paths(chunk, is_path=name in IMAGE_COLUMNS) for chunk in column.chunks):
            chunks = [_confined_chunk(chunk, folder, is_path=name in IMAGE_COLUMNS) for chunk in column.chunks]
            table = table.set_column(number, table.field(number), pa.chunked_array(chunks, type=column.type))
    return rows if table is rows.data else Dataset(table, info=rows.info, split=rows.split)


def _has_paths(array: pa.Array, *, is_path: bool) -> bool:
    """Return True if an array contains a path of an image. The bytes of images are not read or copied.

    Args:
        array: part of a column.
        is_path: True if texts are paths too, as in IMAGE_COLUMNS.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return is_path and array.null_count < len(array)
    if _is_cell(kind):
        return bool(pc.any(_path_only(array)).as_py())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _has_paths(array.flatten(), is_path=is_path)
    if pa.types.is_struct(kind):
        if {field.name for field in kind} == CELL:  # of other types than an image: each is looked at
            return True
        return any(_has_paths(pc.struct_field(array, n), is_path=False) for n in range(kind.num_fields))
    return False


def _is_cell(kind: pa.DataType) -> bool:
    """Return True for the type of an image as `datasets` stores it."""
    import pyarrow as pa

    if not pa.types.is_struct(kind) or {field.name for field in kind} != CELL:
        return False
    types = pa.types
    known = (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string, types.is_null)
    return all(any(is_known(field.type) for is_known in known) for field in kind)


def _path_only(chunk: pa.StructArray) -> pa.BooleanArray:
    """Return which images of a chunk are only a path."""
    import pyarrow as pa
    import pyarrow.compute as pc

    data, path = pc.struct_field(chunk, "bytes"), pc.struct_field(chunk, "path")
    if pa.types.is_null(path.type):
        return pa.array([False] * len(chunk))
    empty = pc.is_null(data)
    if not pa.types.is_null(data.type):
        empty = pc.or_(empty, pc.fill_null(pc.equal(pc.binary_length(data), 0), False))
    return pc.and_(empty, pc.fill_null(pc.greater(pc.binary_length(path), 0), False))


def _confined_chunk(chunk: pa.Array, folder: Path, *, is_path: bool) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not _is_cell(chunk.type):
        return pa.array([confine(value, folder, is_path=is_path) for value in chunk.to_pylist()], chunk.type)
    data, path = pc.struct_field(chunk, "bytes"), pc.struct_field(chunk, "path")
    marked = pc.binary_join_element_wise(f"{folder}{MARK}", path, "")
    parts = {"bytes": data, "path": pc.if_else(_path_only(chunk), marked, path)}
    fields = list(chunk.type)
    return pa.StructArray.from_arrays(
        [parts[field.name].cast(field.type) for field in fields], fields=fields, mask=chunk.is_null()
    )

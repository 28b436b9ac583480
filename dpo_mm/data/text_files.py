"""Open text files by their first bytes: gzip, zstd, UTF-16, and UTF-8 with or without a byte order mark."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

GZIP, ZSTD, UTF_16 = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", (b"\xff\xfe", b"\xfe\xff")
MAX_CHARACTERS = 2**28
"""Largest length of a text that is read as a whole."""
COMPRESSED_SUFFIXES = (".gz", ".zst")


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Context manager that opens a text file. Only a newline ends a line, and newlines are not converted.

    Raises:
        ValueError: if it is not a regular file or not text, or its compressed content is damaged. It names the file.
    """
    import pyarrow as pa

    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a regular file (it is a folder, a pipe or a device)")
    with path.open("rb") as file:
        start = file.read(4)
    try:
        if start.startswith(ZSTD):
            raw: Any = io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))
        else:
            raw = gzip.open(path) if start.startswith(GZIP) else path.open("rb")  # noqa: SIM115
        with raw:
            encoding = "utf-16" if raw.peek(2)[:2] in UTF_16 else "utf-8-sig"
            with io.TextIOWrapper(raw, encoding=encoding, newline="") as text:
                yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException) as error:
        raise ValueError(f"{path}: its compressed content is damaged ({' '.join(str(error).split())})") from None
    except OSError as error:
        if start.startswith(ZSTD):  # pyarrow's error for damaged frames
            raise ValueError(f"{path}: its compressed content is damaged ({error})") from None
        raise


def read_text(path: Path) -> str:
    """Read a text file of at most MAX_CHARACTERS, counted after decompression.

    Raises:
        ValueError: if it is longer, or as `open_text`.
    """
    with open_text(path) as text:
        content = text.read(MAX_CHARACTERS + 1)
    if len(content) > MAX_CHARACTERS:
        raise ValueError(f"{path}: has more than {MAX_CHARACTERS:,} characters. Split the file")
    return content


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file without their ends. Only a newline ends a line, with or without a carriage return.

    Raises:
        ValueError: as `open_text`.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def table_suffix(path: Path) -> str:
    """Return the suffix of a file without that of its compression: .jsonl for rows.jsonl.gz."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix

"""Pages of PDF files as images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from PIL import Image

from dpo_mm.data.benchmarks.extra_package import import_extra
from dpo_mm.data.lazy_images import LazyImages
from dpo_mm.data.row_paths import MARK, read_file

LONGEST_EDGE = 1288
"""Longest edge of a page in pixels, as in the pipeline of olmOCR."""


def pdf_page(folder: Path, name: str, page: int) -> LazyImages:
    """Return one page of a PDF file. It is rendered at each access.

    Args:
        folder: folder of the benchmark, which the file must not leave.
        name: path of the file in it.
        page: number of the page, from 1.

    Raises:
        ValueError: if the file is missing or not a PDF, or has fewer pages, or pypdfium2 is not installed.
    """
    path = f"{folder}{MARK}{name}"
    try:
        data = read_file(path)
    except OSError as error:
        raise ValueError(f"{folder / name} cannot be read ({error.strerror}). Copy the PDF files there") from None
    pages = len(_document(data, path))
    if not 1 <= page <= pages:
        raise ValueError(f"{folder / name} has {pages} pages, and page {page} is requested. Use the file as published")
    return LazyImages([partial(_render, path, page)], [f"{xxhash.xxh3_128_hexdigest(data)}-{page}-{LONGEST_EDGE}"])


def _document(data: bytes, path: str) -> Any:
    pypdfium2 = import_extra("pypdfium2", "pypdfium2")
    try:
        return pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"{path.replace(MARK, '/')} is not a readable PDF file ({error}). Copy it again") from None


def _render(path: str, page: int) -> Image.Image:
    sheet = _document(read_file(path), path)[page - 1]
    image: Image.Image = sheet.render(scale=LONGEST_EDGE / max(sheet.get_size())).to_pil()
    return image.convert("RGB")

"""Images that are decoded or rendered when one is used. Thousands of questions with images then take little memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import xxhash
from PIL import Image

from dpo_mm.data.image_files import image_bytes, image_size, rgb_image
from dpo_mm.data.row_paths import LONGEST_SHOWN, MARK

if TYPE_CHECKING:
    from datasets import Dataset


class LazyImages(Sequence[Image.Image]):
    """Images of a question. Each access decodes or renders an image again.

    Args:
        loaders: function that returns the image, one per image.
        file_hashes: hash of the image's file, one per image. Empty for rendered images.
    """

    def __init__(self, loaders: Sequence[Callable[[], Image.Image]], file_hashes: Sequence[str] = ()) -> None:
        self.loaders, self.file_hashes = tuple(loaders), tuple(file_hashes)

    def __len__(self) -> int:
        return len(self.loaders)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        if isinstance(index, slice):
            return LazyImages(self.loaders[index], self.file_hashes[index])
        return self.loaders[index]()


def lazy_images(cells: Sequence[Any], name: str, *, rows: Dataset | None = None, number: int = 0) -> LazyImages:
    """Return the images of a row. Their files are read for a hash and not decoded.

    Args:
        cells: images as stored: bytes, confined paths, or both as `datasets` stores them.
        name: the row, for errors.
        rows: dataset with the column images or image, from which an image is read again. None: from the cells.
        number: number of the row in it.

    Raises:
        ValueError: if a file is missing or not an image. It names the row. A file that is damaged after its header is
            refused when it is decoded.
    """
    hashes = []
    for cell in cells:
        try:
            data = image_bytes(cell)
            image_size(data)
        except (ValueError, OSError):
            data = _decode(cell, name).tobytes()  # its error names the row
        hashes.append(xxhash.xxh3_128_hexdigest(data))
    if rows is None:
        return LazyImages([functools.partial(_decode, cell, name) for cell in cells], hashes)
    return LazyImages([functools.partial(_decode_stored, rows, number, n, name) for n in range(len(cells))], hashes)


def image_cells(row: dict[str, Any]) -> list[Any]:
    """Return the images of a question as stored: the column `images`, or `image` with one or a list of them."""
    cells = row.get("images") or row.get("image") or []
    return cells if isinstance(cells, list) else [cells]


def source_cells(row: Mapping[str, Any]) -> list[Any]:
    """Return the images to edit of a preference row as stored: the column `image_source`, with one, a list of them, or null."""
    return image_cells({"images": row.get("image_source")})


def source_column(cells: Sequence[Any], *, several: bool) -> Any:
    """Return images to edit as a value of the column `image_source`: a list if rows of its dataset have several."""
    return list(cells) if several else next(iter(cells), None)


def _decode_stored(rows: Dataset, number: int, n: int, name: str) -> Image.Image:
    (row,) = rows.with_format("arrow")[number : number + 1].to_pylist()
    return _decode(image_cells(row)[n], name)


def _decode(cell: Any, name: str) -> Image.Image:
    try:
        return rgb_image(cell)
    except ValueError as error:
        path = str((cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else "") or "")
        shown = path.rpartition(MARK)[2][:LONGEST_SHOWN]
        raise ValueError(f"{name}: image {shown} cannot be read ({error})") from None

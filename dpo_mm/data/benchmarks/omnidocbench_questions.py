"""Questions of OmniDocBench (OmniDocBench.json): one per text block and per table, with the block cut out of its page.

`OmniDocBench.json#pages` has one question per page instead, whose ground truth is JSON with all blocks of the page as in the file.
The benchmark has no prompts, so the prompts are this project's. Blocks without a text or HTML have no question.

Source: Ouyang et al. 2024 (2412.07626), github.com/opendatalab/OmniDocBench (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dpo_mm.data.benchmarks.image_folders import ImageFolders
from dpo_mm.data.lazy_images import LazyImages, lazy_images
from dpo_mm.data.row_paths import confine
from dpo_mm.errors import name_row

KEYS = frozenset({"layout_dets", "page_info"})
TEXT_PROMPT = "Write the text in the image, and nothing else."
TABLE_PROMPT = (
    "Write the table in the image as HTML, and nothing else. Use colspan and rowspan for cells that span several."
)
PAGE_PROMPT = (
    "Write the page in the image as Markdown, in reading order, and nothing else. Write formulas as LaTeX: $$ around those that stand "
    "alone, $ around those in a text. Write tables as HTML. Leave out headers, footers and page numbers."
)
PAGE_KEYS = frozenset({"layout_dets", "page_info", "extra"})
COMPARED = ("category_type", "anno_id", "order", "text", "latex", "html")
"""Keys of a block that judges of pages compare."""


def questions(rows: Iterable[dict[str, Any]], file: Path) -> Iterator[dict[str, Any]]:
    """Convert pages of OmniDocBench. The category is that of the block, such as "title" or "table"."""
    folders = ImageFolders(file)
    for number, page in enumerate(rows):
        name = f"{file}, row {number}"
        with name_row(name, "Use the file as published", clear=(ValueError,)):
            image, whole = _image(page, folders, file, name)
            for block in page["layout_dets"]:
                is_table = block["category_type"] == "table"
                truth = block.get("html" if is_table else "text")
                if truth:
                    yield {
                        "id": f"{Path(image).stem}-{block['anno_id']}",
                        "images": _cut_out(whole, block["poly"]),
                        "prompt": TABLE_PROMPT if is_table else TEXT_PROMPT,
                        "ground_truth": truth,
                        "category": block["category_type"],
                    }


def page_questions(rows: Iterable[dict[str, Any]], file: Path) -> Iterator[dict[str, Any]]:
    """Convert pages of OmniDocBench to questions of whole pages. The category is the source of the page, such as "newspaper"."""
    folders = ImageFolders(file)
    for number, page in enumerate(rows):
        name = f"{file}, row {number}"
        with name_row(name, "Use the file as published", clear=(ValueError,)):
            image, whole = _image(page, folders, file, name)
            yield {
                "id": Path(image).stem,
                "images": whole,
                "prompt": PAGE_PROMPT,
                "ground_truth": page_truth(page),
                "truth_is_response": False,
                "category": page["page_info"].get("page_attribute", {}).get("data_source"),
            }


def page_truth(page: dict[str, Any]) -> dict[str, Any]:
    """Return what judges compare of a page: its blocks, and which of them are parts of one paragraph."""
    blocks = [{key: block[key] for key in COMPARED if key in block} for block in page["layout_dets"]]
    return {"layout_dets": blocks, "extra": {"relation": page["extra"]["relation"]}}


def _image(page: dict[str, Any], folders: ImageFolders, file: Path, name: str) -> tuple[str, LazyImages]:
    """Return the name of a page's image and the image."""
    image = page["page_info"]["image_path"]
    return image, lazy_images(confine([folders.find(image)], file.parent, is_path=True), name)


def _cut_out(page: LazyImages, polygon: list[float]) -> LazyImages:
    """Return the bounding box of a polygon (x, y, x, y, ..., pixels) on a page."""
    x, y = polygon[::2], polygon[1::2]
    box = (int(min(x)), int(min(y)), int(max(x)) + 1, int(max(y)) + 1)
    return LazyImages([partial(_crop, page, box)], [f"{page.file_hashes[0]}-{box}"])


def _crop(page: LazyImages, box: tuple[int, int, int, int]) -> Image.Image:
    return page[0].crop(box)

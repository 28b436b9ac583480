"""Questions of OmniDocBench (OmniDocBench.json): one per text block and per table, with the block cut out of its page.

The benchmark has no prompts, so the two prompts are this project's. Blocks without a text or HTML have no question.

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


def questions(rows: Iterable[dict[str, Any]], file: Path) -> Iterator[dict[str, Any]]:
    """Convert pages of OmniDocBench. The category is that of the block, such as "title" or "table"."""
    folders = ImageFolders(file)
    for number, page in enumerate(rows):
        name = f"{file}, row {number}"
        with name_row(name, "Use the file as published", clear=(ValueError,)):
            image = page["page_info"]["image_path"]
            whole = lazy_images(confine([folders.find(image)], file.parent, is_path=True), name)
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


def _cut_out(page: LazyImages, polygon: list[float]) -> LazyImages:
    """Return the bounding box of a polygon (x, y, x, y, ..., pixels) on a page."""
    x, y = polygon[::2], polygon[1::2]
    box = (int(min(x)), int(min(y)), int(max(x)) + 1, int(max(y)) + 1)
    return LazyImages([partial(_crop, page, box)], [f"{page.file_hashes[0]}-{box}"])


def _crop(page: LazyImages, box: tuple[int, int, int, int]) -> Image.Image:
    return page[0].crop(box)

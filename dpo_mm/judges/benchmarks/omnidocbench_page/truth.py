"""Blocks of a page's ground truth: which are compared, in which order, and with truncated paragraphs joined.

Source: github.com/opendatalab/OmniDocBench (Apache-2.0), dataset/end2end_dataset.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpo_mm.judges.benchmarks.omnidocbench_page.formulas import array_lines

COMPARED = ("text_block", "title", "code_txt", "code_txt_caption", "reference")
"""Categories of text whose edit distance counts."""
IGNORED = (
    *("equation_caption", "figure_caption", "figure_footnote", "table_caption", "table_footnote", "code_algorithm"),
    *("code_algorithm_caption", "header", "footer", "page_footnote", "page_number"),
)
"""Categories of text that a response may contain or leave out."""
FORMULA, TABLE = "equation_isolated", "table"
CATEGORIES = (*COMPARED, *IGNORED, FORMULA)


@dataclass(frozen=True)
class Block:
    """Block of a page.

    Attributes:
        category: published category, such as "title".
        order: number in the reading order. None or 0: none.
        text: text, LaTeX of a formula, or HTML of a table.
    """

    category: str
    order: float | None
    text: str


@dataclass(frozen=True)
class PageTruth:
    """Ground truth of a page: texts and formulas, and tables, both in reading order."""

    blocks: tuple[Block, ...]
    tables: tuple[Block, ...]


def read_truth(ground_truth: str) -> PageTruth:
    """Read a page of OmniDocBench. Raise ValueError if the ground truth is not one."""
    try:
        page = json.loads(ground_truth)
        blocks = [*_single_blocks(page), *_joined_blocks(page)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"ground truth {ground_truth[:40]!r} is not a page of OmniDocBench. Add #pages to the name of its file, such as "
            "OmniDocBench.json#pages"
        ) from None
    texts = sorted(
        (block for block in blocks if block.category in CATEGORIES),
        key=lambda block: (block.order or 0, CATEGORIES.index(block.category)),
    )
    tables = sorted((block for block in blocks if block.category == TABLE), key=lambda block: block.order or 0)
    return PageTruth(tuple(line for block in texts for line in _lines(block)), tuple(tables))


def _truncated(page: Mapping[str, Any]) -> list[list[int]]:
    """Blocks that are parts of one paragraph. As published, a block between two others occurs twice."""
    groups: list[list[int]] = []
    for relation in page["extra"]["relation"]:
        if relation["relation_type"] == "truncated":
            pair = [relation["source_anno_id"], relation["target_anno_id"]]
            having = [group for group in groups if not {*pair}.isdisjoint(group)]
            for group in having:
                group += pair
            groups += [] if having else [pair]
    return groups


def _single_blocks(page: Mapping[str, Any]) -> Iterator[Block]:
    parts = {number for group in _truncated(page) for number in group}
    return (_block(block) for block in page["layout_dets"] if block["anno_id"] not in parts)


def _joined_blocks(page: Mapping[str, Any]) -> Iterator[Block]:
    by_number = {block["anno_id"]: _block(block) for block in page["layout_dets"]}
    for group in _truncated(page):
        blocks = sorted(
            (by_number[number] for number in group if number in by_number), key=lambda each: each.order or 0
        )
        if blocks:
            yield replace(blocks[0], text="".join(block.text for block in blocks))


def _block(block: Mapping[str, Any]) -> Block:
    category = block["category_type"]
    name = {FORMULA: "latex", TABLE: "html"}.get(category, "text")
    return Block(category, block.get("order"), str(block.get(name) or ""))


def _lines(block: Block) -> list[Block]:
    """Split a formula that is an array with one column. Its lines have the order of the formula and a tenth each."""
    lines = array_lines(block.text) if block.category == FORMULA else None
    if lines is None:
        return [block]
    order = float(block.order or 0)
    return [replace(block, text=line.text, order=round(order + n / 10, 1)) for n, line in enumerate(lines, start=1)]

"""Judges by the figures of OmniDocBench for whole pages.

A ground truth is a page of OmniDocBench.json. Each judge skips pages without what it compares:

- `omnidocbench_page_text`: edit distance of the texts, which are paired with the blocks of the page first.
- `omnidocbench_page_order`: edit distance of the reading order of the texts.
- `omnidocbench_page_formulas`: edit distance of the LaTeX of displayed formulas.
- `omnidocbench_page_teds`, `omnidocbench_page_teds_s`: TEDS and TEDS-S, mean of the tables of the page.

A rate is the mean of the pages, as published. The published overall score needs CDM, which compares rendered formulas and is not here.

Source: Ouyang et al. 2024 (2412.07626), github.com/opendatalab/OmniDocBench (Apache-2.0): `configs/end2end.yaml`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rapidfuzz.distance import Levenshtein
from scipy.optimize import linear_sum_assignment

from dpo_mm.data.benchmarks.extra_package import import_extra
from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio
from dpo_mm.judges.benchmarks.omnidocbench import compared_table, compared_text, letters
from dpo_mm.judges.benchmarks.omnidocbench_page.formulas import array_lines, compared_formula, formula_as_text
from dpo_mm.judges.benchmarks.omnidocbench_page.markdown import Part, split_markdown
from dpo_mm.judges.benchmarks.omnidocbench_page.matching import SIMILAR, distance_matrix, pair_texts
from dpo_mm.judges.benchmarks.omnidocbench_page.truth import COMPARED, FORMULA, IGNORED, Block, read_truth
from dpo_mm.judges.benchmarks.teds import table_similarity

bs4 = import_extra("bs4", "beautifulsoup4")

CACHED_PAGES = 4096
"""Responses whose pairs are in memory, so that several judges compute them once."""


@dataclass(frozen=True)
class Line:
    """Block or part of a response that has something to compare.

    Attributes:
        text: as written.
        compared: what is compared of it.
        kind: category of a block, kind of a part.
        place: order of a block, 0 if it has none. Position of a part.
    """

    text: str
    compared: str
    kind: str
    place: float


@dataclass(frozen=True)
class PagePairs:
    """Parts of a page that are compared.

    Attributes:
        texts, formulas: compared text of the response and of the ground truth.
        order, order_truth: numbers of blocks in the order of the response and of the ground truth.
        tables: HTML of the response and of the ground truth.
    """

    texts: tuple[tuple[str, str], ...]
    formulas: tuple[tuple[str, str], ...]
    order: tuple[float, ...]
    order_truth: tuple[float, ...]
    tables: tuple[tuple[str, str], ...]


def page_text(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Changed characters of the texts of each page, divided by the length of the longer texts."""
    return [_edit_ratio(page.texts) for page in _pages(responses, ground_truths)]


def page_formulas(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Changed characters of the formulas of each page, divided by the length of the longer formulas."""
    return [_edit_ratio(page.formulas) for page in _pages(responses, ground_truths)]


def page_order(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Edit distance of the order of each page's texts, divided by their number."""
    ratios = []
    for page in _pages(responses, ground_truths):
        longest = max(len(page.order), len(page.order_truth))
        changed = Levenshtein.distance(page.order, page.order_truth)
        ratios.append(Ratio(changed / longest, 1) if longest else Ratio(0, 0))
    return ratios


def page_teds(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Mean TEDS of the tables of each page."""
    return [_mean_teds(page.tables, structure_only=False) for page in _pages(responses, ground_truths)]


def page_teds_structure(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Mean TEDS-S of the tables of each page: without the text of the cells."""
    return [_mean_teds(page.tables, structure_only=True) for page in _pages(responses, ground_truths)]


def _pages(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[PagePairs]:
    return [pair_page(response.text, truth) for response, truth in zip(responses, ground_truths, strict=True)]


def _edit_ratio(pairs: Sequence[tuple[str, str]]) -> Ratio:
    total = sum(max(len(text), len(truth)) for text, truth in pairs)
    changed = sum(Levenshtein.distance(text, truth) for text, truth in pairs)
    return Ratio(changed / total, 1) if total else Ratio(0, 0)


def _mean_teds(pairs: Sequence[tuple[str, str]], *, structure_only: bool) -> Ratio:
    if not pairs:
        return Ratio(0, 0)
    compared = [(compared_table(text) or text, compared_table(truth) or truth) for text, truth in pairs]
    total = sum(table_similarity(text, truth, structure_only=structure_only) for text, truth in compared)
    return Ratio(total / len(pairs), 1)


@lru_cache(maxsize=CACHED_PAGES)
def pair_page(response: str, ground_truth: str) -> PagePairs:
    """Pair the parts of a response with the blocks of a page.

    Raises:
        ValueError: if the ground truth is not a page of OmniDocBench.
    """
    truth, parts = read_truth(ground_truth), split_markdown(response)
    tables, unpaired = _pair_tables(parts, [table.text for table in truth.tables if table.text])
    blocks, lines = _block_lines(truth.blocks), _part_lines(parts, unpaired)
    ignored = [block.compared for block in blocks if block.kind in IGNORED]
    blocks = [block for block in blocks if block.kind not in IGNORED]
    distances = distance_matrix(ignored, [line.compared for line in lines])
    lines = [line for n, line in enumerate(lines) if not (distances[:, n] < SIMILAR).any()]
    texts: list[tuple[str, str]] = []
    moved: list[tuple[str, str]] = []
    formulas: list[tuple[str, str]] = []
    placed: list[tuple[list[Line], list[Line]]] = []
    for pair in pair_texts([block.compared for block in blocks], [line.compared for line in lines]):
        blocks_of_pair, lines_of_pair = [blocks[n] for n in pair.blocks], [lines[n] for n in pair.paragraphs]
        expected, text = ("".join(line.compared for line in side) for side in (blocks_of_pair, lines_of_pair))
        category = Counter(block.kind for block in blocks_of_pair).most_common(1)[0][0]
        if category in COMPARED:
            texts.append((text, expected))
            placed.append((blocks_of_pair, lines_of_pair))
        elif not lines_of_pair or "formula" in lines_of_pair[0].kind:
            formulas.append((text, expected))
        else:
            moved.append((text, _formula_as_text([block.text for block in blocks_of_pair])))
    return PagePairs((*texts, *moved), tuple(formulas), *_orders(placed), tuple(tables))


def _block_lines(blocks: Sequence[Block]) -> list[Line]:
    compared = [
        compared_formula(block.text) if block.category == FORMULA else compared_text(block.text) for block in blocks
    ]
    compared_blocks = [(block, text) for block, text in zip(blocks, compared, strict=True) if block.text and text]
    # As published, the n-th block with something to compare has the order of the n-th of all blocks.
    return [
        Line(block.text, text, block.category, place.order or 0)
        for (block, text), place in zip(compared_blocks, blocks, strict=False)
    ]


def _part_lines(parts: Sequence[Part], cells: Sequence[Part]) -> list[Line]:
    is_text = [part.kind == "text" for part in parts if not _is_table(part)]
    first = is_text[0] if is_text else True
    ordered = sorted((part for part in parts if not _is_table(part)), key=lambda part: (part.kind == "text") != first)
    ordered = sorted([*ordered, *cells], key=lambda part: (part.kind == "inline formula", part.position))
    ordered = [line for part in ordered for line in _formula_lines(part)]
    compared = [compared_text(part.text) if part.kind == "text" else compared_formula(part.text) for part in ordered]
    compared_parts = [(part, text) for part, text in zip(ordered, compared, strict=True) if part.text and text]
    # As published, the n-th part with something to compare has the kind and the position of the n-th of all parts.
    return [
        Line(part.text, text, place.kind, place.position)
        for (part, text), place in zip(compared_parts, ordered, strict=False)
    ]


def _is_table(part: Part) -> bool:
    return part.kind in ("table", "LaTeX table")


def _formula_lines(part: Part) -> list[Part]:
    lines = None if part.kind == "text" else array_lines(part.text)
    return [part] if lines is None else [Part(part.kind, part.position + line.position, line.text) for line in lines]


def _formula_as_text(formulas: Sequence[str]) -> str:
    """Text of formulas whose counterpart is a text."""
    text = formula_as_text(formulas)
    return letters(text) or text


def _orders(pairs: Sequence[tuple[list[Line], list[Line]]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Numbers of the blocks in the order of the response, and in their own. Blocks without a number are left out."""
    paired = sorted((pair for pair in pairs if pair[1]), key=lambda pair: pair[1][0].place)
    order = tuple(block.place for blocks, _ in paired for block in blocks if block.place)
    return order, tuple(sorted(block.place for blocks, _ in pairs for block in blocks if block.place))


def _pair_tables(parts: Sequence[Part], truths: Sequence[str]) -> tuple[list[tuple[str, str]], list[Part]]:
    """Pair tables with those of the ground truth. Return also the cells of those that are left, which count as texts.

    If most tables are in LaTeX, none is paired: the published code converts them only for single tables.
    """
    html = [part for part in parts if part.kind == "table"]
    if not truths or sum(part.kind == "LaTeX table" for part in parts) > len(html):
        return [("", truth) for truth in truths], []
    distances = distance_matrix(truths, [part.text for part in html])
    columns = {int(row): int(column) for row, column in zip(*linear_sum_assignment(distances), strict=True)}
    pairs = [(html[columns[n]].text if n in columns else "", truth) for n, truth in enumerate(truths)]
    left = (part for n, part in enumerate(html) if n not in columns.values())
    return pairs, [cell for part in left for cell in _cells(part)]


def _cells(table: Part) -> Iterator[Part]:
    for cell in bs4.BeautifulSoup(table.text, "html.parser").find_all("td"):
        if cell.string:
            yield Part("text", table.position, cell.string.replace(r"$\cdot$", "").strip())

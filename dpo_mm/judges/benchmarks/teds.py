"""TEDS, the similarity of two HTML tables by the edit distance of their trees, and TEDS-S, the same without the text of cells.

    TEDS(a, b) = 1 - distance(a, b) / max(nodes of a, nodes of b)

Inserting or deleting a node costs 1. Renaming costs 1 if tag, colspan or rowspan differ, else the normalised edit distance of
the text with its tags for a cell, and 0 for other nodes. A table without `<html><body>` around it is read as if it had them.

Source: PubTabNet, Zhong et al. 2020 (1911.10683), eq. 1, and github.com/ibm-aur-nlp/PubTabNet, src/metric.py (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rapidfuzz.distance import Levenshtein

from dpo_mm.data.benchmarks.extra_package import import_extra
from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio
from dpo_mm.judges.benchmarks.tree_distance import Node, tree_distance

html = import_extra("lxml.html", "lxml")


class TableNode(NamedTuple):
    """Label of a node of a table. Cells have a text as tokens: characters, and the tags in the cell."""

    tag: str
    colspan: int | None = None
    rowspan: int | None = None
    tokens: tuple[str, ...] = ()


def teds(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """TEDS of the table in each response and in its ground truth."""
    pairs = zip(responses, ground_truths, strict=True)
    return [Ratio(table_similarity(response.text, truth), 1) for response, truth in pairs]


def teds_structure(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """TEDS-S: TEDS without the text of the cells."""
    pairs = zip(responses, ground_truths, strict=True)
    return [Ratio(table_similarity(response.text, truth, structure_only=True), 1) for response, truth in pairs]


def table_similarity(text: str, truth: str, *, structure_only: bool = False) -> float:
    """TEDS of two tables, at most 1. It is 0 if one of them is not a table, or a span is not a number.

    Trees without a similar node can be farther apart than the larger one has nodes. The value is then negative, as published.

    Args:
        text, truth: documents or tables. Of several tables the first counts.
        structure_only: whether the text of cells is ignored.
    """
    one, two = _table(text), _table(truth)
    if one is None or two is None:
        return 0.0
    try:
        trees = [_tree(table, structure_only=structure_only) for table in (one, two)]
    except (ValueError, RecursionError):
        return 0.0
    nodes = max(len(table.xpath(".//*")) for table in (one, two))
    return 1 - tree_distance(trees[0], trees[1], _rename) / nodes if nodes else 1.0


def _table(text: str) -> Any:
    """Parse the first table in the body. None if there is none."""
    if "<html" not in text.lower():
        start, end = text.lower().find("<table"), text.lower().rfind("</table>")
        text = text[start : end + len("</table>")] if 0 <= start < end else text[start:] if start >= 0 else ""
        text = f"<html><body>{text}</body></html>"
    try:
        document = html.fromstring(text.encode(), parser=html.HTMLParser(remove_comments=True, encoding="utf-8"))
    except (ValueError, html.etree.LxmlError):
        return None
    tables = document.xpath("body/table")
    return tables[0] if tables else None


def _tree(element: Any, *, structure_only: bool) -> Node[TableNode]:
    if element.tag == "td":
        colspan, rowspan = (int(element.attrib.get(name, "1")) for name in ("colspan", "rowspan"))
        tokens = () if structure_only else tuple(_tokens(element)[1:-1])
        return Node(TableNode("td", colspan, rowspan, tokens))
    return Node(TableNode(element.tag), [_tree(child, structure_only=structure_only) for child in element])


def _tokens(element: Any) -> list[str]:
    """Return the tags and characters of an element. Text after the end of a cell does not belong to it."""
    tokens = [f"<{element.tag}>", *(element.text or "")]
    for child in element:
        tokens += _tokens(child)
    tokens.append(f"</{element.tag}>")
    return tokens if element.tag == "td" else [*tokens, *(element.tail or "")]


def _rename(one: TableNode, two: TableNode) -> float:
    if one[:3] != two[:3]:
        return 1.0
    return Levenshtein.normalized_distance(one.tokens, two.tokens) if one.tokens or two.tokens else 0.0

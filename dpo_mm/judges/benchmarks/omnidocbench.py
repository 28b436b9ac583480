"""Judges by the rules of OmniDocBench for single blocks: the edit distance of texts, TEDS and TEDS-S of tables.

A text loses its punctuation and spaces, and formulas in it become Unicode, before it is compared. Tables lose the parts of their
HTML that OmniDocBench does not compare: styles, header cells, `thead`, `tbody`, and superscripts. A judge of texts skips tables,
and a judge of tables skips texts.

Whole pages, whose blocks are matched first, are in `omnidocbench_page`.

Source: Ouyang et al. 2024 (2412.07626), github.com/opendatalab/OmniDocBench (Apache-2.0): `configs/ocr.yaml`,
`configs/table_recognition.yaml`.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from dpo_mm.data.benchmarks.extra_package import import_extra
from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio
from dpo_mm.judges.benchmarks.teds import table_similarity

bs4 = import_extra("bs4", "beautifulsoup4")
latex = import_extra("pylatexenc.latex2text", "pylatexenc")

INLINE_FORMULA = re.compile(r"\$(.*?)\$|\\\((.*?)\\\)")
ESCAPED = re.compile(r"\\([\\_&%^])")
WHITE_SPACE = ("\\t", "\\n", "\t", "\n", "/t", "/n")
"""Written and real tabs and newlines, which are removed."""
NOT_COMPARED = re.compile(r"[^\w\u4e00-\u9fff]")
TABLES = re.compile(r"<table\b[^>]*>(.*)</table>", re.DOTALL | re.IGNORECASE)
ATTRIBUTES = re.compile(r' (?:style|height|width|align|class)=".*?"')
TAGS = re.compile(r"</?(?:sup|sub|span|div|p)>|<colgroup>.*?</colgroup>")
PAGE_START = '{"layout_dets":'
"""How a ground truth that is a whole page begins."""


def omnidocbench_text(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Normalised edit distance: changed characters, divided by those of the longer text. Ground truths with a table are skipped."""
    return [
        Ratio(0, 0) if _is_table(truth) else text_distance(response.text, truth)
        for response, truth in zip(responses, ground_truths, strict=True)
    ]


def omnidocbench_teds(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """TEDS of the tables. Ground truths without a table are skipped."""
    return _similarities(responses, ground_truths, structure_only=False)


def omnidocbench_teds_structure(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """TEDS-S of the tables: without the text of the cells. Ground truths without a table are skipped."""
    return _similarities(responses, ground_truths, structure_only=True)


def text_distance(text: str, truth: str) -> Ratio:
    """Edit distance of two texts, and the length of the longer one. A text that is empty once compared characters are left counts in full."""
    a, b = (compared_text(each) or each for each in (text, truth))
    return Ratio(Levenshtein.distance(a, b), max(len(a), len(b)))


def compared_text(text: str) -> str:
    """Letters, digits and underscores of a text. Formulas in it with a command, power or index become Unicode first."""
    return letters(INLINE_FORMULA.sub(_formula_as_unicode, text))


def letters(text: str) -> str:
    """Letters, digits and underscores of a text."""
    for white_space in WHITE_SPACE:
        text = text.replace(white_space, "")
    return NOT_COMPARED.sub("", text)


def _formula_as_unicode(match: re.Match[str]) -> str:
    formula = ESCAPED.sub("", match[1] if match[1] is not None else match[2])
    if not re.search(r"[\\^_]", formula):
        return match[0]
    try:
        text: str = latex.LatexNodes2Text().latex_to_text(formula + " " if formula.endswith("\\") else formula)
    except Exception:  # the published code leaves out whatever its parser refuses
        return match[0]
    return text.strip()


def compared_table(text: str) -> str:
    """HTML of the tables in a text, without the parts that are not compared. "" if there is none."""
    if "<table" not in text.replace(" ", ""):
        return ""
    soup = bs4.BeautifulSoup(text, "html.parser")
    for cell in soup.find_all("th"):
        cell.name = "td"
    for tag in soup.find_all("thead"):
        tag.unwrap()
    for formula in soup.find_all("math"):
        formula.replace_with(f"${formula.get('alttext', '')}$")
    for tag in soup.find_all("span"):
        tag.unwrap()
    plain = unicodedata.normalize("NFKC", html.unescape(str(soup)).replace("\n", "")).strip()
    rows = re.sub(r"</?tbody>", "", ATTRIBUTES.sub("", "".join(TABLES.findall(plain))))
    rows = re.sub(r"\s+", " ", rows)
    return TAGS.sub("", f'<html><body><table border="1" >{rows}</table></body></html>')


def _similarities(responses: Sequence[Response], ground_truths: Sequence[str], *, structure_only: bool) -> list[Ratio]:
    ratios = []
    for response, truth in zip(responses, ground_truths, strict=True):
        if not _is_table(truth):
            ratios.append(Ratio(0, 0))
            continue
        tables = (compared_table(text) or text for text in (response.text, truth))
        ratios.append(Ratio(table_similarity(*tables, structure_only=structure_only), 1))
    return ratios


def _is_table(truth: str) -> bool:
    if truth.startswith(PAGE_START):
        raise ValueError(
            "the ground truth is a page of OmniDocBench, and this judge scores single blocks. Use judges whose names begin with "
            "omnidocbench_page, or leave out #pages in the name of the questions"
        )
    return "<table" in truth

"""The part of a displayed formula that is compared, and formulas of several lines.

Source: github.com/opendatalab/OmniDocBench (Apache-2.0), utils/data_preprocess.py and utils/match_quick.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from dpo_mm.data.benchmarks.extra_package import import_extra

latex = import_extra("pylatexenc.latex2text", "pylatexenc")

DISPLAYED = re.compile(r"\\\[(.+?)(?<!\\)\\\]")
NOT_COMPARED = tuple(
    re.compile(pattern)
    for pattern in (r"\\tag\{.*?\}", r"\\hspace\{.*?\}", r"\\begin\{.*?\}", r"\\end\{.*?\}", r"\\arraycolsep.*?\}")
)
COMMANDS = (
    r"\mathbf", r"\mathrm", r"\mathnormal", r"\mathit", r"\mathbb", r"\mathcal", r"\mathscr", r"\mathfrak", r"\mathsf", r"\mathtt",
    r"\textbf", r"\text", r"\boldmath", r"\boldsymbol", r"\operatorname", r"\bm", r"\symbfit", r"\symbf", r"\scriptscriptstyle",
    r"\notag", r"\setlength", r"\coloneqq", r"\space", r"\thickspace", r"\thinspace", r"\medspace", r"\nobreakspace",
    r"\negmedspace", r"\quad", r"\qquad", r"\enspace", r"\substackw",
)  # fmt: skip
"""Commands for fonts and spaces, which are removed one after the other, then spaces, and then REMOVED_LAST."""
REMOVED_LAST = (" ", "$$", r"\left", r"\right", r"\displaystyle", r"\text")
ARRAY = re.compile(r"\\begin\{array\}\{([^}]*)\}(.*?)\\end\{array\}", re.DOTALL)
ARRAY_START = r"\begin{array"


class FormulaLine(NamedTuple):
    """One line of a formula in an array, and where it begins, in characters."""

    text: str
    position: int


def compared_formula(formula: str) -> str:
    """LaTeX of a formula without fonts, spaces, tags and environments, in lower case."""
    formula = formula.strip().strip("$").strip("\n")
    displayed = DISPLAYED.search(formula)
    if displayed:
        formula = displayed[1].strip()
    for pattern in NOT_COMPARED:
        formula = pattern.sub("", formula)
    formula = formula.strip(".")
    for removed in (*COMMANDS, *REMOVED_LAST):
        formula = formula.replace(removed, "")
    return formula.lower()


def array_lines(formula: str) -> list[FormulaLine] | None:
    """Lines of a formula whose first array has one column, each as a formula. None for any other formula."""
    array = ARRAY.search(formula) if ARRAY_START in formula else None
    if array is None or re.sub(r"[\s|]", "", array[1]) not in ("l", "c", "r"):
        return None
    lines, end = [], 0
    for line in array[2].split("\\\\"):
        if line := line.strip():
            start = max(array[2].find(line, end), end)
            lines.append(FormulaLine(rf"\[{line}\]", array.start(2) + start))
            end = start + len(line)
    return lines


def formula_as_text(formulas: Sequence[str]) -> str:
    """Unicode of a formula, or of several as the lines of one. The text is empty if it cannot be read."""
    formula = formulas[0]
    if len(formulas) > 1:
        lines = " \\\\ ".join("{" + line.strip("$").strip("\n") + "}" for line in formulas)
        formula = rf"\begin{{array}}{{l}} {lines} \end{{array}}"
    try:
        text: str = latex.LatexNodes2Text().latex_to_text(formula)
    except Exception:  # the published code stops on whatever its parser refuses
        return ""
    return text

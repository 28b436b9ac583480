"""Judges by the math tests of olmOCR-bench: equations of a page that the response must contain.

- `olmocr_math`: the equation in the response is the test's, or shows it when both are rendered. This is the published rule.
- `olmocr_latex`: the LaTeX is the test's. It needs no browser, and its rate is a lower bound of that of `olmocr_math`.

An equation that KaTeX cannot render shows nothing, and nothing shows it. In the published code, every equation passes a test
whose own equation cannot be rendered.

Source: Poznanski et al. 2025 (2502.18443), github.com/allenai/olmocr (Apache-2.0), olmocr/bench/tests.py and bench/katex.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz import fuzz

from dpo_mm.data.schema import Response
from dpo_mm.judges import JudgeName, LazyJudge, Ratio
from dpo_mm.judges.benchmarks.equation_browser import SCRIPT, STYLE, EquationBrowser, Rendering, find_katex
from dpo_mm.judges.benchmarks.equation_match import shows
from dpo_mm.judges.benchmarks.olmocr_tests import Test, read_tests
from dpo_mm.judges.weights import sha256

DELIMITED = (r"\\\((.+?)\\\)", r"\\\[(.+?)\\\]", r"\$\$(.+?)\$\$", r"\$(.+?)\$")
VERSION = re.compile(r'version:"([0-9.]+)"')


def olmocr_math(name: JudgeName) -> LazyJudge:
    """Rate of equations that the responses show."""
    if name.model:
        raise ValueError(
            f"judge 'olmocr_math': {name.model!r} is not expected. Write olmocr_math, or olmocr_math@KATEX"
        )
    try:
        katex = find_katex(name.location)
        with EquationBrowser(katex) as browser:  # a missing browser is named before responses are generated
            browser.render("x")
    except ValueError as error:
        raise ValueError(f"judge 'olmocr_math': {error}. olmocr_latex needs no browser, but equal LaTeX") from None

    def judge(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
        with EquationBrowser(katex) as browser:
            pairs = zip(responses, ground_truths, strict=True)
            return [_rate(response.text, truth, functools.cache(browser.render)) for response, truth in pairs]

    return LazyJudge(judge, lambda: _card(katex))


def olmocr_latex(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Rate of equations that the responses contain with the same LaTeX."""
    return [_rate(response.text, truth) for response, truth in zip(responses, ground_truths, strict=True)]


def _card(katex: Path) -> dict[str, Any]:
    version = VERSION.search((katex / SCRIPT).read_text(encoding="utf-8"))
    return {
        "model": f"KaTeX {version[1] if version else 'of unknown version'}",
        "formula": "symbols of rendered equations, as in olmOCR-bench",
        "katex": {file: sha256(katex / file) for file in (SCRIPT, STYLE)},
    }


def _rate(text: str, ground_truth: str, render: Callable[[str], Rendering | None] | None = None) -> Ratio:
    tests = read_tests(ground_truth, ("math",))
    return Ratio(sum(_contains(text, test, render) for test in tests), len(tests))


def _contains(text: str, test: Test, render: Callable[[str], Rendering | None] | None) -> bool:
    equations, wanted = find_equations(text, with_dollars=not test.get("ignore_dollar_delimited")), test["math"]
    if wanted in equations:
        return True
    reference = render(wanted) if render and equations else None
    if render is None or reference is None:
        return False
    likely_first = sorted(equations, key=lambda equation: -fuzz.ratio(equation, wanted))
    return any((rendering := render(equation)) and shows(rendering, reference) for equation in likely_first)


def find_equations(text: str, *, with_dollars: bool = True) -> list[str]:
    """Find the equations of a text, without their delimiters."""
    equations: list[str] = []
    for pattern in DELIMITED if with_dollars else DELIMITED[:2]:
        equations += [equation.strip() for equation in re.findall(pattern, text, re.DOTALL)]
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    return equations

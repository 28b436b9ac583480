"""Equations of olmOCR-bench: how they are found, what a match is, and the browser with a small stand-in for KaTeX."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from dpo_mm.data.schema import Response
from dpo_mm.judges import JUDGES, Ratio, judge_card, load_judge, metric_of
from dpo_mm.judges.benchmarks import equation_browser, equation_match, olmocr_equations
from dpo_mm.judges.benchmarks.equation_browser import EquationBrowser, Rendering, Symbol, presentation
from dpo_mm.judges.benchmarks.equation_match import neighbours, shows
from dpo_mm.judges.benchmarks.olmocr_equations import find_equations

KATEX = """/* version:"0.0.7" */
const katex = {render: (latex, place) => {
    if (latex === "broken") throw new Error("KaTeX parse error");
    if (latex === "busy") while (true) {}
    if (latex.startsWith("load")) {
        const request = new XMLHttpRequest();
        request.open("GET", latex.slice(5), false);
        request.send();
    }
    const add = (parent, name, text) => {
        const element = document.createElement(name);
        element.textContent = text;
        return parent.appendChild(element);
    };
    const semantics = add(add(place, "math", ""), "semantics", "");
    add(semantics, "mrow", latex + " ");
    add(semantics, "annotation", latex);
    for (const part of latex.split("|")) add(place, "span", part);
}};"""


@pytest.fixture
def katex(tmp_path: Path) -> Path:
    (tmp_path / "katex.min.js").write_text(KATEX)
    (tmp_path / "katex.min.css").write_text("span { font-size: 10px }")
    return tmp_path


def rendering(*rows: str, mathml: str = "") -> Rendering:
    """Characters in rows, 10 pixels apart."""
    symbols = [Symbol(text, 10 * x, 10 * y) for y, row in enumerate(rows) for x, text in enumerate(row) if text != " "]
    return Rendering(mathml or "/".join(rows), tuple(symbols))


def test_equations_are_found_in_the_order_of_their_delimiters() -> None:
    text = "$a$ and \\( b \\), $$c\n$$ \\[d\\] $5"
    assert find_equations(text) == ["b", "d", "c", "a"] and find_equations(text, with_dollars=False) == ["b", "d"]


def test_latex_judge_needs_equal_latex() -> None:
    truth = json.dumps(
        {"tests": [{"type": "math", "id": "1", "math": "x^2"}, {"type": "math", "id": "2", "math": "x^{2}"}]}
    )
    assert load_judge("olmocr_latex")([Response("so \\( x^2 \\)", 1, hit_limit=False)], [truth]) == [Ratio(1, 2)]
    assert metric_of("olmocr_latex") != metric_of("olmocr_math") and JUDGES["olmocr_math"].by_rule


def test_neighbours_are_the_nearest_within_five_pixels() -> None:
    # b is 5 pixels off the row of a, c is 6 pixels off, and d is below a, 2 pixels to the right.
    symbols = [Symbol("a", 0, 0), Symbol("b", 20, 5), Symbol("c", 10, 6), Symbol("d", 2, 30)]
    assert neighbours(symbols).tolist() == [[-1, 3, -1, 1], [-1, -1, 2, -1], [-1, -1, -1, 1], [0, -1, -1, -1]]


@pytest.mark.parametrize(
    ("reference", "equation", "expected"),
    [
        (["a+b"], ["y=a+b."], True),
        (["a+b"], ["a b+"], False),
        (["a+b"], ["a+c"], False),
        (["ab"], ["a", "b"], False),  # one above the other
        (["a", "b"], ["xxa", "xxb"], True),
        (["aa"], ["a"], False),  # both need a place
        (["ab", "a "], ["ab", "cd", "a "], False),  # the neighbour below the first a is c
        (["abab"], ["ab   ab"], True),
        (["aba"], ["ab", "  a"], False),
        (["x y x z"], ["x z x y"], False),
    ],
)
def test_symbols_have_the_same_neighbours(reference: list[str], equation: list[str], expected: bool) -> None:
    assert shows(rendering(*equation, mathml="other"), rendering(*reference)) is expected


def test_mathml_of_the_reference_is_enough() -> None:
    assert shows(rendering("z", mathml="<mi>x</mi><mi>y</mi>"), rendering("q", mathml="<mi>y</mi>"))
    mathml = "<math><semantics><mrow>a \u200b b</mrow><annotation>a b</annotation></semantics></math>"
    assert presentation(mathml) == "<mrow>ab</mrow>"


def test_a_search_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["a   " * 3, "", "   a" * 3]
    assert shows(rendering(*rows, mathml="other"), rendering(*rows))
    monkeypatch.setattr(equation_match, "MAX_STEPS", 2)
    assert not shows(rendering(*rows, mathml="other"), rendering(*rows))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(equation_browser, "PACKAGE", "no_such_package")
    with pytest.raises(
        ValueError, match=r"'olmocr_math': .*Run pip install --no-deps .*\. olmocr_latex needs no browser"
    ):
        load_judge("olmocr_math")
    with pytest.raises(ValueError, match=r"has no katex\.min\.js and katex\.min\.css"):
        load_judge(f"olmocr_math@{tmp_path}")
    with pytest.raises(ValueError, match=r"'x' is not expected\. Write olmocr_math"):
        load_judge(f"olmocr_math:x@{tmp_path}")


class Drawer:
    """A stand-in for the browser, whose symbols are the characters of the LaTeX."""

    def __init__(self, katex: Path) -> None:
        assert (katex / "katex.min.css").is_file()

    def __enter__(self) -> Drawer:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def render(self, latex: str) -> Rendering | None:
        return None if "broken" in latex else rendering(latex, mathml=f"<mrow>{latex}</mrow>")


def test_responses_show_equations(katex: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(olmocr_equations, "EquationBrowser", Drawer)
    tests = [{"type": "math", "id": latex, "math": latex} for latex in ("ab", "c", "broken", "also broken", "x")]
    # ab is a part of zab, c is equal, and so is a broken one. Nothing else shows a broken equation or x.
    response = Response("$zab$ \\(c\\) $$broken $$ $broken too$", 1, hit_limit=False)
    truth = json.dumps({"tests": tests})
    assert load_judge(f"olmocr_math@{katex}")([response], [truth]) == [Ratio(3, 5)]
    card = judge_card(f"olmocr_math@{katex}")
    assert card["model"] == "KaTeX 0.0.7" and set(card["katex"]) == {"katex.min.js", "katex.min.css"}


@pytest.mark.slow
def test_browser_renders_without_a_network(browser_installed: None, katex: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, EquationBrowser(katex, seconds=0.5) as browser:
        server.settimeout(0)
        assert browser.render(f"load http://127.0.0.1:{server.getsockname()[1]}/") is None
        with pytest.raises(BlockingIOError):
            server.accept()
        assert browser.render("broken") is None and browser.render("busy") is None
        shown = browser.render("ab| |\u200bc")
        assert shown and [symbol.text for symbol in shown.symbols] == ["a", "b", "c"]
        left, right, _ = shown.symbols
        assert (
            left.y == right.y
            and 0 < right.x - left.x < 20
            and 300 < left.x < 500
            and shown.mathml == "<mrow>ab||c</mrow>"
        )

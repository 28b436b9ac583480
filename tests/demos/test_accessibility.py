"""axe-core on the three pages and the two reports: light and dark, wide and phone.

Serious and critical findings in our own markup fail the tests. Those in Gradio's components are listed in KNOWN.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.doctor import examine
from dpo_mm.doctor.doctor_report import write_report
from dpo_mm.evaluation.report import render
from tests.conftest import rows
from tests.demos.test_label_page import begin, folder_of_pairs, press
from tests.unit.evaluation.test_report import full
from tests.unit.labels.test_response_pairs import response_rows

pytestmark = pytest.mark.slow

LOOKS = [("light", 1280), ("light", 390), ("dark", 390), ("dark", 1280)]
OWN = ".html-container, .head, .pair, .ratings"
END_TRANSITIONS = """async () => {
  await new Promise(frame => requestAnimationFrame(() => requestAnimationFrame(frame)));
  for (const animation of document.getAnimations()) if (animation instanceof CSSTransition) animation.finish();
}"""
"""JavaScript that ends the transitions of colours, after they have begun."""
KNOWN: set[str] = set()
"""Rules that Gradio's components break: axe's name of the rule."""


def findings(page: Any, own: str | None) -> tuple[list[str], set[str]]:
    """Return serious findings in our own markup, and the names of the rules that other elements break.

    Args:
        own: selector of our own markup. None: everything.
    """
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.skip("not installed: axe-playwright-python")
    if not page.evaluate("'axe' in window"):
        page.evaluate(next(Path(spec.origin).parent.rglob("axe.min.js")).read_text())
    violations = page.evaluate(
        """async (own) => {
      const result = await axe.run(document, {resultTypes: ["violations"], rules: {"color-contrast": {enabled: true}}});
      return result.violations.filter((v) => ["serious", "critical"].includes(v.impact)).flatMap((v) => v.nodes.map((node) => ({
        rule: v.id, html: node.html.slice(0, 150), why: (node.any[0] ?? node.all[0] ?? node.none[0])?.message,
        own: !own || Boolean(document.querySelector(node.target.flat().at(-1))?.closest(own))})));
    }""",
        own,
    )
    ours = [f"{v['rule']}: {v['html']} ({v['why']})" for v in violations if v["own"]]
    return ours, {v["rule"] for v in violations if not v["own"]}


def check_looks(page: Any, own: str | None) -> None:
    """Check each look of the open page."""
    ours: list[str] = []
    for scheme, width in LOOKS:
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        if own:
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", scheme == "dark")
        page.evaluate(END_TRANSITIONS)
        found, others = findings(page, own)
        ours += [f"{scheme} {width}: {finding}" for finding in found]
        assert others <= KNOWN, (scheme, width)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (scheme, width)
    assert not ours, "\n".join(ours)


def test_label_page_is_accessible(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    server = serve("label", "--pairs", str(folder_of_pairs(tmp_path / "set", ["one", "two"])))
    page.goto(server.address)
    page.get_by_label("Your name").wait_for()
    check_looks(page, OWN)
    begin(page, server.address, "Ada")
    page.get_by_text("From votes to a trained adapter").click()
    check_looks(page, OWN)
    for _ in range(2):
        press(page, "ArrowLeft")
    page.get_by_text("Ratings of the models").click()
    page.locator(".ratings tbody tr").first.wait_for()
    check_looks(page, OWN)


def test_pairs_of_responses_are_accessible(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    server = serve(
        "label", "--pairs", response_rows(tmp_path / "set", [("a b\n1\n2", "a c\n1\n2"), ("go " * 60, "go")])
    )
    begin(page, server.address, "Ada")
    for _ in range(2):
        check_looks(page, OWN)
        press(page, "ArrowLeft")


def test_comparison_report_is_accessible(page: Any, tmp_path: Path) -> None:
    text = full("three red stars above a blue circle")
    tones = [
        replace(text.comparisons[1], metric=verdict, verdict=verdict, built_training_pairs=verdict == "worse")
        for verdict in ("better", "worse", "no evidence", "differs")
    ]
    (tmp_path / "report.html").write_text(render(replace(text, comparisons=(text.comparisons[0], *tones))))
    page.goto((tmp_path / "report.html").as_uri())
    check_looks(page, None)


def test_doctor_report_is_accessible(page: Any, tmp_path: Path, write_pairs: Callable[..., str]) -> None:
    pairs = rows(12)
    pairs[3]["image_a"] = {"bytes": b"damaged", "path": None}
    pairs[4] = {**pairs[5], "id": "twin"}
    diagnosis = examine(write_pairs(pairs))
    assert {"error", "warning"} <= {finding.severity for finding in diagnosis.findings} and diagnosis.passed
    page.goto(write_report(tmp_path / "doctor.html", diagnosis, command="dpo-mm doctor pairs").as_uri())
    check_looks(page, None)

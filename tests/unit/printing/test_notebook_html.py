"""Results display themselves in notebooks, with texts of datasets and models escaped."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import rich.console

from dpo_mm import CompareResult, Comparison, MineResult, TrainResult
from dpo_mm.printing.notebook_html import LONGEST
from dpo_mm.printing.progress import progress_bar

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=y>\x1b]0;\u202e"
LONG = "a" * 10_000
ALLOWED = {"p", "b", "table", "tr", "th", "td"}


class Tags(HTMLParser):
    """Tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not attrs or attrs == [("style", "text-align: left")]
        self.found.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def comparison(**changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "metric": "faithfulness", "judge": "scene", "headline": True, "base": 0.5, "tuned": 0.625, "difference": 0.125,
        "low": 0.05, "high": 0.2, "n": 64, "verdict": "better", "wins": 9, "ties": 2, "losses": 1, "p": 0.01, "clusters": 12,
    }  # fmt: skip
    return Comparison(**{**values, **changes})


RESULTS = {
    "train": TrainResult(Path(HOSTILE), ({"loss": 0.5, "step": 2.0},), {HOSTILE: HOSTILE, "pairs": LONG}, 0.1),
    "comparison": comparison(metric=HOSTILE, low=None, high=None, side_set=HOSTILE),
    "compare": CompareResult(HOSTILE, (comparison(metric=HOSTILE),), (HOSTILE, LONG), Path(HOSTILE)),
    "mine": MineResult(Path(HOSTILE) / "pairs.parquet"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_hostile_text_is_escaped(name: str) -> None:
    """Catches a cell, a heading, a note or a path that is not escaped or shortened."""
    page = Tags(RESULTS[name]._repr_html_())
    assert page.found <= ALLOWED and "table" in page.found
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in page.text and "\u202e" not in page.text
    assert len(page.text) < 12 * LONGEST


def test_repr_is_short_and_names_what_matters() -> None:
    """Catches the repr of a dataclass, which prints the whole log."""
    history = tuple({"loss": 1 / n, "step": float(n)} for n in range(1, 500))
    assert repr(TrainResult(Path("runs/a"), history, {"pairs": "x"}, 500.0)) == (
        "TrainResult('runs/a', step=499, loss=0.002004, beta=500)"
    )
    one = comparison()
    assert repr(one) == "Comparison('faithfulness', +0.125, [+0.05, +0.2], 'better')"
    assert repr(CompareResult("better", (one, comparison(headline=False)), (), Path("r.html"))) == (
        f"CompareResult('better', {one!r}, 'r.html')"
    )
    assert repr(MineResult(Path("none.parquet"))) == "MineResult('none.parquet', 0 pairs)"
    assert "<td>+0.125</td><td>[+0.05, +0.2]</td>" in one._repr_html_()


def test_bar_in_a_notebook_is_of_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    with progress_bar("encoding", 4) as advance:
        advance(3, "training")
    assert "training:  75%" in capsys.readouterr().err

"""olmOCR-bench: its unit tests on examples from its documentation and tests, and its files as published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dpo_mm.config import MineResponsesConfig
from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio, explain, load_judge
from dpo_mm.judges.benchmarks.olmocr_tests import final_repeats, passes, plain_text
from dpo_mm.mining.mine_responses import mine_responses

SPANS = """<table><thead><tr><th rowspan="2">Region</th><th colspan="2">Sales</th></tr><tr><th>Q1</th><th>Q2</th></tr></thead>
<tr><td>North</td><td>10</td><td>20<br>n</td></tr><tr><td>South</td><td>30</td><td>40</td></tr></table>"""
MARKDOWN = "Text\n| Region | Q1 | Q2 |\n|---|---|---|\n| North | 10 | 20 |\n| South | 30 | 40 |"
CASES = (
    ("present", {"text": "the “quoted” word"}, 'It has the "quoted" **word**.', True),
    ("present", {"text": "Smoker", "max_diffs": 1}, "some Smokar here", True),
    ("present", {"text": "Smoker"}, "some Smokar here", False),
    ("present", {"text": "END", "last_n": 5, "case_sensitive": False}, "the end. More text", False),
    ("present", {"text": "END", "first_n": 8, "case_sensitive": False}, "the end. More text", True),
    ("absent", {"text": "Page 7"}, "No number", True),
    ("absent", {"text": "Page 7"}, "text Page 7", False),
    ("order", {"before": "first", "after": "second"}, "first, then second", True),
    ("order", {"before": "second", "after": "first"}, "first, then second", False),
    ("order", {"before": "second", "after": "first"}, "first, second, first", True),
    ("order", {"before": "frist", "after": "second", "max_diffs": 2}, "first, then second", True),
    ("format", {"text": "Title", "format": "heading"}, "## The Title\ntext", True),
    ("format", {"text": "Title", "format": "heading"}, "The Title", False),
    ("format", {"text": "strong", "format": "italic"}, "**strong**", False),
    ("format", {"text": "strong", "format": "bold"}, "a <strong>strong</strong> word", True),
    ("footnote", {"marker": "12", "appears_before_marker": "as shown"}, "as shown¹² there", True),
    ("footnote", {"marker": "1", "appears_after_marker": "Source"}, "text <sup>1</sup> Source: x", True),
    ("footnote", {"marker": "1"}, "[^1]: only its definition", False),
    ("footnote", {"marker": "1", "appears_after_marker": "$", "max_diffs": 1}, "text [^1] 5", True),
    ("baseline", {}, "Plain text.", True),
    ("baseline", {}, "... !", False),
    ("baseline", {}, "text " + "ab" * 31, False),
    ("baseline", {}, "text " + "ab" * 30, True),
    ("baseline", {}, "text 日本", False),
    ("baseline", {"check_disallowed_characters": False}, "text 日本", True),
    ("baseline", {"max_length": 3, "max_length_skips_image_alt_tags": True}, "![a long text](a.png) abc", True),
    ("baseline", {"max_length": 3}, "![a long text](a.png) abc", False),
    ("table", {"cell": "40", "up": "20", "left": "30", "top_heading": "Q2", "left_heading": "South"}, MARKDOWN, True),
    ("table", {"cell": "40", "up": "10"}, MARKDOWN, False),
    ("table", {"cell": "40"}, "no table", False),
    ("table", {"cell": "40", "ignore_markdown_tables": True}, MARKDOWN, False),
    ("table", {"cell": "Sales", "down": "Q1", "left": "Region"}, SPANS, True),
    ("table", {"cell": "Sales", "down": "Q2"}, SPANS, True),
    ("table", {"cell": "Q1", "left": "Region", "right": "Q2", "down": "10"}, SPANS, True),
    ("table", {"cell": "30", "top_heading": "Sales"}, SPANS, True),
    ("table", {"cell": "30", "left_heading": "South", "top_heading": "Region"}, SPANS, False),
    ("table", {"cell": "40", "up": "20 n"}, SPANS, True),
)


@pytest.mark.parametrize(("kind", "test", "text", "expected"), CASES)
def test_rules(kind: str, test: dict[str, object], text: str, expected: bool) -> None:
    assert passes({"type": kind, "id": "a", **test}, text) is expected


def test_plain_text_and_final_repeats() -> None:
    assert plain_text("a<br/>b  **c** _d_ e\u0301 – “x” \u00b5") == 'a b c d \u00e9 - "x" \u03bc'
    assert final_repeats("abab") == [1, 2, 1, 1, 0] and final_repeats("a" * 7) == [7, 3, 2, 1, 1]


def save_pdf(file: Path, pages: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sheets = [Image.new("RGB", (60, 80), "white") for _ in range(pages)]
    sheets[0].save(file, save_all=True, append_images=sheets[1:])


def test_files_as_published(tmp_path: Path) -> None:
    notes = {"pdf": "old/notes.pdf", "checked": "verified"}
    rows = [
        {**notes, "page": 2, "id": "one", "type": "present", "text": "Order by repo"},
        {**notes, "page": 2, "id": "two", "type": "absent", "text": "Page 7", "max_diffs": 1},
        {**notes, "page": 2, "id": "three", "type": "math", "math": "x"},
    ]
    (tmp_path / "old_scans.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "blanks.jsonl").write_text(
        json.dumps({"pdf": "blank.pdf", "page": 1, "id": "four", "type": "baseline", "max_length": 0})
    )
    save_pdf(tmp_path / "pdfs" / "old" / "notes.pdf", 2)
    save_pdf(tmp_path / "pdfs" / "blank.pdf", 1)
    blank, second, first = read_questions(str(tmp_path))
    assert [blank.category, second.category, second.images[0].size] == ["blanks", "old_scans", (967, 1288)]
    assert not first.truth_is_response and "truth_is_response" not in first.content
    with pytest.raises(ValueError, match="describes correct responses and is not one"):
        mine_responses(
            MineResponsesConfig("none", str(tmp_path / "blanks.jsonl"), str(tmp_path / "out"), judges="olmocr_tests")
        )
    assert first.id == "old/notes.pdf-page-1" and second.content["images"] != first.content["images"]
    responses = [Response("Order by repo, Page 7", 1, hit_limit=False)]
    scores = {
        name: load_judge(f"olmocr_{name}")(responses, [second.ground_truth]) for name in ("tests", "latex", "baseline")
    }
    assert scores == {"tests": [Ratio(1, 2)], "latex": [Ratio(0, 1)], "baseline": [Ratio(0, 0)]}
    assert load_judge("olmocr_baseline")(responses, [first.ground_truth]) == [Ratio(1, 1)]
    assert explain("olmocr_tests", responses[0], second.ground_truth).reason == "absent test two fails"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"type": "presnt"}, "row 0: type 'presnt' is unknown"),
        ({"type": "order", "before": "a"}, "row 0: a test of type order needs the text after"),
        ({"type": "baseline", "page": 3}, "has 2 pages, and page 3 is requested"),
        ({"type": "baseline", "pdf": "gone.pdf"}, r"gone\.pdf cannot be read .*Copy the PDF files there"),
        ({"type": "baseline", "pdf": "../../x.pdf"}, "leads out of the folder"),
        ({"type": "baseline", "pdf": "text.pdf"}, r"text\.pdf is not a readable PDF file"),
    ],
)
def test_broken_files_are_named(row: dict[str, object], message: str, tmp_path: Path) -> None:
    save_pdf(tmp_path / "pdfs" / "a.pdf", 2)
    (tmp_path / "pdfs" / "text.pdf").write_text("no PDF")
    (tmp_path / "a.jsonl").write_text(json.dumps({"pdf": "a.pdf", "page": 1, "id": "x", **row}))
    with pytest.raises(ValueError, match=message):
        read_questions(str(tmp_path / "a.jsonl"))


def test_ground_truth_of_another_task_is_refused() -> None:
    with pytest.raises(ValueError, match="has no tests of olmOCR-bench"):
        load_judge("olmocr_tests")([Response("a", 1, hit_limit=False)], ["a text"])

"""Judges by the unit tests of olmOCR-bench: facts about a page that the response must get right.

A ground truth is JSON with the list `tests`. Each judge counts the tests of its types that pass and skips the others:

- `olmocr_tests`: present, absent, order, table, format and footnote.
- `olmocr_baseline`: the response is not empty, does not end in a loop, and has no unexpected characters.

Judges of math tests are in `olmocr_equations.py`.

The published score is the mean of the rates per file and of that of the baseline tests.

Source: Poznanski et al. 2025 (2502.18443), github.com/allenai/olmocr (Apache-2.0), olmocr/bench/tests.py.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rapidfuzz import fuzz

from dpo_mm.data.benchmarks.extra_package import import_extra
from dpo_mm.data.schema import Response
from dpo_mm.judges import Explanation, Ratio
from dpo_mm.judges.benchmarks.table_cells import Table, find_tables

fuzzysearch = import_extra("fuzzysearch", "fuzzysearch")

PLAIN = (
    dict.fromkeys("‘’‚", "'")
    | dict.fromkeys("“”„", '"')
    | dict.fromkeys("–—‑‒−", "-")
    | {"＿": "_", "\u00b5": "\u03bc"}
)
"""Characters and what they count as."""
MARKUP = (
    (re.compile(r"<br/?>"), " "),
    (re.compile(r"\*\*(.*?)\*\*"), r"\1"),
    (re.compile(r"__(.*?)__"), r"\1"),
    (re.compile(r"</?[bi]>"), ""),
    (re.compile(r"(\*\*|__)(.*?)\1"), r"\2"),
    (re.compile(r"(\*|_)(.*?)\1"), r"\2"),
    (re.compile(r"\s+"), " "),
)
IMAGE = re.compile(r"!\[.*?\]\(.*?\)")
UNEXPECTED = re.compile("[\u4e00-\u9fff\u3040-\u30ff\U0001f600-\U0001f64f\U0001f300-\U0001f6ff\U0001f1e0-\U0001f1ff]")
"""Chinese and Japanese characters, and emoji."""
MAX_REPEATS, LONGEST_REPEATED = 30, 5
"""Repeats at the end of a response that are a loop, and the largest number of repeated characters."""
FORMATTED = {
    "heading": [(r"^#{1,6}\s+(.+?)$", re.MULTILINE), (r"<h[1-6][^>]*>(.*?)</h[1-6]>", re.IGNORECASE | re.DOTALL)],
    "bold": [
        (r"\*\*(.*?)\*\*", re.DOTALL),
        (r"__(.*?)__", re.DOTALL),
        (r"<b[^>]*>(.*?)</b>", re.IGNORECASE | re.DOTALL),
        (r"<strong[^>]*>(.*?)</strong>", re.IGNORECASE | re.DOTALL),
    ],
    "italic": [
        (r"(?<!\*)\*(?!\*)(.*?)(?<!\*)\*(?!\*)", re.DOTALL),
        (r"(?<!_)_(?!_)(.*?)(?<!_)_(?!_)", re.DOTALL),
        (r"<i[^>]*>(.*?)</i>", re.IGNORECASE | re.DOTALL),
        (r"<em[^>]*>(.*?)</em>", re.IGNORECASE | re.DOTALL),
    ],
}
"""Patterns of text in each format."""
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
NEARBY = 200
"""Characters before and after a footnote's marker that are searched."""
Test = Mapping[str, Any]


def olmocr_tests(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Rate of passed tests, except for baseline and math tests."""
    return _rates(responses, ground_truths, OTHER_TYPES)


def olmocr_baseline(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Rate of passed baseline tests."""
    return _rates(responses, ground_truths, ("baseline",))


def explain_tests(response: Response, ground_truth: str) -> Explanation:
    """List the tests that a response fails, math tests aside."""
    types = (*OTHER_TYPES, "baseline")
    failed = [test for test in read_tests(ground_truth, types) if not passes(test, response.text)]
    return Explanation("; ".join(f"{test['type']} test {test['id']} fails" for test in failed))


def passes(test: Test, text: str) -> bool:
    """Check if a response passes a test."""
    return RULES[test["type"]](test, text)


def _rates(responses: Sequence[Response], ground_truths: Sequence[str], types: Collection[str]) -> list[Ratio]:
    ratios = []
    for response, truth in zip(responses, ground_truths, strict=True):
        tests = read_tests(truth, types)
        ratios.append(Ratio(sum(passes(test, response.text) for test in tests), len(tests)))
    return ratios


def read_tests(ground_truth: str, types: Collection[str]) -> list[dict[str, Any]]:
    try:
        tests = json.loads(ground_truth)["tests"]
        return [test for test in tests if test["type"] in types]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"ground truth {ground_truth[:40]!r} has no tests of olmOCR-bench. Compare on its files, as published"
        ) from None


def plain_text(text: str) -> str:
    """Text without bold, italics and line breaks, with plain quotes and dashes, in Unicode's NFC."""
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return "".join(PLAIN.get(character, character) for character in unicodedata.normalize("NFC", text))


def _least_similarity(test: Test, text: str) -> float:
    """Similarity that a match needs, as the test allows `max_diffs` different characters."""
    return 1 - int(test.get("max_diffs") or 0) / max(1, len(text))


def _present(test: Test, text: str) -> bool:
    expected, text = plain_text(test["text"]), plain_text(text)
    if not test.get("case_sensitive", True):
        expected, text = expected.lower(), text.lower()
    first, last = test.get("first_n"), test.get("last_n")
    if first or last:
        text = (text[:first] if first else "") + (text[-last:] if last else "")
    return bool(fuzz.partial_ratio(expected, text) / 100 >= _least_similarity(test, expected))


def _absent(test: Test, text: str) -> bool:
    return not _present(test, text)


def _order(test: Test, text: str) -> bool:
    text, max_diffs = plain_text(text), int(test.get("max_diffs") or 0)
    before, after = (
        [match.start for match in fuzzysearch.find_near_matches(plain_text(test[side]), text, max_l_dist=max_diffs)]
        for side in ("before", "after")
    )
    return bool(before and after and min(before) < max(after))


def _format(test: Test, text: str) -> bool:
    patterns = FORMATTED[test["format"]]
    parts = [plain_text(part) for pattern, flags in patterns for part in re.findall(pattern, text, flags)]
    expected = plain_text(test["text"])
    if not test.get("case_sensitive", True):
        expected, parts = expected.lower(), [part.lower() for part in parts]
    least = _least_similarity(test, expected)
    return any(fuzz.partial_ratio(expected, part) / 100 >= least for part in parts)


def _table(test: Test, text: str) -> bool:
    names = ("up", "down", "left", "right", "top_heading", "left_heading")
    expected = {name: plain_text(test[name]) for name in names if test.get(name)}
    tables = find_tables(text, with_markdown=not test.get("ignore_markdown_tables"))
    return any(_has_cell(table, plain_text(test["cell"]), expected, test) for table in tables)


def _has_cell(table: Table, text: str, expected: Mapping[str, str], test: Test) -> bool:
    """Check if a table has a cell with a text, and the expected texts next to it or in its headings."""
    texts = [plain_text(cell.text) for cell in table.cells]

    def is_like(cell: int, wanted: str) -> bool:
        return bool(fuzz.ratio(wanted, texts[cell]) / 100 >= max(0.5, _least_similarity(test, wanted)))

    def around(cell: int, name: str) -> Collection[int]:
        if name.endswith("heading"):
            return table.headings(cell, "up" if name == "top_heading" else "left")
        return table.neighbours[name][cell]

    return any(
        is_like(cell, text)
        and all(any(is_like(other, wanted) for other in around(cell, name)) for name, wanted in expected.items())
        for cell in range(len(texts))
    )


def _baseline(test: Test, text: str) -> bool:
    if test.get("max_length") is not None:
        text = IMAGE.sub("", text) if test.get("max_length_skips_image_alt_tags") else text
        return sum(character.isalnum() for character in text) <= test["max_length"]
    if not any(character.isalnum() for character in text):
        return False
    if any(repeats > test.get("max_repeats", MAX_REPEATS) for repeats in final_repeats(text)):
        return False
    return not (test.get("check_disallowed_characters", True) and UNEXPECTED.search(text))


def final_repeats(text: str) -> list[int]:
    """Number of times that the last 1, 2, ... characters of a text occur in a row at its end."""
    text = re.sub(r"\s+", " ", text)
    repeats = []
    for size in range(1, LONGEST_REPEATED + 1):
        last, count, end = text[-size:], 0, len(text)
        while end >= size and text[end - size : end] == last:
            count, end = count + 1, end - size
        repeats.append(count)
    return repeats


def _footnote(test: Test, text: str) -> bool:
    marker = test["marker"]
    patterns = [(rf"\[\^{re.escape(marker)}\](?!:)", 0), (rf"<sup[^>]*>{re.escape(marker)}</sup>", re.IGNORECASE)]
    if re.fullmatch("[0-9]+", marker):
        patterns.append((marker.translate(SUPERSCRIPTS), 0))
    places = [match.span() for pattern, flags in patterns for match in re.finditer(pattern, text, flags)]
    before, after = test.get("appears_before_marker"), test.get("appears_after_marker")
    earlier = [_letters(text[max(0, start - NEARBY) : start]) for start, _ in places]
    later = [_letters(text[end : end + NEARBY]) for _, end in places]
    return bool(places) and all(
        [
            not before or any(_is_near(test, before, part[-2 * len(_letters(before)) :]) for part in earlier),
            not after or any(_is_near(test, after, part[: 2 * len(_letters(after)) or None]) for part in later),
        ]
    )


def _letters(text: str) -> str:
    return "".join(character for character in plain_text(text) if character.isalnum()).lower()


def _is_near(test: Test, expected: str, part: str) -> bool:
    least = _least_similarity(test, plain_text(expected))
    return bool(part) and bool(fuzz.partial_ratio(_letters(expected), part) / 100 >= least)


RULES: dict[str, Callable[[Test, str], bool]] = {
    "present": _present,
    "absent": _absent,
    "order": _order,
    "table": _table,
    "format": _format,
    "footnote": _footnote,
    "baseline": _baseline,
}
OTHER_TYPES = tuple(name for name in RULES if name != "baseline")

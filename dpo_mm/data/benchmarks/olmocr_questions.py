"""Questions of olmOCR-bench (bench_data/*.jsonl with bench_data/pdfs): one per page, with all tests of the page.

The ground truth is JSON with the list `tests`, each as in the file. A PDF file without a baseline test gets one on its first
page, as in the published code. The prompt is the basic one of the benchmark.

Source: Poznanski et al. 2025 (2502.18443), github.com/allenai/olmocr (Apache-2.0), olmocr/bench.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpo_mm.data.benchmarks.pdf_pages import pdf_page

KEYS = frozenset({"pdf", "page", "id", "type"})
TEXTS = {
    "baseline": (),
    "present": ("text",),
    "absent": ("text",),
    "order": ("before", "after"),
    "table": ("cell",),
    "math": ("math",),
    "format": ("text", "format"),
    "footnote": ("marker",),
}
"""Types of tests, with the texts that each needs."""
FORMATS = ("heading", "bold", "italic")
FOLDER = "pdfs"
PROMPT = (
    "Please provide a natural, plain text representation of the document, formatted in Markdown. Skip any headers and footers. "
    "For ALL mathematical expressions, use LaTeX notation with \\( and \\) for inline equations and \\[ and \\] for display "
    "equations. Convert any tables into Markdown format."
)


def questions(rows: Iterable[dict[str, Any]], file: Path) -> Iterator[dict[str, Any]]:
    """Convert the tests of a file. The category is the name of the file, such as "old_scans"."""
    tests: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for number, row in enumerate(rows):
        _check_test(row, f"{file}, row {number}")
        tests.setdefault((row["pdf"], row["page"]), []).append(row)
    with_baseline = {row["pdf"] for page in tests.values() for row in page if row["type"] == "baseline"}
    for pdf in dict.fromkeys(pdf for pdf, _ in tests):
        if pdf not in with_baseline:
            baseline = {"pdf": pdf, "page": 1, "id": f"{pdf}_baseline", "type": "baseline"}
            tests.setdefault((pdf, 1), []).append(baseline)
    for (pdf, page), own in tests.items():
        yield {
            "id": f"{pdf}-page-{page}",
            "images": pdf_page(file.parent, f"{FOLDER}/{pdf}", page),
            "prompt": PROMPT,
            "ground_truth": {"tests": own},
            "truth_is_response": False,
            "category": file.stem,
        }


def _check_test(row: dict[str, Any], name: str) -> None:
    """Raise ValueError for a test that cannot be run."""
    kind, max_diffs = row["type"], row.get("max_diffs", 0)
    if not isinstance(kind, str) or kind not in TEXTS:
        raise ValueError(f"{name}: type {kind!r:.40} is unknown. Expected one of {', '.join(TEXTS)}")
    missing = [text for text in TEXTS[kind] if not isinstance(row.get(text), str) or not row[text].strip()]
    if missing:
        raise ValueError(f"{name}: a test of type {kind} needs the text {missing[0]}. Use the file as published")
    if not isinstance(max_diffs, int) or max_diffs < 0:
        raise ValueError(f"{name}: max_diffs is {max_diffs!r:.40}. Expected a number of characters, 0 or more")
    if kind == "format" and row["format"] not in FORMATS:
        raise ValueError(f"{name}: format {row['format']!r:.40} is unknown. Expected one of {', '.join(FORMATS)}")
    if not isinstance(row["page"], int):
        raise ValueError(f"{name}: page is {row['page']!r:.40}. Expected a number from 1")

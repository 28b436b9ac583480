"""Reports of a diagnosis: a table for the terminal, and an HTML page in one file.

The page has no script, and its content security policy forbids any. The template escapes all text of the dataset.
"""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_mm.data.image_files import decode_image, encode_png, image_bytes
from dpo_mm.doctor import Diagnosis
from dpo_mm.doctor.checks import CHECKS, SEVERITIES, row_count_text
from dpo_mm.doctor.image_features import extract_features
from dpo_mm.doctor.loading import load_dataset, rows_by_id
from dpo_mm.doctor.response_checks import text_of
from dpo_mm.files.resumable import atomic_write
from dpo_mm.printing.printed_text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}
FULL_EXAMPLES, THUMBNAIL_EDGE = 3, 160
"""Number of examples per finding that are shown in full, and pixels of the longer edge of their thumbnails."""
MAX_CHARACTERS = 200
"""Length to which texts of examples are shortened."""


def verdict(diagnosis: Diagnosis) -> str:
    """Return the number of findings by severity as text, such as "2 errors, 1 warning"."""
    counts = [(sum(f.severity == severity for f in diagnosis.findings), severity) for severity in SEVERITIES]
    parts = [f"{count} {severity}{'s' * (count > 1)}" for count, severity in counts if count]
    return ", ".join(parts) or "no findings"


def terminal_report(diagnosis: Diagnosis) -> RenderableType:
    """Return the facts, the findings and the advice as tables for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in diagnosis.facts.items():
        facts.add_row(Text(key, style="dim"), Text(printable(value)))
    table = Table(header_style="bold", border_style="dim", show_lines=True)
    for name in ("", "finding", "rows"):
        table.add_column(name, justify="right" if name == "rows" else "left", overflow="fold")
    for finding in diagnosis.findings:
        text = Text(finding.title, style="bold").append(printable(f"\n{finding.summary}"), style="not bold")
        for row_id, comment in finding.examples[:3]:
            text.append(printable(f"\n  {row_id}"), style="not bold cyan")
            text.append(printable(f"  {shorten(comment)}") if comment else "", style="not bold")
        text.append(f"\n{finding.advice}", style="not bold italic")
        table.add_row(Text(finding.severity, COLOURS[finding.severity]), text, f"{finding.rows:,}")
    passed = Text(f"{verdict(diagnosis)}. {len(diagnosis.passed)} checks passed.")
    return Group(facts, *([table] if diagnosis.findings else []), passed)


def shorten(text: str) -> str:
    """Put a text on one line, and replace its middle by an ellipsis if it is long."""
    text = " ".join(text.split())
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[: MAX_CHARACTERS * 2 // 3]} … {text[-MAX_CHARACTERS // 4 :]}"


class ExampleRow(NamedTuple):
    """A row shown in the report: its prompt, and (label, content) of its images or responses.

    The content is a data URI of an image or the text of a response. It is "" if an image does not decode.
    """

    prompt: str
    sides: tuple[tuple[str, str], ...]


def load_examples(diagnosis: Diagnosis) -> dict[str, ExampleRow]:
    """Read the first examples of all findings from the dataset, by row id."""
    ids = {row_id for finding in diagnosis.findings for row_id, _ in finding.examples[:FULL_EXAMPLES]}
    rows = rows_by_id(load_dataset(diagnosis.name, path=diagnosis.path), ids) if ids else {}
    return {row_id: _example_row(row, diagnosis.kind) for row_id, row in rows.items()}


def _example_row(row: dict[str, Any], kind: str) -> ExampleRow:
    """Order a row as winner and loser, or as a and b if there is no winner."""
    if kind == "responses":
        texts = [(label, row[column]) for label, column in (("winner", "chosen"), ("loser", "rejected"))]
        sides = [(label, shorten(text_of(text))) for label, text in texts if text is not None]
        return ExampleRow(shorten(text_of(row["prompt"])), tuple(sides))
    labels = {"a": ("winner", "loser"), "b": ("loser", "winner")}.get(row["preference"], ("a", "b"))
    cells = zip(labels, (row["image_a"], row["image_b"]), strict=True)
    images = [(label, _thumbnail(cell)) for label, cell in cells if cell is not None]
    return ExampleRow(shorten(row["prompt"] or ""), tuple(images[::-1] if labels[0] == "loser" else images))


def _thumbnail(cell: Any) -> str:
    if isinstance(extract_features(cell), str):
        return ""
    image = decode_image(image_bytes(cell))
    image.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()


def render(diagnosis: Diagnosis, examples: dict[str, ExampleRow], *, command: str) -> str:
    """Render the report as HTML.

    Args:
        examples: rows to show in full, by id.
        command: the command line that wrote the report.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("dpo_mm.doctor").joinpath("doctor_report.html").read_text("utf-8")
    )
    counts = {severity: sum(f.severity == severity for f in diagnosis.findings) for severity in SEVERITIES}
    return template.render(
        diagnosis=diagnosis,
        examples=examples,
        full_examples=FULL_EXAMPLES,
        row_count_text=row_count_text,
        verdict=verdict(diagnosis),
        worst=next((severity for severity in SEVERITIES if counts[severity]), "none"),
        passed=[CHECKS[check].title for check in diagnosis.passed],
        command=command,
        shorten=shorten,
    )


def write_report(path: Path, diagnosis: Diagnosis, *, command: str) -> Path:
    """Write the report to a temporary file, then rename it.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(render(diagnosis, load_examples(diagnosis), command=command), encoding="utf-8")
    return path

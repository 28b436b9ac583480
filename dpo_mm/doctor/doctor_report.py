"""A diagnosis as a table for the terminal, and on one page that can be sent to someone.

The page is one file: no script, a policy that forbids any, and everything from the set is escaped by the template.
"""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_mm.data.image_files import decode_image, encode_png, image_bytes
from dpo_mm.doctor import Diagnosis
from dpo_mm.doctor.checks import CHECKS, SEVERITIES, share
from dpo_mm.doctor.image_features import look
from dpo_mm.doctor.loading import load_dataset, rows_called
from dpo_mm.doctor.response_checks import text
from dpo_mm.resumable import atomic_write

if TYPE_CHECKING:
    from rich.console import RenderableType

COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}
PICTURED, SIDE = 3, 160
"""Examples of a finding that are shown with both sides, and pixels of such a picture's longer side."""
CUT = 200
"""Characters that are shown of what is said of an example."""


def verdict(diagnosis: Diagnosis) -> str:
    """The findings in a few words: 2 errors, 1 warning."""
    counts = [(sum(f.severity == severity for f in diagnosis.findings), severity) for severity in SEVERITIES]
    words = [f"{count} {severity}{'s' * (count > 1)}" for count, severity in counts if count]
    return ", ".join(words) or "nothing found"


def terminal(diagnosis: Diagnosis) -> RenderableType:
    """What it holds, what was found, what to do, for the end of a command."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    held = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in diagnosis.facts.items():
        held.add_row(Text(key, style="dim"), Text(value))
    table = Table(header_style="bold", border_style="dim", show_lines=True)
    for name in ("", "finding", "rows"):
        table.add_column(name, justify="right" if name == "rows" else "left", overflow="fold")
    for one in diagnosis.findings:
        about = Text(one.title, style="bold").append(f"\n{one.what}", style="not bold")
        for row, what in one.examples[:3]:
            about.append(f"\n  {row}", style="not bold cyan").append(f"  {cut(what)}" if what else "", style="not bold")
        about.append(f"\n{one.advice}", style="not bold italic")
        table.add_row(Text(one.severity, COLOURS[one.severity]), about, f"{one.rows:,}")
    fine = Text(f"{verdict(diagnosis)}; {len(diagnosis.fine)} checks found nothing")
    return Group(held, *([table] if diagnosis.findings else []), fine)


def cut(text: str) -> str:
    """A text on one line, its middle left out where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= CUT else f"{text[: CUT * 2 // 3]} … {text[-CUT // 4 :]}"


class Shown(NamedTuple):
    """A row to look at: its prompt, and what its sides are called, as data URIs of pictures or as texts; "" where one
    can't be shown.
    """

    prompt: str
    sides: tuple[tuple[str, str], tuple[str, str]]


def shown_rows(diagnosis: Diagnosis) -> dict[str, Shown]:
    """The findings' first examples, by id, from one more look into the set."""
    ids = {row for one in diagnosis.findings for row, _ in one.examples[:PICTURED]}
    rows = rows_called(load_dataset(diagnosis.name), ids) if ids else {}
    return {name: _shown(row, diagnosis.kind) for name, row in rows.items()}


def _shown(row: dict[str, Any], kind: str) -> Shown:
    """Winner and loser, in that order; a and b where none won."""
    if kind == "answers":
        prompt, chosen, rejected = (cut(text(row[column])) for column in ("prompt", "chosen", "rejected"))
        return Shown(prompt, (("winner", chosen), ("loser", rejected)))
    a, b = (_thumbnail(row[side]) for side in ("image_a", "image_b"))
    won = {"a": (("winner", a), ("loser", b)), "b": (("winner", b), ("loser", a))}
    return Shown(cut(row["prompt"] or ""), won.get(row["preference"], (("a", a), ("b", b))))


def _thumbnail(cell: Any) -> str:
    if isinstance(look(cell), str):
        return ""
    image = decode_image(image_bytes(cell))
    image.thumbnail((SIDE, SIDE))
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()


def render(diagnosis: Diagnosis, shown: dict[str, Shown], *, command: str) -> str:
    """The page as HTML. shown: rows to look at, by id."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("dpo_mm.doctor").joinpath("doctor_report.html").read_text("utf-8")
    )
    fine = [CHECKS[check].title for check in diagnosis.fine]
    counts = {severity: sum(f.severity == severity for f in diagnosis.findings) for severity in SEVERITIES}
    worst = next((severity for severity in SEVERITIES if counts[severity]), "none")
    return template.render(
        diagnosis=diagnosis,
        shown=shown,
        pictured=PICTURED,
        share=share,
        verdict=verdict(diagnosis),
        worst=worst,
        fine=fine,
        command=command,
        cut=cut,
    )


def write_report(path: Path, diagnosis: Diagnosis, *, command: str) -> Path:
    """Write the page, aside and then renamed. Raises OSError where it can't be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as beside:
        beside.write_text(render(diagnosis, shown_rows(diagnosis), command=command), encoding="utf-8")
    return path

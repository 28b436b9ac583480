"""Write the table of sources and the list of the doctor's checks into docs/reference/datasets.md, from the code's own tables.

python docs/write_sets_table.py
"""

from __future__ import annotations

from pathlib import Path

from dpo_mm.doctor.checks import CHECKS
from dpo_mm.sources import SOURCES

PAGE = Path(__file__).parent / "reference" / "datasets.md"


def sources() -> str:
    lines = ["| source | gives | on the hub | licence | axes | notes |", "|---|---|---|---|---|---|"]
    for name, one in SOURCES.items():
        kind = f"single {one.kind}" if one.one_sided else f"pairs of {one.kind}"
        axes = ", ".join(one.axes) if len(one.axes) < 6 else f"{one.axes[0]}, or one of {len(one.axes) - 1} aspects"
        hub = f"`{one.hub}`" if one.hub else ""
        lines.append(f"| `{name}` | {kind} | {hub} | {one.license or ''} | {axes} | {one.notes} |")
    return "\n".join(lines)


def checks() -> str:
    lines = ["| finding | of | usually | what to do |", "|---|---|---|---|"]
    for about in CHECKS.values():
        lines.append(f"| {about.title} | {' and '.join(about.kinds)} | {about.severity} | {about.advice} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with both tables as they are now."""
    for name, table in (("sources", sources()), ("checks", checks())):
        before, rest = page.split(f"<!-- {name} -->\n")
        page = f"{before}<!-- {name} -->\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""Print every objective, its peer and the largest difference.

Writes docs/benchmarks/parity.json and the tables of docs/background/parity.md.

python -m tests.parity.table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import trl

from tests.parity.test_diffusion_formulas import FORMULAS, difference
from tests.parity.trl_peer import Peer, compare, comparisons

DOCS = Path(__file__).parents[2] / "docs"
OUT, PAGE = DOCS / "benchmarks" / "parity.json", DOCS / "background" / "parity.md"
SUMMARY_HEAD = "| peer | comparisons | largest difference of a value | of a gradient, relative |\n|---|---|---|---|\n"


def rows() -> list[dict[str, str | float]]:
    """Compare every objective with its peer, one row per comparison."""
    peer, table = Peer(), []
    for comparison in comparisons():
        measured = compare(peer, comparison)
        names = {"objective": comparison.objective, "peer": comparison.peer, "adapted": comparison.adapted}
        table.append({**names, "value": two_digits(measured.value), "gradient": two_digits(measured.gradient)})
    for formula in FORMULAS:
        value, gradient = difference(formula)
        names = {"objective": formula.objective, "peer": formula.peer, "adapted": ""}
        table.append({**names, "value": two_digits(value), "gradient": two_digits(gradient)})
    return table


def two_digits(number: float) -> float:
    """Round to two significant digits."""
    return float(f"{number:.1e}")


def peer_group(peer: str) -> str:
    """The row of the summary that a comparison belongs to."""
    if not peer.startswith("DPOTrainer"):
        return f"TRL {peer.split()[0]}" if "Trainer" in peer else "diffusion formulas, float64"
    if "," in peer:
        return "TRL DPOTrainer, divergences"
    special = any(word in peer for word in ("ld_alpha", "use_weighting", "+"))
    return f"TRL DPOTrainer, {'LD-DPO, WPO, mixture' if special else 'loss types and label smoothing'}"


def summary(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with one row per group of peers."""
    lines = []
    for name in dict.fromkeys(peer_group(str(row["peer"])) for row in rows):
        group = [row for row in rows if peer_group(str(row["peer"])) == name]
        worst = [max(float(row[key]) for row in group) for key in ("value", "gradient")]
        lines.append(f"| {name} | {len(group)} | {worst[0]:.1e} | {worst[1]:.1e} |")
    return SUMMARY_HEAD + "\n".join(lines)


def comparison_table(measured: dict[str, Any]) -> str:
    """A Markdown table of every comparison in docs/benchmarks/parity.json."""
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    lines = [
        f"| {row['objective'].replace('|', ' ')} | {row['peer']} | {row['adapted']} | {row['value']:.1e} | {row['gradient']:.1e} |"
        for row in measured["rows"]
    ]
    return (
        f"`{measured['command']}` wrote this table and [parity.json](../benchmarks/parity.json): {measured['precision']}, "
        f"{versions}. The difference of a value is relative above 1, that of a gradient relative to its norm.\n\n"
        "| objective | peer | adapted | value | gradient |\n|---|---|---|---|---|\n" + "\n".join(lines)
    )


def page_with_tables(page: str, measured: dict[str, Any]) -> str:
    """Return the page with both tables filled in from the measurements."""
    for name, table in (("summary", summary(measured["rows"])), ("comparisons", comparison_table(measured))):
        before, _, rest = page.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise ValueError(f"{PAGE}: no markers for {name}")
        page = f"{before}<!-- {name} -->\n{table}\n{end}{after}"
    return page


def main() -> None:
    table = rows()
    width = max(len(str(row["objective"])) for row in table), max(len(str(row["peer"])) for row in table)
    for row in table:
        numbers = f"{row['value']:8.1e} {row['gradient']:8.1e}"
        print(f"{row['objective']:{width[0]}} {row['peer']:{width[1]}} {numbers}  {row['adapted']}")
    worst = {key: max(float(row[key]) for row in table) for key in ("value", "gradient")}
    print(
        f"{len(table)} comparisons; largest difference of a value {worst['value']:.1e}, of a gradient {worst['gradient']:.1e}"
    )
    measured = {
        "command": "python -m tests.parity.table",
        "precision": "float32 against float32 (TRL) and float64 (formulas)",
        "versions": {"trl": trl.__version__, "torch": torch.__version__.split("+")[0]},
        "worst": worst,
        "rows": table,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(measured, indent=1) + "\n")
    PAGE.write_text(page_with_tables(PAGE.read_text(), measured))


if __name__ == "__main__":
    main()

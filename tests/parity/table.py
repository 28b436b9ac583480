"""Print objective x peer x largest difference; write docs/benchmarks/parity.json and the tables of docs/background/parity.md.

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
HEAD = "| peer | comparisons | largest difference of a value | of a gradient, relative |\n|---|---|---|---|\n"


def rows() -> list[dict[str, str | float]]:
    """One row a comparison."""
    peer, found = Peer(), []
    for comparison in comparisons():
        measured = compare(peer, comparison)
        names = {"objective": comparison.objective, "peer": comparison.peer, "adapted": comparison.adapted}
        found.append({**names, "value": short(measured.value), "gradient": short(measured.gradient)})
    for formula in FORMULAS:
        value, gradient = difference(formula)
        names = {"objective": formula.objective, "peer": formula.peer, "adapted": ""}
        found.append({**names, "value": short(value), "gradient": short(gradient)})
    return found


def short(number: float) -> float:
    return float(f"{number:.1e}")


def kind(peer: str) -> str:
    """The line of the summary that a comparison counts in."""
    if not peer.startswith("DPOTrainer"):
        return f"TRL {peer.split()[0]}" if "Trainer" in peer else "diffusion formulas, float64"
    if "," in peer:
        return "TRL DPOTrainer, divergences"
    special = any(word in peer for word in ("ld_alpha", "use_weighting", "+"))
    return f"TRL DPOTrainer, {'LD-DPO, WPO, mixture' if special else 'loss types and label_smoothing'}"


def summary(found: list[dict[str, Any]]) -> str:
    """The rows by kind of peer, as a table in Markdown."""
    lines = []
    for name in dict.fromkeys(kind(str(row["peer"])) for row in found):
        of_kind = [row for row in found if kind(str(row["peer"])) == name]
        worst = [max(float(row[key]) for row in of_kind) for key in ("value", "gradient")]
        lines.append(f"| {name} | {len(of_kind)} | {worst[0]:.1e} | {worst[1]:.1e} |")
    return HEAD + "\n".join(lines)


def every(measured: dict[str, Any]) -> str:
    """Every comparison that docs/benchmarks/parity.json holds, as a table in Markdown."""
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


def written(page: str, measured: dict[str, Any]) -> str:
    """The page with both tables as they were measured."""
    for name, table in (("summary", summary(measured["rows"])), ("comparisons", every(measured))):
        before, _, rest = page.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise ValueError(f"{PAGE}: no markers for {name}")
        page = f"{before}<!-- {name} -->\n{table}\n{end}{after}"
    return page


def main() -> None:
    found = rows()
    width = max(len(str(row["objective"])) for row in found), max(len(str(row["peer"])) for row in found)
    for row in found:
        numbers = f"{row['value']:8.1e} {row['gradient']:8.1e}"
        print(f"{row['objective']:{width[0]}} {row['peer']:{width[1]}} {numbers}  {row['adapted']}")
    worst = {key: max(float(row[key]) for row in found) for key in ("value", "gradient")}
    print(
        f"{len(found)} comparisons; largest difference of a value {worst['value']:.1e}, of a gradient {worst['gradient']:.1e}"
    )
    kept = {
        "command": "python -m tests.parity.table",
        "precision": "float32 against float32 (TRL) and float64 (formulas)",
        "versions": {"trl": trl.__version__, "torch": torch.__version__.split("+")[0]},
        "worst": worst,
        "rows": found,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text(written(PAGE.read_text(), kept))


if __name__ == "__main__":
    main()

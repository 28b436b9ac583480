"""The chosen pictures' denoising error under `sigmoid` and `sdpo`, training alone, on the shapes recipe cut short.

    python -m tests.bench.sdpo_drift OUTPUT.json [NAME...]

Same pairs and draws for all; errors relative to the reference's, means of ten steps. Adds to OUTPUT.json what isn't there.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from dpo_mm.cli.main import suppress_library_output
from dpo_mm.recipe import read_recipe

STEPS = 60
VARIATIONS: dict[str, dict[str, str]] = {
    "sigmoid": {},
    "sdpo, slack 0.9": {"objective": "sdpo", "objective_kwargs": "slack:0.9"},
}


def errors(name: str) -> dict[str, list[float]]:
    """Mean errors of each ten steps, by side."""
    from dpo_mm.training.run import train

    with suppress_library_output(), tempfile.TemporaryDirectory() as folder:
        given = {**VARIATIONS[name], "output_dir": folder, "log_every": "10", "steps": str(STEPS), "eval_fraction": "0"}
        log = train(read_recipe("faithfulness", "shapes", given).train).history
    sides = ("errors/chosen", "errors/rejected", "rewards/accuracies")
    return {side: [round(entry[side], 4) for entry in log if side in entry] for side in sides}


def main(out: Path, names: list[str]) -> None:
    for name in names or list(VARIATIONS):
        found = errors(name)
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
        rows = [row for row in rows if row["name"] != name] + [{"name": name, **found}]
        kept = {
            "command": "python -m tests.bench.sdpo_drift docs/benchmarks/sdpo_drift.json",
            "steps": STEPS,
            "rows": rows,
        }
        out.write_text(json.dumps(kept, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

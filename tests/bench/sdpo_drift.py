"""Measure the denoising errors of chosen and rejected images under `sigmoid` and `sdpo`, on a shortened shapes recipe.

    python -m tests.bench.sdpo_drift OUTPUT.json [NAME...]

All variations use the same pairs and noise. Errors are relative to the reference's, as means of ten steps. It only trains
and generates no images. A variation of the same name in OUTPUT.json is replaced, the others are unchanged.
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
    """Train a variation and return the means of every ten steps, by log key."""
    from dpo_mm.training.run import train

    with suppress_library_output(), tempfile.TemporaryDirectory() as folder:
        settings = {
            **VARIATIONS[name],
            "output_dir": folder,
            "log_every": "10",
            "steps": str(STEPS),
            "eval_fraction": "0",
        }
        log = train(read_recipe("faithfulness", "shapes", settings).train).history
    keys = ("errors/chosen", "errors/rejected", "rewards/accuracies")
    return {key: [round(entry[key], 4) for entry in log if key in entry] for key in keys}


def main(out: Path, names: list[str]) -> None:
    for name in names or list(VARIATIONS):
        means = errors(name)
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
        rows = [row for row in rows if row["name"] != name] + [{"name": name, **means}]
        report = {
            "command": "python -m tests.bench.sdpo_drift docs/benchmarks/sdpo_drift.json",
            "steps": STEPS,
            "rows": rows,
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

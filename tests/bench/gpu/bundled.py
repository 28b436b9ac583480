"""The tasks of `dpo-mm quickstart` on the bundled models: time of each step, and the rates before and after."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_mm.assets import resolve_asset
from dpo_mm.recipe import compare, mine, read_recipe
from dpo_mm.training.run import train
from tests.bench.gpu.cells import Cells


def quickstart(cells: Cells) -> None:
    """Mine, train and compare as the quickstart of a task does, without the start of the process."""
    settings = cells.settings
    with tempfile.TemporaryDirectory() as folder:
        overrides = {"output_dir": f"{folder}/run", **settings["overrides"]}
        if settings["rows"] and settings["task"] == "faithfulness":
            overrides["train.pairs"] = _first_rows("shapes-faithfulness", settings["rows"], Path(folder))
        recipe = read_recipe(settings["task"], "quickstart", overrides)
        made: dict[str, Any] = {}
        steps: dict[str, Callable[[], Any]] = {
            **({"mine": lambda: mine(recipe.mine)} if recipe.mine else {}),  # type: ignore[arg-type]
            "train": lambda: train(recipe.train),
            "compare": lambda: compare(recipe.compare, training=made["train"]),
        }
        for name, run in steps.items():
            cells.measure(name, lambda name=name, run=run: {"seconds": _seconds(name, run, made)})
        cells.measure("rates", lambda: _rates(made["compare"]))


def _first_rows(pairs: str, count: int, folder: Path) -> str:
    from datasets import Dataset

    file = str(folder / "pairs.parquet")
    Dataset.from_parquet(resolve_asset(pairs)).select(range(count)).to_parquet(file)  # type: ignore[union-attr]
    return file


def _seconds(name: str, run: Callable[[], Any], made: dict[str, Any]) -> float:
    start = time.perf_counter()
    made[name] = run()
    return time.perf_counter() - start


def _rates(result: Any) -> dict[str, Any]:
    rows = {
        one.metric: {"base": one.base, "tuned": one.tuned, "low": one.low, "high": one.high, "verdict": one.verdict}
        for one in result.comparisons
    }
    return {"verdict": result.verdict, "metrics": rows}

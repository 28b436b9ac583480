"""`dpo-mm verify` passes on a sound recipe, and prints what differs if a check fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_mm.config import TrainConfig
from dpo_mm.training import trainer as module
from dpo_mm.training.trainer import PreferenceTrainer
from dpo_mm.training.verify import verify
from tests import forked
from tests.contracts.tiny_vlms import save

BEST = {"metric_for_best_model": "eval_loss", "eval_every": 2, "eval_fraction": 0.2, "early_stopping_patience": 1}
"""Settings that save the weights of the best evaluation, which a run of a few steps does not make."""


def config(model: str, pairs: str, **more: Any) -> TrainConfig:
    settings = {"batch_size": 2, "learning_rate": 1e-3, **more}
    return TrainConfig(model=model, pairs=pairs, output_dir="", **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"reference": "precomputed", "fixed_draws_per_row": 2}, {"tuning": "full", **BEST}]
)
def test_sound_recipe_passes_every_check(more: dict[str, Any], tiny_model: str, pairs: str, tmp_path: Path) -> None:
    checks = list(verify(config(tiny_model, pairs, **more), tmp_path))
    assert len(checks) == 5 and all(check.passed for check in checks), checks
    assert sum("bit for bit" in check.observed for check in checks) == 3


@pytest.mark.slow
def test_command_prints_pass_and_leaves_no_files(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\npairs: {pairs}\nbatch_size: 2\n")
    done = forked.run("verify", str(recipe), "--learning-rate", "1e-3", cwd=tmp_path, check=True)
    assert done.stdout.count("pass  ") == 5 and [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.slow
def test_run_with_random_losses_fails_the_checks(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_loss, generator = PreferenceTrainer.compute_loss, torch.Generator().manual_seed(0)

    def loss(self: PreferenceTrainer, *arguments: Any, **keywords: Any) -> torch.Tensor:
        value: torch.Tensor = compute_loss(self, *arguments, **keywords)
        return value * (1 + torch.rand((), generator=generator))

    monkeypatch.setattr(module.PreferenceTrainer, "compute_loss", loss)
    failed = [check for check in verify(config(tiny_model, pairs), tmp_path) if not check.passed]
    assert [check.name.split()[0] for check in failed] == ["the", "cut"]
    assert all("tensors differ, by" in check.observed for check in failed)


@pytest.mark.slow
def test_vlm_recipe_passes_every_check(tmp_path: Path) -> None:
    from datasets import Dataset

    from dpo_mm.data.schema import response_preference
    from tests.contracts.tiny_vlms import rows

    model = save("llava", tmp_path / "model")
    examples = [{**row, "id": f"row-{n}"} for n, row in enumerate(rows("llava", (1,) * 6))]
    table = [{name: row.get(name) for name in response_preference()} for row in examples]
    Dataset.from_list(table, features=response_preference()).to_parquet(str(tmp_path / "pairs.parquet"))
    recipe = config(model, str(tmp_path / "pairs.parquet"), beta=0.1, learning_rate=1e-2)
    checks = list(verify(recipe, tmp_path / "runs"))
    assert all(check.passed for check in checks), checks

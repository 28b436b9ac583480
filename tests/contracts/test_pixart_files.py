"""PixArt-Sigma's adapters are PEFT's, because diffusers has no LoRA loader for it.

A run saves them, resumes from them and generates images with them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.policies.families import load_policy
from dpo_mm.training.run import train
from tests.conftest import rows
from tests.contracts.families import BUILDERS, WORDS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(BUILDERS["pixart-sigma"].build(tmp_path_factory.mktemp("pixart")))


def test_resumed_run_saves_the_same_adapter_and_it_changes_images(
    model: str, tmp_path: Path, write_pairs: Callable[..., str]
) -> None:
    pairs = write_pairs(rows(6))

    def run(name: str, steps: int, *, resume: bool = False) -> Path:
        return train(
            TrainConfig(
                model=model, pairs=pairs, output_dir=str(tmp_path / name), steps=steps, batch_size=2,
                save_every=1, eval_fraction=0.0, learning_rate=1e-2, lora_rank=4, lora_alpha=4, resume=resume,
            )
        ).folder  # fmt: skip

    whole = run("whole", 3)
    run("resumed", 2)
    resumed = run("resumed", 3, resume=True)
    expected, weights = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == weights.keys() and all(np.array_equal(expected[name], weights[name]) for name in expected)
    assert "PeftModel.from_pretrained(pipe.transformer" in (whole / "README.md").read_text()
    policy = load_policy(model)
    policy.load_adapter(whole)
    images = [
        np.asarray(next(policy.sample(WORDS[:1], [5], steps=2, guidance=2.0, batch_size=1, scale=scale))[0], dtype=int)
        for scale in (0.0, 0.5, 1.0)
    ]
    assert np.abs(images[2] - images[0]).max() > 0 and np.abs(images[2] - images[1]).max() > 0


def test_adapter_for_other_layers_raises(model: str, tmp_path: Path) -> None:
    def policy_with_targets(targets: tuple[str, ...]) -> object:
        policy = load_policy(model)
        policy.prepare(TrainConfig(model=model, pairs="-", output_dir="-", lora_targets=targets))
        return policy

    policy_with_targets(("to_q",)).save(tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"to_q.*does not fit this model's LoRA"):
        policy_with_targets(("to_k",)).load_weights(tmp_path)  # type: ignore[attr-defined]

"""PixArt-Sigma's adapters are PEFT's, since diffusers has none for it: a run saves, resumes and draws with them."""

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


def test_a_run_goes_on_where_it_was_and_its_adapter_draws(
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
    run("broken", 2)
    broken = run("broken", 3, resume=True)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, broken))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert "PeftModel.from_pretrained(pipe.transformer" in (whole / "README.md").read_text()
    policy = load_policy(model)
    policy.load_adapter(whole)
    drawn = [
        np.asarray(next(policy.sample(WORDS[:1], [5], steps=2, guidance=2.0, batch_size=1, scale=scale))[0], dtype=int)
        for scale in (0.0, 0.5, 1.0)
    ]
    assert np.abs(drawn[2] - drawn[0]).max() > 0 and np.abs(drawn[2] - drawn[1]).max() > 0


def test_an_adapter_of_other_layers_is_refused(model: str, tmp_path: Path) -> None:
    def prepared(targets: tuple[str, ...]) -> object:
        policy = load_policy(model)
        policy.prepare(TrainConfig(model=model, pairs="-", output_dir="-", lora_targets=targets))
        return policy

    prepared(("to_q",)).save(tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"to_q.*does not fit this model's LoRA"):
        prepared(("to_k",)).load_weights(tmp_path)  # type: ignore[attr-defined]

"""beta: auto: by hand, printed, kept in the checkpoint; and what beta is constant on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.config.config_parsing import config_from_mapping
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.diffusion.noise_process import RectifiedFlow
from dpo_mm.policies.families import load_policy
from dpo_mm.training import run as module
from dpo_mm.training.auto_beta import PAIRS, measure_beta
from dpo_mm.training.pair_stream import PairStream
from dpo_mm.training.run import dry_run, train
from tests.contracts.families.stable_diffusion import stable_diffusion_v


def config(model: str, pairs: str, out: Path, **more: Any) -> TrainConfig:
    given = {"steps": 6, "batch_size": 2, "log_every": 1, "eval_fraction": 0.0, "learning_rate": 1e-3, **more}
    return TrainConfig(model=model, pairs=pairs, output_dir=str(out), **given)


class Said:
    """A policy whose log-probs stand in the rows."""

    modality = "image"
    tokens = 1.0

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)

    def collate(self, rows: list[dict[str, Any]]) -> Any:
        return {side: torch.tensor([row[side] for row in rows]) for side in ("chosen", "rejected")}

    def log_probs(self, model: Any, batch: Any) -> LogProbs:
        tokens = torch.full((len(batch["chosen"]),), self.tokens)
        return LogProbs(batch["chosen"], batch["rejected"], tokens, tokens, is_likelihood=False)


def test_auto_beta_is_the_inverse_of_a_fraction_of_the_spread() -> None:
    """Differences -3, -1, 1, 3, sixteen times each: standard deviation 2.254; shares 2 % and 1/2. Means don't count."""
    rows = [{"id": str(n), "chosen": 7.0 + d, "rejected": 5.0} for n, d in enumerate((-3.0, -1.0, 1.0, 3.0))]
    given, stream = TrainConfig("-", "-", "-", batch_size=4), PairStream(rows, seed=0, length=4)
    assert measure_beta(Said(), stream, given) == 22.0
    policy = Said()
    policy.modality = "text"
    assert measure_beta(policy, stream, given) == 0.89
    assert PAIRS == 64
    policy.tokens = 8.0
    for name, beta in (("simpo", 7.1), ("ipo", 7.1), ("sigmoid", 0.89)):  # 8 * 0.89 without rounding
        assert measure_beta(policy, stream, dataclasses.replace(given, objective=name)) == beta
    mixed = dataclasses.replace(given, objective={"sigmoid": 1.0, "ipo": 1.0})
    assert measure_beta(policy, stream, mixed) == 0.89
    broken = PairStream([{**rows[0], "chosen": float("inf")}, *rows], seed=0, length=4)
    with pytest.raises(ValueError, match="needs finite log-probs"):
        measure_beta(policy, broken, given)
    alike = PairStream([rows[0]] * 4, seed=0, length=4)
    with pytest.raises(ValueError, match="all alike, give beta a number"):
        measure_beta(Said(), alike, given)


@pytest.mark.slow
def test_auto_beta_is_logged_saved_and_used_on_resume(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation that it catches: measuring again at resume, when the policy has moved."""
    whole = config(tiny_model, pairs, tmp_path / "whole", beta="auto")
    trained = train(whole)
    assert trained.settings["effective beta"].startswith(f"{trained.beta:g} in the Diffusion-DPO authors' convention")
    assert "measured on the first pairs" in dry_run(whole)["effective beta"]
    cut = dataclasses.replace(whole, output_dir=str(tmp_path / "cut"), save_every=4, steps=4)
    train(cut)
    kept = json.loads((tmp_path / "cut" / "checkpoint-4" / "dpo_mm.json").read_text())
    assert (kept["beta"], kept["measured_beta"]) == ("auto", trained.beta)
    monkeypatch.setattr(module, "measure_beta", lambda *_: pytest.fail("measured again"))
    resumed = train(dataclasses.replace(cut, steps=6, resume=True))
    ours, theirs = (load_file(run.folder / "pytorch_lora_weights.safetensors") for run in (trained, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and resumed.beta == trained.beta
    by_number = train(config(tiny_model, pairs, tmp_path / "number", beta=trained.beta))
    assert [e["loss"] for e in by_number.history if "loss" in e] == [e["loss"] for e in trained.history if "loss" in e]


def test_beta_other_than_a_number_or_auto_is_refused(tiny_model: str, pairs: str, out: str) -> None:
    needed = {"model": "m", "pairs": "p", "output_dir": "o"}
    found = [
        config_from_mapping(TrainConfig, {**needed, "beta": beta}, source="flags").beta
        for beta in ("500", 500, 0.1, "auto")
    ]
    assert found == [500.0, 500.0, 0.1, "auto"] and [type(one) for one in found] == [float, float, float, str]
    with pytest.raises(ValueError, match=r"beta is 'soon'\. Expected a number above 0, or auto"):
        train(config(tiny_model, pairs, Path(out), beta="soon"))
    with pytest.raises(ValueError, match="weighting 'noise' is unknown"):
        train(config(tiny_model, pairs, Path(out), loss_weighting="noise"))


@pytest.mark.parametrize("process", ["v", "velocity"])
def test_epsilon_weighting_equals_the_error_of_the_noise(process: str, pairs: str, tmp_path: Path) -> None:
    """beta constant on the noise: kept times v's error, (1 - s)^2 times a velocity's; derived here from x_t.

    Mutations that it catches: the factor's root, its inverse, 1 - kept, a factor on one side alone.
    """
    policy = load_policy(str(stable_diffusion_v(tmp_path / "model")))
    if process == "velocity":
        policy.noise_process = RectifiedFlow(1000, lambda levels, tokens: levels)
    policy.prepare(config("-", pairs, tmp_path))
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 16, 16, generator=generator) for _ in range(2))
    timestep = policy.noise_process.timesteps(torch.tensor([0.1, 0.4, 0.6, 0.9]), tokens=256)
    prompt = {"embeds": torch.randn(4, 16, 16, generator=generator)}
    noisy = policy.noise_process.add_noise(latents, noise, timestep)
    with torch.no_grad():
        said = policy.denoise(policy.model, noisy, timestep, prompt)
        plain = policy.denoising_errors(policy.model, latents, noise, timestep, prompt).mean
        policy.config = dataclasses.replace(policy.config, loss_weighting="epsilon")
        weighted = policy.denoising_errors(policy.model, latents, noise, timestep, prompt).mean
    if process == "v":
        kept = policy.scheduler.alphas_cumprod[timestep].double()[:, None, None, None]
        predicted = kept.sqrt() * said + (1 - kept).sqrt() * noisy
    else:
        predicted = noisy + (1 - timestep.double()[:, None, None, None] / 1000) * said
    expected = (predicted - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(weighted.double(), expected, rtol=1e-4, atol=1e-6)
    assert (weighted < 0.999 * plain).all()
    assert ("alpha_bar(t)" if process == "v" else "(1 - s)^2") in policy.describe(policy.config)["weighting"]

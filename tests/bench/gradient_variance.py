"""Measure the noise of a step's gradient for each way to sample timesteps and noise, at equal cost.

    python -m tests.bench.gradient_variance OUTPUT.json [--batches 40] [--moved]

It runs on the shapes base and its faithfulness pairs. A batch has 16 forward passes of a pair: 16 pairs, or 8 pairs with
antithetic noise. Let g be the gradient of one batch and G its mean over the batches. The variance is E|g - G|^2 (unbiased).
The signal is |G|^2 minus the noise in it. The noise-to-signal ratio is the number of batches after which signal and noise
are equal. A timestep range or the logit-normal distribution changes what is learned, so the table also has the cosine with
the mean gradient under uniform sampling.

--moved: measure after 60 steps of the recipe. At the start every pair has the same weight.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_mm.cli.main import suppress_library_output
from dpo_mm.config import TrainConfig
from dpo_mm.recipe import read_recipe

SAMPLING_SETTINGS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "stratified_timesteps": {"stratified_timesteps": True},
    "antithetic_noise": {"antithetic_noise": True},
    "stratified, antithetic": {"stratified_timesteps": True, "antithetic_noise": True},
    "logit-normal": {"timestep_sampling": "logit_normal"},
    "logit-normal, stratified": {"timestep_sampling": "logit_normal", "stratified_timesteps": True},
    "range 0.2 to 0.8": {"timestep_range": (0.2, 0.8)},
}
WARM_UP_STEPS = 60


def gradients(policy: Any, config: TrainConfig, rows: Any, batches: int) -> Tensor:
    """The gradient of each batch's mean loss, (batches, parameters), float32."""
    from dpo_mm.training.trainer import PreferenceTrainer

    policy.config = config
    trainer = PreferenceTrainer(policy, dataclasses.replace(config, steps=batches), rows)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    stream, batch_gradients = trainer.train_dataset, []
    for start in range(0, batches * config.batch_size, config.batch_size):
        batch = policy.collate([stream[n] for n in range(start, start + config.batch_size)])  # type: ignore[index]
        loss = trainer.compute_loss(policy.model, batch)
        batch_gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    return torch.stack(batch_gradients)


def summary(gradients: Tensor, uniform: Tensor) -> dict[str, float]:
    count, mean = len(gradients), gradients.mean(0)
    variance = ((gradients - mean).square().sum() / (count - 1)).item()
    signal = max(mean.square().sum().item() - variance / count, 1e-30)
    norms = (gradients - mean).square().sum(1) * count / (count - 1)
    return {
        "variance": variance,
        "standard_error": (norms.std() / count**0.5).item(),
        "signal": signal,
        "noise_to_signal": variance / signal,
        "cosine_with_uniform": torch.cosine_similarity(mean, uniform.mean(0), dim=0).item(),
    }


def main(arguments: list[str]) -> None:
    from dpo_mm.policies.adapters import LORA_FILE
    from dpo_mm.training.builders import build_policy
    from dpo_mm.training.encoding import encode_splits
    from dpo_mm.training.run import train

    out, after_warm_up = Path(arguments[0]), "--moved" in arguments
    batches = int(arguments[arguments.index("--batches") + 1]) if "--batches" in arguments else 40
    with suppress_library_output(), tempfile.TemporaryDirectory() as folder:
        config = read_recipe("faithfulness", "shapes", {"output_dir": folder}).train
        policy = build_policy(config)
        rows = encode_splits(policy, config).rows
        policy.prepare(config)
        if after_warm_up:
            warm_up = dataclasses.replace(config, steps=WARM_UP_STEPS, eval_fraction=0.05)
            policy.load_weights((train(warm_up).folder / LORA_FILE).parent)
        by_name: dict[str, Tensor] = {}
        for name, settings in SAMPLING_SETTINGS.items():
            by_name[name] = gradients(policy, dataclasses.replace(config, **settings), rows, batches)
            statistics = summary(by_name[name], by_name["uniform"])
            print(f"{name:30} " + "  ".join(f"{k} {v:.4g}" for k, v in statistics.items()), flush=True)
    table = [{"draws": name, **summary(samples, by_name["uniform"])} for name, samples in by_name.items()]
    command = f"python -m tests.bench.gradient_variance {out} --batches {batches}{' --moved' * after_warm_up}"
    out.write_text(json.dumps({"command": command, "batch": config.batch_size, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

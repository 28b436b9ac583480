"""How noisy the gradient of a step is under each way to draw timesteps and noise, at equal cost.

    python -m tests.bench.gradient_variance OUTPUT.json [--batches 40] [--moved]

On the shapes base and its faithfulness pairs: batches of 16 forwards of a pair, so 16 pairs, or 8 pairs with mirrored
noise. For a gradient g of one batch, with mean G over the batches: variance is E|g - G|^2 (unbiased), signal |G|^2 less
what noise adds to it, noise to signal their ratio: how many batches it takes to be as right as wrong. Ranges and the
logit-normal change what is learned, so their cosine with the uniform draws' mean gradient stands beside.

--moved: not at the start, where every pair weighs the same, but after 60 steps of the recipe.
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

WAYS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "stratified_timesteps": {"stratified_timesteps": True},
    "antithetic_noise": {"antithetic_noise": True},
    "stratified, antithetic": {"stratified_timesteps": True, "antithetic_noise": True},
    "logit-normal": {"timestep_sampling": "logit_normal"},
    "logit-normal, stratified": {"timestep_sampling": "logit_normal", "stratified_timesteps": True},
    "range 0.2 to 0.8": {"timestep_range": (0.2, 0.8)},
}
WARM = 60


def gradients(policy: Any, config: TrainConfig, rows: Any, batches: int) -> Tensor:
    """The gradient of each batch's mean loss, (batches, parameters), float32."""
    from dpo_mm.training.trainer import PreferenceTrainer

    policy.config = config
    trainer = PreferenceTrainer(policy, dataclasses.replace(config, steps=batches), rows)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    stream, found = trainer.train_dataset, []
    for start in range(0, batches * config.batch_size, config.batch_size):
        batch = policy.collate([stream[n] for n in range(start, start + config.batch_size)])  # type: ignore[index]
        loss = trainer.compute_loss(policy.model, batch)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    return torch.stack(found)


def summary(found: Tensor, uniform: Tensor) -> dict[str, float]:
    count, mean = len(found), found.mean(0)
    variance = ((found - mean).square().sum() / (count - 1)).item()
    signal = max(mean.square().sum().item() - variance / count, 1e-30)
    norms = (found - mean).square().sum(1) * count / (count - 1)
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

    out, moved = Path(arguments[0]), "--moved" in arguments
    batches = int(arguments[arguments.index("--batches") + 1]) if "--batches" in arguments else 40
    with suppress_library_output(), tempfile.TemporaryDirectory() as folder:
        config = read_recipe("faithfulness", "shapes", {"output_dir": folder}).train
        policy = build_policy(config)
        rows = encode_splits(policy, config).rows
        policy.prepare(config)
        if moved:
            short = dataclasses.replace(config, steps=WARM, eval_fraction=0.05)
            policy.load_weights((train(short).folder / LORA_FILE).parent)
        kept: dict[str, Tensor] = {}
        for name, way in WAYS.items():
            kept[name] = gradients(policy, dataclasses.replace(config, **way), rows, batches)
            found = summary(kept[name], kept["uniform"])
            print(f"{name:30} " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    table = [{"draws": name, **summary(found, kept["uniform"])} for name, found in kept.items()]
    command = f"python -m tests.bench.gradient_variance {out} --batches {batches}{' --moved' * moved}"
    out.write_text(json.dumps({"command": command, "batch": config.batch_size, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

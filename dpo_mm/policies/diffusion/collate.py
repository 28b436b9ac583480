"""Encoded rows of image pairs as one batch: latents, the draws, and what the denoiser is told.

A row has id, visit, chosen_mean, chosen_std, rejected_mean, rejected_std (c, h, w) and prompt, a dict of tensors. It may
have the columns of FROM_DATA, reference_chosen and reference_rejected (visits,), source_mean (c, h, w) of the picture to
edit, and chosen_x and rejected_x for each x of the policy's `conditioning_columns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_mm.objectives import DATASET_INPUTS
from dpo_mm.policies.diffusion import random_draws
from dpo_mm.policies.protocol import Batch

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy


def collate(policy: DiffusionPolicy, rows: list[dict[str, Any]]) -> Batch:
    """One batch of rows; each row's draw is a pure function of (seed, id, visit), the same for both sides.

    A row of a `PairStream` may say from which stratum of the schedule, and which sign its noise has.
    """
    kind, within = policy.config.timestep_sampling, policy.config.timestep_range
    keys = [(policy.config.seed, row["id"], row["visit"]) for row in rows]
    shape = tuple(rows[0]["chosen_mean"].shape)
    sample = _stack([random_draws.sample_noise(*key, shape, what="posterior") for key in keys])
    drawn = [
        random_draws.sample_noise_level(*key, kind=kind, within=within, stratum=row.get("stratum", (0, 1)))
        for key, row in zip(keys, rows, strict=True)
    ]
    noise = [row.get("sign", 1) * random_draws.sample_noise(*key, shape) for key, row in zip(keys, rows, strict=True)]
    levels = torch.tensor(drawn)
    batch: Batch = {
        "id": [row["id"] for row in rows],
        "chosen": _latents(policy, rows, "chosen", sample),
        "rejected": _latents(policy, rows, "rejected", sample),
        "noise": _stack(noise),
        "level": levels,
        "timestep": policy.noise_process.timesteps(levels, tokens=policy.tokens(shape)),
        "prompt": {name: padded([row["prompt"][name] for row in rows]) for name in rows[0]["prompt"]},
    }
    if "source_mean" in rows[0]:
        source = torch.stack([row["source_mean"] for row in rows]).float()
        batch["prompt"]["source"] = policy.latent_scale.normalised(source)
    for name in (f"{side}_{column}" for column in policy.conditioning_columns for side in ("chosen", "rejected")):
        if name in rows[0]:
            batch[name] = torch.stack([row[name] for row in rows])
    for name in DATASET_INPUTS:
        if name in rows[0]:
            batch[name] = torch.tensor([float(row[name]) for row in rows])
    if "number" in rows[0]:
        batch["number"] = torch.tensor([row["number"] for row in rows])
    for name in ("reference_chosen", "reference_rejected"):
        if name in rows[0]:
            batch[name] = torch.stack([row[name][row["visit"]] for row in rows])
    return batch


def _latents(policy: DiffusionPolicy, rows: list[dict[str, Any]], side: str, sample: Tensor) -> Tensor:
    """A sample of the autoencoder's posterior, as the denoiser takes it, (pairs, c, h, w) float32."""
    mean = torch.stack([row[f"{side}_mean"] for row in rows]).float()
    std = torch.stack([row[f"{side}_std"] for row in rows]).float()
    return policy.latent_scale.normalised(mean + std * sample)


def padded(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one, the shorter ones filled up with zeros (a family's mask must say so), their dtype kept."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    return nn.utils.rnn.pad_sequence(list(tensors), batch_first=True)


def _stack(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))

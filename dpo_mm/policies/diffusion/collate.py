"""Collate encoded image pairs into a batch: latents, noise, timesteps and prompts.

An encoded row has `id`, `visit` (the row's epoch), `chosen_mean`, `chosen_std`, `rejected_mean`, `rejected_std`
(channels, height, width) and `prompt`, a dict of tensors. A one-sided row has nothing of a rejected image. It may also
have:

- the columns of DATASET_INPUTS,
- `reference_chosen` and `reference_rejected`, (epochs,),
- variants of its prompt and its images, see `row_variants`,
- `source_mean` of the image to edit, (channels, height, width), and `source_2_mean` and so on of further ones,
- `rejected_prompt`, `rejected_source_mean` and so on of a disliked image that has another prompt, see `CoupledRows`,
- `chosen_x` and `rejected_x` for each x of the policy's `conditioning_columns`,
- `stratum` and `sign`, which a `PairStream` adds: the part of the noise schedule and the sign of the noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_mm.objectives import DATASET_INPUTS
from dpo_mm.policies.diffusion import random_draws
from dpo_mm.policies.diffusion.prompt_sources import source_name
from dpo_mm.policies.diffusion.row_variants import draw_variants
from dpo_mm.policies.protocol import Batch

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy


def collate(policy: DiffusionPolicy, rows: list[dict[str, Any]]) -> Batch:
    """Make a batch from encoded rows.

    Noise, noise level, posterior sample and variant of a row depend only on (seed, id, visit). They are the same for chosen and
    rejected.

    Args:
        policy: a prepared policy.
        rows: encoded rows of equal latent shape.

    Returns:
        A dict with `id`, `chosen`, `rejected` and `noise` (pairs, channels, height, width), `level` and `timestep`
        (pairs,), and `prompt`. Optional columns of the rows are added under their names.
    """
    keys = [(policy.config.seed, row["id"], row["visit"]) for row in rows]
    rows = draw_variants(policy.config, rows, keys)
    shape = tuple(rows[0]["chosen_mean"].shape)
    sides = [side for side in ("chosen", "rejected") if f"{side}_mean" in rows[0]]
    posterior_noise = _stack_arrays([random_draws.sample_noise(*key, shape, purpose="posterior") for key in keys])
    levels = _sample_levels(policy, rows, keys)
    noise = [row.get("sign", 1) * random_draws.sample_noise(*key, shape) for key, row in zip(keys, rows, strict=True)]
    batch: Batch = {
        "id": [row["id"] for row in rows],
        **{side: _sample_latents(policy, rows, side, posterior_noise) for side in sides},
        "noise": _stack_arrays(noise),
        "level": levels,
        "timestep": policy.noise_process.timesteps(levels, tokens=policy.num_tokens(shape)),
        **_prompts(policy, rows),
    }
    for name in (f"{side}_{column}" for column in policy.conditioning_columns for side in sides):
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


def _prompts(policy: DiffusionPolicy, rows: list[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """Prompts with the images to edit, and those of disliked images. All are padded to one length."""
    names = [name for name in ("prompt", "rejected_prompt") if name in rows[0]]
    stacked = {
        part: stack_padded([row[name][part] for name in names for row in rows]).split(len(rows))
        for part in rows[0]["prompt"]
    }
    if policy.cuts_prompts:  # here, because the length of a prompt on the GPU is a number that the host would wait for
        longest = max(int(masks.sum(1).max()) for masks in stacked["mask"])
        stacked = {part: tuple(values[:, :longest].contiguous() for values in stacked[part]) for part in stacked}
    prompts: dict[str, dict[str, Tensor]] = {
        str(name): {part: values[n] for part, values in stacked.items()} for n, name in enumerate(names)
    }
    for name, start in (("prompt", ""), ("rejected_prompt", "rejected_")):
        for number in itertools.count():
            source = source_name(number)
            if f"{start}{source}_mean" not in rows[0]:
                break
            latents = torch.stack([row[f"{start}{source}_mean"] for row in rows]).float()
            prompts[name][source] = policy.latent_scale.normalise(latents)
    return prompts


def _sample_levels(policy: DiffusionPolicy, rows: list[dict[str, Any]], keys: list[tuple[int, str, int]]) -> Tensor:
    """Sample a noise level per row, (pairs,)."""
    config = policy.config
    levels = [
        random_draws.sample_noise_level(
            *key,
            distribution=config.timestep_sampling,
            level_range=config.timestep_range,
            stratum=row.get("stratum", (0, 1)),
        )
        for key, row in zip(keys, rows, strict=True)
    ]
    return torch.tensor(levels)


def _sample_latents(policy: DiffusionPolicy, rows: list[dict[str, Any]], side: str, noise: Tensor) -> Tensor:
    """Sample the autoencoder's posterior, normalised for the denoiser, (pairs, channels, height, width) float32."""
    mean = torch.stack([row[f"{side}_mean"] for row in rows]).float()
    std = torch.stack([row[f"{side}_std"] for row in rows]).float()
    return policy.latent_scale.normalise(mean + std * noise)


def stack_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors, filling shorter ones up with zeros at the end of their first dimension.

    The dtype is unchanged. A family whose prompts differ in length must have a mask.
    """
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    return nn.utils.rnn.pad_sequence(list(tensors), batch_first=True)


def _stack_arrays(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))

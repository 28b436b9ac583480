"""Properties of the objective of a run: its names and inputs, whether it is plain fine-tuning, and the SFT baseline of a run."""

from __future__ import annotations

import dataclasses

from dpo_mm import objectives
from dpo_mm.config import TrainConfig

OPTIONAL_INPUTS = ("reference_logps", "z", "reward_shift", "corrupted_ratio", "rejected_gradient_scale")
UNPAIRED = ("kto", "bco_pair", "apo_zero", "aot_unpaired")
"""Objectives whose chosen and rejected sides need not respond to the same prompt. TRL has the first and the third for
unpaired rows (`KTOTrainer`, losses kto and apo_zero_unpaired)."""

PER_TOKEN = ("ipo", "sigmoid_norm", "simpo")
"""Objectives whose beta multiplies log-probs per token."""


def objective_names(config: TrainConfig) -> list[str]:
    """Return the names of the config's objectives, without the term of `sft_weight`."""
    return [config.objective] if isinstance(config.objective, str) else list(config.objective)


def required_inputs(config: TrainConfig) -> set[str]:
    """Return the OPTIONAL_INPUTS that the config's objectives take."""
    return {what for what in OPTIONAL_INPUTS if any(objectives.takes(name, what) for name in objective_names(config))}


def is_fine_tuning(config: TrainConfig) -> bool:
    """Return True if the only objective is `sft`, which uses the chosen side only and no reference."""
    return objective_names(config) == ["sft"]


def takes_beta(config: TrainConfig) -> bool:
    """Return True if an objective of the config has the setting beta."""
    return any("beta" in objectives.keyword_settings(name) for name in objective_names(config))


def sft_baseline_config(config: TrainConfig) -> TrainConfig:
    """Return the config of the SFT baseline: the same chosen side, steps and adapter.

    If the best weights are chosen by a measure of pairs, which SFT does not have, the baseline's are chosen by eval_loss.
    """
    metric = config.metric_for_best_model
    return dataclasses.replace(
        config,
        objective="sft",
        objective_kwargs={},
        sft_weight=0.0,
        beta=TrainConfig.beta,
        ld_alpha=TrainConfig.ld_alpha,
        edited_token_weight=TrainConfig.edited_token_weight,
        pair_layout=TrainConfig.pair_layout,
        reference="auto",
        fixed_draws_per_row=0,
        metric_for_best_model="eval_loss" if metric and metric.startswith("eval_") else metric,
        output_dir=f"{config.output_dir}-sft",
    )

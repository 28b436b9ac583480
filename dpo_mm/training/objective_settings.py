"""Properties of the objective of a run: its names and inputs, and whether it is plain fine-tuning."""

from __future__ import annotations

from dpo_mm import objectives
from dpo_mm.config import TrainConfig

OPTIONAL_INPUTS = ("reference_logps", "z", "reward_shift", "corrupted_ratio", "rejected_gradient_scale")
UNPAIRED = ("kto", "bco_pair", "apo_zero", "aot_unpaired")
"""Objectives whose chosen and rejected sides need not respond to the same prompt. TRL has the first and the third for
unpaired rows (`KTOTrainer`, losses kto and apo_zero_unpaired)."""


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

"""Build the parts of a run from its settings: loss, policy, arguments of the loop. Invalid settings are refused here."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from dpo_mm import objectives
from dpo_mm.config import TrainConfig
from dpo_mm.errors import did_you_mean
from dpo_mm.models.quantization import check_quantize
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.adapters import check_lora_format
from dpo_mm.policies.diffusion.random_draws import TIMESTEP_DISTRIBUTIONS
from dpo_mm.policies.diffusion.text_encoder_lora import refuse_text_encoder, select_encoders
from dpo_mm.policies.families import load_policy, policy_class
from dpo_mm.policies.protocol import ImagePolicy, Modality, TextPolicy
from dpo_mm.policies.start_adapter import check_start, start_from
from dpo_mm.policies.vlm.model_files import PIXEL_LIMITS
from dpo_mm.training.auto_beta import AUTO
from dpo_mm.training.best_weights import validate_best_weights
from dpo_mm.training.half_precision import HALVES
from dpo_mm.training.objective_settings import is_fine_tuning, objective_names, required_inputs, takes_beta
from dpo_mm.training.reference import resolve_reference_name
from dpo_mm.training.samples import validate_samples
from dpo_mm.training.tracking import validate_trackers
from dpo_mm.training.training_rows import PAIRS_ONLY

DEFAULT_SLACK = 0.9
"""Default slack of `sdpo`: Diffusion-SDPO's for SD1.5. For SDXL the paper uses 0.6."""
IMAGE_ONLY_SETTINGS = (
    "resolution", "sample_prompts", "num_inference_steps", "guidance_scale", "buckets", "cache_precision", "timestep_sampling", "timestep_range", "stratified_timesteps", "antithetic_noise", "loss_weighting", "proportion_empty_prompts", "random_flip", "train_text_encoder"
)  # fmt: skip
"""Settings for image generators only."""
TEXT_ONLY_SETTINGS = (
    "sample_questions",
    "max_new_tokens",
    "train_vision_tower",
    "min_pixels",
    "max_pixels",
    "max_length",
    "overlong_rows",
    "train_sampling_strategy",
    "pair_layout",
    "ld_alpha",
    "edited_token_weight",
    "cache_vision_features",
)
"""Settings for vision-language models only."""
TEXT_RUN_SETTINGS = ("sample_questions", "max_new_tokens", "train_sampling_strategy", "cache_vision_features")
"""Those of TEXT_ONLY_SETTINGS that the model does not take."""
UNCHANGED = TrainConfig(model="", pairs="", output_dir="")
"""Default of every setting."""
SAMPLING_STRATEGIES = ("random", "group_by_length")
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_torch": "adamw_torch",
    "adamw_bnb_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "adafactor": "adafactor",
}
"""The Trainer's names of the optimizers. The first two are short names."""


def build_loss(
    config: TrainConfig, *, modality: Modality
) -> Callable[[LogProbs, LogProbs | None, Mapping[str, Tensor]], Tensor]:
    """Build the loss of a config: its objectives by weight, plus the SFT term if it has a weight.

    The loss is tried on one invented pair, so that invalid settings fail before anything is trained.

    Args:
        config: settings of the run.
        modality: decides if log-probs are likelihoods (text) or the denoising surrogate (image).

    Returns:
        A function of (policy_logps, reference_logps, batch) that returns the loss per pair, (pairs,).

    Raises:
        ValueError: if a setting is out of range, or an objective does not support the modality.
    """
    named = {config.objective: 1.0} if isinstance(config.objective, str) else dict(config.objective)
    settings = dict(config.objective_kwargs)
    if takes_beta(config):
        settings["beta"] = 1.0 if config.beta == AUTO else _number(config.beta)
    settings.pop("slack", None) if "sdpo" in named else None
    if config.sft_weight:
        named["sft"] = named.get("sft", 0.0) + config.sft_weight
    loss = objectives.mixture(named, settings)
    one = torch.ones(2)
    sample = LogProbs(-one, -one, one, one, is_likelihood=modality == "text")
    given = {"probability": one, "score_margin": one, "z": torch.zeros(()), "reward_shift": torch.zeros(())}
    given |= {"rejected_gradient_scale": torch.zeros(2)} | (
        {"corrupted_ratio": torch.zeros(2)} if modality == "text" else {}
    )
    loss(sample, sample, given)
    return loss


def _number(beta: float | str) -> float:
    if isinstance(beta, str):
        raise ValueError(f"beta is {beta!r}. Expected a number above 0, or {AUTO}")
    return beta


def validate_config(config: TrainConfig, family: Any = None, *, has_eval_rows: bool = False) -> None:
    """Refuse every invalid setting that can be found before a model is loaded.

    Args:
        config: settings of the run.
        family: policy class of the model. None: that of the model that the config names.
        has_eval_rows: rows to evaluate on are given, so that none are split off.

    Raises:
        ValueError: with the setting and the fix.
    """
    family = family or policy_class(config.model, revision=config.revision)
    modality: Modality = family.modality
    check_lora_format(config, getattr(family, "kohya_prefix", None), family=family.__name__)
    check_start(config)
    refuse_text_encoder(config, family, resolve_reference_name(config))
    build_loss(config, modality=modality)
    draws = 1 if modality == "text" else config.fixed_draws_per_row
    if resolve_reference_name(config) == "precomputed" and draws < 1:
        raise ValueError(
            "reference 'precomputed' needs fixed_draws_per_row of at least 1, the number of noise samples per row"
        )
    if resolve_reference_name(config) == "precomputed" and "corrupted_ratio" in required_inputs(config):
        raise ValueError("reference 'precomputed' does not go with image_conditional; take adapter_off or frozen_copy")
    settings: tuple[str, ...]
    if modality == "text":
        owner, given, settings = "image generators", "a vision-language model", IMAGE_ONLY_SETTINGS
    else:
        owner, given, settings = "vision-language models", "an image generator", TEXT_ONLY_SETTINGS
    if config.undecodable_images not in ("raise", "drop"):
        raise ValueError(f"undecodable_images {config.undecodable_images!r} is unknown; expected 'raise' or 'drop'")
    strange = [name for name in settings if getattr(config, name) != getattr(TrainConfig, name)]
    if strange:
        raise ValueError(f"{strange[0]} is a setting of {owner}; {config.model} is {given}")
    if config.train_sampling_strategy not in SAMPLING_STRATEGIES:
        known = did_you_mean(config.train_sampling_strategy, SAMPLING_STRATEGIES)
        raise ValueError(f"train_sampling_strategy {config.train_sampling_strategy!r} is unknown; {known}")
    _validate_timestep_settings(config)
    _validate_quantize(config)
    _validate_durations(config)
    validate_trackers(config)
    validate_samples(config, modality=modality)
    validate_best_weights(config, modality=modality)
    _refuse_ignored_settings(config, modality=modality, has_eval_rows=has_eval_rows)
    training_arguments(config)


def _refuse_ignored_settings(config: TrainConfig, *, modality: Modality, has_eval_rows: bool) -> None:
    """Refuse settings that another setting makes ineffective, and a default that suits images only."""
    changed = {name for name, value in vars(config).items() if value != getattr(UNCHANGED, name)}
    named, fine_tuning = objective_names(config), is_fine_tuning(config)
    if modality == "text" and takes_beta(config) and "beta" not in changed:
        raise ValueError(f"beta is {config.beta}, the default for image generators. Set beta for text, for example 0.1")
    for names, is_used, reason in (
        (
            ("lora_rank", "lora_alpha", "use_rslora", "use_dora", "lora_targets", "lora_format", "train_text_encoder"),
            config.tuning == "lora",
            f"tuning is {config.tuning}",
        ),
        (("beta",), not (fine_tuning and config.beta == AUTO), "objective sft has no beta"),
        (("sft_weight", *PAIRS_ONLY), not fine_tuning, "objective sft is the loss on the chosen side only"),
        (("adapter_result",), config.adapter and config.tuning == "lora", "there is no adapter, or tuning is full"),
        (("reference_ema_decay",), config.reference == "moving_average", f"reference is {config.reference}"),
        (("reference_sync_steps",), config.reference == "synced", f"reference is {config.reference}"),
        (
            ("reference",),
            "reference_logps" in required_inputs(config),
            f"objective {', '.join(named)} has no reference",
        ),
        (("steps",), config.num_train_epochs is None, f"num_train_epochs is {config.num_train_epochs}"),
        (("warmup_steps",), config.schedule != "constant", "schedule is constant. Take constant_with_warmup"),
        (("eval_every",), has_eval_rows or config.eval_fraction > 0, "eval_fraction is 0"),
        (("eval_fraction",), not (has_eval_rows and config.eval_fraction), "eval_dataset has the rows to evaluate on"),
        (("ld_alpha",), config.edited_token_weight == 1, "edited_token_weight replaces the sum that it changes"),
        (
            ("fixed_draws_per_row",),
            modality == "image",
            f"{config.model} is a vision-language model, which has no noise",
        ),
    ):
        ignored = [name for name in names if name in changed]
        if ignored and not is_used:
            raise ValueError(f"{ignored[0]} has no effect, because {reason}. Remove one of the two settings")


def _validate_quantize(config: TrainConfig) -> None:
    check_quantize(config.quantize)
    if config.quantize and config.tuning != "lora":
        raise ValueError(
            f"quantize {config.quantize!r} needs tuning: lora, because quantised weights cannot be trained"
        )


def _validate_durations(config: TrainConfig) -> None:
    if config.num_train_epochs == 0:
        raise ValueError("num_train_epochs is 0. Expected a value above 0")
    if config.warmup_steps >= 1 and config.warmup_steps != int(config.warmup_steps):
        raise ValueError(
            f"warmup_steps is {config.warmup_steps:g}. Expected a whole number, or a fraction of all steps below 1"
        )


def steps_of_epochs(config: TrainConfig, num_pairs: int, processes: int) -> TrainConfig:
    """Return the config with the steps of its num_train_epochs, or the same config if it has none.

    The steps are the smallest number that takes each pair num_train_epochs times. Batches go on across the end of an epoch.

    Args:
        config: settings of the run.
        num_pairs: pairs to train on.
        processes: number of processes.
    """
    if config.num_train_epochs is None:
        return config
    samples = config.num_train_epochs * num_pairs * (2 if config.antithetic_noise else 1)
    per_step = config.batch_size * config.accumulate * processes
    return dataclasses.replace(config, steps=max(1, math.ceil(samples / per_step)))


def warmup_steps(config: TrainConfig) -> int:
    """Return the number of warm-up steps. A fraction is rounded up, as the Trainer does."""
    if config.warmup_steps < 1:
        return math.ceil(config.warmup_steps * config.steps)
    return int(config.warmup_steps)


def _validate_timestep_settings(config: TrainConfig) -> None:
    if config.timestep_sampling not in TIMESTEP_DISTRIBUTIONS:
        raise ValueError(
            f"timestep_sampling {config.timestep_sampling!r} is unknown; {did_you_mean(config.timestep_sampling, TIMESTEP_DISTRIBUTIONS)}"
        )
    if config.loss_weighting not in ("target", "epsilon"):
        raise ValueError(f"loss_weighting {config.loss_weighting!r} is unknown; expected target or epsilon")
    low, high = config.timestep_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"timestep_range is {low:g} to {high:g}; expected 0 <= low < high <= 1, 0 clean, 1 pure noise")
    if config.antithetic_noise and (config.batch_size % 2 or config.fixed_draws_per_row):
        raise ValueError(
            "antithetic_noise needs an even batch_size, because each pair comes twice, and no fixed_draws_per_row"
        )


def build_policy(config: TrainConfig, *, weights: bool = True) -> ImagePolicy | TextPolicy:
    """Load the policy that a config trains, not yet prepared.

    Args:
        config: settings of the run.
        weights: False leaves an image generator on the meta device, see `meta_pipeline`.

    Raises:
        ValueError: as `load_policy`, and if the config's adapter cannot be the start of the run.
    """
    options = policy_options(config, policy_class(config.model, revision=config.revision).modality)
    if "resolution" in options:
        options |= {"weights": weights, "one_at_a_time": True}
    else:
        options |= {name: getattr(config, name) for name in PIXEL_LIMITS}
    precision = config.precision if config.tuning == "lora" else "fp32"
    if config.quantize:
        options["quantize"] = config.quantize
    policy = load_policy(config.model, revision=config.revision, precision=precision, adapter=config.adapter, **options)
    if config.adapter:
        start_from(policy, config)
    if policy.modality == "image":
        select_encoders(policy, config)
    return policy


def policy_options(config: TrainConfig, modality: Modality) -> dict[str, Any]:
    """Return the settings that a policy gets when it is made, by name."""
    if modality == "image":
        return {"resolution": config.resolution}
    names = [name for name in TEXT_ONLY_SETTINGS if name not in (*TEXT_RUN_SETTINGS, *PIXEL_LIMITS)]
    return {name: getattr(config, name) for name in names} | {"corrupt": "corrupted_ratio" in required_inputs(config)}


def refuse_fsdp_on_cpu(config: TrainConfig) -> None:
    """Raise ValueError if accelerate's config asks for FSDP on a CPU, where accelerate would ignore it."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if fsdp and training_arguments(config).device.type == "cpu":
        raise ValueError(
            "accelerate's config asks for FSDP, which accelerate does not run on a CPU: every process would train the whole "
            "model. Use GPUs, or a config without FSDP (ddp.yaml)"
        )


def _optimizer(name: str) -> str:
    """Translate an optimizer's name for the Trainer. Raises ValueError if it is unknown or its package is not installed."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is unknown; {did_you_mean(name, OPTIMIZERS)}")
    full_name = OPTIMIZERS[name]
    if full_name.endswith("bit") and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"optimizer {name!r} needs bitsandbytes; pip install 'dpo-mm[8bit]', or take adafactor")
    if full_name.startswith("paged") and not torch.cuda.is_available():
        raise ValueError(
            f"optimizer {name!r} needs an NVIDIA GPU, whose memory it pages. Take adamw_bnb_8bit or adafactor"
        )
    return full_name


def has_tf32(precision: str) -> bool:
    """True if the run computes in half precision, on a GPU that has TF32: all that have bf16."""
    return precision in HALVES and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Translate a config to the Trainer's arguments. Raises ValueError for an unknown precision or optimizer."""
    if config.precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision {config.precision!r} is unknown; expected fp32, bf16 or fp16")
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        optim=_optimizer(config.optimizer),
        lr_scheduler_type=config.schedule,
        warmup_steps=warmup_steps(config),
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        tf32=True if has_tf32(config.precision) else None,  # for what remains float32, such as a LoRA
        seed=config.seed,
        logging_steps=config.log_every,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or config.steps,
        save_total_limit=config.save_total_limit,
        dataloader_num_workers=config.workers or 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        logging_nan_inf_filter=False,  # it waits for the GPU twice per batch, and the log has our own means
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(config.report_to) or "none",
        run_name=config.run_name or Path(config.output_dir).name,
    )

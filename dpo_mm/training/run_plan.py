"""Plan of a run: the lines that it prints before its first step and writes into its card."""

from __future__ import annotations

import torch

from dpo_mm.config import TrainConfig
from dpo_mm.data.several_captions import describe_captions
from dpo_mm.models.quantization import stored_size
from dpo_mm.policies.diffusion.text_encoder_lora import trained_model
from dpo_mm.policies.protocol import ImagePolicy, TextPolicy
from dpo_mm.policies.start_adapter import continues, describe_start
from dpo_mm.training.attention_kernels import describe_attention
from dpo_mm.training.auto_beta import AUTO
from dpo_mm.training.objective_settings import is_fine_tuning, objective_names, required_inputs, takes_beta
from dpo_mm.training.reference import resolve_reference_name
from dpo_mm.training.training_rows import TrainingRows


def run_summary(
    policy: ImagePolicy | TextPolicy, config: TrainConfig, loaded: TrainingRows, count: int, *, commit: str | None
) -> dict[str, str]:
    """Summarise a run before it starts: pairs, steps, objective, reference, memory, and the policy's own lines.

    Args:
        policy: prepared.
        config: settings of the run.
        loaded: the rows of the run.
        count: number of rows or couples to train on.
        commit: of a model of the hub.
    """
    num_trained = sum(tensor.numel() for tensor in trained_model(policy).parameters() if tensor.requires_grad)
    num_bytes = stored_size(trained_model(policy))
    reference = resolve_reference_name(config) if "reference_logps" in required_inputs(config) else "none"
    epochs = f" ({config.num_train_epochs:g} epochs)" if config.num_train_epochs else ""
    copies = 2 if reference == "frozen_copy" else 1
    of_policy = policy.describe(config)
    if not takes_beta(config):
        of_policy.pop("effective beta", None)
        unused = ["beta"] if config.beta != TrainConfig.beta else []
        unused += ["pair_layout"] if is_fine_tuning(config) and config.pair_layout == "shared_prefix" else []
        if unused:
            of_policy["no effect"] = (
                f"{' and '.join(unused)}, because objective {', '.join(objective_names(config))} has none"
            )
    if loaded.one_sided:
        of_policy.pop("layout", None)
    if is_fine_tuning(config):
        text = policy.modality == "text"
        of_policy["reduction"] = "mean per token of each chosen response" if text else "mean over latent elements"
    unknown = {"effective beta": "measured on the first pairs before the first step"} if config.beta == AUTO else {}
    return {
        **({"revision": commit} if commit else {}),
        **describe_start(policy, config),
        "pairs": f"{config.pairs}{f' ({loaded.about})' if loaded.about else ''}, {loaded.describe(count)}",
        "steps": f"{config.steps} of {config.batch_size} x {config.accumulate} {'rows' if is_fine_tuning(config) else 'pairs'} per process{epochs}",
        "objective": f"{config.objective}{f' + {config.sft_weight:g} sft' if config.sft_weight else ''}",
        "reference": f"{reference}, which is the adapter"
        if continues(config) and reference == "adapter_off"
        else reference,
        "tuning": f"{config.tuning}, {num_trained:,} trained parameters",
        "precision": f"{config.precision}{f', frozen linear layers in {config.quantize}' if config.quantize else ''}",
        **describe_attention("cuda" if torch.cuda.is_available() else "cpu"),
        "memory": f"about {(copies * num_bytes + 12 * num_trained) / 2**20:,.0f} MiB for weights, gradients and Adam, plus activations",
        **of_policy,
        **(describe_captions(loaded.train) if policy.modality == "image" else {}),
        **unknown,
    }

"""Lines of a run's summary for image generators: target, reduction, loss weighting, and beta in other conventions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion.distilled import describe_distillation

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy


def describe(policy: DiffusionPolicy, config: TrainConfig) -> dict[str, str]:
    """Return family, target, reduction, loss weighting, and the effective beta if it is a number already."""
    elements = policy.latent_channels() * (policy.resolution // policy.pipe.vae_scale_factor) ** 2
    if policy.frames > 1:
        elements *= (policy.frames - 1) // policy.pipe.vae_scale_factor_temporal + 1
    process = policy.noise_process
    flipped = "each image" if config.objective == "sft" else "both images of a pair"
    distilled = describe_distillation(policy.pipe, policy.source)
    return {
        **({"distilled": distilled} if distilled else {}),
        "family": f"{type(policy).__name__}, {type(policy.pipe).__name__}",
        "target": f"{process.name} ({type(process).__name__}), error in float32",
        "reduction": f"mean over {elements:,} latent elements, 1/2 inside the log-ratio",
        "weighting": _describe_weighting(process.name, config),
        **(
            {"empty prompts": f"{config.proportion_empty_prompts:.0%} of the draws"}
            if config.proportion_empty_prompts
            else {}
        ),
        **(
            {"text encoders": f"LoRA on {', '.join(policy.trained_encoders)}, prompts are encoded in each step"}
            if policy.trained_encoders
            else {}
        ),
        **({"flips": f"{flipped}, in half of the epochs"} if config.random_flip else {}),
        **({} if isinstance(config.beta, str) else {"effective beta": _describe_beta(config.beta, elements)}),
    }


def _describe_weighting(prediction: str, config: TrainConfig) -> str:
    if prediction == "epsilon":
        return "target, which is the noise"
    factor = {"v": "alpha_bar(t)", "velocity": "(1 - s)^2"}.get(prediction, "factor")
    if config.loss_weighting == "epsilon":
        return f"epsilon: the {prediction} error times {factor} is the noise error. beta is constant on the noise error"
    return f"target: beta is constant on the {prediction} error. On the noise error it is beta / {factor}"


def _describe_beta(beta: float, elements: int) -> str:
    return (
        f"{beta:g} in the Diffusion-DPO authors' convention = {beta / 2:g} in diffusers' script "
        f"= {beta / elements:.3g} on summed errors"
    )

"""The table of objectives by name, and the weighted sum of several as one loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpo_mm.objectives.denoising import DENOISING
from dpo_mm.objectives.divergences import apply_divergence
from dpo_mm.objectives.log_probs import LogProbs, require
from dpo_mm.objectives.one_sided import ONE_SIDED
from dpo_mm.objectives.optimal_transport import OPTIMAL_TRANSPORT
from dpo_mm.objectives.pairwise import PAIRWISE, SUPPORTS_DIVERGENCE
from dpo_mm.objectives.reference_free import REFERENCE_FREE
from dpo_mm.objectives.terms import TERMS

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    **PAIRWISE,
    **OPTIMAL_TRANSPORT,
    **ONE_SIDED,
    **DENOISING,
    **REFERENCE_FREE,
    **TERMS,
}
"""Every objective by its name."""

LOG_PROB_INPUTS = ("policy_logps", "reference_logps")
"""Arguments that are log-probs of the pairs."""
DATASET_INPUTS = ("probability", "score_margin")
"""Arguments that are a column of the pairs."""
BATCH_INPUTS = (
    "z",  # kto_reference
    "reward_shift",  # bco_shift
    "rejected_gradient_scale",  # sdpo_lambda_image or sdpo_lambda_text
    "corrupted_ratio",  # a forward pass with the corrupted image
    "other_ratio",  # a forward pass with the second image
    "crossed_ratio",
    "kl_chosen",  # from whole token distributions
    "kl_rejected",
)
"""Arguments that are computed from the batches of all processes, or by a further forward pass."""


def keyword_settings(name: str) -> dict[str, inspect.Parameter]:
    """Return the settings that an objective takes, by name.

    Raises:
        ValueError: if the objective is unknown.
    """
    if name not in OBJECTIVES:
        from dpo_mm.errors import did_you_mean

        raise ValueError(f"objective {name!r} is unknown; {did_you_mean(name, OBJECTIVES)}")
    parameters = inspect.signature(OBJECTIVES[name]).parameters
    inputs = (*LOG_PROB_INPUTS, *DATASET_INPUTS, *BATCH_INPUTS)
    return {key: value for key, value in parameters.items() if key not in inputs}


def takes(name: str, argument: str) -> bool:
    """Return True if an objective takes this argument, such as "reference_logps" or "z"."""
    return argument in inspect.signature(OBJECTIVES[name]).parameters


def mixture(
    weights: Mapping[str, float],
    settings: Mapping[str, float],
    *,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Callable[[LogProbs, LogProbs | None, Mapping[str, Tensor]], Tensor]:
    """Build one loss as a weighted sum of objectives.

        loss = sum over objectives of weight * objective

    Args:
        weights: weight of each objective, by its name in OBJECTIVES.
        settings: keyword arguments. Each objective gets those that it takes.
        divergence: a name in DIVERGENCES, for the objectives of delta.
        divergence_alpha: parameter of the alpha divergence. The others ignore it.

    Returns:
        A function of (policy_logps, reference_logps, inputs) that returns a loss per pair, (pairs,). `inputs` maps names
        of DATASET_INPUTS and BATCH_INPUTS to tensors, and the function raises ValueError if one is missing.

    Raises:
        ValueError: if an objective is unknown, no objective takes a setting, an objective lacks a setting, or the
            divergence does not apply.

    Source: MPO, Wang et al. 2024 (2411.10442), eq. 2.
    """
    require(bool(weights), "no objective given. Name at least one, such as 'sigmoid'")
    known = {name: keyword_settings(name) for name in weights}
    _check_settings(known, settings)
    if divergence != "reverse_kl":
        unsupported = [name for name in weights if takes(name, "reference_logps") and name not in SUPPORTS_DIVERGENCE]
        fix = f"Use it with {', '.join(SUPPORTS_DIVERGENCE)}"
        require(not unsupported, f"divergence {divergence!r} does not go with {' and '.join(unsupported)}. {fix}")
    parts = [
        (weight, name, functools.partial(OBJECTIVES[name], **{k: v for k, v in settings.items() if k in known[name]}))
        for name, weight in weights.items()
    ]

    def loss(policy_logps: LogProbs, reference_logps: LogProbs | None, inputs: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros_like(policy_logps.chosen)
        scores = policy_logps, reference_logps
        if divergence != "reverse_kl" and reference_logps is not None:
            scores = apply_divergence(policy_logps, reference_logps, divergence=divergence, alpha=divergence_alpha)
        for weight, name, objective in parts:
            # A divergence replaces log-ratios only. A reference-free objective needs the log-probs themselves.
            logps = scores if takes(name, "reference_logps") else (policy_logps,)
            total = total + weight * objective(*logps, **_select_inputs(name, inputs))
        return total

    return loss


def _check_settings(known: Mapping[str, Mapping[str, inspect.Parameter]], settings: Mapping[str, float]) -> None:
    all_settings = {key for parameters in known.values() for key in parameters}
    unused = [key for key in settings if key not in all_settings]
    if unused:
        from dpo_mm.errors import did_you_mean

        raise ValueError(
            f"{' and '.join(unused)}: not a setting of {' or '.join(known)}; {did_you_mean(unused[0], all_settings)}"
        )
    for name, parameters in known.items():
        for key, parameter in parameters.items():
            is_set = key in settings or parameter.default is not inspect.Parameter.empty
            require(is_set, f"objective {name!r} needs the setting {key!r}, which is missing and has no default")


def _select_inputs(name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    required = [key for key in (*DATASET_INPUTS, *BATCH_INPUTS) if takes(name, key)]
    for key in required:
        kind = "the column" if key in DATASET_INPUTS else "the batch's"
        require(key in inputs, f"objective {name!r} needs {kind} {key!r}, which these pairs do not have")
    return {key: inputs[key] for key in required}

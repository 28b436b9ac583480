"""Objectives by name, and one loss out of several by weight."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpo_mm.objectives.denoising import DENOISING
from dpo_mm.objectives.divergences import scored
from dpo_mm.objectives.log_probs import LogProbs, require
from dpo_mm.objectives.one_sided import ONE_SIDED
from dpo_mm.objectives.pairwise import PAIRWISE, SUPPORTS_DIVERGENCE
from dpo_mm.objectives.reference_free import REFERENCE_FREE
from dpo_mm.objectives.terms import TERMS

OBJECTIVES: dict[str, Callable[..., Tensor]] = {**PAIRWISE, **ONE_SIDED, **DENOISING, **REFERENCE_FREE, **TERMS}

DATASET_INPUTS = ("probability", "score_margin")
"""Arguments that are a column of the pairs."""
BATCH_INPUTS = (
    "z",  # kto_reference
    "reward_shift",  # bco_shift
    "rejected_gradient_scale",  # sdpo_lambda_image or sdpo_lambda_text
    "corrupted_ratio",  # a forward with the corrupted image
    "other_ratio",  # a forward with the second image
    "crossed_ratio",
    "kl_chosen",  # from whole token distributions
    "kl_rejected",
)
"""Arguments that are made from the batches of all processes, or from a further forward."""


def keyword_settings(name: str) -> dict[str, inspect.Parameter]:
    """Settings that an objective takes, by name.

    Raises:
        ValueError: if the objective is unknown.
    """
    if name not in OBJECTIVES:
        from dpo_mm.errors import did_you_mean

        raise ValueError(f"objective {name!r} is unknown; {did_you_mean(name, OBJECTIVES)}")
    parameters = inspect.signature(OBJECTIVES[name]).parameters
    given = ("policy_logps", "reference_logps", *DATASET_INPUTS, *BATCH_INPUTS)
    return {key: value for key, value in parameters.items() if key not in given}


def takes(name: str, argument: str) -> bool:
    """Tell if an objective takes this argument, such as "reference_logps" or "z"."""
    return argument in inspect.signature(OBJECTIVES[name]).parameters


def mixture(
    weights: Mapping[str, float],
    settings: Mapping[str, float],
    *,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Callable[[LogProbs, LogProbs | None, Mapping[str, Tensor]], Tensor]:
    """Build one loss from several objectives by weight.

    Args:
        weights: weight by name of an objective.
        settings: keyword arguments. Each objective gets those that it takes.
        divergence: a name in DIVERGENCES, for objectives of delta.
        divergence_alpha: parameter of the alpha divergence.

    Returns:
        A function of (policy_logps, reference_logps, data) that returns the loss per pair, (pairs,). `data` has the values of
        DATASET_INPUTS and BATCH_INPUTS.

    Raises:
        ValueError: if an objective is unknown, a setting is not taken by any or missing for one, a divergence does not apply, or
        a column is missing.

    Source: mixing as in MPO, Wang et al. 2024 (2411.10442), eq. 2.
    """
    require(bool(weights), "no objective given; name one, such as 'sigmoid'")
    known = {name: keyword_settings(name) for name in weights}
    _check_settings(known, settings)
    if divergence != "reverse_kl":
        wrong = [name for name in weights if takes(name, "reference_logps") and name not in SUPPORTS_DIVERGENCE]
        fix = f"it goes with {', '.join(SUPPORTS_DIVERGENCE)}"
        require(not wrong, f"divergence {divergence!r} does not go with {' and '.join(wrong)}; {fix}")
    parts = [
        (weight, name, functools.partial(OBJECTIVES[name], **{k: v for k, v in settings.items() if k in known[name]}))
        for name, weight in weights.items()
    ]

    def loss(policy_logps: LogProbs, reference_logps: LogProbs | None, data: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros_like(policy_logps.chosen)
        scores = policy_logps, reference_logps
        if divergence != "reverse_kl" and reference_logps is not None:
            scores = scored(policy_logps, reference_logps, divergence=divergence, alpha=divergence_alpha)
        for weight, name, function in parts:
            compared, against = scores if takes(name, "reference_logps") else (policy_logps, None)
            total = total + weight * function(compared, **_inputs(name, against, data))
        return total

    return loss


def _check_settings(known: Mapping[str, Mapping[str, inspect.Parameter]], settings: Mapping[str, float]) -> None:
    every = {key for taken in known.values() for key in taken}
    unused = [key for key in settings if key not in every]
    if unused:
        from dpo_mm.errors import did_you_mean

        raise ValueError(
            f"{' and '.join(unused)}: not a setting of {' or '.join(known)}; {did_you_mean(unused[0], every)}"
        )
    for name, taken in known.items():
        for key, value in taken.items():
            given = key in settings or value.default is not inspect.Parameter.empty
            require(given, f"objective {name!r} needs the setting {key!r}, which is not given and has no default")


def _inputs(name: str, reference_logps: LogProbs | None, data: Mapping[str, Tensor]) -> dict[str, object]:
    inputs: dict[str, object] = {"reference_logps": reference_logps} if takes(name, "reference_logps") else {}
    for key in (*DATASET_INPUTS, *BATCH_INPUTS):
        if takes(name, key):
            whose = "the column" if key in DATASET_INPUTS else "the batch's"
            require(key in data, f"objective {name!r} needs {whose} {key!r}, which these pairs do not have")
            inputs[key] = data[key]
    return inputs

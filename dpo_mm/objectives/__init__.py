"""Preference objectives: pure functions from log-probs to one loss per pair.

Symbols, for one pair: w is chosen and l is rejected. r = log p_policy - log p_reference is the log-ratio, beta * r the
implicit reward, and delta = r_w - r_l. An image's log-prob is -1/2 of its denoising error, so that `beta` means the same
as in the code of the Diffusion-DPO authors. The diffusers research script leaves out the 1/2, and its beta is half of
this one.

To add an objective, write the function in the file of its kind and add it to the table at the end of that file. Keyword
arguments are settings (`beta`, ...) unless their name is in DATASET_INPUTS or BATCH_INPUTS. The trainer fills those in.
"""

from dpo_mm.objectives.denoising import linear, mapo, sdpo, sdpo_lambda_image
from dpo_mm.objectives.divergences import DIVERGENCES, apply_divergence
from dpo_mm.objectives.log_probs import LogProbs, deltas, denoising_errors, log_ratios, per_token_deltas
from dpo_mm.objectives.mixing import BATCH_INPUTS, DATASET_INPUTS, OBJECTIVES, keyword_settings, mixture, takes
from dpo_mm.objectives.one_sided import (
    apo_down,
    apo_zero,
    bco_pair,
    bco_shift,
    kto,
    kto_reference,
    nca_pair,
    sppo_hard,
)
from dpo_mm.objectives.optimal_transport import aot, aot_unpaired
from dpo_mm.objectives.pairwise import (
    SUPPORTS_DIVERGENCE,
    discopop,
    dpop,
    exo_pair,
    hinge,
    ipo,
    margin,
    robust,
    sigmoid,
    sigmoid_norm,
    soft,
)
from dpo_mm.objectives.reference_free import cpo, orpo, sft, simpo
from dpo_mm.objectives.terms import anchor, image_conditional, symmetric_image, tdpo
from dpo_mm.objectives.tokens import on_policy_weight, sdpo_lambda_text, segment_mean, shared_length

MPO = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
"""Weights of mixed preference optimisation, Wang et al. 2024 (2411.10442)."""

__all__ = [
    "BATCH_INPUTS",
    "DATASET_INPUTS",
    "DIVERGENCES",
    "MPO",
    "OBJECTIVES",
    "SUPPORTS_DIVERGENCE",
    "LogProbs",
    "anchor",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apply_divergence",
    "bco_pair",
    "bco_shift",
    "cpo",
    "deltas",
    "denoising_errors",
    "discopop",
    "dpop",
    "exo_pair",
    "hinge",
    "image_conditional",
    "ipo",
    "keyword_settings",
    "kto",
    "kto_reference",
    "linear",
    "log_ratios",
    "mapo",
    "margin",
    "mixture",
    "nca_pair",
    "on_policy_weight",
    "orpo",
    "per_token_deltas",
    "robust",
    "sdpo",
    "sdpo_lambda_image",
    "sdpo_lambda_text",
    "segment_mean",
    "sft",
    "shared_length",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "soft",
    "sppo_hard",
    "symmetric_image",
    "takes",
    "tdpo",
]

"""Error of the reward margin in bfloat16, by layout of the pairs and precision of the logits, on tiny models of each family.

    python -m tests.bench.half_precision docs/benchmarks/half-precision.json   # 2 CPU minutes

The margin is the log-ratio of chosen minus that of rejected, nats. It is compared with that of the same weights, which are
multiples of bfloat16, in float32 arithmetic. A flip is a margin with the other sign, so that its loss is on the other side of
ln 2. The adapters are random and so small that margins are those of first steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dpo_mm.config import TrainConfig
from dpo_mm.objectives import deltas
from dpo_mm.policies.vlm import token_log_probs
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.training.reference import adapter_off
from tests.contracts.tiny_vlms import IMAGES, build, rows

PAIRS = 12
ADAPTER = 0.005
"""Standard deviation of the second matrices of the LoRA."""


def logits_in_bfloat16(head: Any, own_forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """Logits that are rounded to bfloat16 before they become float32."""
    return own_forward(states).to(torch.bfloat16).float()


@dataclass(frozen=True)
class Way:
    """How margins are computed."""

    layout: str
    weights: torch.dtype = torch.bfloat16
    autocast: bool = False
    logits: Callable[..., Tensor] = token_log_probs.float32_logits


WAYS = {
    "shared": Way("shared_prefix"),
    "separate": Way("separate"),
    "shared, logits in bfloat16": Way("shared_prefix", logits=logits_in_bfloat16),
    "separate, logits in bfloat16": Way("separate", logits=logits_in_bfloat16),
    "shared, only the logits in bfloat16": Way("shared_prefix", torch.float32, logits=logits_in_bfloat16),
    "shared, weights in float32 under autocast": Way("shared_prefix", torch.float32, autocast=True),
}
"""Ways to compute margins. Logits are in float32 unless the name says otherwise, and all else is in bfloat16."""


def policy_of(family: str) -> VisionLanguage:
    """A policy with weights that bfloat16 can hold, and a random LoRA in float32."""
    model, processor = build(family)
    policy = VisionLanguage(model.to(torch.bfloat16).float(), processor, family)
    policy.prepare(TrainConfig(model="m", pairs="p", output_dir="o", lora_rank=4, lora_alpha=8))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=ADAPTER, generator=generator)
    return policy


def set_precision(policy: VisionLanguage, dtype: torch.dtype) -> None:
    """Change the precision of all weights but the LoRA's."""
    for name, parameter in policy.model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def margins(policy: VisionLanguage, encoded: list[Any], way: Way) -> Tensor:
    """Margins of all pairs, nats, (pairs,)."""
    set_precision(policy, way.weights)
    policy.token_log_probs.layout = way.layout
    reference, parts = adapter_off(policy), []
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=way.autocast)
    with mock.patch.object(token_log_probs, "float32_logits", way.logits), autocast:
        for start in range(0, len(encoded), 4):
            batch = policy.collate(encoded[start : start + 4])
            before = reference(policy.model, batch)
            parts.append(deltas(policy.log_probs(policy.model, batch), before))
    return torch.cat(parts).double()


def measure(family: str) -> dict[str, Any]:
    """Margin errors of a family."""
    policy = policy_of(family)
    encoded = policy.encode(rows(family, (1,) * PAIRS))
    with torch.no_grad():
        policy.log_probs(policy.model, policy.collate(encoded[:2]))  # chooses how the head is computed
    exact = margins(policy, encoded, Way("separate", torch.float32))
    tokens = statistics.median(len(row[f"{side}_ids"]) for row in encoded for side in ("chosen", "rejected"))
    results: dict[str, Any] = {"median_margin": float(exact.abs().median()), "median_tokens": tokens}
    for name, way in WAYS.items():
        computed = margins(policy, encoded, way)
        errors = (computed - exact).abs()
        results[name] = {
            "median_error": float(errors.median()),
            "largest_error": float(errors.max()),
            "flips": int(((computed > 0) != (exact > 0)).sum()),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    families = {}
    for family in sorted(IMAGES):
        families[family] = measure(family)
        print(family, json.dumps(families[family]), flush=True)
    summary = {
        way: {
            "median_error": statistics.median(result[way]["median_error"] for result in families.values()),
            "largest_error": max(result[way]["largest_error"] for result in families.values()),
            "flips": sum(result[way]["flips"] for result in families.values()),
        }
        for way in WAYS
    }
    margin = statistics.median(result["median_margin"] for result in families.values())
    print(json.dumps(summary, indent=1))
    result = {"pairs": PAIRS * len(families), "median_margin": margin, "summary": summary, "families": families}
    out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

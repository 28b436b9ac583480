"""Tiny random pipelines of the stock classes, a file a family: the next one adds its file and its rows to BUILDERS."""

from __future__ import annotations

from tests.contracts.families.parts import Family
from tests.contracts.families.stable_diffusion import (
    stable_diffusion,
    stable_diffusion_tiny_vae,
    stable_diffusion_v,
)
from tests.contracts.families.words import WORDS

__all__ = ["BUILDERS", "WORDS", "Family", "stable_diffusion"]

BUILDERS: dict[str, Family] = {
    "stable-diffusion": Family(stable_diffusion),
    "stable-diffusion-v": Family(stable_diffusion_v, target="v"),
    "stable-diffusion-tiny-vae": Family(stable_diffusion_tiny_vae),
}

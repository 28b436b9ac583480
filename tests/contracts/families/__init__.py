"""Tiny random pipelines of the stock classes, a file a family: the next one adds its file and its rows to BUILDERS."""

from __future__ import annotations

from tests.contracts.families.flux2_klein import FLUX2_KLEIN
from tests.contracts.families.parts import Family
from tests.contracts.families.pixart_sigma import PIXART_SIGMA
from tests.contracts.families.qwen_image import QWEN_IMAGE
from tests.contracts.families.sana import SANA
from tests.contracts.families.stable_diffusion import (
    stable_diffusion,
    stable_diffusion_tiny_vae,
    stable_diffusion_v,
)
from tests.contracts.families.words import WORDS
from tests.contracts.families.z_image import Z_IMAGE

__all__ = ["BUILDERS", "WORDS", "Family", "stable_diffusion"]

BUILDERS: dict[str, Family] = {
    "stable-diffusion": Family(stable_diffusion),
    "stable-diffusion-v": Family(stable_diffusion_v, target="v"),
    "stable-diffusion-tiny-vae": Family(stable_diffusion_tiny_vae),
    "pixart-sigma": PIXART_SIGMA,
    "sana": SANA,
    "qwen-image": QWEN_IMAGE,
    "z-image": Z_IMAGE,
    "flux2-klein": FLUX2_KLEIN,
}

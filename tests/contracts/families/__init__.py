"""Tiny pipelines of diffusers' classes with random weights, one file per family.

To add a family, add its file, and its rows to BUILDERS.
"""

from __future__ import annotations

from tests.contracts.families import (
    chroma,
    ernie_image,
    flux,
    flux2_dev,
    flux2_klein,
    hidream,
    krea2,
    longcat_image,
    pixart_sigma,
    qwen_image,
    qwen_image21,
    qwen_image_edit,
    sana,
    sd3,
    sdxl,
    wan,
    z_image,
)
from tests.contracts.families import stable_diffusion as stable_diffusion_families
from tests.contracts.families.parts import Family
from tests.contracts.families.stable_diffusion import stable_diffusion
from tests.contracts.families.words import WORDS

__all__ = ["BUILDERS", "WORDS", "Family", "stable_diffusion"]

BUILDERS: dict[str, Family] = {
    **stable_diffusion_families.FAMILIES,
    **sdxl.FAMILIES,
    **sd3.FAMILIES,
    **flux.FAMILIES,
    **chroma.FAMILIES,
    **pixart_sigma.FAMILIES,
    **sana.FAMILIES,
    **qwen_image.FAMILIES,
    **qwen_image21.FAMILIES,
    **longcat_image.FAMILIES,
    **ernie_image.FAMILIES,
    **qwen_image_edit.FAMILIES,
    **krea2.FAMILIES,
    **hidream.FAMILIES,
    **wan.FAMILIES,
    **z_image.FAMILIES,
    **flux2_dev.FAMILIES,
    **flux2_klein.FAMILIES,
}

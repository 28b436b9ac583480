"""Names of modules in kohya's files, for families in which they are not diffusers' names."""

from __future__ import annotations

import re
from typing import Any

BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)(?:\.(.+))?")
INNER = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
"""Layers of a residual block, by diffusers' names."""


def sdxl_module(name: str, config: Any) -> str:
    """Return a module's name in the UNet of kohya's scripts for SDXL, which numbers its blocks as the original model does.

    Source: sd-scripts, `library/sdxl_original_unet.py` and `networks/lora.py`.

    Args:
        name: name in diffusers' UNet, with dots.
        config: the UNet's config: layers_per_block and up_block_types.

    Returns:
        The name with dots. Modules outside the blocks keep theirs, because kohya's scripts do not adapt them.
    """
    each = int(config["layers_per_block"]) + 1
    if match := MIDDLE.fullmatch(name):
        kind, number, rest = match.groups()
        return _join("middle_block", 1 if kind == "attentions" else 2 * int(number), _inner(kind, rest))
    if not (match := BLOCK.fullmatch(name)):
        return name
    side, block, kind, number, rest = match.groups()
    if kind == "downsamplers":
        return _join("input_blocks", (int(block) + 1) * each, 0, "op")
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in config["up_block_types"][int(block)] else 1
        return _join("output_blocks", int(block) * each + each - 1, place, rest)
    first = 1 if side == "down" else 0
    group = "input_blocks" if side == "down" else "output_blocks"
    return _join(group, first + int(block) * each + int(number), int(kind == "attentions"), _inner(kind, rest))


def _inner(kind: str, rest: str | None) -> str | None:
    return INNER.get(rest, rest) if kind == "resnets" and rest else rest


def _join(*parts: str | int | None) -> str:
    return ".".join(str(part) for part in parts if part is not None)

"""Positions and windows of images, computed on the host before a batch is moved.

They follow from the sizes of images. Models compute them from tensors on the device, and read these
values on the host, which waits for the device each time.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from torch import Tensor

from dpo_mm.policies.vlm.packed_attention import packed_fields
from dpo_mm.policies.vlm.shared_prefix import packed_positions

logger = logging.getLogger(__name__)

TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm_ocr")
"""Types of models whose vision tower takes the arguments of `_tower_arguments`."""


def add_host_values(base_model: Any, batch: dict[str, Any]) -> None:
    """Add positions and the arguments of the vision tower to a batch, if they can be computed on the host.

    Without them the model computes them on the device, where an error has its message.

    Args:
        base_model: a transformers model without wrappers.
        batch: from `pair_batches.collate`, on the host.
    """
    model_type, sizes = base_model.config.model_type, batch["images"].get("image_grid_thw")
    try:
        batch["positions"] = packed_positions(base_model, batch)
        if model_type in TOWERS and sizes is not None and "pixel_values" in batch["images"]:
            batch["tower"] = _tower_arguments(base_model.base_model.visual, sizes)
    except Exception as error:
        logger.debug("%s: positions or windows cannot be computed on the host (%s)", model_type, error)
    if "corrupted" in batch:
        add_host_values(base_model, batch["corrupted"])


def _tower_arguments(tower: Any, sizes: Tensor) -> dict[str, Any]:
    """Sizes of images, arguments of a tower by name, and its sequences by the name of their boundaries.

    Args:
        tower: a vision tower of a model in TOWERS.
        sizes: frames, height and width of each image in patches, (images, 3).
    """
    from transformers import vision_utils

    used = vars(sys.modules[type(tower).__module__])
    boundaries = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(sizes)}
    values = {"position_ids": vision_utils.get_vision_position_ids(sizes, tower.spatial_merge_size)}
    if "get_vision_window_index" in used:
        values["window_index"], boundaries["cu_window_seqlens"] = vision_utils.get_vision_window_index(
            sizes, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
    if "get_vision_interpolation_indices_and_weights" in used:
        names = ("interp_indices", "interp_weights")
        indices_and_weights = vision_utils.get_vision_interpolation_indices_and_weights(
            sizes,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.spatial_merge_size,
        )
        values |= dict(zip(names, indices_and_weights, strict=True))
    longest = {
        name.replace("cu", "max").replace("seqlens", "seqlen"): int(ends.diff().max())
        for name, ends in boundaries.items()
    }
    return {
        "sizes": sizes.tolist(),
        "arguments": {**values, **boundaries, **longest},
        "sequences": {name: packed_fields(ends) for name, ends in boundaries.items()},
    }

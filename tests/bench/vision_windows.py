"""Calls of a vision tower with windows, with one call per window and with windows of equal length in one call.

    python -m tests.bench.vision_windows --out docs/benchmarks/vision-windows.json   # 15 CPU seconds

The tower is Qwen2.5-VL's with its 32 layers, windows and patches, random weights and a narrow width, which changes no count.
`launches` counts operations that launch a kernel on a GPU, `synchronisations` the calls for which the host waits for it.
The first batch also compares the kernels, so the second is counted. A GPU may have a kernel for unequal windows too, with one
call per layer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_mm.policies.vlm.packed_attention import pack_attention
from tests.operation_counts import OperationCounts

LAYERS = {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]}
SIZES = {"576": (24, 24), "1008": (24, 42), "1024": (32, 32), "576 and 1024": (24, 24, 32, 32)}
"""Height and width of the images in tokens, by their number of tokens. A token is 2 x 2 patches."""


def tower() -> Any:
    """Qwen2.5-VL's vision tower with its layers and windows, and a width of 16."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    width = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(vision_config=LAYERS | width).vision_config
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return Qwen2_5_VisionTransformerPretrainedModel(config).eval()


def images(*sizes: int) -> dict[str, Tensor]:
    """Random patches of images, whose height and width in tokens follow one another."""
    grid = torch.tensor([[1, 2 * height, 2 * width] for height, width in zip(sizes[::2], sizes[1::2], strict=True)])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
    return {"hidden_states": patches, "grid_thw": grid}


def measure(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Count the calls of one forward pass with either attention, and compare the features."""
    results, features = [], []
    for attention in ("one call per window", "packed"):
        model.config._attn_implementation = "sdpa"
        if attention == "packed":
            pack_attention(model)
        with torch.no_grad():
            model(**inputs)
            with OperationCounts() as counts:
                features.append(model(**inputs).pooler_output)
        results.append(
            {
                "attention": counts.attention,
                "launches": counts.launches,
                "synchronisations": counts.num_synchronisations,
            }
        )
    difference = float((features[0] - features[1]).abs().max())
    return {"one call per window": results[0], "packed": results[1], "largest_difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, results = tower(), {}
    for tokens, size in SIZES.items():
        results[tokens] = measure(model, images(*size))
        print(tokens, json.dumps(results[tokens]), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"layers": 32, "image_tokens": results}, indent=1))


if __name__ == "__main__":
    main()

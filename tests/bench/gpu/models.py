"""Models of published shapes with random weights on the device, or tiny ones of the same families, and rows for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion.flux import Flux
from dpo_mm.policies.diffusion.meta_pipeline import fill_small_buffers
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.training.meta_execution import CudaRules, MixedMetaMode
from dpo_mm.training.prompt_keys import example_image, example_prompt
from tests.bench.diffusion_step import SIZES, Size, build, randomise_adapter
from tests.bench.published_models import MODELS, flux, qwen2_5_vl
from tests.bench.vlm_shapes import SHAPES, rows_of

QWEN = SHAPES["qwen2_5_vl"]
"""Tokenizer, rows and chat template of the vision-language models."""
_TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_VAE = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
TINY_SIZES = {
    "sd15": Size(
        64,
        {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
         "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 32,
         "attention_head_dim": 2},
        _VAE,
        (_TEXT,),
    ),
    "sdxl": Size(
        64,
        {**SIZES["sdxl"].unet, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (8, 16), "layers_per_block": 1,
         "norm_num_groups": 4, "transformer_layers_per_block": 1, "attention_head_dim": (2, 2), "cross_attention_dim": 64,
         "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80},
        _VAE,
        (_TEXT, _TEXT),
    ),
}  # fmt: skip


def _tiny_flux(precision: str) -> Any:
    shape = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    policy = flux(precision, diffusers.FluxPipeline, Flux, "FLUX.1-dev", **shape, axes_dims_rope=(4, 6, 6))
    policy.resolution = 64
    return policy


TINY_IMAGES: dict[str, Callable[[str], Any]] = {
    "SD1.5": lambda precision: build(TINY_SIZES["sd15"], device="meta", precision=precision),
    "SDXL": lambda precision: build(TINY_SIZES["sdxl"], device="meta", precision=precision),
    "FLUX.1-dev": _tiny_flux,
}
"""Tiny models in place of those of `published_models.MODELS`."""


def image_size(name: str, *, tiny: bool) -> Size:
    """Shape of a model of `diffusion_step`."""
    return (TINY_SIZES if tiny else SIZES)[name]


def on_meta_device(name: str, precision: str, *, tiny: bool) -> Any:
    """The policy of an image generator without weights."""
    return TINY_IMAGES[name](precision) if tiny else MODELS[name].build(precision)


def image_rows(policy: Any, pairs: int) -> list[dict[str, Any]]:
    """Encoded rows of random numbers in the shapes of a policy on the meta device, which keeps its encoders."""
    blank = [example_image(policy)]
    with MixedMetaMode(), CudaRules():
        mean = policy.encode_images(blank)[0][0]
        prompt = {name: value[0] for name, value in example_prompt(policy).items()}
        sizes = {name: value[0] for name, value in policy.size_conditioning(blank).items()}
    return [_image_row(n, mean, prompt, sizes) for n in range(pairs)]


def _image_row(number: int, mean: Any, prompt: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)

    def values(tensor: Any) -> Any:
        if tensor.dtype.is_floating_point:
            return torch.randn(tensor.shape, generator=generator)
        return torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor

    row: dict[str, Any] = {"id": f"row-{number}", "visit": 0, "prompt": {k: values(v) for k, v in prompt.items()}}
    for side in ("chosen", "rejected"):
        row |= {f"{side}_mean": values(mean), f"{side}_std": torch.full(mean.shape, 0.1)}
        row |= {f"{side}_{name}": values(size) for name, size in sizes.items()}
    return row


def give_weights(model: Any, device: str) -> None:
    """Move a model from the meta device to the device, with random weights that leave the size of activations as it was."""
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=(parameter.numel() / parameter.shape[0]) ** -0.5)
            else:
                parameter.fill_(float(name.endswith("weight")))
        for name, buffer in model.named_buffers():
            if buffer.dtype.is_floating_point and "var" not in name:
                buffer.normal_(std=0.02)
            else:
                buffer.fill_(1)


def image_policy(name: str, precision: str, device: str, *, tiny: bool) -> tuple[Any, Callable[[int], list[Any]]]:
    """An image generator's policy without encoders on the device, and a function that makes encoded rows for it."""
    policy = on_meta_device(name, precision, tiny=tiny)
    first = image_rows(policy, 1)[0]
    policy.free_encoders()
    give_weights(policy.model, device)
    prompt, mean = first["prompt"], first["chosen_mean"]
    sizes = {key.removeprefix("chosen_"): value for key, value in first.items() if key.startswith("chosen_")}
    sizes = {key: value for key, value in sizes.items() if key not in ("mean", "std")}
    return policy, lambda pairs: [_image_row(n, mean, prompt, sizes) for n in range(pairs)]


def image_config(pairs: int, **settings: Any) -> TrainConfig:
    """Settings of an image generator's run."""
    return TrainConfig("bench", "bench", "runs/bench", **{"batch_size": pairs, "steps": 1, "beta": 2000.0, **settings})


def prepare(policy: Any, config: TrainConfig) -> None:
    """Prepare a policy and fill its adapter with random numbers, so that it is not its reference."""
    policy.prepare(config)
    randomise_adapter(policy.model)
    policy.model.train()


def vlm(size: str, precision: str, device: str) -> tuple[Any, Any]:
    """A Qwen2.5-VL of this size with random weights on the device, and its processor."""
    model, processor = qwen2_5_vl(size, precision, device)
    return (fill_small_buffers(model) if device == "meta" else model.to(device)), processor


def vlm_rows(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with one image each. settings: image_tokens, response_tokens and pairs."""
    return rows_of(QWEN, settings["image_tokens"], settings["response_tokens"], settings["pairs"])


def vlm_policy(built: tuple[Any, Any], pair_layout: str) -> VisionLanguage:
    return VisionLanguage(*built, "bench", pair_layout=pair_layout)

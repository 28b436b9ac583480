"""Published models on the meta device: their config values, written here, and their published numbers of parameters.

The values are those of the models' config.json files, or the defaults of their classes in diffusers and transformers where these
were made for the model. Only tokenizers are small: their vocabulary does not change a step. `parameters` counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
import transformers as hf

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion.flux import Flux
from dpo_mm.policies.diffusion.flux_kontext import FluxKontext
from dpo_mm.policies.diffusion.instruct_pix2pix import InstructPix2Pix
from dpo_mm.policies.diffusion.meta_pipeline import fill_small_buffers
from dpo_mm.policies.diffusion.qwen_image import QwenImage
from dpo_mm.policies.diffusion.sd3 import StableDiffusion3
from dpo_mm.policies.vlm.meta_model import without_checks
from dpo_mm.policies.vlm.vlm_policy import DTYPES, VisionLanguage
from tests.bench import published_image_models as images
from tests.bench.diffusion_step import CLIP_G, CLIP_L, SIZES, build
from tests.bench.meta_parts import (
    QWEN3_8B_TEXT,
    QWEN3_TOWER,
    SD3_MEDIUM,
    T5_XXL,
    VAE_16,
    clip,
    clip_words,
    on_meta,
    qwen2_5_config,
    text_encoder,
)
from tests.bench.vlm_shapes import SHAPES, rows_of, tokenizer
from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.words import t5_tokenizer


class Published(NamedTuple):
    """A model, the published number of parameters of what is trained (10^9), and how to build its policy in a precision."""

    parameters: float
    build: Callable[[str], Any]
    modality: str = "image"


def _sd3_medium(precision: str) -> Any:
    words, pieces = clip_words(), t5_tokenizer()
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=on_meta(diffusers.SD3Transformer2DModel, precision, **SD3_MEDIUM),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=on_meta(diffusers.AutoencoderKL, precision, **VAE_16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(hf.CLIPTextModelWithProjection, CLIP_L, words, precision),
        tokenizer=words,
        text_encoder_2=clip(hf.CLIPTextModelWithProjection, CLIP_G, words, precision),
        tokenizer_2=words,
        text_encoder_3=text_encoder(hf.T5EncoderModel, hf.T5Config(**T5_XXL), precision),
        tokenizer_3=pieces,
    )
    return StableDiffusion3(pipe, "SD3.5 Medium")


def flux(precision: str, pipeline: Any, family: Any, name: str, **transformer: Any) -> Any:
    """A FLUX.1 pipeline's policy. transformer: changes of the denoiser's published config."""
    words, pieces = clip_words(), t5_tokenizer()
    pipe = pipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        on_meta(diffusers.AutoencoderKL, precision, **VAE_16, scaling_factor=0.3611, shift_factor=0.1159),
        clip(hf.CLIPTextModel, CLIP_L, words, precision),
        words,
        text_encoder(hf.T5EncoderModel, hf.T5Config(**T5_XXL), precision),
        pieces,
        on_meta(diffusers.FluxTransformer2DModel, precision, guidance_embeds=True, **transformer),
    )
    return family(pipe, name)


def _flux_dev(precision: str) -> Any:
    return flux(precision, diffusers.FluxPipeline, Flux, "FLUX.1-dev")


def _flux_kontext(precision: str) -> Any:
    return flux(precision, diffusers.FluxKontextPipeline, FluxKontext, "FLUX.1 Kontext")


def _instruct_pix2pix(precision: str) -> Any:
    pipe = build(SIZES["sd15"], device="meta", precision=precision).pipe
    unet = on_meta(diffusers.UNet2DConditionModel, precision, **{**pipe.unet.config, "in_channels": 8})
    parts = {**pipe.components, "unet": unet, "requires_safety_checker": False}
    return InstructPix2Pix(diffusers.StableDiffusionInstructPix2PixPipeline(**parts), "InstructPix2Pix")


def _qwen_image(precision: str) -> Any:
    pipe = diffusers.QwenImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9),
        on_meta(diffusers.AutoencoderKLQwenImage, precision),
        text_encoder(hf.Qwen2_5_VLForConditionalGeneration, qwen2_5_config("7B", {}), precision),
        qwen_tokenizer(),
        on_meta(diffusers.QwenImageTransformer2DModel, precision),
    )
    return QwenImage(pipe, "Qwen-Image")


def _vlm(model: Any, words: Any, patch: int, processor_class: Any, name: str) -> Any:
    processor = _processor(words, patch, processor_class)
    return without_checks(VisionLanguage(fill_small_buffers(model), processor, name))


def _processor(words: Any, patch: int, processor_class: Any) -> Any:
    """A processor for images of any size, whose chat template adds nothing to the messages."""
    edge = 2 * patch
    pixels = hf.Qwen2VLImageProcessor(size={"shortest_edge": edge**2, "longest_edge": 4096 * edge**2}, patch_size=patch)
    video = hf.Qwen2VLVideoProcessor() if processor_class is hf.Qwen2_5_VLProcessor else hf.Qwen3VLVideoProcessor()
    processor = processor_class(pixels, words, video)
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + SHAPES["qwen2_5_vl"].placeholder
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    return processor


def _image_ids(words: Any) -> dict[str, int]:
    token = words.convert_tokens_to_ids
    ids = {f"{kind}_token_id": token(f"<|{kind}_pad|>") for kind in ("image", "video")}
    return ids | {f"vision_{end}_token_id": token(f"<|vision_{end}|>") for end in ("start", "end")}


def qwen2_5_vl(size: str, precision: str, device: str) -> tuple[Any, Any]:
    """Model with random weights and processor. size: a key of QWEN2_5_TEXT. device: cpu, cuda or meta."""
    words = tokenizer(SHAPES["qwen2_5_vl"])
    config = qwen2_5_config(size, _image_ids(words))
    torch.manual_seed(0)
    with torch.device(device):
        model = hf.AutoModelForImageTextToText.from_config(config, dtype=DTYPES[precision]).eval()
    return model, _processor(words, 14, hf.Qwen2_5_VLProcessor)


def _qwen2_5_vl(size: str) -> Callable[[str], Any]:
    def build_policy(precision: str) -> Any:
        model, processor = qwen2_5_vl(size, precision, "meta")
        return without_checks(VisionLanguage(fill_small_buffers(model), processor, f"Qwen2.5-VL-{size}"))

    return build_policy


def _qwen3_vl(precision: str) -> Any:
    words = tokenizer(SHAPES["qwen2_5_vl"])
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = {**QWEN3_8B_TEXT, **special, "rope_parameters": rope, "max_position_embeddings": 32768}
    config = hf.Qwen3VLConfig(
        text_config=text, vision_config=QWEN3_TOWER, tie_word_embeddings=False, **_image_ids(words)
    )
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(config, dtype=DTYPES[precision]).eval()
    return _vlm(model, words, 16, hf.Qwen3VLProcessor, "Qwen3-VL-8B")


MODELS = {
    "SD1.5": Published(0.86, lambda precision: build(SIZES["sd15"], device="meta", precision=precision)),
    "SDXL": Published(2.6, lambda precision: build(SIZES["sdxl"], device="meta", precision=precision)),
    "SD3.5 Medium": Published(2.5, _sd3_medium),
    "FLUX.1-dev": Published(11.9, _flux_dev),
    "FLUX.2 klein 4B": Published(3.9, images.flux2_klein),
    "Qwen-Image": Published(20.4, _qwen_image),
    "Chroma": Published(8.9, images.chroma),
    "FLUX.2 dev": Published(32, images.flux2_dev),
    "Qwen-Image 2.1": Published(7, images.qwen_image21),
    "LongCat-Image": Published(6, images.longcat_image),
    "ERNIE-Image": Published(8, images.ernie_image),
    "Krea 2": Published(12.9, images.krea2),
    "HiDream-I1": Published(17, images.hidream),
    "InstructPix2Pix": Published(0.86, _instruct_pix2pix),
    "FLUX.1 Kontext": Published(11.9, _flux_kontext),
    "FLUX.2 klein 4B, one image to edit": Published(3.9, images.flux2_klein_edits),
    "Qwen2.5-VL-3B": Published(3.75, _qwen2_5_vl("3B"), "text"),
    "Qwen2.5-VL-7B": Published(8.29, _qwen2_5_vl("7B"), "text"),
    "Qwen3-VL-8B": Published(8.77, _qwen3_vl, "text"),
}
"""Denoisers of image generators without encoders, and whole vision-language models."""


def response_row(policy: Any, *, image_tokens: int = 1024, prompt_words: int = 256, response_words: int = 256) -> Any:
    """An encoded row of a vision-language model with one image."""
    words = SHAPES["qwen2_5_vl"]
    row = rows_of(words, image_tokens, response_words, 1)[0]
    patch = policy.base_model.config.vision_config.patch_size
    side = next(s for s in range(int(image_tokens**0.5), 0, -1) if image_tokens % s == 0)
    image = row["images"][0].resize((image_tokens // side * 2 * patch, side * 2 * patch))
    prompt = " ".join([row["prompt"].split()[0]] * prompt_words)
    return policy.encode([{**row, "images": [image], "prompt": prompt}])[0]


def parameters(name: str) -> float:
    """Number of stored values of a model here, in 10^9: parameters, and SD3.5's table of positions."""
    model = MODELS[name].build("bf16").model
    table = getattr(getattr(model, "pos_embed", None), "pos_embed", None)
    return (sum(p.numel() for p in model.parameters()) + (0 if table is None else table.numel())) / 1e9


def config_of(name: str, **settings: Any) -> TrainConfig:
    """Settings of a run on this model."""
    beta = {} if MODELS[name].modality == "image" else {"beta": 0.1}
    return TrainConfig("bench", "bench", "bench", **{"batch_size": 1, "precision": "bf16", **beta, **settings})

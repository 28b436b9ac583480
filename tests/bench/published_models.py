"""Published models on the meta device: their config values, written here, and their published numbers of parameters.

The values are those of the models' config.json files, or the defaults of their classes in diffusers and transformers where these
were made for the model. Only tokenizers are small: their vocabulary does not change a step. `parameters` counts them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers as hf

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion.flux import Flux
from dpo_mm.policies.diffusion.flux2 import Flux2
from dpo_mm.policies.diffusion.meta_pipeline import fill_small_buffers
from dpo_mm.policies.diffusion.qwen_image import QwenImage
from dpo_mm.policies.diffusion.sd3 import StableDiffusion3
from dpo_mm.policies.vlm.meta_model import without_checks
from dpo_mm.policies.vlm.vlm_policy import DTYPES, VisionLanguage
from tests.bench.diffusion_step import CLIP_G, CLIP_L, SD_VAE, SIZES, build
from tests.bench.vlm_shapes import SHAPES, rows_of, tokenizer
from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.words import clip_tokenizer, t5_tokenizer

T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
          "feed_forward_proj": "gated-gelu"}  # fmt: skip
QWEN3_4B = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}  # fmt: skip
QWEN2_5_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
                 "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
                 "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
QWEN2_5_TEXT = {
    "3B": {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
           "num_attention_heads": 16, "num_key_value_heads": 2},
    "7B": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4},
}  # fmt: skip
QWEN3_8B_TEXT = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
QWEN3_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
               "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 4096,
               "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]}  # fmt: skip
SD3_MEDIUM = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
              "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
              "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
              "dual_attention_layers": tuple(range(13))}  # fmt: skip
KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24,
            "joint_attention_dim": 3 * 2560, "in_channels": 128, "guidance_embeds": False}  # fmt: skip
VAE_16 = {**SD_VAE, "latent_channels": 16, "sample_size": 1024, "down_block_types": ("DownEncoderBlock2D",) * 4,
          "up_block_types": ("UpDecoderBlock2D",) * 4, "use_quant_conv": False, "use_post_quant_conv": False}  # fmt: skip


class Published(NamedTuple):
    """A model, the published number of parameters of what is trained (10^9), and how to build its policy in a precision."""

    parameters: float
    build: Callable[[str], Any]
    modality: str = "image"


def _on_meta(kind: Any, precision: str, **config: Any) -> Any:
    """A diffusers model on the meta device."""
    with torch.device("meta"):
        return fill_small_buffers(kind(**config).to(DTYPES[precision]))


def _text(kind: Any, config: Any, precision: str) -> Any:
    """A text encoder of transformers on the meta device."""
    with torch.device("meta"):
        return fill_small_buffers(kind(config).to(DTYPES[precision]).eval())


def _clip_words() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return clip_tokenizer(Path(folder), length=77)


def _clip(kind: Any, shape: dict[str, Any], words: Any, precision: str) -> Any:
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = hf.CLIPTextConfig(**shape, **ids, vocab_size=49408, projection_dim=shape["hidden_size"])
    return _text(kind, config, precision)


def _sd3_medium(precision: str) -> Any:
    words, pieces = _clip_words(), t5_tokenizer()
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=_on_meta(diffusers.SD3Transformer2DModel, precision, **SD3_MEDIUM),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_on_meta(diffusers.AutoencoderKL, precision, **VAE_16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=_clip(hf.CLIPTextModelWithProjection, CLIP_L, words, precision),
        tokenizer=words,
        text_encoder_2=_clip(hf.CLIPTextModelWithProjection, CLIP_G, words, precision),
        tokenizer_2=words,
        text_encoder_3=_text(hf.T5EncoderModel, hf.T5Config(**T5_XXL), precision),
        tokenizer_3=pieces,
    )
    return StableDiffusion3(pipe, "SD3.5 Medium")


def _flux_dev(precision: str) -> Any:
    words, pieces = _clip_words(), t5_tokenizer()
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        _on_meta(diffusers.AutoencoderKL, precision, **VAE_16, scaling_factor=0.3611, shift_factor=0.1159),
        _clip(hf.CLIPTextModel, CLIP_L, words, precision),
        words,
        _text(hf.T5EncoderModel, hf.T5Config(**T5_XXL), precision),
        pieces,
        _on_meta(diffusers.FluxTransformer2DModel, precision, guidance_embeds=True),
    )
    return Flux(pipe, "FLUX.1-dev")


def _flux2_klein(precision: str) -> Any:
    pipe = diffusers.Flux2KleinPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        _on_meta(diffusers.AutoencoderKLFlux2, precision),
        _text(hf.Qwen3ForCausalLM, hf.Qwen3Config(**QWEN3_4B), precision),
        qwen_tokenizer(),
        _on_meta(diffusers.Flux2Transformer2DModel, precision, **KLEIN_4B),
    )
    return Flux2(pipe, "FLUX.2 klein 4B")


def _qwen_image(precision: str) -> Any:
    pipe = diffusers.QwenImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9),
        _on_meta(diffusers.AutoencoderKLQwenImage, precision),
        _text(hf.Qwen2_5_VLForConditionalGeneration, _qwen2_5_config("7B", {}), precision),
        qwen_tokenizer(),
        _on_meta(diffusers.QwenImageTransformer2DModel, precision),
    )
    return QwenImage(pipe, "Qwen-Image")


def _qwen2_5_config(size: str, ids: dict[str, int]) -> Any:
    text = QWEN2_5_TEXT[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    tower = {**QWEN2_5_TOWER, "out_hidden_size": text["hidden_size"]}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return hf.Qwen2_5_VLConfig(
        text_config={**text, **special, "rope_parameters": rope, "max_position_embeddings": 32768},
        vision_config=tower,
        tie_word_embeddings=size == "3B",
        **ids,
    )


def _vlm(model: Any, words: Any, patch: int, processor_class: Any, name: str) -> Any:
    edge = 2 * patch
    pixels = hf.Qwen2VLImageProcessor(size={"shortest_edge": edge**2, "longest_edge": 4096 * edge**2}, patch_size=patch)
    video = hf.Qwen2VLVideoProcessor() if processor_class is hf.Qwen2_5_VLProcessor else hf.Qwen3VLVideoProcessor()
    processor = processor_class(pixels, words, video)
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + SHAPES["qwen2_5_vl"].placeholder
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    return without_checks(VisionLanguage(fill_small_buffers(model), processor, name))


def _image_ids(words: Any) -> dict[str, int]:
    token = words.convert_tokens_to_ids
    ids = {f"{kind}_token_id": token(f"<|{kind}_pad|>") for kind in ("image", "video")}
    return ids | {f"vision_{end}_token_id": token(f"<|vision_{end}|>") for end in ("start", "end")}


def _qwen2_5_vl(size: str) -> Callable[[str], Any]:
    def build_policy(precision: str) -> Any:
        words = tokenizer(SHAPES["qwen2_5_vl"])
        config = _qwen2_5_config(size, _image_ids(words))
        with torch.device("meta"):
            model = hf.AutoModelForImageTextToText.from_config(config, dtype=DTYPES[precision]).eval()
        return _vlm(model, words, 14, hf.Qwen2_5_VLProcessor, f"Qwen2.5-VL-{size}")

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
    "FLUX.2 klein 4B": Published(3.9, _flux2_klein),
    "Qwen-Image": Published(20.4, _qwen_image),
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

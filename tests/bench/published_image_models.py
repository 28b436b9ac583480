"""Image generators of 2025 and 2026 on the meta device, and editors, as in `published_models`."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers as hf

from dpo_mm.policies.diffusion.chroma import Chroma
from dpo_mm.policies.diffusion.ernie_image import ErnieImage
from dpo_mm.policies.diffusion.flux2 import Flux2
from dpo_mm.policies.diffusion.hidream import HiDream
from dpo_mm.policies.diffusion.krea2 import Krea2
from dpo_mm.policies.diffusion.longcat_image import LongCatImage
from dpo_mm.policies.diffusion.qwen_image21 import QwenImage21
from tests.bench.diffusion_step import CLIP_G, CLIP_L
from tests.bench.meta_parts import (
    KLEIN_4B,
    QWEN3_4B,
    QWEN3_8B_TEXT,
    QWEN3_TOWER,
    T5_XXL,
    VAE_16,
    clip,
    clip_words,
    on_meta,
    qwen2_5_config,
    text_encoder,
)
from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.qwen_image21 import TEMPLATE, VISION
from tests.contracts.families.words import t5_tokenizer

QWEN3_VL_4B_TEXT = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
QWEN3_VL_4B_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
                     "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 2560,
                     "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]}  # fmt: skip
MINISTRAL_3B = {"model_type": "mistral", "vocab_size": 131072, "hidden_size": 3072, "intermediate_size": 9216,
                "num_hidden_layers": 26, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                "tie_word_embeddings": True}  # fmt: skip
ERNIE = {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36, "ffn_hidden_size": 12288,
         "text_in_dim": 3072}  # fmt: skip
HIDREAM = {"patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096],
           "axes_dims_rope": (64, 32, 32), "llama_layers": [*range(32), *[31] * 16]}  # fmt: skip
LLAMA_3_1_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
FLUX_SCALE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
MISTRAL_TEMPLATE = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"


def _flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **settings)


def _qwen3_vl(words: Any, text: dict[str, Any], tower: dict[str, Any]) -> Any:
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), words.convert_tokens_to_ids(VISION), strict=True))
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    config = {**text, "rope_parameters": rope, "max_position_embeddings": 32768}
    return hf.Qwen3VLConfig(
        text_config=config, vision_config=tower, **{f"{name}_token_id": token for name, token in ids.items()}
    )


def _qwen_words() -> Any:
    words = qwen_tokenizer()
    words.add_tokens(list(VISION), special_tokens=True)
    return words


def chroma(precision: str) -> Any:
    pieces = t5_tokenizer()
    pipe = diffusers.ChromaPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        on_meta(diffusers.AutoencoderKL, precision, **VAE_16, **FLUX_SCALE),
        text_encoder(hf.T5EncoderModel, hf.T5Config(**T5_XXL), precision),
        pieces,
        on_meta(diffusers.ChromaTransformer2DModel, precision),
    )
    return Chroma(pipe, "Chroma")


def flux2_dev(precision: str) -> Any:
    words = qwen_tokenizer()
    words.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], special_tokens=True)
    pipe = diffusers.Flux2Pipeline(
        _flow(shift=3.0),
        on_meta(diffusers.AutoencoderKLFlux2, precision),
        text_encoder(hf.Mistral3ForConditionalGeneration, hf.Mistral3Config(), precision),
        hf.PixtralProcessor(hf.PixtralImageProcessor(), words, patch_size=14, chat_template=MISTRAL_TEMPLATE),
        on_meta(diffusers.Flux2Transformer2DModel, precision),
    )
    return Flux2(pipe, "FLUX.2 dev")


def flux2_klein(precision: str) -> Any:
    pipe = diffusers.Flux2KleinPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        on_meta(diffusers.AutoencoderKLFlux2, precision),
        text_encoder(hf.Qwen3ForCausalLM, hf.Qwen3Config(**QWEN3_4B), precision),
        qwen_tokenizer(),
        on_meta(diffusers.Flux2Transformer2DModel, precision, **KLEIN_4B),
    )
    return Flux2(pipe, "FLUX.2 klein 4B")


def flux2_klein_edits(precision: str) -> Any:
    policy = flux2_klein(precision)
    policy.is_image_editing = True
    return policy


def qwen_image21(precision: str) -> Any:
    words = _qwen_words()
    config = _qwen3_vl(words, QWEN3_8B_TEXT, QWEN3_TOWER)
    pipe = diffusers.QwenImage21Pipeline(
        _flow(),
        on_meta(diffusers.AutoencoderKLQwenImage21, precision),
        text_encoder(hf.Qwen3VLForConditionalGeneration, config, precision),
        hf.Qwen3VLProcessor(hf.Qwen2VLImageProcessor(), words, hf.Qwen3VLVideoProcessor(), chat_template=TEMPLATE),
        on_meta(diffusers.QwenImage21Transformer2DModel, precision),
    )
    return QwenImage21(pipe, "Qwen-Image 2.1")


def longcat_image(precision: str) -> Any:
    words = qwen_tokenizer()
    encoder = text_encoder(hf.Qwen2_5_VLForConditionalGeneration, qwen2_5_config("7B", {}), precision)
    pipe = diffusers.LongCatImagePipeline(
        _flow(shift=3.0),
        on_meta(diffusers.AutoencoderKL, precision, **VAE_16, **FLUX_SCALE),
        encoder,
        words,
        None,
        on_meta(diffusers.LongCatImageTransformer2DModel, precision, num_layers=10, num_single_layers=20),
    )
    return LongCatImage(pipe, "LongCat-Image")


def ernie_image(precision: str) -> Any:
    pipe = diffusers.ErnieImagePipeline(
        on_meta(diffusers.ErnieImageTransformer2DModel, precision, **ERNIE),
        on_meta(diffusers.AutoencoderKLFlux2, precision),
        text_encoder(hf.Mistral3Model, hf.Mistral3Config(text_config=MINISTRAL_3B), precision),
        qwen_tokenizer(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return ErnieImage(pipe, "ERNIE-Image")


def krea2(precision: str) -> Any:
    words = _qwen_words()
    config = _qwen3_vl(words, QWEN3_VL_4B_TEXT, QWEN3_VL_4B_TOWER)
    pipe = diffusers.Krea2Pipeline(
        _flow(max_image_seq_len=6400),
        on_meta(diffusers.AutoencoderKLQwenImage, precision),
        text_encoder(hf.Qwen3VLModel, config, precision),
        words,
        on_meta(diffusers.Krea2Transformer2DModel, precision),
    )
    return Krea2(pipe, "Krea 2")


def hidream(precision: str) -> Any:
    pieces, chat = t5_tokenizer(), qwen_tokenizer()
    words = [clip_words(248), clip_words(218)]
    clips = [
        clip(hf.CLIPTextModelWithProjection, shape, w, precision)
        for shape, w in zip((CLIP_L, CLIP_G), words, strict=True)
    ]
    pipe = diffusers.HiDreamImagePipeline(
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        on_meta(diffusers.AutoencoderKL, precision, **VAE_16, **FLUX_SCALE),
        clips[0],
        words[0],
        clips[1],
        words[1],
        text_encoder(hf.T5EncoderModel, hf.T5Config(**T5_XXL), precision),
        pieces,
        text_encoder(hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA_3_1_8B), precision),
        chat,
        on_meta(diffusers.HiDreamImageTransformer2DModel, precision, **HIDREAM),
    )
    return HiDream(pipe, "HiDream-I1")

"""Tiny models of transformers' classes that read documents, and of recent vision-language models with special layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import transformers as hf

from tests.contracts.tiny_sizes import EDGE, _text, _vision


class Family(NamedTuple):
    """One family: how it is built, and what its tokenizer and its chat template have.

    Attributes:
        build: function of the tokenizer's `convert_tokens_to_ids` and the tokenizer, which returns model and processor.
        placeholder: of an image in the chat template.
        special_tokens: of the tokenizer.
        named_tokens: special tokens that the processor looks up by name.
        sizes: (width, height) of the images, one of which is cut into tiles if the family does that.
    """

    build: Callable[[Any, Any], tuple[Any, Any]]
    placeholder: str
    special_tokens: tuple[str, ...] = ()
    named_tokens: dict[str, str] = {}  # noqa: RUF012
    sizes: tuple[tuple[int, int], ...] = ((84, 56), (56, 84), (EDGE, EDGE))


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, **more}


def _glm_ocr(token: Any, words: Any) -> tuple[Any, Any]:
    config = hf.GlmOcrConfig(
        text_config=_text(len(words), rope_parameters=_rope(mrope_section=[2, 1, 1])),
        vision_config=_glm_tower(num_heads=4),
        **_glm_ids(token),
    )
    return hf.GlmOcrForConditionalGeneration(config), _glm_processor(words)


def _glm46v(token: Any, words: Any) -> tuple[Any, Any]:
    text = _text(len(words), rope_parameters=_rope(mrope_section=[2, 1, 1]))
    del text["head_dim"]
    config = hf.Glm46VConfig(
        text_config={**text, "model_type": "glm4v_text"},
        vision_config={**_glm_tower(num_heads=4), "model_type": "glm4v_vision"},
        **_glm_ids(token),
    )
    return hf.Glm46VForConditionalGeneration(config), _glm_processor(words)


def _glm_tower(**more: Any) -> dict[str, Any]:
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "image_size": EDGE}
    return {**sizes, "patch_size": 14, "initializer_range": 0.12, **more}


def _glm_ids(token: Any) -> dict[str, Any]:
    names = {"image": "<|image|>", "video": "<|video|>"}
    names |= {
        f"{kind}_{end}": f"<|{word}_of_{kind}|>" for kind in names for end, word in (("start", "begin"), ("end", "end"))
    }
    return {"tie_word_embeddings": False, **{f"{name}_token_id": token(text) for name, text in names.items()}}


def _glm_processor(words: Any) -> Any:
    size = {"shortest_edge": 28 * 28, "longest_edge": 2 * 100 * 28 * 28}
    return hf.Glm46VProcessor(hf.Glm46VImageProcessor(size=size), words, hf.Glm46VVideoProcessor())


GLM_TOKENS = (
    "<|image|>",
    "<|video|>",
    *(f"<|{word}_of_{kind}|>" for kind in ("image", "video") for word in ("begin", "end")),
)


def _deepseek_ocr2(token: Any, words: Any) -> tuple[Any, Any]:
    """Its vision tower always returns 144 tokens per tile and per image."""
    sam = {**_vision(), "image_size": 48, "patch_size": 6, "output_channels": 16, "downsample_channels": [16, 32]}
    text = _text(len(words), mlp_layer_types=["dense", "sparse"], n_routed_experts=4, num_experts_per_tok=2)
    experts = {"n_shared_experts": 1, "moe_intermediate_size": 16, "max_position_embeddings": 2048}
    config = hf.DeepseekOcr2Config(
        vision_config={
            "sam_config": {**sam, "window_size": 4, "global_attn_indexes": [1]},
            "encoder_config": {**_text(len(words))},
        },
        text_config={**text, **experts},
        image_token_id=token("<image>"),
    )
    size = {"height": 48, "width": 48}
    pixels = hf.DeepseekOcr2ImageProcessor(size=size, tile_size=48, max_patches=2)
    return hf.DeepseekOcr2ForConditionalGeneration(config), hf.DeepseekOcr2Processor(pixels, words, patch_size=1)


def _pixtral(**more: Any) -> dict[str, Any]:
    return {**_vision(model_type="pixtral", image_size=112, head_dim=8), **more}


def _lighton_ocr(token: Any, words: Any) -> tuple[Any, Any]:
    config = hf.LightOnOcrConfig(
        text_config=_text(len(words), model_type="qwen3"),
        vision_config=_pixtral(),
        image_token_id=token("<|image_pad|>"),
        tie_word_embeddings=False,
    )
    pixels = hf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 28, "width": 28})
    return hf.LightOnOcrForConditionalGeneration(config), hf.LightOnOcrProcessor(pixels, words)


def _mistral3(token: Any, words: Any) -> tuple[Any, Any]:
    config = hf.Mistral3Config(
        text_config=_text(len(words), model_type="mistral", sliding_window=None),
        vision_config=_pixtral(),
        image_token_index=token("[IMG]"),
        tie_word_embeddings=False,
    )
    pixels = hf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    processor = hf.PixtralProcessor(pixels, words, patch_size=14, spatial_merge_size=2)
    return hf.Mistral3ForConditionalGeneration(config), processor


def _paddleocr_vl(token: Any, words: Any) -> tuple[Any, Any]:
    config = hf.PaddleOCRVLConfig(
        text_config=_text(len(words), rope_parameters=_rope(mrope_section=[2, 1, 1])),
        vision_config=_vision(),
        image_token_id=token("<|IMAGE_PLACEHOLDER|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|IMAGE_START|>"),
        vision_end_token_id=token("<|IMAGE_END|>"),
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 100 * 28 * 28}
    pixels = hf.PaddleOCRVLImageProcessor(size=size)
    return hf.PaddleOCRVLForConditionalGeneration(config), hf.PaddleOCRVLProcessor(pixels, words)


def _qianfan_ocr(token: Any, words: Any) -> tuple[Any, Any]:
    config = hf.QianfanOCRConfig(
        text_config=_text(len(words), model_type="qwen3"),
        vision_config=_vision(drop_path_rate=0.0),
        image_token_id=token("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    size = {"height": EDGE, "width": EDGE}
    pixels = hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=2)
    return hf.QianfanOCRForConditionalGeneration(config), hf.QianfanOCRProcessor(pixels, words, image_seq_length=4)


def _granite_docling(token: Any, words: Any) -> tuple[Any, Any]:
    multipliers = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
    config = hf.GraniteDoclingConfig(
        text_config=_text(len(words), attention_multiplier=0.2, tie_word_embeddings=False, **multipliers),
        vision_config=_vision(out_hidden_size=32, scale_factor=2, deepstack_visual_indexes=[0], use_fine_route=False),
        image_token_id=token("<image>"),
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    pixels = hf.GraniteDoclingImageProcessor(size={"height": EDGE, "width": EDGE}, max_patches=2)
    return hf.GraniteDoclingForConditionalGeneration(config), hf.GraniteDoclingProcessor(pixels, words, image_seq_len=4)


def _gemma4(token: Any, words: Any) -> tuple[Any, Any]:
    text = _text(len(words), sliding_window=12, layer_types=["sliding_attention", "full_attention"], global_head_dim=16)
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(words)}
    tower = {**_vision(num_key_value_heads=4, head_dim=8), "pooling_kernel_size": 2, "position_embedding_size": 64}
    ids = {f"{name}_token_id": token(text) for name, text in GEMMA4_TOKENS.items() if name not in ("eoa",)}
    config = hf.Gemma4Config(
        text_config={**text, **per_layer, "final_logit_softcapping": 5.0, "use_bidirectional_attention": "vision"},
        vision_config=tower,
        eoa_token_index=token(GEMMA4_TOKENS["eoa"]),
        **ids,
    )
    pixels = hf.Gemma4ImageProcessor(patch_size=14, pooling_kernel_size=2, max_soft_tokens=70)
    audio, videos = hf.Gemma4AudioFeatureExtractor(), hf.Gemma4VideoProcessor()
    return hf.Gemma4ForConditionalGeneration(config), hf.Gemma4Processor(audio, pixels, words, videos)


GEMMA4_TOKENS = {
    "image": "<|image|>",
    "boi": "<|image>",
    "eoi": "<image|>",
    "audio": "<|audio|>",
    "boa": "<|audio>",
    "eoa": "<audio|>",
    "video": "<|video|>",
}


def _lfm2_vl(token: Any, words: Any) -> tuple[Any, Any]:
    text = _text(len(words), model_type="lfm2", layer_types=["conv", "full_attention"], tie_word_embeddings=False)
    tower = {**_vision(model_type="siglip2_vision_model", vision_use_head=False), "num_patches": 16}
    config = hf.Lfm2VlConfig(
        text_config={**text, "block_auto_adjust_ff_dim": False},
        vision_config=tower,
        image_token_id=token("<image>"),
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )
    tiles = {
        "tile_size": EDGE,
        "min_image_tokens": 4,
        "max_image_tokens": 4,
        "max_tiles": 2,
        "max_pixels_tolerance": 1.0,
    }
    pixels = hf.Lfm2VlImageProcessor(size={"height": EDGE, "width": EDGE}, encoder_patch_size=14, **tiles)
    return hf.Lfm2VlForConditionalGeneration(config), hf.Lfm2VlProcessor(pixels, words)


def _gated_delta_net(vocabulary: int, **more: Any) -> dict[str, Any]:
    """Text layers of Qwen3.5: one of a gated delta net, which has a recurrent and a convolution state, and one of attention."""
    heads = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    rope = _rope(mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=1.0)
    kinds = ["linear_attention", "full_attention"]
    return _text(vocabulary, layer_types=kinds, rope_parameters=rope, **heads, **more)


def _qwen3_5(token: Any, words: Any) -> tuple[Any, Any]:
    tower = {"depth": 2, "num_heads": 4, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    ids = {f"{kind}_token_id": token(f"<|{kind}_pad|>") for kind in ("image", "video")}
    ids |= {f"vision_{end}_token_id": token(f"<|vision_{end}|>") for end in ("start", "end")}
    config = hf.Qwen3_5Config(
        text_config=_gated_delta_net(len(words)),
        vision_config={**tower, "patch_size": 14, "num_position_embeddings": 64, "initializer_range": 0.12},
        **ids,
    )
    size = {"shortest_edge": 784, "longest_edge": 78400}
    pixels = hf.Qwen2VLImageProcessor(size=size, patch_size=14, merge_size=2)
    return hf.Qwen3_5ForConditionalGeneration(config), hf.Qwen3VLProcessor(pixels, words, hf.Qwen3VLVideoProcessor())


def _minicpmv4_6(token: Any, words: Any) -> tuple[Any, Any]:
    config = hf.MiniCPMV4_6Config(
        text_config=_gated_delta_net(len(words), model_type="qwen3_5_text"),
        vision_config={**_vision(), "image_size": 112},
        insert_layer_id=0,
        image_size=EDGE,
        image_token_id=token(MINICPM_TOKENS["image_token"]),
        video_token_id=token(MINICPM_TOKENS["video_token"]),
    )
    tiles = {"scale_resolution": EDGE, "max_slice_nums": 2, "patch_size": 14}
    processor = hf.MiniCPMV4_6Processor(
        hf.MiniCPMV4_6ImageProcessor(**tiles), hf.MiniCPMV4_6VideoProcessor(**tiles), words
    )
    return hf.MiniCPMV4_6ForConditionalGeneration(config), processor


MINICPM_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
TILE_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<row_1_col_1>",
    "<row_1_col_2>",
    "<row_2_col_1>",
)

FAMILIES = {
    "glm_ocr": Family(_glm_ocr, "<|begin_of_image|><|image|><|end_of_image|>", GLM_TOKENS),
    "deepseek_ocr2": Family(_deepseek_ocr2, "<image>", ("<image>",), sizes=((96, 48), (48, 48), (48, 48))),
    "lighton_ocr": Family(
        _lighton_ocr,
        "<|image_pad|>",
        named_tokens={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
    ),
    "paddleocr_vl": Family(
        _paddleocr_vl,
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|video_pad|>"),
        {"image_token": "<|IMAGE_PLACEHOLDER|>"},
    ),
    "qianfan_ocr": Family(
        _qianfan_ocr,
        "<image>",
        named_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
    ),
    "granite_docling": Family(_granite_docling, "<image>", TILE_TOKENS),
    "gemma4": Family(
        _gemma4, "<|image|>", named_tokens={f"{name}_token": token for name, token in GEMMA4_TOKENS.items()}
    ),
    "lfm2_vl": Family(
        _lfm2_vl,
        "<image>",
        (
            *("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
            *(f"<|img_row_{row}_col_{column}|>" for row, column in ((1, 1), (1, 2), (2, 1))),
        ),
    ),
    "minicpmv4_6": Family(_minicpmv4_6, "<|image_pad|>", named_tokens=MINICPM_TOKENS),
    "glm46v": Family(_glm46v, "<|begin_of_image|><|image|><|end_of_image|>", GLM_TOKENS),
    "mistral3": Family(_mistral3, "[IMG]", ("[IMG]", "[IMG_BREAK]", "[IMG_END]")),
    "qwen3_5": Family(_qwen3_5, "<|vision_start|><|image_pad|><|vision_end|>", QWEN_TOKENS),
}

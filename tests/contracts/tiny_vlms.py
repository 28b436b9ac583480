"""Tiny models of transformers' classes with random weights, and tokenizers and processors built without a download."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.contracts import tiny_readers
from tests.contracts.tiny_sizes import EDGE, _text, _vision

BASE_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]
SPECIAL_TOKENS = {
    "llava": ["<image>"],
    "qwen2_5_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "smolvlm": ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"],
    "gemma3": ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
    "internvl": ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    "paligemma": ["<image>"],
    "llama": [],
    "gemma2": [],
    "qwen3_next": [],
}
SPECIAL_TOKENS |= {
    "qwen3_vl": SPECIAL_TOKENS["qwen2_5_vl"],
    "qwen2_vl": SPECIAL_TOKENS["qwen2_5_vl"],
    "idefics3": SPECIAL_TOKENS["smolvlm"],
}
SPECIAL_TOKENS |= {"llava_next": ["<image>"], "llava_onevision": ["<image>", "<video>"], "paligemma2": ["<image>"]}
QWEN_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
PLACEHOLDERS = {
    "gemma3": "<start_of_image>",
    "idefics3": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "llava": "<image>",
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "qwen2_5_vl": QWEN_PLACEHOLDER,
    "qwen2_vl": QWEN_PLACEHOLDER,
    "qwen3_vl": QWEN_PLACEHOLDER,
    "smolvlm": "<image>",
}
"""The image placeholder in each family's chat template. PaliGemma has no chat template, like the published models."""
NAMED_TOKENS = {
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}
"""Special tokens that a family's processor looks up in its tokenizer by name."""
TEXT = "describe the picture of a red square on a blue field and three small circles beside it with no text at all."
for _name, _family in tiny_readers.FAMILIES.items():
    SPECIAL_TOKENS[_name], PLACEHOLDERS[_name] = list(_family.special_tokens), _family.placeholder
    if _family.named_tokens:
        NAMED_TOKENS[_name] = _family.named_tokens
IMAGES = (*PLACEHOLDERS, "paligemma", "paligemma2")
VARIABLE_LENGTH = ("idefics3", "internvl", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose number of image tokens depends on the image's shape."""
VOCABULARY = TEXT.rstrip(".").split()


def tokenizer(family: str) -> Any:
    """A byte-level BPE tokenizer trained on a line of text, with the family's special tokens."""
    special = BASE_TOKENS + SPECIAL_TOKENS[family]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320 + (len(special) if family in tiny_readers.FAMILIES else 0),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 4, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if family in NAMED_TOKENS:
        names["extra_special_tokens"] = NAMED_TOKENS[family]
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    if SPECIAL_TOKENS[family]:
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[family]})
    return tokenizer


def chat_template(family: str) -> str:
    """A chat template in which each turn is a line."""
    part = "{{ content if content is string else '' }}"
    if family in PLACEHOLDERS:
        part = (
            "{% for part in content %}{% if part['type'] == 'image' %}"
            + PLACEHOLDERS[family]
            + "{% else %}{{ part['text'] }}"
            "{% endif %}{% endfor %}"
        )
    return (
        "<s>{% for message in messages %}{% set content = message['content'] %}{{ message['role'] }}: "
        + part
        + "{% if "
        "message['role'] == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )


def _llava(token: Any, words: Any) -> tuple[Any, Any]:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_vision()),
        text_config=hf.LlamaConfig(**_text(len(words))),
        image_token_id=token("<image>"),
        tie_word_embeddings=False,
    )
    size = {"height": EDGE, "width": EDGE}
    pixels = hf.CLIPImageProcessor(size=size, crop_size=size)
    return hf.LlavaForConditionalGeneration(config), hf.LlavaProcessor(pixels, words, **CLIP_TOKENS)


CLIP_TOKENS = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
TILES = [[EDGE, 2 * EDGE], [2 * EDGE, EDGE]]
"""Grids in pixels that images are cut into if their shape differs from the vision tower's."""


def _llava_next(token: Any, words: Any) -> tuple[Any, Any]:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**_vision()),
        text_config=hf.MistralConfig(**_text(len(words), sliding_window=None)),
        image_token_index=token("<image>"),
        image_grid_pinpoints=TILES,
    )
    edges = {"size": {"shortest_edge": EDGE}, "crop_size": {"height": EDGE, "width": EDGE}}
    pixels = hf.LlavaNextImageProcessor(**edges, image_grid_pinpoints=TILES)
    return hf.LlavaNextForConditionalGeneration(config), hf.LlavaNextProcessor(pixels, words, **CLIP_TOKENS)


def _llava_onevision(token: Any, words: Any) -> tuple[Any, Any]:
    tower = _vision(vision_use_head=False)
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**tower),
        text_config=hf.Qwen2Config(**_text(len(words))),
        image_token_index=token("<image>"),
        video_token_index=token("<video>"),
        image_grid_pinpoints=TILES,
    )
    pixels = hf.LlavaOnevisionImageProcessor(size={"height": EDGE, "width": EDGE}, image_grid_pinpoints=TILES)
    more = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    processor = hf.LlavaOnevisionProcessor(pixels, words, hf.LlavaOnevisionVideoProcessor(), **more)
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _internvl(token: Any, words: Any) -> tuple[Any, Any]:
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**_vision()),
        text_config=hf.Qwen2Config(**_text(len(words))),
        image_token_id=token("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    pixels = hf.GotOcr2ImageProcessor(size={"height": EDGE, "width": EDGE}, crop_to_patches=True, max_patches=2)
    processor = hf.InternVLProcessor(pixels, words, hf.InternVLVideoProcessor(), image_seq_length=4)
    return hf.InternVLForConditionalGeneration(config), processor


def _qwen(token: Any, words: Any, *, version: str) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    tower = {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tower["initializer_range"] = 0.12
    ids = {f"{k}_token_id": token(f"<|{k}_pad|>") for k in ("image", "video")}
    ids |= {f"vision_{k}_token_id": token(f"<|vision_{k}|>") for k in ("start", "end")}
    text = _text(len(words), rope_parameters=rope)
    if version == "3":
        rope["mrope_interleaved"] = True
        tower |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    else:
        del text["head_dim"]
    if version == "2":
        tower |= {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 32}
    else:
        tower |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    if version == "2_5":
        tower |= {"window_size": 112, "fullatt_block_indexes": [1]}
    config, model, processor = QWENS[version]
    pixels = hf.Qwen2VLImageProcessor(size={"shortest_edge": 784, "longest_edge": 78400}, patch_size=14, merge_size=2)
    videos = hf.Qwen3VLVideoProcessor() if version == "3" else hf.Qwen2VLVideoProcessor()
    qwen = model(config(text_config=text, vision_config=tower, tie_word_embeddings=False, **ids))
    return qwen, processor(pixels, words, videos)


QWENS: dict[str, tuple[Any, Any, Any]] = {
    "2": (hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLProcessor),
    "2_5": (hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLProcessor),
    "3": (hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLProcessor),
}


def _idefics_settings(words: Any, token: Any) -> dict[str, Any]:
    """The settings that SmolVLM's and Idefics3's configurations share."""
    text = _text(len(words), model_type="llama")
    ids = {"image_token_id": token("<image>"), "pad_token_id": 0}
    return {"vision_config": _vision(), "text_config": text, "scale_factor": 2, "tie_word_embeddings": False, **ids}


def _smolvlm(token: Any, words: Any) -> tuple[Any, Any]:
    import transformers.models.smolvlm.processing_smolvlm as module

    if getattr(module, "num2words", None) is None:
        module.num2words = str  # only for prompts about videos, which are not used here
    edge = {"longest_edge": EDGE}
    pixels = hf.SmolVLMImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    processor = hf.SmolVLMProcessor(pixels, words, hf.SmolVLMVideoProcessor(), image_seq_len=4)
    return hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(**_idefics_settings(words, token))), processor


def _idefics3(token: Any, words: Any) -> tuple[Any, Any]:
    """Idefics3 cuts an image into tiles and adds the whole image as the last one."""
    config = hf.Idefics3Config(**_idefics_settings(words, token))
    pixels = hf.Idefics3ImageProcessor(size={"longest_edge": 2 * EDGE}, max_image_size={"longest_edge": EDGE})
    return hf.Idefics3ForConditionalGeneration(config), hf.Idefics3Processor(pixels, words, image_seq_len=4)


def _gemma3(token: Any, words: Any) -> tuple[Any, Any]:
    text = _text(
        len(words), sliding_window=12, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    )
    config = hf.Gemma3Config(
        text_config={**text, "final_logit_softcapping": 5.0},
        vision_config=_vision(vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=token("<image_soft_token>"),
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
    )
    pixels = hf.Gemma3ImageProcessor(size={"height": EDGE, "width": EDGE})
    return hf.Gemma3ForConditionalGeneration(config), hf.Gemma3Processor(pixels, words, image_seq_length=4)


def _paligemma(token: Any, words: Any, *, text: str) -> tuple[Any, Any]:
    pixels = hf.SiglipImageProcessor(size={"height": EDGE, "width": EDGE})
    pixels.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(pixels, words)  # adds its location and segmentation tokens
    more: dict[str, Any] = {}
    if text == "gemma2":
        kinds = ["sliding_attention", "full_attention"]
        caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
        more = {"sliding_window": 48, "layer_types": kinds, "query_pre_attn_scalar": 8, **caps}
    config = hf.PaliGemmaConfig(
        vision_config=_vision(model_type="siglip_vision_model", vision_use_head=False, projection_dim=32),
        text_config=_text(len(words), model_type=text, **more),
        image_token_index=token("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def _llama(token: Any, words: Any) -> tuple[Any, Any]:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_text(len(words)))), words


def _gemma2(token: Any, words: Any) -> tuple[Any, Any]:
    kinds = ["sliding_attention", "full_attention"]
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
    text = _text(len(words), sliding_window=12, layer_types=kinds, query_pre_attn_scalar=8, **caps)
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**text)), words


def _qwen3_next(token: Any, words: Any) -> tuple[Any, Any]:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    state = {f"linear_{k}_head_dim": 8 for k in ("key", "value")} | {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    config = hf.Qwen3NextConfig(
        **_text(len(words)), **experts, **state, layer_types=["linear_attention", "full_attention"]
    )
    return hf.Qwen3NextForCausalLM(config), words


BUILDERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": functools.partial(_qwen, version="2"),
    "qwen2_5_vl": functools.partial(_qwen, version="2_5"),
    "qwen3_vl": functools.partial(_qwen, version="3"),
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "paligemma": functools.partial(_paligemma, text="gemma"),
    "paligemma2": functools.partial(_paligemma, text="gemma2"),
    "internvl": _internvl,
    "llama": _llama,
    "gemma2": _gemma2,
    "qwen3_next": _qwen3_next,
    **{name: family.build for name, family in tiny_readers.FAMILIES.items()},
}


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """Return a new model of a family with random weights, in evaluation mode, and its processor.

    The processor of a text-only model is its tokenizer.
    """
    return copy.deepcopy(_built(family, seed))


@functools.cache
def _built(family: str, seed: int) -> tuple[Any, Any]:
    words = tokenizer(family)
    torch.manual_seed(seed)
    model, processor = BUILDERS[family](words.convert_tokens_to_ids, words)
    if family not in ("paligemma", "paligemma2"):
        processor.chat_template = chat_template(family)
    return model.eval(), processor


def save(family: str, folder: Any) -> str:
    """Build a family, save it in its published file layout, and return the folder."""
    model, processor = build(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def noise_image(seed: int, size: tuple[int, int] = (EDGE, EDGE)) -> Image.Image:
    """An image of random pixels, of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rows(family: str, images: tuple[int, ...], seed: int = 0) -> list[dict[str, Any]]:
    """Preference rows of unequal lengths.

    Args:
        images: number of images of each row. If the family's number of image tokens depends on the shape, the images
            have different shapes.
    """
    rng = random.Random(seed)
    sizes = [(84, 56), (56, 84), (EDGE, EDGE)] if family in VARIABLE_LENGTH else [(EDGE, EDGE)]
    if family in tiny_readers.FAMILIES:
        sizes = list(tiny_readers.FAMILIES[family].sizes)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(VOCABULARY) for _ in range(rng.randint(low, high)))

    return [
        {
            "id": f"{family}-{n}",
            "images": [noise_image(100 * seed + 10 * n + k, sizes[(n + k) % len(sizes)]) for k in range(count)],
            "prompt": [{"role": "user", "content": [{"type": "text", "text": text(2, 9)}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": text(1, 8)}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": text(3, 14)}]}],
        }
        for n, count in enumerate(images)
    ]

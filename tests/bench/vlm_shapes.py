"""Models with random weights for vlm_step: two layers of width 512, in the proportions of three published models.

The cost of a step depends on the ratios of vision tower, language-model body and head, per token. `PUBLISHED` has these
ratios for the published configurations, in multiply-adds, including attention within images of their usual size. `ratios`
computes them for the models here. Attention has a larger part here, as in any model this narrow.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

PATCH, WIDTH, LAYERS, HEADS, RANK, WORDS = 14, 512, 2, 8, 16, 16
"""Pixels per patch edge, the language model's width, layers and heads, the LoRA's rank, and words of text per prompt."""


@dataclass(frozen=True)
class Shape:
    """A model's proportions.

    Attributes:
        vocabulary, inner, groups: the language model's vocabulary size, MLP width and number of key-value heads.
        tower_width, tower_inner, tower_layers: the vision tower's width, MLP width and number of layers.
        merge: patches per edge that become one token.
        gated: True if the MLPs of the vision tower have three matrices.
        special: special tokens of the tokenizer.
        placeholder: text in the prompt that stands for an image.
        around: special tokens per image besides the image tokens.
        tile: tokens per image if a row has several images, else None.
    """

    name: str
    vocabulary: int
    inner: int
    groups: int
    tower_width: int
    tower_inner: int
    tower_layers: int
    merge: int
    gated: bool
    special: tuple[str, ...]
    placeholder: str
    around: int
    tile: int | None = None

    def image_sizes(self, tokens: int) -> list[tuple[int, int]]:
        """Rows and columns of tokens of each image, for a row with about `tokens` image tokens."""
        if self.tile:
            side = round(self.tile**0.5)
            return [(side, side)] * (tokens // self.tile)
        if self.name == "qwen2_5_vl":
            side = next(s for s in range(int(tokens**0.5), 0, -1) if tokens % s == 0)
            return [(side, tokens // side)]
        return [(int(tokens**0.5), int(tokens**0.5))]

    def image_tokens(self, tokens: int) -> int:
        """The exact number of image tokens of a row with about `tokens`."""
        return sum(rows * columns for rows, columns in self.image_sizes(tokens))

    def prompt(self, tokens: int) -> int:
        """Number of tokens of images and text in a prompt."""
        return self.image_tokens(tokens) + self.around * len(self.image_sizes(tokens)) + WORDS


WINDOW = 64
"""Patches in an attention window of Qwen's vision tower."""
PUBLISHED = {
    "llava": ("LLaVA-1.5-7B", 0.05, 0.020),
    "qwen2_5_vl": ("Qwen2.5-VL-3B", 0.96, 0.112),
    "smolvlm": ("SmolVLM2-2.2B", 2.55, 0.063),
}
"""Name, and two ratios to the body's multiply-adds per token: vision per image token, and head per token."""

SHAPES = {
    "llava": Shape("llava", 256, 1376, HEADS, 64, 256, 1, 1, False, ("<image>",), "<image>", 0),
    "qwen2_5_vl": Shape(
        "qwen2_5_vl", 2112, 2752, 1, 208, 448, 4, 2, True,
        ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
        "<|vision_start|><|image_pad|><|vision_end|>", 2,
    ),
    "smolvlm": Shape(
        "smolvlm", 1032, 2048, HEADS, 208, 792, 3, 3, False,
        ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"), "<image>", 3, tile=64,
    ),
}  # fmt: skip


def tokenizer(shape: Shape) -> Any:
    """A tokenizer with one token per word, which splits at white space and around special tokens."""
    special = ["<pad>", "<s>", "</s>", "<unk>", *shape.special]
    words = {word: n for n, word in enumerate([*special, *(f"w{n}" for n in range(shape.vocabulary - len(special)))])}
    word_level = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=word_level, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": list(shape.special)})
    return tokenizer


def _text(shape: Shape, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH, "intermediate_size": shape.inner, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": shape.groups, "vocab_size": shape.vocabulary, "max_position_embeddings": 8192,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def _tower(shape: Shape, side: int) -> dict[str, Any]:
    return {
        "hidden_size": shape.tower_width, "intermediate_size": shape.tower_inner, "num_hidden_layers": shape.tower_layers,
        "num_attention_heads": 4, "image_size": side * PATCH, "patch_size": PATCH,
    }  # fmt: skip


def _llava(shape: Shape, words: Any, side: int) -> tuple[Any, Any]:
    # one more layer, because LLaVA uses the features of the last layer but one
    tower = _tower(shape, side) | {"num_hidden_layers": shape.tower_layers + 1}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**tower),
        text_config=hf.LlamaConfig(**_text(shape)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    square = {"height": side * PATCH, "width": side * PATCH}
    pixels = hf.CLIPImageProcessor(size=square, crop_size=square)
    more = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return hf.LlavaForConditionalGeneration(config), hf.LlavaProcessor(pixels, words, **more)


def _qwen(shape: Shape, words: Any, side: int) -> tuple[Any, Any]:
    token = words.convert_tokens_to_ids
    sections = [WIDTH // HEADS // n for n in (4, 8, 8)]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    tower = {
        "depth": shape.tower_layers, "hidden_size": shape.tower_width, "intermediate_size": shape.tower_inner,
        "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": WIDTH,
        "window_size": 112, "fullatt_block_indexes": [],  # theirs has full attention in one layer of eight
    }  # fmt: skip
    ids = {f"{kind}_token_id": token(f"<|{kind}_pad|>") for kind in ("image", "video")}
    ids |= {f"vision_{end}_token_id": token(f"<|vision_{end}|>") for end in ("start", "end")}
    config = hf.Qwen2_5_VLConfig(
        text_config=_text(shape, rope_parameters=rope), vision_config=tower, tie_word_embeddings=False, **ids
    )
    pixels = hf.Qwen2VLImageProcessor(size={"shortest_edge": 28**2, "longest_edge": 4096 * 28**2}, patch_size=PATCH)
    processor = hf.Qwen2_5_VLProcessor(pixels, words, hf.Qwen2VLVideoProcessor())
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def _smolvlm(shape: Shape, words: Any, side: int) -> tuple[Any, Any]:
    import transformers.models.smolvlm.processing_smolvlm as module

    if getattr(module, "num2words", None) is None:
        module.num2words = str  # only for prompts about videos, which are not used here
    config = hf.SmolVLMConfig(
        vision_config=_tower(shape, shape.merge * side),
        text_config=_text(shape, model_type="llama"),
        scale_factor=shape.merge,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    edge = {"longest_edge": shape.merge * side * PATCH}
    pixels = hf.SmolVLMImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    processor = hf.SmolVLMProcessor(pixels, words, hf.SmolVLMVideoProcessor(), image_seq_len=side * side)
    return hf.SmolVLMForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[..., tuple[Any, Any]]] = {"llava": _llava, "qwen2_5_vl": _qwen, "smolvlm": _smolvlm}


def build(shape: Shape, tokens: int) -> tuple[Any, Any]:
    """Build a model with random weights for rows of about `tokens` image tokens, and its processor.

    The chat template adds nothing to the messages.
    """
    torch.manual_seed(0)
    model, processor = BUILDERS[shape.name](shape, tokenizer(shape), shape.image_sizes(tokens)[0][0])
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + shape.placeholder
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    return model, processor


def rows_of(shape: Shape, tokens: int, completion: int, pairs: int) -> list[dict[str, Any]]:
    """Pairs of random words, with about `tokens` image tokens per prompt and exactly `completion` tokens per completion."""
    rng = random.Random(0)
    random_words = lambda count: "".join(f" w{rng.randrange(shape.vocabulary - 9)}" for _ in range(count))
    edge = PATCH * shape.merge
    rows = []
    for number in range(pairs):
        noise = np.random.default_rng(number)
        images = [
            Image.fromarray(noise.integers(0, 255, (height * edge, width * edge, 3), np.uint8))
            for height, width in shape.image_sizes(tokens)
        ]
        completions = {side: f"{random_words(completion - 1)} </s>" for side in ("chosen", "rejected")}
        rows.append({"id": str(number), "images": images, "prompt": random_words(WORDS), **completions})
    return rows


def texts(shape: Shape, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in TRL's format, with image placeholders in the text."""
    return [
        {
            "images": row["images"],
            "prompt": shape.placeholder * len(row["images"]) + row["prompt"],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in rows
    ]


# The FLOP bound


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the parts of a model.

    Attributes:
        body, lora, head: per token.
        first: the part of the body without a backward pass, per token: queries, keys and values of the first layer.
        attention: per pair of positions.
        vision: per row.
    """

    body: int
    first: int
    lora: int
    head: int
    attention: int
    vision: int


def cost(shape: Shape, tokens: int, *, attention: bool = True) -> Cost:
    """The cost of a row. With attention=False attention is left out, as in torch's counter on a CPU."""
    key_value = WIDTH // HEADS * shape.groups
    linear = [(WIDTH, WIDTH)] * 2 + [(WIDTH, key_value)] * 2 + [(WIDTH, shape.inner)] * 3
    return Cost(
        body=LAYERS * sum(a * b for a, b in linear),
        first=WIDTH * (WIDTH + 2 * key_value),
        lora=LAYERS * RANK * sum(a + b for a, b in linear),
        head=WIDTH * shape.vocabulary,
        attention=2 * LAYERS * WIDTH * attention,
        vision=sum(_vision(shape, *size, attention=attention) for size in shape.image_sizes(tokens)),
    )


def _vision(shape: Shape, height: int, width: int, *, attention: bool) -> int:
    """Multiply-adds of one image: patch embedding, layers, and projector."""
    width_of_tower, tokens = shape.tower_width, height * width
    patches = tokens * shape.merge**2 + (shape.name == "llava")  # with a class token
    linear = 4 * width_of_tower**2 + (3 if shape.gated else 2) * width_of_tower * shape.tower_inner
    attended = (min(patches, WINDOW) if shape.name == "qwen2_5_vl" else patches) * attention
    patch_embedding = width_of_tower * 3 * PATCH**2 * (2 if shape.gated else 1)  # Qwen repeats an image in time
    merged_width = width_of_tower * shape.merge**2
    projector = {
        "llava": width_of_tower * WIDTH + WIDTH**2,
        "qwen2_5_vl": merged_width**2 + merged_width * WIDTH,
        "smolvlm": merged_width * WIDTH,
    }[shape.name]
    return (
        patches * (shape.tower_layers * (linear + 2 * width_of_tower * attended) + patch_embedding) + tokens * projector
    )


def ratios(shape: Shape, tokens: int) -> tuple[float, float]:
    """Multiply-adds of the vision tower per image token and of the head per token, divided by the body's per token."""
    costs = cost(shape, tokens)
    return costs.vision / shape.image_tokens(tokens) / costs.body, costs.head / costs.body


def flops(
    costs: Cost,
    *,
    positions: int,
    pairs: float,
    completions: int,
    visions: int,
    reference: bool,
    checkpointing: bool = False,
) -> float:
    """FLOPs of one training step, without embeddings, norms and activations.

    A multiply-add counts as 2. Frozen layers and the head run forward, and backward for the gradients of their inputs. A
    LoRA runs once more, for the gradients of its weights. The backward pass of attention costs 2.5 times its forward
    pass, because it recomputes the scores. The reference is one forward pass without LoRA.

    Args:
        positions: number of positions in the sequences.
        pairs: pairs of positions in attention.
        completions: number of positions whose logits are computed.
        visions: number of runs of the vision tower.
        reference: True if the reference runs in the step.
        checkpointing: True if the layers run forward once more in the backward pass.
    """
    passes, again = 2 + reference, int(checkpointing)
    return 2 * (
        ((passes + again) * costs.body - costs.first) * positions
        + (3 + again) * costs.lora * positions
        + passes * costs.head * completions
        + (3.5 + again + reference) * costs.attention * pairs
        + visions * costs.vision
    )


STEPS = {
    "trl_head": {"visions": 4, "reference": True},
    "plain": {"visions": 1, "reference": True},
    "prefix": {"visions": 1, "reference": True},
    "reference kept": {"visions": 1, "reference": False},
    "vision kept": {"visions": 0, "reference": False},
}
"""For each variant's step: the number of runs of the vision tower, and True if the reference runs in it."""


def step_flops(shape: Shape, tokens: int, completion: int, *, attention: bool = True) -> dict[str, float]:
    """FLOPs of each variant's step on one pair.

    Let a prompt have P tokens, image tokens included, and each completion C tokens. Two separate sequences have 2 (P + C)
    positions and (P + C)² pairs of positions in attention. The shared prefix has P + 2 C positions and
    P²/2 + 2 C (P + C/2) pairs.
    """
    return flops_by_variant(cost(shape, tokens, attention=attention), shape.prompt(tokens), completion)


def flops_by_variant(costs: Cost, prompt: int, completion: int, *, checkpointing: bool = False) -> dict[str, float]:
    """FLOPs of each variant's step on one pair, from the cost of its row and the numbers of tokens P and C."""
    p, c = prompt, completion
    separate = {"positions": 2 * (p + c), "pairs": (p + c) ** 2, "completions": 2 * c}
    shared = {"positions": p + 2 * c, "pairs": p**2 / 2 + 2 * c * (p + c / 2), "completions": 2 * c}
    return {
        name: flops(
            costs, **(separate if name in ("trl_head", "plain") else shared), **runs, checkpointing=checkpointing
        )  # type: ignore[arg-type]
        for name, runs in STEPS.items()
    }


def largest_speedups(shape: Shape, tokens: int, completion: int, *, attention: bool = True) -> dict[str, float]:
    """The largest speed-up of each variant over TRL's step (with the head only on completions) that the FLOP counts allow."""
    return speedups_over_trl(step_flops(shape, tokens, completion, attention=attention))


def speedups_over_trl(steps: dict[str, float]) -> dict[str, float]:
    """The speed-up of each of our variants over TRL's step, from the FLOPs of each."""
    return {name: steps["trl_head"] / value for name, value in steps.items() if name != "trl_head"}

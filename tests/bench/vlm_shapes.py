"""Random models for the step bench, two layers of 512, in the proportions of three published ones.

What a step costs is decided by how the vision tower, the language model's body and its head compare, token by token.
`PUBLISHED` has those ratios of the published configurations, in multiply-adds, attention within pictures of their usual
size included; `ratios` those of the models here. Attention weighs more here, as in any model this narrow.
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
"""Pixels a patch; the language model's width, layers and heads; the LoRA's rank; words of text in a prompt."""


@dataclass(frozen=True)
class Shape:
    """A model's proportions. gated: whether the tower's layers have three matrices in their MLP.

    merge: patches along a side that become one token. tile: tokens of one picture where a row has several, else None.
    """

    name: str
    vocabulary: int
    inner: int
    buckets: int
    tower_width: int
    tower_inner: int
    tower_layers: int
    merge: int
    gated: bool
    special: tuple[str, ...]
    place: str
    around: int
    """Special tokens beside those of each picture."""
    tile: int | None = None

    def pictures(self, tokens: int) -> list[tuple[int, int]]:
        """Rows and columns of tokens of each picture of a row with about so many image tokens."""
        if self.tile:
            side = round(self.tile**0.5)
            return [(side, side)] * (tokens // self.tile)
        if self.name == "qwen2_5_vl":
            side = next(s for s in range(int(tokens**0.5), 0, -1) if tokens % s == 0)
            return [(side, tokens // side)]
        return [(int(tokens**0.5), int(tokens**0.5))]

    def image_tokens(self, tokens: int) -> int:
        return sum(rows * columns for rows, columns in self.pictures(tokens))

    def prompt(self, tokens: int) -> int:
        """Tokens of image and prompt."""
        return self.image_tokens(tokens) + self.around * len(self.pictures(tokens)) + WORDS


WINDOW = 64
"""Patches that one of Qwen's sees."""
PUBLISHED = {
    "llava": ("LLaVA-1.5-7B", 0.05, 0.020),
    "qwen2_5_vl": ("Qwen2.5-VL-3B", 0.96, 0.112),
    "smolvlm": ("SmolVLM2-2.2B", 2.55, 0.063),
}
"""Name, vision an image token and head a token, over the body's multiply-adds a token."""

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
    """A word a token, split at white space and around special tokens."""
    special = ["<pad>", "<s>", "</s>", "<unk>", *shape.special]
    words = {word: n for n, word in enumerate([*special, *(f"w{n}" for n in range(shape.vocabulary - len(special)))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = hf.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    made.add_special_tokens({"additional_special_tokens": list(shape.special)})
    return made


def _text(shape: Shape, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH, "intermediate_size": shape.inner, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": shape.buckets, "vocab_size": shape.vocabulary, "max_position_embeddings": 8192,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def _tower(shape: Shape, side: int) -> dict[str, Any]:
    return {
        "hidden_size": shape.tower_width, "intermediate_size": shape.tower_inner, "num_hidden_layers": shape.tower_layers,
        "num_attention_heads": 4, "image_size": side * PATCH, "patch_size": PATCH,
    }  # fmt: skip


def _llava(shape: Shape, words: Any, side: int) -> tuple[Any, Any]:
    tower = _tower(shape, side) | {"num_hidden_layers": shape.tower_layers + 1}  # features are of the last but one
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
        "window_size": 112, "fullatt_block_indexes": [],  # one layer in eight of theirs
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
        module.num2words = str  # for prompts about videos alone, which are not used here
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
    """A random model of a shape for rows of about so many image tokens, and its processor; the template adds nothing."""
    torch.manual_seed(0)
    model, processor = BUILDERS[shape.name](shape, tokenizer(shape), shape.pictures(tokens)[0][0])
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + shape.place
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    return model, processor


def rows_of(shape: Shape, tokens: int, completion: int, pairs: int) -> list[dict[str, Any]]:
    """Pairs of random words: prompts of about so many image tokens, completions of exactly so many tokens each."""
    rng = random.Random(0)
    say = lambda count: "".join(f" w{rng.randrange(shape.vocabulary - 9)}" for _ in range(count))
    edge = PATCH * shape.merge
    rows = []
    for number in range(pairs):
        noise = np.random.default_rng(number)
        images = [
            Image.fromarray(noise.integers(0, 255, (height * edge, width * edge, 3), np.uint8))
            for height, width in shape.pictures(tokens)
        ]
        answers = {side: f"{say(completion - 1)} </s>" for side in ("chosen", "rejected")}
        rows.append({"id": str(number), "images": images, "prompt": say(WORDS), **answers})
    return rows


def texts(shape: Shape, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows as TRL takes them: one text with the images' places in it."""
    return [
        {
            "images": row["images"],
            "prompt": shape.place * len(row["images"]) + row["prompt"],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in rows
    ]


# What FLOPs allow


@dataclass(frozen=True)
class Cost:
    """Multiply-adds: of the body, its LoRA and the head a token, of attention a pair of positions, of the vision a row.

    first: the body's part that no gradient goes back through, the first layer's queries, keys and values.
    """

    body: int
    first: int
    lora: int
    head: int
    attention: int
    vision: int


def cost(shape: Shape, tokens: int, *, attention: bool = True) -> Cost:
    """The parts of a step of a row. attention: False leaves it out, as torch's counter does on a CPU."""
    key_value = WIDTH // HEADS * shape.buckets
    linear = [(WIDTH, WIDTH)] * 2 + [(WIDTH, key_value)] * 2 + [(WIDTH, shape.inner)] * 3
    return Cost(
        body=LAYERS * sum(a * b for a, b in linear),
        first=WIDTH * (WIDTH + 2 * key_value),
        lora=LAYERS * RANK * sum(a + b for a, b in linear),
        head=WIDTH * shape.vocabulary,
        attention=2 * LAYERS * WIDTH * attention,
        vision=sum(_vision(shape, *size, attention=attention) for size in shape.pictures(tokens)),
    )


def _vision(shape: Shape, height: int, width: int, *, attention: bool) -> int:
    """Multiply-adds of one picture: patches, layers, and what makes them tokens."""
    wide, tokens = shape.tower_width, height * width
    patches = tokens * shape.merge**2 + (shape.name == "llava")  # and a class token
    linear = 4 * wide**2 + (3 if shape.gated else 2) * wide * shape.tower_inner
    seen = (min(patches, WINDOW) if shape.name == "qwen2_5_vl" else patches) * attention
    first = wide * 3 * PATCH**2 * (2 if shape.gated else 1)  # Qwen doubles a picture in time
    merged = wide * shape.merge**2
    projector = {
        "llava": wide * WIDTH + WIDTH**2,
        "qwen2_5_vl": merged**2 + merged * WIDTH,
        "smolvlm": merged * WIDTH,
    }[shape.name]
    return patches * (shape.tower_layers * (linear + 2 * wide * seen) + first) + tokens * projector


def ratios(shape: Shape, tokens: int) -> tuple[float, float]:
    """Multiply-adds of the vision an image token, and of the head a token, over the body's a token."""
    of = cost(shape, tokens)
    return of.vision / shape.image_tokens(tokens) / of.body, of.head / of.body


def flops(of: Cost, *, positions: int, pairs: float, answers: int, visions: int, reference: bool) -> float:
    """FLOPs of one training step.

    A multiply-add is 2. Frozen layers: forward, and backward for their inputs; a LoRA: once more, for its weights; the
    head as frozen layers; attention's backward 2.5 times its forward, which it does again. The reference is one forward
    without LoRA. visions: times that the tower is asked. Embeddings, norms and activations are left out.
    """
    passes = 2 + reference
    return 2 * (
        (passes * of.body - of.first) * positions
        + 3 * of.lora * positions
        + passes * of.head * answers
        + (3.5 + reference) * of.attention * pairs
        + visions * of.vision
    )


STEPS = {
    "trl_head": {"visions": 4, "reference": True},
    "plain": {"visions": 1, "reference": True},
    "prefix": {"visions": 1, "reference": True},
    "reference kept": {"visions": 1, "reference": False},
    "vision kept": {"visions": 0, "reference": False},
}
"""How often each variant's step asks the vision tower, and whether it asks the reference."""


def step_flops(shape: Shape, tokens: int, completion: int, *, attention: bool = True) -> dict[str, float]:
    """FLOPs of each variant's step on one pair.

    With P tokens of image and prompt and C of each completion, two sequences have 2 (P + C) positions and look at
    (P + C)² pairs of them; the shared prefix has P + 2 C, and P²/2 + 2 C (P + C/2).
    """
    of, p, c = cost(shape, tokens, attention=attention), shape.prompt(tokens), completion
    plain = {"positions": 2 * (p + c), "pairs": (p + c) ** 2, "answers": 2 * c}
    shared = {"positions": p + 2 * c, "pairs": p**2 / 2 + 2 * c * (p + c / 2), "answers": 2 * c}
    return {
        name: flops(of, **(plain if name in ("trl_head", "plain") else shared), **what)  # type: ignore[arg-type]
        for name, what in STEPS.items()
    }


def allowed(shape: Shape, tokens: int, completion: int, *, attention: bool = True) -> dict[str, float]:
    """How many times cheaper than TRL's step (the head on completions alone) each of ours is by FLOPs."""
    found = step_flops(shape, tokens, completion, attention=attention)
    return {name: found["trl_head"] / value for name, value in found.items() if name != "trl_head"}

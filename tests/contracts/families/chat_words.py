"""Real tokenizers of the language models that newer families use as text encoders.

These are Qwen's, with its chat template, and Gemma's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import GemmaTokenizer, Qwen2Tokenizer

from tests.contracts.families.words import WORDS

MESSAGE_TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASSISTANT_TURN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EMPTY_THOUGHT = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"


def _merges(texts: Sequence[str], *, alphabet: list[str], split: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = split
    trainer = BpeTrainer(vocab_size=len(alphabet) + 60, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen_tokenizer(more: Sequence[str] = ()) -> Qwen2Tokenizer:
    """Qwen's byte-level tokenizer, with more special tokens. If thinking is off, its template adds an empty thought, as Qwen 3's does."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary, merges = _merges(WORDS, alphabet=alphabet, split=pre_tokenizers.ByteLevel(add_prefix_space=False))
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *more)
    vocabulary |= {token: len(vocabulary) + n for n, token in enumerate(specials)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=list(specials[1:]))
    tokenizer.chat_template = MESSAGE_TURN + ASSISTANT_TURN + EMPTY_THOUGHT
    return tokenizer


def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's tokenizer: bytes as a fallback, and spaces replaced by a lower one-eighth block."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] + [f"<0x{n:02X}>" for n in range(256)]
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    texts = [word.replace(" ", "▁") for word in WORDS]
    merged_tokens, merges = _merges(texts, alphabet=sorted(set("".join(texts))), split=split)
    vocabulary = {token: n for n, token in enumerate(specials)}
    for token in sorted(merged_tokens, key=merged_tokens.__getitem__):
        vocabulary.setdefault(token, len(vocabulary))
    return GemmaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=[])

"""Prompts that are longer than a pipeline's text encoders read. diffusers drops their ends."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_mm.policies.protocol import ImagePolicy


def truncated_prompts(policy: ImagePolicy, prompts: Sequence[str]) -> str:
    """Describe how many prompts are truncated, and by which tokenizer. "" if none is.

    The words that a pipeline adds to each prompt (a chat template, an instruction) are not counted.

    Args:
        policy: the image generator. Its tokenizers are used, its weights are not.
        prompts: texts. Repeated ones count once.
    """
    texts = list(dict.fromkeys(prompts))
    lines = []
    for tokenizer, limit in _tokenizers(policy):
        lengths = [len(tokens) for tokens in tokenizer(texts, verbose=False)["input_ids"]]
        count = sum(length > limit for length in lengths)
        if count:
            lines.append(
                f"{count:,} of {len(texts):,} have more than {limit} tokens (up to {max(lengths):,}), of which "
                f"{type(tokenizer).__name__} passes on the first {limit}"
            )
    return "; ".join(lines)


def _tokenizers(policy: ImagePolicy) -> Iterator[tuple[Any, int]]:
    """Yield each tokenizer of the pipeline, or of its processor, and the largest number of tokens that it passes on.

    CLIP's limit is its number of positions. The others have that of the pipeline's call, or of the pipeline.
    """
    default = inspect.signature(type(policy.pipe).__call__).parameters.get("max_sequence_length")
    otherwise = default.default if default else getattr(policy.pipe, "tokenizer_max_length", None)
    limit = policy.sampling_kwargs([], 1.0).get("max_sequence_length", otherwise)
    parts = list(policy.pipe.components.values())
    if not any(isinstance(part, PreTrainedTokenizerBase) for part in parts):
        parts = [getattr(part, "tokenizer", part) for part in parts]
    for component in parts:
        if isinstance(component, PreTrainedTokenizerBase):
            is_clip = type(component).__name__.startswith("CLIP")
            yield component, component.model_max_length if is_clip or limit is None else limit

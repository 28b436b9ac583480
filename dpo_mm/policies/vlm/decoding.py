"""Decoding: greedy is the argmax of the policy, and the text of a response is all that the model wrote.

The generation config of a published model may contain a repetition penalty, beams or suppressed tokens. They change which
token is taken, so "greedy" would not be the argmax of the model that is trained. Only its token ids are used.
"""

from __future__ import annotations

import copy
import logging
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_mm.policies.vlm.completion import stop_strings

if TYPE_CHECKING:
    from transformers import GenerationConfig

logger = logging.getLogger(__name__)

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
REPLACED = ("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "stop_strings")
"""Entries for which dpo-mm has its own values, so that nobody expects the model's."""
MEDIA_TOKEN = re.compile(r"(image|video|audio|vision|boi|eoi|boa|eoa)_.*(id|index)$")
"""Names in a model's config of the placeholder ids of images, videos and audio, and of the ids around them."""


class Decoding(NamedTuple):
    """Decoding of a response.

    Attributes:
        temperature: sampling temperature. 0 is greedy.
        seed: seed of the sampling.
    """

    temperature: float
    seed: int


def with_plain_generation(model: Any) -> Any:
    """Return a view of a model whose `generate` takes the model's own probabilities.

    The view shares the weights. Its generation config contains the token ids and the entries that only this model has.
    """
    view = copy.copy(model)
    view.generation_config = _plain(model.generation_config)
    return view


def _plain(config: GenerationConfig) -> GenerationConfig:
    from transformers import GenerationConfig

    standard = vars(GenerationConfig())
    return GenerationConfig(
        **{name: value for name, value in vars(config).items() if name in TOKEN_IDS or name not in standard}
    )


def log_unused_settings(model: Any, tokenizer: Any, source: str) -> None:
    """Log the entries of a model's generation config that would change the responses, because they are not used."""
    config = model.generation_config
    defaults = {**vars(type(config)()), **config._get_default_generation_params()}
    unused = [
        f"{name} {value}"
        for name, value in sorted(vars(config).items())
        if name in defaults
        and value not in (None, defaults[name])
        and not name.startswith(("_", "output_", "transformers_", "use_cache", "cache_"))
        and name not in TOKEN_IDS + REPLACED
    ]
    unused += [f"stop string {text!r}" for text, stop in stop_strings(tokenizer, config).items() if stop is None]
    if unused:
        logger.warning(
            "%s: not used of its generation_config.json: %s. A greedy response is the model's argmax, and samples have "
            "the model's own probabilities",
            source,
            ", ".join(unused),
        )


def media_ids(model: Any) -> set[int]:
    """Ids of the placeholders of images, videos and audio, and of the tokens around them."""
    values = (value for name, value in vars(model.config).items() if MEDIA_TOKEN.fullmatch(name))
    return {value for value in values if isinstance(value, int)}


def hidden_ids(tokenizer: Any, model: Any) -> set[int]:
    """Ids that are no text of a response: padding, begin and end of a sequence, and placeholders of images.

    Other special tokens, such as those around a box or its coordinates, are part of what the model wrote.
    """
    named = {getattr(tokenizer, f"{name}_id") for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    return {value for value in named if isinstance(value, int)} | media_ids(model)

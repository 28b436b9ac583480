"""Completions: the text of a response, and the token that ends its turn in the chat template.

The end of a turn is what the model's chat template writes after a response, up to the first special token. It is often
not the tokenizer's end of sequence: Gemma ends a turn with <end_of_turn>, Phi with <|end|>. Nothing after it counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dpo_mm.data.conversation import Message

QUESTION, RESPONSE = "The-question-4b81d2", "The-response-7f3a9c"
"""Texts in place of a question and a response, to find what a template writes after them."""


class TurnEnd(NamedTuple):
    """The end of a response's turn: the template's text up to its end, all of its text, and the token id of the end."""

    text: str
    suffix: str
    id: int | None


def stop_ids(tokenizer: Any, model: Any) -> list[int]:
    """Ids at which `generate` stops: those of the generation config, or the tokenizer's end of sequence.

    A stop string that is a single token counts too.
    """
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return list(dict.fromkeys([*ids, *(i for i in stop_strings(tokenizer, config).values() if i is not None)]))


def stop_strings(tokenizer: Any, config: Any) -> dict[str, int | None]:
    """Stop strings of a generation config, with their ids. The id is None for a string of several tokens."""
    strings = getattr(config, "stop_strings", None) or []
    strings = [strings] if isinstance(strings, str) else strings
    encoded = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in strings}
    return {text: ids[0] if len(ids) == 1 else None for text, ids in encoded.items()}


def turn_end(render: Callable[[Sequence[Message]], str], tokenizer: Any, stops: Sequence[int]) -> TurnEnd:
    """Find the end of a response's turn in a chat template.

    Args:
        render: applies the template to a complete conversation.
        tokenizer: the model's tokenizer.
        stops: ids at which `generate` stops.

    Returns:
        The first token after the response at which `generate` stops, or which ends the user's turn too. Without one, the
        first special token after the response, or what opens the next turn if `generate` stops there (GLM). A template
        that writes none of them has the end text "", and the id of the tokenizer's end of sequence.
    """
    text = lambda role, content: {"role": role, "content": [{"type": "text", "text": content}]}
    conversation = [text("user", QUESTION), text("assistant", RESPONSE)]
    before, response, suffix = render(conversation).rpartition(RESPONSE)
    if not response:
        return TurnEnd("", "", tokenizer.eos_token_id)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = {*stops, *_tokens(before.rpartition(QUESTION)[2], tokenizer, special)[:1]}
    ending_ids = _tokens(suffix, tokenizer, ends) or _tokens(suffix, tokenizer, special)
    written = suffix
    if not ending_ids:
        after = render([*conversation, text("user", QUESTION)]).rpartition(RESPONSE)[2]
        written = after.partition(QUESTION)[0]
        ending_ids = _tokens(written, tokenizer, set(stops))
    for end in ending_ids:
        token = tokenizer.convert_ids_to_tokens(end)
        if token in written:
            return TurnEnd(written[: written.index(token) + len(token)], suffix, end)
    return TurnEnd("", suffix, tokenizer.eos_token_id)


def _tokens(text: str, tokenizer: Any, wanted: set[int]) -> list[int]:
    """Those tokens of a text that are wanted."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return [token for token in ids if token in wanted]


def without_repeated_opening(opening: str, response: str) -> str:
    """Remove from a response the tag that the template has written already, such as `<think>`.

    Args:
        opening: what the template writes to open the response's turn.
        response: the text of the response.
    """
    tag = re.search(r"[<\[◁][^<>\[\]◁▷\s]+[>\]▷]\s*$", opening)
    for written in (tag.group(), tag.group().rstrip()) if tag else ():
        if response.startswith(written):
            return response[len(written) :]
    return response

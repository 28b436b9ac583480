"""Encode preference rows of text and images as token ids and image tensors, once for all epochs.

The prompt goes through the model's own chat template and processor. A completion is the response's tokens with the end of
the template's turn, see completion.py. A model without a chat template gets the images, then the text. Image tokens are
never truncated: a row that is too long raises an error, or is dropped and logged.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_mm.data.conversation import (
    Message,
    as_messages,
    count_image_parts,
    parse_tools,
    place_images,
    response_of,
    split_at_placeholders,
)
from dpo_mm.data.image_files import rgb_image
from dpo_mm.data.load_pairs import decode_prompt_images, undecoded_rows
from dpo_mm.data.schema import Response
from dpo_mm.errors import name_row
from dpo_mm.objectives import DATASET_INPUTS
from dpo_mm.policies.vlm.completion import TurnEnd, stop_ids, turn_end, without_repeated_opening
from dpo_mm.policies.vlm.decoding import hidden_ids, media_ids

logger = logging.getLogger(__name__)

TEXT_INPUTS = ("input_ids", "attention_mask", "labels")
TOKEN_TYPE_INPUTS = ("token_type_ids", "mm_token_type_ids")
"""Names of the token types that processors return with the ids."""


class ConversationEncoder:
    """Encoder of rows and conversations for one model.

    Args:
        processor: an AutoProcessor, or an AutoTokenizer for a model without images.
        model: the transformers model.
        max_length: largest number of tokens of images, prompt and the longer completion. None is the model's limit.
        overlong_rows: "raise" or "drop" for rows above `max_length`.
        corrupt: True also encodes a corrupted version of each image, see `corrupt_image`.
        mark_edits: True also marks the tokens in which the responses differ, see `edited_token_masks`.

    Raises:
        ValueError: if `overlong_rows` is unknown.
    """

    def __init__(
        self,
        processor: Any,
        model: Any,
        *,
        max_length: int | None,
        overlong_rows: str,
        corrupt: bool = False,
        mark_edits: bool = False,
    ) -> None:
        if overlong_rows not in ("raise", "drop"):
            raise ValueError(f"overlong_rows {overlong_rows!r} is unknown. Expected raise or drop")
        self.processor, self.tokenizer = processor, getattr(processor, "tokenizer", processor)
        self.takes_images = self.tokenizer is not processor
        self.templated = bool(getattr(processor, "chat_template", None) or self.tokenizer.chat_template)
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.generation_stops = stop_ids(self.tokenizer, model)
        self.media_ids, self.hidden_ids = media_ids(model), hidden_ids(self.tokenizer, model)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.given_max_length, self.max_length = max_length, max_length or limit
        self.overlong_rows = overlong_rows
        self.corrupt, self.mark_edits = corrupt, mark_edits
        self.dropped: list[str] = []
        """Ids of the rows that were dropped because they are too long."""

    def with_processor(self, processor: Any, model: Any) -> ConversationEncoder:
        """Return an encoder with the same options for another processor and model."""
        return ConversationEncoder(
            processor,
            model,
            max_length=self.given_max_length,
            overlong_rows=self.overlong_rows,
            corrupt=self.corrupt,
            mark_edits=self.mark_edits,
        )

    def encode(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Encode rows of the schema `response_preference`, without the dropped ones. See `encode_row`."""
        encoded = []
        for row in undecoded_rows(rows):
            with name_row(f"row {row['id']} of the pairs", "Fix the row, or remove it", clear=(ValueError,)):
                encoded.append(self.encode_row(row))
        return [row for row in encoded if row is not None]

    def encode_row(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Encode one row.

        Returns:
            A dict with `id`, `prompt_ids`, `chosen_ids` and `rejected_ids` (tokens,), `types` (token types by name),
            `images` (tensors by name), and the row's columns of DATASET_INPUTS. None if the row is dropped.

        Raises:
            ValueError: if the row is too long, or its images, prompt and responses do not fit together. The error names
                the row.
        """
        name, images = str(row["id"]), decode_prompt_images(row, "the pairs")
        label = f"row {name}"
        messages, tools = self.read_prompt(row)
        prompt = self.prompt(images, messages, label=label, tools=tools)
        completions = self.completions(row, messages, len(images), tools=tools)
        length = len(prompt["ids"]) + max(len(ids) for ids in completions.values())
        if self.max_length and length > self.max_length:
            self._raise_or_drop(
                name, f"{length} tokens, {len(prompt['ids'])} of them its prompt with {len(images)} images"
            )
            return None
        columns: dict[str, Any] = {name: float(row[name]) for name in DATASET_INPUTS if row.get(name) is not None}
        if row.get("score_gap") is not None:
            columns["score_margin"] = float(row["score_gap"])
        ids = {f"{side}_ids": torch.tensor(tokens) for side, tokens in completions.items()}
        if self.mark_edits:
            ids |= edited_token_masks(completions["chosen"], completions["rejected"])
        if self.corrupt:
            if not images:
                raise ValueError(f"row {name} has no image to corrupt. The objective image_conditional needs images")
            corrupted_images = [corrupt_image(image, seed=f"{name} {n}") for n, image in enumerate(images)]
            columns["corrupted_images"] = self.prompt(corrupted_images, messages, label=label)["images"]
        return {
            "id": name,
            "prompt_ids": prompt["ids"],
            **ids,
            "types": prompt["types"],
            "images": prompt["images"],
            **columns,
        }

    def read_prompt(self, row: Mapping[str, Any]) -> tuple[list[Message], Any]:
        """Return the messages and the tools of a row's prompt. Raises ValueError with the row's name if one is not valid."""
        column = "prompt"
        try:
            messages = as_messages(row["prompt"], "user")
            column = "tools"
            return messages, parse_tools(row.get("tools"))
        except ValueError as error:
            raise ValueError(f"row {row['id']}: {column}: {error}") from error

    def completions(
        self, row: Mapping[str, Any], messages: Sequence[Message], num_images: int, *, tools: Any = None
    ) -> dict[str, list[int]]:
        """Encode both responses of a row as token ids, by side. Raises ValueError if they do not fit the prompt.

        The only response of a one-sided row is `chosen`, also if it is disliked.
        """
        sides = [side for side in ("chosen", "rejected") if row.get(side) is not None]
        return {
            side if len(sides) == 2 else "chosen": self._completion(
                messages,
                num_images,
                row[side],
                f"row {row['id']}: {side}",
                ends=not row.get(f"{side}_truncated"),
                tools=tools,
            )
            for side in sides or ["chosen"]
        }

    def _raise_or_drop(self, name: str, size: str) -> None:
        reason = f"row {name}: {size}. At most {self.max_length} fit, and image tokens are never truncated"
        if self.overlong_rows == "raise":
            raise ValueError(
                f"{reason}. Shrink its images, raise max_length, or drop such rows with overlong_rows: drop"
            )
        logger.warning("%s. The row is dropped", reason)
        self.dropped.append(name)

    def prompt(
        self, images: Sequence[Any], messages: Sequence[Message], *, label: str, tools: Any = None
    ) -> dict[str, Any]:
        """Encode a conversation up to the start of the model's response.

        A last message of the assistant is the beginning of the response (a prefill), which the model continues.

        Args:
            images: images of the conversation.
            messages: messages in the chat format.
            label: name of the conversation, the start of an error.
            tools: JSON schemas of tools, for the chat template. None for none.

        Returns:
            A dict with `ids` (tokens,), `types` (token types by name, (tokens,)) and `images` (tensors by name).

        Raises:
            ValueError: if the numbers of images and image placeholders differ, or the processor does not accept them.
        """
        text = self.prompt_text(len(images), messages, label=label, tools=tools)
        try:
            processed = self._process(text, images)
        except ValueError as error:
            raise ValueError(f"{label}: the processor failed: {' '.join(str(error).split())}") from error
        ids = processed["input_ids"][0]
        if len(ids) == 0:
            raise ValueError(f"{label}: the prompt is empty. Expected at least one token")
        types = {key: processed[key][0] for key in TOKEN_TYPE_INPUTS if key in processed and key in self.accepted}
        tensors = {
            k: v
            for k, v in processed.items()
            if isinstance(v, Tensor) and k in self.accepted and k not in TOKEN_TYPE_INPUTS
        }
        return {
            "ids": ids,
            "types": types,
            "images": {k: v for k, v in tensors.items() if k not in TEXT_INPUTS},
        }

    def prompt_text(self, num_images: int, messages: Sequence[Message], *, label: str, tools: Any = None) -> str:
        """Apply the chat template to a conversation up to the start of the model's response. See `prompt`."""
        if num_images and not self.takes_images:
            raise ValueError(f"{label}: {num_images} images for a model that takes only text")
        return self._template(self._place_images(messages, num_images, label), complete=False, tools=tools)

    def prompt_text_ids(self, text: str) -> list[int]:
        """Token ids of a prompt in which each image is its placeholder."""
        return list(self.tokenizer(text, **self._special_token_options(text))["input_ids"])

    def _process(self, text: str, images: Sequence[Any]) -> Any:
        if not self.takes_images:
            return self.tokenizer([text], return_tensors="pt", **self._special_token_options(text))
        rgb = [[rgb_image(image) for image in images]] if images else None
        return self.processor(text=[text], images=rgb, return_tensors="pt", **self._special_token_options(text))

    def _special_token_options(self, text: str) -> dict[str, bool]:
        """Options that add no special tokens if the template has written them already."""
        first = self.tokenizer.bos_token
        whole = self.templated and (not self.takes_images or (bool(first) and text.startswith(first)))
        return {"add_special_tokens": False} if whole else {}

    def _template(self, messages: Sequence[Message], *, complete: bool, tools: Any = None) -> str:
        """Apply the model's chat template to a complete conversation, or up to the start of the response."""
        if not self.templated:
            return _untemplated(messages, getattr(self.processor, "image_token", None))
        if not self.takes_images:
            messages = [{"role": m["role"], "content": _untemplated([m], None)} for m in messages]
        prefilled = not complete and messages[-1]["role"] == "assistant"
        options = {"continue_final_message": True} if prefilled else {"add_generation_prompt": not complete}
        return self.processor.apply_chat_template(messages, tokenize=False, tools=tools, **options)

    @functools.cached_property
    def turn_end(self) -> TurnEnd:
        """The end of a response's turn in the model's chat template."""
        if not self.templated:
            return TurnEnd("", "", self.tokenizer.eos_token_id)
        render = functools.partial(self._template, complete=True)
        return turn_end(render, self.tokenizer, self.generation_stops)

    @functools.cached_property
    def stops(self) -> list[int]:
        """Ids at which a generated response ends: the template's end of a turn, and those at which `generate` stops."""
        return list(dict.fromkeys([*self.generation_stops, *([] if self.turn_end.id is None else [self.turn_end.id])]))

    def _place_images(self, messages: Sequence[Message], images: int, label: str) -> list[Message]:
        """Messages with a part per image. In the prompts of a model without images, `<image>` is text."""
        if not self.takes_images:
            return list(messages)
        placed = place_images(messages, images)
        if placed is None:
            raise ValueError(
                f"{label}: {images} images for {count_image_parts(split_at_placeholders(messages))} placeholders in the "
                "prompt. Expected one placeholder per image, or none and a message of the user"
            )
        return placed

    def text(self, ids: Sequence[int]) -> str:
        """Text of a response's tokens, with the special tokens that a model writes inside, such as those of a box."""
        hidden = self.hidden_ids.union(self.stops)
        return self.tokenizer.decode(
            [token for token in ids if token not in hidden],
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )

    def response(self, tokens: Sequence[int]) -> Response:
        """Decode a generated response up to the first token that ends a turn.

        Args:
            tokens: generated token ids, possibly padded at the end.
        """
        stops = self.stops
        end = next((n + 1 for n, token in enumerate(tokens) if token in stops), None)
        completion = tokens[:end]
        return Response(self.text(completion), len(completion), hit_limit=end is None)

    def _completion(
        self,
        messages: Sequence[Message],
        num_images: int,
        response: Any,
        label: str,
        *,
        ends: bool,
        tools: Any = None,
    ) -> list[int]:
        """Ids of the completion, (tokens,), with the end of the turn unless the response is truncated."""
        try:
            answer = response_of(response, messages)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
        prompt = self._place_images(messages, num_images, label)
        before, body = self._body(prompt, answer, tools)
        ids = self._after(before, before + body + (self.turn_end.text if ends else ""))
        end = next((n for n, token in enumerate(ids) if token in self.stops), None)
        if end is not None:
            ids = ids[: end + ends]
        elif ends and self.turn_end.id is not None:
            ids = [*ids, self.turn_end.id]
        media = self.media_ids.intersection(ids)
        if media:
            token = self.tokenizer.convert_ids_to_tokens(min(media))
            raise ValueError(f"{label} contains {token}, an image token of the model. Expected text. Remove it")
        if not ids:
            raise ValueError(f"{label} is empty. Expected at least one token")
        return ids

    def _body(self, prompt: list[Message], answer: list[Message], tools: Any) -> tuple[str, str]:
        """Text of the templated prompt, and the response's text after it as the template writes it."""
        before, text = self._template(prompt, complete=False, tools=tools), _untemplated(answer, None)
        if not self.templated:
            return before, text
        if prompt[-1]["role"] == "assistant":
            content = [*prompt[-1]["content"], *answer[0]["content"]]
            whole = self._template(
                [*prompt[:-1], {"role": "assistant", "content": content}], complete=True, tools=tools
            )
        else:
            whole = self._template([*prompt, *answer], complete=True, tools=tools)
        if whole.startswith(before) and whole.endswith(self.turn_end.suffix):
            return before, whole[len(before) : len(whole) - len(self.turn_end.suffix)]
        closed = self._template(prompt, complete=True, tools=tools)
        opening = before[len(closed) :] if before.startswith(closed) else ""
        return before, without_repeated_opening(opening, text)

    def _after(self, before: str, whole: str) -> list[int]:
        """Ids of `whole` after those of `before`, or of the remaining text if a token crosses the boundary."""
        start, ids = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, whole))
        if ids[: len(start)] == start:
            return list(ids[len(start) :])
        return list(self.tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"])


def corrupt_image(image: Any, *, seed: str) -> Any:
    """Corrupt an image: crop a random 1 to 20 % of its area and scale the crop to the image's size.

    Args:
        image: an RGB image.
        seed: seed of the crop.

    Source: mDPO, Wang et al. 2024 (2406.11839).
    """
    digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
    rng = random.Random(int.from_bytes(digest, "little"))
    edge = rng.uniform(0.01, 0.2) ** 0.5
    width, height = max(1, round(image.width * edge)), max(1, round(image.height * edge))
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height)).resize(image.size)


def edited_token_masks(chosen: Sequence[int], rejected: Sequence[int]) -> dict[str, Tensor]:
    """Mark the tokens of each response that are not in the longest matching blocks of both.

    Returns:
        `chosen_edited` and `rejected_edited`, (tokens,) each, 1 for an edited token and 0 otherwise.
    """
    marks = {"chosen_edited": torch.ones(len(chosen)), "rejected_edited": torch.ones(len(rejected))}
    for block in difflib.SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        marks["chosen_edited"][block.a : block.a + block.size] = 0
        marks["rejected_edited"][block.b : block.b + block.size] = 0
    return marks


def _untemplated(messages: Sequence[Message], image_token: str | None) -> str:
    parts = [part for message in messages for part in message["content"]]
    return "".join((image_token or "") if part["type"] == "image" else part["text"] for part in parts)

"""Encode preference rows of text and images as token ids and image tensors, once for all epochs.

The prompt goes through the model's own chat template and processor. Completions are the tokens that the template puts
after the prompt, with the end of the turn. A model without a chat template gets the images, then the text. Image tokens
are never truncated: a row that is too long raises an error, or is dropped and logged.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_mm.data.image_files import rgb_image
from dpo_mm.data.load_pairs import decode_prompt_images, undecoded_rows
from dpo_mm.data.schema import Response
from dpo_mm.objectives import DATASET_INPUTS
from dpo_mm.policies.vlm.shared_prefix import Layout

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
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length, self.overlong_rows = max_length or limit, overlong_rows
        self.corrupt, self.mark_edits = corrupt, mark_edits
        self.dropped: list[str] = []
        """Ids of the rows that were dropped because they are too long."""

    def encode(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Encode rows of the schema `response_preference`, without the dropped ones. See `encode_row`."""
        encoded = (self.encode_row(row) for row in undecoded_rows(rows))
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
        messages = as_messages(row["prompt"], "user")
        prompt = self.prompt(images, messages, label=f"row {name}")
        completions = {
            side: self._completion(
                messages, images, row[side], f"row {name}: {side}", ends=not row.get(f"{side}_truncated")
            )
            for side in ("chosen", "rejected")
        }
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
            columns["corrupted_images"] = self.prompt(corrupted_images, messages, label=f"row {name}")["images"]
        return {
            "id": name,
            "prompt_ids": prompt["ids"],
            **ids,
            "types": prompt["types"],
            "images": prompt["images"],
            **columns,
        }

    def _raise_or_drop(self, name: str, size: str) -> None:
        reason = f"row {name}: {size}. At most {self.max_length} fit, and image tokens are never truncated"
        if self.overlong_rows == "raise":
            raise ValueError(
                f"{reason}. Shrink its images, raise max_length, or drop such rows with overlong_rows: drop"
            )
        logger.warning("%s. The row is dropped", reason)
        self.dropped.append(name)

    def prompt(self, images: Sequence[Any], messages: Sequence[dict[str, Any]], *, label: str) -> dict[str, Any]:
        """Encode a conversation up to the start of the model's response.

        Args:
            images: images of the conversation.
            messages: messages in the chat format.
            label: name of the conversation, the start of an error.

        Returns:
            A dict with `ids` (tokens,), `types` (token types by name, (tokens,)) and `images` (tensors by name).

        Raises:
            ValueError: if the numbers of images and image placeholders differ, or the processor does not accept them.
        """
        if images and not self.takes_images:
            raise ValueError(f"{label}: {len(images)} images for a model that takes only text")
        text = self._template(_with_image_parts(messages, len(images), label), complete=False)
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

    def _template(self, messages: Sequence[dict[str, Any]], *, complete: bool) -> str:
        """Apply the model's chat template to a complete conversation, or up to the start of the response."""
        if not self.templated:
            return _untemplated(messages, getattr(self.processor, "image_token", None))
        if not self.takes_images:
            messages = [
                {"role": m["role"], "content": "".join(part["text"] or "" for part in m["content"])} for m in messages
            ]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=not complete)

    def _completion(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Any], response: Any, label: str, *, ends: bool
    ) -> list[int]:
        """Ids of the completion, (tokens,), with the end of the turn unless the response is truncated."""
        responses = as_messages(response, "assistant")
        prompt = _with_image_parts(messages, len(images), label)
        before, whole = self._template(prompt, complete=False), self._template([*prompt, *responses], complete=True)
        if not self.templated or not whole.startswith(before):
            whole = before + "".join(part["text"] or "" for message in responses for part in message["content"])
        ids = self._after(before, whole)
        last = self._end_of_turn(ids)
        if ends and last is None and self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        ids = ids if last is None else ids[: last + 1]
        if not ends and last is not None:
            ids = ids[:last]
        if not ids:
            raise ValueError(f"{label} is empty. Expected at least one token")
        return ids

    def _after(self, before: str, whole: str) -> list[int]:
        """Ids of `whole` after those of `before`, or of the remaining text if a token crosses the boundary."""
        start, ids = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, whole))
        if ids[: len(start)] == start:
            return list(ids[len(start) :])
        return list(self.tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"])

    def _end_of_turn(self, ids: Sequence[int]) -> int | None:
        """Index of the last end-of-sequence token, if only white space follows it."""
        indices = [n for n, token in enumerate(ids) if token == self.tokenizer.eos_token_id]
        if not indices or self.tokenizer.decode(ids[indices[-1] + 1 :]).strip():
            return None
        return indices[-1]


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


def as_messages(content: Any, role: str) -> list[dict[str, Any]]:
    """Convert a text or messages to messages whose content is a list of parts.

    Args:
        content: a text, or messages in the chat format.
        role: role of the message if content is a text.
    """
    if isinstance(content, str):
        content = [{"role": role, "content": content}]
    return [{"role": message["role"], "content": _parts(message["content"])} for message in content]


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [
        {"type": part["type"]} if part["type"] == "image" else {"type": "text", "text": part["text"]}
        for part in content
    ]


def _with_image_parts(messages: Sequence[dict[str, Any]], images: int, label: str) -> list[dict[str, Any]]:
    """Messages with a part per image. If they have no image parts, these come first in the first user message."""
    messages = as_messages(messages, "user")
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders not in (0, images):
        raise ValueError(
            f"{label}: {images} images for {placeholders} placeholders in the prompt. "
            "Expected one placeholder per image, or none"
        )
    first = next((message for message in messages if message["role"] == "user"), None)
    if placeholders == 0 and images and first is None:
        raise ValueError(f"{label}: {images} images, but no user message to put them in")
    if placeholders == 0 and first is not None:
        first["content"] = [{"type": "image"}] * images + first["content"]
    return messages


def _untemplated(messages: Sequence[dict[str, Any]], image_token: str | None) -> str:
    parts = [part for message in messages for part in message["content"]]
    return "".join((image_token or "") if part["type"] == "image" else part["text"] or "" for part in parts)


# Batches


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Make a batch from encoded rows.

    Args:
        rows: rows from `ConversationEncoder.encode`.
        pad_token_id: id of padding.

    Returns:
        A dict with `id`, `ids` and `mask` (pairs, columns of prompt, chosen and rejected), `layout`, `types`, `images`,
        `num_tokens_chosen` and `num_tokens_rejected` (pairs,). Optional columns of the rows are added under their names.
    """
    parts = [[row[f"{part}_ids"] for row in rows] for part in ("prompt", "chosen", "rejected")]
    widths = [max(len(ids) for ids in part) for part in parts]
    ids = [
        pad_rows(part, width, left=n == 0, value=pad_token_id)
        for n, (part, width) in enumerate(zip(parts, widths, strict=True))
    ]
    ones = [[torch.ones_like(ids) for ids in part] for part in parts]
    masks = [pad_rows(part, width, left=n == 0) for n, (part, width) in enumerate(zip(ones, widths, strict=True))]
    mask = torch.cat(masks, 1)
    batch: dict[str, Any] = {
        "id": [row["id"] for row in rows],
        "ids": torch.cat(ids, 1),
        "mask": mask,
        "layout": Layout(widths[0], widths[1], widths[2], has_padding=not bool(mask.all())),
        "types": {k: pad_rows([row["types"][k] for row in rows], widths[0], left=True) for k in rows[0]["types"]},
        "images": join_images([row["images"] for row in rows]),
    }
    for part, side in enumerate(("chosen", "rejected"), start=1):
        batch[f"num_tokens_{side}"] = torch.tensor([float(len(ids)) for ids in parts[part]])
        if f"{side}_edited" in rows[0]:
            edited = [row[f"{side}_edited"] for row in rows]
            batch[f"{side}_edited"] = pad_rows(edited, widths[part], left=False).float()
    for name in DATASET_INPUTS:
        if all(name in row for row in rows):
            batch[name] = torch.tensor([float(row[name]) for row in rows])
    if "number" in rows[0]:
        batch["number"] = torch.tensor([row["number"] for row in rows])
    if "corrupted_images" in rows[0]:
        batch["corrupted"] = collate([_corrupted_row(row) for row in rows], pad_token_id)
    for name in ("reference_chosen", "reference_rejected"):
        if all(name in row for row in rows):  # one value for all epochs, because text has no noise
            batch[name] = torch.stack([torch.as_tensor(row[name]).float().flatten()[0] for row in rows])
    return batch


def _corrupted_row(row: dict[str, Any]) -> dict[str, Any]:
    """Row with the corrupted images. Its rejected side is one token, because its log-prob is not used."""
    replaced = ("corrupted_images", "features", "reference_chosen", "reference_rejected")
    unchanged = {name: value for name, value in row.items() if name not in replaced}
    shortened: dict[str, Any] = {name: row[name][:1] for name in ("rejected_ids", "rejected_edited") if name in row}
    return {**unchanged, **shortened, "images": row["corrupted_images"]}


def pad_rows(rows: Sequence[Tensor], width: int, *, left: bool, value: int = 0) -> Tensor:
    """Pad rows of (tokens,) to (rows, width) on the left or the right."""
    output = torch.full((len(rows), width), value, dtype=torch.long)
    for output_row, row in zip(output, rows, strict=True):
        output_row[slice(width - len(row), width) if left else slice(len(row))] = row
    return output


def join_images(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the image tensors of rows, padded with zeros if they differ in a later dimension."""
    joined = {}
    for name in sorted({name for row in rows for name in row}):
        parts = [row[name] for row in rows if name in row]
        shape = [max(part.shape[d] for part in parts) for d in range(1, parts[0].ndim)]
        joined[name] = torch.cat([_pad_to(part, shape) for part in parts])
    return joined


def _pad_to(part: Tensor, shape: list[int]) -> Tensor:
    if list(part.shape[1:]) == shape:
        return part
    output = part.new_zeros((part.shape[0], *shape))
    output[tuple(slice(size) for size in part.shape)] = part
    return output


def response_from_tokens(tokens: list[int], tokenizer: Any, end_ids: int | list[int] | None) -> Response:
    """Decode a generated response up to the first token that ends a turn.

    Args:
        tokens: generated token ids, possibly padded at the end.
        tokenizer: the model's tokenizer.
        end_ids: ids that end a turn. None is the tokenizer's own end of sequence.
    """
    end_ids = [tokenizer.eos_token_id] if end_ids is None else end_ids
    stop_ids = {end_ids} if isinstance(end_ids, int) else set(end_ids)
    end = next((n + 1 for n, token in enumerate(tokens) if token in stop_ids), None)
    completion = tokens[:end]
    return Response(tokenizer.decode(completion, skip_special_tokens=True), len(completion), hit_limit=end is None)

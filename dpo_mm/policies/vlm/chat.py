"""Preference rows of text and images as token ids and image tensors, made once and read at every visit.

The prompt goes through the model's own chat template and processor; completions are tokenised as what the template puts
after the prompt, with the end of the turn. A model without a chat template is given the images, then the text.
Image tokens are never cut: a row that is too long is refused, or dropped by name.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import logging
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_mm.data.schema import Response
from dpo_mm.objectives import DATASET_INPUTS
from dpo_mm.policies.vlm.shared_prefix import Layout

logger = logging.getLogger(__name__)

NO_IMAGES = ("input_ids", "attention_mask", "labels")
TOKEN_TYPE_INPUTS = ("token_type_ids", "mm_token_type_ids")
"""What processors say of each token, beside its id."""


class ConversationEncoder:
    """Rows and conversations as one model takes them.

    processor: an AutoProcessor, or an AutoTokenizer for a model without images. max_length: tokens of image, prompt and
    the longer completion, at most. overlong_rows: raise | drop. corrupt: also encode what is left of each image, see
    `corrupted`. mark_edits: also mark the tokens in which the answers differ. Raises ValueError for another overlong_rows.
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
            raise ValueError(f"overlong_rows {overlong_rows!r} is unknown; expected raise or drop")
        self.processor, self.tokenizer = processor, getattr(processor, "tokenizer", processor)
        self.takes_images = self.tokenizer is not processor
        self.templated = bool(getattr(processor, "chat_template", None) or self.tokenizer.chat_template)
        self.accepted = set(inspect.signature(model.forward).parameters)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length, self.overlong_rows = max_length or limit, overlong_rows
        self.corrupt, self.mark_edits = corrupt, mark_edits
        self.dropped: list[str] = []
        """Names of the rows that were too long."""

    def encode(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of `response_preference` as ids and tensors; see `encode_row`."""
        found = (self.encode_row(row) for row in rows)
        return [row for row in found if row is not None]

    def encode_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """One row: id, prompt_ids, chosen_ids, rejected_ids (tokens,), types and images by name; None where dropped.

        Raises ValueError that names the row where it is too long, or its images, prompt or answers don't fit.
        """
        name, images = str(row["id"]), list(row.get("images") or [])
        messages = as_messages(row["prompt"], "user")
        prompt = self.prompt(images, messages, where=f"row {name}")
        answers = {
            side: self._completion(
                messages, images, row[side], f"row {name}: {side}", ends=not row.get(f"{side}_truncated")
            )
            for side in ("chosen", "rejected")
        }
        length = len(prompt["ids"]) + max(len(ids) for ids in answers.values())
        if self.max_length and length > self.max_length:
            self._too_long(name, f"{length} tokens, {len(prompt['ids'])} of them its prompt with {len(images)} images")
            return None
        kept: dict[str, Any] = {column: float(row[column]) for column in DATASET_INPUTS if row.get(column) is not None}
        if row.get("score_gap") is not None:
            kept["score_margin"] = float(row["score_gap"])
        ids = {f"{side}_ids": torch.tensor(tokens) for side, tokens in answers.items()}
        if self.mark_edits:
            ids |= edits(answers["chosen"], answers["rejected"])
        if self.corrupt:
            if not images:
                raise ValueError(f"row {name} has no image to corrupt; image_conditional is for rows with images")
            left = [corrupted(image, seed=f"{name} {n}") for n, image in enumerate(images)]
            kept["corrupted_images"] = self.prompt(left, messages, where=f"row {name}")["images"]
        return {
            "id": name,
            "prompt_ids": prompt["ids"],
            **ids,
            "types": prompt["types"],
            "images": prompt["images"],
            **kept,
        }

    def _too_long(self, name: str, size: str) -> None:
        reason = f"row {name}: {size}; at most {self.max_length} fit, and image tokens are never cut"
        if self.overlong_rows == "raise":
            raise ValueError(
                f"{reason}; shrink its images, raise max_length, or leave such rows out with overlong_rows 'drop'"
            )
        logger.warning("%s; it is left out", reason)
        self.dropped.append(name)

    def prompt(self, images: Sequence[Any], messages: Sequence[dict[str, Any]], *, where: str) -> dict[str, Any]:
        """Ids (tokens,), types and image tensors of a conversation that the model is to go on with.

        Raises ValueError that starts with `where` where images are given that have no place, or the other way round, or
        the processor takes no such row.
        """
        if images and not self.takes_images:
            raise ValueError(f"{where}: {len(images)} images for a model that reads text alone")
        text = self._template(_placed(messages, len(images), where), answered=False)
        try:
            found = self._processed(text, images)
        except ValueError as error:
            raise ValueError(f"{where}: its processor says: {' '.join(str(error).split())}") from error
        ids = found["input_ids"][0]
        if len(ids) == 0:
            raise ValueError(f"{where}: its prompt is empty; expected at least one token")
        types = {key: found[key][0] for key in TOKEN_TYPE_INPUTS if key in found and key in self.accepted}
        tensors = {
            k: v
            for k, v in found.items()
            if isinstance(v, Tensor) and k in self.accepted and k not in TOKEN_TYPE_INPUTS
        }
        return {
            "ids": ids,
            "types": types,
            "images": {k: v for k, v in tensors.items() if k not in NO_IMAGES},
        }

    def _processed(self, text: str, images: Sequence[Any]) -> Any:
        if not self.takes_images:
            return self.tokenizer([text], return_tensors="pt", **self._special(text))
        pictures = [[image.convert("RGB") for image in images]] if images else None
        return self.processor(text=[text], images=pictures, return_tensors="pt", **self._special(text))

    def _special(self, text: str) -> dict[str, bool]:
        """Nothing is added to what a tokenizer's template wrote, nor to a processor's that wrote the first token."""
        first = self.tokenizer.bos_token
        whole = self.templated and (not self.takes_images or (bool(first) and text.startswith(first)))
        return {"add_special_tokens": False} if whole else {}

    def _template(self, messages: Sequence[dict[str, Any]], *, answered: bool) -> str:
        """The conversation as the model's template writes it; up to where the answer starts unless it is answered."""
        if not self.templated:
            return _untemplated(messages, getattr(self.processor, "image_token", None))
        if not self.takes_images:
            messages = [
                {"role": m["role"], "content": "".join(part["text"] or "" for part in m["content"])} for m in messages
            ]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)

    def _completion(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Any], answer: Any, where: str, *, ends: bool
    ) -> list[int]:
        """Ids of what follows the prompt, (tokens,), up to the end of the turn, or without it where the answer was cut."""
        answers = as_messages(answer, "assistant")
        placed = _placed(messages, len(images), where)
        before, whole = self._template(placed, answered=False), self._template([*placed, *answers], answered=True)
        if not self.templated or not whole.startswith(before):
            whole = before + "".join(part["text"] or "" for message in answers for part in message["content"])
        ids = self._after(before, whole)
        last = self._end_of_turn(ids)
        if ends and last is None and self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        ids = ids if last is None else ids[: last + 1]
        if not ends and last is not None:
            ids = ids[:last]
        if not ids:
            raise ValueError(f"{where} is empty; expected at least one token")
        return ids

    def _after(self, before: str, whole: str) -> list[int]:
        """Ids of `whole` after those of `predicting_columns`; of the rest alone where tokens cross the seam."""
        start, ids = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, whole))
        if ids[: len(start)] == start:
            return list(ids[len(start) :])
        return list(self.tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"])

    def _end_of_turn(self, ids: Sequence[int]) -> int | None:
        """Where the answer's last end-of-sequence token stands, if nothing but white space follows it."""
        places = [n for n, token in enumerate(ids) if token == self.tokenizer.eos_token_id]
        if not places or self.tokenizer.decode(ids[places[-1] + 1 :]).strip():
            return None
        return places[-1]


def corrupted(image: Any, *, seed: str) -> Any:
    """What is left of an image that is to be ignored: a random crop of 1 to 20 % of it, at its own size again.

    seed: of the crop. Source: mDPO, Wang et al. 2024 (2406.11839).
    """
    digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
    rng = random.Random(int.from_bytes(digest, "little"))
    side = rng.uniform(0.01, 0.2) ** 0.5
    width, height = max(1, round(image.width * side)), max(1, round(image.height * side))
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.convert("RGB").crop((left, top, left + width, top + height)).resize(image.size)


def edits(chosen: Sequence[int], rejected: Sequence[int]) -> dict[str, Tensor]:
    """Which tokens of each answer the other one doesn't share, by their longest matching blocks, (tokens,) each, 0 or 1."""
    marks = {"chosen_edited": torch.ones(len(chosen)), "rejected_edited": torch.ones(len(rejected))}
    for block in difflib.SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        marks["chosen_edited"][block.a : block.a + block.size] = 0
        marks["rejected_edited"][block.b : block.b + block.size] = 0
    return marks


def as_messages(content: Any, role: str) -> list[dict[str, Any]]:
    """Messages with their content as parts, from a text, a message or messages."""
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


def _placed(messages: Sequence[dict[str, Any]], images: int, where: str) -> list[dict[str, Any]]:
    """Messages with a part for every image; those of images that have none come first in the first user message."""
    messages = as_messages(messages, "user")
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places not in (0, images):
        raise ValueError(f"{where}: {images} images for {places} places in its prompt; expected as many, or no places")
    first = next((message for message in messages if message["role"] == "user"), None)
    if places == 0 and images and first is None:
        raise ValueError(f"{where}: {images} images and no user message to put them in")
    if places == 0 and first is not None:
        first["content"] = [{"type": "image"}] * images + first["content"]
    return messages


def _untemplated(messages: Sequence[dict[str, Any]], image_token: str | None) -> str:
    parts = [part for message in messages for part in message["content"]]
    return "".join((image_token or "") if part["type"] == "image" else part["text"] or "" for part in parts)


# Batches


def collate(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Encoded rows as one batch: ids and mask (pairs, prompt + chosen + rejected columns), types, images, terms."""
    sides = [[row[f"{part}_ids"] for row in rows] for part in ("prompt", "chosen", "rejected")]
    widths = [max(len(ids) for ids in side) for side in sides]
    ids = [
        padded(side, width, left=n == 0, value=pad) for n, (side, width) in enumerate(zip(sides, widths, strict=True))
    ]
    ones = [[torch.ones_like(ids) for ids in side] for side in sides]
    mask = torch.cat(
        [padded(one, width, left=n == 0) for n, (one, width) in enumerate(zip(ones, widths, strict=True))], 1
    )
    batch: dict[str, Any] = {
        "id": [row["id"] for row in rows],
        "ids": torch.cat(ids, 1),
        "mask": mask,
        "layout": Layout(widths[0], widths[1], widths[2], padded=not bool(mask.all())),
        "types": {k: padded([row["types"][k] for row in rows], widths[0], left=True) for k in rows[0]["types"]},
        "images": join_images([row["images"] for row in rows]),
    }
    for place, side in enumerate(("chosen", "rejected"), start=1):
        batch[f"num_tokens_{side}"] = torch.tensor([float(len(ids)) for ids in sides[place]])
        if f"{side}_edited" in rows[0]:
            marks = [row[f"{side}_edited"] for row in rows]
            batch[f"{side}_edited"] = padded(marks, widths[place], left=False).float()
    for name in DATASET_INPUTS:
        if all(name in row for row in rows):
            batch[name] = torch.tensor([float(row[name]) for row in rows])
    if "number" in rows[0]:
        batch["number"] = torch.tensor([row["number"] for row in rows])
    if "corrupted_images" in rows[0]:
        batch["corrupted"] = collate([_corrupted_row(row) for row in rows], pad)
    for name in ("reference_chosen", "reference_rejected"):
        if all(name in row for row in rows):  # the same at every visit: a text has no draw
            batch[name] = torch.stack([torch.as_tensor(row[name]).float().flatten()[0] for row in rows])
    return batch


def _corrupted_row(row: dict[str, Any]) -> dict[str, Any]:
    """The chosen answer behind the corrupted images; of the rejected one, which isn't asked, a token."""
    dropped = ("corrupted_images", "features", "reference_chosen", "reference_rejected")
    kept = {name: value for name, value in row.items() if name not in dropped}
    short: dict[str, Any] = {name: row[name][:1] for name in ("rejected_ids", "rejected_edited") if name in row}
    return {**kept, **short, "images": row["corrupted_images"]}


def padded(rows: Sequence[Tensor], width: int, *, left: bool, value: int = 0) -> Tensor:
    """Rows of (tokens,) as (rows, width), padded on one side."""
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for place, row in zip(out, rows, strict=True):
        place[slice(width - len(row), width) if left else slice(len(row))] = row
    return out


def join_images(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Image tensors of rows, one after the other; where rows differ in a later dimension, padded with zeros."""
    joined = {}
    for name in sorted({name for row in rows for name in row}):
        parts = [row[name] for row in rows if name in row]
        shape = [max(part.shape[d] for part in parts) for d in range(1, parts[0].ndim)]
        joined[name] = torch.cat([_grown(part, shape) for part in parts])
    return joined


def _grown(part: Tensor, shape: list[int]) -> Tensor:
    if list(part.shape[1:]) == shape:
        return part
    out = part.new_zeros((part.shape[0], *shape))
    out[tuple(slice(size) for size in part.shape)] = part
    return out


def response_from_tokens(tokens: list[int], tokenizer: Any, ends: int | list[int] | None) -> Response:
    """What was generated, up to the first token that ends a turn. ends: those; None: the tokenizer's own."""
    stops = {tokenizer.eos_token_id} if ends is None else {ends} if isinstance(ends, int) else set(ends)
    end = next((n + 1 for n, token in enumerate(tokens) if token in stops), None)
    kept = tokens[:end]
    return Response(tokenizer.decode(kept, skip_special_tokens=True), len(kept), hit_limit=end is None)

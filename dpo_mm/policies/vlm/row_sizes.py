"""Number of tokens of rows, from their texts and the sizes of their images. No pixel is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from dpo_mm.data.conversation import as_messages
from dpo_mm.data.image_files import image_bytes, image_size
from dpo_mm.data.load_pairs import UndecodableImageError, with_file
from dpo_mm.data.schema import prompt_images
from dpo_mm.files.content_key import content_hash
from dpo_mm.policies.vlm.chat import ConversationEncoder

MARGIN = 16
"""Tokens around `max_length` within which a row is encoded to count exactly: texts merge differently next to an image."""


class RowSize(NamedTuple):
    """Size of one row.

    Args:
        tokens: of prompt, images and the longer completion.
        text_digest: hash of the token ids of its texts.
    """

    tokens: int
    text_digest: str


class RowMeasure:
    """Function that measures rows for one encoder. It stores the number of tokens of each image size.

    Args:
        encoder: of the model whose tokens count.
    """

    def __init__(self, encoder: ConversationEncoder) -> None:
        self.encoder = encoder
        self.image_tokens: dict[tuple[tuple[int, int], int], int] = {}

    def __call__(self, row: Mapping[str, Any]) -> RowSize | None:
        """Measure a row, or return None if it is longer than `max_length` and such rows are dropped.

        Raises:
            ValueError: as `ConversationEncoder.encode_row`, and if an image has no readable header.
        """
        encoder, sizes = self.encoder, _image_sizes(row)
        messages, tools = encoder.read_prompt(row)
        text = encoder.prompt_text(len(sizes), messages, label=f"row {row['id']}", tools=tools)
        ids = encoder.prompt_text_ids(text)
        completions = encoder.completions(row, messages, len(sizes), tools=tools)
        tokens = len(ids) + max(len(side) for side in completions.values())
        tokens += sum(self._tokens_of_image(size, len(sizes)) for size in sizes)
        if encoder.max_length and tokens > encoder.max_length - MARGIN and encoder.encode_row(row) is None:
            return None
        return RowSize(tokens, content_hash([ids, *completions.values()]))

    def _tokens_of_image(self, size: tuple[int, int], count: int) -> int:
        """Tokens that an image adds to its placeholder in a prompt with so many images. Contents do not count."""
        if (size, count) not in self.image_tokens:
            blank = [Image.new("RGB", size)] * count
            messages = as_messages("a", "user")
            prompt = self.encoder.prompt(blank, messages, label=f"an image of {size[0]}x{size[1]} pixels")
            text = self.encoder.prompt_text(count, messages, label="")
            self.image_tokens[size, count] = (len(prompt["ids"]) - len(self.encoder.prompt_text_ids(text))) // count
        return self.image_tokens[size, count]


def _image_sizes(row: Mapping[str, Any]) -> list[tuple[int, int]]:
    sizes = []
    for number, cell in enumerate(prompt_images(row)):
        try:
            sizes.append(cell.size if isinstance(cell, Image.Image) else image_size(image_bytes(cell)))
        except (ValueError, OSError) as reason:
            error = UndecodableImageError("the pairs", str(row["id"]), f"image {number}", with_file(reason, cell))
            raise error from None
    return sizes

"""Encoded rows of a dataset, read from the cache that `encoding` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpo_mm.files.checksums import COMPLETE, without_checksum
from dpo_mm.policies.diffusion.row_variants import ALL_CAPTIONS, EMPTY_PROMPT
from dpo_mm.training.arrow_shards import Part, Shards


class EncodedPairs:
    """Encoded rows: id, mean and std of the chosen and rejected latents, prompt embeddings, columns of DATASET_INPUTS.

    Rows may also have variants for training: the encoded empty prompt, all captions, the mirrored images. See `row_variants`.

    One-sided rows have the latents of their only image under the names of the chosen side.

    `buckets` has the row numbers of each size (width x height) that images were fitted to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        complete = read_complete(folder)
        if complete is None:
            raise ValueError(f"{folder / COMPLETE} is missing or has changed. Run the same command again")
        self.truncated_prompts = str(complete.get("truncated_prompts", ""))
        pairs = sorted((Part(*part) for part in complete["pairs"]), key=lambda part: part.size)
        self.pairs, self.prompts = Shards(folder, pairs), Shards(folder, [Part(*part) for part in complete["prompts"]])
        self.sizes = list(dict.fromkeys(part.size for part in pairs))
        self.empty_prompt = self.prompts[0] if complete.get("empty_prompt") else None
        ends = np.cumsum([0, *(sum(part.rows for part in pairs if part.size == size) for size in self.sizes)])
        self.buckets = [range(int(start), int(end)) for start, end in pairwise(ends)]

    def ids(self) -> list[str]:
        """Ids of the rows, in order."""
        return [self.pairs[number]["id"] for number in range(len(self))]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.pairs[number]
        row["prompt"] = self.prompts[int(row.pop("prompt_row"))]
        if "caption_rows" in row:
            row[ALL_CAPTIONS] = StoredPrompts(self.prompts, json.loads(row.pop("caption_rows")))
        return row if self.empty_prompt is None else {**row, EMPTY_PROMPT: self.empty_prompt}


class StoredPrompts:
    """Some of the encoded prompts, each read when it is needed."""

    def __init__(self, prompts: Shards, numbers: Sequence[int]) -> None:
        self.prompts, self.numbers = prompts, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.prompts[self.numbers[number]]


def read_complete(folder: Path) -> dict[str, Any] | None:
    """Return the list of the parts of an encoded dataset, None if there is none or it has changed."""
    try:
        return without_checksum(json.loads((folder / COMPLETE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None

"""Fresh pairs of responses to label: base and tuned model respond to the same prompts, sampled from the same seed.

A pair is not written if both responses are the same text.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.data.conversation import as_messages
from dpo_mm.data.image_files import image_bytes
from dpo_mm.data.load_pairs import decode_prompt_images
from dpo_mm.data.parquet import write_rows
from dpo_mm.data.schema import Response, make_response_rows, prompt_images, response_preference
from dpo_mm.policies.families import load_text_policy
from dpo_mm.printing.progress import progress_bar
from dpo_mm.process.interruption import stop_on_signal

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 8


def generate_response_pairs(
    rows: Dataset, models: Sequence[tuple[str, str | None]], file: Path, *, max_pairs: int, max_new_tokens: int, seed: int,
    precision: str,
) -> Path:  # fmt: skip
    """Respond to the prompts of labelled rows with two models, and write the pairs as `ResponsePreference` rows.

    Args:
        rows: rows of `open_pairs`. Each prompt with its images is used once.
        models: model and adapter of base and tuned.
        file: Parquet file to write.
        max_pairs: largest number of pairs.
        max_new_tokens: largest number of tokens per response.
        seed: seed of the sampling.

    Raises:
        ValueError: if both models give the same response to each prompt, or an image does not decode.
    """
    chosen = _first_of_each_prompt(rows, max_pairs)
    with stop_on_signal(), progress_bar("generating responses", 2 * len(chosen)) as advance:
        sides = []
        for model, adapter in models:
            policy = load_text_policy(model, adapter=adapter, precision=precision)
            responses: list[Response] = []
            for start in range(0, len(chosen), BATCH):
                batch = chosen[start : start + BATCH]
                images = [decode_prompt_images(row, str(file)) for row in batch]
                prompts = [row["prompt"] for row in batch]
                responses += policy.generate(
                    images, prompts, max_new_tokens=max_new_tokens, do_sample=True, seed=seed + start, batch_size=BATCH
                )
                advance(len(batch))
            sides.append(responses)
            del policy
            gc.collect()
    pairs = [_pair(row, *both) for row, *both in zip(chosen, *sides, strict=True) if both[0].text != both[1].text]
    if not pairs:
        raise ValueError(
            f"base and tuned give the same response to all of {len(chosen)} prompts, so there is no pair to label"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_rows(pairs, file, make=make_response_rows, features=response_preference())
    return file


def _first_of_each_prompt(rows: Dataset, limit: int) -> list[dict[str, Any]]:
    """Return the first row of each prompt and its first image, at most `limit`."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if len(first) >= limit:
            break
        cells = prompt_images(row)
        first.setdefault(repr((row["prompt"], cells[:1])), row)
    return list(first.values())


def _pair(row: Mapping[str, Any], base: Response, tuned: Response) -> dict[str, Any]:
    return {
        "id": str(row["id"]),
        "images": [{"bytes": image_bytes(cell), "path": None} for cell in prompt_images(row)],
        "prompt": as_messages(row["prompt"], "user"),
        "chosen": base.text,
        "rejected": tuned.text,
        "chosen_truncated": base.hit_limit,
        "rejected_truncated": tuned.hit_limit,
        "chosen_model": "base",
        "rejected_model": "tuned",
        "group_id": row.get("group_id"),
        "license": row.get("license"),
    }

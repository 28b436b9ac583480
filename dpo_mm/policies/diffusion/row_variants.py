"""Variants of encoded rows for training: another caption, the empty prompt, the mirrored images.

Which variant a row has is a pure function of (seed, id, epoch), so that it is the same for policy and reference, chosen and
rejected, and in a resumed run. Evaluation rows have no variants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion import random_draws

Row = dict[str, Any]
FLIPPED = "_flipped"
"""End of the names of columns of the mirrored images, such as chosen_mean_flipped."""
ALL_CAPTIONS, EMPTY_PROMPT = "all_captions", "empty_prompt"
"""Columns with the encoded captions of a row, and with the encoded empty prompt."""
PROMPTS = {"prompt": ALL_CAPTIONS, "rejected_prompt": f"rejected_{ALL_CAPTIONS}"}
"""Columns with a prompt, and those with the captions to draw it from."""


def draw_variants(config: TrainConfig, rows: Sequence[Row], keys: Sequence[tuple[int, str, int]]) -> list[Row]:
    """Return rows with their drawn caption, or the empty prompt, and mirrored images if that is drawn.

    Args:
        config: settings of the run.
        rows: encoded rows.
        keys: seed, id and epoch of each row.
    """
    return [_flip(config, _caption(config, row, key), key) for row, key in zip(rows, keys, strict=True)]


def without_variants(row: Row) -> Row:
    """Return a row with its first caption and its images unchanged only, for evaluation."""
    unused = (EMPTY_PROMPT, *PROMPTS.values())
    return {name: value for name, value in row.items() if name not in unused and not name.endswith(FLIPPED)}


def _caption(config: TrainConfig, row: Row, key: tuple[int, str, int]) -> Row:
    prompts = {}
    for name, captions in PROMPTS.items():
        if captions in row:
            number = random_draws.row_generator(*key, "caption").integers(len(row[captions]))
            prompts[name] = row[captions][int(number)]
    share = config.proportion_empty_prompts
    if share and EMPTY_PROMPT in row and random_draws.row_generator(*key, "prompt").uniform() < share:
        prompts = {name: row[EMPTY_PROMPT] for name in PROMPTS if name in row}
    return {**row, **prompts} if prompts else row


def _flip(config: TrainConfig, row: Row, key: tuple[int, str, int]) -> Row:
    """Mirror all images of a row, in half of its epochs."""
    if not config.random_flip or random_draws.row_generator(*key, "flip").uniform() < 0.5:
        return row
    return row | {name.removesuffix(FLIPPED): value for name, value in row.items() if name.endswith(FLIPPED)}

"""Several captions per row: a prompt that is a list of texts.

The first caption is the row's prompt, for evaluation and everything outside of training. Training draws one of all captions per
epoch, as the code of Diffusion-DPO does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpo_mm.errors import name_row

if TYPE_CHECKING:
    from datasets import Dataset

CAPTIONS = "captions"
"""Column with all captions of a row, if a row has several."""


def split_captions(prompt: list[Any]) -> dict[str, Any]:
    """Return the columns `prompt` and `captions` of a row whose prompt is a list.

    Raises:
        ValueError: if it is empty or has something else than texts.
    """
    if not prompt or not all(isinstance(text, str) for text in prompt):
        raise ValueError(f"prompt is {prompt!r:.80}. Expected a text, or a list of at least one text")
    return {"prompt": prompt[0], CAPTIONS: list(prompt)}


def first_captions(rows: Dataset, dataset_name: str) -> Dataset:
    """Return rows with one prompt each, and with the column `captions` if their prompts are lists.

    Raises:
        ValueError: if a list is empty or has something else than texts. It names the row.
    """
    if "prompt" not in rows.column_names or not _is_list(rows, "prompt"):
        return rows
    cells = [value if isinstance(value, list) else [value] for value in rows["prompt"][:]]
    split = []
    for number, cell in enumerate(cells):
        with name_row(f"{dataset_name}, row {number}", "Fix the row, or remove it"):
            split.append(split_captions(cell))
    rest = rows.remove_columns([name for name in ("prompt", CAPTIONS) if name in rows.column_names])
    for name in ("prompt", CAPTIONS):
        rest = rest.add_column(name, [each[name] for each in split])  # type: ignore[arg-type]
    return rest


def has_captions(rows: Dataset) -> bool:
    """Return True if rows have a column with lists of captions."""
    return CAPTIONS in rows.column_names and _is_list(rows, CAPTIONS)


def texts_of(rows: Dataset) -> list[str]:
    """Return the prompts of rows, and all their captions if they have several."""
    prompts = list(rows["prompt"])
    if has_captions(rows):
        prompts += [text for cell in rows[CAPTIONS] for text in cell or ()]
    return prompts


def describe_captions(rows: Dataset) -> dict[str, str]:
    """Return the line of a run's plan on captions, empty if its rows have one prompt each."""
    if not has_captions(rows):
        return {}
    counts = [len(cell or [""]) for cell in rows[CAPTIONS]]
    return {CAPTIONS: f"{min(counts)} to {max(counts)} per row, one drawn per epoch"}


def _is_list(rows: Dataset, name: str) -> bool:
    import pyarrow as pa

    kind = rows.data.schema.field(name).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and (pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type))

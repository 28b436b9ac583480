"""Make a batch of encoded pairs: columns of prompt, chosen and rejected, and the tensors of all images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_mm.objectives import DATASET_INPUTS, LogProbs, segment_mean, shared_length
from dpo_mm.policies.vlm.prefix_layout import Layout, packed_tokens, token_places

NO_TOKENS = torch.zeros(0, dtype=torch.long)
"""Token ids of a side that the rows do not have."""
PACKED = "target_sizes"
"""Name of the grids of images whose patches are all in one row, along the last dimension (MiniCPM-V 4.6)."""


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Make a batch from encoded rows.

    Args:
        rows: rows from `ConversationEncoder.encode`. One-sided rows have no `rejected_ids`. Rows of `CoupledRows` have an
            encoded disliked row under `disliked`.
        pad_token_id: id of padding.

    Returns:
        A dict with `id`, `ids` and `mask` (pairs, columns of prompt, chosen and rejected), `layout`, `places`, `types`,
        `images`, `num_tokens_chosen` and `num_tokens_rejected` (pairs,), and `packing` if pairs differ in length. Optional columns
        of the rows are added under their names. A batch of one-sided rows has no column of rejected. A batch of couples has the
        liked rows, then the disliked ones.
    """
    if "disliked" in rows[0]:
        return _collate_couples(rows, pad_token_id)
    parts = [[row.get(f"{part}_ids", NO_TOKENS) for row in rows] for part in ("prompt", "chosen", "rejected")]
    widths = [max(len(ids) for ids in part) for part in parts]
    ids = [
        pad_rows(part, width, left=n == 0, value=pad_token_id)
        for n, (part, width) in enumerate(zip(parts, widths, strict=True))
    ]
    ones = [[torch.ones_like(ids) for ids in part] for part in parts]
    masks = [pad_rows(part, width, left=n == 0) for n, (part, width) in enumerate(zip(ones, widths, strict=True))]
    mask, lengths = torch.cat(masks, 1), [[len(ids) for ids in part] for part in parts]
    layout = Layout(widths[0], widths[1], widths[2], has_padding=not bool(mask.all()))
    batch: dict[str, Any] = {
        "id": [row["id"] for row in rows],
        "ids": torch.cat(ids, 1),
        "mask": mask,
        "layout": layout,
        "places": token_places(layout, lengths),
        "types": {k: pad_rows([row["types"][k] for row in rows], widths[0], left=True) for k in rows[0]["types"]},
        "images": join_images([row["images"] for row in rows]),
    }
    if layout.has_padding and layout.rejected:
        batch["packing"] = packed_tokens(layout, lengths)
    for part, side in enumerate(("chosen", "rejected"), start=1):
        counts = (row.get(f"num_tokens_{side}", length) for row, length in zip(rows, lengths[part], strict=True))
        batch[f"num_tokens_{side}"] = torch.tensor([float(count) for count in counts])
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


def sequences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a batch in the order of its images: of couples, the liked rows and then the disliked ones."""
    return [*rows, *(row["disliked"] for row in rows if "disliked" in row)]


def _collate_couples(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Batch of one-sided sequences: those of the liked rows, then those of the disliked ones."""
    own = ("disliked", "number", "reference_chosen", "reference_rejected", *DATASET_INPUTS)
    liked = [{name: value for name, value in row.items() if name not in own} for row in rows]
    batch = collate([*liked, *(row["disliked"] for row in rows)], pad_token_id)
    num_tokens = batch["num_tokens_chosen"].chunk(2)
    batch |= {"id": [row["id"] for row in rows], "couples": torch.ones(len(rows))}
    batch |= {"num_tokens_chosen": num_tokens[0], "num_tokens_rejected": num_tokens[1]}
    if "number" in rows[0]:
        batch["number"] = torch.tensor([row["number"] for row in rows])
    return batch


def response_log_probs(token_log_probs: Tensor, batch: dict[str, Any]) -> LogProbs:
    """Sum the token log-probs of one-sided sequences per response.

    Args:
        token_log_probs: nats, 0 at padding, (sequences, tokens).
        batch: from `collate`, of one-sided rows or of couples.

    Returns:
        Log-probs of the liked and of the disliked responses, (couples,) each, or of the chosen responses and of none.
    """
    sums = token_log_probs.sum(1)
    chosen, rejected = sums.chunk(2) if "couples" in batch else (sums, sums[:0])
    tokens = [batch[f"num_tokens_{side}"].to(sums.device) for side in ("chosen", "rejected")]
    return LogProbs(chosen, rejected, tokens[0], tokens[1][: len(rejected)], is_likelihood=True)


def pair_log_probs(
    token_log_probs: Tensor, batch: dict[str, Any], *, ld_alpha: float, edited_token_weight: float
) -> LogProbs:
    """Sum or average the token log-probs of each response in a batch of pairs.

    Args:
        token_log_probs: nats, 0 at padding, (pairs, columns of chosen and rejected).
        batch: from `collate`, of pairs.
        ld_alpha: weight of tokens past the shorter response's length, see `shared_length`.
        edited_token_weight: weight of edited tokens, see `segment_mean`. 1: a sum, with `ld_alpha`.

    Returns:
        Log-probs of both sides, (pairs,) each. The number of tokens has the weights of the log-prob.
    """
    layout, device, sides = batch["layout"], token_log_probs.device, ("chosen", "rejected")
    widths = [layout.chosen, layout.rejected]
    masks, parts = batch["mask"][:, layout.prompt :].to(device).split(widths, 1), token_log_probs.split(widths, 1)
    counts = [batch[f"num_tokens_{side}"].to(device) for side in sides]
    if edited_token_weight != 1:
        edited = [batch[f"{side}_edited"].to(device) for side in sides]
        chosen, rejected = (
            segment_mean(*each, edited_token_weight=edited_token_weight)
            for each in zip(parts, masks, edited, strict=True)
        )
        counts = [torch.ones_like(chosen), torch.ones_like(rejected)]
    elif ld_alpha != 1:
        shared = torch.minimum(*counts)
        chosen, rejected = shared_length(*parts, *masks, ld_alpha=ld_alpha, shared=shared)
        counts = [shared + ld_alpha * (count - shared) for count in counts]
    else:
        chosen, rejected = (part.sum(1) for part in parts)
    return LogProbs(chosen, rejected, counts[0], counts[1], is_likelihood=True)


def _corrupted_row(row: dict[str, Any]) -> dict[str, Any]:
    """Row with the corrupted images. Its rejected side is one token, because only the number of its tokens is used."""
    replaced = ("corrupted_images", "features", "reference_chosen", "reference_rejected")
    unchanged = {name: value for name, value in row.items() if name not in replaced}
    shortened: dict[str, Any] = {name: row[name][:1] for name in ("rejected_ids", "rejected_edited") if name in row}
    tokens = {"num_tokens_rejected": len(row["rejected_ids"])} if shortened else {}
    return {**unchanged, **shortened, **tokens, "images": row["corrupted_images"]}


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
        if name == "pixel_values" and any(PACKED in row for row in rows):
            joined[name] = torch.cat(parts, dim=-1)
            continue
        shape = [max(part.shape[d] for part in parts) for d in range(1, parts[0].ndim)]
        joined[name] = torch.cat([_pad_to(part, shape) for part in parts])
    return joined


def _pad_to(part: Tensor, shape: list[int]) -> Tensor:
    if list(part.shape[1:]) == shape:
        return part
    output = part.new_zeros((part.shape[0], *shape))
    output[tuple(slice(size) for size in part.shape)] = part
    return output

"""Converter for the preference rows of ms-swift."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dpo_mm.sources.fine_tuning_sets import last_response
from dpo_mm.sources.parquet_writer import Item, LeftOut, Row
from dpo_mm.sources.row_formats import conversation_pair


def ms_swift(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert `messages`, `rejected_response` (a text) or `rejected_messages` (a conversation), `images`, `tools`, `system`.

    The last turn of the assistant in `messages` is the chosen response. `rejected_response` replaces it.
    """
    for row in rows:
        split = last_response(row["messages"])
        if split is None:
            yield LeftOut("it has no response of the assistant")
            continue
        prompt, chosen = split
        if row.get("rejected_images") not in (None, [], row.get("images")):
            yield LeftOut("its two responses are about different images")
        elif row.get("rejected_messages"):
            other = last_response(row["rejected_messages"])
            if other is None or other[0] != prompt:
                yield LeftOut("its chosen and rejected conversations do not have the same prompt")
                continue
            yield conversation_pair(row, prompt, chosen, other[1])
        elif row.get("rejected_response"):
            rejected = [{"role": "assistant", "content": row["rejected_response"]}]
            yield conversation_pair(row, prompt, chosen, rejected)
        else:
            yield LeftOut("it has no rejected response")

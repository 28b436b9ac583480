"""Hidden states of texts of unequal length as one tensor with a mask, as ERNIE-Image and Krea 2 have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def pad_states(states: Sequence[Tensor]) -> dict[str, Tensor]:
    """Pad the states of each text, (tokens, ...), to `embeds`, (texts, tokens, ...), and `mask`, 1 for a token, on the CPU."""
    lengths = [torch.ones(len(text), dtype=torch.long) for text in states]
    return {
        "embeds": nn.utils.rnn.pad_sequence(list(states), batch_first=True).cpu(),
        "mask": nn.utils.rnn.pad_sequence(lengths, batch_first=True),
    }

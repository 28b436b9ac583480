"""Synchronisations, launches and attention are counted on a CPU, each with the line that caused it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.operation_counts import OperationCounts

VALUES = torch.arange(6.0).reshape(2, 3)
MASK = VALUES > 2
COUNTS = torch.tensor([1, 2])


def _assign(value: Any) -> None:
    VALUES.clone()[MASK] = value


WAITING: dict[str, Callable[[], object]] = {
    "item": lambda: VALUES[0, 0].item(),
    "bool": lambda: bool(MASK.any()),
    "int": lambda: int(COUNTS[0]),
    "float": lambda: float(VALUES[0, 0]),
    "range": lambda: range(COUNTS[0]),  # type: ignore[call-overload]
    "format": lambda: f"{VALUES[0, 0]:.1f}",
    "tolist": lambda: VALUES.tolist(),
    "cpu": lambda: VALUES.cpu(),
    "to cpu": lambda: VALUES.to("cpu"),
    "numpy": lambda: VALUES.numpy(),
    "nonzero": lambda: MASK.nonzero(),
    "where": lambda: torch.where(MASK),
    "unique": lambda: COUNTS.unique(),
    "unique_consecutive": lambda: COUNTS.unique_consecutive(),
    "masked_select": lambda: VALUES.masked_select(MASK),
    "index with a mask": lambda: VALUES[MASK],
    "assign to a mask": lambda: _assign(VALUES[1].clone()),
    "repeat_interleave": lambda: COUNTS.repeat_interleave(COUNTS),
    "equal": lambda: torch.equal(VALUES, VALUES),
    "allclose": lambda: torch.allclose(VALUES, VALUES),
    "bincount": lambda: COUNTS.bincount(),
    "copy to the device": lambda: torch.tensor([1, 2]).to(VALUES.device),
    "index on the host": lambda: VALUES[torch.tensor([0, 1])],
    "both devices": lambda: torch.arange(2) + COUNTS,
    "index of a host tensor": lambda: torch.arange(3)[COUNTS],
    "copy into the device's": lambda: COUNTS.clone().copy_(torch.arange(2)),
    "tensor on a device": lambda: torch.tensor([1], device=VALUES.device),
}
NOT_WAITING: dict[str, Callable[[], object]] = {
    "masked_fill": lambda: VALUES.masked_fill(MASK, 0.0),
    "masked_scatter": lambda: VALUES.masked_scatter(MASK, VALUES),
    "assign a number to a mask": lambda: _assign(1.0),
    "index": lambda: VALUES[:, COUNTS],
    "repeat_interleave": lambda: COUNTS.repeat_interleave(COUNTS, output_size=3),
    "tensor on the host": lambda: torch.tensor([1, 2]),
    "number on the host": lambda: VALUES * torch.tensor(2.0),
    "values on the host": lambda: (torch.arange(3).reshape(1, 3) + torch.tensor(2)).cumsum(1)[0, 1:].tolist(),
    "copy to the device": lambda: torch.tensor([1, 2]).to(VALUES.device, non_blocking=True),
    "to the device of another": lambda: VALUES.to(MASK.device),
}


@pytest.mark.parametrize("name", WAITING)
def test_call_for_which_the_host_waits_is_counted_once_with_its_line(name: str) -> None:
    with OperationCounts() as counts:
        WAITING[name]()
    assert counts.num_synchronisations == 1, counts.report()
    assert "tests/unit/test_operation_counts.py:" in counts.report()


@pytest.mark.parametrize("name", NOT_WAITING)
def test_call_for_which_the_host_does_not_wait_is_not_counted(name: str) -> None:
    with OperationCounts() as counts:
        NOT_WAITING[name]()
    assert counts.num_synchronisations == 0, counts.report()


def test_launches_of_both_passes_are_counted_without_views_and_the_optimizers_step_count() -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    with OperationCounts() as forward:
        loss = (VALUES.reshape(3, 2).t() @ weight).sum()
    assert forward.operations == {"mm": 1, "sum": 1} and forward.launches == 2
    with OperationCounts() as backward:
        loss.backward()
        optimizer.step()
    assert backward.operations["mm"] == 1 and backward.num_synchronisations == 0, backward.report()


def test_attention_is_counted() -> None:
    heads = torch.ones(1, 1, 2, 4, requires_grad=True)
    with OperationCounts() as counts:
        F.scaled_dot_product_attention(heads, heads, heads).sum().backward()
    assert counts.attention == 1

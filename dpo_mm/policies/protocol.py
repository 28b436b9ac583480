"""What a policy answers: everything else (reference, objectives, metrics, resuming, comparing) is shared.

A new model family is one file that answers these questions and one row in FAMILIES.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from dpo_mm.config import TrainConfig
from dpo_mm.objectives import LogProbs

Batch = dict[str, Any]
"""What a policy's own collator made; opaque to all but the policy, except for `id` and the columns of FROM_DATA."""


class Policy(Protocol):
    """A model that preferences act on."""

    model: nn.Module
    """What trains: with an adapter, or whole."""
    exact: bool
    """Whether its log-probs are likelihoods, or the denoising surrogate."""

    def log_probs(self, model: nn.Module, batch: Batch) -> LogProbs:
        """How likely chosen and rejected are under the weights as they are now; `model` may be wrapped (DDP, FSDP)."""
        ...

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """One batch from encoded rows, each with its `visit`."""
        ...

    def loser_scale(self, *, slack: float) -> Any:
        """What `safe` scales the rejected side's gradient by, of each pair that `log_probs` was asked last, (pairs,)."""
        ...

    def adapter_off(self) -> AbstractContextManager[None]:
        """Within it the model answers as the base. Raises ValueError where it has no adapter."""
        ...

    def frozen_copy(self) -> nn.Module:
        """A copy of the model as it is now that never trains."""
        ...

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write what was trained in the form that the stock library loads.

        weights: the model's state, gathered, where its own is in shards of several processes.
        """
        ...

    def load_weights(self, folder: Path) -> None:
        """Read what `save` wrote into the model as it is set up."""
        ...

    def describe(self, config: TrainConfig) -> dict[str, str]:
        """What the run prints at its start: family, target, reduction, effective beta."""
        ...

"""Cells of a part: each is measured by itself, and an error is one of its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.bench.gpu.figures import free_memory


class Skipped(Exception):
    """A cell that cannot be measured here, with the reason."""


class BrokenDevice(Exception):
    """A cell left the GPU in a state in which no other cell of this process can run."""


class Cells:
    """Results by the names of the cells.

    Args:
        device: cpu or cuda.
        tiny: True for shapes that a CPU runs in a second.
        settings: the part's settings.
        save: receives all results after each cell.
    """

    def __init__(
        self, device: str, tiny: bool, settings: dict[str, Any], save: Callable[[dict[str, Any]], None]
    ) -> None:
        self.device, self.tiny, self.settings, self.save = device, tiny, settings, save
        self.values: dict[str, Any] = {}

    def measure(self, name: str, function: Callable[[], Any]) -> None:
        """Run the function and store what it returns, or its error.

        Raises:
            BrokenDevice: if the GPU does not respond after it.
        """
        try:
            value = function()
        except Skipped as reason:
            value = {"skipped": str(reason)}
        except Exception as error:  # one variant that fails must not hide the others
            value = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        self.values[name] = value
        self.save(self.values)
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise BrokenDevice(
                    f"the GPU does not respond after {name!r}. The cells after it did not run"
                ) from error
        free_memory(self.device)

"""Read a finished training run, and refuse one that cannot be exported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_mm.assets import BUNDLED, resolve_asset
from dpo_mm.files.checksums import COMPLETE, check_trained_files
from dpo_mm.policies.adapter_checks import ADAPTER_FILE
from dpo_mm.policies.adapter_sources import START_FOLDER
from dpo_mm.policies.adapters import LORA_FILE
from dpo_mm.training.checkpoints import CONFIG_FILE


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its folder, its recorded settings by name, and the name by which it was given."""

    folder: Path
    settings: dict[str, Any]
    name: str

    @property
    def model(self) -> str:
        """Folder, hub id or bundled name of the base model."""
        return str(self.settings["model"])

    @property
    def is_stacked(self) -> bool:
        """True if the result needs a second adapter below it."""
        return (self.folder / START_FOLDER).is_dir()

    @property
    def has_lora(self) -> bool:
        """True if the result is an adapter, False if it is a whole model."""
        return (self.folder / LORA_FILE).is_file() or (self.folder / ADAPTER_FILE).is_file()


def read_run(name: str) -> FinishedRun:
    """Read the record of a finished run.

    Args:
        name: output folder of `train` or of a recipe, or the name of a bundled adapter.

    Raises:
        ValueError: if it is no run, is not finished, or a file of it has changed.
    """
    folder = Path(resolve_asset(name))
    if not folder.is_dir():
        raise ValueError(f"run {name!r} is not a folder. Give the output_dir of a training run")
    if not (folder / CONFIG_FILE).is_file() and (folder / "adapter" / CONFIG_FILE).is_file():
        folder = folder / "adapter"  # of a recipe
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        is_run = isinstance(settings["model"], str)
    except (OSError, ValueError, KeyError, TypeError):
        is_run = False
    if not is_run:
        raise ValueError(f"run {name!r} has no readable {CONFIG_FILE}. Give the output_dir of a training run")
    if name not in BUNDLED and not (folder / COMPLETE).is_file():
        raise ValueError(f"run {name!r} is not finished: {COMPLETE} is missing. Run the same train command again")
    check_trained_files(folder)
    return FinishedRun(folder, settings, name)

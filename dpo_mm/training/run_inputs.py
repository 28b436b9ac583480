"""The model and the rows of a run. They are read from files, or given as objects that are loaded already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from dpo_mm.assets import resolve_asset
from dpo_mm.config import TrainConfig
from dpo_mm.files.content_key import library_versions
from dpo_mm.policies.adapter_sources import adapter_content
from dpo_mm.policies.families import model_content, policy_class, resolve_commit
from dpo_mm.policies.protocol import ImagePolicy, TextPolicy
from dpo_mm.training.builders import build_policy
from dpo_mm.training.training_rows import TrainingRows, load_training_rows

if TYPE_CHECKING:
    from transformers import TrainerCallback


class RunInputs(Protocol):
    """Model and rows of a run, and what else it starts from besides its settings."""

    @property
    def family(self) -> Any:
        """Policy class of the model."""
        ...

    @property
    def paths(self) -> tuple[str | None, ...]:
        """Names of the files and folders that the run reads."""
        ...

    @property
    def commit(self) -> str | None:
        """Commit of a model of the hub."""
        ...

    @property
    def has_eval_rows(self) -> bool:
        """True if rows to evaluate on are given, so that none are split off."""
        ...

    @property
    def reference_model(self) -> nn.Module | None:
        """Model that is the reference. None: the one that the settings name."""
        ...

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """Further callbacks of the training loop."""
        ...

    def model_content(self) -> str:
        """Return what identifies the model's weights and configuration."""
        ...

    def load_rows(self) -> TrainingRows:
        """Load the rows and split off the evaluation rows. Raises ValueError as `load_training_rows`."""
        ...

    def load_policy(self) -> ImagePolicy | TextPolicy:
        """Return the policy, not yet prepared. Raises ValueError as `build_policy`."""
        ...


@dataclass(frozen=True)
class FileInputs:
    """Model and rows that the settings name."""

    config: TrainConfig
    has_eval_rows = False
    reference_model = None

    @property
    def family(self) -> Any:
        return policy_class(self.config.model, revision=self.config.revision)

    @property
    def paths(self) -> tuple[str | None, ...]:
        return (self.config.model, self.config.pairs, self.config.adapter)

    @property
    def commit(self) -> str | None:
        return resolve_commit(resolve_asset(self.config.model), revision=self.config.revision)

    @property
    def callbacks(self) -> list[TrainerCallback]:
        return []

    def model_content(self) -> str:
        return model_content(self.config.model, revision=self.config.revision)

    def load_rows(self) -> TrainingRows:
        return load_training_rows(self.config, modality=self.family.modality)

    def load_policy(self) -> ImagePolicy | TextPolicy:
        return build_policy(self.config)


def run_content(inputs: RunInputs, config: TrainConfig) -> dict[str, Any]:
    """Return the contents that decide a run in addition to its pairs and settings, for `check_same_content`."""
    return {
        "model": inputs.model_content(),
        "adapter": adapter_content(config.adapter),
        "libraries": library_versions(),
    }

"""dpo-mm: preference optimisation for image generators and vision-language models.

Every name is imported when it is first used, so `import dpo_mm` loads no heavy library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_mm.config import (
        CompareConfig,
        CompareResponsesConfig,
        JudgeConfig,
        MineConfig,
        MineResponsesConfig,
        RelabelConfig,
        TrainConfig,
    )
    from dpo_mm.config.dpo_config import DPOConfig
    from dpo_mm.data.schema import load_pairs, load_responses
    from dpo_mm.errors import TrainingInterrupted
    from dpo_mm.evaluation.statistics import Comparison
    from dpo_mm.evaluation.verdict import CompareResult
    from dpo_mm.judges.relabel import RelabelResult, relabel
    from dpo_mm.judges.scoring import ScoreResult, score
    from dpo_mm.mining.mine_result import MineResult
    from dpo_mm.objectives import OBJECTIVES, LogProbs
    from dpo_mm.policies.families import load_policy
    from dpo_mm.recipe import compare, mine
    from dpo_mm.training.dpo_trainer import DPOTrainer
    from dpo_mm.training.run import TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "OBJECTIVES",
    "CompareConfig",
    "CompareResponsesConfig",
    "CompareResult",
    "Comparison",
    "DPOConfig",
    "DPOTrainer",
    "JudgeConfig",
    "LogProbs",
    "MineConfig",
    "MineResponsesConfig",
    "MineResult",
    "RelabelConfig",
    "RelabelResult",
    "ScoreResult",
    "TrainConfig",
    "TrainResult",
    "TrainingInterrupted",
    "__version__",
    "compare",
    "load_pairs",
    "load_policy",
    "load_responses",
    "mine",
    "relabel",
    "score",
    "train",
]

_MODULES = {
    "OBJECTIVES": "dpo_mm.objectives",
    "CompareConfig": "dpo_mm.config",
    "CompareResponsesConfig": "dpo_mm.config",
    "CompareResult": "dpo_mm.evaluation.verdict",
    "Comparison": "dpo_mm.evaluation.statistics",
    "DPOConfig": "dpo_mm.config.dpo_config",
    "DPOTrainer": "dpo_mm.training.dpo_trainer",
    "JudgeConfig": "dpo_mm.config",
    "LogProbs": "dpo_mm.objectives",
    "MineConfig": "dpo_mm.config",
    "MineResponsesConfig": "dpo_mm.config",
    "MineResult": "dpo_mm.mining.mine_result",
    "RelabelConfig": "dpo_mm.config",
    "RelabelResult": "dpo_mm.judges.relabel",
    "ScoreResult": "dpo_mm.judges.scoring",
    "TrainConfig": "dpo_mm.config",
    "TrainResult": "dpo_mm.training.run",
    "TrainingInterrupted": "dpo_mm.errors",
    "compare": "dpo_mm.recipe",
    "load_pairs": "dpo_mm.data.schema",
    "load_policy": "dpo_mm.policies.families",
    "load_responses": "dpo_mm.data.schema",
    "mine": "dpo_mm.recipe",
    "relabel": "dpo_mm.judges.relabel",
    "score": "dpo_mm.judges.scoring",
    "train": "dpo_mm.training.run",
}
"""Where each name is defined. A test compares it with the imports above, which type checkers and editors read."""


if not TYPE_CHECKING:  # else a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'dpo_mm' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__

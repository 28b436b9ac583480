"""dpo-mm: preference optimisation for image generators and vision-language models.

Heavy libraries load when they are first used, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "CompareConfig": "dpo_mm.config",
    "MineConfig": "dpo_mm.config",
    "TrainConfig": "dpo_mm.config",
    "DPOTrainer": "dpo_mm.training.trainer",
    "LogProbs": "dpo_mm.objectives",
    "OBJECTIVES": "dpo_mm.objectives",
    "compare": "dpo_mm.evaluation.compare_images",
    "load_pairs": "dpo_mm.data.schema",
    "load_policy": "dpo_mm.policies.families",
    "mine": "dpo_mm.mining.mine_images",
    "train": "dpo_mm.training.run",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dpo_mm' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)

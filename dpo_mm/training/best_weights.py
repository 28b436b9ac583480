"""The weights of the best evaluation: saved when a metric is better than ever before, and restored at the end of the run."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dpo_mm.config import TrainConfig
from dpo_mm.errors import did_you_mean
from dpo_mm.files.checksums import what_is_wrong, write_checksums
from dpo_mm.files.resumable import explain_unwritten
from dpo_mm.judges import better_of
from dpo_mm.policies.protocol import Modality, Policy
from dpo_mm.process.process_rank import process_rank
from dpo_mm.training.objective_settings import required_inputs
from dpo_mm.training.samples import METRIC

BEST_FOLDER, STEP_FILE = "best", "step.json"
EVAL_METRICS = {
    "eval_loss": "lower",
    "eval_rewards/accuracies": "higher",
    "eval_rewards/margins": "higher",
    "eval_errors/chosen": "lower",
}
"""Metrics of the evaluation split that can choose the best weights, and their better direction."""


def validate_best_weights(config: TrainConfig, *, modality: Modality) -> None:
    """Refuse a metric for the best weights that the run does not measure. Raises ValueError."""
    name = config.metric_for_best_model
    if name is None:
        if config.early_stopping_patience:
            raise ValueError("early_stopping_patience has no effect without metric_for_best_model. Remove one of them")
        return
    if name.startswith(METRIC):
        if name.removeprefix(METRIC) not in config.sample_judges or not config.sample_steps:
            raise ValueError(
                f"metric_for_best_model {name!r} needs sample_steps, and one of sample_judges ({', '.join(config.sample_judges) or 'none'}) "
                f"after {METRIC}"
            )
        return
    count = 1 if "reference_logps" not in required_inputs(config) else 3 if modality == "text" else 4
    known = [*EVAL_METRICS][:count]  # without a reference there are no rewards
    if name not in known:
        raise ValueError(
            f"metric_for_best_model {name!r} is unknown; {did_you_mean(name, [*known, f'{METRIC}JUDGE with one of sample_judges'])}"
        )
    if not config.eval_every:
        raise ValueError(f"metric_for_best_model {name!r} needs eval_every, the steps between two evaluations")


class BestWeightsCallback(TrainerCallback):
    """Save the weights with the best value of `metric_for_best_model`, and end a run that no longer improves.

    The values are those of the log, which checkpoints contain, so a resumed run decides like an unbroken one.

    Args:
        policy: the model that trains.
        config: settings of the run.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy, self.config = policy, config
        self.name = str(config.metric_for_best_model)
        judge = self.name.removeprefix(METRIC)
        self.is_lower_better = EVAL_METRICS.get(self.name, judge != self.name and better_of(judge)) == "lower"
        self.folder = Path(config.output_dir) / BEST_FOLDER
        self.best: dict[str, float] | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.name not in (logs or {}):
            return
        since = self._find_best(state.log_history)
        if since == 0:
            self._save()
        if self.early_end(state.log_history):
            control.should_training_stop = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1 and self.name.startswith(METRIC):
            raise ValueError(
                f"metric_for_best_model {self.name!r} needs a run of one process. Use a metric of the evaluation"
            )
        self._find_best(state.log_history)

    def _find_best(self, history: list[dict[str, float]]) -> int:
        """Find the best finite value in the log, the first one of equal values, and return the number of values after it."""
        entries = [entry for entry in history if self.name in entry]
        finite = [number for number, entry in enumerate(entries) if math.isfinite(entry[self.name])]
        if not finite:
            return len(entries)
        sign = -1 if self.is_lower_better else 1
        number = max(finite, key=lambda n: (sign * entries[n][self.name], -n))
        self.best = {"step": entries[number]["step"], "value": entries[number][self.name]}
        return len(entries) - 1 - number

    def early_end(self, history: list[dict[str, float]]) -> str:
        """Return where and why a run with this log ends early, as a sentence of its summary. Empty if it does not."""
        since = self._find_best(history)
        if not 0 < self.config.early_stopping_patience <= since:
            return ""
        last = max(entry["step"] for entry in history if self.name in entry)
        return f". The run ended at step {last:g}, after {since} values that are not better"

    def _save(self) -> None:
        """Write the current weights in place of the best so far."""
        if not process_rank().is_first:
            return
        aside = self.folder.parent / f".{BEST_FOLDER}"
        with explain_unwritten(self.folder):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            self.policy.save(aside)
            (aside / STEP_FILE).write_text(json.dumps(self.best), encoding="utf-8")
            write_checksums(aside)
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(aside, self.folder)

    def restore(self, history: list[dict[str, float]]) -> dict[str, str]:
        """Load the best weights into the policy, and return the line of the run's summary that says so.

        Args:
            history: the log of the run.

        Raises:
            ValueError: if the saved weights are damaged or of another step.
        """
        end = self.early_end(history)
        if self.best is None:
            return {}
        if reason := what_is_wrong(self.folder):
            raise ValueError(
                f"{self.folder}: {reason}, and the run has ended. Continue from its last checkpoint with --resume"
            )
        saved = json.loads((self.folder / STEP_FILE).read_text(encoding="utf-8"))
        if saved != self.best:
            raise ValueError(
                f"{self.folder} has the weights of step {saved['step']:g}, but the best step is {self.best['step']:g}. "
                "Train again with --overwrite"
            )
        self.policy.load_weights(self.folder)
        best = f"weights of step {self.best['step']:g}, whose {self.name} is best ({self.best['value']:.4g})"
        return {"result": best + end}

"""The trainer: batch -> log-probs of reference and policy -> objective -> step, for every kind of policy.

The loop, accumulation, precision, schedules and distribution are `transformers.Trainer`'s; here are the loss, what is
measured beside it, and how checkpoints are written (aside, then renamed) and read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from dpo_mm import objectives
from dpo_mm.config import TrainConfig, as_dict
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.protocol import Batch
from dpo_mm.training.builders import SLACK, loss_of, needs_of, training_arguments
from dpo_mm.training.callbacks import Displacement, ErrorDrift, FiniteSteps, Follow
from dpo_mm.training.checkpoints import CONFIG_FILE, mark_complete, publish, writing
from dpo_mm.training.metrics import by_level, image_reliance, measures
from dpo_mm.training.pair_stream import frozen_stream, training_stream
from dpo_mm.training.reference import Following, choose


class DPOTrainer(Trainer):
    """Preference optimisation of a policy, image generator or vision-language model alike.

    policy: prepared. rows: encoded pairs. watched: pairs to evaluate on, on frozen draws, or None. kept: what
    checkpoints hold beside the config, some of `checkpoints.STATE`.
    Raises ValueError where the config's objective or reference doesn't fit.
    """

    def __init__(
        self,
        policy: Any,
        config: TrainConfig,
        rows: Any,
        watched: Any = None,
        *,
        kept: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.policy, self.config = policy, config
        self.objective: Callable[[LogProbs, LogProbs | None, Mapping[str, Tensor]], Tensor] = loss_of(
            config, exact=policy.exact
        )
        self.needs = needs_of(config)
        self.kept = {**(kept or {}), "rewards": {"mean": 0.0, "count": 0.0}}
        self._measured: dict[str, list[dict[str, Tensor]]] = {"train": [], "eval": []}
        arguments = training_arguments(config)
        super().__init__(
            model=policy.model,
            args=arguments,
            data_collator=policy.collate,
            train_dataset=training_stream(config, rows, arguments.world_size),
            eval_dataset=None if watched is None else frozen_stream(watched, config, exact=policy.exact),
            **kwargs,
        )
        shard = self._shard if self.is_fsdp_enabled else None
        self.reference = choose(policy, config, shard) if "reference" in self.needs else None
        self.model_accepts_loss_kwargs = False
        self.guard = FiniteSteps()
        self.add_callback(self.guard)
        self.add_callback(Displacement() if policy.exact else ErrorDrift())
        if isinstance(self.reference, Following):
            self.add_callback(Follow(self.reference))

    def _shard(self, model: nn.Module) -> None:
        """Spread a frozen copy over the processes, as the model itself will be. Raises ValueError under FSDP1."""
        if not self.accelerator.is_fsdp2:
            raise ValueError("a frozen copy is sharded by FSDP2 alone; set fsdp_version: 2 in accelerate's config")
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        fsdp2_prepare_model(self.accelerator, model)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        policy, reference = self._asked(model, inputs)
        given = {**inputs, **self._from_batch(policy, reference)}
        if "loser_scale" in self.needs:
            given["loser_scale"] = self.policy.loser_scale(slack=self.config.objective_kwargs.get("slack", SLACK))
        if "corrupted_ratio" in self.needs:
            seen_less, reference_less = self._asked(model, inputs["corrupted"])
            given["corrupted_ratio"] = objectives.log_ratios(seen_less, reference_less)[0]  # type: ignore[arg-type]
        losses = self.objective(policy, reference, given)
        found = {"loss": losses.detach()}
        if reference is not None:
            found |= measures(policy, reference, beta=float(self.config.beta))
        if "corrupted_ratio" in given:
            found["image_reliance"] = image_reliance(policy, reference, given["corrupted_ratio"])  # type: ignore[arg-type]
        if torch.is_grad_enabled():
            self.guard.saw(inputs["id"], inputs.get("timestep"), losses)
            self._measured["train"].append(found)
        else:
            levels = by_level(found, inputs["level"]) if "level" in inputs and reference is not None else {}
            self._measured["eval"].append(found | levels)
        return losses.mean()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.guard.measure(self.policy.model)
        return super()._clip_grad_norm(model)

    def _asked(self, model: nn.Module, inputs: Batch) -> tuple[LogProbs, LogProbs | None]:
        """What policy and reference say of a batch; the reference first, while no activations are kept."""
        with self.accelerator.autocast():
            reference = self.reference(model, inputs) if self.reference else None
            return self.policy.log_probs(model, inputs), reference

    def _from_batch(self, policy: LogProbs, reference: LogProbs | None) -> dict[str, Tensor]:
        """What some objectives take from the batches of all processes: KTO's z, BCO's running mean of the rewards."""
        if reference is None or not self.needs & {"z", "reward_shift"}:
            return {}
        ratios = objectives.log_ratios(policy.detach(), reference)
        chosen, rejected = (self.accelerator.gather(ratio) for ratio in ratios)
        beta, found, rewards = float(self.config.beta), {}, self.kept["rewards"]
        if "z" in self.needs:
            found["z"] = objectives.kto_reference(chosen, rejected, beta=beta)
        if "reward_shift" in self.needs:
            mean, seen = rewards["mean"], int(rewards["count"])
            found["reward_shift"] = objectives.bco_shift(chosen, rejected, beta=beta, before=mean, seen=seen)
            if torch.is_grad_enabled():
                self.kept["rewards"] = {"mean": found["reward_shift"].item(), "count": seen + 2.0 * len(chosen)}
        return found

    def _averages(self, split: str) -> dict[str, float]:
        """Means over all that was measured since the last call, over all processes."""
        kept, self._measured[split] = self._measured[split], []
        if not kept:
            return {}
        stacked = torch.stack([torch.cat([entry[name] for entry in kept]) for name in kept[0]])
        means = self.accelerator.gather(stacked.nanmean(1)[None]).nanmean(0)  # type: ignore[union-attr]
        found = dict(zip(kept[0], means.tolist(), strict=True))
        return {name: value for name, value in found.items() if "_quartile" not in name or value == value}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._averages("train")}
            if self.guard.skipped:
                logs["skipped_steps"] = float(self.guard.skipped)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Loss and measures on the watched pairs, on draws that never change."""
        model: nn.Module = self.policy.model
        model.eval()
        for batch in self.get_eval_dataloader():
            self.compute_loss(model, self._prepare_inputs(batch))
        model.train()
        found = {f"{metric_key_prefix}_{name}": value for name, value in self._averages("eval").items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    # Checkpoints: written aside and renamed, so that one that is there is whole

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(Path(super()._get_output_dir(trial)) / ".saving")

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        aside, final = Path(self._get_output_dir()), Path(self.args.output_dir)  # type: ignore[arg-type]
        name = f"checkpoint-{self.state.global_step}"
        try:
            with writing(final / name):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    if isinstance(self.reference, Following):
                        self.reference.save(aside / name)
                    mark_complete(aside / name)
                    shutil.rmtree(final / name, ignore_errors=True)
                    os.replace(aside / name, final / name)
                    rotate_checkpoints(str(final), self.args.save_total_limit)
        finally:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save(folder, state_dict)
        (folder / CONFIG_FILE).write_text(json.dumps(as_dict(self.config) | self.kept, indent=1))

    def save_result(self) -> None:
        """Write what was trained into output_dir, each part aside and then under its name."""
        aside, final = Path(self._get_output_dir()) / "result", Path(self.args.output_dir)  # type: ignore[arg-type]
        with writing(final):
            self.save_model(str(aside))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(aside, final)
                shutil.rmtree(aside.parent)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.policy.load_weights(folder)
        if isinstance(self.reference, Following):
            self.reference.load(folder)
        self.kept["rewards"] = json.loads((folder / CONFIG_FILE).read_text())["rewards"]

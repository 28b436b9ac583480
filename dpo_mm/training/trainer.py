"""The training loop: log-probs of reference and policy, objective, optimizer step, checkpoints.

`transformers.Trainer` runs the loop, accumulation, precision, schedules and distribution. This module adds the loss,
its metrics, and checkpoints that are written to a temporary folder and then renamed.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import Trainer

from dpo_mm import objectives
from dpo_mm.config import TrainConfig, as_dict
from dpo_mm.files.checksums import write_checksums
from dpo_mm.files.outputs import KIND, RECORDS
from dpo_mm.files.resumable import set_aside, share_files
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.diffusion.text_encoder_lora import trained_model
from dpo_mm.policies.protocol import Batch, Modality, Policy
from dpo_mm.training.best_weights import BestWeightsCallback
from dpo_mm.training.builders import DEFAULT_SLACK, build_loss, training_arguments
from dpo_mm.training.callbacks import (
    ChosenErrorWarning,
    ChosenLikelihoodWarning,
    RestoreRewardsCallback,
    SkipNonFiniteStepsCallback,
    UpdateReferenceCallback,
)
from dpo_mm.training.checkpoints import (
    CONFIG_FILE,
    LOG_FILE,
    explain_disk_full,
    move_into_place,
    remove_checkpoint,
    remove_old_checkpoints,
)
from dpo_mm.training.dropped_rows import run_rows, streamed_rows
from dpo_mm.training.half_precision import disable_trainer_autocast, needs_autocast
from dpo_mm.training.metrics import image_reliance, log_prob_metrics, reward_metrics, split_by_noise_quartile
from dpo_mm.training.objective_settings import required_inputs
from dpo_mm.training.pair_stream import eval_stream, training_stream
from dpo_mm.training.reference import TrackingReference, build_reference
from dpo_mm.training.samples import SampleCallback
from dpo_mm.training.tracking import prepare_trackers

MAX_WORKERS = 4
"""Largest number of processes that encode rows while training, unless `workers` is set."""
IMAGE_WORKERS = 2
"""Number of processes that read rows and draw noise for a GPU. Drawing the noise of 4 pairs takes single milliseconds."""
SHARED_MEMORY = 2**30
"""Free bytes of shared memory, in which batches wait, from which images have workers. A container often has 64 MiB."""


def default_workers(modality: Modality, device_type: str, is_streamed: bool) -> int:
    """Return the number of processes that load rows.

    Args:
        modality: text or image.
        device_type: cpu or cuda. On a CPU, processes would take time from the step.
        is_streamed: True if rows are encoded in each step.
    """
    cores, folder = os.cpu_count() or 1, Path("/dev/shm")
    if is_streamed:
        return min(MAX_WORKERS, cores)
    has_room = not folder.is_dir() or shutil.disk_usage(folder).free >= SHARED_MEMORY
    return min(IMAGE_WORKERS, cores - 1) if modality == "image" and device_type == "cuda" and has_room else 0


def _ignore_signals_in_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Make the loader's worker processes ignore signals that a terminal or a cluster sends to all processes."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's loader wraps the one that starts the processes
    inner.worker_init_fn = functools.partial(_ignore_signals, inner.worker_init_fn)
    return loader


def _ignore_signals(initialise: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_signal, daemon=True).start()
    if initialise is not None:
        initialise(worker)


def _exit_on_parents_signal() -> None:
    """Wait for the SIGTERM of the process that started this worker, and exit. Others are ignored."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class PreferenceTrainer(Trainer):
    """Preference optimisation of an image generator or a vision-language model.

    Args:
        policy: the model, after `policy.prepare(config)`.
        config: settings of the run.
        train_rows: encoded pairs to train on.
        eval_rows: encoded pairs to evaluate on, at fixed noise and timesteps. None runs no evaluation.
        run_state: entries of `checkpoints.STATE` that each checkpoint stores next to the config.
        samples: generates samples while the model trains, or None.
        reference_model: the model of a frozen reference. None: a copy of the policy's.
        **kwargs: further arguments of `transformers.Trainer`, such as callbacks.

    Raises:
        ValueError: if the objective or the reference does not fit the policy.
    """

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        train_rows: Any,
        eval_rows: Any = None,
        *,
        run_state: Mapping[str, Any] | None = None,
        samples: SampleCallback | None = None,
        reference_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.policy, self.config = policy, config
        self.objective: Callable[[LogProbs, LogProbs | None, Mapping[str, Tensor]], Tensor] = build_loss(
            config, modality=policy.modality
        )
        self.required_inputs = required_inputs(config)
        self.run_state = {**(run_state or {}), "rewards": {"mean": 0.0, "count": 0.0}}
        self._metrics: dict[str, list[dict[str, Tensor]]] = {"train": [], "eval": []}
        arguments = training_arguments(config)
        if config.workers is None:
            streamed = streamed_rows(train_rows) is not None
            arguments.dataloader_num_workers = default_workers(policy.modality, arguments.device.type, streamed)
        super().__init__(
            model=trained_model(policy),
            args=arguments,
            data_collator=policy.collate,
            train_dataset=training_stream(config, train_rows, arguments.world_size),
            eval_dataset=None if eval_rows is None else eval_stream(eval_rows, config, modality=policy.modality),
            **kwargs,
        )
        if not needs_autocast(config):
            disable_trainer_autocast(self)
        if policy.with_encoders is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("train_text_encoder does not go with FSDP or DeepSpeed. Use ddp.yaml, or remove it")
        shard = self._shard if self.is_fsdp_enabled else None
        needed = "reference_logps" in self.required_inputs
        self.reference = build_reference(policy, config, shard, reference_model) if needed else None
        self.model_accepts_loss_kwargs = False
        self.skip_callback = SkipNonFiniteStepsCallback()
        self.add_callback(self.skip_callback)
        prepare_trackers(self.callback_handler.callbacks, config)
        if samples is not None:
            samples.log, samples.callbacks = self.log, self.callback_handler.callbacks
            self.add_callback(samples)
        self.best_weights = BestWeightsCallback(policy, config) if config.metric_for_best_model else None
        if self.best_weights is not None:
            self.add_callback(self.best_weights)
        self.add_callback(RestoreRewardsCallback(self.run_state, self.skip_callback))
        self.add_callback(ChosenLikelihoodWarning() if policy.modality == "text" else ChosenErrorWarning())
        if isinstance(self.reference, TrackingReference):
            self.add_callback(UpdateReferenceCallback(self.reference, self.skip_callback))

    def _shard(self, model: nn.Module) -> None:
        """Spread a frozen copy over the processes like the model itself. Raises ValueError under FSDP1."""
        if not self.accelerator.is_fsdp2:
            raise ValueError("a frozen copy of the model needs FSDP2: set fsdp_version: 2 in accelerate's config")
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        fsdp2_prepare_model(self.accelerator, model)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def get_train_dataloader(self) -> DataLoader[Any]:
        return _ignore_signals_in_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        return _ignore_signals_in_workers(super().get_eval_dataloader(eval_dataset))

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        evaluating = not torch.is_grad_enabled()
        reference_logps = self._reference_log_probs(model, inputs)
        policy_logps, gradient_scale = self._policy_log_probs(model, inputs)
        loss_inputs = {**inputs, **gradient_scale}
        loss_inputs |= self._global_batch_statistics(policy_logps, reference_logps, update_running_mean=not evaluating)
        if "corrupted_ratio" in self.required_inputs:
            corrupted_reference = self._reference_log_probs(model, inputs["corrupted"])
            corrupted_policy, _ = self._policy_log_probs(model, inputs["corrupted"])
            loss_inputs["corrupted_ratio"] = objectives.log_ratios(corrupted_policy, corrupted_reference)[0]  # type: ignore[arg-type]
        losses = self.objective(policy_logps, reference_logps, loss_inputs)
        metrics = {"loss": losses.detach(), **log_prob_metrics(policy_logps)}
        if reference_logps is not None:
            metrics |= reward_metrics(policy_logps, reference_logps, beta=float(self.config.beta))
        if "corrupted_ratio" in loss_inputs:
            ratio = loss_inputs["corrupted_ratio"]
            metrics["image_reliance"] = image_reliance(policy_logps, reference_logps, ratio)  # type: ignore[arg-type]
        if evaluating:
            by_noise = "level" in inputs and reference_logps is not None
            quartiles = split_by_noise_quartile(metrics, inputs["level"]) if by_noise else {}
            number = {"number": inputs["number"]} if "number" in inputs else {}
            self._metrics["eval"].append(metrics | quartiles | number)
        else:
            self.skip_callback.record_batch(inputs["id"], inputs.get("timestep"), losses)
            self._metrics["train"].append(metrics)
        return losses.mean()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.skip_callback.measure(trained_model(self.policy))
        return super()._clip_grad_norm(model)

    def _reference_log_probs(self, model: nn.Module, inputs: Batch) -> LogProbs | None:
        """Log-probs of a batch under the reference. Run it before the policy, whose activations take memory."""
        with self.accelerator.autocast():
            return self.reference(model, inputs) if self.reference else None

    def _policy_log_probs(self, model: nn.Module, inputs: Batch) -> tuple[LogProbs, dict[str, Tensor]]:
        """Log-probs of a batch under the policy, and the scale of the rejected gradient if the objective takes it."""
        with self.accelerator.autocast():
            if "rejected_gradient_scale" not in self.required_inputs:
                return self.policy.log_probs(model, inputs), {}
            slack = self.config.objective_kwargs.get("slack", DEFAULT_SLACK)
            log_probs, scale = self.policy.log_probs_and_gradient_scale(model, inputs, slack=slack)
            return log_probs, {"rejected_gradient_scale": scale}

    def _global_batch_statistics(
        self, policy_logps: LogProbs, reference_logps: LogProbs | None, *, update_running_mean: bool
    ) -> dict[str, Tensor]:
        """Gather the log-ratios of all processes for KTO's z and for BCO's running mean of the rewards."""
        if reference_logps is None or not self.required_inputs & {"z", "reward_shift"}:
            return {}
        ratios = objectives.log_ratios(policy_logps.detach(), reference_logps)
        chosen, rejected = (self.accelerator.gather(ratio) for ratio in ratios)
        beta, statistics, rewards = float(self.config.beta), {}, self.run_state["rewards"]
        if "z" in self.required_inputs:
            statistics["z"] = objectives.kto_reference(chosen, rejected, beta=beta)
        if "reward_shift" in self.required_inputs:
            mean, count = rewards["mean"], int(rewards["count"])
            shift = objectives.bco_shift(chosen, rejected, beta=beta, previous_mean=mean, previous_count=count)
            statistics["reward_shift"] = shift
            if update_running_mean:
                self.run_state["rewards"] = {"mean": shift.item(), "count": count + 2.0 * len(chosen)}
        return statistics

    def _eval_averages(self) -> dict[str, float]:
        """Mean of each metric over the evaluation rows. Each row counts once, and one that is not finite is not left out.

        With several processes, accelerate repeats the first rows to fill up the last batch. With buckets, so does the
        stream. The rows' numbers tell them apart.
        """
        batches, self._metrics["eval"] = self._metrics["eval"], []
        names = list(batches[0])
        values = torch.stack([torch.cat([batch[name].double() for batch in batches]) for name in names], dim=1)
        padded = self.accelerator.pad_across_processes(values, pad_index=-1)
        gathered = self.accelerator.gather(padded).cpu()  # type: ignore[union-attr]
        numbers = gathered[:, names.index("number")].long().tolist()
        first = {number: position for position, number in reversed(list(enumerate(numbers))) if number >= 0}
        rows = gathered[[first[number] for number in sorted(first)]]
        means = {
            name: (column.nanmean() if "_quartile" in name else column.mean()).item()
            for name, column in zip(names, rows.T, strict=True)
        }
        return {k: v for k, v in means.items() if k != "number" and ("_quartile" not in k or not math.isnan(v))}

    def _train_averages(self) -> dict[str, float]:
        """Mean of each metric over the training batches since the last log, over all processes."""
        batches, self._metrics["train"] = self._metrics["train"], []
        if not batches:
            return {}
        stacked = torch.stack([torch.cat([batch[name] for batch in batches]) for name in batches[0]])
        means = self.accelerator.gather(stacked.nanmean(1)[None]).nanmean(0)  # type: ignore[union-attr]
        return dict(zip(batches[0], means.tolist(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._train_averages()}
            if self.skip_callback.skipped:
                logs["skipped_steps"] = float(self.skip_callback.skipped)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Compute loss and metrics on the evaluation pairs, at noise and timesteps that never change."""
        model = trained_model(self.policy)
        model.eval()
        for batch in self.get_eval_dataloader():
            self.compute_loss(model, self._prepare_inputs(batch))
        model.train()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._eval_averages().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    # Checkpoints are written to a temporary folder and renamed, so a checkpoint is never incomplete

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(Path(super()._get_output_dir(trial)) / ".saving")

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        temporary, final = Path(self._get_output_dir()), Path(self.args.output_dir)  # type: ignore[arg-type]
        name = f"checkpoint-{self.state.global_step}"
        try:
            with explain_disk_full(final / name):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    if isinstance(self.reference, TrackingReference):
                        self.reference.save(temporary / name)
                    write_checksums(temporary / name)
                    remove_checkpoint(final / name)
                    set_aside(final / name)
                    os.replace(temporary / name, final / name)
                    remove_old_checkpoints(final, limit=self.config.save_total_limit)
        finally:
            if self.args.should_save:
                shutil.rmtree(temporary, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save(folder, state_dict)
        rows = run_rows(self.train_dataset)
        dropped = {"dropped_rows": rows.dropped.records() if rows else []}
        record = as_dict(self.config) | self.run_state | dropped | {KIND: RECORDS[CONFIG_FILE]}
        (folder / CONFIG_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")

    def save_result(self, summary: Mapping[str, str], write_card: Callable[[Path], object]) -> None:
        """Write the trained weights, the log and the model card to a temporary folder, then rename them into output_dir.

        Args:
            summary: of the run.
            write_card: writes the model card into a folder.
        """
        temporary, final = Path(self._get_output_dir()) / "result", Path(self.args.output_dir)  # type: ignore[arg-type]
        with explain_disk_full(final):
            self.save_model(str(temporary))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                log = json.dumps({"summary": summary, "history": self.history()}, indent=1)
                (temporary / LOG_FILE).write_text(log, encoding="utf-8")
                write_card(temporary)
                write_checksums(temporary)
                share_files(temporary)
                move_into_place(temporary, final)
                shutil.rmtree(temporary.parent)

    def history(self) -> list[dict[str, float]]:
        """Return the log without its entry on speed, which differs between equal runs."""
        return [dict(sorted(entry.items())) for entry in self.state.log_history if "train_runtime" not in entry]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, and take the learning rate from this run's schedule, whose number of steps may have changed."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint and self.optimizer is not None and isinstance(schedule, LambdaLR):
            schedule._last_lr = [
                peak * factor(schedule.last_epoch)
                for peak, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.policy.load_weights(folder)
        if isinstance(self.reference, TrackingReference):
            self.reference.load(folder)
        self.run_state["rewards"] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["rewards"]

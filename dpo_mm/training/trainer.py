"""The trainer: batch -> log-probs of reference and policy -> objective -> step, for every kind of policy.

The loop, accumulation, precision, schedules and distribution are `transformers.Trainer`'s; here are the loss, what is
measured beside it, and how checkpoints are written (aside, then renamed) and read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from dpo_mm import objectives
from dpo_mm.assets import locate
from dpo_mm.config import TrainConfig, as_dict
from dpo_mm.data.schema import decided, load_pairs, load_responses, split_by_prompt
from dpo_mm.errors import Stopped
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.families import commit_of
from dpo_mm.policies.protocol import Batch
from dpo_mm.progress import progress
from dpo_mm.training.auto_beta import AUTO, measure_beta
from dpo_mm.training.builders import SLACK, check, loss_of, needs_of, opened, training_arguments
from dpo_mm.training.callbacks import FiniteSteps, Stop
from dpo_mm.training.checkpoints import CONFIG_FILE, mark_complete, newest_whole, publish, same_recipe, writing
from dpo_mm.training.drift import Displacement, ErrorDrift
from dpo_mm.training.encoding import encoded_sets
from dpo_mm.training.memory_estimate import planned
from dpo_mm.training.model_card import write_card
from dpo_mm.training.pair_stream import frozen_stream, training_stream
from dpo_mm.training.reference import Following, choose, choose_name, keep_reference


def by_level(found: Mapping[str, Tensor], level: Tensor) -> dict[str, Tensor]:
    """Accuracy and margin again, by quarter of the noise schedule, NaN for pairs of another quarter; (pairs,) each.

    level: where in the schedule each pair was drawn, [0, 1), (pairs,); the first quarter is the cleanest.
    """
    quarter = (level * 4).long()
    return {
        f"{name}_quarter{n + 1}": found[name].masked_fill(quarter != n, torch.nan)
        for name in ("accuracy", "margin")
        for n in range(4)
    }


def measures(policy: LogProbs, reference: LogProbs, *, beta: float) -> dict[str, Tensor]:
    """What is watched beside the loss, each (pairs,).

    accuracy: 1 where the implicit reward prefers the chosen side, 1/2 at a tie. reward_*, margin: beta * log-ratio;
    margin_size: its absolute value.
    error_* (surrogates alone): denoising error relative to the reference's, 1 where it is the same.
    """
    chosen, rejected = objectives.log_ratios(policy, reference)
    delta = objectives.margins(policy, reference)
    found = {
        "accuracy": (delta > 0).float() + 0.5 * (delta == 0).float(),
        "margin": beta * delta,
        "margin_size": (beta * delta).abs(),
        "reward_chosen": beta * chosen,
        "reward_rejected": beta * rejected,
    }
    if not policy.exact:
        found["error_chosen"] = policy.chosen / reference.chosen
        found["error_rejected"] = policy.rejected / reference.rejected
    return {name: value.detach() for name, value in found.items()}


def image_reliance(policy: LogProbs, reference: LogProbs, corrupted_ratio: Tensor) -> Tensor:
    """1 where the chosen answer's implicit reward is higher with its image than with what is left of it, (pairs,)."""
    return (objectives.log_ratios(policy, reference)[0] > corrupted_ratio).float().detach()


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
        self.kept = {**(kept or {}), "rewards": {"mean": 0.0, "seen": 0.0}}
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
            given["loser_scale"] = self.policy.loser_scale(slack=self.config.settings.get("slack", SLACK))
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
            mean, seen = rewards["mean"], int(rewards["seen"])
            found["reward_shift"] = objectives.bco_shift(chosen, rejected, beta=beta, before=mean, seen=seen)
            if torch.is_grad_enabled():
                self.kept["rewards"] = {"mean": found["reward_shift"].item(), "seen": seen + 2.0 * len(chosen)}
        return found

    def _averages(self, split: str) -> dict[str, float]:
        """Means over all that was measured since the last call, over all processes."""
        kept, self._measured[split] = self._measured[split], []
        if not kept:
            return {}
        stacked = torch.stack([torch.cat([entry[name] for entry in kept]) for name in kept[0]])
        means = self.accelerator.gather(stacked.nanmean(1)[None]).nanmean(0)  # type: ignore[union-attr]
        found = dict(zip(kept[0], means.tolist(), strict=True))
        return {name: value for name, value in found.items() if "_quarter" not in name or value == value}

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


@dataclass(frozen=True)
class Trained:
    """A finished run: the adapter's folder, the log, and what the run said of itself."""

    folder: Path
    history: tuple[dict[str, float], ...]
    settings: dict[str, str]
    beta: float


def train(config: TrainConfig) -> Trained:
    """Train as the config says and write the result to its output_dir.

    Raises ValueError that names the setting, file or row at fault, before anything is trained; Stopped after a SIGTERM.
    """
    check(config)
    step = config.batch_size * config.accumulate * training_arguments(config).world_size
    checkpoint = newest_whole(Path(config.output_dir)) if config.resume else None
    before = same_recipe(checkpoint, config, pairs_a_step=step) if checkpoint else {}
    policy = opened(config)
    together = training_arguments(config).main_process_first(desc="encoding") if policy.exact else nullcontext()
    with together:
        rows, watched, digest = encoded_sets(policy, config)
    if checkpoint and before["pairs_digest"] != digest:
        raise ValueError(
            f"{config.pairs} has changed since {checkpoint} was made; put it back, or choose another output_dir"
        )
    policy.drop_encoders()
    policy.prepare(config)
    if config.keep_features:
        rows, watched = policy.keep_features(rows), watched and policy.keep_features(watched)
    if config.reference == "precomputed":
        draws = 1 if policy.exact else config.reference_draws
        rows = keep_reference(policy, dataclasses.replace(training_stream(config, rows, 1), draws=draws), config)
        watched = watched and keep_reference(policy, frozen_stream(watched, config, exact=policy.exact), config)
    kept = {"beta": config.beta, "measured_beta": None, "pairs_digest": digest, "pairs_a_step": step}
    if config.beta == AUTO:
        stream = training_stream(config, rows, 1)
        kept["measured_beta"] = before.get("measured_beta") or measure_beta(policy, stream, config)
        config = dataclasses.replace(config, beta=kept["measured_beta"])
    settings = describe(policy, config, len(rows))
    stop = Stop()
    with progress("training", config.steps) as advance, stop.listening():
        trainer = DPOTrainer(policy, config, rows, watched, kept=kept, callbacks=[Bar(advance), stop])
        trainer.remove_callback(PrinterCallback)
        if trainer.args.should_save:
            shutil.rmtree(Path(config.output_dir) / ".saving", ignore_errors=True)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        history = trainer.state.log_history
        if stop.asked and trainer.state.global_step < config.steps:
            at = f"{config.output_dir}/checkpoint-{trainer.state.global_step}"
            raise Stopped(f"stopped as asked at step {trainer.state.global_step}, saved in {at}; go on with --resume")
        if watched is not None and not any("eval_loss" in e and e["step"] == config.steps for e in history):
            trainer.evaluate()
    trainer.save_result()
    if trainer.is_world_process_zero():
        name = Path(config.output_dir).name
        stock = None if policy.exact else "\n".join(policy.loading(config.model, name))
        write_card(config, settings, text=policy.exact, stock=stock)
    return Trained(Path(config.output_dir), tuple(trainer.state.log_history), settings, float(config.beta))


def describe(policy: Any, config: TrainConfig, rows: int) -> dict[str, str]:
    """What the run says of itself before it starts."""
    trained = sum(tensor.numel() for tensor in policy.model.parameters() if tensor.requires_grad)
    every = sum(tensor.numel() * tensor.element_size() for tensor in policy.model.parameters())
    copies = 2 if choose_name(config) == "frozen_copy" else 1
    commit = commit_of(locate(config.model), revision=config.revision)
    unknown = {"effective beta": "measured on the first pairs before the first step"} if config.beta == AUTO else {}
    return {
        **({"revision": commit} if commit else {}),
        "pairs": f"{config.pairs}, {rows} to train on",
        "steps": f"{config.steps} of {config.batch_size} x {config.accumulate} pairs a process",
        "objective": f"{config.objective}{f' + {config.sft_weight:g} sft' if config.sft_weight else ''}",
        "reference": choose_name(config),
        "tuning": f"{config.tuning}, {trained:,} parameters train",
        "memory": f"about {(copies * every + 12 * trained) / 2**20:,.0f} MiB for weights, gradients and Adam, activations beside it",
        **policy.describe(config),
        **unknown,
    }


class Bar(TrainerCallback):
    """Moves a progress bar a step at a time."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)


class Follow(TrainerCallback):
    """Lets a reference follow the policy after each step."""

    def __init__(self, reference: Following) -> None:
        self.reference = reference

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reference.follow(state.global_step)


def plan(config: TrainConfig) -> dict[str, str]:
    """What `train` would do, without training: the same lines that a run says of itself.

    Raises ValueError for everything that `train` would refuse but a picture that does not decode.
    """
    check(config)
    policy = opened(config, weights=False)
    pairs = load_responses(config.pairs) if policy.exact else decided(load_pairs(config.pairs))
    rows, _ = split_by_prompt(pairs, config.eval_fraction, seed=config.seed)
    policy.prepare(config)
    said = describe(policy, config, len(rows))
    return said if policy.exact else said | planned(policy, config, len(set(pairs["prompt"])), len(pairs))

"""A training run from its settings to its files: what `dpo_mm.train` does."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from transformers import PrinterCallback

from dpo_mm.assets import resolve_asset
from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import drop_ties, load_pairs, load_responses, split_by_prompt
from dpo_mm.errors import TrainingInterrupted
from dpo_mm.policies.families import resolve_commit
from dpo_mm.policies.protocol import Policy
from dpo_mm.progress import progress_bar
from dpo_mm.resumable import StopRequest
from dpo_mm.training.auto_beta import AUTO, measure_beta
from dpo_mm.training.builders import build_policy, training_arguments, validate_config
from dpo_mm.training.callbacks import GracefulStopCallback, ProgressBarCallback
from dpo_mm.training.checkpoints import check_same_recipe, latest_complete_checkpoint
from dpo_mm.training.encoding import encoded_sets
from dpo_mm.training.memory_estimate import estimate_memory_and_disk
from dpo_mm.training.model_card import write_card
from dpo_mm.training.pair_stream import eval_stream, training_stream
from dpo_mm.training.reference import precompute_reference_log_probs, resolve_reference_name
from dpo_mm.training.trainer import PreferenceTrainer


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the adapter's folder, the log, and what the run said of itself."""

    folder: Path
    history: tuple[dict[str, float], ...]
    settings: dict[str, str]
    beta: float


def train(config: TrainConfig) -> TrainResult:
    """Train as the config says and write the result to its output_dir.

    Raises ValueError that names the setting, file or row at fault, before anything is trained; Stopped after a SIGTERM.
    """
    validate_config(config)
    step = config.batch_size * config.accumulate * training_arguments(config).world_size
    checkpoint = latest_complete_checkpoint(Path(config.output_dir)) if config.resume else None
    before = check_same_recipe(checkpoint, config, pairs_per_step=step) if checkpoint else {}
    policy = build_policy(config)
    together = (
        training_arguments(config).main_process_first(desc="encoding") if policy.modality == "text" else nullcontext()
    )
    with together:
        rows, watched, digest = encoded_sets(policy, config)
    if checkpoint and before["pairs_digest"] != digest:
        raise ValueError(
            f"{config.pairs} has changed since {checkpoint} was made; put it back, or choose another output_dir"
        )
    policy.free_encoders()
    policy.prepare(config)
    if config.cache_vision_features and policy.modality == "text":
        rows, watched = policy.cache_vision_features(rows), watched and policy.cache_vision_features(watched)
    if config.reference == "precomputed":
        draws = 1 if policy.modality == "text" else config.fixed_draws_per_row
        rows = precompute_reference_log_probs(
            policy, dataclasses.replace(training_stream(config, rows, 1), num_fixed_draws=draws), config
        )
        watched = watched and precompute_reference_log_probs(
            policy, eval_stream(watched, config, modality=policy.modality), config
        )
    run_state = {"beta": config.beta, "measured_beta": None, "pairs_digest": digest, "pairs_per_step": step}
    if config.beta == AUTO:
        stream = training_stream(config, rows, 1)
        run_state["measured_beta"] = before.get("measured_beta") or measure_beta(policy, stream, config)
        config = dataclasses.replace(config, beta=run_state["measured_beta"])
    settings = run_summary(policy, config, len(rows))
    stop = StopRequest()
    with progress_bar("training", config.steps) as advance, stop.on_sigterm():
        trainer = PreferenceTrainer(
            policy,
            config,
            rows,
            watched,
            run_state=run_state,
            callbacks=[ProgressBarCallback(advance), GracefulStopCallback(stop)],
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.args.should_save:
            shutil.rmtree(Path(config.output_dir) / ".saving", ignore_errors=True)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        history = trainer.state.log_history
        if stop.requested and trainer.state.global_step < config.steps:
            at = f"{config.output_dir}/checkpoint-{trainer.state.global_step}"
            raise TrainingInterrupted(
                f"stopped as asked at step {trainer.state.global_step}, saved in {at}; go on with --resume"
            )
        if watched is not None and not any("eval_loss" in e and e["step"] == config.steps for e in history):
            trainer.evaluate()
    skips = trainer.skip_callback
    if not checkpoint and skips.skipped and skips.skipped == skips.attempted:
        raise FloatingPointError(
            f"none of the {skips.skipped} steps had a finite gradient, so nothing was trained or written. "
            "Lower learning_rate or beta, take precision bf16 or fp32, and look for broken rows"
        )
    trainer.save_result()
    if trainer.is_world_process_zero():
        name = Path(config.output_dir).name
        image_lines = None if policy.modality == "text" else policy.usage_snippet(resolve_asset(config.model), name)
        write_card(config, settings, text=policy.modality == "text", image_lines=image_lines)
    return TrainResult(Path(config.output_dir), tuple(trainer.state.log_history), settings, float(config.beta))


def run_summary(policy: Policy, config: TrainConfig, rows: int) -> dict[str, str]:
    """What the run says of itself before it starts."""
    trained = sum(tensor.numel() for tensor in policy.model.parameters() if tensor.requires_grad)
    every = sum(tensor.numel() * tensor.element_size() for tensor in policy.model.parameters())
    copies = 2 if resolve_reference_name(config) == "frozen_copy" else 1
    commit = resolve_commit(resolve_asset(config.model), revision=config.revision)
    unknown = {"effective beta": "measured on the first pairs before the first step"} if config.beta == AUTO else {}
    return {
        **({"revision": commit} if commit else {}),
        "pairs": f"{config.pairs}, {rows} to train on",
        "steps": f"{config.steps} of {config.batch_size} x {config.accumulate} pairs a process",
        "objective": f"{config.objective}{f' + {config.sft_weight:g} sft' if config.sft_weight else ''}",
        "reference": resolve_reference_name(config),
        "tuning": f"{config.tuning}, {trained:,} parameters train",
        "memory": f"about {(copies * every + 12 * trained) / 2**20:,.0f} MiB for weights, gradients and Adam, activations beside it",
        **policy.describe(config),
        **unknown,
    }


def dry_run(config: TrainConfig) -> dict[str, str]:
    """What `train` would do, without training: the same lines that a run says of itself.

    Raises ValueError for everything that `train` would refuse but a picture that does not decode.
    """
    validate_config(config)
    policy = build_policy(config, weights=False)
    pairs = load_responses(config.pairs) if policy.modality == "text" else drop_ties(load_pairs(config.pairs))
    rows, _ = split_by_prompt(pairs, config.eval_fraction, seed=config.seed)
    policy.prepare(config)
    summary = run_summary(policy, config, len(rows))
    if policy.modality == "image":
        summary |= estimate_memory_and_disk(policy, config, len(set(pairs["prompt"])), len(pairs))
    return summary

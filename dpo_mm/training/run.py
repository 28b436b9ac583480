"""A training run from its settings to its files: `dpo_mm.train`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PrinterCallback

from dpo_mm.assets import path_for_others
from dpo_mm.config import TrainConfig, as_dict, default_settings
from dpo_mm.data.load_pairs import UndecodableImageError
from dpo_mm.data.row_digest import digest, row_digests
from dpo_mm.data.several_captions import texts_of
from dpo_mm.errors import TrainingInterrupted
from dpo_mm.files.cache_folder import cache_folder
from dpo_mm.files.content_key import check_ingredients, content_hash
from dpo_mm.files.outputs import OutputKind, differences, output_folder, refuse_foreign_folder
from dpo_mm.policies.diffusion.prompt_limits import truncated_prompts
from dpo_mm.policies.protocol import ImagePolicy, TextPolicy
from dpo_mm.printing.notebook_html import table_of_values
from dpo_mm.printing.progress import progress_bar
from dpo_mm.process.interruption import StopRequest, complete_part, stop_on_signal
from dpo_mm.process.process_rank import process_rank
from dpo_mm.training.attention_kernels import without_cudnn_attention
from dpo_mm.training.auto_beta import AUTO, measure_beta
from dpo_mm.training.best_weights import BEST_FOLDER
from dpo_mm.training.builders import (
    build_policy,
    refuse_fsdp_on_cpu,
    steps_of_epochs,
    training_arguments,
    validate_config,
)
from dpo_mm.training.callbacks import GracefulStopCallback, ProgressBarCallback
from dpo_mm.training.checkpoints import (
    CONFIG_FILE,
    LOG_FILE,
    check_same_content,
    check_same_recipe,
    check_steps,
    latest_complete_checkpoint,
    newest_first,
)
from dpo_mm.training.compilation import compiled
from dpo_mm.training.coupled_rows import CoupledRows
from dpo_mm.training.dropped_rows import DroppedRows, explain_loader_errors, rows_of_run
from dpo_mm.training.encoding import EncodedSplits, encode_splits
from dpo_mm.training.evaluation_split import split_digests
from dpo_mm.training.feature_cache import cache_vision_features
from dpo_mm.training.memory_plan import image_lines, response_lines
from dpo_mm.training.model_card import generating_lines, write_card
from dpo_mm.training.pair_stream import PairStream, eval_stream, training_stream
from dpo_mm.training.progress_page import ProgressPageCallback
from dpo_mm.training.reference import precompute_reference_log_probs
from dpo_mm.training.response_rows import describe_lengths, stream_rows
from dpo_mm.training.run_inputs import FileInputs, RunInputs, run_content
from dpo_mm.training.run_plan import run_summary
from dpo_mm.training.samples import SAMPLES_FOLDER, free_sample_settings, sample_callback
from dpo_mm.training.tracking import TRACKING_SETTINGS
from dpo_mm.training.trainer import PreferenceTrainer
from dpo_mm.training.training_rows import TrainingRows

logger = logging.getLogger(__name__)
TRAINING = OutputKind(
    CONFIG_FILE,
    "trained",
    parts=("checkpoint-*", BEST_FOLDER, SAMPLES_FOLDER),
    free=("output_dir", "resume", "overwrite", "workers", *TRACKING_SETTINGS),
    defaults=default_settings(TrainConfig),
)


ShowPlan = Callable[[dict[str, str]], object]
"""Function that shows a run's summary."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the adapter's folder, the log history, the run's summary, and beta."""

    folder: Path
    history: tuple[dict[str, float], ...]
    settings: dict[str, str]
    beta: float

    def __repr__(self) -> str:
        last = "".join(f", {name}={value:.4g}" for name, value in self._last_values().items())
        return f"TrainResult({str(self.folder)!r}{last}, beta={self.beta:g})"

    def _repr_html_(self) -> str:
        last = {name: f"{value:.4g}" for name, value in self._last_values().items()}
        return table_of_values("Trained", {"result": self.folder, **last, **self.settings})

    def _last_values(self) -> dict[str, float]:
        """Last value in the log of the step, the losses and the accuracy."""
        newest = {name: value for entry in self.history for name, value in entry.items()}
        return {name: newest[name] for name in ("step", "loss", "eval_loss", "rewards/accuracies") if name in newest}


def train(config: TrainConfig, *, show_plan: ShowPlan | None = None) -> TrainResult:
    """Train as the config says and write the result to its output_dir.

    Args:
        config: settings of the run.
        show_plan: called with the run's summary in the first process, before the first step, and with what the end adds to it.

    Returns:
        The adapter's folder, the log history, the run's summary, and beta.

    Raises:
        ValueError: if a setting, a file or a row is invalid, before anything is trained. It names what and where.
        FloatingPointError: if no step, or twenty steps in a row, had a finite gradient.
        TrainingInterrupted: after SIGTERM or Ctrl-C, when a checkpoint is saved.
    """
    return run_training(config, FileInputs(config), show_plan=show_plan).result


class FinishedRun(NamedTuple):
    """A run's result and, if its steps were made just now, its trainer."""

    result: TrainResult
    trainer: PreferenceTrainer | None


def run_training(config: TrainConfig, inputs: RunInputs, *, show_plan: ShowPlan | None = None) -> FinishedRun:
    """Train a model on rows as the config says, see `train`.

    Args:
        config: settings of the run.
        inputs: model and rows.
        show_plan: as in `train`.

    Raises:
        ValueError, FloatingPointError, TrainingInterrupted: as `train`.
    """
    validate_config(config, inputs.family, has_eval_rows=inputs.has_eval_rows)
    refuse_fsdp_on_cpu(config)
    if config.resume and config.overwrite:
        raise ValueError("resume and overwrite exclude each other: resume continues what overwrite removes")
    folder = Path(config.output_dir)
    kind = dataclasses.replace(TRAINING, free=(*TRAINING.free, *free_sample_settings(config)))
    settings = json.loads(json.dumps(as_dict(config)))
    changed = bool(differences(folder, kind, settings))
    if config.resume:  # `check_same_recipe` compares the settings
        kind = dataclasses.replace(kind, free=tuple(settings))
    with output_folder(
        folder,
        kind,
        settings,
        inputs=inputs.paths,
        overwrite=config.overwrite,
        continues=config.resume and changed,
    ) as finished:
        checkpoint = (
            None if config.overwrite or (finished and not config.resume) else latest_complete_checkpoint(folder)
        )
        if config.resume and checkpoint is None:
            raise ValueError(
                f"resume: {folder} has no checkpoint to continue from. Leave out resume to train from the beginning"
            )
        with stop_on_signal(lambda: _saved_so_far(config, None)):
            if finished:
                return FinishedRun(_finished_result(config, inputs, show_plan), None)
            return _train(config, inputs, checkpoint, show_plan)


def _finished_result(config: TrainConfig, inputs: RunInputs, show_plan: ShowPlan | None) -> TrainResult:
    """Read the result of an earlier run with the same settings.

    Raises:
        ValueError: if its pairs, the model or a library version have changed.
    """
    folder = Path(config.output_dir)
    record = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    content = run_content(inputs, config) | {"pairs": _pairs_digest(inputs, record.get("dropped_rows") or [])}
    check_same_content(folder, record["content"], content, config)
    log = json.loads((folder / LOG_FILE).read_text(encoding="utf-8"))
    beta = float(record["measured_beta"] or record["beta"])
    if show_plan is not None and process_rank().is_first:
        show_plan(log["summary"])
    return TrainResult(folder, tuple(log["history"]), log["summary"], beta)


def _pairs_digest(inputs: RunInputs, recorded: Sequence[Mapping[str, Any]]) -> str:
    """Digest of the pairs as `encode_splits` returns it, without encoding them."""
    loaded = inputs.load_rows()
    if "chosen" in loaded.every.column_names:
        return content_hash(row_digests(loaded.every, recorded))
    return content_hash(split_digests([loaded.train, loaded.evaluation]))


def _train(config: TrainConfig, inputs: RunInputs, checkpoint: Path | None, show_plan: ShowPlan | None) -> FinishedRun:
    """Train from the beginning, or from a checkpoint of the same recipe, and write the result."""
    pairs_per_step = config.batch_size * config.accumulate * training_arguments(config).world_size
    saved_state = check_same_recipe(checkpoint, config, pairs_per_step=pairs_per_step) if checkpoint else {}
    content = run_content(inputs, config)
    if checkpoint:  # before the pairs are encoded, which takes long
        check_same_content(checkpoint, saved_state["content"], content, config)
        if config.num_train_epochs is None:
            check_steps(checkpoint, config)
    loaded = inputs.load_rows()  # before the model, because its rows may not fit the objective
    policy = inputs.load_policy()
    splits = _encode_once(policy, config, saved_state.get("dropped_rows") or [], loaded)
    content |= {"pairs": splits.digest, "encoded rows": splits.encoded_digest}
    check_ingredients("training run", {"settings": config, **content})
    if checkpoint:
        check_same_content(checkpoint, saved_state["content"], content, config)
    run_state = {
        "content": content,
        "pairs_per_step": pairs_per_step,
        "measured_beta": saved_state.get("measured_beta"),
    }
    with stop_on_signal(lambda: _saved_so_far(config, splits)), contextlib.ExitStack() as stack:
        stack.enter_context(without_cudnn_attention())
        return _train_on(splits, loaded, policy, config, inputs, run_state, checkpoint, show_plan, stack)


def _train_on(
    splits: EncodedSplits,
    loaded: TrainingRows,
    policy: ImagePolicy | TextPolicy,
    config: TrainConfig,
    inputs: RunInputs,
    run_state: dict[str, Any],
    checkpoint: Path | None,
    show_plan: ShowPlan | None,
    stack: contextlib.ExitStack,
) -> FinishedRun:
    """Train on encoded pairs, from a checkpoint if there is one, and save the result. `stack` ends with the run."""
    samples = sample_callback(policy, config)
    policy.free_encoders()
    policy.prepare(config)
    compilation = stack.enter_context(compiled(policy, config, training_stream(config, splits.rows, 1)))
    train_rows, eval_rows = _with_frozen_outputs(policy, config, splits)
    measured = None
    if config.beta == AUTO:
        in_random_order = dataclasses.replace(config, train_sampling_strategy="random")  # for one process and several
        stream = training_stream(in_random_order, train_rows, 1)
        measured = run_state["measured_beta"] or measure_beta(policy, stream, config)
    run_state = {**run_state, "beta": config.beta, "steps": config.steps, "measured_beta": measured}
    config = config if measured is None else dataclasses.replace(config, beta=measured)
    config = steps_of_epochs(config, len(train_rows), training_arguments(config).world_size)
    if checkpoint and config.num_train_epochs is not None:
        check_steps(checkpoint, config)
    summary = run_summary(policy, config, loaded, len(train_rows), commit=inputs.commit) | compilation
    if cut := getattr(splits.rows, "truncated_prompts", ""):
        logger.warning("prompts: %s", cut)
        summary |= {"truncated prompts": cut}
    callbacks = [*inputs.callbacks, ProgressPageCallback(config, summary)]
    given: dict[str, Any] = {"callbacks": callbacks, "reference_model": inputs.reference_model}
    trainer = PreferenceTrainer(policy, config, train_rows, eval_rows, run_state=run_state, samples=samples, **given)
    name, text = Path(config.output_dir).name, policy.modality == "text"
    code = None
    if policy.modality == "image":
        code = policy.usage_snippet(path_for_others(config.model), name)
        code += generating_lines(edits=policy.is_image_editing, clips=policy.frames > 1)
    if show_plan is not None and process_rank().is_first:
        show_plan(summary)
    card = lambda folder: write_card(config, summary, text=text, image_lines=code, into=folder)
    with complete_part(lambda: f"The run is complete and its result is in {config.output_dir}") as stop:
        _fit(trainer, checkpoint, stop)
        if trainer.best_weights is not None:
            result_lines = trainer.best_weights.restore(trainer.state.log_history)
            summary |= result_lines
            if show_plan is not None and process_rank().is_first:
                show_plan(result_lines)
        trainer.save_result(summary, card)
    result = TrainResult(Path(config.output_dir), tuple(trainer.history()), summary, float(config.beta))
    return FinishedRun(result, trainer)


def _saved_so_far(config: TrainConfig, splits: EncodedSplits | None) -> str:
    """Describe what is on disk before the first step of this process."""
    if checkpoints := newest_first(Path(config.output_dir)):
        return f"{checkpoints[0]} is unchanged"
    cache = getattr(splits and splits.rows, "folder", None)
    return f"The encoded pairs are in {cache}" if cache else ""


def _encode_once(
    policy: ImagePolicy | TextPolicy,
    config: TrainConfig,
    recorded: Sequence[Mapping[str, Any]],
    loaded: TrainingRows,
) -> EncodedSplits:
    """Encode the pairs. Text has no shared cache, so the first process encodes before the others."""
    if policy.modality == "image":
        return encode_splits(policy, config, loaded=loaded)
    with training_arguments(config).main_process_first(desc="encoding"):
        return encode_splits(policy, config, recorded, loaded=loaded)


def _with_frozen_outputs(
    policy: ImagePolicy | TextPolicy, config: TrainConfig, splits: EncodedSplits
) -> tuple[Any, Any]:
    """Training and evaluation rows with cached vision features and precomputed reference log-probs, if configured.

    Rows on disk are wrapped, so that a row that breaks in the run is dropped or named.
    """
    train_rows, eval_rows = splits.rows, splits.eval_rows
    dropped = DroppedRows(Path(config.output_dir), config.undecodable_images, splits.row_digests)
    if config.cache_vision_features and policy.modality == "text":
        features = functools.partial(
            cache_vision_features, policy, config=config, cache=cache_folder(), dropped=dropped
        )
        train_rows, eval_rows = _of_each_kind(features, train_rows), eval_rows and _of_each_kind(features, eval_rows)
    if config.reference == "precomputed":
        samples = 1 if policy.modality == "text" else config.fixed_draws_per_row
        stream = dataclasses.replace(training_stream(config, train_rows, 1), num_fixed_draws=samples)
        train_rows = precompute_reference_log_probs(policy, stream, config, dropped)
        if eval_rows is not None:
            stream = eval_stream(eval_rows, config, modality=policy.modality)
            eval_rows = precompute_reference_log_probs(policy, stream, config, dropped)
    return rows_of_run(train_rows, dropped), eval_rows and rows_of_run(eval_rows, dropped)


def _of_each_kind(compute: Callable[[Any], Any], rows: Any) -> Any:
    """Apply a function to rows, or to liked and disliked rows separately."""
    return CoupledRows(compute(rows.liked), compute(rows.disliked)) if isinstance(rows, CoupledRows) else compute(rows)


def _fit(trainer: PreferenceTrainer, checkpoint: Path | None, stop: StopRequest) -> None:
    """Train to the last step and evaluate at the end. If a stop is requested, save a checkpoint and raise."""
    config = trainer.config
    loaded = [part.rows for part in (trainer.train_dataset, trainer.eval_dataset) if isinstance(part, PairStream)]
    with explain_loader_errors(*loaded), progress_bar("training", config.steps) as advance:
        trainer.add_callback(ProgressBarCallback(advance))
        trainer.add_callback(GracefulStopCallback(stop))
        trainer.remove_callback(PrinterCallback)
        if trainer.args.should_save:
            shutil.rmtree(Path(config.output_dir) / ".saving", ignore_errors=True)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        if stop.requested and (step < config.steps or config.save_every):
            path = f"{config.output_dir}/checkpoint-{step}"
            raise TrainingInterrupted(stop.number, f"It stopped after step {step} and saved {path}")
        history = trainer.state.log_history
        if trainer.eval_dataset is not None and not any("eval_loss" in e and e["step"] == step for e in history):
            trainer.evaluate()
    skips = trainer.skip_callback
    if not checkpoint and skips.skipped and skips.skipped == skips.attempted:
        raise FloatingPointError(
            f"none of the {skips.skipped} steps had a finite gradient, so nothing was trained or written. "
            "Lower learning_rate or beta, use precision bf16 or fp32, and look for broken rows"
        )


def dry_run(config: TrainConfig, *, vram: float | None = None) -> dict[str, str]:
    """Return the summary of a run without training it, with estimates of memory and disk.

    Args:
        config: settings of the run.
        vram: memory of the GPU to fit, in GB of 2^30 bytes. None: that of the GPU at hand.

    Raises:
        ValueError: as `train`, except for images that do not decode.
    """
    planned = config if vram is None else dataclasses.replace(config, quantize=None)  # this machine may not have it
    inputs = FileInputs(config)
    validate_config(planned, inputs.family)
    refuse_foreign_folder(Path(config.output_dir), TRAINING, inputs=inputs.paths)
    loaded = inputs.load_rows()
    policy = build_policy(planned, weights=False)
    pairs, train_rows = loaded.every, loaded.train
    policy.prepare(config)
    config = steps_of_epochs(config, loaded.items, training_arguments(config).world_size)
    summary = run_summary(policy, config, loaded, loaded.items, commit=inputs.commit)
    if policy.modality == "image":
        texts = texts_of(pairs)
        if cut := truncated_prompts(policy, texts):
            summary |= {"truncated prompts": cut}
        encoded_pairs = -(-len(pairs) // 2) if loaded.kind == "liked" else len(pairs)
        summary |= image_lines(config, len(set(texts)), encoded_pairs, vram=vram)
    else:
        rows = stream_rows(policy, train_rows, config, cache_folder(), content=[digest(pairs), 0], dropped=[])
        summary |= {"tokens": describe_lengths(rows.lengths)}
        with contextlib.suppress(UndecodableImageError):
            longest = rows[max(range(len(rows)), key=lambda number: rows.lengths[number])]
            longest |= {"disliked": longest} if loaded.kind == "liked" else {}
            summary |= response_lines(config, longest, vram=vram)
    return summary

"""A trainer for models and rows that are loaded already, with the arguments of TRL's DPOTrainer."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.config.dpo_config import DPOConfig
from dpo_mm.files.checksums import complete_files
from dpo_mm.files.outputs import refuse_foreign_folder
from dpo_mm.policies.given_models import check_processing_class, given_name, is_pipeline
from dpo_mm.training.checkpoints import move_into_place
from dpo_mm.training.given_inputs import GivenInputs
from dpo_mm.training.given_rows import EVALUATION, TRAIN, check_dataset
from dpo_mm.training.run import TRAINING, FinishedRun, TrainResult, run_training

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, TrainerCallback

    from dpo_mm.policies.given_models import GivenModel, ProcessingClass

LORA_FIELDS = {"r": "lora_rank", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
"""Fields of PEFT's LoraConfig, and the settings that they set."""
FREE_FIELDS = ("peft_type", "task_type", "inference_mode", "target_modules", "base_model_name_or_path", "revision")
"""Fields of PEFT's LoraConfig that do not change what is trained, or are translated separately."""


class DPOTrainer:
    """Train a loaded model on loaded rows. It makes the same run as `dpo_mm.train`, with the same checks and files.

    Args:
        model: a model of transformers, or a pipeline of diffusers. A LoRA is attached to it, or all of its weights change.
        args: settings.
        train_dataset: preference rows, as TRL writes them (prompt, chosen, rejected, texts or messages, with images or
            image), or pairs of images (prompt, image_a, image_b, preference, or as Pick-a-Pic). Other formats that
            `dpo-mm train --pairs` reads are accepted too.
        eval_dataset: rows to evaluate on. None: those that `eval_fraction` splits off, by default none.
        processing_class: processor of a model that takes images, or tokenizer of another model of transformers.
        peft_config: a LoraConfig of PEFT, in place of the settings of the LoRA. None: those of args, by default a LoRA of
            rank 16. tuning="full" trains all weights.
        ref_model: frozen reference for tuning="full", of the same class. None: the model from before the first step.
        callbacks: further callbacks of transformers' Trainer.

    Raises:
        ValueError: if an argument has the wrong type, or does not go with another one.
    """

    def __init__(
        self,
        model: GivenModel,
        *,
        args: DPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: ProcessingClass | None = None,
        peft_config: PeftConfig | None = None,
        ref_model: GivenModel | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
    ) -> None:
        if not isinstance(args, DPOConfig):
            raise ValueError(f"args is a {type(args).__name__}. Expected dpo_mm.DPOConfig(output_dir=...)")
        image = is_pipeline(model)
        check_dataset(train_dataset, TRAIN)
        if eval_dataset is not None:
            check_dataset(eval_dataset, EVALUATION)
        if not image:
            check_processing_class(model, processing_class)  # type: ignore[arg-type]
        elif processing_class is not None:
            raise ValueError("processing_class has no effect, because a pipeline has its processors. Leave it out")
        if peft_config is not None and ref_model is not None:
            raise ValueError("ref_model has no use with peft_config: the reference is the model without its LoRA")
        self.args = args if peft_config is None else _with_lora(args, peft_config)
        config = self.args.named(given_name(model), TRAIN)
        objects = (model, processing_class, train_dataset, eval_dataset, ref_model, list(callbacks or ()))
        self._inputs = GivenInputs(config, *objects)
        self._inputs.check_reference()
        self._device = getattr(model, "device", "cpu")
        self._run: FinishedRun | None = None

    def __repr__(self) -> str:
        state = "not trained yet" if self._run is None else repr(self._run.result)
        return f"DPOTrainer({type(self._inputs.model).__name__}, {self.args.output_dir!r}, {state})"

    @property
    def model(self) -> GivenModel:
        """The model: after `train` the PeftModel around it, or the pipeline with its LoRA."""
        if self._run is None or self._inputs.family.modality == "image":
            return self._inputs.model
        tuned: PreTrainedModel = self._inputs.policy.model  # type: ignore[assignment]
        return tuned

    def train(self) -> TrainResult:
        """Train, and write the result to `output_dir`, as `dpo_mm.train`.

        A result of the same settings, model and rows that is in `output_dir` is loaded instead.

        Returns:
            The adapter's folder, the log history, the run's summary, and beta.

        Raises:
            ValueError: if a setting or a row is invalid, before anything is trained.
            FloatingPointError: if no step, or twenty steps in a row, had a finite gradient.
            TrainingInterrupted: after SIGTERM or Ctrl-C, when a checkpoint is saved.
        """
        if self._run is None:
            inputs = self._inputs
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's
                run = run_training(inputs.config, inputs)
            if run.trainer is None:  # an earlier result
                policy = inputs.policy
                policy.prepare(inputs.config)
                policy.load_weights(run.result.folder)
            self._run = run
            if not (run.trainer is not None and run.trainer.is_fsdp_enabled):
                self._place_model()
        return self._run.result

    def _place_model(self) -> None:
        """Move a pipeline, whose parts were moved one by one, back to where it was."""
        pipe: Any = self._inputs.model
        if self._inputs.family.modality == "image":
            pipe.to(self._device)

    def evaluate(self) -> dict[str, float]:
        """Compute loss and metrics on the evaluation rows with the trained weights, at noise and timesteps that never change.

        Raises:
            ValueError: if nothing was trained by this object, or there are no evaluation rows.
        """
        trainer = self._run and self._run.trainer
        if trainer is None:
            when = "Call train first" if self._run is None else "The result of an earlier run has them in its history"
            raise ValueError(f"evaluate: this object has trained nothing yet. {when}")
        if trainer.eval_dataset is None:
            raise ValueError("evaluate: there are no evaluation rows. Give eval_dataset, or set eval_fraction")
        trainer.policy.model.to(trainer.args.device)
        metrics = trainer.evaluate()
        self._place_model()
        return metrics

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Copy the result to another folder: the adapter or model, its card, its settings and its log.

        Args:
            output_dir: the folder. None, or that of the settings: the result is there already.

        Returns:
            The folder.

        Raises:
            ValueError: if nothing was trained yet, or the folder has files of others.
        """
        if self._run is None:
            raise ValueError("save_model: nothing was trained yet. Call train first")
        result = self._run.result.folder
        folder = Path(output_dir or result)
        if folder.resolve() != result.resolve():
            refuse_foreign_folder(folder, TRAINING, inputs=self._inputs.paths)
            aside = folder / ".saving"
            for name in [*complete_files(result), "complete.json"]:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(result / name, aside / name)
            move_into_place(aside, folder)
            aside.rmdir()
        return folder


def _with_lora(args: DPOConfig, peft_config: PeftConfig) -> DPOConfig:
    """Return the settings with those of a LoraConfig.

    Raises:
        ValueError: if it is not a LoRA, has a field that is not supported, or another value than a setting.
    """
    from peft import LoraConfig

    if type(peft_config) is not LoraConfig:
        raise ValueError(f"peft_config is a {type(peft_config).__name__}. Expected a LoraConfig of PEFT")
    if args.tuning != "lora":
        raise ValueError(f"peft_config has no effect, because tuning is {args.tuning}. Remove one of the two")
    plain, given = LoraConfig(), vars(peft_config)
    for name, value in vars(plain).items():
        if name not in (*LORA_FIELDS, *FREE_FIELDS) and given[name] != value:
            raise ValueError(f"peft_config: {name} is {given[name]!r}, and only {value!r} is supported. Leave it out")
    values: dict[str, Any] = {field: given[name] for name, field in LORA_FIELDS.items()}
    targets = peft_config.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        raise ValueError(f"peft_config: target_modules is {targets!r}. Expected a list of names, or 'all-linear'")
    values["lora_targets"] = None if targets is None or isinstance(targets, str) else tuple(sorted(targets))
    defaults = DPOConfig(args.output_dir)
    for name, value in values.items():
        if getattr(args, name) not in (getattr(defaults, name), value):
            raise ValueError(
                f"{name} is {getattr(args, name)!r} in args and {value!r} in peft_config. Give only one of them"
            )
    return dataclasses.replace(args, **values)

"""Samples while a model trains: images of fixed prompts and seeds, or responses to fixed questions, next to those of the start.

Sampling uses its own random numbers, so the trained weights are the same with and without it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import open_image
from dpo_mm.data.lazy_images import LazyImages
from dpo_mm.data.prompts import PromptSpec, read_prompt_set, seeds_of
from dpo_mm.data.questions import Question, read_questions
from dpo_mm.data.schema import Response
from dpo_mm.evaluation.contact_sheet import mark_of, strips
from dpo_mm.files.checksums import write_with_checksum
from dpo_mm.judges import check_outputs, check_prompts, load_judge
from dpo_mm.judges.score_checks import image_scores, response_ratios
from dpo_mm.policies.diffusion.placement import move
from dpo_mm.policies.diffusion.prompt_sources import check_prompt_sources, images_to_edit
from dpo_mm.policies.protocol import ImagePolicy, Modality, TextPolicy
from dpo_mm.process.process_rank import process_rank
from dpo_mm.training.tracking import show_samples

SAMPLES_FOLDER = "samples"
SAMPLE_SETTINGS = (
    "sample_prompts", "sample_questions", "sample_steps", "sample_judges", "num_inference_steps", "guidance_scale", "max_new_tokens"
)  # fmt: skip
"""Settings of the samples."""
METRIC = "samples/"
"""Beginning of the log keys of the samples' scores. The name of the judge follows."""
NUM_SAMPLES = 8
"""Largest number of prompts or questions."""
COLUMNS = 10
"""Largest number of steps that a strip shows: the first, the last, and others between them."""
STRIP_FILE, RESPONSES_FILE, RECORD_FILE = "strip.png", "responses.md", "samples.json"


class Samples(NamedTuple):
    """Outputs at one step and their scores by judge, one number per output, or None if the judge skips it."""

    outputs: Sequence[Image.Image] | Sequence[Response]
    scores: Mapping[str, Sequence[float | None]]


def free_sample_settings(config: TrainConfig) -> tuple[str, ...]:
    """Return the settings of the samples if they do not change what a run computes: unless a sample chooses the best weights."""
    return () if str(config.metric_for_best_model).startswith(METRIC) else SAMPLE_SETTINGS


def validate_samples(config: TrainConfig, *, modality: Modality) -> None:
    """Refuse settings of samples that cannot be used. Raises ValueError."""
    source = config.sample_prompts if modality == "image" else config.sample_questions
    setting = "sample_prompts" if modality == "image" else "sample_questions"
    for name in ("sample_steps", "sample_judges"):
        if getattr(config, name) and source is None:
            raise ValueError(f"{name} has no effect without {setting}. Remove one of the two settings")
    if source is None:
        return
    for judge in config.sample_judges:
        load_judge(judge)
        check_outputs(judge, "images" if modality == "image" else "responses")
    if modality == "image":
        check_prompts(config.sample_judges, [prompt.text for prompt in _sample_prompts(source)])
    else:
        read_questions(source, limit=1)


class SampleCallback(TrainerCallback):
    """Generate, save and log samples before the first step, every `sample_steps` steps, and after the last step.

    Args:
        config: settings of the run.
        generate: function that generates and scores the samples of the current weights.
        titles: prompt of each sample.
        sources: images to edit of each sample. Empty: the prompts have none.
    """

    def __init__(
        self,
        config: TrainConfig,
        generate: Callable[[], Samples],
        titles: Sequence[str],
        sources: Sequence[LazyImages] = (),
    ) -> None:
        self.config, self.generate, self.titles, self.sources = config, generate, titles, sources
        self.folder = Path(config.output_dir) / SAMPLES_FOLDER
        self.log: Callable[[dict[str, float]], None] = lambda logs: None
        self.callbacks: Sequence[TrainerCallback] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._sample(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.config.sample_steps
        if state.global_step == state.max_steps or (every and state.global_step % every == 0):
            is_logged = control.should_log  # a log of the samples would count as that of the step
            self._sample(state.global_step)
            control.should_log = is_logged

    def _sample(self, step: int) -> None:
        """Generate, save and log the samples of a step in the first process."""
        if not process_rank().is_first:
            return
        # Sizes in generation differ from those of training, for which blocks are compiled.
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()
        with eager:
            samples = _without_side_effects(self.generate)
        self.folder.mkdir(exist_ok=True)
        steps = _add_to_record(self.folder / RECORD_FILE, step, samples)
        images = [output for output in samples.outputs if isinstance(output, Image.Image)]
        for number, image in enumerate(images):
            with write_with_checksum(self._image_file(step, number)) as temporary:
                image.save(temporary, format="PNG")
        if images:
            self._write_strip(steps)
        else:
            with write_with_checksum(self.folder / RESPONSES_FILE) as temporary:
                temporary.write_text(_responses_page(self.titles, steps), encoding="utf-8")
        self.log(
            {
                f"{METRIC}{judge}": mean
                for judge, values in samples.scores.items()
                if (mean := _mean(values)) is not None
            }
        )
        outputs: Sequence[Image.Image | Response] = samples.outputs
        shown = {
            f"{METRIC}{number} {title[:60]}": output.text if isinstance(output, Response) else output
            for number, (title, output) in enumerate(zip(self.titles, outputs, strict=True), start=1)
        }
        for callback in self.callbacks:
            show_samples(callback, step, shown)

    def _image_file(self, step: int, number: int) -> Path:
        return self.folder / f"step-{step:06d}-{number + 1}.png"

    def _write_strip(self, steps: dict[int, dict[str, Any]]) -> None:
        """Draw the images of all steps as one strip per prompt, the image to edit and those of the start first."""
        shown = [step for step in _spread(sorted(steps)) if self._image_file(step, 0).is_file()]
        rows = [
            [open_image(self._image_file(step, number).read_bytes()) for step in shown]
            for number in range(len(self.titles))
        ]
        scores = [next(iter(steps[step]["scores"].values()), [None] * len(self.titles)) for step in shown]
        exact = all(score in (None, 0, 1) for column in scores for score in column)
        marks = [[mark_of(column[number], exact) for column in scores] for number in range(len(self.titles))]
        heads = ["start" if step == 0 else f"step {step}" for step in shown]
        if any(self.sources):
            rows = [[sources[0], *row] for sources, row in zip(self.sources, rows, strict=True)]
            heads, marks = ["source", *heads], [["", *row] for row in marks]
        with write_with_checksum(self.folder / STRIP_FILE) as temporary:
            strips(rows, heads, self.titles, marks).save(temporary, format="PNG")


def sample_callback(policy: ImagePolicy | TextPolicy, config: TrainConfig) -> SampleCallback | None:
    """Make the callback of a run, or None if it has no samples. Call it before the policy releases its encoders.

    Raises:
        ValueError: as `check_prompt_sources`.
    """
    if policy.modality == "image":
        if config.sample_prompts is None:
            return None
        prompts = _sample_prompts(config.sample_prompts)
        titles, sources = [prompt.text for prompt in prompts], [prompt.sources for prompt in prompts]
        check_prompt_sources(policy, config.sample_prompts, titles, sources)
        return SampleCallback(config, _image_generator(policy, config, prompts), titles, sources)
    if config.sample_questions is None:
        return None
    questions = read_questions(config.sample_questions, limit=NUM_SAMPLES)
    titles = [question.prompt if isinstance(question.prompt, str) else question.id for question in questions]
    return SampleCallback(config, lambda: _responses(policy, config, questions), titles)


def _sample_prompts(name: str) -> list[PromptSpec]:
    """Read the first prompts of all categories, in the order of the list."""
    used = {prompt.item for prompt in read_prompt_set(name, limit=NUM_SAMPLES).prompts}
    return [prompt for prompt in read_prompt_set(name).prompts if prompt.item in used]


def _image_generator(policy: ImagePolicy, config: TrainConfig, specs: Sequence[PromptSpec]) -> Callable[[], Samples]:
    """Return a function that generates images with the trained denoiser and the pipeline's other modules.

    The other modules are on the device only while images are generated.
    """
    whole = copy.copy(policy.pipe)  # shares the modules, and keeps those that the policy releases
    denoiser = next(name for name, part in whole.components.items() if part is policy.model)
    prompts, sources = [spec.text for spec in specs], [spec.sources for spec in specs]
    seeds = [seeds_of(spec.text, 1, seed=config.seed, sources=spec.sources.file_hashes)[0] for spec in specs]

    def generate() -> Samples:
        others = {
            name: part
            for name, part in whole.components.items()
            if isinstance(part, torch.nn.Module) and name not in (denoiser, *policy.trained_encoders)
        }
        device, training = policy.device, policy.pipe
        sampling = copy.copy(whole)
        sampling.scheduler = copy.deepcopy(whole.scheduler)
        setattr(sampling, denoiser, policy.model)
        policy.pipe = sampling
        move(others, device)
        try:
            batches = policy.sample(
                prompts, seeds, steps=config.num_inference_steps, guidance=config.guidance_scale, batch_size=config.batch_size,
                **images_to_edit(sources),
            )  # fmt: skip
            images = [image for batch in batches for image in batch]
        finally:
            policy.pipe = training
            if device.type != "cpu":
                move(others, torch.device("cpu"))
        return Samples(
            images, {name: image_scores(name, images, prompts, sources).tolist() for name in config.sample_judges}
        )

    return generate


def _responses(policy: TextPolicy, config: TrainConfig, questions: Sequence[Question]) -> Samples:
    """Generate greedy responses to the questions and score them. A score is hits divided by the total, None without a total."""
    responses = policy.generate(
        [question.images for question in questions],
        [question.prompt for question in questions],
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        batch_size=config.batch_size,
    )
    scores: dict[str, list[float | None]] = {}
    for name in config.sample_judges:
        ratios = response_ratios(name, responses, [question.ground_truths for question in questions]).tolist()
        scores[name] = [hits / total if total else None for hits, total in ratios]
    return Samples(responses, scores)


def _mean(scores: Sequence[float | None]) -> float | None:
    """Mean of the scores that there are, None if there is none."""
    values = [score for score in scores if score is not None]
    return float(np.mean(values)) if values else None


def _without_side_effects(generate: Callable[[], Samples]) -> Samples:
    """Call a function without gradients, and restore the state of all random generators."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            return generate()
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _add_to_record(file: Path, step: int, samples: Samples) -> dict[int, dict[str, Any]]:
    """Add a step to the record of all steps, and return it by step. A damaged record starts again."""
    try:
        steps = {int(key): dict(value) for key, value in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        steps = {}
    responses = [output._asdict() for output in samples.outputs if isinstance(output, Response)]
    steps[step] = {"scores": samples.scores, **({"responses": responses} if responses else {})}
    steps = {key: steps[key] for key in sorted(steps) if key <= step}
    with write_with_checksum(file) as temporary:
        temporary.write_text(json.dumps(steps, indent=1, ensure_ascii=False), encoding="utf-8")
    return steps


def _spread(steps: list[int]) -> list[int]:
    """Return at most COLUMNS of the steps: the first, the last, and others at equal distances."""
    if len(steps) <= COLUMNS:
        return steps
    return [steps[round(position)] for position in np.linspace(0, len(steps) - 1, COLUMNS)]


def _responses_page(titles: Sequence[str], steps: dict[int, dict[str, Any]]) -> str:
    """Write the responses of all steps as Markdown, one section per question."""
    lines = ["# Responses while the model trains", ""]
    for number, title in enumerate(titles):
        lines += [f"## {number + 1}. {' '.join(title.split())[:200]}", ""]
        for step in _spread(sorted(steps)):
            by_judge = {name: values[number] for name, values in steps[step]["scores"].items()}
            scores = [f"{name} {score:.3g}" for name, score in by_judge.items() if score is not None]
            text = steps[step]["responses"][number]["text"]
            fence = "~" * max(3, text.count("~") + 1)
            lines += [f"**{'start' if step == 0 else f'step {step}'}** {', '.join(scores)}", "", fence, text, fence, ""]
    return "\n".join(lines)

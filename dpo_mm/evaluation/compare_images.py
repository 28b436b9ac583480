"""Compare base and tuned image generators on the same held-out prompts and seeds.

`image_sampling` generates and scores the images. The functions here compare the scores, and `compare_images` runs all
of it and writes the report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dpo_mm.config import CompareConfig
from dpo_mm.evaluation.answer import provenance_line
from dpo_mm.evaluation.image_examples import examples, most_changed
from dpo_mm.evaluation.image_sampling import ImageSampler, SamplingPlan, ScoredImages, sampling_plan
from dpo_mm.evaluation.image_statistics import IMAGE_STATISTICS, METRICS, pairwise_distance
from dpo_mm.evaluation.image_store import FOLDER, MANIFEST, ImageStore
from dpo_mm.evaluation.report import Report, write_report
from dpo_mm.evaluation.side_sets import name_side_sets, note_side_sets, read_sets, with_side_sets
from dpo_mm.evaluation.statistics import BASE_AND_TUNED, Comparison, holm_corrected, paired
from dpo_mm.evaluation.sweep import SweepPoint, advice, correct_points, mark_recommended
from dpo_mm.evaluation.verdict import (
    CompareResult,
    note_against_sft,
    note_training_judges,
    note_unconfirmed,
    run_summary,
    run_verdict,
)
from dpo_mm.files.outputs import write_results
from dpo_mm.judges import better_of, check_prompts, metric_of
from dpo_mm.judges.provenance import order_judges, training_judges_of_adapter
from dpo_mm.policies.adapter_sources import name_base
from dpo_mm.policies.diffusion.prompt_limits import truncated_prompts
from dpo_mm.policies.diffusion.prompt_sources import check_prompt_sources
from dpo_mm.policies.families import load_image_policy
from dpo_mm.policies.protocol import ImagePolicy
from dpo_mm.process.process_rank import process_rank

__all__ = ["CompareResult", "SamplingPlan", "ScoredImages", "compare_images", "sampling_plan"]

COLLAPSE = 0.9
"""Fraction of the base's diversity below which a gain of the primary metric counts as over-optimised."""
DRIFT = 0.1
"""Relative change of an image statistic from which a significant change gets a note."""
PIXELS = "pixels"
"""Judge's name in comparisons of diversity."""


def comparisons(
    base: ScoredImages,
    tuned: ScoredImages,
    config: CompareConfig,
    *,
    models: tuple[str, str] = BASE_AND_TUNED,
    training_judges: Sequence[str] = (),
) -> list[Comparison]:
    """Compare two models by each judge and by diversity, with intervals clustered by prompt.

    Args:
        base, tuned: scored images of the same plan.
        config: its first judge is the primary metric.
        models: names of the two models. There is no primary metric unless they are base and tuned.
        training_judges: judges that built the training pairs. Their comparisons are marked.

    Returns:
        One comparison per judge, then diversity, with p corrected for their number.
    """
    results = [
        dataclasses.replace(
            compare_scores(base, tuned, judge, metric=metric_of(judge), models=models),
            headline=judge == config.judges[0] and models == BASE_AND_TUNED,
            built_training_pairs=judge in training_judges,
        )
        for judge in config.judges
    ]
    return holm_corrected([*results, *compare_diversity(base, tuned, models=models)])


def compare_scores(
    base: ScoredImages,
    tuned: ScoredImages,
    judge: str,
    *,
    metric: str,
    models: tuple[str, str] = BASE_AND_TUNED,
) -> Comparison:
    """Compare two models by one judge, in the judge's better direction. metric: its name in the report."""
    return paired(
        base.scores[judge],
        tuned.scores[judge],
        clusters=base.plan.items,
        metric=metric,
        judge=judge,
        direction=better_of(judge),
        models=models,
        weights=base.plan.weights,
    )


def compare_diversity(
    base: ScoredImages, tuned: ScoredImages, *, models: tuple[str, str] = BASE_AND_TUNED
) -> list[Comparison]:
    """Compare the diversity of each prompt's images. Empty with one image per prompt."""
    if base.plan.samples < 2:
        return []
    prompts = base.plan.items[:: base.plan.samples]
    values = diversity(base), diversity(tuned)
    return [paired(*values, clusters=prompts, metric="diversity", judge=PIXELS, models=models)]


def diversity(scored: ScoredImages) -> np.ndarray:
    """Compute the mean pairwise pixel distance of each prompt's images, (prompts,)."""
    return pairwise_distance(scored.image_statistics.small, scored.plan.samples)


def compare_image_statistics(base: ScoredImages, tuned: ScoredImages) -> list[Comparison]:
    """Compare saturation, sharpness and file size, which have no better direction, with p corrected for their number."""
    prompts = base.plan.items
    results = [
        paired(
            getattr(base.image_statistics, name),
            getattr(tuned.image_statistics, name),
            clusters=prompts,
            metric=metric,
            judge=IMAGE_STATISTICS,
            direction="neutral",
        )
        for name, metric in METRICS.items()
    ]
    return holm_corrected(results)


def by_category(base: ScoredImages, tuned: ScoredImages, judge: str) -> list[Comparison]:
    """Compare by one judge within each category of at least two prompts, with p corrected for their number."""
    categories, prompts = base.plan.category_per_image, base.plan.items
    results = []
    for name in sorted(set(categories)):
        inside = categories == name
        if len(set(prompts[inside])) > 1:
            scores = base.scores[judge][inside], tuned.scores[judge][inside]
            comparison = paired(
                *scores, clusters=prompts[inside], metric=str(name), judge=judge, direction=better_of(judge)
            )
            results.append(comparison)
    return holm_corrected(results) if len(results) > 1 else []


def aa_control(base: ScoredImages, judge: str) -> Comparison | None:
    """Compare the base with itself under other seeds (A/A control). None with fewer than two images per prompt."""
    half = base.plan.samples // 2
    if half == 0:
        return None
    scores = base.scores[judge].reshape(-1, base.plan.samples)
    prompts = np.repeat(base.plan.items[:: base.plan.samples], half)
    first, second = scores[:, :half].ravel(), scores[:, half : 2 * half].ravel()
    name = f"A/A control: {metric_of(judge)}"
    return paired(first, second, clusters=prompts, metric=name, judge=judge, direction=better_of(judge))


def verdict(results: Sequence[Comparison]) -> str:
    """Return the verdict on a run.

    Args:
        results: comparisons of base and tuned.

    Returns:
        The verdict of `run_verdict`. Guardrail metrics are the other judges' metrics, and diversity if it collapsed.
    """
    primary = next(result for result in results if result.headline)
    sides = [result for result in results if result.side_set]
    here = [result for result in results if not result.headline and not result.side_set]
    guards = [result for result in here if result.judge not in (PIXELS, IMAGE_STATISTICS)]
    guards += [result for result in here if result.judge == PIXELS and result.tuned < COLLAPSE * result.base]
    return run_verdict(primary, guards, sides)


def compare_images(
    config: CompareConfig,
    *,
    title: str,
    command: str,
    sft_adapter: str | None = None,
    history: Sequence[dict[str, float]] = (),
    settings: dict[str, str] | None = None,
) -> CompareResult:
    """Generate, score and compare images, and write report.html, metrics.json and contact_sheet.png.

    An interrupted comparison resumes: images and scores on disk with the right hash are not made again.

    Args:
        config: what to compare.
        title: heading of the report.
        command: how to repeat the comparison, printed in the report.
        sft_adapter: folder of an adapter fine-tuned on the chosen side only, to compare with.
        history, settings: log and settings of the training run, for the report.

    Raises:
        ValueError: if a judge, the model, the adapter, the prompts or a setting is unknown or does not fit.
    """
    if process_rank().count > 1 and not config.save_images:
        raise ValueError(
            "save_images false needs one process: others may still read the images. Leave it out, or run in one"
        )
    training_judges = training_judges_of_adapter(config.adapter)
    config = dataclasses.replace(config, judges=order_judges(config.judges, training_judges))
    sets, store = read_plans(config), ImageStore(Path(config.output_dir) / FOLDER)
    plan = sets[0][1]
    sampler = ImageSampler(_load(config, config.adapter), config, store, config.adapter)
    for own, each in sets:
        check_prompt_sources(sampler.policy, own.prompts, each.prompts, each.sources)
    bases = _generate(_base_sampler(sampler), sets, scale=float(config.base_adapter is not None), label="base")
    tuneds = _generate(sampler, sets, scale=1.0, label="tuned") if config.adapter else bases
    base, tuned = bases[0], tuneds[0]
    primary, *sides = [
        (own, comparisons(before, after, own, training_judges=training_judges))
        for (own, _), before, after in zip(sets, bases, tuneds, strict=True)
    ]
    results = with_side_sets(primary[1], sides) + compare_image_statistics(base, tuned)
    run, notes = verdict(results), note_training_judges(results) + note_side_sets(results) + image_notes(results)
    if cut := truncated_prompts(sampler.policy, plan.prompts):
        notes.append(f"Prompts: {cut}. What the model did not read, a judge may still look for.")
    summary = run_summary(results, run, unit="prompts")
    if sft_adapter:
        sft_sampler = ImageSampler(_load(config, sft_adapter), config, store, sft_adapter)
        sft = sft_sampler.generate(plan, scale=1.0, label="sft")
        against_sft = comparisons(sft, tuned, config, models=("sft", "tuned"))
        results += comparisons(base, sft, config, models=("base", "sft")) + against_sft
        notes.insert(0, note_against_sft(against_sft[0]))
    points = mark_recommended(correct_points(list(run_sweep(sampler, base, tuned))))
    notes += [advice(points)] if points else []
    judge = config.judges[0]
    report = Report(
        title=title,
        verdict=run,
        summary=summary,
        command=command,
        comparisons=tuple(results),
        categories=tuple(by_category(base, tuned, judge)),
        scales=tuple((point.scale, point.headline) for point in points if point.step is None),
        points=points,
        control=aa_control(base, judge),
        history=tuple(history),
        examples=tuple(examples(base, tuned, judge, count=24)),
        most_changed=most_changed(base, tuned, judge, count=4),
        settings={**(settings or {}), **_settings(config, plan, sampler)},
        notes=tuple(notes),
        provenance=provenance_line(),
    )
    folder = Path(config.output_dir)
    if process_rank().is_first:
        store.combine()
        with write_results(folder) as temporary:
            write_report(temporary, report)
        if not config.save_images:
            store.remove()
    return CompareResult(run, tuple(results), tuple(notes), folder / "report.html")


def read_plans(config: CompareConfig) -> list[tuple[CompareConfig, SamplingPlan]]:
    """Return settings and plan of the comparison, then of each side set.

    Raises:
        ValueError: as `read_sets`, or if a judge cannot score a prompt.
    """
    sets = read_sets(config, sampling_plan, lambda plan: len(set(plan.items)))
    for own, plan in sets:
        check_prompts(own.judges, plan.prompts[:: plan.samples])
    return sets


def _generate(
    sampler: ImageSampler, sets: Sequence[tuple[CompareConfig, SamplingPlan]], *, scale: float, label: str
) -> list[ScoredImages]:
    """Generate and score the images of each set."""
    return [
        sampler.generate(plan, scale=scale, label=f"{label}-side{number}" if number else label, judges=own.judges)
        for number, (own, plan) in enumerate(sets)
    ]


def _base_sampler(sampler: ImageSampler) -> ImageSampler:
    """The sampler of the base's images: the same model, or one with the base's own adapter."""
    config, adapter = sampler.config, sampler.config.base_adapter
    return ImageSampler(_load(config, adapter), config, sampler.store, adapter) if adapter else sampler


def run_sweep(sampler: ImageSampler, base: ScoredImages, tuned: ScoredImages) -> Iterator[SweepPoint]:
    """Compare the base with the adapter at each LoRA scale and each checkpoint, on one image per prompt.

    It yields nothing if the config has neither scales nor checkpoints.
    """
    config = sampler.config
    if not config.adapter or not (config.scales or config.checkpoints):
        return
    plan, base = base.plan.first(1), base.first(1)
    generated = {1.0: tuned.first(1), **({} if config.base_adapter else {0.0: base})}
    for scale in sorted({0.0, 1.0, *config.scales}):
        scored = generated.get(scale) or sampler.generate(plan, scale=scale, label=f"scale-{scale:g}")
        yield sweep_point(base, scored, config, scale=scale)
    for step, folder in list_checkpoints(config):
        checkpoint_sampler = ImageSampler(_load(config, folder), config, sampler.store, folder)
        scored = checkpoint_sampler.generate(plan, scale=1.0, label=f"checkpoint-{step}")
        yield sweep_point(base, scored, config, scale=1.0, step=step)


def sweep_point(
    base: ScoredImages, scored: ScoredImages, config: CompareConfig, *, scale: float, step: int | None = None
) -> SweepPoint:
    """Compare one adapter strength with the base, by the first judge and the second if there is one."""
    name = f"scale {scale:g}" if step is None else f"step {step}"
    primary, *others = config.judges
    guard = compare_scores(base, scored, others[0], metric=metric_of(others[0])) if others else None
    return SweepPoint(name, scale, step, compare_scores(base, scored, primary, metric=name), guard)


def list_checkpoints(config: CompareConfig) -> list[tuple[int, str]]:
    """List step and folder of the adapter's checkpoints. Empty unless the config compares checkpoints.

    Raises:
        ValueError: if there are none.
    """
    if not config.checkpoints or config.adapter is None:
        return []
    folders = [path for path in Path(config.adapter).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    if not folders:
        raise ValueError(
            f"checkpoints: {config.adapter} contains none. Train with save_every and a large save_total_limit."
        )
    return sorted((int(path.name.rpartition("-")[2]), str(path)) for path in folders)


def image_notes(results: Sequence[Comparison]) -> list[str]:
    """Write the notes on lost diversity, changed image statistics and unconfirmed verdicts."""
    notes = [note_diversity(result) for result in results if result.judge == PIXELS and result.verdict == "worse"]
    for result in results:
        change = result.difference / result.base if result.base else 0.0
        if result.judge == IMAGE_STATISTICS and result.verdict == "differs" and abs(change) >= DRIFT:
            name = result.metric.partition(",")[0].capitalize()
            notes.append(
                f"{name} changed by {100 * change:+.0f} %. Check that this change is not what raised a judge's score."
            )
    return notes + note_unconfirmed(results)


def note_diversity(result: Comparison) -> str:
    """Explain a significant loss of diversity."""
    fraction = result.tuned / result.base
    if fraction < COLLAPSE:
        meaning = f"Less than {100 * COLLAPSE:.0f} % counts as a collapse."
    else:
        meaning = f"This is statistically significant, but above the {100 * COLLAPSE:.0f} % threshold for a collapse."
    return f"Diversity fell to {100 * fraction:.1f} % of the base model's. {meaning}"


def _settings(config: CompareConfig, plan: SamplingPlan, sampler: ImageSampler) -> dict[str, str]:
    """Describe for the report how the images were generated."""
    settings = sampler.settings(0.0)
    balanced = ". Scores are means over the categories' means" if plan.balanced else ""
    manifest = f"{config.output_dir}/{FOLDER}/{MANIFEST} lists each image with its seed and hash"
    return {
        "model": config.model,
        "adapter": config.adapter or "none",
        **name_base(config.base_adapter, config.adapter),
        "prompts": f"{config.prompts}, {len(plan.prompts) // plan.samples} prompts, "
        f"{config.images_per_prompt} images per prompt{balanced}",
        **name_side_sets(config),
        "sampler": f"{settings['scheduler'].split()[0]}, {config.num_inference_steps} steps, "
        f"guidance {config.guidance_scale:g}, {settings['dtype']}{f', linear layers in {config.quantize}' if config.quantize else ''}",
        "seed": str(config.seed),
        "libraries": settings["libraries"],
        "images": manifest if config.save_images else "not saved",
    }


def _load(config: CompareConfig, adapter: str | None) -> ImagePolicy:
    options = {"precision": config.precision, "quantize": config.quantize}
    return load_image_policy(config.model, revision=config.revision, adapter=adapter, **options)

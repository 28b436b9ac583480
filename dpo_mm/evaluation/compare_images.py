"""Base and tuned, from the same seeds on held-out prompts, judged and compared in pairs.

What is drawn and judged is in `drawing`; here it is compared in pure functions, and `compare_images` strings them together and
writes the report.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dpo_mm.config import CompareConfig
from dpo_mm.evaluation.image_sampling import ImageSampler, SamplingPlan, ScoredImages, sampling_plan
from dpo_mm.evaluation.image_statistics import IMAGE_STATISTICS, MEASURES, pairwise_distance
from dpo_mm.evaluation.image_store import FOLDER, MANIFEST, ImageStore
from dpo_mm.evaluation.report import Example, Report, write_report
from dpo_mm.evaluation.statistics import (
    BASE_AND_TUNED,
    Comparison,
    confirmed_verdict,
    holm_corrected,
    paired,
    run_verdict,
)
from dpo_mm.evaluation.sweep import SweepPoint, advice, mark_recommended
from dpo_mm.evaluation.verdict import (
    CompareResult,
    note_against_sft,
    note_training_judges,
    note_unconfirmed,
)
from dpo_mm.judges import metric_of
from dpo_mm.judges.provenance import made_by, order_judges
from dpo_mm.policies.families import load_image_policy
from dpo_mm.policies.protocol import ImagePolicy

__all__ = ["CompareResult", "SamplingPlan", "ScoredImages", "compare_images", "sampling_plan"]

COLLAPSE = 0.9
"""Share of the base's diversity below which a headline gain counts as over-optimised."""
DRIFT = 0.1
"""Relative change of a picture's looks that is worth a remark, where it is significant."""
PIXELS = "pixels"
"""What stands for a judge's name beside diversity."""


def comparisons(
    base: ScoredImages,
    tuned: ScoredImages,
    config: CompareConfig,
    *,
    models: tuple[str, str] = BASE_AND_TUNED,
    training_judges: Sequence[str] = (),
) -> list[Comparison]:
    """Each judge and the diversity, tuned against base, intervals clustered by prompt; the first judge is the headline.

    models: names of the two; nothing is a headline unless they are base and tuned. training_judges: judges that made
    the training pairs, which are marked. The sign tests' p are corrected for the number of judges.
    """
    found = [
        dataclasses.replace(
            compare_scores(base, tuned, judge, metric=metric_of(judge), seed=config.seed, models=models),
            headline=judge == config.judges[0] and models == BASE_AND_TUNED,
            built_training_pairs=judge in training_judges,
        )
        for judge in config.judges
    ]
    return holm_corrected(found) + compare_diversity(base, tuned, seed=config.seed, models=models)


def compare_scores(
    base: ScoredImages,
    tuned: ScoredImages,
    judge: str,
    *,
    metric: str,
    seed: int,
    models: tuple[str, str] = BASE_AND_TUNED,
) -> Comparison:
    """One judge, tuned against base."""
    prompts, weights = np.array(base.plan.prompts), base.plan.weights
    scores = base.scores[judge], tuned.scores[judge]
    return paired(*scores, clusters=prompts, metric=metric, judge=judge, models=models, weights=weights, seed=seed)


def compare_diversity(
    base: ScoredImages, tuned: ScoredImages, *, seed: int, models: tuple[str, str] = BASE_AND_TUNED
) -> list[Comparison]:
    """How much pictures of a prompt differ, tuned against base; none with one sample a prompt."""
    if base.plan.samples < 2:
        return []
    names = np.array(base.plan.prompts[:: base.plan.samples])
    both = diversity(base), diversity(tuned)
    return [paired(*both, clusters=names, metric="diversity", judge=PIXELS, models=models, seed=seed)]


def diversity(drawn: ScoredImages) -> np.ndarray:
    """How much a prompt's pictures differ: mean pairwise RMS distance of pixels at a quarter of the size, (prompts,)."""
    return pairwise_distance(drawn.looks.small, drawn.plan.samples)


def compare_image_statistics(base: ScoredImages, tuned: ScoredImages, *, seed: int) -> list[Comparison]:
    """Saturation, sharpness and file size, tuned against base: neither way is better, but a change is worth knowing."""
    prompts = np.array(base.plan.prompts)
    return [
        paired(
            getattr(base.looks, name),
            getattr(tuned.looks, name),
            clusters=prompts,
            metric=words,
            judge=IMAGE_STATISTICS,
            direction="neutral",
            seed=seed,
        )
        for name, words in MEASURES.items()
    ]


def by_category(base: ScoredImages, tuned: ScoredImages, judge: str, *, seed: int) -> list[Comparison]:
    """The headline judge in each category that has at least two prompts, p corrected for how many there are."""
    kinds, prompts = base.plan.kinds, np.array(base.plan.prompts)
    found = []
    for name in sorted(set(kinds)):
        inside = kinds == name
        if len(set(prompts[inside])) > 1:
            scores = base.scores[judge][inside], tuned.scores[judge][inside]
            found.append(paired(*scores, clusters=prompts[inside], metric=str(name), judge=judge, seed=seed))
    return holm_corrected(found) if len(found) > 1 else []


def aa_control(base: ScoredImages, judge: str, *, seed: int) -> Comparison | None:
    """The A/A control: the base against itself with other seeds; None with fewer than two samples a prompt."""
    half = base.plan.samples // 2
    if half == 0:
        return None
    scores = base.scores[judge].reshape(-1, base.plan.samples)
    prompts = np.repeat(np.array(base.plan.prompts[:: base.plan.samples]), half)
    one, other = scores[:, :half].ravel(), scores[:, half : 2 * half].ravel()
    found = paired(one, other, clusters=prompts, metric=f"A/A control: {metric_of(judge)}", judge=judge, seed=seed)
    return dataclasses.replace(found, verdict=confirmed_verdict(found))


def verdict(found: Sequence[Comparison]) -> str:
    """better, no evidence, worse, or over-optimised: the headline rose while another judge fell or diversity collapsed."""
    headline = next(one for one in found if one.headline)
    guards = [one for one in found if not one.headline and one.judge not in (PIXELS, IMAGE_STATISTICS)]
    guards += [one for one in found if one.judge == PIXELS and one.tuned < COLLAPSE * one.base]
    return run_verdict(headline, guards)


def examples(base: ScoredImages, tuned: ScoredImages, judge: str, *, count: int) -> list[Example]:
    """Pictures to show, in turns from each category, drawn at random by the plan's own order: not the best ones."""
    shown: list[Example] = []
    rows = range(0, len(base.images), base.plan.samples)
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(str(base.plan.kinds[row]), []).append(row)
    for turn in itertools.zip_longest(*groups.values()):
        for row in turn:
            if row is not None and len(shown) < count:
                shown.append(
                    Example(
                        prompt=base.plan.prompts[row],
                        category=str(base.plan.kinds[row]),
                        base=base.images[row],
                        tuned=tuned.images[row],
                        base_score=float(base.scores[judge][row]),
                        tuned_score=float(tuned.scores[judge][row]),
                        seed=base.plan.seeds[row],
                    )
                )
    return shown


def compare_images(
    config: CompareConfig,
    *,
    title: str,
    command: str,
    baseline: str | None = None,
    history: Sequence[dict[str, float]] = (),
    settings: dict[str, str] | None = None,
) -> CompareResult:
    """Draw, judge and compare as the config says, and write report.html, metrics.json and a contact sheet.

    Run again after it was cut, it goes on: pictures and scores that are there with the right hash are not made again.
    baseline: folder of a second adapter, SFT on the same chosen pictures, to set beside the first. history, settings:
    of the training, for the report. Raises ValueError where a part of the config won't do.
    """
    made = made_by(config.adapter)
    config = dataclasses.replace(config, judges=order_judges(config.judges, made))
    plan, gallery = sampling_plan(config), ImageStore(Path(config.output_dir) / FOLDER)
    studio = ImageSampler(_load(config, config.adapter), config, gallery, config.adapter)
    base = studio.generate(plan, scale=0.0, label="base")
    tuned = studio.generate(plan, scale=1.0, label="tuned") if config.adapter else base
    found = comparisons(base, tuned, config, training_judges=made)
    found += compare_image_statistics(base, tuned, seed=config.seed)
    word, notes = verdict(found), note_training_judges(found) + image_notes(found)
    if baseline:
        sft = ImageSampler(_load(config, baseline), config, gallery, baseline).generate(plan, scale=1.0, label="sft")
        against = comparisons(sft, tuned, config, models=("sft", "tuned"))
        found += comparisons(base, sft, config, models=("base", "sft")) + against
        notes.insert(0, note_against_sft(against[0]))
    points = mark_recommended(list(run_sweep(studio, base, tuned)))
    notes += [advice(points)] if points else []
    headline = config.judges[0]
    report = Report(
        title=title,
        verdict=word,
        summary=_summary(found[0], word),
        command=command,
        comparisons=tuple(found),
        categories=tuple(by_category(base, tuned, headline, seed=config.seed)),
        scales=tuple((sweep_point.scale, sweep_point.headline) for sweep_point in points if sweep_point.step is None),
        points=points,
        control=aa_control(base, headline, seed=config.seed),
        history=tuple(history),
        examples=tuple(examples(base, tuned, headline, count=24)),
        settings={**(settings or {}), **_sampling(config, plan, studio)},
        notes=tuple(notes),
    )
    written = write_report(Path(config.output_dir), report)
    if not config.save_images:
        shutil.rmtree(gallery.folder)
    return CompareResult(word, tuple(found), tuple(notes), written)


def run_sweep(studio: ImageSampler, base: ScoredImages, tuned: ScoredImages) -> Iterator[SweepPoint]:
    """The base, the adapter at each scale and each checkpoint of it, on one picture a prompt; nothing where none is asked for."""
    config = studio.config
    if not config.adapter or not (config.scales or config.checkpoints):
        return
    plan, first = base.plan.first(1), base.first(1)
    for scale in sorted({*config.scales, 0.0, 1.0}):
        known = {0.0: first, 1.0: tuned.first(1)}.get(scale)
        yield sweep_point(
            first, known or studio.generate(plan, scale=scale, label=f"scale-{scale:g}"), config, scale=scale
        )
    for step, folder in checkpoints_of(config):
        policy = _load(config, folder)
        drawn = ImageSampler(policy, config, studio.gallery, folder).generate(
            plan, scale=1.0, label=f"checkpoint-{step}"
        )
        yield sweep_point(first, drawn, config, scale=1.0, step=step)


def sweep_point(
    base: ScoredImages, drawn: ScoredImages, config: CompareConfig, *, scale: float, step: int | None = None
) -> SweepPoint:
    """What was drawn against the base, by the first judge and the second."""
    name = f"scale {scale:g}" if step is None else f"step {step}"
    head, *rest = config.judges
    guard = compare_scores(base, drawn, rest[0], metric=metric_of(rest[0]), seed=config.seed) if rest else None
    return SweepPoint(name, scale, step, compare_scores(base, drawn, head, metric=name, seed=config.seed), guard)


def checkpoints_of(config: CompareConfig) -> list[tuple[int, str]]:
    """Step and folder of each checkpoint in the adapter's folder, where they are to be swept.

    Raises ValueError where there are none.
    """
    if not config.checkpoints or config.adapter is None:
        return []
    found = [path for path in Path(config.adapter).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    if not found:
        raise ValueError(f"checkpoints: none in {config.adapter}; train with save_every, and save_total_limit as many")
    return sorted((int(path.name.rpartition("-")[2]), str(path)) for path in found)


def image_notes(found: Sequence[Comparison]) -> list[str]:
    """What is to be read with the numbers: lost diversity, looks that drifted, judges that Holm's correction leaves out."""
    words = [note_diversity(one) for one in found if one.judge == PIXELS and one.verdict == "worse"]
    for one in found:
        change = one.difference / one.base if one.base else 0.0
        if one.judge == IMAGE_STATISTICS and one.verdict == "differs" and abs(change) >= DRIFT:
            name = one.metric.partition(",")[0].capitalize()
            words.append(
                f"{name} changed by {change:+.0%}: look whether that, and not what was meant, pleases a judge."
            )
    return words + note_unconfirmed(found)


def note_diversity(pairwise_distance: Comparison) -> str:
    """What a significant loss of diversity means, in words."""
    kept = pairwise_distance.tuned / pairwise_distance.base
    meaning = "a collapse" if kept < COLLAPSE else f"not a collapse, which would be less than {COLLAPSE:.0%}"
    return f"Pictures of one prompt differ less than the base's: {kept:.1%} of its diversity is left, {meaning}."


def _summary(headline: Comparison, word: str) -> str:
    return (
        f"{headline.metric}: {headline.base:.3f} with the base, {headline.tuned:.3f} tuned "
        f"({headline.difference:+.3f}, 95 % interval {headline.low:+.3f} to {headline.high:+.3f}, clustered by prompt; "
        f"{headline.wins} prompts better, {headline.losses} worse, {headline.ties} the same): {word}."
    )


def _sampling(config: CompareConfig, plan: SamplingPlan, studio: ImageSampler) -> dict[str, str]:
    how = studio.sampling(0.0)
    score = ", scores are means of the categories' means" if plan.balanced else ""
    kept = f"{config.output_dir}/{FOLDER}/{MANIFEST} has each picture's seed and hash"
    return {
        "model": config.model,
        "adapter": config.adapter or "none",
        "prompts": f"{config.prompts}, {len(plan.prompts) // plan.samples} of them, {config.images_per_prompt} seeds each{score}",
        "sampler": f"{how['scheduler'].split()[0]}, {config.num_inference_steps} steps, guidance {config.guidance_scale:g}, {how['dtype']}",
        "seed": str(config.seed),
        "libraries": ", ".join(f"{name} {version}" for name, version in how["versions"].items()),
        "pictures": kept if config.save_images else "not kept",
    }


def _load(config: CompareConfig, adapter: str | None) -> ImagePolicy:
    return load_image_policy(config.model, revision=config.revision, precision=config.precision, adapter=adapter)

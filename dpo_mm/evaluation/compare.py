"""Base and tuned, from the same seeds on held-out prompts, judged and compared in pairs.

What is drawn and judged is here and in pure functions; `compare` strings them together and writes the report.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpo_mm.config import CompareAnswersConfig, CompareConfig
from dpo_mm.evaluation.report import Example, Report, write_report
from dpo_mm.evaluation.statistics import Comparison, overall, paired
from dpo_mm.judges import load_judge, metric_of
from dpo_mm.policies.protocol import load_policy
from dpo_mm.progress import progress
from dpo_mm.prompts import category, read_prompts, seeds_of

COLLAPSE = 0.9
"""Share of the base's diversity below which a headline gain counts as over-optimised."""


@dataclass(frozen=True)
class Plan:
    """What is drawn: prompts and seeds, each picture's own, (prompts x samples,) with a prompt's samples together."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    samples: int

    def first(self, samples: int) -> Plan:
        """The same with fewer samples a prompt."""
        keep = [n for n in range(len(self.prompts)) if n % self.samples < samples]
        return Plan(
            tuple(self.prompts[n] for n in keep), tuple(self.seeds[n] for n in keep), min(samples, self.samples)
        )


@dataclass(frozen=True)
class Drawn:
    """Pictures of a plan and their scores by judge, (pictures,)."""

    plan: Plan
    images: list[Image.Image]
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    def first(self, samples: int) -> Drawn:
        keep = [n for n in range(len(self.images)) if n % self.plan.samples < samples]
        scores = {judge: values[keep] for judge, values in self.scores.items()}
        return Drawn(self.plan.first(samples), [self.images[n] for n in keep], scores)


def plan_of(config: CompareConfig) -> Plan:
    """The prompts and seeds of a config. Raises ValueError where prompts or samples won't do."""
    if config.samples < 1:
        raise ValueError(f"samples is {config.samples}; expected at least 1 picture a prompt")
    names = read_prompts(config.prompts, limit=config.limit)
    prompts = [prompt for prompt in names for _ in range(config.samples)]
    seeds = [seed for prompt in names for seed in seeds_of(prompt, config.samples, seed=config.seed)]
    return Plan(tuple(prompts), tuple(seeds), config.samples)


def draw(policy: Any, plan: Plan, config: CompareConfig, *, scale: float, title: str) -> Drawn:
    """The plan's pictures at a LoRA scale (0: the base), judged."""
    images: list[Image.Image] = []
    with progress(title, len(plan.prompts)) as advance:
        for part in policy.sample(
            plan.prompts,
            plan.seeds,
            steps=config.sampling_steps,
            guidance=config.guidance,
            batch_size=config.batch_size,
            scale=scale,
        ):
            images += part
            advance(len(part))
    scores = {name: np.array(load_judge(name)(images, plan.prompts)) for name in config.judges}
    return Drawn(plan, images, scores)


def comparisons(base: Drawn, tuned: Drawn, config: CompareConfig, *, suffix: str = "") -> list[Comparison]:
    """Each judge and the diversity, tuned against base, intervals clustered by prompt; the first judge is the headline.

    suffix: what is compared where it isn't plainly tuned with base; then nothing is a headline.
    """
    found = [
        paired(
            base.scores[judge],
            tuned.scores[judge],
            clusters=np.array(base.plan.prompts),
            metric=metric_of(judge) + suffix,
            judge=judge,
            headline=judge == config.judges[0] and not suffix,
            seed=config.seed,
        )
        for judge in config.judges
    ]
    if base.plan.samples > 1:
        names = np.array(base.plan.prompts[:: base.plan.samples])
        spread = diversity(base), diversity(tuned)
        found.append(paired(*spread, clusters=names, metric=f"diversity{suffix}", judge="pixels", seed=config.seed))
    return found


def diversity(drawn: Drawn) -> np.ndarray:
    """How much a prompt's pictures differ: mean pairwise RMS distance of pixels at a quarter of the size, (prompts,)."""
    small = [
        np.asarray(
            image.resize((max(1, image.width // 4), max(1, image.height // 4)), Image.Resampling.BOX), dtype=np.float32
        )
        for image in drawn.images
    ]
    groups = np.stack(small).reshape(-1, drawn.plan.samples, small[0].size) / 255
    pairs = itertools.combinations(range(drawn.plan.samples), 2)
    return np.mean([np.sqrt(np.mean((groups[:, a] - groups[:, b]) ** 2, axis=1)) for a, b in pairs], axis=0)


def by_category(base: Drawn, tuned: Drawn, judge: str, *, seed: int) -> list[Comparison]:
    """The headline judge in each category that has at least two prompts."""
    names = np.array([category(prompt) for prompt in base.plan.prompts])
    prompts = np.array(base.plan.prompts)
    found = []
    for name in sorted(set(names)):
        inside = names == name
        if len(set(prompts[inside])) > 1:
            scores = base.scores[judge][inside], tuned.scores[judge][inside]
            found.append(paired(*scores, clusters=prompts[inside], metric=str(name), judge=judge, seed=seed))
    return found if len(found) > 1 else []


def control(base: Drawn, judge: str, *, seed: int) -> Comparison | None:
    """The A/A control: the base against itself with other seeds; None with fewer than two samples a prompt."""
    half = base.plan.samples // 2
    if half == 0:
        return None
    scores = base.scores[judge].reshape(-1, base.plan.samples)
    prompts = np.repeat(np.array(base.plan.prompts[:: base.plan.samples]), half)
    one, other = scores[:, :half].ravel(), scores[:, half : 2 * half].ravel()
    return paired(one, other, clusters=prompts, metric=f"A/A control: {metric_of(judge)}", judge=judge, seed=seed)


def verdict(found: Sequence[Comparison]) -> str:
    """better, no evidence, worse, or over-optimised: the headline rose while another judge fell or diversity collapsed."""
    headline = next(one for one in found if one.headline)
    guards = [one for one in found if not one.headline and one.judge != "pixels"]
    guards += [one for one in found if one.judge == "pixels" and one.tuned < COLLAPSE * one.base]
    return overall(headline, guards)


def examples(base: Drawn, tuned: Drawn, judge: str, *, count: int) -> list[Example]:
    """Pictures to show, in turns from each category, drawn at random by the plan's own order: not the best ones."""
    shown: list[Example] = []
    rows = range(0, len(base.images), base.plan.samples)
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(category(base.plan.prompts[row]), []).append(row)
    for turn in itertools.zip_longest(*groups.values()):
        for row in turn:
            if row is not None and len(shown) < count:
                shown.append(
                    Example(
                        prompt=base.plan.prompts[row],
                        category=category(base.plan.prompts[row]),
                        base=base.images[row],
                        tuned=tuned.images[row],
                        base_score=float(base.scores[judge][row]),
                        tuned_score=float(tuned.scores[judge][row]),
                        seed=base.plan.seeds[row],
                    )
                )
    return shown


@dataclass(frozen=True)
class Outcome:
    """What a comparison found, and the folder that its report is in."""

    verdict: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    report: Path


def compare(
    config: CompareConfig,
    *,
    title: str,
    command: str,
    baseline: str | None = None,
    history: Sequence[dict[str, float]] = (),
    settings: dict[str, str] | None = None,
) -> Outcome:
    """Draw, judge and compare as the config says, and write report.html, metrics.json and a contact sheet.

    baseline: folder of a second adapter, SFT on the same chosen pictures, to set beside the first. history, settings:
    of the training, for the report. Raises ValueError where a part of the config won't do.
    """
    plan = plan_of(config)
    policy = opened(config, config.adapter)
    base = draw(policy, plan, config, scale=0.0, title="drawing with the base")
    tuned = draw(policy, plan, config, scale=1.0, title="drawing with the tuned")
    found = comparisons(base, tuned, config)
    notes = [narrowed(one) for one in found if one.judge == "pixels" and one.verdict == "worse"]
    if baseline:
        sft = draw(opened(config, baseline), plan, config, scale=1.0, title="drawing with SFT")
        found += comparisons(base, sft, config, suffix=" (SFT on the chosen)")
        against = comparisons(sft, tuned, config, suffix=" (DPO against SFT)")
        found += against
        notes.append(earned(against[0]))
    headline = config.judges[0]
    swept = _sweep(policy, base, tuned, config)
    check = control(base, headline, seed=config.seed)
    word = verdict(found)
    report = Report(
        title=title,
        verdict=word,
        summary=_summary(found[0], word),
        command=command,
        comparisons=tuple(found),
        categories=tuple(by_category(base, tuned, headline, seed=config.seed)),
        scales=swept,
        control=check,
        history=tuple(history),
        examples=tuple(examples(base, tuned, headline, count=24)),
        settings={**(settings or {}), **_sampling(config)},
        notes=tuple(notes),
    )
    return Outcome(word, tuple(found), tuple(notes), write_report(Path(config.output_dir), report))


def opened(config: CompareConfig | CompareAnswersConfig, adapter: str | None) -> Any:
    """The policy of a config with an adapter. Raises ValueError as loading does."""
    policy = load_policy(config.model, revision=config.revision, precision=config.precision)
    if adapter:
        policy.attach(adapter)
    return policy


def _sweep(policy: Any, base: Drawn, tuned: Drawn, config: CompareConfig) -> tuple[tuple[float, Comparison], ...]:
    """The headline at each LoRA scale, on one picture a prompt but for 0 and 1, which are there already."""
    judge, known = config.judges[0], {0.0: base, 1.0: tuned}
    found = []
    for scale in sorted({*config.scales, 0.0, 1.0} if config.scales else ()):
        ours = known.get(scale) or draw(
            policy, base.plan.first(1), config, scale=scale, title=f"drawing at scale {scale:g}"
        )
        theirs = base if scale in known else base.first(1)
        scores = theirs.scores[judge], ours.scores[judge]
        clusters = np.array(theirs.plan.prompts)
        found.append(
            (scale, paired(*scores, clusters=clusters, metric=f"scale {scale:g}", judge=judge, seed=config.seed))
        )
    return tuple(found)


def narrowed(spread: Comparison) -> str:
    """What a significant loss of diversity means, in words."""
    kept = spread.tuned / spread.base
    meaning = "a collapse" if kept < COLLAPSE else f"not a collapse, which would be less than {COLLAPSE:.0%}"
    return f"Pictures of one prompt differ less than the base's: {kept:.1%} of its diversity is left, {meaning}."


def earned(against: Comparison) -> str:
    """Whether DPO earned its keep over SFT on the same chosen pictures at equal steps, in words."""
    span = f"{against.difference:+.3f}, 95 % interval {against.low:+.3f} to {against.high:+.3f}"
    words = {
        "better": f"DPO earned its keep: {against.metric} {span}.",
        "worse": f"SFT on the chosen would have done better: {against.metric} {span}. Prefer it here.",
        "changed": f"DPO and SFT differ, neither for better: {against.metric} {span}.",
        "no evidence": f"No evidence that DPO does better than SFT on the chosen here: {against.metric} {span}. SFT is cheaper.",
    }
    return words[against.verdict]


def _summary(headline: Comparison, word: str) -> str:
    return (
        f"{headline.metric}: {headline.base:.3f} with the base, {headline.tuned:.3f} tuned "
        f"({headline.difference:+.3f}, 95 % interval {headline.low:+.3f} to {headline.high:+.3f}, clustered by prompt; "
        f"{headline.wins} prompts better, {headline.losses} worse, {headline.ties} the same): {word}."
    )


def _sampling(config: CompareConfig) -> dict[str, str]:
    return {
        "model": config.model,
        "adapter": config.adapter or "none",
        "prompts": f"{config.prompts}, {config.samples} seeds each",
        "sampler": f"the pipeline's own scheduler, {config.sampling_steps} steps, guidance {config.guidance:g}",
        "seed": str(config.seed),
    }

"""Base and tuned vision-language model on the same held-out questions, judged and compared answer by answer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_mm.config import CompareResponsesConfig
from dpo_mm.data.questions import Question, read_questions
from dpo_mm.evaluation.report import Report, TextExample, write_report
from dpo_mm.evaluation.response_sampling import ANSWERS, ScoredResponses, generate_responses, score_responses
from dpo_mm.evaluation.statistics import (
    BASE_AND_TUNED,
    Comparison,
    holm_corrected,
    mcnemar,
    paired_shares,
    rate_interval,
    run_verdict,
)
from dpo_mm.evaluation.verdict import (
    CompareResult,
    note_against_sft,
    note_training_judges,
    note_unconfirmed,
)
from dpo_mm.judges import better_of, explain, metric_of
from dpo_mm.judges.provenance import made_by, order_judges
from dpo_mm.policies.families import load_text_policy
from dpo_mm.policies.protocol import TextPolicy

__all__ = ["ScoredResponses", "compare_responses", "generate_responses", "score_responses"]

SHOWN = 18
"""Answers on the page, in turns from each category."""


def comparisons(
    base: ScoredResponses,
    tuned: ScoredResponses,
    config: CompareResponsesConfig,
    *,
    models: tuple[str, str] = BASE_AND_TUNED,
    training_judges: Sequence[str] = (),
) -> list[Comparison]:
    """Each judge, tuned against base; the first is the headline, unless the models are others than base and tuned.

    models: names of the two. training_judges: judges that made the training pairs, which are marked. The sign tests' p are corrected for the number of judges
    that have a better way.
    """
    found = [
        paired_shares(
            base.shares[judge],
            tuned.shares[judge],
            metric=metric_of(judge),
            judge=judge,
            headline=judge == config.judges[0] and models == BASE_AND_TUNED,
            direction=better_of(judge),
            models=models,
            seed=config.seed,
        )
        for judge in config.judges
    ]
    found = [dataclasses.replace(one, built_training_pairs=one.judge in training_judges) for one in found]
    tested = iter(holm_corrected([one for one in found if better_of(one.judge) != "neutral"]))
    return [one if better_of(one.judge) == "neutral" else next(tested) for one in found]


def by_category(
    base: ScoredResponses, tuned: ScoredResponses, questions: Sequence[Question], judge: str, *, seed: int
) -> list[Comparison]:
    """The headline judge in each category of at least two questions."""
    names = np.array([question.category for question in questions])
    found = [
        paired_shares(
            base.shares[judge][names == name],
            tuned.shares[judge][names == name],
            metric=str(name),
            judge=judge,
            direction=better_of(judge),
            seed=seed,
        )
        for name in sorted(set(names))
        if (names == name).sum() > 1
    ]
    return holm_corrected(found) if len(found) > 1 else []


def examples(
    base: ScoredResponses, tuned: ScoredResponses, questions: Sequence[Question], judge: str, *, count: int
) -> list[TextExample]:
    """Answers to show: first those that the headline's judge found fault with, of either model, in turns by category."""
    faulty: list[tuple[str, TextExample]] = []
    fine: list[tuple[str, TextExample]] = []
    for number, question in enumerate(questions):
        before, after = base.answers[number], tuned.answers[number]
        marks = [explain(judge, answer, question.truth) for answer in (before, after)]
        changed = base.shares[judge][number, 0] != tuned.shares[judge][number, 0]
        note = "; ".join(
            f"{who}: {one.reason}" for who, one in zip(("base", "tuned"), marks, strict=True) if one.reason
        )
        shown = TextExample(
            image=question.images[0] if question.images else None,
            prompt=question.prompt if isinstance(question.prompt, str) else question.id,
            base=before.text,
            tuned=after.text,
            truth=question.truth or None,
            base_marks=marks[0].marks if base.shares[judge][number, 0] else (),
            tuned_marks=marks[1].marks if tuned.shares[judge][number, 0] else (),
            note=note if base.shares[judge][number, 0] or tuned.shares[judge][number, 0] else "",
        )
        (faulty if changed or tuned.shares[judge][number, 0] else fine).append((question.category, shown))
    return (_interleaved(faulty) + _interleaved(fine))[:count]


def _interleaved(named: list[tuple[str, TextExample]]) -> list[TextExample]:
    groups: dict[str, list[TextExample]] = {}
    for category, shown in named:
        groups.setdefault(category, []).append(shown)
    turns = itertools.zip_longest(*groups.values())
    return [shown for turn in turns for shown in turn if shown is not None]


def note_counts(base: ScoredResponses, tuned: ScoredResponses, judge: str) -> str | None:
    """A rate as counts, with exact intervals and the exact paired test; None where the judge doesn't say yes or no."""
    both = [base.shares[judge], tuned.shares[judge]]
    if not all(((one[:, 1] == 1) & np.isin(one[:, 0], (0, 1))).all() for one in both):
        return None
    hits, n = [int(one[:, 0].sum()) for one in both], len(both[0])
    (a, b), (c, d) = (rate_interval(hit, n) for hit in hits)
    test = mcnemar(*(one[:, 0] > 0 for one in both))
    mended, broken = (test.only_base, test.only_tuned)[:: -1 if better_of(judge) == "higher" else 1]
    change = f", {hits[1] / hits[0] - 1:+.0%} relative" if hits[0] else ""
    return (
        f"{metric_of(judge)}: {hits[0]} of {n} answers with the base (exact interval {a:.1%} to {b:.1%}), {hits[1]} tuned "
        f"({c:.1%} to {d:.1%}){change}; {mended} mended, {broken} broken, exact McNemar p {test.p:.2g}."
    )


def note_tokens(base: ScoredResponses, tuned: ScoredResponses) -> str:
    """What answers cost in tokens: on average, and at the 99th percentile, where loops are."""
    both = [np.array([answer.tokens for answer in one.answers]) for one in (base, tuned)]
    of = [f"{n.mean():.1f}, 99th percentile {np.percentile(n, 99):.0f}" for n in both]
    return f"Tokens an answer: {of[0]} with the base; {of[1]} tuned."


def note_chosen_log_prob(history: Sequence[dict[str, float]], beta: float) -> str | None:
    """How far the chosen answers' log-prob has moved from the reference's: the guard against falling likelihood."""
    entries = [entry for entry in history if "eval_rewards/chosen" in entry] or [
        e for e in history if "rewards/chosen" in e
    ]
    if not entries:
        return None
    last = entries[-1]
    nats = (last.get("eval_rewards/chosen", last.get("rewards/chosen", 0.0))) / beta
    where = "watched" if "eval_rewards/chosen" in last else "training"
    word = "kept" if nats >= 0 else "FALLEN, which tends to cost quality: raise sft_weight"
    return f"The chosen answers' log-prob is {nats:+.2f} nats from the reference's on {where} pairs: {word}."


def compare_responses(
    config: CompareResponsesConfig,
    *,
    title: str,
    command: str,
    baseline: str | None = None,
    history: Sequence[dict[str, float]] = (),
    settings: dict[str, str] | None = None,
    beta: float | None = None,
) -> CompareResult:
    """Ask, judge and compare as the config says, and write report.html and metrics.json.

    baseline: folder of a second adapter, SFT on the same chosen answers. history, settings, beta: of the training.
    Run again after it was cut, it goes on after the last batch of answers. Raises ValueError where a part of the config won't do.
    """
    strangers = [name for name in config.guards if name not in config.judges]
    if strangers:
        raise ValueError(f"guards: {strangers[0]!r} is not among the judges {', '.join(config.judges)}; add it there")
    made = made_by(config.adapter)
    config = dataclasses.replace(config, judges=order_judges(config.judges, made))
    questions, keep = read_questions(config.questions, limit=config.max_questions), Path(config.output_dir)
    policy = _load(config, config.adapter)
    base = generate_responses(policy, questions, config, base=True, title="asking the base", keep=keep)
    tuned = generate_responses(policy, questions, config, base=False, title="asking the tuned", keep=keep)
    found = comparisons(base, tuned, config, training_judges=made)
    guards = [one for one in found if one.judge in config.guards]
    headline, word = config.judges[0], run_verdict(found[0], guards)
    notes = [note_counts(base, tuned, headline), history and beta and note_chosen_log_prob(history, beta)]
    notes += note_training_judges(found) + note_unconfirmed(found)
    if baseline:
        sft = generate_responses(_load(config, baseline), questions, config, base=False, title="asking SFT", keep=keep)
        against = comparisons(sft, tuned, config, models=("sft", "tuned"))
        found += comparisons(base, sft, config, models=("base", "sft")) + against
        notes.append(note_against_sft(against[0]))
    notes.append(note_tokens(base, tuned))
    report = Report(
        title=title,
        verdict=word,
        summary=_summary(found[0], word),
        command=command,
        comparisons=tuple(found),
        categories=tuple(by_category(base, tuned, questions, headline, seed=config.seed)),
        history=tuple(history),
        text_examples=tuple(examples(base, tuned, questions, headline, count=SHOWN)),
        settings={**(settings or {}), **_asking(config, len(questions))},
        notes=tuple(note for note in notes if note),
        unit="questions",
    )
    return CompareResult(word, tuple(found), report.notes, write_report(Path(config.output_dir), report))


def _summary(headline: Comparison, word: str) -> str:
    return (
        f"{headline.metric}: {headline.base:.3f} with the base, {headline.tuned:.3f} tuned "
        f"({headline.difference:+.3f}, 95 % interval {headline.low:+.3f} to {headline.high:+.3f}; "
        f"{headline.wins} answers better, {headline.losses} worse, {headline.ties} the same): {word}."
    )


def _asking(config: CompareResponsesConfig, count: int) -> dict[str, str]:
    way = f"sampled at temperature {config.temperature:g}" if config.temperature else "greedy"
    return {
        "model": config.model,
        "adapter": config.adapter or "none",
        "questions": f"{config.questions}, {count} of them",
        "decoding": f"{way}, at most {config.max_new_tokens} tokens",
        "seed": str(config.seed),
        "answers": f"{config.output_dir}/{ANSWERS} has every one",
    }


def _load(config: CompareResponsesConfig, adapter: str | None) -> TextPolicy:
    return load_text_policy(config.model, revision=config.revision, precision=config.precision, adapter=adapter)

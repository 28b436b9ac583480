"""Compare base and tuned vision-language models on the same held-out questions, response by response."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_mm.config import CompareResponsesConfig
from dpo_mm.data.questions import Question, image_groups, read_questions
from dpo_mm.evaluation.answer import provenance_line
from dpo_mm.evaluation.paired_scores import note_agreement, paired_scores, scored_rows
from dpo_mm.evaluation.report import Report, TextExample, write_report
from dpo_mm.evaluation.response_sampling import (
    RESPONSES_FILE,
    ScoredResponses,
    generate_responses,
    score_responses,
)
from dpo_mm.evaluation.side_sets import judges_of, name_side_sets, note_side_sets, read_sets, source_of, with_side_sets
from dpo_mm.evaluation.significance import mcnemar, rate_interval
from dpo_mm.evaluation.statistics import BASE_AND_TUNED, Comparison, holm_corrected, paired_ratios
from dpo_mm.evaluation.verdict import (
    CompareResult,
    note_against_sft,
    note_training_judges,
    note_unconfirmed,
    run_summary,
    run_verdict,
    voters,
)
from dpo_mm.files.json_lines import combine_parts
from dpo_mm.files.outputs import write_results
from dpo_mm.judges import better_of, explain, metric_of, take_judge_notes, takes_questions
from dpo_mm.judges.provenance import built_pairs, order_judges, training_judges_of_adapter
from dpo_mm.judges.score_checks import check_ground_truths
from dpo_mm.policies.adapter_sources import name_base
from dpo_mm.policies.families import load_text_policy
from dpo_mm.policies.protocol import TextPolicy
from dpo_mm.process.process_rank import process_rank

__all__ = ["ScoredResponses", "compare_responses", "generate_responses", "score_responses"]

MAX_EXAMPLES = 18
"""Example responses in the report, one of each category in turn."""
TRANSCRIPTION_JUDGES = {"cer", "wer", "levenshtein_bleu"}
"""Judges for which the ground truth is a text that the responses should repeat."""


def comparisons(
    base: ScoredResponses,
    tuned: ScoredResponses,
    config: CompareResponsesConfig,
    *,
    models: tuple[str, str] = BASE_AND_TUNED,
    training_judges: Sequence[str] = (),
) -> list[Comparison]:
    """Compare two models by each judge.

    Args:
        base, tuned: scored responses to the same questions.
        config: its first judge is the primary metric.
        models: names of the two models. There is no primary metric unless they are base and tuned.
        training_judges: judges that built the training pairs. Their comparisons are marked.

    Returns:
        One comparison per judge, with p corrected by `holm_corrected`.
    """
    scored = {judge: scored_rows(judge, base.ratios[judge], tuned.ratios[judge]) for judge in config.judges}
    groups = np.arange(len(base.responses)) if base.groups is None else base.groups
    results = [
        paired_ratios(
            base.ratios[judge][scored[judge]],
            tuned.ratios[judge][scored[judge]],
            metric=metric_of(judge),
            judge=judge,
            headline=judge == config.judges[0] and models == BASE_AND_TUNED,
            direction=better_of(judge),
            models=models,
            clusters=groups[scored[judge]],
        )
        for judge in config.judges
    ]
    return holm_corrected(
        [
            dataclasses.replace(result, built_training_pairs=built_pairs(result.judge, training_judges))
            for result in results
        ]
    )


def by_category(
    base: ScoredResponses, tuned: ScoredResponses, questions: Sequence[Question], judge: str
) -> list[Comparison]:
    """Compare by one judge within each category of at least two groups of questions, with p corrected for their number."""
    categories = np.array([question.category for question in questions], dtype=object)
    categories[~scored_rows(judge, base.ratios[judge], tuned.ratios[judge])] = None
    groups = image_groups(questions)
    results = [
        paired_ratios(
            base.ratios[judge][categories == name],
            tuned.ratios[judge][categories == name],
            metric=str(name),
            judge=judge,
            direction=better_of(judge),
            clusters=groups[categories == name],
        )
        for name in sorted(set(categories) - {None})
        if len(set(groups[categories == name])) > 1
    ]
    return holm_corrected(results) if len(results) > 1 else []


def examples(
    base: ScoredResponses,
    tuned: ScoredResponses,
    questions: Sequence[Question],
    judge: str,
    *,
    count: int,
    is_transcription: bool = False,
) -> list[TextExample]:
    """Choose example responses for the report, one of each category in turn.

    Those come first for which the judge's hits of base and tuned differ, or tuned has a hit.
    """
    notable: list[tuple[Question, TextExample]] = []
    others: list[tuple[Question, TextExample]] = []
    for number, question in enumerate(questions):
        before, after = base.responses[number], tuned.responses[number]
        hits = base.ratios[judge][number, 0], tuned.ratios[judge][number, 0]
        explanations = [explain(judge, response, question.ground_truth) for response in (before, after)]
        reasons = zip(("base", "tuned"), explanations, strict=True)
        note = "; ".join(f"{model}: {explanation.reason}" for model, explanation in reasons if explanation.reason)
        example = TextExample(
            image=None,
            prompt=question.prompt if isinstance(question.prompt, str) else question.id,
            base=before.text,
            tuned=after.text,
            ground_truth=question.ground_truth or None,
            base_marks=explanations[0].marks if hits[0] else (),
            tuned_marks=explanations[1].marks if hits[1] else (),
            note=note if hits[0] or hits[1] else "",
            is_transcription=is_transcription,
        )
        (notable if hits[0] != hits[1] or hits[1] else others).append((question, example))
    chosen = (_interleaved(notable) + _interleaved(others))[:count]
    return [
        dataclasses.replace(example, image=question.images[0] if question.images else None)
        for question, example in chosen
    ]


def _interleaved(examples: list[tuple[Question, TextExample]]) -> list[tuple[Question, TextExample]]:
    """Order examples such that one of each category comes in turn."""
    by_name: dict[str, list[tuple[Question, TextExample]]] = {}
    for question, example in examples:
        by_name.setdefault(question.category, []).append((question, example))
    turns = itertools.zip_longest(*by_name.values())
    return [example for turn in turns for example in turn if example is not None]


def note_counts(base: ScoredResponses, tuned: ScoredResponses, judge: str) -> str | None:
    """Report a rate as counts with exact intervals and McNemar's test.

    None for other metrics than yes or no, and if several questions are about one image: these tests take responses as independent.
    """
    if base.groups is not None and len(set(base.groups)) < len(base.groups):
        return None
    both = [base.ratios[judge], tuned.ratios[judge]]
    if not all(((ratios[:, 1] == 1) & np.isin(ratios[:, 0], (0, 1))).all() for ratios in both):
        return None
    hits, n = [int(ratios[:, 0].sum()) for ratios in both], len(both[0])
    (base_low, base_high), (tuned_low, tuned_high) = (rate_interval(hit, n) for hit in hits)
    test = mcnemar(*(ratios[:, 0] > 0 for ratios in both))
    fixed, broken = (test.only_base, test.only_tuned)[:: -1 if better_of(judge) == "higher" else 1]
    change = f", a relative change of {100 * (hits[1] / hits[0] - 1):+.0f} %" if hits[0] else ""
    return (
        f"{metric_of(judge)}: {hits[0]} of {n} responses of the base model (exact interval {100 * base_low:.1f} to "
        f"{100 * base_high:.1f} %) and {hits[1]} of the tuned model ({100 * tuned_low:.1f} to {100 * tuned_high:.1f} %){change}. "
        f"{fixed} fixed, {broken} broken, exact McNemar test p = {test.p:.2g}."
    )


def note_tokens(base: ScoredResponses, tuned: ScoredResponses) -> str:
    """Report the mean length and the 99th percentile, which shows repetition loops."""
    both = [np.array([response.tokens for response in scored.responses]) for scored in (base, tuned)]
    lengths = [f"{tokens.mean():.1f} (99th percentile {np.percentile(tokens, 99):.0f})" for tokens in both]
    return f"Tokens per response: {lengths[0]} with the base model, {lengths[1]} with the tuned model."


def note_chosen_log_prob(history: Sequence[dict[str, float]], beta: float) -> str | None:
    """Report how far the log-prob of the chosen responses has moved from the reference's. None without log entries.

    Args:
        history: the training log. Held-out pairs are used if it has them.
        beta: of the run, 1/nats.
    """
    key = next(
        (name for name in ("eval_rewards/chosen", "rewards/chosen") if any(name in entry for entry in history)), None
    )
    if key is None:
        return None
    nats = next(entry[key] for entry in reversed(history) if key in entry) / beta
    pairs = "evaluation" if key.startswith("eval_") else "training"
    if nats >= 0:
        return (
            f"The log-prob of the chosen responses rose by {nats:.2f} nats on {pairs} pairs, relative to the reference."
        )
    return (
        f"The log-prob of the chosen responses fell by {-nats:.2f} nats on {pairs} pairs, relative to the reference. "
        "This usually hurts quality. Increase `sft_weight`."
    )


def compare_responses(
    config: CompareResponsesConfig,
    *,
    title: str,
    command: str,
    sft_adapter: str | None = None,
    history: Sequence[dict[str, float]] = (),
    settings: dict[str, str] | None = None,
    beta: float | None = None,
) -> CompareResult:
    """Generate, score and compare responses, and write report.html and metrics.json.

    An interrupted comparison resumes after its last batch of responses.

    Args:
        config: what to compare.
        title: heading of the report.
        command: how to repeat the comparison, printed in the report.
        sft_adapter: folder of an adapter fine-tuned on the chosen side only, to compare with.
        history, settings, beta: of the training run, for the report.

    Raises:
        ValueError: if a judge, the model, the adapter, the questions or a setting is unknown or does not fit.
    """
    unknown = [name for name in config.guards if name not in config.judges]
    if unknown:
        raise ValueError(
            f"guards: {unknown[0]!r} is not among the judges {', '.join(config.judges)}. Add it to judges."
        )
    if process_rank().count > 1 and (config.server or any(map(takes_questions, judges_of(config)))):
        raise ValueError("A comparison that asks a server runs in one process, which sends several requests at a time")
    training_judges = training_judges_of_adapter(config.adapter)
    config = dataclasses.replace(config, judges=order_judges(config.judges, training_judges))
    sets, folder = read_question_sets(config), Path(config.output_dir)
    questions = sets[0][1]
    policy = _load(config, config.adapter)
    bases = _base_responses(policy, sets)
    tuneds = _generate(policy, sets, base=False)
    pairs = [
        paired_scores(before, after, own_questions, own.judges)
        for (own, own_questions), before, after in zip(sets, bases, tuneds, strict=True)
    ]
    here, *sides = [
        (own, comparisons(before, after, own, training_judges=training_judges))
        for (own, _), (before, after) in zip(sets, pairs, strict=True)
    ]
    base, tuned = pairs[0]
    results = with_side_sets(here[1], sides)
    guards = [result for result in results if result.judge in config.guards and not result.side_set]
    primary = config.judges[0]
    run = run_verdict(results[0], guards, [result for result in results if result.side_set])
    summary = run_summary(results, run, unit=voters(results[0], "responses"))
    notes = [note_counts(base, tuned, primary), history and beta and note_chosen_log_prob(history, beta)]
    notes += note_training_judges(results) + note_side_sets(results) + note_unconfirmed(results)
    if sft_adapter:
        sft_policy = _load(config, sft_adapter)
        sft = generate_responses(sft_policy, questions, config, base=False, title="SFT model", output_dir=folder)
        sft_and_tuned = paired_scores(sft, tuneds[0], questions, config.judges)
        against_sft = comparisons(*sft_and_tuned, config, models=("sft", "tuned"))
        base_and_sft = paired_scores(bases[0], sft, questions, config.judges)
        results += comparisons(*base_and_sft, config, models=("base", "sft")) + against_sft
        notes.append(note_against_sft(against_sft[0]))
    notes += [
        note_tokens(base, tuned),
        *note_agreement(base, tuned, config.judges),
        *take_judge_notes(judges_of(config)),
    ]
    report = Report(
        title=title,
        verdict=run,
        summary=summary,
        command=command,
        comparisons=tuple(results),
        categories=tuple(by_category(base, tuned, questions, primary)),
        history=tuple(history),
        text_examples=tuple(
            examples(
                base,
                tuned,
                questions,
                primary,
                count=MAX_EXAMPLES,
                is_transcription=not TRANSCRIPTION_JUDGES.isdisjoint(config.judges),
            )
        ),
        settings={**(settings or {}), **_settings(config, len(questions))},
        notes=tuple(note for note in notes if note),
        unit=voters(results[0], "questions"),
        provenance=provenance_line(),
    )
    if process_rank().is_first:
        combine_parts(folder / RESPONSES_FILE)
        with write_results(folder) as temporary:
            write_report(temporary, report)
    return CompareResult(run, tuple(results), report.notes, folder / "report.html")


def read_question_sets(config: CompareResponsesConfig) -> list[tuple[CompareResponsesConfig, list[Question]]]:
    """Return settings and questions of the comparison, then of each side set. Raise ValueError as `read_sets`."""
    return read_sets(config, _read_questions, len)


def _read_questions(config: CompareResponsesConfig) -> list[Question]:
    questions = read_questions(config.questions, limit=config.max_questions, part=config.part, rubric=config.rubric)
    check_ground_truths(config.judges, questions)
    if len(questions) > 1 and len(set(image_groups(questions))) == 1:
        raise ValueError(
            f"questions {config.questions!r}: all are about the same image. Their responses depend on each other, and an interval "
            "needs 2 images or more. Add questions about others"
        )
    return questions


def _base_responses(
    policy: TextPolicy | None, sets: Sequence[tuple[CompareResponsesConfig, list[Question]]]
) -> list[ScoredResponses]:
    """Responses of the model without its adapter, or with the base's own."""
    config = sets[0][0]
    own = config.base_adapter
    if own is None:
        return _generate(policy, sets, base=True)
    with_own = [(dataclasses.replace(each, adapter=own), questions) for each, questions in sets]
    return _generate(_load(config, own), with_own, base=False, title="base model")


def _generate(
    policy: TextPolicy | None,
    sets: Sequence[tuple[CompareResponsesConfig, list[Question]]],
    *,
    base: bool,
    title: str | None = None,
) -> list[ScoredResponses]:
    """Generate and score the responses to the questions of each set. title: name of the model in answers.jsonl."""
    title = title or ("base model" if base else "tuned model")
    return [
        generate_responses(
            policy,
            questions,
            own,
            base=base,
            title=f"{title} on {source_of(own)}" if number else title,
            output_dir=Path(own.output_dir),
        )
        for number, (own, questions) in enumerate(sets)
    ]


def _settings(config: CompareResponsesConfig, count: int) -> dict[str, str]:
    """Describe for the report how the responses were generated."""
    decoding = f"sampled at temperature {config.temperature:g}" if config.temperature else "greedy"
    return {
        "model": config.model,
        "adapter": config.adapter or "none",
        **name_base(config.base_adapter, config.adapter),
        "questions": f"{config.questions}, {count} questions{f', part {config.part}' if config.part else ''}",
        **name_side_sets(config),
        "decoding": f"{decoding}, at most {config.max_new_tokens} tokens",
        **({"linear layers": config.quantize} if config.quantize else {}),
        **({"served": f"{config.served} and {config.served_tuned}"} if config.server else {}),
        "seed": str(config.seed),
        "responses": f"{config.output_dir}/{RESPONSES_FILE} lists every response",
    }


def _load(config: CompareResponsesConfig, adapter: str | None) -> TextPolicy | None:
    """Load a model. None if a server has it."""
    if config.server:
        return None
    options = {name: getattr(config, name) for name in ("precision", "quantize", "min_pixels", "max_pixels")}
    return load_text_policy(config.model, revision=config.revision, adapter=adapter, **options)

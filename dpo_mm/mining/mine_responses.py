"""Preference pairs from a reader's or captioner's own failures: ask it, judge its answers, reject the worst.

rejected is what the model itself said (a loop cut three rounds after the truth's own, see `judges.text.truncate_repetition`),
chosen is the truth, its own best, or the same answer corrected. Each row keeps why it was rejected and how it was
drawn. Finished shards are kept; a restarted run goes on after them, and one that is asked to stop (SIGTERM) ends after
its shard. Processes share the questions (RANK of WORLD_SIZE).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_mm.config import MineResponsesConfig, as_dict
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.parquet import combine_shards, write_rows
from dpo_mm.data.questions import Question, read_questions
from dpo_mm.data.schema import Response, make_response_rows, response_preference
from dpo_mm.errors import TrainingInterrupted
from dpo_mm.judges import Ratio, better_of, correct, explain, load_judge
from dpo_mm.judges.text import truncate_repetition
from dpo_mm.policies.families import load_text_policy
from dpo_mm.policies.protocol import TextPolicy
from dpo_mm.progress import progress_bar
from dpo_mm.resumable import StopRequest, check_settings_unchanged, missing_shards


def mine_responses(config: MineResponsesConfig) -> Path:
    """Mine pairs as the config says; returns the Parquet file of `ResponsePreference` rows.

    Raises ValueError where the folder was mined with other settings, a question has no truth, or nothing failed; Stopped
    after a SIGTERM.
    """
    _check(config)
    folder = Path(config.output_dir)
    questions = read_questions(config.questions, limit=config.max_questions)
    blank = next((question.id for question in questions if not question.truth), None)
    if blank is not None:
        raise ValueError(f"{config.questions}: question {blank} has no truth, which judges compare answers with")
    check_settings_unchanged(folder, as_dict(config), done="mined")
    shards = [questions[i : i + config.shard_size] for i in range(0, len(questions), config.shard_size)]
    places = [folder / f"shard-{number:05}.parquet" for number in range(len(shards))]
    _mine_shards(shards, places, config)
    nothing = f"none of its answers to {len(questions)} questions failed by {config.judge}; ask more, or sample some"
    return combine_shards(places, folder / "pairs.parquet", nothing=f"{config.output_dir}: {nothing}")


def _check(config: MineResponsesConfig) -> None:
    if config.chosen not in ("ground_truth", "best", "corrected"):
        raise ValueError(f"chosen {config.chosen!r} is unknown; expected 'ground_truth', 'best' or 'corrected'")
    if config.chosen == "corrected":
        correct(config.judge, Response("", 0, hit_limit=False), "")
    if config.chosen == "best" and config.responses_per_question < 2:
        raise ValueError(
            "responses_per_question is 1; to choose the model's own best takes at least 1 answer beside the greedy one"
        )


def _mine_shards(shards: Sequence[Sequence[Question]], places: Sequence[Path], config: MineResponsesConfig) -> None:
    """Write the shards of this process that are not there yet."""
    left = missing_shards(places)
    if not left:
        return
    stop = StopRequest()
    policy = load_text_policy(
        config.model, revision=config.revision, precision=config.precision, adapter=config.adapter
    )
    total = sum(len(shards[n]) for n in left) * config.responses_per_question
    with progress_bar("asking and judging", total) as advance, stop.on_sigterm():
        for number in left:
            if stop.requested:
                there = sum(place.exists() for place in places)
                raise TrainingInterrupted(
                    f"stopped as asked, {there} of {len(places)} shards in {config.output_dir}; run it again"
                )
            rows = _mine_shard(policy, shards[number], config, advance)
            write_rows(rows, places[number], make=make_response_rows, features=response_preference())


def _mine_shard(
    policy: TextPolicy, questions: Sequence[Question], config: MineResponsesConfig, advance: Any
) -> list[dict[str, Any]]:
    ways = [
        "greedy",
        *(
            f"sampled at {config.temperature:g}, seed {config.seed + n}"
            for n in range(config.responses_per_question - 1)
        ),
    ]
    answers: list[list[Response]] = [[] for _ in questions]
    for place in range(len(ways)):
        drawn = policy.generate(
            [question.images for question in questions],
            [question.prompt for question in questions],
            max_new_tokens=config.max_new_tokens,
            do_sample=place > 0,
            temperature=config.temperature if place else 1.0,
            seed=config.seed + max(place - 1, 0),
            batch_size=config.batch_size,
        )
        for own, answer in zip(answers, drawn, strict=True):
            own.append(answer)
        advance(len(questions))
    rows = (build_pair(question, own, ways, config) for question, own in zip(questions, answers, strict=True))
    return [row for row in rows if row is not None]


def failure_scores(judge: str, answers: Sequence[Response], truth: str) -> list[float]:
    """How bad answers to one question are by a judge, higher is worse; 0 where it has nothing to say."""
    shares: list[Ratio] = load_judge(judge)(answers, [truth] * len(answers))
    sign = -1.0 if better_of(judge) == "higher" else 1.0
    return [sign * share.hits / share.of if share.of else 0.0 for share in shares]


def build_pair(
    question: Question, answers: Sequence[Response], ways: Sequence[str], config: MineResponsesConfig
) -> dict[str, Any] | None:
    """The row of one question: its worst answer rejected, the truth or its own best chosen; None where none failed."""
    whole = Response(question.truth, 0, hit_limit=False)
    *bad, perfect = failure_scores(config.judge, [*answers, whole], question.truth)
    worst = max(range(len(answers)), key=bad.__getitem__)
    chosen, floor = question.truth, perfect
    if config.chosen == "best":
        second = failure_scores(config.tie_break, answers, question.truth)
        best = min(range(len(answers)), key=lambda n: (bad[n], second[n]))
        chosen, floor = answers[best].text, bad[best]
    rejected = answers[worst]
    if config.chosen == "corrected":
        chosen = correct(config.judge, rejected, question.truth)
        (floor,) = failure_scores(config.judge, [Response(chosen, 0, hit_limit=False)], question.truth)
    if bad[worst] - floor <= config.min_score_gap or not chosen.strip() or rejected.text == chosen:
        return None
    text = truncate_repetition(rejected.text, question.truth) if rejected.hit_limit else rejected.text
    return {
        "id": f"{question.id}/{worst}",
        "images": [{"bytes": encode_png(image), "path": None} for image in question.images],
        "prompt": question.prompt,
        "chosen": chosen,
        "rejected": text,
        "rejected_truncated": rejected.hit_limit,
        "score_gap": bad[worst] - floor,
        "axis": config.judge,
        "reason": explain(config.judge, rejected, question.truth).reason or f"worse by {config.judge}",
        "model": config.model,
        "decoding": ways[worst],
        "source": f"own failures on {config.questions}, chosen: {config.chosen}",
    }

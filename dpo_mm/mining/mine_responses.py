"""Preference pairs from a text model's own failures: generate responses, score them, reject the worst.

`rejected` is the model's own response. A repetition loop in it is truncated three repeats after those of the ground
truth (`judges.text.truncate_repetition`). `chosen` is the ground truth, the model's best response, or the same response
corrected. Each row records why it was rejected and how it was decoded.

Finished shards are saved, and a restarted run continues after them. SIGTERM and Ctrl-C end a run after its shard.
Processes share the questions (RANK of WORLD_SIZE).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dpo_mm.config import MineResponsesConfig, as_dict
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.parquet import combine_shards, write_rows
from dpo_mm.data.questions import Question, questions_file, read_questions
from dpo_mm.data.schema import Response, make_response_rows, response_preference
from dpo_mm.files.checksums import all_intact, missing_shards, saved_shards
from dpo_mm.files.content_key import content_hash, library_versions
from dpo_mm.files.outputs import output_folder, refuse_foreign_folder, settings_of, write_results
from dpo_mm.judges import better_of, correct, explain, is_pairwise, judge_digests, take_judge_notes, takes_questions
from dpo_mm.judges.score_checks import check_ground_truths, response_ratios
from dpo_mm.judges.text import truncate_repetition
from dpo_mm.mining.mine_images import MINING
from dpo_mm.policies.adapter_sources import adapter_content
from dpo_mm.policies.families import load_text_policy, model_content
from dpo_mm.policies.protocol import TextPolicy
from dpo_mm.policies.vlm.decoding import Decoding
from dpo_mm.policies.vlm.served import check_server_settings, served_responses
from dpo_mm.printing.progress import progress_bar
from dpo_mm.process.interruption import StopRequest, complete_part, stop_on_signal

logger = logging.getLogger(__name__)

LOOP_JUDGES = ("degeneration",)
"""Judges whose score of a response in a loop does not depend on the rest of the loop, so generation stops in it."""


def mine_responses(config: MineResponsesConfig) -> Path:
    """Mine response pairs.

    Args:
        config: model, questions, judge and decoding.

    Returns:
        Path of the Parquet file of `ResponsePreference` rows.

    Raises:
        ValueError: if the folder was mined with other settings or has other files, a setting does not fit, a question has no ground
            truth, or no response failed.
        TrainingInterrupted: after SIGTERM or Ctrl-C, when the current shard is saved.
    """
    _validate_config(config)
    folder, inputs = Path(config.output_dir), [str(questions_file(config.questions)), config.model, config.adapter]
    refuse_foreign_folder(folder, MINING, inputs=inputs)
    questions = read_questions(config.questions, limit=config.max_questions, rubric=config.rubric)
    without = next((question.id for question in questions if not question.has_ground_truth), None)
    if without is not None:
        raise ValueError(f"{config.questions}: question {without} has no ground truth, and mining needs it. Add it.")
    check_ground_truths([config.judge], questions)
    described = next((question.id for question in questions if not question.truth_is_response), None)
    if described is not None and config.chosen == "ground_truth":
        raise ValueError(
            f"{config.questions}: the ground truth of question {described} describes correct responses and is not one. Set chosen: best"
        )
    settings = settings_of("mined response pairs", ingredients(config, questions))
    with output_folder(folder, MINING, settings, inputs=inputs, overwrite=config.overwrite) as finished:
        if not finished:
            _mine(config, questions)
    return folder / "pairs.parquet"


def _mine(config: MineResponsesConfig, questions: Sequence[Question]) -> None:
    """Write this process's shards that do not exist yet, and combine them when all exist."""
    folder = Path(config.output_dir)
    shards = [questions[i : i + config.shard_size] for i in range(0, len(questions), config.shard_size)]
    paths = [folder / f"shard-{number:05}.parquet" for number in range(len(shards))]
    _mine_shards(shards, paths, config)
    for note in take_judge_notes([config.judge, config.tie_break]):
        logger.warning("%s", note)
    empty_message = (
        f"{config.output_dir}: no response to {len(questions)} questions failed by {config.judge}. Use more questions, "
        "or increase responses_per_question."
    )
    if all_intact(paths, folder / "pairs.parquet"):
        with write_results(folder) as temporary:
            combine_shards(paths, temporary / "pairs.parquet", empty_message=empty_message)


def ingredients(config: MineResponsesConfig, questions: Sequence[Question]) -> dict[str, Any]:
    """Return what decides the mined pairs, see `dpo_mm.files.content_key`. A batch draws its samples with one seed."""
    sampled = config.responses_per_question > 1 and not config.server
    return {
        "settings": as_dict(config) | ({"batch_size of sampling": config.batch_size} if sampled else {}),
        "model": None if config.server else model_content(config.model, revision=config.revision),
        "adapter": adapter_content(config.adapter),
        "questions": content_hash([question.content for question in questions]),
        "judges": judge_digests([config.judge]),
        "libraries": library_versions(),
    }


def _validate_config(config: MineResponsesConfig) -> None:
    """Raise ValueError for settings that do not fit together."""
    check_server_settings(config)
    for judge in (config.judge, config.tie_break):
        if takes_questions(judge) and is_pairwise(judge):
            raise ValueError(
                f"judge {judge!r} compares two responses and does not score one. Use it with dpo-mm compare."
            )
    if config.chosen not in ("ground_truth", "best", "corrected"):
        raise ValueError(f"chosen {config.chosen!r} is unknown. Use 'ground_truth', 'best' or 'corrected'.")
    if config.chosen == "corrected":
        correct(config.judge, Response("", 0, hit_limit=False), "")
    if config.chosen == "best" and config.responses_per_question < 2:
        raise ValueError("responses_per_question is 1. With chosen: best, use at least 2.")


def _mine_shards(shards: Sequence[Sequence[Question]], paths: Sequence[Path], config: MineResponsesConfig) -> None:
    """Write this process's shards that do not exist yet."""
    missing = missing_shards(paths)
    if not missing:
        return
    policy = None if config.server else _load_policy(config)
    total = sum(len(shards[number]) for number in missing) * config.responses_per_question
    saved = lambda: saved_shards(config.output_dir)
    part: AbstractContextManager[StopRequest | None]
    part = complete_part(saved) if policy else stop_on_signal(saved)  # a server's responses are saved one by one
    with progress_bar("generating and scoring responses", total) as advance, part as stop:
        for number in missing:
            if stop and stop.requested:
                break
            rows = _mine_shard(policy, shards[number], config, advance, _arrived(paths[number]))
            write_rows(rows, paths[number], make=make_response_rows, features=response_preference())
            _arrived(paths[number]).unlink(missing_ok=True)


def _arrived(shard: Path) -> Path:
    """File of the responses of an unfinished shard that have arrived from a server."""
    return shard.with_name(f".{shard.stem}.jsonl")


def _load_policy(config: MineResponsesConfig) -> TextPolicy:
    options = {name: getattr(config, name) for name in ("precision", "quantize", "min_pixels", "max_pixels")}
    return load_text_policy(config.model, revision=config.revision, adapter=config.adapter, **options)


def _mine_shard(
    policy: TextPolicy | None,
    questions: Sequence[Question],
    config: MineResponsesConfig,
    advance: Any,
    arrived: Path | None = None,
) -> list[dict[str, Any]]:
    """Generate and score the responses to some questions and return the rows of their pairs.

    Without a policy, the config's server responds, and its responses are saved in `arrived`.
    """
    advance((len(questions) - len(questions := _decodable(questions))) * config.responses_per_question)
    if not questions:
        return []
    seeds = [config.seed + n for n in range(config.responses_per_question - 1)]
    decodings = [Decoding(0.0, config.seed), *(Decoding(config.temperature, seed) for seed in seeds)]
    if policy is None:
        assert arrived is not None
        responses = served_responses(config, str(config.served), questions, decodings, file=arrived, advance=advance)
    else:
        responses = _generate(policy, questions, decodings, config, advance)
    _store_scores(questions, responses, config)
    names = ["greedy", *(f"sampled at {config.temperature:g}, seed {seed}" for seed in seeds)]
    rows = (
        build_pair(question, question_responses, names, config)
        for question, question_responses in zip(questions, responses, strict=True)
    )
    return [row for row in rows if row is not None]


def _generate(
    policy: TextPolicy,
    questions: Sequence[Question],
    decodings: Sequence[Decoding],
    config: MineResponsesConfig,
    advance: Any,
) -> list[list[Response]]:
    """Generate the responses to each question, the greedy one first."""
    responses: list[list[Response]] = []
    stops_loops = config.judge in LOOP_JUDGES
    for start in range(0, len(questions), config.batch_size):
        batch = questions[start : start + config.batch_size]
        each = policy.generate_each(
            [question.images for question in batch],
            [question.prompt for question in batch],
            [Decoding(decoding.temperature, decoding.seed + start) for decoding in decodings],
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            loop_references=["\n".join(question.ground_truths) for question in batch] if stops_loops else None,
        )
        responses += [list(of_question) for of_question in zip(*each, strict=True)]
        advance(len(batch) * len(decodings))
    return responses


def _store_scores(
    questions: Sequence[Question], responses: Sequence[Sequence[Response]], config: MineResponsesConfig
) -> None:
    """Let a judge that is a model score all responses at once. Its replies are stored, and each question then reads its own."""
    if takes_questions(config.judge):
        perfect = [Response(question.ground_truth, 0, hit_limit=False) for question in questions]
        several = [(question, each) for question, own in zip(questions, responses, strict=True) for each in own]
        several += zip(questions, perfect, strict=True)
        repeated = [question for question, _ in several]
        response_ratios(config.judge, [each for _, each in several], [q.ground_truths for q in repeated], repeated)


def _decodable(questions: Sequence[Question]) -> list[Question]:
    """Return the questions whose images decode. The others are left out with a warning that names them."""
    decodable = []
    for question in questions:
        try:
            for _ in question.images:
                pass
            decodable.append(question)
        except ValueError as error:
            logger.warning("%s. The question is left out", error)
    return decodable


def failure_scores(judge: str, responses: Sequence[Response], question: Question) -> list[float]:
    """Score how badly responses to one question fail.

    Args:
        judge: name of the judge.
        responses: responses to the question.
        question: the question, with its correct responses, of which any is right.

    Returns:
        One score per response, higher is worse. 0 if the judge counts nothing in it, NaN if a model gives it no score.
    """
    count = len(responses)
    ratios = response_ratios(judge, responses, [question.ground_truths] * count, [question] * count)
    sign, unscored = -1.0 if better_of(judge) == "higher" else 1.0, math.nan if takes_questions(judge) else 0.0
    return [sign * hits / total if total else unscored for hits, total in ratios.tolist()]


def build_pair(
    question: Question, responses: Sequence[Response], decodings: Sequence[str], config: MineResponsesConfig
) -> dict[str, Any] | None:
    """Build the row of one question, with its worst response as rejected.

    Args:
        question: the question with its ground truth.
        responses: the model's responses, the greedy one first.
        decodings: how each was decoded.
        config: the judge, the smallest gap and the source of chosen.

    Returns:
        The row. None if no response is worse than chosen by more than the gap.
    """
    perfect = Response(question.ground_truth, 0, hit_limit=False)
    *scores, chosen_score = failure_scores(config.judge, [*responses, perfect], question)
    scored = [number for number, score in enumerate(scores) if not math.isnan(score)]
    if not scored:
        return None
    worst = max(scored, key=scores.__getitem__)
    rejected, chosen, chosen_truncated = responses[worst], question.ground_truth, False
    if config.chosen == "best":
        ties = failure_scores(config.tie_break, responses, question)
        best = min(scored, key=lambda n: (scores[n], math.isnan(ties[n]), ties[n]))
        chosen, chosen_score, chosen_truncated = responses[best].text, scores[best], responses[best].hit_limit
    elif config.chosen == "corrected":
        chosen = correct(config.judge, rejected, question.ground_truth)
        (chosen_score,) = failure_scores(config.judge, [Response(chosen, 0, hit_limit=False)], question)
    score_gap = scores[worst] - chosen_score
    is_empty = bool(question.ground_truth.strip()) and not chosen.strip()  # an empty page has an empty truth
    if not score_gap > config.min_score_gap or is_empty or rejected.text == chosen:
        return None
    text = truncate_repetition(rejected.text, question.ground_truth) if rejected.hit_limit else rejected.text
    return {
        "id": f"{question.id}/{worst}",
        "images": [{"bytes": encode_png(image), "path": None} for image in question.images],
        "prompt": question.prompt,
        "chosen": chosen,
        "rejected": text,
        "chosen_truncated": chosen_truncated,
        "rejected_truncated": rejected.hit_limit,
        "score_gap": score_gap,
        "axis": config.judge,
        "reason": explain(config.judge, rejected, question.ground_truth).reason or f"worse by {config.judge}",
        "model": config.model,
        "decoding": decodings[worst],
        "source": f"own failures on {config.questions}, chosen: {config.chosen}",
    }

"""Response generation of a comparison. Each batch is saved, so that an interrupted comparison resumes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_mm.config import CompareResponsesConfig
from dpo_mm.data.questions import Question, image_groups
from dpo_mm.data.schema import Response
from dpo_mm.files.content_key import content_hash, content_key, library_versions, lora_scales
from dpo_mm.files.json_lines import append_lines, own_part, read_parts
from dpo_mm.judges import is_pairwise, takes_questions
from dpo_mm.judges.score_checks import response_ratios
from dpo_mm.policies.protocol import TextPolicy
from dpo_mm.policies.vlm.served import Decoding, served_responses
from dpo_mm.printing.progress import progress_bar
from dpo_mm.process.process_rank import process_rank, wait_for_others

RESPONSES_FILE = "answers.jsonl"


@dataclass(frozen=True)
class ScoredResponses:
    """Responses of one model and their scores.

    Args:
        responses: one per question, (questions,).
        ratios: hits and totals by judge, (questions, 2) each.
        groups: group of each question, see `image_groups`, (questions,). None: each question is one.
    """

    responses: list[Response]
    ratios: dict[str, np.ndarray] = field(default_factory=dict)
    groups: np.ndarray | None = None


def generate_responses(
    policy: TextPolicy | None,
    questions: Sequence[Question],
    config: CompareResponsesConfig,
    *,
    base: bool,
    title: str,
    output_dir: Path | None = None,
) -> ScoredResponses:
    """Generate and score one response per question.

    Args:
        policy: the model, with its adapter attached. None: the config's server responds.
        questions: prompts with images and ground truth.
        config: decoding settings and judges.
        base: whether the model responds without its adapter.
        title: name of the model, in the progress bar and in answers.jsonl.
        output_dir: folder of answers.jsonl. Each response is saved there with its settings. A batch that is in the file with
            the same settings is not generated again, and several processes share the batches. None: nothing is saved.
    """
    if policy is None:
        responses = _request_responses(questions, config, base=base, title=title)
        return score_responses(responses, questions, config)
    starts = range(0, len(questions), config.batch_size)
    parts = [questions[start : start + config.batch_size] for start in starts]
    share = process_rank().share(len(parts)) if output_dir else range(len(parts))
    saved = _saved(output_dir) if output_dir else {}
    with (
        progress_bar(f"generating responses: {title}", sum(len(parts[number]) for number in share)) as advance,
        policy.base_weights() if base else contextlib.nullcontext(),
    ):
        settings = generation_settings(policy, config, base=base) if output_dir else {}
        batches: dict[int, list[Response]] = {}
        for number in share:
            part, keys = parts[number], _keys(settings, parts[number])
            if output_dir and all(key in saved for key in keys):
                batches[number] = [saved[key] for key in keys]
            else:
                batches[number] = _generate_batch(policy, part, config, seed=config.seed + starts[number])
                if output_dir:
                    rows = [
                        {"key": key, "question": question.id, "by": title, **response._asdict(), **settings}
                        for key, question, response in zip(keys, part, batches[number], strict=True)
                    ]
                    output_dir.mkdir(parents=True, exist_ok=True)
                    append_lines(own_part(output_dir / RESPONSES_FILE), rows)
            advance(len(part))
    if output_dir and len(batches) < len(parts):
        others = {number: _keys(settings, part) for number, part in enumerate(parts) if number not in batches}
        batches |= _wait_for(others, output_dir, title)
    responses = [response for number in range(len(parts)) for response in batches[number]]
    return score_responses(responses, questions, config)


def _wait_for(batches: Mapping[int, Sequence[str]], folder: Path, title: str) -> dict[int, list[Response]]:
    """Wait until the other processes have made these batches, given as keys, and return them."""
    saved: dict[str, Response] = {}

    def look() -> str | None:
        saved.update(_saved(folder))
        return next((f"a response of {title}" for keys in batches.values() for key in keys if key not in saved), None)

    wait_for_others(look, lambda: len(saved))
    return {number: [saved[key] for key in keys] for number, keys in batches.items()}


def _saved(folder: Path) -> dict[str, Response]:
    """Return the responses on disk by their keys, those of other processes included."""
    return {
        row.get("key", ""): Response(*(row[name] for name in Response._fields))
        for row in read_parts(folder / RESPONSES_FILE)
        if _is_response(row)
    }


def _request_responses(
    questions: Sequence[Question], config: CompareResponsesConfig, *, base: bool, title: str
) -> list[Response]:
    """Request one response per question from the config's server."""
    served, decoding = config.served if base else config.served_tuned, Decoding(config.temperature, config.seed)
    file = Path(config.output_dir) / RESPONSES_FILE
    with progress_bar(f"requesting responses: {title}", len(questions)) as advance:
        each = served_responses(config, str(served), questions, [decoding], file=file, by=title, advance=advance)
    return [responses[0] for responses in each]


def _is_response(row: dict[str, Any]) -> bool:
    """Return True if a saved row contains a response."""
    kinds = {"text": str, "tokens": int, "hit_limit": bool}
    return all(isinstance(row.get(name), kind) for name, kind in kinds.items())


def _generate_batch(
    policy: TextPolicy, part: Sequence[Question], config: CompareResponsesConfig, *, seed: int
) -> list[Response]:
    """Generate the responses to one batch of questions."""
    responses: list[Response] = policy.generate(
        [question.images for question in part],
        [question.prompt for question in part],
        max_new_tokens=config.max_new_tokens,
        do_sample=config.temperature > 0,
        temperature=config.temperature or 1.0,
        seed=seed,
        batch_size=config.batch_size,
    )
    return responses


def generation_settings(policy: TextPolicy, config: CompareResponsesConfig, *, base: bool) -> dict[str, Any]:
    """Return everything but its batch that determines a response, as plain values.

    Call it while the policy is in the state in which it generates: for the base, inside `base_weights`.
    """
    lora = {name: tensor for name, tensor in policy.model.state_dict().items() if "lora_" in name}
    tuned = {} if base else {"weights": lora, "scales": lora_scales(policy.model)}
    return {
        "model": config.model,
        "revision": config.revision,
        "adapter": None if base else config.adapter,
        "weights": content_hash([policy.fingerprint(), tuned]),
        "generation": content_hash(getattr(policy.model, "generation_config", None)),
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
        "dtype": config.precision,
        "device": torch.cuda.get_device_name() if policy.device.type == "cuda" else policy.device.type,
        "libraries": library_versions(),
    }


def _keys(settings: dict[str, Any], part: Sequence[Question]) -> list[str]:
    """Hash each response's settings and its whole batch, on which padding and sampling depend."""
    if not settings:
        return [""] * len(part)
    # Each image is read once, not once per response.
    batch = content_hash([[question.prompt, question.content["images"]] for question in part])
    decisive = {name: value for name, value in settings.items() if name not in ("model", "revision", "adapter")}
    ingredients = [{**decisive, "batch": [number, batch]} for number in range(len(part))]
    return [content_key("response of a comparison", parts) for parts in ingredients]


def score_responses(
    responses: list[Response], questions: Sequence[Question], config: CompareResponsesConfig
) -> ScoredResponses:
    """Score responses with each judge of the config, except for those that compare two responses.

    Raises:
        ValueError: if a judge does not return one ratio per response.
    """
    ground_truths = [question.ground_truths for question in questions]
    scores = {}
    for name in config.judges:
        if not (takes_questions(name) and is_pairwise(name)):
            scores[name] = response_ratios(name, responses, ground_truths, questions)
    return ScoredResponses(responses, scores, image_groups(questions))

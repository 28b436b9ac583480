"""Answers of a comparison, asked once and judged: kept as they come, so that a comparison which was cut goes on."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_mm.config import CompareResponsesConfig
from dpo_mm.data.questions import Question
from dpo_mm.data.schema import Response
from dpo_mm.evaluation.image_store import append, read_lines
from dpo_mm.judges import Ratio, load_judge
from dpo_mm.policies.protocol import TextPolicy
from dpo_mm.progress import progress_bar

ANSWERS = "answers.jsonl"
LIBRARIES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class ScoredResponses:
    """A model's answers to the questions, (questions,), and their shares by judge, (questions, 2)."""

    answers: list[Response]
    shares: dict[str, np.ndarray] = field(default_factory=dict)


def generate_responses(
    policy: TextPolicy,
    questions: Sequence[Question],
    config: CompareResponsesConfig,
    *,
    base: bool,
    title: str,
    keep: Path | None = None,
) -> ScoredResponses:
    """The answers of the policy, or of its base without the adapter, judged.

    keep: a folder whose answers.jsonl has every answer with how it was asked for; whole batches that are there as they
    would be asked now are not asked again.
    """
    answers: list[Response] = []
    kept = {row["key"]: row for row in read_lines(keep / ANSWERS)} if keep else {}
    with progress_bar(title, len(questions)) as advance, policy.base_weights() if base else contextlib.nullcontext():
        how = asking(policy, config, base=base) if keep else {}
        for start in range(0, len(questions), config.batch_size):
            part = questions[start : start + config.batch_size]
            keys = [_key(how, part, number) for number in range(len(part))]
            if keep and all(key in kept for key in keys):
                found = [Response(*(kept[key][name] for name in Response._fields)) for key in keys]
            else:
                found = _asked(policy, part, config, seed=config.seed + start)
                if keep:
                    rows = zip(keys, part, found, strict=True)
                    named = [{"key": k, "question": q.id, "by": title, **a._asdict(), **how} for k, q, a in rows]
                    keep.mkdir(parents=True, exist_ok=True)
                    append(keep / ANSWERS, named)
            answers += found
            advance(len(part))
    return score_responses(answers, questions, config)


def _asked(
    policy: TextPolicy, part: Sequence[Question], config: CompareResponsesConfig, *, seed: int
) -> list[Response]:
    found: list[Response] = policy.generate(
        [question.images for question in part],
        [question.prompt for question in part],
        max_new_tokens=config.max_new_tokens,
        do_sample=config.temperature > 0,
        temperature=config.temperature or 1.0,
        seed=seed,
        batch_size=config.batch_size,
    )
    return found


def asking(policy: TextPolicy, config: CompareResponsesConfig, *, base: bool) -> dict[str, Any]:
    """All that decides an answer beside its batch, as plain values; called where the policy is as it will answer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.model.state_dict().items()):
        if not base or "lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {
        "model": config.model,
        "revision": config.revision,
        "adapter": None if base else config.adapter,
        "weights": digest.hexdigest(),
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
        "dtype": config.precision,
        "device": torch.cuda.get_device_name() if policy.device.type == "cuda" else policy.device.type,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _key(how: dict[str, Any], part: Sequence[Question], number: int) -> str:
    """What an answer is found by: how it was asked for, and its whole batch, which padding and sampling depend on."""
    if not how:
        return ""
    batch = [[str(one.prompt), [hashlib.sha256(image.tobytes()).hexdigest() for image in one.images]] for one in part]
    decides = {name: value for name, value in how.items() if name not in ("model", "revision", "adapter")}
    return hashlib.sha256(json.dumps([decides, batch, number], sort_keys=True).encode()).hexdigest()


def score_responses(
    answers: list[Response], questions: Sequence[Question], config: CompareResponsesConfig
) -> ScoredResponses:
    """Answers with what each judge says of them. Raises ValueError where a judge returns something else."""
    truths = [question.truth for question in questions]
    found = {}
    for name in config.judges:
        shares: list[Ratio] = load_judge(name)(answers, truths)
        found[name] = np.array(shares, dtype=np.float64)
        if found[name].shape != (len(answers), 2):
            raise ValueError(
                f"judge {name!r} returned {found[name].shape} for {len(answers)} answers; expected a Share each"
            )
    return ScoredResponses(answers, found)

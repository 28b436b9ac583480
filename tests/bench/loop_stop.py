"""What mining saves by stopping loops, dropping rows that have ended and encoding images once, and whether it stops a wrong one.

    nice -n 19 python -m tests.bench.loop_stop --out docs/benchmarks/loop-stop.json   # 6 CPU minutes

`runs`: the bundled OCR model responds to pages with and without the stop, in batches of 100, with the recipe's limit of 200
tokens. The rule was chosen on the first 400 pages of pages-train, greedy. The other rows confirm it. `wrong` counts stopped
responses that would have ended by themselves. `pairs_differ` counts mined rows that are not the same in both runs.
`forward_passes` are the steps of generation: the longest response of each batch.

`mining`: the bundled models respond as their recipes mine, with one greedy response and sampled ones. `transformers` is one
call of its `generate` per decoding and batch, without a stop. `here` is what mining does. `slots` are tokens that the model's
body computed after the prompts, padding included. `useful` is the fraction of slots whose token is in a response. A response
that was stopped counts up to its stop. `differ` counts responses that are not those of transformers up to their end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

BATCH, LIMIT = 100, 200
RUNS = (("pages-train", False), ("pages-held-out", False), ("pages-held-out", True), ("pages-train", True))
MINING = (("page-reader", "pages-train", "degeneration", 2, 200), ("shapes-captioner", "scenes-train", None, 4, 48))
"""Model, questions, judge that stops loops, responses per question, and limit of tokens, as in the recipes."""


def measure(policy: Any, questions: Any, *, sampled: bool) -> dict[str, Any]:
    """Generate with and without the stop, and compare responses and mined rows."""
    from dpo_mm.config import MineResponsesConfig
    from dpo_mm.mining.mine_responses import build_pair

    config = MineResponsesConfig("page-reader", "q", "o", "degeneration")
    images, prompts = [q.images for q in questions], [q.prompt for q in questions]
    limits = {"max_new_tokens": LIMIT, "do_sample": sampled, "seed": 0, "batch_size": BATCH}
    responses, seconds = [], []
    for references in (None, ["\n".join(q.ground_truths) for q in questions]):
        start = time.process_time()
        responses.append(policy.generate(images, prompts, **limits, loop_references=references))
        seconds.append(round(time.process_time() - start, 1))
    whole, stopped = responses
    rows = [
        [build_pair(q, [response], ["d"], config) for q, response in zip(questions, each, strict=True)]
        for each in responses
    ]
    keys = ("chosen", "rejected", "rejected_truncated", "score_gap")
    texts = [[row and [row[key] for key in keys] for row in each] for each in rows]
    short = [(one, other) for one, other in zip(whole, stopped, strict=True) if one.tokens != other.tokens]
    passes = [sum(max(r.tokens for r in each[n : n + BATCH]) for n in range(0, len(each), BATCH)) for each in responses]
    return {
        "decoding": "sampled" if sampled else "greedy",
        "responses": len(whole),
        "at_the_limit": sum(r.hit_limit for r in whole),
        "stopped": len(short),
        "wrong": sum(not one.hit_limit for one, _ in short),
        "pairs": sum(row is not None for row in rows[0]),
        "pairs_differ": sum(one != other for one, other in zip(*texts, strict=True)),
        "tokens": [sum(r.tokens for r in each) for each in responses],
        "forward_passes": passes,
        "cpu_seconds": seconds,
    }


def generate_as_transformers(policy: Any, questions: Sequence[Any], decodings: Sequence[Any], limit: int) -> list[Any]:
    """Respond with one call of transformers' `generate` per decoding and batch."""
    from dpo_mm.data.conversation import as_messages
    from dpo_mm.policies.vlm.decoding import with_plain_generation
    from dpo_mm.policies.vlm.generation import batch_inputs, generation_limits

    responses: list[Any] = []
    for temperature, seed in decodings:
        of_decoding: list[Any] = []
        for start in range(0, len(questions), BATCH):
            batch = questions[start : start + BATCH]
            prompts = [policy.encoder.prompt(q.images, as_messages(q.prompt, "user"), label=q.id) for q in batch]
            inputs = batch_inputs(policy, prompts)
            torch.manual_seed(seed + start)
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
            )
            output = with_plain_generation(policy.base_model).generate(
                **inputs, **generation_limits(policy, max_new_tokens=limit), **sampling
            )
            of_decoding += [policy.encoder.response(row.tolist()) for row in output[:, inputs["input_ids"].shape[1] :]]
        responses.append(of_decoding)
    return responses


def count_work(policy: Any, respond: Any) -> tuple[list[Any], dict[str, Any]]:
    """Call `respond` and count images, tokens of prompts, slots and passes of the model."""
    counts: Counter[str] = Counter()

    def count(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        rows, columns = inputs["input_ids"].shape
        counts["slots" if columns == 1 else "prompt_tokens"] += rows * columns
        counts["forward_passes"] += 1

    def count_images(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        counts["images"] += len(arguments[0] if arguments else inputs["pixel_values"])

    tower = policy.base_model.base_model.vision_tower
    hooks = [
        policy.base_model.register_forward_pre_hook(count, with_kwargs=True),
        tower.register_forward_pre_hook(count_images, with_kwargs=True),
    ]
    start = time.process_time()
    responses = respond()
    seconds = round(time.process_time() - start, 1)
    for hook in hooks:
        hook.remove()
    tokens = sum(response.tokens for of_decoding in responses for response in of_decoding)
    first = sum(len(of_decoding) for of_decoding in responses)  # the prompt gives the first token of each
    return responses, {
        **counts,
        "tokens": tokens,
        "useful": round((tokens - first) / counts["slots"], 3),
        "cpu_seconds": seconds,
    }


def measure_mining(model: str, name: str, judge: str | None, samples: int, limit: int, count: int) -> dict[str, Any]:
    """Respond to questions as the recipe mines, and with transformers."""
    from dpo_mm.data.questions import read_questions
    from dpo_mm.policies.families import load_text_policy
    from dpo_mm.policies.vlm.decoding import Decoding

    policy, questions = load_text_policy(model), read_questions(name, limit=count)
    decodings = [Decoding(0.0, 0), *(Decoding(1.0, seed) for seed in range(samples - 1))]
    references = ["\n".join(q.ground_truths) for q in questions] if judge else None
    images, prompts = [q.images for q in questions], [q.prompt for q in questions]
    limits = {"max_new_tokens": limit, "batch_size": BATCH, "loop_references": references}
    theirs, before = count_work(policy, lambda: generate_as_transformers(policy, questions, decodings, limit))
    ours, after = count_work(policy, lambda: policy.generate_each(images, prompts, decodings, **limits))
    pairs = [pair for both in zip(theirs, ours, strict=True) for pair in zip(*both, strict=True)]
    differ = sum(
        not one.text.startswith(other.text) if one.tokens > other.tokens else one != other for one, other in pairs
    )
    return {
        "model": model,
        "questions": name,
        "responses": len(pairs),
        "transformers": before,
        "here": after,
        "differ": differ,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from dpo_mm.data.questions import read_questions
    from dpo_mm.policies.families import load_text_policy

    policy, results = load_text_policy("page-reader"), []
    mining = [measure_mining(*run, options.questions) for run in MINING]
    print(json.dumps(mining, indent=1), flush=True)
    for name, sampled in RUNS:
        questions = read_questions(name, limit=options.questions)
        results.append({"questions": name, **measure(policy, questions, sampled=sampled)})
        print(json.dumps(results[-1]), flush=True)
    if options.out:
        options.out.write_text(
            json.dumps({"batch_size": BATCH, "max_new_tokens": LIMIT, "runs": results, "mining": mining}, indent=1)
        )


if __name__ == "__main__":
    main()

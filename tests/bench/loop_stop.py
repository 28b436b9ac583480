"""What mining saves by stopping responses in their repetition loops, and whether it stops a wrong one.

    python -m tests.bench.loop_stop --out docs/benchmarks/loop-stop.json

The bundled OCR model responds to pages with and without the stop, in batches of 100, with the recipe's limit of 200 tokens.
The rule was chosen on the first 400 pages of pages-train, greedy. The other rows confirm it. `wrong` counts stopped
responses that would have ended by themselves. `pairs_differ` counts mined rows that are not the same in both runs.
`forward_passes` are the steps of generation: the longest response of each batch.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

BATCH, LIMIT = 100, 200
RUNS = (("pages-train", False), ("pages-held-out", False), ("pages-held-out", True), ("pages-train", True))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from dpo_mm.data.questions import read_questions
    from dpo_mm.policies.families import load_text_policy

    policy, results = load_text_policy("page-reader"), []
    for name, sampled in RUNS:
        questions = read_questions(name, limit=options.questions)
        results.append({"questions": name, **measure(policy, questions, sampled=sampled)})
        print(json.dumps(results[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"batch_size": BATCH, "max_new_tokens": LIMIT, "runs": results}, indent=1))


if __name__ == "__main__":
    main()

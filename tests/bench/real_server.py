"""Compare the responses of a running server with those of the same model in this process, and show its error messages.

    vllm serve MODEL --served-model-name base --dtype float32 --generation-config vllm \\
      --enable-lora --max-lora-rank 16 --lora-modules tuned=ADAPTER
    python -m tests.bench.real_server OUT.json --server http://127.0.0.1:8000/v1 --model MODEL --served base \\
      [--adapter ADAPTER --served-tuned tuned] [--questions pages-held-out] [--max-questions 64] [--judge cer]

All requests are those of `dpo-mm mine` and `dpo-mm compare`. Four things are measured. Greedy responses: how many have the text,
the number of tokens and the truncation of the model in the process, which runs in the server's precision (`--precision`). If one
differs, the first such pair is in the file. Sampled responses: how many repeat with the same seed, at the same number of
requests at once and one after the other. Speed: seconds for the greedy responses, with several requests at once. Errors: the line
that dpo-mm prints for a wrong name, a prompt that is too long, a token limit above the context, and a large image. A text model
needs `--questions` without images, such as sums-held-out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import transformers
from PIL import Image

from dpo_mm.assets import resolve_asset
from dpo_mm.cli.terminal import run_as_command, suppress_library_output
from dpo_mm.config import MineResponsesConfig
from dpo_mm.data.questions import Question, read_questions
from dpo_mm.data.schema import Response
from dpo_mm.files.resumable import atomic_write
from dpo_mm.models.model_server import ServerError
from dpo_mm.policies.families import load_text_policy
from dpo_mm.policies.vlm.served import Decoding, served_responses

GREEDY = Decoding(0.0, 0)
SEEDS = (0, 1, 2)
SAMPLED_QUESTIONS = 24
CUT = "\ufffd"
"""What the process writes for a character of which the token limit cuts off some bytes."""
LARGE = (6000, 6000)
"""Pixels of the large image."""
LONG = "one two three four five six seven eight nine ten " * 20_000
"""A prompt of at least 200,000 tokens."""


class Server:
    """A running server, as the options of the command describe it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="real-server-"))
        self.calls = 0

    def respond(
        self,
        served: str,
        questions: Sequence[Question],
        decodings: Sequence[Decoding],
        *,
        at_once: int,
        max_new_tokens: int | None = None,
    ) -> list[list[Response]]:
        """Request responses that are not resumed from an earlier call."""
        self.calls += 1
        config = MineResponsesConfig(
            self.options.model,
            self.options.questions,
            str(self.folder),
            self.options.judge,
            server=self.options.server,
            served=served,
            batch_size=at_once,
            max_new_tokens=max_new_tokens or self.options.max_new_tokens,
        )
        return served_responses(config, served, questions, decodings, file=self.folder / f"{self.calls}.jsonl")

    def describe(self) -> dict[str, Any]:
        """Return what the server tells about itself: its version and its list of models."""
        root, told = self.options.server.removesuffix("/v1"), {}
        for name, address in {"version": f"{root}/version", "models": f"{self.options.server}/models"}.items():
            with contextlib.suppress(httpx.HTTPError, ValueError):
                reply = httpx.get(address, trust_env=False, timeout=10)
                told[name] = reply.json() if reply.status_code == 200 else None
        models = (told.get("models") or {}).get("data", [])
        kept = ("id", "owned_by", "parent", "max_model_len")
        return {
            "version": (told.get("version") or {}).get("version"),
            "models": [{name: model[name] for name in kept if model.get(name)} for model in models],
        }


def same(left: Sequence[Response], right: Sequence[Response]) -> dict[str, Any]:
    """Count the responses that agree, and return the first that do not."""
    pairs = list(zip(left, right, strict=True))
    differing = [number for number, (a, b) in enumerate(pairs) if a != b]
    counts: dict[str, Any] = {
        name: sum(getattr(a, name) == getattr(b, name) for a, b in pairs) for name in Response._fields
    }
    counts["text_without_cut_character"] = sum(a.text.rstrip(CUT) == b.text.rstrip(CUT) for a, b in pairs)
    if differing:
        counts["first_difference"] = {"row": differing[0], "pair": [each._asdict() for each in pairs[differing[0]]]}
    return counts


def greedy(server: Server, questions: Sequence[Question], served: str, adapter: str | None) -> dict[str, Any]:
    """Compare the greedy responses of one served model with those in this process."""
    options = server.options
    policy = load_text_policy(
        resolve_asset(options.model), adapter=adapter, device=options.device, precision=options.precision
    )
    images, prompts = [question.images for question in questions], [question.prompt for question in questions]
    expected = policy.generate(images, prompts, max_new_tokens=options.max_new_tokens, do_sample=False)
    start = time.perf_counter()
    given = [row[0] for row in server.respond(served, questions, [GREEDY], at_once=options.at_once)]
    seconds = time.perf_counter() - start
    return {
        "served": served,
        "responses": len(given),
        "same": same(given, expected),
        "truncated": sum(each.hit_limit for each in given),
        "tokens": sum(each.tokens for each in given),
        "seconds": round(seconds, 2),
        "texts": [each.text for each in given],
    }


def sampled(server: Server, questions: Sequence[Question], served: str) -> dict[str, Any]:
    """Count the sampled responses that repeat with their seed."""
    decodings, at_once = [Decoding(1.0, seed) for seed in SEEDS], server.options.at_once
    runs = [server.respond(served, questions, decodings, at_once=count) for count in (at_once, at_once, 1)]
    first, again, alone = ([response for row in run for response in row] for run in runs)
    return {
        "responses": len(first),
        "repeated": same(first, again)["text"],
        "repeated_one_by_one": same(first, alone)["text"],
        "questions_with_different_samples": sum(len({each.text for each in row}) > 1 for row in runs[0]),
        "questions": len(questions),
    }


def errors(server: Server, question: Question) -> dict[str, str]:
    """Return the line that each bad request ends with, or the response that the server gives in spite of it."""
    served, pixels = server.options.served, Image.new("RGB", LARGE, "white")
    long = Question("long", (), LONG, "", "")
    large = Question("large", (pixels,), "What is it?", "", "")
    requests: dict[str, tuple[str, Question, int]] = {
        "wrong name": ("no-such-model", question, 8),
        "prompt of 200,000 tokens": (served, long, 8),
        "token limit of 10,000,000": (served, question, 10_000_000),
    }
    if question.images:
        requests[f"image of {LARGE[0]} x {LARGE[1]} pixels"] = (served, large, 8)
    lines = {}
    for title, (name, asked, limit) in requests.items():
        try:
            response = server.respond(name, [asked], [GREEDY], at_once=1, max_new_tokens=limit)[0][0]
            lines[title] = f"no error: {response.tokens} tokens"
        except ServerError as error:
            lines[title] = str(error)
    return lines


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    server = Server(options)
    questions = read_questions(options.questions, limit=options.max_questions)
    served: dict[str, str | None] = {options.served: None}
    if options.served_tuned:
        served[options.served_tuned] = resolve_asset(options.adapter) if options.adapter else None
    results = [greedy(server, questions, name, adapter) for name, adapter in served.items()]
    texts = [result.pop("texts") for result in results]
    return {
        "command": "python -m tests.bench.real_server",
        "server": server.describe(),
        "transformers": transformers.__version__,
        "model": Path(options.model).name,
        "precision": options.precision,
        "questions": Path(options.questions).name,
        "max_new_tokens": options.max_new_tokens,
        "at_once": options.at_once,
        "greedy": results,
        **({"tuned_like_base": sum(a == b for a, b in zip(*texts, strict=True))} if len(texts) == 2 else {}),
        "sampled": sampled(server, questions[:SAMPLED_QUESTIONS], options.served),
        "errors": errors(server, questions[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("server", "served", "model"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in {"adapter": None, "served-tuned": None, "questions": "pages-held-out", "judge": "cer"}.items():
        parser.add_argument(f"--{name}", default=default)
    for name, number in {"max-questions": 64, "max-new-tokens": 160, "at-once": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--precision", default="fp32", help="precision of the model in this process")
    parser.add_argument("--device", default=None, help="device of the model in this process")
    options = parser.parse_args()
    if options.adapter and not options.served_tuned:
        parser.error("--adapter: set --served-tuned to the name under which the server offers it")
    suppress_library_output()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    results = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.out) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    with run_as_command():
        main()

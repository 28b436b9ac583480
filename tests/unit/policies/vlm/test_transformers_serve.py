"""A real server, `transformers serve` with the bundled reader, gives the responses of the model in this process."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers.utils.import_utils import is_serve_available

from dpo_mm.assets import resolve_asset
from dpo_mm.config import MineResponsesConfig
from dpo_mm.data.questions import read_questions
from dpo_mm.models import model_server
from dpo_mm.models.model_server import ServerError
from dpo_mm.policies.families import load_text_policy
from dpo_mm.policies.vlm.served import Decoding, served_responses
from tests.forked import Forked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="transformers serve needs the package openai"),
]
READER = resolve_asset("page-reader")
START_S = 120


def transformers_command() -> None:
    """Run transformers' command line."""
    from transformers.cli.transformers import main

    main()


@pytest.fixture
def server() -> Iterator[tuple[str, Forked]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["serve", READER, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = Forked(*flags, call=transformers_command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        deadline = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < deadline:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.kill()


def test_greedy_responses_are_those_of_the_model_in_this_process(
    server: tuple[str, Forked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, tokens and truncation. Mutations that it catches: another order of image and text, another chat template."""
    (url, process), questions = server, read_questions("pages-held-out", limit=12)
    config = MineResponsesConfig(READER, "q", "o", "cer", max_new_tokens=60, server=url, served=READER)
    greedy = [Decoding(0.0, 0)]
    responses = served_responses(config, READER, questions[:8], greedy, file=tmp_path / "answers.jsonl")
    images, prompts = [question.images for question in questions[:8]], [question.prompt for question in questions[:8]]
    policy = load_text_policy("page-reader", device="cpu")
    expected = policy.generate(images, prompts, max_new_tokens=60, do_sample=False)
    assert [row[0] for row in responses] == expected
    assert {response.hit_limit for response in expected} == {True, False}

    with pytest.raises(ServerError, match=rf"does not serve 'other' \(400: Server is pinned.*It serves {READER}"):
        served_responses(config, "other", questions[:1], greedy, file=tmp_path / "answers.jsonl")
    process.kill()
    monkeypatch.setattr(model_server, "BACKOFF_S", 0.001)
    with pytest.raises(
        ServerError, match=r"not reachable.* 8 of 12 responses are saved, and the same command continues"
    ):
        served_responses(config, READER, questions, greedy, file=tmp_path / "answers.jsonl")

"""Responses of a server: what is requested, what is saved, and one clear line for each way in which a server fails."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from dpo_mm.cli.main import app
from dpo_mm.config import CompareResponsesConfig, MineResponsesConfig
from dpo_mm.data.questions import Question
from dpo_mm.data.schema import Response, load_responses
from dpo_mm.errors import TrainingInterrupted
from dpo_mm.mining.mine_responses import mine_responses
from dpo_mm.models import model_server
from dpo_mm.models.model_server import ModelServer, ServerError
from dpo_mm.policies.vlm.served import Decoding, chat_messages, check_server_settings, served_responses
from dpo_mm.recipe import compare
from tests.scripted_server import completion, scripted_server

KEY = "sk-very-secret"
RED = Image.new("RGB", (8, 8), "#ff0000")
QUESTIONS = [Question(f"q{n}", (RED,), f"What is {n}?", f"truth {n}", "all") for n in range(6)]
GREEDY = Decoding(0.0, 0)


def vllm_error(status: int, message: str) -> tuple[int, Any]:
    """An error in the form of vLLM 0.32."""
    kind = "InternalServerError" if status == 500 else "BadRequestError"
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


VLLM_LONG_PROMPT = vllm_error(
    400,
    "This model's maximum context length is 512 tokens. However, your prompt contains at least 513 input tokens, which "
    "exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
    "(parameter=input_tokens, value=513)",
)
VLLM_TOKEN_LIMIT = vllm_error(
    400,
    "max_tokens=600 cannot be greater than max_model_len=512. Please request fewer output tokens. "
    "(parameter=max_tokens, value=600)",
)
VLLM_HUGE_IMAGE = vllm_error(
    500,
    "Image size (400000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack.",
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_server, "BACKOFF_S", 0.001)
    monkeypatch.setenv("DPO_MM_API_KEY", KEY)


def config(url: str, **more: Any) -> MineResponsesConfig:
    given = {"model": "m", "questions": "q", "output_dir": "o", "judges": "cer", "batch_size": 3, "max_new_tokens": 9}
    return MineResponsesConfig(**{**given, "server": url, "served": "base", **more})


def echo(body: dict[str, Any]) -> str:
    return f"{body['messages'][0]['content'][1]['text']} seed {body['seed']}"


def test_each_response_is_one_request_with_its_image_seed_and_limits(tmp_path: Path) -> None:
    """Mutations that it catches: n instead of requests, a seed of the batch, another image."""
    decodings = [GREEDY, Decoding(0.7, 5), Decoding(0.7, 6)]
    with scripted_server(echo) as server:
        responses = served_responses(config(server.url), "base", QUESTIONS, decodings, file=tmp_path / "a.jsonl")
    assert [[each.text for each in row] for row in responses] == [
        [f"What is {n}? seed {seed}" for seed in (0, 5, 6)] for n in range(6)
    ]
    assert responses[0][0] == Response("What is 0? seed 0", 3, hit_limit=False)
    assert len(server.requests) == 18 and all("n" not in body for body in server.requests)
    kinds = {(body["model"], body["temperature"], body["top_p"], body["max_tokens"]) for body in server.requests}
    assert kinds == {("base", 0.0, 1.0, 9), ("base", 0.7, 1.0, 9)}
    url = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert (sent.format, sent.mode, sent.tobytes()) == ("PNG", "RGB", RED.tobytes())
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert KEY not in (tmp_path / "a.jsonl").read_text()


def test_killed_server_loses_no_response(tmp_path: Path) -> None:
    """Each response that has arrived is saved, and only the others are requested again."""

    def fails_at_4(body: dict[str, Any]) -> Any:
        return (500, {"error": {"message": "out of memory"}}) if "4" in echo(body) else echo(body)

    file = tmp_path / "a.jsonl"
    with (
        scripted_server(fails_at_4) as server,
        pytest.raises(
            ServerError, match=r"status 500: out of memory.*\(7 attempts at question q4\)\. \d of 6 responses are saved"
        ),
    ):
        served_responses(config(server.url), "base", QUESTIONS, [GREEDY], file=file)
    arrived = len(file.read_text().splitlines())
    assert 4 <= arrived <= 5
    with scripted_server(echo) as server:
        responses = served_responses(config(server.url), "base", QUESTIONS, [GREEDY], file=file)
    assert len(server.requests) == 6 - arrived
    assert [row[0].text for row in responses] == [f"What is {n}? seed 0" for n in range(6)]
    with scripted_server(echo) as server:
        served_responses(config(server.url, max_new_tokens=10), "base", QUESTIONS, [GREEDY], file=file)
    assert len(server.requests) == 6, "another token limit is another response"


def test_busy_and_broken_server_is_asked_again(tmp_path: Path) -> None:
    first = [(429, {}, {"Retry-After": "0"}), (503, {}), (500, {})]
    with scripted_server(lambda body: first.pop() if first else "yes") as server:
        responses = served_responses(config(server.url), "base", QUESTIONS[:1], [GREEDY], file=tmp_path / "a")
    assert responses[0][0].text == "yes" and len(server.requests) == 4


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((500, {"error": {"message": "CUDA error"}}), r"it fails with status 500: CUDA error\. Look at its log"),
        ((429, {}), "its queue is full \\(429.*Decrease batch_size"),
        ((413, {}), r"question q0 is too large for it: 0\.0 MB \(413"),
        ((400, {"detail": f"bad {KEY}"}), r"it refuses question q0 \(400: bad \*\*\*\)"),
        (
            (401, {"error": f"key {KEY} is wrong"}),
            r"does not accept the key \(401: key \*\*\* is wrong\)\. Set DPO_MM_API",
        ),
        (
            VLLM_LONG_PROMPT,
            r"it refuses question q0 \(400: This model's maximum context length is 512 tokens\. However, ",
        ),
        (
            VLLM_TOKEN_LIMIT,
            r"it refuses question q0 \(400: max_tokens=600 cannot be greater than max_model_len=512\. P",
        ),
        (
            VLLM_HUGE_IMAGE,
            r"status 500: Image size \(400000000 pixels\) .*Look at its log \(7 attempts at question q0\)",
        ),
        ((302, {}, {"Location": "http://elsewhere/"}), "it redirects .302., and no other host is contacted"),
        ((200, {"answer": 1}), "its reply is no chat completion"),
        ((200, {"choices": [{"message": {"content": "a"}}]}), r"no usage\.completion_tokens"),
    ],
)
def test_failing_server_gives_one_line(reply: Any, message: str, tmp_path: Path) -> None:
    with scripted_server(lambda body: reply) as server, pytest.raises(ServerError, match=message) as caught:
        served_responses(config(server.url), "base", QUESTIONS[:1], [GREEDY], file=tmp_path / "a")
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)


def test_hung_request_wrong_name_and_missing_server_give_one_line(tmp_path: Path) -> None:
    ended = threading.Event()
    with scripted_server(lambda body: str(ended.wait(5))) as server:
        hung = config(server.url, server_timeout=0.1)
        with pytest.raises(
            ServerError, match=r"no reply in 0\.1 s\. Increase server_timeout \(2 attempts at question q0\)"
        ):
            served_responses(hung, "base", QUESTIONS[:1], [GREEDY], file=tmp_path / "a")
        ended.set()
        with pytest.raises(ServerError, match=r"does not serve 'other' \(404: The model other.*It serves base, tuned"):
            served_responses(config(server.url), "other", QUESTIONS[:1], [GREEDY], file=tmp_path / "a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ServerError, match=r"not reachable \(ConnectError\)\. Start it, or correct its address"):
        served_responses(config(url), "base", QUESTIONS[:1], [GREEDY], file=tmp_path / "a")


def test_half_of_a_character_at_the_token_limit_is_saved(tmp_path: Path) -> None:
    with scripted_server(lambda body: "half \ud83d") as server:
        responses = served_responses(config(server.url), "base", QUESTIONS[:1], [GREEDY], file=tmp_path / "a")
    assert responses[0][0].text == "half ?"


def test_server_that_ignores_seeds_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    decodings = [GREEDY, Decoding(1.0, 0), Decoding(1.0, 1)]
    with scripted_server(lambda body: "the same") as server:
        served_responses(config(server.url), "base", QUESTIONS, decodings, file=tmp_path / "a")
    assert "The server may ignore temperature or seed" in caplog.text


def test_server_that_responds_with_another_model_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server of llama.cpp, which ignores the name of the model."""
    with scripted_server(echo) as server:
        served_responses(config(server.url), "base", QUESTIONS[:1], [GREEDY], file=tmp_path / "a")
        assert caplog.text == ""
        monkeypatch.setattr(ModelServer, "served_names", lambda self: ["only.gguf"])
        served_responses(config(server.url), "tuned", QUESTIONS[:1], [GREEDY], file=tmp_path / "a")
    assert "it lists only.gguf, not 'tuned'. Responses may be from another model" in caplog.text


def test_text_is_sent_as_text_and_prefill_is_refused() -> None:
    asked = dataclasses.replace(QUESTIONS[0], images=())
    assert chat_messages(asked) == [{"role": "user", "content": "What is 0?"}]
    begun = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "I"}]
    with pytest.raises(ValueError, match=r"question q0: .* beginning of a response, which a server does not continue"):
        chat_messages(dataclasses.replace(asked, prompt=begun))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"server": None}, "served is the name of a model on a server. Set server"),
        ({"server": "127.0.0.1:8000"}, "no address. Expected one such as"),
        ({"server": "http://me:pw@127.0.0.1/v1"}, "no user, password or query. Put the key into DPO_MM_API_KEY"),
        ({"adapter": "runs/mine"}, "adapter: a server decides it when it starts"),
        ({"max_pixels": 9999}, "max_pixels: a server decides it when it starts"),
    ],
)
def test_settings_that_do_not_fit_a_server_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_server_settings(config("http://127.0.0.1:1/v1", **change))


def test_missing_served_name_lists_those_of_the_server() -> None:
    with scripted_server(echo) as server:
        given = CompareResponsesConfig("m", "o", "q", server=server.url, served="base")
        with pytest.raises(ValueError, match=f"served_tuned missing. The server {server.url} serves base, tuned"):
            check_server_settings(given)


def write_questions(folder: Path) -> str:
    for n in range(6):
        RED.resize((8, 8 + n)).save(folder / f"{n}.png")
    rows = [
        {"id": f"q{n}", "image": f"{n}.png", "prompt": f"What is {n}?", "ground_truth": f"it is {n}"} for n in range(6)
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "q.jsonl")


def test_mining_on_a_server_resumes_at_another_address(tmp_path: Path) -> None:
    """Without a model in this process. Mutation that it catches: the address is part of the result's settings."""
    lost = threading.Event()

    def script(body: dict[str, Any]) -> Any:
        return (500, {}) if "4" in echo(body) and not lost.is_set() else echo(body)

    given = {"questions": write_questions(tmp_path), "output_dir": str(tmp_path / "mined"), "model": "base"}
    options = {**given, "responses_per_question": 2, "shard_size": 3}
    with scripted_server(script) as server, pytest.raises(ServerError, match="the same command continues"):
        mine_responses(config(server.url, **options))
    lost.set()
    requested = len(server.requests)
    with scripted_server(script) as server:
        rows = load_responses(str(mine_responses(config(server.url, **options))))
    assert len(rows) == 6 and requested >= 6 and len(server.requests) <= 6
    assert sorted(path.name for path in (tmp_path / "mined").glob("*.jsonl")) == []
    assert all(KEY not in path.read_text(errors="replace") for path in (tmp_path / "mined").iterdir())


def test_comparison_of_two_served_models(tmp_path: Path) -> None:
    def script(body: dict[str, Any]) -> Any:
        number = body["messages"][0]["content"][1]["text"][8]
        return f"it is {number}" if body["model"] == "tuned" else (200, completion("it was", tokens=9, reason="length"))

    with scripted_server(script) as server:
        given = CompareResponsesConfig(
            "base", str(tmp_path / "out"), write_questions(tmp_path), judges=("cer", "num_tokens", "truncated"),
            server=server.url, served="base", served_tuned="tuned",
        )  # fmt: skip
        result = compare(given)
    cer, tokens, truncated = result.comparisons
    assert (cer.tuned, tokens.base, tokens.tuned, truncated.base, truncated.tuned) == (0, 9, 3, 1, 0)
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert {(row["by"], row["served"]) for row in rows} == {("base model", "base"), ("tuned model", "tuned")}
    assert compare(dataclasses.replace(given, server="http://127.0.0.1:1/v1")).comparisons == result.comparisons


def test_command_needs_no_model(tmp_path: Path) -> None:
    with scripted_server(lambda body: "something else") as server:
        flags = f"mine --server {server.url} --served base --questions {write_questions(tmp_path)} --judges cer"
        done = CliRunner().invoke(app, [*flags.split(), "--output-dir", str(tmp_path / "mined")])
    assert done.exit_code == 0, done.output
    assert load_responses(str(tmp_path / "mined" / "pairs.parquet"))[0]["model"] == "base"


def test_signal_ends_a_hung_request_at_once_and_keeps_what_has_arrived(tmp_path: Path) -> None:
    """Mutation that it catches: the process waits for the request, or for the rest of its shard."""
    ended = threading.Event()

    def script(body: dict[str, Any]) -> str:
        if "5" in echo(body):
            while not ended.wait(0.01):
                if len(server.requests) == 6:
                    os.kill(os.getpid(), signal.SIGTERM)
                    ended.wait(5)
        return echo(body)

    options = {"questions": write_questions(tmp_path), "output_dir": str(tmp_path / "mined"), "model": "base"}
    with scripted_server(script) as server:
        started = time.monotonic()
        with pytest.raises(TrainingInterrupted):
            mine_responses(config(server.url, **options))
        assert time.monotonic() - started < 4
        ended.set()
        arrived = len((tmp_path / "mined" / ".shard-00000.jsonl").read_text().splitlines())
        assert arrived >= 3 and len(load_responses(str(mine_responses(config(server.url, **options))))) == 6

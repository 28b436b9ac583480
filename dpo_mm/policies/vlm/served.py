"""Responses of a model on an OpenAI-compatible server. Each response is saved when it arrives."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_mm.config import CompareResponsesConfig, MineResponsesConfig
from dpo_mm.data.conversation import as_messages, place_images
from dpo_mm.data.image_files import data_url
from dpo_mm.data.questions import Question
from dpo_mm.data.schema import Response
from dpo_mm.files.content_key import content_hash, content_key
from dpo_mm.files.json_lines import append_lines, read_lines
from dpo_mm.models.model_server import ModelServer, ServerError, check_server_url, run_requests
from dpo_mm.policies.adapter_sources import adapter_content
from dpo_mm.policies.vlm.decoding import Decoding

logger = logging.getLogger(__name__)

DECIDED_BY_SERVER = ("revision", "quantize", "min_pixels", "max_pixels", "base_adapter")
"""Settings that a server has decided when it started."""
MIN_QUESTIONS = 4
"""Questions from which equal samples are reported."""


def check_server_settings(
    config: MineResponsesConfig | CompareResponsesConfig, *, sft_adapter: str | None = None
) -> None:
    """Check the settings of a server, if one is set.

    Raises:
        ValueError: if a served name is missing, or a setting does not fit a server.
    """
    mines = isinstance(config, MineResponsesConfig)
    names = ("served",) if mines else ("served", "served_tuned")
    if config.server is None:
        given = next((name for name in names if getattr(config, name)), None)
        if given:
            raise ValueError(f"{given} is the name of a model on a server. Set server to the server's address too")
        return
    url = check_server_url(config.server)
    if missing := next((name for name in names if not getattr(config, name)), None):
        with ModelServer(url, timeout_s=config.server_timeout) as server:
            served = server.served_names()
        known = (
            f"The server {url} serves {', '.join(served)}"
            if served
            else f"The server {url} lists no model, or is not reachable"
        )
        raise ValueError(f"{missing} missing. {known}")
    ignored = (*DECIDED_BY_SERVER, "adapter") if mines else DECIDED_BY_SERVER
    if given := next((name for name in ignored if getattr(config, name, None)), None):
        raise ValueError(f"{given}: a server decides it when it starts. Remove {given}, or remove server")
    if sft_adapter:
        raise ValueError(
            "baseline: the adapter of an SFT baseline is not on a server. Remove baseline, or remove server"
        )


def chat_messages(question: Question) -> list[dict[str, Any]]:
    """Return a question as messages of the OpenAI format, its images as data URLs of PNG files.

    Raises:
        ValueError: if its images and placeholders do not fit together, or its last message is the beginning of a response.
    """
    placed = place_images(as_messages(question.prompt, "user"), len(question.images))
    if placed is None:
        raise ValueError(f"question {question.id}: its {len(question.images)} images do not fit its placeholders")
    if placed[-1]["role"] == "assistant":
        raise ValueError(
            f"question {question.id}: the prompt ends with the beginning of a response, which a server does not continue"
        )
    urls = (data_url(image) for image in question.images)
    return [{"role": message["role"], "content": _content(message["content"], urls)} for message in placed]


def _content(parts: Sequence[dict[str, Any]], urls: Iterator[str]) -> Any:
    """Return the parts of a message in the OpenAI format, or one text if all are texts."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    image = lambda: {"type": "image_url", "image_url": {"url": next(urls)}}
    return [image() if part["type"] == "image" else part for part in parts]


def served_responses(
    config: MineResponsesConfig | CompareResponsesConfig,
    served: str,
    questions: Sequence[Question],
    decodings: Sequence[Decoding],
    *,
    file: Path,
    by: str = "",
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[Response]]:
    """Request the responses of a model on a server.

    Args:
        config: address of the server, its timeout, the number of requests at once (`batch_size`) and the token limit.
        served: name under which the server offers the model.
        questions: the questions.
        decodings: how each response to a question is decoded. Each is one request.
        file: JSON lines of finished responses. Those that are in it already are not requested again.
        by: name of the model in the file.
        advance: called with the number of responses that have arrived.

    Returns:
        The responses of each question, one per decoding.

    Raises:
        ServerError: in one line, if the server fails or refuses a request. All responses that have arrived are in the file.
    """
    keys = response_keys(config, served, questions, decodings)
    saved = {row["key"]: row for row in read_lines(file) if row.get("key") in set(keys.values())}
    missing = [place for place, key in keys.items() if key not in saved]
    advance(len(keys) - len(missing))

    @functools.lru_cache(maxsize=config.batch_size)  # the responses to a question are requested one after the other
    def messages(number: int) -> list[dict[str, Any]]:
        return chat_messages(questions[number])

    def request(place: tuple[int, Decoding]) -> dict[str, Any]:
        question, decoding = questions[place[0]], place[1]
        options = {**decoding._asdict(), "top_p": 1.0, "max_tokens": config.max_new_tokens}
        reply = server.complete(served, messages(place[0]), label=f"question {question.id}", **options)
        return Response(reply.text, reply.tokens, reply.hit_limit)._asdict()

    def save(place: tuple[int, Decoding], response: dict[str, Any]) -> None:
        saved[keys[place]] = {"key": keys[place], "question": questions[place[0]].id, "by": by or served, **response}
        append_lines(file, [{**saved[keys[place]], "served": served, **place[1]._asdict()}])
        advance(1)

    if missing:
        file.parent.mkdir(parents=True, exist_ok=True)
        with ModelServer(str(config.server), timeout_s=config.server_timeout) as server:
            _warn_of_another_model(server, served)
            try:
                run_requests(server, request, missing, at_once=config.batch_size, done=save)
            except ServerError as error:
                raise ServerError(
                    f"{error}. {len(saved)} of {len(keys)} responses are saved, and the same command continues"
                ) from None
    rows = [[saved[keys[number, decoding]] for decoding in decodings] for number in range(len(questions))]
    responses = [[Response(*(row[name] for name in Response._fields)) for row in each] for each in rows]
    _warn_of_equal_samples(responses, decodings)
    return responses


def response_keys(
    config: MineResponsesConfig | CompareResponsesConfig,
    served: str,
    questions: Sequence[Question],
    decodings: Sequence[Decoding],
) -> dict[tuple[int, Decoding], str]:
    """Return the key of each response, by the number of its question and its decoding. Arguments: see `served_responses`."""
    adapter = config.adapter if served == getattr(config, "served_tuned", None) else None
    shared = {"served": served, "adapter": adapter_content(adapter), "max_new_tokens": config.max_new_tokens}
    contents = [content_hash([question.prompt, question.content["images"]]) for question in questions]
    return {
        (number, decoding): content_key("response of a server", {**shared, **decoding._asdict(), "question": content})
        for number, content in enumerate(contents)
        for decoding in decodings
    }


def _warn_of_another_model(server: ModelServer, served: str) -> None:
    """Log a warning if a server does not list a model. Those of llama.cpp respond with the one that they have loaded."""
    names = server.served_names()
    if names and served not in names:
        logger.warning(
            "server %s: it lists %s, not %r. Responses may be from another model", server.url, ", ".join(names), served
        )


def _warn_of_equal_samples(responses: Sequence[Sequence[Response]], decodings: Sequence[Decoding]) -> None:
    """Log a warning if all samples of each question are the same, as from a server that ignores temperature or seed."""
    sampled = [number for number, decoding in enumerate(decodings) if decoding.temperature]
    if len(sampled) < 2 or len(responses) < MIN_QUESTIONS:
        return
    if all(len({each[number].text for number in sampled}) == 1 for each in responses):
        logger.warning(
            "The %d samples of each of %d questions are the same. The server may ignore temperature or seed",
            len(sampled),
            len(responses),
        )

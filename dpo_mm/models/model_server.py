"""Client of an OpenAI-compatible server of chat completions, such as vLLM, SGLang and `transformers serve`.

Only the given host is contacted: no proxy of the environment is used and no redirect is followed. The key comes from the
environment and is written nowhere.
"""

from __future__ import annotations

import functools
import os
import queue
import random
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple, TypeVar

import httpx

from dpo_mm.printing.printed_text import printable

END: Any = object()
T = TypeVar("T")
R = TypeVar("R")

API_KEYS = ("DPO_MM_API_KEY", "OPENAI_API_KEY")
"""Environment variables with the server's key. The first one that is set counts."""
ATTEMPTS, TIMEOUT_ATTEMPTS = 7, 2
"""Attempts per request, and those that may end in a timeout."""
BACKOFF_S, MAX_BACKOFF_S = 0.5, 60.0
"""Seconds before the second attempt, doubled before each further one, and the longest wait."""
CONNECT_TIMEOUT_S = 10.0
"""Seconds until a server accepts a connection, or lists its models."""
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which a request is sent again."""
MESSAGE_LENGTH = 200
"""Characters of a server's message in an error."""


class ServerError(ValueError):
    """A request that the server does not fulfil."""


class Completion(NamedTuple):
    """A server's reply to one request.

    Attributes:
        text: the text that the model wrote.
        tokens: tokens of the completion, by the server's count.
        prompt_tokens: tokens of the prompt, by the server's count.
        hit_limit: True if the token limit ended it.
        refused: True if the server marks it as refused or filtered.
    """

    text: str
    tokens: int
    prompt_tokens: int
    hit_limit: bool
    refused: bool


def check_server_url(url: str) -> str:
    """Return the address of a server without a slash at its end.

    Raises:
        ValueError: if it is no address of http or https, or has more than host, port and path, such as a password.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL("")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ValueError(f"server: an address has no user, password or query. Put the key into {API_KEYS[0]}")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"server {url!r} is no address. Expected one such as http://127.0.0.1:8000/v1")
    return url.rstrip("/")


class ModelServer:
    """An OpenAI-compatible server. Use it as a context manager. Its methods may be called from several threads.

    Args:
        url: address up to and with `/v1`.
        timeout_s: seconds that the server may be silent in one request.

    Raises:
        ValueError: as `check_server_url`.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self.url, self.timeout_s = check_server_url(url), timeout_s
        self._key = next((os.environ[name] for name in API_KEYS if os.environ.get(name)), "")
        self._stopped = threading.Event()
        self._jitter = random.Random()
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
            verify=ssl.create_default_context(),
        )

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def complete(self, model: str, messages: Sequence[Mapping[str, Any]], *, label: str, **options: Any) -> Completion:
        """Request one completion.

        Args:
            model: name under which the server offers the model.
            messages: messages of the OpenAI format.
            label: what the request is for, in errors.
            **options: further fields of the request, such as temperature, seed and max_tokens.

        Raises:
            ServerError: in one line, if the server is not reachable, stays busy or broken, or refuses the request.
        """
        body = {"model": model, "messages": messages, **options}
        reply = self._send(lambda: self._client.post(f"{self.url}/chat/completions", json=body), label)
        if reply.status_code != 200:
            raise ServerError(self._refusal(reply, model, label))
        try:
            content = reply.json()
            choice, usage = content["choices"][0], content.get("usage") or {}
            message, reason = choice["message"], choice.get("finish_reason")
            counts = [usage.get(name) for name in ("completion_tokens", "prompt_tokens")]
            text = message.get("content") or ""
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ServerError(
                self._line("its reply is no chat completion. Give the address that ends in /v1")
            ) from None
        if not isinstance(counts[0], int) or not isinstance(text, str):
            raise ServerError(self._line("its replies have no text or no usage.completion_tokens, which count tokens"))
        refused = bool(message.get("refusal")) or reason == "content_filter"
        text = text.encode("utf-8", "replace").decode()  # a token may end within a character
        return Completion(text, counts[0], int(counts[1] or 0), reason == "length", refused)

    def served_names(self) -> list[str]:
        """Return the names of the models that the server lists, or none if it has no list."""
        try:
            entries = self._client.get(f"{self.url}/models", timeout=CONNECT_TIMEOUT_S).json()["data"]
            return [str(entry["id"]) for entry in entries]
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return []

    def stop(self) -> None:
        """End all requests that wait for their next attempt."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """True after `stop`."""
        return self._stopped.is_set()

    def _send(self, send: Callable[[], httpx.Response], label: str) -> httpx.Response:
        """Send a request until there is a reply that another attempt would not change."""
        for attempt in count(1):
            wait, limit = BACKOFF_S * 2 ** (attempt - 1) * self._jitter.uniform(0.5, 1.5), ATTEMPTS
            attempts = f"{attempt} attempts at {label}"
            try:
                reply = send()
                if reply.status_code not in BUSY:
                    return reply
                problem = self._busy(reply)
                wait = max(wait, _retry_after(reply))
            except (httpx.ReadTimeout, httpx.WriteTimeout):
                problem, limit = f"no reply in {self.timeout_s:g} s. Increase server_timeout", TIMEOUT_ATTEMPTS
            except httpx.TransportError as error:
                problem = f"not reachable ({type(error).__name__}). Start it, or correct its address"
                attempts = f"{attempt} attempts"
            if attempt >= limit or self._stopped.wait(min(wait, MAX_BACKOFF_S)):
                raise ServerError(self._line(f"{problem} ({attempts})")) from None
        raise AssertionError

    def _busy(self, reply: httpx.Response) -> str:
        if reply.status_code == 429:
            return f"its queue is full (429{self._detail(reply)}). Decrease batch_size, the number of requests at once"
        return f"it fails with status {reply.status_code}{self._detail(reply)}. Look at its log"

    def _refusal(self, reply: httpx.Response, model: str, label: str) -> str:
        """Describe in one line why the server does not fulfil a request, and what to change."""
        status, detail = reply.status_code, f"{reply.status_code}{self._detail(reply)}"
        if status in (401, 403):
            return self._line(f"it does not accept the key ({detail}). Set {' or '.join(API_KEYS)}")
        if reply.is_redirect:
            return self._line(f"it redirects ({status}), and no other host is contacted. Give the final address")
        if status == 413:
            size = len(reply.request.content) / 1e6
            return self._line(f"{label} is too large for it: {size:.1f} MB ({detail}). Shrink the images")
        names = self.served_names() if status in (400, 404, 422) else []
        if status == 404 or (names and model not in names):
            known = f"It serves {', '.join(names)}" if names else "Give the address that ends in /v1"
            return self._line(f"it does not serve {model!r} ({detail}). {known}")
        return self._line(f"it refuses {label} ({detail})")

    def _detail(self, reply: httpx.Response) -> str:
        """Return the message of a reply after a colon, on one line and without the key, or ""."""
        try:
            content = reply.json()
            error = next((content[name] for name in ("error", "detail", "message") if content.get(name)), "")
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError, TypeError):
            text = reply.text
        text = " ".join(text.split())[:MESSAGE_LENGTH]
        return f": {self._without_key(printable(text))}" if text else ""

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _line(self, problem: str) -> str:
        return f"server {self.url}: {problem}"


def _retry_after(reply: httpx.Response) -> float:
    """Seconds that a busy server requests before the next attempt, 0 if it names none."""
    try:
        return float(reply.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def run_requests(
    server: ModelServer,
    request: Callable[[T], R],
    items: Sequence[T],
    *,
    at_once: int,
    done: Callable[[T, R], None],
) -> None:
    """Make one request per item, several at once, and stop after the first error or an interruption.

    Args:
        server: the server, whose waiting requests end after an error.
        request: makes the request of an item, in a thread.
        items: the items.
        at_once: largest number of requests at the same time.
        done: called in this thread with each item and its result, in the order in which they arrive. It is also called
            with what arrives after an error.

    Raises:
        Exception: the first error of a request.
    """
    waiting, results, lock = iter(items), queue.SimpleQueue[Callable[[], None] | None](), threading.Lock()
    errors: list[Exception] = []

    def work() -> None:
        while not server.stopped:
            with lock:
                item = next(waiting, END)
            if item is END:
                break
            try:
                results.put(functools.partial(done, item, request(item)))
            except Exception as error:
                results.put(functools.partial(errors.append, error))
                server.stop()
        results.put(None)

    # Threads of a pool would make an interrupted process wait for a request that hangs.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(items)))]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            result = results.get()
            if result is None:
                running -= 1
            else:
                result()
    except BaseException:
        server.stop()
        raise
    if errors:
        raise errors[0]

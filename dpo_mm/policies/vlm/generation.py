"""Generate responses in batches, stream one response, and compute the log-prob of each token of a response."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from dpo_mm.data.conversation import as_messages
from dpo_mm.data.schema import Response
from dpo_mm.policies.vlm.decoding import with_plain_generation
from dpo_mm.policies.vlm.layout_check import eval_mode
from dpo_mm.policies.vlm.loop_stop import LoopStop, longest_repetition
from dpo_mm.policies.vlm.pair_batches import join_images, pad_rows

if TYPE_CHECKING:
    from dpo_mm.policies.vlm.vlm_policy import VisionLanguage


@torch.no_grad()
def generate(
    policy: VisionLanguage,
    images: Sequence[Sequence[Any]],
    messages: Sequence[Any],
    *,
    limits: dict[str, Any],
    seed: int,
    batch_size: int,
    loop_references: Sequence[str] | None = None,
) -> list[Response]:
    """Generate one response per conversation, a batch at a time.

    Args:
        policy: the model, with its loaded adapter.
        images: images per conversation.
        messages: text, message or list of messages per conversation.
        limits: keyword arguments of transformers' `generate`.
        seed: seed of the first batch. A later batch adds the index of its first conversation.
        batch_size: conversations per batch.
        loop_references: see `TextPolicy.generate`.

    Returns:
        One response per conversation, in the same order.

    Raises:
        ValueError: if images and messages do not fit together or the processor does not accept them.
    """
    conversations = list(zip(images, messages, strict=True))
    responses: list[Response] = []
    with eval_mode(policy.model), torch.random.fork_rng():
        for start in range(0, len(conversations), batch_size):
            prompts = [  # a batch at a time, because pixel values take megabytes per image
                policy.encoder.prompt(of_conversation, as_messages(message, "user"), label=f"conversation {n}")
                for n, (of_conversation, message) in enumerate(conversations[start : start + batch_size], start)
            ]
            torch.manual_seed(seed + start)
            references = None if loop_references is None else loop_references[start : start + batch_size]
            responses += _generate_batch(policy, prompts, limits, references)
    return responses


def _generate_batch(
    policy: VisionLanguage, prompts: list[dict[str, Any]], limits: dict[str, Any], references: Sequence[str] | None
) -> list[Response]:
    width = max(len(prompt["ids"]) for prompt in prompts)
    inputs = {
        "input_ids": pad_rows([p["ids"] for p in prompts], width, left=True, value=policy.pad_token_id),
        "attention_mask": pad_rows([torch.ones_like(p["ids"]) for p in prompts], width, left=True),
        **{name: pad_rows([p["types"][name] for p in prompts], width, left=True) for name in prompts[0]["types"]},
        **join_images([prompt["images"] for prompt in prompts]),
    }
    if references is None:
        output = _generate(policy, _to_model(policy, inputs), **limits)[:, width:].cpu()
        return [policy.encoder.response(tokens.tolist()) for tokens in output]
    stop = LoopStop(width, _allowed_repetitions(policy, references))
    output = _generate(policy, _to_model(policy, inputs), **limits, stopping_criteria=[stop])[:, width:].cpu()
    ends = [end or output.shape[1] for end in stop.stopped_at.tolist()]  # after its end, a stopped row is padded
    return [policy.encoder.response(tokens[:end].tolist()) for tokens, end in zip(output, ends, strict=True)]


def _allowed_repetitions(policy: VisionLanguage, references: Sequence[str]) -> torch.Tensor:
    """Length of the longest repetition in each text, in tokens, (rows,)."""
    encoded = policy.encoder.tokenizer(list(references), add_special_tokens=False)["input_ids"]
    return torch.tensor([longest_repetition(ids) for ids in encoded], device=policy.device)


def _generate(policy: VisionLanguage, inputs: dict[str, torch.Tensor], **limits: Any) -> torch.Tensor:
    """Generate token ids from the policy's own probabilities, (rows, tokens of prompt and response)."""
    stops = policy.encoder.stops or None
    model = with_plain_generation(policy.base_model)
    return model.generate(**inputs, **limits, pad_token_id=policy.pad_token_id, eos_token_id=stops)


def stream_response(
    policy: VisionLanguage, images: Sequence[Any], message: Any, *, max_new_tokens: int
) -> Iterator[str]:
    """Stream the greedy response to one conversation.

    Args:
        policy: the model, with its loaded adapter.
        images: images of the conversation.
        message: a text, message or list of messages.
        max_new_tokens: largest number of tokens.

    Yields:
        The text so far, after each new piece.

    Raises:
        ValueError: if images and message do not fit together or the processor does not accept them. Errors of
            transformers' `generate` are raised too.
    """
    from transformers import TextIteratorStreamer

    # The streamer decodes one id or a list of ids.
    decode = lambda ids, **_: policy.encoder.text([ids] if isinstance(ids, int) else ids)
    decoder: Any = SimpleNamespace(decode=decode)
    inputs = _inputs(policy, images, message)
    streamer = TextIteratorStreamer(decoder, skip_prompt=True)
    errors: list[BaseException] = []

    def run_generate() -> None:
        try:
            with torch.inference_mode():
                _generate(policy, inputs, do_sample=False, max_new_tokens=max_new_tokens, streamer=streamer)
        except BaseException as error:
            errors.append(error)
            streamer.end()

    thread = threading.Thread(target=run_generate, daemon=True)
    thread.start()
    text = ""
    for piece in streamer:
        text += piece
        yield text
    thread.join()
    if errors:
        raise errors[0]


@torch.no_grad()
def response_token_log_probs(
    policy: VisionLanguage, images: Sequence[Any], message: Any, response: str
) -> tuple[list[str], torch.Tensor]:
    """Compute the log-prob of each token of a response under the current weights.

    Args:
        policy: the model, with its loaded adapter.
        images: images of the conversation.
        message: a text, message or list of messages.
        response: the response's text.

    Returns:
        The tokens as text, and their log-probs, nats, (tokens,), float32, on the CPU.

    Raises:
        ValueError: if images and message do not fit together or the processor does not accept them.
    """
    tokenizer = policy.encoder.tokenizer
    ids = tokenizer(response, add_special_tokens=False, return_tensors="pt")["input_ids"][0].to(policy.device)
    if not len(ids):
        return [], torch.zeros(0)
    inputs = _inputs(policy, images, message)
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None].to(inputs["input_ids"].dtype)], 1)
    for name, value in inputs.items():
        if name != "input_ids" and value.ndim == 2 and value.shape[1] == start:
            fill = int(name == "attention_mask")
            inputs[name] = torch.cat([value, value.new_full((1, len(ids)), fill)], 1)
    logits = policy.model(**inputs).logits[0, start - 1 : -1].float()
    tokens = [tokenizer.decode([token]) for token in ids.tolist()]
    return tokens, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0].cpu()


def _inputs(policy: VisionLanguage, images: Sequence[Any], message: Any) -> dict[str, torch.Tensor]:
    """Model inputs of one conversation, up to the start of the response."""
    prompt = policy.encoder.prompt(images, as_messages(message, "user"), label="this conversation")
    ids = prompt["ids"][None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {name: value[None] for name, value in prompt["types"].items()} | prompt["images"]
    return _to_model(policy, inputs)


def _to_model(policy: VisionLanguage, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move inputs to the model's device, and floating-point inputs to its dtype."""
    moved = {name: value.to(policy.device) for name, value in inputs.items()}
    return {k: v.to(policy.base_model.dtype) if v.is_floating_point() else v for k, v in moved.items()}

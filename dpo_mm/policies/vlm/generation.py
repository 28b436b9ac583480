"""Generate responses in batches, stream one response, and compute the log-prob of each token of a response."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from dpo_mm.data.conversation import as_messages
from dpo_mm.data.schema import Response
from dpo_mm.policies.vlm.batch_decoding import decode_batch
from dpo_mm.policies.vlm.decoding import Decoding, log_unused_settings, with_plain_generation
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
    decodings: Sequence[Decoding],
    *,
    max_new_tokens: int,
    batch_size: int,
    loop_references: Sequence[str] | None = None,
) -> list[list[Response]]:
    """Generate one response per decoding and conversation, a batch of conversations at a time.

    Args:
        policy: the model, with its loaded adapter.
        images: images per conversation.
        messages: text, message or list of messages per conversation.
        decodings: how each response is decoded. To the seed of a batch, the index of its first conversation is added.
        max_new_tokens: largest number of tokens per response.
        batch_size: conversations per batch.
        loop_references: see `TextPolicy.generate`.

    Returns:
        For each decoding, one response per conversation, in the same order.

    Raises:
        ValueError: if images and messages do not fit together or the processor does not accept them.
    """
    if not policy.generated:
        log_unused_settings(policy.base_model, policy.encoder.tokenizer, policy.source)
        policy.generated = True
    conversations = list(zip(images, messages, strict=True))
    responses: list[list[Response]] = [[] for _ in decodings]
    with eval_mode(policy.model):
        for start in range(0, len(conversations), batch_size):
            prompts = [  # a batch at a time, because pixel values take megabytes per image
                policy.encoder.prompt(of_conversation, as_messages(message, "user"), label=f"conversation {n}")
                for n, (of_conversation, message) in enumerate(conversations[start : start + batch_size], start)
            ]
            of_batch = [Decoding(temperature, seed + start) for temperature, seed in decodings]
            references = None if loop_references is None else loop_references[start : start + batch_size]
            batch = _generate_batch(policy, prompts, of_batch, max_new_tokens, references)
            for of_decoding, more in zip(responses, batch, strict=True):
                of_decoding += more
    return responses


def _generate_batch(
    policy: VisionLanguage,
    prompts: Sequence[dict[str, Any]],
    decodings: Sequence[Decoding],
    max_new_tokens: int,
    references: Sequence[str] | None,
) -> list[list[Response]]:
    inputs = batch_inputs(policy, prompts)
    width = inputs["input_ids"].shape[1]
    allowed = None if references is None else _allowed_repetitions(policy, references)
    stops = [] if allowed is None else [LoopStop(width, allowed) for _ in decodings]
    model, limits = with_plain_generation(policy.base_model), generation_limits(policy, max_new_tokens=max_new_tokens)
    outputs = decode_batch(model, inputs, decodings, stops=stops, **limits)
    ends = [stop.stopped_at.tolist() for stop in stops] or [[0] * len(prompts)] * len(decodings)
    return [
        [
            policy.encoder.response(row[: end or None].tolist())
            for row, end in zip(output[:, width:].cpu(), own, strict=True)
        ]
        for output, own in zip(outputs, ends, strict=True)  # after its end, a row is padded
    ]


def batch_inputs(policy: VisionLanguage, prompts: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Model inputs of conversations up to the start of their responses, padded on the left.

    Args:
        policy: the model.
        prompts: from `ConversationEncoder.prompt`.
    """
    width = max(len(prompt["ids"]) for prompt in prompts)
    inputs = {
        "input_ids": pad_rows([p["ids"] for p in prompts], width, left=True, value=policy.pad_token_id),
        "attention_mask": pad_rows([torch.ones_like(p["ids"]) for p in prompts], width, left=True),
        **{name: pad_rows([p["types"][name] for p in prompts], width, left=True) for name in prompts[0]["types"]},
        **join_images([prompt["images"] for prompt in prompts]),
    }
    return _to_model(policy, inputs)


def _allowed_repetitions(policy: VisionLanguage, references: Sequence[str]) -> torch.Tensor:
    """Length of the longest repetition in each text, in tokens, (rows,)."""
    encoded = policy.encoder.tokenizer(list(references), add_special_tokens=False)["input_ids"]
    return torch.tensor([longest_repetition(ids) for ids in encoded], device=policy.device)


def generation_limits(policy: VisionLanguage, **limits: Any) -> dict[str, Any]:
    """Arguments of transformers' `generate`, with the ids that end or pad a response."""
    return {**limits, "pad_token_id": policy.pad_token_id, "eos_token_id": policy.encoder.stops or None}


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
                limits = generation_limits(policy, do_sample=False, max_new_tokens=max_new_tokens)
                with_plain_generation(policy.base_model).generate(**inputs, **limits, streamer=streamer)
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

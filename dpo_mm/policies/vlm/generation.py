"""Generate responses: in batches, or one at a time with its text so far and the log-prob of each token."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dpo_mm.data.schema import Response
from dpo_mm.policies.vlm.chat import as_messages, join_images, padded, response_from_tokens
from dpo_mm.policies.vlm.token_log_probs import evaluating

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
) -> list[Response]:
    """Generate one response per conversation, a batch at a time.

    Args:
        policy: the model, with the adapter that is loaded.
        images, messages: per conversation.
        limits: arguments of transformers' `generate`.
        seed: seed of the first batch. A later batch adds the position of its first conversation.
        batch_size: conversations per batch.
    """
    prompts = [
        policy.rows.prompt(pictures, as_messages(conversation, "user"), where=f"conversation {n}")
        for n, (pictures, conversation) in enumerate(zip(images, messages, strict=True))
    ]
    responses: list[Response] = []
    with evaluating(policy.model), torch.random.fork_rng():
        for start in range(0, len(prompts), batch_size):
            torch.manual_seed(seed + start)
            responses += _generate_batch(policy, prompts[start : start + batch_size], limits)
    return responses


def _generate_batch(policy: VisionLanguage, prompts: list[dict[str, Any]], limits: dict[str, Any]) -> list[Response]:
    width = max(len(prompt["ids"]) for prompt in prompts)
    ids = padded([p["ids"] for p in prompts], width, left=True, value=policy.pad)
    mask = padded([torch.ones_like(p["ids"]) for p in prompts], width, left=True)
    types = {k: padded([p["types"][k] for p in prompts], width, left=True) for k in prompts[0]["types"]}
    images = join_images([prompt["images"] for prompt in prompts])
    inputs = {k: v.to(policy.device) for k, v in {"input_ids": ids, "attention_mask": mask, **types, **images}.items()}
    inputs = {k: v.to(policy.base_model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    out = policy.model.generate(**inputs, **limits, pad_token_id=policy.pad)
    ends = policy.base_model.generation_config.eos_token_id
    return [response_from_tokens(tokens.tolist(), policy.rows.tokenizer, ends) for tokens in out[:, width:].cpu()]


def stream(policy: VisionLanguage, images: Sequence[Any], message: Any, *, max_new_tokens: int) -> Iterator[str]:
    """The greedy answer to one conversation, as far as it is written, again and again until it is whole.

    Raises what generating raised, and ValueError as `Conversations.prompt`.
    """
    from transformers import TextIteratorStreamer

    inputs = _inputs(policy, images, message)
    streamer = TextIteratorStreamer(policy.rows.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[BaseException] = []

    def write() -> None:
        try:
            with torch.inference_mode():
                policy.model.generate(
                    **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=policy.pad, streamer=streamer
                )
        except BaseException as error:
            failed.append(error)
            streamer.end()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    text = ""
    for part in streamer:
        text += part
        yield text
    writer.join()
    if failed:
        raise failed[0]


@torch.no_grad()
def token_log_probs(
    policy: VisionLanguage, images: Sequence[Any], message: Any, answer: str
) -> tuple[list[str], torch.Tensor]:
    """An answer's tokens as text, and their log-probs in nats, (tokens,), float32, under the weights as they are."""
    tokenizer = policy.rows.tokenizer
    told = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"][0].to(policy.device)
    if not len(told):
        return [], torch.zeros(0)
    inputs = _inputs(policy, images, message)
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], told[None].to(inputs["input_ids"].dtype)], 1)
    for name, value in inputs.items():
        if name != "input_ids" and value.ndim == 2 and value.shape[1] == start:
            fill = int(name == "attention_mask")
            inputs[name] = torch.cat([value, value.new_full((1, len(told)), fill)], 1)
    logits = policy.model(**inputs).logits[0, start - 1 : -1].float()
    pieces = [tokenizer.decode([token]) for token in told.tolist()]
    return pieces, logits.log_softmax(-1).gather(-1, told[:, None])[:, 0].cpu()


def _inputs(policy: VisionLanguage, images: Sequence[Any], message: Any) -> dict[str, torch.Tensor]:
    prompt = policy.rows.prompt(images, as_messages(message, "user"), where="this conversation")
    ids = prompt["ids"][None]
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found |= {name: value[None] for name, value in prompt["types"].items()} | prompt["images"]
    moved = {name: value.to(policy.device) for name, value in found.items()}
    return {k: v.to(policy.base_model.dtype) if v.is_floating_point() else v for k, v in moved.items()}

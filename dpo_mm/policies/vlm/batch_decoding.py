"""Decode the responses of a batch: images and prompts run once for all decodings, and rows that have ended are dropped.

`generate` of transformers encodes the images and the prompt for each decoding, and generates padding for a row that has
ended until the last row ends. Here the cache of the prompts is copied for each decoding but the last, and rows that have
ended leave the cache. Tokens are those of `generate`: a decoding draws its noise for all rows of the batch, also for those
that have ended.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dpo_mm.policies.vlm.decoding import Decoding
from dpo_mm.policies.vlm.layout_check import is_sharded

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache in the inputs of a model, by release of transformers."""
ENDED = 1 / 8
"""Fraction of rows that have ended at which they are dropped. Each drop copies the cache of the others."""


def decode_batch(
    model: Any,
    inputs: dict[str, Tensor],
    decodings: Sequence[Decoding],
    *,
    stops: Sequence[StoppingCriteria | None],
    **limits: Any,
) -> list[Tensor]:
    """Generate one response per decoding and row.

    Args:
        model: a transformers model without wrappers.
        inputs: its inputs, with prompts that are padded on the left.
        decodings: how each response is decoded.
        stops: a further stopping criterion per decoding, or None.
        limits: further arguments of transformers' `generate`, such as `max_new_tokens`.

    Returns:
        Token ids of prompts and responses per decoding, (rows, tokens). A row is padded after its end.
    """
    results: list[Tensor] = []

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Tensor:
        prepared = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs)
        output = model(**prepared, return_dict=True)
        inputs = model._update_model_kwargs_for_generation(output, inputs)
        logits = _last_logits(output)
        del output
        with model._optimize_model_for_decode():
            for number, (decoding, stop) in enumerate(zip(decodings, stops, strict=True), 1):
                rows = _Rows(model, input_ids, inputs if number == len(decodings) else _copy(inputs))
                criteria = StoppingCriteriaList([*stopping_criteria, *([] if stop is None else [stop])])
                results.append(rows.decode(logits, decoding, criteria, int(limits["pad_token_id"])))
        return input_ids

    model.generate(**inputs, **limits, do_sample=False, use_cache=True, custom_generate=decode)
    return results


def _last_logits(output: Any) -> Tensor:
    """Logits of the next token, float32, (rows, vocabulary)."""
    logits: Tensor = output.logits[:, -1].to(copy=True, dtype=torch.float32)
    return logits


def _copy(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copy the inputs with their cache, which grows in place."""
    return {name: copy.deepcopy(value) if name in CACHE_NAMES else value for name, value in inputs.items()}


class _Rows:
    """Rows of a batch while they are decoded.

    Args:
        model: a transformers model.
        ids: prompts, (rows, tokens).
        inputs: inputs of the model after the prompts, with their cache.
    """

    def __init__(self, model: Any, ids: Tensor, inputs: dict[str, Any]) -> None:
        self.model, self.ids, self.inputs = model, ids, inputs
        self.active = torch.arange(len(ids), device=ids.device)
        """Rows of the batch that the cache has."""

    def decode(self, logits: Tensor, decoding: Decoding, criteria: StoppingCriteriaList, pad_token_id: int) -> Tensor:
        """Generate tokens from the logits of the first ones until all rows end, (rows, tokens)."""
        synced = is_sharded(self.model)  # its processes take each step together
        unfinished = torch.ones(len(self.ids), dtype=torch.bool, device=self.ids.device)
        next_tokens = _sampler(decoding, len(self.ids), logits.device)
        while True:
            tokens = self.ids.new_full((len(self.ids),), pad_token_id)
            tokens[self.active] = next_tokens(logits, self.active).to(self.ids.device)
            self.ids = torch.cat([self.ids, tokens.where(unfinished, pad_token_id)[:, None]], 1)
            unfinished = unfinished & ~criteria(self.ids, None)  # type: ignore[arg-type]
            remaining = unfinished[self.active].nonzero()[:, 0]
            if not self.model._has_unfinished_sequences(not len(remaining), synced, device=self.ids.device):
                return self.ids
            if 0 < len(remaining) <= (1 - ENDED) * len(self.active) and not synced:
                self._keep(remaining)
            prepared = self.model.prepare_inputs_for_generation(
                self.ids[self.active], next_sequence_length=1, **self.inputs
            )
            output = self.model(**prepared, return_dict=True)
            self.inputs = self.model._update_model_kwargs_for_generation(output, self.inputs)
            logits = _last_logits(output)

    def _keep(self, rows: Tensor) -> None:
        """Drop all rows of the cache and of the inputs per token except these."""
        per_token = len(self.active), self.ids.shape[1]
        for name, value in self.inputs.items():
            if name in CACHE_NAMES:
                value.reorder_cache(rows)
            elif isinstance(value, Tensor) and value.shape[-2:] == per_token:
                self.inputs[name] = value.index_select(-2, rows.to(value.device))
        self.active = self.active[rows]


def _sampler(decoding: Decoding, rows: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from logits (active rows, vocabulary) and the active rows to their next tokens, (active rows,).

    Samples are those of `torch.multinomial` after `torch.manual_seed` on the probabilities of all rows.
    """
    if not decoding.temperature:
        return lambda logits, active: logits.argmax(-1)
    generator = torch.Generator(device).manual_seed(decoding.seed)

    def sample(logits: Tensor, active: Tensor) -> Tensor:
        scores = logits if decoding.temperature == 1 else logits / decoding.temperature
        noise = torch.empty(rows, logits.shape[1], device=device).exponential_(1, generator=generator)
        return (scores.softmax(-1) / noise[active]).argmax(-1)

    return sample

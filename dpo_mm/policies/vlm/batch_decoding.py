"""Decode the responses of a batch: images and prompts run once for all decodings, and rows that have ended are dropped.

`generate` of transformers encodes the images and the prompt for each decoding, and generates padding for a row that has
ended until the last row ends. Here decodings run side by side if their cache is small, and else one after the other on copies
of the prompts' cache. Rows that have ended leave the cache. Tokens are those of `generate`: a decoding draws its noise for
all rows of the batch, also for those that have ended.
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
SIDE_BY_SIDE = 2**30
"""Largest cache of decodings that run side by side, in bytes at their token limit."""
ENDED = 1 / 8
"""Fraction of rows that have ended at which they are dropped. Each drop copies the cache of the others."""


def decode_batch(
    model: Any,
    inputs: dict[str, Tensor],
    decodings: Sequence[Decoding],
    *,
    stops: Sequence[StoppingCriteria] = (),
    **limits: Any,
) -> list[Tensor]:
    """Generate one response per decoding and row.

    Args:
        model: a transformers model without wrappers.
        inputs: its inputs, with prompts that are padded on the left.
        decodings: how each response is decoded.
        stops: a further stopping criterion per decoding, or none at all.
        limits: further arguments of transformers' `generate`, with `max_new_tokens` and `pad_token_id`.

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
        together = max(1, SIDE_BY_SIDE // _cache_bytes(inputs, input_ids.shape[1] + limits["max_new_tokens"]))
        with model._optimize_model_for_decode():
            for start in range(0, len(decodings), together):
                part, last = slice(start, start + together), start + together >= len(decodings)
                rows = _Rows(model, input_ids, inputs if last else _copy(inputs), decodings[part], stops[part])
                results.extend(rows.decode(logits, stopping_criteria, int(limits["pad_token_id"])))
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


def _cache_bytes(inputs: dict[str, Any], tokens: int) -> int:
    """Size of the cache when its rows have this number of tokens."""
    (cache,) = (inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None)
    states = [state for layer in cache.layers for state in vars(layer).values()]
    tensors = [tensor for state in states for tensor in (state.values() if isinstance(state, dict) else [state])]
    size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    return max(1, size * tokens // max(1, cache.get_seq_length()))


class _Rows:
    """Rows of a batch while they are decoded, of one decoding after those of another.

    Args:
        model: a transformers model.
        ids: prompts, (rows, tokens).
        inputs: inputs of the model after the prompts, with their cache.
        decodings: decodings that run side by side.
        stops: a further stopping criterion per decoding, or none at all.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        inputs: dict[str, Any],
        decodings: Sequence[Decoding],
        stops: Sequence[StoppingCriteria],
    ) -> None:
        self.model, self.ids, self.inputs, self.stops, self.batch = model, ids, inputs, stops, len(ids)
        self.samplers = [_sampler(decoding, self.batch, ids.device) for decoding in decodings]
        self.active = torch.arange(self.batch)
        """Rows of `ids` that the cache has, on the host."""
        if len(decodings) > 1:
            self._select(self.active.repeat(len(decodings)), columns=ids.shape[1] + 1)
            self.ids, self.active = ids.repeat(len(decodings), 1), torch.arange(self.batch * len(decodings))

    def decode(self, logits: Tensor, criteria: StoppingCriteriaList, pad_token_id: int) -> Sequence[Tensor]:
        """Generate tokens from the logits of the first ones until all rows end, (rows, tokens) per decoding."""
        synced = is_sharded(self.model)  # its processes take each step together
        unfinished = torch.ones(len(self.ids), dtype=torch.bool, device=self.ids.device)
        logits = logits.repeat(len(self.samplers), 1)
        while True:
            tokens = self.ids.new_full((len(self.ids),), pad_token_id)
            tokens[self.active.to(tokens.device)] = self._next_tokens(logits).to(tokens.device)
            self.ids = torch.cat([self.ids, tokens.where(unfinished, pad_token_id)[:, None]], 1)
            unfinished = unfinished & ~criteria(self.ids, None)  # type: ignore[arg-type]
            for stop, ids, rows in zip(
                self.stops, self.ids.split(self.batch), unfinished.split(self.batch), strict=False
            ):
                rows &= ~stop(ids, None)  # type: ignore[arg-type]
            remaining = unfinished.cpu()[self.active].nonzero()[:, 0]
            if not self.model._has_unfinished_sequences(not len(remaining), synced, device=self.ids.device):
                return self.ids.split(self.batch)
            if 0 < len(remaining) <= (1 - ENDED) * len(self.active) and not synced:
                self._select(remaining, columns=self.ids.shape[1])
                self.active = self.active[remaining]
            prepared = self.model.prepare_inputs_for_generation(
                self.ids[self.active.to(self.ids.device)], next_sequence_length=1, **self.inputs
            )
            output = self.model(**prepared, return_dict=True)
            self.inputs = self.model._update_model_kwargs_for_generation(output, self.inputs)
            logits = _last_logits(output)

    def _next_tokens(self, logits: Tensor) -> Tensor:
        """Next tokens of the active rows, each by its decoding."""
        counts = torch.bincount(self.active // self.batch, minlength=len(self.samplers)).tolist()
        parts = zip(self.samplers, logits.split(counts), (self.active % self.batch).split(counts), strict=True)
        return torch.cat([sample(part, rows.to(part.device)) for sample, part, rows in parts if len(rows)])

    def _select(self, rows: Tensor, *, columns: int) -> None:
        """Keep these rows of the cache and of the inputs with this number of columns. A row may be there several times."""
        per_token = len(self.active), columns  # the next token has a column already
        for name, value in self.inputs.items():
            if name in CACHE_NAMES:
                value.reorder_cache(rows.to(self.ids.device))
            elif isinstance(value, Tensor) and value.shape[-2:] == per_token:
                self.inputs[name] = value.index_select(-2, rows.to(value.device))


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

"""A vision-language model as a judge: how likely it says Yes to a prompt, and which of two pictures it prefers.

    vqa_score(image, prompt) = P("Yes" | image, 'Does this figure show "{prompt}"? Please answer Yes or No.')

Lin et al. 2024 (2404.01291), of any transformers model: the first token of the answer, from the raw logits, so that no
repetition penalty of a model's own generation settings gets in. A preference is asked for in both orders, greedily; a
model that changes its mind with the order, or whose answer names both places or none, has said that they are equal.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from dpo_mm.data.image_files import to_rgb
from dpo_mm.judges import JudgeName, LazyJudge
from dpo_mm.judges.weights import device, in_batches, sha256
from dpo_mm.model_loading import load_module

BATCH = 8
SHOWS = 'Does this figure show "{prompt}"? Please answer Yes or No.'
PREFERS = 'Which of these two pictures shows "{prompt}" better, the first or the second? Answer with one word: first or second.'
WORDS = 8
"""Tokens of an answer to PREFERS, at most."""


class Asked(NamedTuple):
    """A question about pictures, and the words of which any is the answer that counts."""

    images: tuple[Image.Image, ...]
    question: str
    options: tuple[str, ...] = ()


class Vlm(NamedTuple):
    """A vision-language model as judges ask it.

    probability: that the first token of the answer is one of the options, of each question, [0, 1]. answer: its text.
    """

    probability: Callable[[Sequence[Asked]], list[float]]
    answer: Callable[[Sequence[Asked]], list[str]]


def vqa_score(named: JudgeName) -> LazyJudge:
    """VQAScore: `vqa_score:MODEL` or `vqa_score:MODEL@REVISION`, MODEL a folder or a hub id."""
    revision = named.where or None
    check(named, revision)

    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        asked = [Asked((i,), SHOWS.format(prompt=p), ("Yes",)) for i, p in zip(images, prompts, strict=True)]
        return open_vlm(named.model, revision, device()).probability(asked)

    return LazyJudge(judge, lambda: card_of(named.model, revision) | {"formula": 'P("Yes")', "template": SHOWS})


def vlm_prefers(named: JudgeName) -> LazyJudge:
    """A VLM as a pairwise judge: `vlm_prefers:MODEL` or `vlm_prefers:MODEL@REVISION`."""
    revision = named.where or None
    check(named, revision)

    def judge(a: Sequence[Image.Image], b: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return in_both_orders(open_vlm(named.model, revision, device()), a, b, prompts)

    formula = "1 or 0 where both orders name the same picture, else 1/2"
    return LazyJudge(judge, lambda: card_of(named.model, revision) | {"formula": formula, "template": PREFERS})


def in_both_orders(vlm: Vlm, a: Sequence[Image.Image], b: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """1 where a is named in both orders, 0 where b is, else 1/2; one a pair."""
    triples = list(zip(a, b, prompts, strict=True))
    forward = vlm.answer([Asked((one, other), PREFERS.format(prompt=prompt)) for one, other, prompt in triples])
    backward = vlm.answer([Asked((other, one), PREFERS.format(prompt=prompt)) for one, other, prompt in triples])
    said = {("first", "second"): 1.0, ("second", "first"): 0.0}
    return [said.get((place(x), place(y)), 0.5) for x, y in zip(forward, backward, strict=True)]


def place(answer: str) -> str:
    """The place that an answer names, "first" or "second"; "" where it names none or both."""
    named = set(re.findall(r"\b(first|second)\b", answer.lower()))
    return named.pop() if len(named) == 1 else ""


def check(named: JudgeName, revision: str | None) -> None:
    """Raises ValueError where a judge is named without a model, or with one that isn't there."""
    from transformers import AutoConfig

    if not named.model:
        raise ValueError(f"judge {named.judge!r} needs a model: {named.judge}:MODEL, a folder or an id on the hub")
    try:
        AutoConfig.from_pretrained(named.model, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"judge {named.judge!r}: model {named.model!r} can't be opened ({reason}); expected a folder of a "
            "transformers model with its processor, or an id on the hub"
        ) from error


@functools.cache
def open_vlm(source: str, revision: str | None, on: torch.device) -> Vlm:
    """A model of a folder or hub id with its processor, loaded once; its own precision on a GPU, float32 on a CPU.

    Raises ValueError where it reads no images, or its weights are not safetensors.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype: Any = torch.float32 if on.type == "cpu" else "auto"
    try:
        model: Any = load_module(AutoModelForImageTextToText, source, revision=revision, dtype=dtype)
        processor: Any = AutoProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model {source!r} is no vision-language model with safetensors ({reason})") from error
    return wrap(model.to(on).eval(), processor, source)


def wrap(model: Any, processor: Any, source: str) -> Vlm:
    """A transformers model and its processor as judges ask it."""

    def probabilities(batch: Sequence[Asked]) -> list[float]:
        out = _generate(model, processor, batch, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        each = out.logits[0].float().softmax(-1).cpu()
        ids = [token_ids(processor.tokenizer, asked.options, source) for asked in batch]
        return [float(p[i].sum()) for p, i in zip(each, ids, strict=True)]

    def answers(batch: Sequence[Asked]) -> list[str]:
        tokens = _generate(model, processor, batch, max_new_tokens=WORDS)
        return [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]

    return Vlm(lambda asked: in_batches(probabilities, asked, BATCH), lambda asked: in_batches(answers, asked, BATCH))


def token_ids(tokenizer: Any, options: Sequence[str], source: str) -> list[int]:
    """Ids of those options that are one token, each id once, so that no chance is counted twice.

    Raises ValueError where all of them are cut in several.
    """
    cut = [tokenizer.encode(option, add_special_tokens=False) for option in options]
    ids = sorted({ids[0] for ids in cut if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})
    if not ids:
        raise ValueError(f"model {source!r}: its tokenizer cuts {options[0]!r} into several tokens; it can't judge so")
    return ids


@torch.inference_mode()
def _generate(model: Any, processor: Any, batch: Sequence[Asked], **how: Any) -> Any:
    """What the model says after its own chat template, greedily: new tokens, or generate's own output with `how`."""
    texts = [_templated(processor, asked) for asked in batch]
    first = processor.tokenizer.bos_token
    special = {"add_special_tokens": False} if first and texts[0].startswith(first) else {}
    pictures = [[to_rgb(image) for image in asked.images] for asked in batch]
    inputs = processor(
        text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt", **special
    ).to(model.device)
    inputs = {k: v.to(model.dtype) if torch.is_floating_point(v) else v for k, v in inputs.items()}
    pad = processor.tokenizer.pad_token_id
    pad = pad if pad is not None else processor.tokenizer.eos_token_id
    out = model.generate(**inputs, do_sample=False, pad_token_id=pad, **how)
    return out if how.get("return_dict_in_generate") else out[:, inputs["input_ids"].shape[1] :].cpu()


def _templated(processor: Any, asked: Asked) -> str:
    if not getattr(processor, "chat_template", None):
        return f"{getattr(processor, 'image_token', '')}" * len(asked.images) + asked.question
    content = [{"type": "image"} for _ in asked.images] + [{"type": "text", "text": asked.question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text


def card_of(source: str, revision: str | None) -> dict[str, Any]:
    """Model, revision and weights' sha256 (of what is on this machine), and what prepares its pictures."""
    from huggingface_hub import try_to_load_from_cache

    folder, weights = Path(source), {}
    if not folder.is_dir():
        found = try_to_load_from_cache(source, "config.json", revision=revision)
        folder = Path(found).parent if isinstance(found, str) else folder
        revision = folder.name if isinstance(found, str) else revision
    if folder.is_dir():
        weights = {
            path.name: {"sha256": sha256(path), "published": None} for path in sorted(folder.glob("*.safetensors"))
        }
    name = Path(source).name if Path(source).is_dir() else source
    return {"model": name, "revision": revision, "weights": weights, "preprocessing": "the model's own processor"}

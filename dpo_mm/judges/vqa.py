"""Judges with a vision-language model: P("Yes") for a prompt, and the preferred one of two images.

    vqa_score(image, prompt) = P("Yes" | image, 'Does this figure show "{prompt}"? Please answer Yes or No.')

Lin et al. 2024 (2404.01291), with any model of transformers. The probability is that of the answer's first token, from
the raw logits, so a repetition penalty in the model's generation settings has no effect. A preference is generated
greedily in both orders of the images. If the two answers disagree, or one names both images or none, the result is a
tie.
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
from dpo_mm.judges.weights import cached_file, device, in_batches, sha256, shorten
from dpo_mm.models.model_loading import load_module, load_part

BATCH = 8
YES_NO_TEMPLATE = 'Does this figure show "{prompt}"? Please answer Yes or No.'
PREFERENCE_TEMPLATE = 'Which of these two pictures shows "{prompt}" better, the first or the second? Answer with one word: first or second.'
MAX_ANSWER_TOKENS = 8
"""Maximum number of tokens of an answer to PREFERENCE_TEMPLATE."""
MODEL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors"]
"""Files of a model on the hub that are downloaded for `@hub`."""


class VlmQuestion(NamedTuple):
    """A question about images. options: the spellings of the answer whose probability is wanted."""

    images: tuple[Image.Image, ...]
    question: str
    options: tuple[str, ...] = ()


class Vlm(NamedTuple):
    """A vision-language model as the judges use it.

    Attributes:
        probability: for each question, the probability in [0, 1] that the answer's first token is one of the options.
        answer: for each question, the text of the answer.
    """

    probability: Callable[[Sequence[VlmQuestion]], list[float]]
    answer: Callable[[Sequence[VlmQuestion]], list[str]]


def vqa_score(judge_name: JudgeName) -> LazyJudge:
    """VQAScore: `vqa_score:MODEL` or `vqa_score:MODEL@REVISION`, where MODEL is a folder or a hub id."""
    folder = find_model(judge_name, revision=judge_name.location or None)

    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        questions = [
            VlmQuestion((image,), YES_NO_TEMPLATE.format(prompt=prompt), ("Yes",))
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return open_vlm(folder, device()).probability(questions)

    return LazyJudge(
        judge, lambda: model_card(judge_name, folder) | {"formula": 'P("Yes")', "template": YES_NO_TEMPLATE}
    )


def vlm_prefers(judge_name: JudgeName) -> LazyJudge:
    """Pairwise judge with a VLM: `vlm_prefers:MODEL` or `vlm_prefers:MODEL@REVISION`."""
    folder = find_model(judge_name, revision=judge_name.location or None)

    def judge(a: Sequence[Image.Image], b: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return prefer_in_both_orders(open_vlm(folder, device()), a, b, prompts)

    formula = "1 or 0 if both orders name the same image, else 1/2"
    return LazyJudge(
        judge, lambda: model_card(judge_name, folder) | {"formula": formula, "template": PREFERENCE_TEMPLATE}
    )


def prefer_in_both_orders(
    vlm: Vlm,
    a: Sequence[Image.Image],
    b: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    template: str = PREFERENCE_TEMPLATE,
    named: Callable[[str], str] | None = None,
) -> list[float]:
    """Preferences, one per pair: 1 if both orders name image a, 0 if both name b, else 1/2.

    Args:
        vlm: the model.
        a, b: images of each pair.
        prompts: prompt of each pair.
        template: question about two images, with {prompt} for their prompt.
        named: function from an answer to "first", "second" or "". None: `named_image`.
    """
    named = named or named_image
    triples = [(x, y, template.replace("{prompt}", prompt)) for x, y, prompt in zip(a, b, prompts, strict=True)]
    forward = vlm.answer([VlmQuestion((x, y), question) for x, y, question in triples])
    backward = vlm.answer([VlmQuestion((y, x), question) for x, y, question in triples])
    preferences = {("first", "second"): 1.0, ("second", "first"): 0.0}
    return [preferences.get((named(one), named(other)), 0.5) for one, other in zip(forward, backward, strict=True)]


def named_image(answer: str) -> str:
    """Image that an answer names: "first" or "second", or "" if it names none or both."""
    words = set(re.findall(r"\b(first|second)\b", answer.lower()))
    return words.pop() if len(words) == 1 else ""


def find_model(judge_name: JudgeName, *, revision: str | None) -> Path:
    """Find a judge's vision-language model on this machine, or download it if the revision is "hub".

    Args:
        judge_name: its model is a folder or a hub id.
        revision: branch, tag or commit in the hub's cache. None is the main branch, "hub" downloads that branch.

    Returns:
        The folder of the model, or its snapshot in the hub's cache.

    Raises:
        ValueError: if no model is named, it is not on this machine, or transformers does not know its type.
    """
    from transformers import AutoConfig

    judge, model = judge_name.judge, judge_name.model
    if not model:
        raise ValueError(f"judge {judge!r} needs a model: {judge}:MODEL, where MODEL is a folder or a hub id.")
    folder = Path(model)
    if not folder.is_dir():
        folder = _download_model(judge, model) if revision == "hub" else _cached_model(model, revision) or folder
    if not folder.is_dir():
        at = f" --revision {revision}" if revision else ""
        or_hub = "" if judge_name.location else f", or name the judge {judge}:{model}@hub to download it"
        raise ValueError(
            f"judge {judge!r}: model {model!r} is not a folder and not in the hub's cache, and judges download only what "
            f"ends in @hub. Pass a folder, run `hf download {model}{at}`{or_hub}."
        )
    try:
        load_part(AutoConfig, folder, name=f"model {model!r}")
    except ValueError as error:
        raise ValueError(
            f"judge {judge!r}: model {model!r} cannot be opened ({shorten(error)}). Expected a folder or hub id of a "
            "transformers model with its processor."
        ) from error
    return folder


def _cached_model(model: str, revision: str | None) -> Path | None:
    """Snapshot of a model in the hub's cache, or None if its config or weights are not cached."""
    config = cached_file(model, "config.json", revision)
    return config.parent if config and any(config.parent.glob("*.safetensors")) else None


def _download_model(judge: str, model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=MODEL_FILES))
    except Exception as error:  # the hub's client raises many types
        raise ValueError(f"judge {judge!r}: cannot download model {model!r} ({shorten(error)})") from error


@functools.cache
def open_vlm(folder: Path, device: torch.device, max_answer_tokens: int = MAX_ANSWER_TOKENS) -> Vlm:
    """Load a model and its processor from a folder, once per process and length of answers.

    The model runs in its own precision on a GPU and in float32 on a CPU.

    Raises:
        ValueError: if the model does not read images, or its weights are not safetensors.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    try:
        model: Any = load_module(AutoModelForImageTextToText, str(folder), dtype=dtype)
        processor: Any = load_part(AutoProcessor, folder, name=f"model {str(folder)!r}: its processor")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {str(folder)!r} is not a vision-language model with safetensors weights ({shorten(error)})"
        ) from error
    return wrap_vlm(model.to(device).eval(), processor, str(folder), max_answer_tokens)


def wrap_vlm(model: Any, processor: Any, name: str, max_answer_tokens: int = MAX_ANSWER_TOKENS) -> Vlm:
    """Wrap a transformers model and its processor for the judges. name: the model in errors."""

    def probabilities(batch: Sequence[VlmQuestion]) -> list[float]:
        output = _generate(model, processor, batch, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        distributions = output.logits[0].float().softmax(-1).cpu()
        ids = [token_ids(processor.tokenizer, question.options, name) for question in batch]
        return [float(p[i].sum()) for p, i in zip(distributions, ids, strict=True)]

    def answers(batch: Sequence[VlmQuestion]) -> list[str]:
        tokens = _generate(model, processor, batch, max_new_tokens=max_answer_tokens)
        return [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]

    return Vlm(
        lambda questions: in_batches(probabilities, questions, BATCH),
        lambda questions: in_batches(answers, questions, BATCH),
    )


def token_ids(tokenizer: Any, options: Sequence[str], name: str) -> list[int]:
    """Ids of the options that are a single token. Each id is listed once, so that no probability counts twice.

    Raises:
        ValueError: if every option consists of several tokens. name: the model in this error.
    """
    encoded = [tokenizer.encode(option, add_special_tokens=False) for option in options]
    ids = sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})
    if not ids:
        raise ValueError(
            f"model {name!r}: this judge needs {options[0]!r} as a single token, and the model's tokenizer splits it. "
            "Use another model."
        )
    return ids


@torch.inference_mode()
def _generate(model: Any, processor: Any, batch: Sequence[VlmQuestion], **generate_kwargs: Any) -> Any:
    """Greedy generation after the model's chat template.

    Returns the new tokens, or the output of `generate` if `return_dict_in_generate` is set.
    """
    texts = [_prompt_text(processor, question) for question in batch]
    bos = processor.tokenizer.bos_token
    special = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
    images = [[to_rgb(image) for image in question.images] for question in batch]
    inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt", **special).to(
        model.device
    )
    inputs = {k: v.to(model.dtype) if torch.is_floating_point(v) else v for k, v in inputs.items()}
    pad = processor.tokenizer.pad_token_id
    pad = pad if pad is not None else processor.tokenizer.eos_token_id
    output = model.generate(**inputs, do_sample=False, pad_token_id=pad, **generate_kwargs)
    if generate_kwargs.get("return_dict_in_generate"):
        return output
    return output[:, inputs["input_ids"].shape[1] :].cpu()


def _prompt_text(processor: Any, question: VlmQuestion) -> str:
    if not getattr(processor, "chat_template", None):
        return f"{getattr(processor, 'image_token', '')}" * len(question.images) + question.question
    content = [{"type": "image"} for _ in question.images] + [{"type": "text", "text": question.question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text


def model_card(judge_name: JudgeName, folder: Path) -> dict[str, Any]:
    """Describe a model: name, revision (the commit of a cached snapshot), sha256 of the weights, preprocessing."""
    is_folder = Path(judge_name.model).is_dir()
    weights = {path.name: {"sha256": sha256(path), "published": None} for path in sorted(folder.glob("*.safetensors"))}
    return {
        "model": folder.name if is_folder else judge_name.model,
        "revision": None if is_folder else folder.name,
        "weights": weights,
        "preprocessing": "the model's own processor",
    }

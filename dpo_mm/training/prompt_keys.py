"""Prompts of a dataset to encode. A text encoder that also sees the images to edit gets each row's own, others each text once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from PIL import Image
from torch import Tensor

from dpo_mm.data.several_captions import CAPTIONS, has_captions, texts_of
from dpo_mm.policies.protocol import ImagePolicy

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_ONLY = -1


class PromptKey(NamedTuple):
    """A text and, if the text encoder sees images to edit, the number of the row with them. Else TEXT_ONLY."""

    text: str
    row: int = TEXT_ONLY


def prompt_keys(policy: ImagePolicy, rows: Dataset, *, empty_prompt: bool) -> list[PromptKey]:
    """Return the prompts to encode, each once. Texts are sorted, so that the empty one is the first."""
    if policy.prompts_show_sources:
        more = rows[CAPTIONS][:] if has_captions(rows) else [None] * len(rows)
        texts = [dict.fromkeys([prompt, *(cell or ())]) for prompt, cell in zip(rows["prompt"], more, strict=True)]
        return [PromptKey(text, number) for number, each in enumerate(texts) for text in each]
    return [PromptKey(text) for text in sorted({*texts_of(rows), *([""] if empty_prompt else [])})]


def key_of(policy: ImagePolicy, text: str, row: int) -> PromptKey:
    """Return the key of a text of a row."""
    return PromptKey(text, row) if policy.prompts_show_sources else PromptKey(text)


def check_shown_sources(policy: ImagePolicy, dataset: str, *, drops: bool, empty_prompt: bool, flipped: bool) -> None:
    """Raise ValueError for a setting that needs prompts without the images of their row, if the text encoder sees them."""
    settings = {"undecodable_images: drop": drops, "proportion_empty_prompts": empty_prompt, "random_flip": flipped}
    wrong = next((name for name, is_set in settings.items() if is_set), None)
    if policy.prompts_show_sources and wrong:
        raise ValueError(
            f"{dataset}: the text encoder of {type(policy.pipe).__name__} sees the images to edit, so {wrong} is not supported. "
            "Remove it"
        )


def example_image(policy: ImagePolicy) -> Image.Image:
    """Return a blank image or clip of the policy's resolution."""
    return Image.new("RGB", (policy.resolution * policy.frames, policy.resolution))


def example_prompt(policy: ImagePolicy) -> dict[str, Tensor]:
    """Encode a short prompt, with a blank image to edit if the text encoder sees it, (1, ...)."""
    if policy.prompts_show_sources:
        return policy.encode_edit("a picture", [Image.new("RGB", (policy.resolution, policy.resolution))])
    return policy.stored_prompts(["a picture"])

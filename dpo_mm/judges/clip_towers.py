"""CLIP towers of judges: preprocessing of images, embeddings, and cosine similarities.

A tower is an open_clip model, or a CLIP of transformers. Embeddings are float32 on every device.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dpo_mm.data.image_files import to_rgb
from dpo_mm.errors import did_you_mean
from dpo_mm.judges.weights import in_batches, load_weights, shorten
from dpo_mm.models.model_loading import load_module, load_part

BATCH = 32
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of the pixels of OpenAI's CLIP."""


class Preprocessing(NamedTuple):
    """Conversion of an image to a tower's pixels.

    Attributes:
        size: edge of the square, in pixels.
        fit: how the image is made square.
        mean, std: subtracted from and divided out of the pixels in [0, 1], per channel.
        interpolation: method of the resize.
    """

    size: int
    fit: Literal["shortest", "longest", "squash"] = "shortest"
    mean: tuple[float, ...] = OPENAI[0]
    std: tuple[float, ...] = OPENAI[1]
    interpolation: str = "bicubic"

    def describe(self) -> str:
        """Describe the preprocessing in one line, for the judge's card."""
        resize = {
            "shortest": f"shortest edge to {self.size} (Pillow, {self.interpolation}), centre crop",
            "squash": f"to {self.size}x{self.size} (Pillow, {self.interpolation})",
            "longest": f"longest edge to {self.size} (tensor, {self.interpolation}, antialiased), padded with black",
        }[self.fit]
        return f"RGB on white, {resize}, mean {self.mean}, std {self.std}"


class Tower(NamedTuple):
    """A CLIP model.

    Attributes:
        embed_images: embeddings of images, (n, width) float32 on the CPU.
        embed_texts: embeddings of texts, (n, width) float32 on the CPU.
        scale: exp of the logit scale.
    """

    embed_images: Callable[[Sequence[Image.Image]], Tensor]
    embed_texts: Callable[[Sequence[str]], Tensor]
    scale: float


def prepare(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Convert an image to a tower's pixels, (3, size, size) float32."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    image, mode, target = to_rgb(image), InterpolationMode(preprocessing.interpolation), preprocessing.size
    if preprocessing.fit == "longest":
        pixels = F.to_tensor(image)
        scale = target / max(image.size)
        height, width = (max(1, round(edge * scale)) for edge in (image.height, image.width))
        if scale != 1:
            pixels = F.resize(pixels, [height, width], mode, antialias=True)
        across, down = target - width, target - height
        pixels = F.pad(pixels, [across // 2, down // 2, across - across // 2, down - down // 2])
    else:
        resized = [target] if preprocessing.fit == "shortest" else [target, target]
        pixels = F.to_tensor(F.center_crop(F.resize(image, resized, mode), [target, target]))
    return F.normalize(pixels, list(preprocessing.mean), list(preprocessing.std))


def cosines(tower: Tower, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """Cosine similarity of each image with its prompt, (n,) float32. Each distinct prompt is embedded once."""
    distinct = list(dict.fromkeys(prompts))
    index = {prompt: n for n, prompt in enumerate(distinct)}
    text_embeddings = torch.nn.functional.normalize(tower.embed_texts(distinct), dim=-1)
    image_embeddings = torch.nn.functional.normalize(tower.embed_images(images), dim=-1)
    return (image_embeddings * text_embeddings[[index[prompt] for prompt in prompts]]).sum(-1)


def preprocessing_of(architecture: str, tag: str | None) -> Preprocessing:
    """Preprocessing of an open_clip model: that of its tag, or the one that all its tags share, or OpenAI's.

    Raises:
        ValueError: if the model or tag is unknown, the tags differ, or open_clip scales the longest edge.
    """
    import open_clip

    size, tags = image_edge(architecture), open_clip.list_pretrained_tags_by_model(architecture)
    if tag is not None and tag not in tags:
        raise ValueError(f"open_clip has no weights {tag!r} of {architecture}; {did_you_mean(tag, tags)}")
    keys = ("mean", "std", "interpolation", "resize_mode")
    configs = [open_clip.get_pretrained_cfg(architecture, name) for name in ([tag] if tag else tags)]
    variants = {tuple(config.get(key) for key in keys) for config in configs}
    if len(variants) > 1:
        raise ValueError(
            f"the weights of {architecture} differ in their preprocessing. Name them as {architecture}/TAG: "
            f"{', '.join(tags[:6])}"
        )
    mean, std, interpolation, fit = next(iter(variants), (None, None, None, None))
    if fit == "longest":
        raise ValueError(
            f"open_clip scales the longest edge for {architecture}/{tag}, which is not supported. Use another model."
        )
    return Preprocessing(size, fit or "shortest", mean or OPENAI[0], std or OPENAI[1], interpolation or "bicubic")


def image_edge(architecture: str) -> int:
    """Edge of the images of an open_clip architecture, in pixels.

    Raises:
        ValueError: if open_clip does not know the architecture, or its images are not square.
    """
    import open_clip

    if architecture not in open_clip.list_models():
        raise ValueError(
            f"open_clip has no model {architecture!r}; {did_you_mean(architecture, open_clip.list_models())}"
        )
    size = open_clip.get_model_config(architecture)["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        raise ValueError(f"{architecture} of open_clip needs images of {size}, but only squares are supported.")
    return size


@functools.cache
def open_clip_tower(architecture: str, path: Path, preprocessing: Preprocessing, device: torch.device) -> Tower:
    """Load an open_clip model with the weights of a file, once per process.

    Raises:
        ValueError: if the weights do not fit the architecture, or its tokenizer is missing.
    """
    import open_clip

    logging.disable(logging.WARNING)  # open_clip warns about random weights, which load_weights replaces
    try:
        tokenize = open_clip.get_tokenizer(architecture)
        random_model: Any = open_clip.create_model(architecture, load_weights=False, pretrained_text=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"the text tower of {architecture} cannot be opened ({shorten(error)})") from error
    finally:
        logging.disable(logging.NOTSET)
    model: Any = load_weights(random_model, path).to(device).eval()
    return Tower(
        lambda images: _embed(lambda batch: model.encode_image(_pixels(batch, preprocessing, device)), images),
        lambda texts: _embed(lambda batch: model.encode_text(tokenize(list(batch)).to(device)), texts),
        float(model.logit_scale.detach().exp()),
    )


@functools.cache
def transformers_tower(folder: Path, repo: str, device: torch.device) -> Tower:
    """Load a CLIP of transformers and its tokenizer from a folder, once per process.

    Args:
        folder: the model's files.
        repo: repository of these files on the hub, for the error.
        device: where the model runs.

    Raises:
        ValueError: if a part is missing.
    """
    import transformers as hf

    try:
        model: Any = load_module(hf.CLIPModel, str(folder), dtype=torch.float32)
        tokenizer: Any = load_part(hf.AutoTokenizer, folder, name=f"{folder}: its tokenizer")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder}: not a CLIP model with its tokenizer ({shorten(error)}). Download all files of "
            f"huggingface.co/{repo}."
        ) from error
    model.to(device).eval()
    preprocessing = Preprocessing(model.config.vision_config.image_size)

    def embed_texts(batch: Sequence[str]) -> Tensor:
        length = model.config.text_config.max_position_embeddings
        ids = tokenizer(list(batch), padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        return pooled(model.get_text_features(input_ids=ids.input_ids, attention_mask=ids.attention_mask))

    def embed_images(batch: Sequence[Image.Image]) -> Tensor:
        return pooled(model.get_image_features(pixel_values=_pixels(batch, preprocessing, device)))

    return Tower(
        lambda images: _embed(embed_images, images),
        lambda texts: _embed(embed_texts, texts),
        float(model.logit_scale.detach().exp()),
    )


def pooled(features: Any) -> Tensor:
    """Projected embedding, (n, width). transformers 5 returns it as `pooler_output`, transformers 4 as a tensor."""
    return features if isinstance(features, Tensor) else features.pooler_output


def transformers_image_edge(folder: Path) -> int:
    """Edge of the images of a CLIP of transformers, in pixels, from its config."""
    import transformers as hf

    config: Any = load_part(hf.CLIPConfig, folder, name=str(folder))
    return int(config.vision_config.image_size)


def _pixels(images: Sequence[Image.Image], preprocessing: Preprocessing, device: torch.device) -> Tensor:
    return torch.stack([prepare(image, preprocessing) for image in images]).to(device)


def _embed(function: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]) -> Tensor:
    with torch.inference_mode():
        return torch.stack(in_batches(lambda batch: list(function(batch).float().cpu()), items, BATCH))

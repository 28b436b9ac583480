"""Judges on CLIP towers: CLIPScore, LAION's aesthetic score, HPS v2 and v2.1, PickScore. What differs is a line each.

    clip_score(image, prompt) = 2.5 · max(cos, 0)             Hessel et al. 2021 (2104.08718), eq. 1; without its "A photo depicts"
    laion_aesthetic(image)    = head(image embedding / norm)  five linear layers, nothing between them
    hps_v2(image, prompt)     = cos                           Wu et al. 2023 (2306.09341); benchmarks print 100 times it
    pick_score(image, prompt) = exp(logit scale) · cos        Kirstain et al. 2023 (2305.01569)

Pictures are flattened on white. The resize is pinned: Pillow's bicubic for all but HPS, whose authors scale tensors so
that the longest side fits and fill up with black; antialiased here, as their code is under torchvision 0.17 and newer.
Embeddings are float32 on every device; a prompt is cut at the tower's context length (77 tokens).
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
from dpo_mm.judges import JudgeName, LazyJudge
from dpo_mm.judges.weights import Published, device, fill, find, in_batches, read_state, weights_card
from dpo_mm.model_loading import load_module

BATCH = 32
HEAD = (0, 2, 4, 6, 7)
"""Places of the linear layers of LAION's head; dropout stands between them at training."""
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's pixels."""
DEFAULT_TOWER = "ViT-L-14-quickgelu/openai"
SAFE, BIN = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
LAION_HEAD = Published(
    "trl-lib/ddpo-aesthetic-predictor",
    ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth"),
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)
"""The hub's copy of sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor."""
HPS = {
    "hps_v2": Published(
        "xswu/HPSv2",
        ("HPS_v2_compressed.pt",),
        "07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
    ),
    "hps_v2.1": Published(
        "xswu/HPSv2",
        ("HPS_v2.1_compressed.pt",),
        "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
    ),
}
PICK_SCORE = Published(
    "yuvalkirstain/PickScore_v1",
    ("model.safetensors",),
    "ef31ef6fc5ff4d9bb90dd232df4e145887ba62c5a03aa2841415f8c25f18d52e",
    ("config.json", "tokenizer.json", "tokenizer_config.json"),
)


class Preprocessing(NamedTuple):
    """From a picture to a tower's pixels: side in pixels, how the picture is made to fit, and what is taken off."""

    size: int
    fit: Literal["shortest", "longest", "squash"] = "shortest"
    mean: tuple[float, ...] = OPENAI[0]
    std: tuple[float, ...] = OPENAI[1]
    interpolation: str = "bicubic"

    def words(self) -> str:
        how = {
            "shortest": f"shortest side to {self.size} (Pillow, {self.interpolation}), centre crop",
            "squash": f"to {self.size}x{self.size} (Pillow, {self.interpolation})",
            "longest": f"longest side to {self.size} (tensor, {self.interpolation}, antialiased), filled up with black",
        }[self.fit]
        return f"RGB on white, {how}, mean {self.mean}, std {self.std}"


class Tower(NamedTuple):
    """A CLIP model: embeddings of pictures and of texts, (n, width) float32 on the CPU, and exp of its logit scale."""

    embed_images: Callable[[Sequence[Image.Image]], Tensor]
    embed_texts: Callable[[Sequence[str]], Tensor]
    scale: float


def prepare(image: Image.Image, how: Preprocessing) -> Tensor:
    """A picture as a tower takes it, (3, size, size) float32."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    image, mode = to_rgb(image), InterpolationMode(how.interpolation)
    if how.fit == "longest":
        pixels = F.to_tensor(image)
        scale = how.size / max(image.size)
        height, width = (max(1, round(side * scale)) for side in (image.height, image.width))
        if scale != 1:
            pixels = F.resize(pixels, [height, width], mode, antialias=True)
        across, down = how.size - width, how.size - height
        pixels = F.pad(pixels, [across // 2, down // 2, across - across // 2, down - down // 2])
    else:
        sides = [how.size] if how.fit == "shortest" else [how.size, how.size]
        pixels = F.to_tensor(F.center_crop(F.resize(image, sides, mode), [how.size, how.size]))
    return F.normalize(pixels, list(how.mean), list(how.std))


def cosines(tower: Tower, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """Cosine of each picture with its prompt, (n,) float32; each prompt is embedded once."""
    different = list(dict.fromkeys(prompts))
    place = {prompt: n for n, prompt in enumerate(different)}
    texts = torch.nn.functional.normalize(tower.embed_texts(different), dim=-1)
    pictures = torch.nn.functional.normalize(tower.embed_images(images), dim=-1)
    return (pictures * texts[[place[prompt] for prompt in prompts]]).sum(-1)


def head(embeddings: Tensor, state: dict[str, Tensor]) -> Tensor:
    """LAION's aesthetic head on embeddings of any length, (n, 768) -> (n,): linear layers alone, about 1 to 10."""
    values = torch.nn.functional.normalize(embeddings, dim=-1)
    for place in HEAD:
        values = torch.nn.functional.linear(
            values, state[f"layers.{place}.weight"].float(), state[f"layers.{place}.bias"].float()
        )
    return values.squeeze(-1)


def read_head(path: Path) -> dict[str, Tensor]:
    """The head's weights. Raises ValueError where the file holds anything else."""
    state = read_state(path)
    wanted = {f"layers.{place}.{part}" for place in HEAD for part in ("weight", "bias")}
    if state.keys() != wanted:
        odd = sorted(wanted ^ state.keys())[0]
        raise ValueError(
            f"{path}: {odd} {'is missing' if odd in wanted else 'is not expected'}; not LAION's linear head"
        )
    return state


# Judges


def clip_score(named: JudgeName) -> LazyJudge:
    """CLIPScore, w = 2.5, with any open_clip model: `clip_score:MODEL/TAG@FILE`."""
    source = _source(named, named.model or DEFAULT_TOWER)
    return _open(named, source, "2.5 * max(cos(image, prompt), 0)", lambda _, cos: 2.5 * cos.clamp(min=0))


def hps_v2(named: JudgeName) -> LazyJudge:
    """HPS v2; not to be compared with v2.1."""
    return _hps(named)


def hps_v21(named: JudgeName) -> LazyJudge:
    """HPS v2.1; not to be compared with v2."""
    return _hps(named)


def _hps(named: JudgeName) -> LazyJudge:
    architecture = named.model or "ViT-H-14"
    published = HPS[named.judge]
    how = Preprocessing(_side(architecture), "longest")
    source = _Source(architecture, find(published, named), published, how)
    return _open(named, source, "cos(image, prompt)", lambda _, cos: cos)


def laion_aesthetic(named: JudgeName) -> LazyJudge:
    """LAION's aesthetic predictor v2 (improved-aesthetic-predictor); blind to the prompt."""
    published = find(LAION_HEAD, named)
    given = Path(named.where).expanduser()
    beside = named._replace(where="") if named.where and given.is_file() else named
    source = _source(beside, named.model or DEFAULT_TOWER)

    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        assert len(images) == len(prompts)
        return [float(value) for value in head(source.tower().embed_images(images), _head(published))]

    def card() -> dict[str, Any]:
        files = weights_card((published, LAION_HEAD), (source.path, source.published))
        return source.card() | {"formula": "linear head of image embedding / norm", "weights": files}

    return LazyJudge(judge, card)


_head = functools.cache(read_head)


def pick_score(named: JudgeName) -> LazyJudge:
    """PickScore v1, through transformers."""
    path = find(PICK_SCORE, named)

    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        tower = transformers_tower(path.parent, device())
        return (tower.scale * cosines(tower, images, prompts)).tolist()

    def card() -> dict[str, Any]:
        about = {"model": PICK_SCORE.repo, "formula": "exp(logit scale) * cos(image, prompt)"}
        return about | {
            "weights": weights_card((path, PICK_SCORE)),
            "preprocessing": Preprocessing(_image_size(path.parent)).words(),
        }

    return LazyJudge(judge, card)


# Towers


class _Source(NamedTuple):
    """An open_clip tower before it is loaded."""

    architecture: str
    path: Path
    published: Published
    how: Preprocessing

    def tower(self) -> Tower:
        return open_clip_tower(self.architecture, self.path, self.how, device())

    def card(self) -> dict[str, Any]:
        return {
            "model": self.architecture,
            "weights": weights_card((self.path, self.published)),
            "preprocessing": self.how.words(),
        }


def _open(named: JudgeName, source: _Source, formula: str, score: Callable[[Tower, Tensor], Tensor]) -> LazyJudge:
    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        tower = source.tower()
        return score(tower, cosines(tower, images, prompts)).tolist()

    return LazyJudge(judge, lambda: source.card() | {"formula": formula})


def _source(named: JudgeName, model: str) -> _Source:
    """Where the weights of `ARCHITECTURE/TAG` are. Raises ValueError for an unknown one or a missing file."""
    import open_clip

    architecture, _, tag = model.partition("/")
    how = _preprocessing(architecture, tag or None)
    config = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    repo, _, file = str(config.get("hf_hub", "")).rpartition("/")
    published = Published(repo or f"open_clip/{architecture}", (file,) if file else (SAFE, BIN))
    if not repo and named.where in ("", "hub"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)[:6]) or "none"
        raise ValueError(
            f"judge {named.judge!r}: {model!r} says no weights; expected {named.judge}:{architecture}/TAG (tags: {tags}) "
            f"or {named.judge}:{architecture}@FILE"
        )
    return _Source(architecture, find(published, named), published, how)


def _preprocessing(architecture: str, tag: str | None) -> Preprocessing:
    """A model's own pixels: its tag's, or what all its tags agree on, or CLIP's."""
    import open_clip

    size, tags = _side(architecture), open_clip.list_pretrained_tags_by_model(architecture)
    if tag is not None and tag not in tags:
        raise ValueError(f"open_clip has no weights {tag!r} of {architecture}; {did_you_mean(tag, tags)}")
    keys = ("mean", "std", "interpolation", "resize_mode")
    known = [open_clip.get_pretrained_cfg(architecture, one) for one in ([tag] if tag else tags)]
    ways = {tuple(config.get(key) for key in keys) for config in known}
    if len(ways) > 1:
        few = ", ".join(tags[:6])
        raise ValueError(f"weights of {architecture} differ in preprocessing; name them as {architecture}/TAG: {few}")
    mean, std, interpolation, fit = next(iter(ways), (None, None, None, None))
    if fit == "longest":
        raise ValueError(f"open_clip scales the longest side for {architecture}/{tag}; not handled here")
    return Preprocessing(size, fit or "shortest", mean or OPENAI[0], std or OPENAI[1], interpolation or "bicubic")


def _side(architecture: str) -> int:
    import open_clip

    if architecture not in open_clip.list_models():
        raise ValueError(
            f"open_clip has no model {architecture!r}; {did_you_mean(architecture, open_clip.list_models())}"
        )
    size = open_clip.get_model_config(architecture)["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        raise ValueError(f"open_clip's {architecture} takes pictures of {size}; only squares are handled")
    return size


@functools.cache
def open_clip_tower(architecture: str, path: Path, how: Preprocessing, on: torch.device) -> Tower:
    """An open_clip model with the weights of a file, loaded once. Raises ValueError where they don't fit."""
    import open_clip

    logging.disable(logging.WARNING)  # open_clip warns that its weights are random; they are filled at once
    try:
        made: Any = open_clip.create_model(architecture, load_weights=False, pretrained_text=False)
    finally:
        logging.disable(logging.NOTSET)
    model: Any = fill(made, path).to(on).eval()
    tokens = open_clip.get_tokenizer(architecture)
    return Tower(
        lambda images: _embed(lambda batch: model.encode_image(_pixels(batch, how, on)), images),
        lambda texts: _embed(lambda batch: model.encode_text(tokens(list(batch)).to(on)), texts),
        float(model.logit_scale.detach().exp()),
    )


@functools.cache
def transformers_tower(folder: Path, on: torch.device) -> Tower:
    """A CLIP of transformers with its tokenizer, from a folder. Raises ValueError where a part is missing."""
    import transformers as hf

    try:
        model: Any = load_module(hf.CLIPModel, str(folder), dtype=torch.float32)
        tokenizer: Any = hf.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: not a CLIP with its tokenizer ({reason}); get all files of huggingface.co/{PICK_SCORE.repo}"
        ) from error
    model.to(on).eval()
    how = Preprocessing(model.config.vision_config.image_size)

    def texts_of(batch: Sequence[str]) -> Tensor:
        length = model.config.text_config.max_position_embeddings
        ids = tokenizer(list(batch), padding=True, truncation=True, max_length=length, return_tensors="pt").to(on)
        return pooled(model.get_text_features(input_ids=ids.input_ids, attention_mask=ids.attention_mask))

    return Tower(
        lambda images: _embed(
            lambda batch: pooled(model.get_image_features(pixel_values=_pixels(batch, how, on))), images
        ),
        lambda texts: _embed(texts_of, texts),
        float(model.logit_scale.detach().exp()),
    )


def pooled(features: Any) -> Tensor:
    """The projected embedding, (n, width): transformers 5 gives it as `pooler_output`, already projected; 4 bare."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _image_size(folder: Path) -> int:
    import transformers as hf

    config: Any = hf.CLIPConfig.from_pretrained(folder)
    return int(config.vision_config.image_size)


def _pixels(images: Sequence[Image.Image], how: Preprocessing, on: torch.device) -> Tensor:
    return torch.stack([prepare(image, how) for image in images]).to(on)


def _embed(function: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]) -> Tensor:
    with torch.inference_mode():
        return torch.stack(in_batches(lambda batch: list(function(batch).float().cpu()), items, BATCH))

"""Judges with CLIP towers: CLIPScore, LAION's aesthetic score, HPS v2 and v2.1, PickScore.

    clip_score(image, prompt) = 2.5 · max(cos, 0)             Hessel et al. 2021 (2104.08718), eq. 1, without its "A photo depicts"
    laion_aesthetic(image)    = head(image embedding / norm)  five linear layers without activations
    hps_v2(image, prompt)     = cos                           Wu et al. 2023 (2306.09341); benchmarks print 100 times it
    pick_score(image, prompt) = exp(logit scale) · cos        Kirstain et al. 2023 (2305.01569)

Images are flattened on white. The resize is pinned: Pillow's bicubic for all judges except HPS. HPS's authors scale
tensors until the longest edge fits, and pad with black. The scaling is antialiased here, as in their code with
torchvision 0.17 or newer. Embeddings are float32 on every device. A prompt is truncated at the tower's context length
(77 tokens).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dpo_mm.judges import JudgeName, LazyJudge
from dpo_mm.judges.clip_towers import (
    Preprocessing,
    Tower,
    cosines,
    image_edge,
    open_clip_tower,
    preprocessing_of,
    transformers_image_edge,
    transformers_tower,
)
from dpo_mm.judges.weights import Published, cached_file, device, find_weights, hub_offline, read_state, weights_card

HEAD_LAYERS = (0, 2, 4, 6, 7)
"""Indices of the linear layers in LAION's head. The layers between them are dropout, used in training only."""
DEFAULT_TOWER = "ViT-L-14-quickgelu/openai"
SAFETENSORS_FILE, BIN_FILE = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
LAION_HEAD = Published(
    "trl-lib/ddpo-aesthetic-predictor",
    ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth"),
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)
"""The copy on the hub of sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor."""
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


def head(embeddings: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Apply LAION's aesthetic head to image embeddings.

    Args:
        embeddings: image embeddings of any norm, (n, 768).
        state: weights of the head, from `read_head`.

    Returns:
        Scores, (n,), about 1 to 10.
    """
    values = torch.nn.functional.normalize(embeddings, dim=-1)
    for layer in HEAD_LAYERS:
        values = torch.nn.functional.linear(
            values, state[f"layers.{layer}.weight"].float(), state[f"layers.{layer}.bias"].float()
        )
    return values.squeeze(-1)


def read_head(path: Path) -> dict[str, Tensor]:
    """Read the weights of LAION's aesthetic head.

    Raises:
        ValueError: if the file contains anything else.
    """
    state = read_state(path)
    expected = {f"layers.{layer}.{part}" for layer in HEAD_LAYERS for part in ("weight", "bias")}
    if state.keys() != expected:
        key = sorted(expected ^ state.keys())[0]
        raise ValueError(
            f"{path}: {key} is {'missing' if key in expected else 'unexpected'}. Expected LAION's linear head."
        )
    return state


# Judges


def clip_score(judge_name: JudgeName) -> LazyJudge:
    """CLIPScore with weight 2.5, with any open_clip model: `clip_score:MODEL/TAG@FILE`."""
    source = _tower_source(judge_name, judge_name.model or DEFAULT_TOWER)
    return _lazy_judge(source, "2.5 * max(cos(image, prompt), 0)", lambda cos: 2.5 * cos.clamp(min=0))


def hps_v2(judge_name: JudgeName) -> LazyJudge:
    """HPS v2. Its scores are not comparable with those of v2.1."""
    return _hps(judge_name)


def hps_v21(judge_name: JudgeName) -> LazyJudge:
    """HPS v2.1. Its scores are not comparable with those of v2."""
    return _hps(judge_name)


def _hps(judge_name: JudgeName) -> LazyJudge:
    architecture = judge_name.model or "ViT-H-14"
    published = HPS[judge_name.judge]
    preprocessing = Preprocessing(image_edge(architecture), "longest")
    path = find_weights(published, judge_name)
    _check_text_files(judge_name, architecture)
    source = _TowerSource(architecture, path, published, preprocessing, judge_name.location == "hub")
    return _lazy_judge(source, "cos(image, prompt)", lambda cos: cos)


def laion_aesthetic(judge_name: JudgeName) -> LazyJudge:
    """LAION's aesthetic predictor v2 (improved-aesthetic-predictor). It ignores the prompt."""
    head_path = find_weights(LAION_HEAD, judge_name)
    is_file = judge_name.location and Path(judge_name.location).expanduser().is_file()
    tower_name = judge_name._replace(location="") if is_file else judge_name
    source = _tower_source(tower_name, judge_name.model or DEFAULT_TOWER)

    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        assert len(images) == len(prompts)
        return [float(value) for value in head(source.load().embed_images(images), _cached_head(head_path))]

    def card() -> dict[str, Any]:
        files = weights_card((head_path, LAION_HEAD), (source.path, source.published))
        return source.card() | {"formula": "linear head of image embedding / norm", "weights": files}

    return LazyJudge(judge, card)


_cached_head = functools.cache(read_head)


def pick_score(judge_name: JudgeName) -> LazyJudge:
    """PickScore v1, with the CLIP of transformers."""
    path = find_weights(PICK_SCORE, judge_name)

    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        tower = transformers_tower(path.parent, PICK_SCORE.repo, device())
        return (tower.scale * cosines(tower, images, prompts)).tolist()

    def card() -> dict[str, Any]:
        return {
            "model": PICK_SCORE.repo,
            "formula": "exp(logit scale) * cos(image, prompt)",
            "weights": weights_card((path, PICK_SCORE)),
            "preprocessing": Preprocessing(transformers_image_edge(path.parent)).describe(),
        }

    return LazyJudge(judge, card)


# Towers


class _TowerSource(NamedTuple):
    """An open_clip tower that is not loaded yet. download: the hub may be used for its tokenizer."""

    architecture: str
    path: Path
    published: Published
    preprocessing: Preprocessing
    download: bool

    def load(self) -> Tower:
        """Load the tower. It stays in memory for the next call."""
        with contextlib.nullcontext() if self.download else hub_offline():
            return open_clip_tower(self.architecture, self.path, self.preprocessing, device())

    def card(self) -> dict[str, Any]:
        """Part of the judge's card that describes the tower."""
        return {
            "model": self.architecture,
            "weights": weights_card((self.path, self.published)),
            "preprocessing": self.preprocessing.describe(),
        }


def _lazy_judge(source: _TowerSource, formula: str, score: Callable[[Tensor], Tensor]) -> LazyJudge:
    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return score(cosines(source.load(), images, prompts)).tolist()

    return LazyJudge(judge, lambda: source.card() | {"formula": formula})


def _tower_source(judge_name: JudgeName, model: str) -> _TowerSource:
    """Find the weights of `ARCHITECTURE/TAG`. Raises ValueError if it is unknown or a file is missing."""
    import open_clip

    architecture, _, tag = model.partition("/")
    preprocessing = preprocessing_of(architecture, tag or None)
    config = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    repo, _, file = str(config.get("hf_hub", "")).rpartition("/")
    files = (file,) if file else (SAFETENSORS_FILE, BIN_FILE)
    published = Published(repo or f"open_clip/{architecture}", files)
    if not repo and judge_name.location in ("", "hub"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)[:6]) or "none"
        raise ValueError(
            f"judge {judge_name.judge!r}: {model!r} names no weights. Use {judge_name.judge}:{architecture}/TAG (tags: "
            f"{tags}) or {judge_name.judge}:{architecture}@FILE."
        )
    path = find_weights(published, judge_name)
    _check_text_files(judge_name, architecture)
    return _TowerSource(architecture, path, published, preprocessing, judge_name.location == "hub")


def _check_text_files(judge_name: JudgeName, architecture: str) -> None:
    """Raise ValueError if the text tower needs files of the hub that are not in its cache and may not be downloaded."""
    import open_clip

    text = open_clip.get_model_config(architecture)["text_cfg"]
    needed = [
        (text.get("hf_tokenizer_name"), "tokenizer_config.json"),
        (text.get("hf_model_name"), "config.json"),
    ]
    for repo, file in needed:
        if repo and judge_name.location != "hub" and not cached_file(repo, file):
            raise ValueError(
                f"judge {judge_name.judge!r}: the tokenizer of {architecture} is not in the hub's cache, and judges "
                f"download only what ends in @hub. Run `hf download {repo} --include '*.json' --include '*.model'`."
            )

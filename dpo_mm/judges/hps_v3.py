"""HPSv3: a Qwen2-VL with a head that predicts how much people like an image for its prompt.

    hps_v3(image, prompt) = mu, the first output of the head at the token <|Reward|>

`hps_v3:BASE@FILE`. FILE is HPSv3.safetensors of huggingface.co/MizzenAI/HPSv3. It has all weights. BASE is the folder of
Qwen2-VL-7B-Instruct, or its name in the hub's cache (the default), of which only the settings and the tokenizer are used.

The image is scaled to about 256 x 28 x 28 pixels. All tokens have plain positions, as in the published code, not Qwen2-VL's
positions in two dimensions. The head runs in float32. The second output, sigma, is not used.

Source: Ma et al. 2025 (2508.03789), github.com/MizzenAI/HPSv3 (MIT), hpsv3/inference.py, hpsv3/model/qwen2vl_trainer.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.data.image_files import to_rgb
from dpo_mm.judges import JudgeName, LazyJudge
from dpo_mm.judges.weights import (
    Published,
    cached_file,
    device,
    find_weights,
    in_batches,
    read_state,
    shorten,
    weights_card,
)
from dpo_mm.models.model_loading import check_report, load_part

BATCH = 4
BASE = "Qwen/Qwen2-VL-7B-Instruct"
WEIGHTS = Published("MizzenAI/HPSv3", ("HPSv3.safetensors",))
SETTINGS = ["*.json", "*.txt", "*.jinja"]
"""Files of the base that are used."""
PIXELS, FACTOR = 256 * 28 * 28, 28
"""Pixels of a scaled image, about, and the number of which its edges are multiples."""
REWARD = "<|Reward|>"
EMBEDDINGS = "language_model.embed_tokens.weight"
HEAD_LAYERS = (0, 3, 5)
"""Indices of the linear layers of the head. The layers between them are ReLU, and dropout in training."""
TEMPLATE = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
    "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the "
    "worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such "
    "as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy "
    "to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual "
    "elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a "
    "sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, "
    "violent, or adult material. If such content is present, the image quality and satisfaction score should "
    "be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of "
    "number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the "
    "image logically fit the scenario described in the prompt. The environment should support and enhance "
    "the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be "
    "acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in "
    "the image. The generated content should not introduce elements that conflict with or distort the "
    "original description.\n"
    "Textual prompt - {text_prompt}\n"
    "\n"
    "\n"
    "\n"
    "Please provide the overall ratings of this image: <|Reward|>\n"
    "\n"
    "END\n"
)


class RewardModel(NamedTuple):
    """The model without its language head, the layers of its reward head, and its processor."""

    model: Any
    head: list[nn.Linear]
    processor: Any


def hps_v3(judge_name: JudgeName) -> LazyJudge:
    """HPSv3: `hps_v3`, or `hps_v3:BASE@FILE`."""
    path, base = find_weights(WEIGHTS, judge_name), _base_folder(judge_name)

    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        pairs = list(zip(images, prompts, strict=True))
        reward_model = open_reward_model(path, base, device())
        return in_batches(lambda batch: rewards(reward_model, batch), pairs, BATCH)

    def card() -> dict[str, Any]:
        return {
            "model": base.name if Path(judge_name.model).is_dir() else judge_name.model or BASE,
            "weights": weights_card((path, WEIGHTS)),
            "formula": "mu",
            "template": TEMPLATE,
            "preprocessing": f"Pillow's bicubic to about {PIXELS} pixels, edges multiples of {FACTOR}",
        }

    return LazyJudge(judge, card)


def _base_folder(judge_name: JudgeName) -> Path:
    """Find the settings and the tokenizer of the base. Raises ValueError if they are not on this machine."""
    base = judge_name.model or BASE
    if Path(base).is_dir():
        return Path(base)
    if judge_name.location == "hub":
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(base, allow_patterns=SETTINGS))
        except Exception as error:  # the hub's client raises many types
            raise ValueError(f"judge 'hps_v3': cannot download settings of {base!r} ({shorten(error)})") from error
    config = cached_file(base, "config.json")
    if config is None or not cached_file(base, "tokenizer_config.json"):
        raise ValueError(
            f"judge 'hps_v3': the settings and the tokenizer of {base!r} are not in the hub's cache. Run `hf download {base} "
            "--include '*.json' '*.txt'`, or name the judge hps_v3:FOLDER@FILE."
        )
    return config.parent


@functools.cache
def open_reward_model(path: Path, base: Path, device: torch.device) -> RewardModel:
    """Load the model from a file with all weights, once per process. It runs in bfloat16 on a GPU, in float32 on a CPU.

    Raises:
        ValueError: if the file is of another model, or the base has no processor.
    """
    from transformers import AutoConfig, AutoProcessor, Qwen2VLModel

    config: Any = load_part(AutoConfig, base, name=f"base {str(base)!r}")
    processor: Any = load_part(AutoProcessor, base, name=f"base {str(base)!r}: its processor")
    if config.model_type != "qwen2_vl":
        raise ValueError(f"base {str(base)!r} is a {config.model_type}. HPSv3 needs the settings of {BASE}")
    processor.tokenizer.add_tokens([REWARD], special_tokens=True)
    processor.tokenizer.padding_side = "right"
    state = read_state(path)
    head = _read_head(state, path)
    weights = {name: value for name, value in map(_renamed, state.items()) if name}
    if EMBEDDINGS not in weights:
        raise ValueError(f"{path}: the embeddings are missing. Download {WEIGHTS.files[0]} again")
    config.text_config.vocab_size = len(weights[EMBEDDINGS])
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    options: dict[str, Any] = {"config": config, "state_dict": weights, "dtype": dtype, "ignore_mismatched_sizes": True}
    loaded: Any = Qwen2VLModel.from_pretrained(None, output_loading_info=True, **options)
    check_report(loaded[1], str(path))
    return RewardModel(loaded[0].to(device).eval(), [layer.to(device) for layer in head], processor)


def _renamed(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """Name a tensor as `Qwen2VLModel` does, from the names of older and of newer transformers. "" for one of a head."""
    name, value = item
    if name.startswith(("lm_head.", "rm_head.")):
        return "", value
    name = name.removeprefix("model.")
    return name if name.startswith(("visual.", "language_model.")) else f"language_model.{name}", value


def _read_head(state: dict[str, Tensor], path: Path) -> list[nn.Linear]:
    """Build the linear layers of the reward head. Raises ValueError if the file does not have them."""
    layers = []
    for index in HEAD_LAYERS:
        weight, bias = (state.get(f"rm_head.{index}.{part}") for part in ("weight", "bias"))
        if weight is None or bias is None:
            raise ValueError(f"{path}: rm_head.{index} is missing. Expected {WEIGHTS.files[0]} of {WEIGHTS.repo}")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        layers.append(layer)
    return layers


@torch.inference_mode()
def rewards(reward_model: RewardModel, batch: Sequence[tuple[Image.Image, str]]) -> list[float]:
    """Score pairs of an image and its prompt: mu of each."""
    model, head, processor = reward_model
    texts = []
    for _, prompt in batch:
        content = [{"type": "image"}, {"type": "text", "text": TEMPLATE.replace("{text_prompt}", prompt)}]
        conversation = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    images = [scaled(image) for image, _ in batch]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt", do_resize=False).to(model.device)
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    rows, length = inputs["input_ids"].shape
    positions = torch.arange(length, device=model.device).expand(3, rows, length)
    states = model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
    reward = processor.tokenizer.convert_tokens_to_ids(REWARD)
    last = length - 1 - (inputs["input_ids"] == reward).flip(1).int().argmax(1)
    values = states[torch.arange(rows, device=model.device), last].float()
    for layer in head[:-1]:
        values = layer(values).relu()
    mu: list[float] = head[-1](values)[:, 0].tolist()
    return mu


def scaled(image: Image.Image) -> Image.Image:
    """Scale an image to about PIXELS pixels, with edges that are multiples of FACTOR."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rgb = to_rgb(image)
    height, width = smart_resize(rgb.height, rgb.width, factor=FACTOR, min_pixels=PIXELS, max_pixels=PIXELS)
    return rgb.resize((width, height), Image.Resampling.BICUBIC)

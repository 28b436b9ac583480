"""HPSv3: a tiny Qwen2-VL with a reward head, saved in the published layout, against separate arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dpo_mm.judges import judge_card, load_judge
from dpo_mm.judges.hps_v3 import REWARD, TEMPLATE, scaled
from tests.contracts import tiny_vlms

IMAGES = [tiny_vlms.noise_image(n) for n in range(2)]
PROMPTS = ["a red square", "three small circles beside it, and a longer text"]


class Tiny(NamedTuple):
    """A model with a token and a head more, and the folder with its files."""

    folder: Path
    model: Any
    processor: Any
    head: torch.nn.Sequential


def old_name(name: str) -> str:
    """Name of a tensor in transformers 4.45, with which HPSv3 was published."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder, words = tmp_path_factory.mktemp("hps"), tiny_vlms.tokenizer("qwen2_vl")
    torch.manual_seed(5)
    model, processor = tiny_vlms.BUILDERS["qwen2_vl"](words.convert_tokens_to_ids, words)
    processor.chat_template = tiny_vlms.chat_template("qwen2_vl")
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.tokenizer.add_tokens([REWARD], special_tokens=True)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    layers = [torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(16, 8), torch.nn.ReLU()]
    head = torch.nn.Sequential(*layers, torch.nn.Linear(8, 2)).eval()
    state = {old_name(name): value.clone() for name, value in model.state_dict().items()}
    save_file(
        state | {f"rm_head.{name}": value for name, value in head.state_dict().items()}, folder / "HPSv3.safetensors"
    )
    return Tiny(folder, model.eval(), processor, head)


@torch.no_grad()
def expected_mu(tiny: Tiny, image: Image.Image, prompt: str) -> float:
    """mu as in the published code: the language model on embeddings with plain positions, and the head at the token."""
    content = [{"type": "image"}, {"type": "text", "text": TEMPLATE.format(text_prompt=prompt)}]
    text = tiny.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = tiny.processor(text=[text], images=[scaled(image)], return_tensors="pt", do_resize=False)
    trunk, ids = tiny.model.model, inputs["input_ids"]
    embeddings = trunk.get_input_embeddings()(ids)
    seen = trunk.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    seen = torch.cat(tuple(getattr(seen, "pooler_output", seen)))
    is_image = (ids == tiny.model.config.image_token_id).unsqueeze(-1).expand_as(embeddings)
    states = trunk.language_model(inputs_embeds=embeddings.masked_scatter(is_image, seen)).last_hidden_state
    place = ids[0].tolist().index(tiny.processor.tokenizer.convert_tokens_to_ids(REWARD))
    return float(tiny.head(states[0, place])[0])


def test_hps_v3_equals_separate_arithmetic(tiny: Tiny) -> None:
    judge = load_judge(f"hps_v3:{tiny.folder}@{tiny.folder / 'HPSv3.safetensors'}")
    expected = [expected_mu(tiny, image, prompt) for image, prompt in zip(IMAGES, PROMPTS, strict=True)]
    assert judge(IMAGES, PROMPTS) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-4
    assert judge(IMAGES[1:], PROMPTS[1:]) == pytest.approx(expected[1:], rel=1e-4, abs=1e-6)


def test_image_is_scaled_to_the_published_number_of_pixels() -> None:
    assert scaled(Image.new("RGB", (1024, 1024))).size == (448, 448)
    assert scaled(Image.new("RGB", (100, 50))).size == (644, 336) and scaled(Image.new("RGB", (1000, 500))).size == (
        616,
        308,
    )


def test_card_and_missing_files(tiny: Tiny, tmp_path: Path) -> None:
    card = judge_card(f"hps_v3:{tiny.folder}@{tiny.folder / 'HPSv3.safetensors'}")
    assert card["formula"] == "mu" and card["weights"]["HPSv3.safetensors"]["published"] is None
    with pytest.raises(ValueError, match=r"needs HPSv3\.safetensors of huggingface\.co/MizzenAI/HPSv3"):
        load_judge(f"hps_v3@{tmp_path}")
    with pytest.raises(ValueError, match=r"are not in the hub's cache\. Run `hf download Qwen/Qwen2-VL-7B-Instruct"):
        load_judge(f"hps_v3@{tiny.folder / 'HPSv3.safetensors'}")
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=r"rm_head\.0 is missing"):
        load_judge(f"hps_v3:{tiny.folder}@{tmp_path}")(IMAGES, PROMPTS)

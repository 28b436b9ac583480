"""UnifiedReward: replies parsed by hand, and a tiny random Qwen2.5-VL, the class of the published models, against plain generation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_mm.judges import judge_card, load_judge, load_pairwise, unified_reward
from dpo_mm.judges.unified_reward import (
    AXES_TEMPLATE,
    FINAL_TEMPLATE,
    PREFERENCE_TEMPLATE,
    parse_axes,
    parse_better_image,
    parse_final_score,
)
from dpo_mm.judges.vqa import Vlm, VlmQuestion, open_vlm
from tests.contracts import tiny_vlms

IMAGES = [tiny_vlms.noise_image(n) for n in range(2)]
PUBLISHED_REPLY = """Alignment Score (1-5): 2.694700002670288
Coherence Score (1-5): 2.371500015258789
Style Score (1-5): 2.802500009536743
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path, words = tmp_path_factory.mktemp("unified"), tiny_vlms.tokenizer("qwen2_5_vl")
    torch.manual_seed(4)
    model, processor = tiny_vlms.BUILDERS["qwen2_5_vl"](words.convert_tokens_to_ids, words)
    processor.chat_template = tiny_vlms.chat_template("qwen2_5_vl")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def test_published_example_and_other_replies() -> None:
    assert parse_axes(PUBLISHED_REPLY) == pytest.approx((2.6947 + 2.3715 + 2.8025) / 3, abs=1e-6)
    assert parse_axes("Alignment Score: 4\nCoherence Score: 3\nStyle Score: **5**") == 4
    assert (
        parse_axes("Alignment Score: 4\nStyle Score: 5") is None
        and parse_axes(PUBLISHED_REPLY.replace("2.6", "7.6")) is None
    )
    assert (
        parse_final_score("dog (animal): 1\nFinal Score: 3.5") == 3.5 and parse_final_score("**Final Score:** 4") == 4
    )
    assert parse_final_score("Final Score: 12") is None and parse_final_score("It is good.") is None
    assert (
        parse_better_image("So Image 2 is better.") == "second"
        and parse_better_image("Both images are equally good.") == ""
    )
    assert parse_better_image("Image 1 is better. Image 2 is better.") == ""


def test_long_answers_equal_plain_generation(folder: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    question = FINAL_TEMPLATE.replace("{prompt}", "a red square")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[[IMAGES[0]]], return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    vlm = open_vlm(Path(folder), torch.device("cpu"), 20)
    assert vlm.answer([VlmQuestion((IMAGES[0],), question)]) == [
        processor.tokenizer.decode(ids, skip_special_tokens=True)
    ]
    assert len(ids) > 8


def test_reply_without_a_score_is_the_lowest_with_a_warning(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unified_reward, "MAX_TOKENS", 4)
    with caplog.at_level(logging.WARNING):
        assert load_judge(f"unified_reward:{folder}")(IMAGES, ["a", "b"]) == [1, 1]
    assert "2 of 2 replies have no score" in caplog.text
    assert judge_card(f"unified_reward:{folder}")["template"] == AXES_TEMPLATE


def test_scores_and_preferences_reach_the_judges(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[VlmQuestion] = []

    def answer(questions: Sequence[VlmQuestion]) -> list[str]:
        asked.extend(questions)
        return ["Image 1 is better." if one.images[0] is IMAGES[0] else "Image 2 is better." for one in questions]

    def scores(questions: Sequence[VlmQuestion]) -> list[str]:
        return [f"Final Score: {1 + ('{dogs}' in one.question)}" for one in questions]

    def replies(function: Any) -> Any:
        return lambda *_: Vlm(lambda _: [], function)

    monkeypatch.setattr(unified_reward, "open_vlm", replies(scores))
    assert load_judge(f"unified_reward_final:{folder}")(IMAGES, ["one", "two {dogs}"]) == [1, 2]
    monkeypatch.setattr(unified_reward, "open_vlm", replies(answer))
    assert load_pairwise(f"unified_reward_prefers:{folder}")(IMAGES, IMAGES[::-1], ["a cat"] * 2) == [1, 0]
    assert asked[0].question == PREFERENCE_TEMPLATE.replace("{prompt}", "a cat")

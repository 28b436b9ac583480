"""UnifiedReward: vision-language models that write scores of an image for its prompt, or which of two images is better.

    unified_reward:MODEL          mean of Alignment, Coherence and Style, 1 to 5 (UnifiedReward-2.0)
    unified_reward_final:MODEL    the Final Score, 1 to 5 (all versions)
    unified_reward_prefers:MODEL  which of two images is better in both orders, else a tie

MODEL is a folder, or a hub id such as CodeGoat24/UnifiedReward-2.0-qwen-7b, as for `vqa_score`. Prompts are the published ones.
Replies are greedy. The published code prints the three scores, and their mean is this project's. A reply without a score counts
as the lowest one, with a warning.

Source: Wang et al. 2025 (2503.05236), github.com/CodeGoat24/UnifiedReward (MIT), inference_qwen.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

from PIL import Image

from dpo_mm.judges import JudgeName, LazyJudge
from dpo_mm.judges.vqa import VlmQuestion, find_model, model_card, open_vlm, prefer_in_both_orders
from dpo_mm.judges.weights import device

logger = logging.getLogger(__name__)

MAX_TOKENS = 512
"""Maximum number of tokens of a reply, as published."""
LOWEST, HIGHEST = 1.0, 5.0
AXES = ("Alignment", "Coherence", "Style")
AXES_TEMPLATE = (
    "You are presented with a generated image and its associated text caption. Your task is to analyze the "
    "image across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n"
    "\n"
    "Output your evaluation using the format below:\n"
    "\n"
    "Alignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n"
    "\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
FINAL_TEMPLATE = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this "
    "image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider "
    "the accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Extract key elements from the provided text caption, evaluate their presence in the generated image "
    "using the format: 'element (type): value' (where value=0 means not generated, and value=1 means "
    "generated), and assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
PREFERENCE_TEMPLATE = (
    "You are given a text caption and two generated images based on that caption. Your task is to evaluate "
    "and compare these images based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well each image aligns with the provided caption. Consider "
    "the accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of each image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Compare both images using the above criteria and select the one that better aligns with the caption "
    "while exhibiting superior visual quality.\n"
    'Provide a clear conclusion such as "Image 1 is better.", "Image 2 is better." and "Both images are '
    'equally good."\n'
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)


def unified_reward(judge_name: JudgeName) -> LazyJudge:
    """Mean of the three scores of UnifiedReward-2.0."""
    return _scores(judge_name, AXES_TEMPLATE, parse_axes, "mean of Alignment, Coherence and Style")


def unified_reward_final(judge_name: JudgeName) -> LazyJudge:
    """Final Score of UnifiedReward."""
    return _scores(judge_name, FINAL_TEMPLATE, parse_final_score, "Final Score")


def unified_reward_prefers(judge_name: JudgeName) -> LazyJudge:
    """Pairwise judge: the image that UnifiedReward ranks better in both orders."""
    folder = find_model(judge_name, revision=judge_name.location or None)

    def judge(a: Sequence[Image.Image], b: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        vlm = open_vlm(folder, device(), MAX_TOKENS)
        return prefer_in_both_orders(vlm, a, b, prompts, template=PREFERENCE_TEMPLATE, named=parse_better_image)

    formula = "1 or 0 if both orders name the same image, else 1/2"
    return LazyJudge(
        judge, lambda: model_card(judge_name, folder) | {"formula": formula, "template": PREFERENCE_TEMPLATE}
    )


def _scores(judge_name: JudgeName, template: str, parse: Callable[[str], float | None], formula: str) -> LazyJudge:
    folder = find_model(judge_name, revision=judge_name.location or None)

    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        questions = [
            VlmQuestion((image,), template.replace("{prompt}", prompt))
            for image, prompt in zip(images, prompts, strict=True)
        ]
        replies = open_vlm(folder, device(), MAX_TOKENS).answer(questions)
        scores = [parse(reply) for reply in replies]
        without = [reply for reply, score in zip(replies, scores, strict=True) if score is None]
        if without:
            logger.warning(
                "judge %s: %d of %d replies have no score and count as %g, such as %r",
                judge_name.judge, len(without), len(replies), LOWEST, without[0][:80],
            )  # fmt: skip
        return [LOWEST if score is None else score for score in scores]

    return LazyJudge(judge, lambda: model_card(judge_name, folder) | {"formula": formula, "template": template})


def parse_axes(reply: str) -> float | None:
    """Parse the mean of the three scores of a reply. None if one is missing or out of range."""
    scores = [_last_score(rf"{axis} Score(?: \(1-5\))?:", reply) for axis in AXES]
    known = [score for score in scores if score is not None]
    return sum(known) / len(AXES) if len(known) == len(AXES) else None


def parse_final_score(reply: str) -> float | None:
    """Parse the last final score of a reply. None if there is none, or it is out of range."""
    return _last_score("Final Score:", reply)


def parse_better_image(reply: str) -> str:
    """Parse which image is better: "first" or "second", or "" if the reply names none or both."""
    numbers = set(re.findall(r"Image ([12]) is better", reply))
    return {"1": "first", "2": "second"}[numbers.pop()] if len(numbers) == 1 else ""


def _last_score(label: str, reply: str) -> float | None:
    values = re.findall(rf"{label}\W*?(-?\d+(?:\.\d+)?)", reply)
    score = float(values[-1]) if values else 0.0
    return score if LOWEST <= score <= HIGHEST else None

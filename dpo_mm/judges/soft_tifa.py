"""Soft-TIFA: faithfulness as the mean probability of right answers to yes-or-no and counting questions about an image.

    soft_tifa_am = mean of P(answer | image, question) over a prompt's questions
    soft_tifa_gm = their geometric mean, so one missed question fails the prompt

A vision-language model answers the questions.

Source: Soft-TIFA of GenEval 2 (2512.16853). Departures: an answer counts by its spellings that are one token, and each
token counts once (the authors take the first token of each spelling, which can count a token twice). The probabilities
come from the raw logits.

Questions come from a JSONL file with one prompt per line, in one of two formats:

    {"prompt": "two red dogs", "vqa_list": [["How many dogs are in the image?", "two"], ["Are the dogs red?", "Yes"]]}
    {"prompt": "a photo of a dog right of a tie", "tag": "position", "include": [...]}      GenEval's evaluation_metadata
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dpo_mm.data.text_files import read_lines
from dpo_mm.judges import JudgeName, LazyJudge
from dpo_mm.judges.vqa import Vlm, VlmQuestion, find_model, model_card, open_vlm
from dpo_mm.judges.weights import device, sha256

TEMPLATE = "{question} Answer in one word."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
PLURALS = {
    "person": "people",
    "knife": "knives",
    "computer mouse": "computer mice",
    **{same: same for same in ("sheep", "skis", "scissors", "broccoli")},
}

PLURAL_ONLY = ("skis", "scissors")
"""Objects that take a plural verb even if there is one."""


class TifaQuestion(NamedTuple):
    """A question about an image and its right answer."""

    question: str
    answer: str


def soft_tifa_am(judge_name: JudgeName) -> LazyJudge:
    """Arithmetic mean over a prompt's questions: `soft_tifa_am:MODEL@QUESTIONS.jsonl`."""
    return _lazy_judge(judge_name, geometric=False)


def soft_tifa_gm(judge_name: JudgeName) -> LazyJudge:
    """Geometric mean over a prompt's questions: `soft_tifa_gm:MODEL@QUESTIONS.jsonl`."""
    return _lazy_judge(judge_name, geometric=True)


def _lazy_judge(judge_name: JudgeName, *, geometric: bool) -> LazyJudge:
    if not judge_name.location:
        raise ValueError(
            f"judge {judge_name.judge!r} needs questions: {judge_name.judge}:{judge_name.model or 'MODEL'}@QUESTIONS.jsonl"
        )
    folder = find_model(judge_name, revision=None)
    path = Path(judge_name.location).expanduser()
    questions = read_questions(path)

    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        vlm = open_vlm(folder, device())
        answers = answer_probabilities(vlm, images, prompts, questions, file_name=judge_name.location)
        return [mean_of(probabilities, geometric=geometric) for probabilities in answers]

    def card() -> dict[str, Any]:
        return model_card(judge_name, folder) | {
            "formula": f"{'geometric ' * geometric}mean of P(answer) over the prompt's questions",
            "template": TEMPLATE,
            "questions": {"file": path.name, "sha256": sha256(path), "prompts": len(questions)},
        }

    return LazyJudge(judge, card)


def answer_probabilities(
    vlm: Vlm,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    questions: Mapping[str, Sequence[TifaQuestion]],
    *,
    file_name: str,
) -> list[list[float]]:
    """Probabilities of the right answers to the questions about each image.

    Args:
        vlm: the model that answers.
        images: images to score.
        prompts: prompt of each image.
        questions: questions by prompt.
        file_name: the file of the questions, for the error.

    Returns:
        One list per image with a probability in [0, 1] per question.

    Raises:
        ValueError: if a prompt has no questions.
    """
    unknown = next((prompt for prompt in prompts if prompt not in questions), None)
    if unknown is not None:
        raise ValueError(f"{file_name}: no questions for the prompt {unknown!r}. Add a line for it.")
    batch = [
        VlmQuestion((image,), TEMPLATE.format(question=question.question), spellings(question.answer))
        for image, prompt in zip(images, prompts, strict=True)
        for question in questions[prompt]
    ]
    probabilities = iter(vlm.probability(batch))
    return [[next(probabilities) for _ in questions[prompt]] for prompt in prompts]


def mean_of(probabilities: Sequence[float], *, geometric: bool) -> float:
    """Arithmetic or geometric mean of probabilities. The geometric mean is 0 if one of them is 0."""
    values = np.array(probabilities)
    if not geometric:
        return float(values.mean())
    return float(np.exp(np.log(values).mean())) if (values > 0).all() else 0.0


def spellings(answer: str) -> tuple[str, ...]:
    """Spellings of an answer at the start of a reply: lower case, capitalised, digits for a number, with and without a space."""
    word = answer.strip()
    forms = [word, word.lower(), word.capitalize()]
    forms += [str(NUMBERS.index(word.lower()))] if word.lower() in NUMBERS else []
    forms += [NUMBERS[int(word)]] if word.isdecimal() and int(word) < len(NUMBERS) else []
    return tuple(dict.fromkeys(f"{space}{form}" for space in ("", " ") for form in forms))


def read_questions(path: Path) -> dict[str, list[TifaQuestion]]:
    """Read questions by prompt from a JSONL file.

    Raises:
        ValueError: if the file is missing, empty or malformed. The message names the line and the expected format.
    """
    if not path.is_file():
        raise ValueError(
            f"questions {str(path)!r}: no such file. Expected JSON lines with prompt and vqa_list or include."
        )
    questions: dict[str, list[TifaQuestion]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            line_name = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{line_name}: not JSON ({error})") from error
            prompt, of_prompt = _parse_row(row, line_name)
            questions[prompt] = of_prompt
    if not questions:
        raise ValueError(f"questions {str(path)!r}: the file is empty. Expected one prompt per line.")
    return questions


def _parse_row(row: Any, line_name: str) -> tuple[str, list[TifaQuestion]]:
    try:
        questions = [TifaQuestion(*pair) for pair in row["vqa_list"]] if "vqa_list" in row else geneval_questions(row)
        prompt = row["prompt"]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{line_name}: expected prompt with vqa_list [[question, answer], ...] or include ({error!r})"
        ) from error
    if (
        not isinstance(prompt, str)
        or not questions
        or not all(isinstance(text, str) and text for question in questions for text in question)
    ):
        raise ValueError(f"{line_name}: expected a prompt and questions with answers, all of them text")
    return prompt, questions


def geneval_questions(row: Mapping[str, Any]) -> list[TifaQuestion]:
    """Questions for a row of GenEval's metadata: presence, number, colour and relative position of each object."""
    objects, questions = row["include"], []
    for item in objects:
        name, several = item["class"], item["count"] > 1
        subject = f"Are the {plural(name)}" if several or name in PLURAL_ONLY else f"Is the {name}"
        questions.append(TifaQuestion(_presence_question(name, several=several), "Yes"))
        if several or any(other["class"] == name for other in row.get("exclude", ())):
            questions.append(TifaQuestion(f"How many {plural(name)} are in the image?", NUMBERS[item["count"]]))
        if "color" in item:
            questions.append(TifaQuestion(f"{subject} {item['color']}?", "Yes"))
        if "position" in item:
            relation, other = item["position"]
            questions.append(TifaQuestion(f"{subject} {RELATIONS[relation]} the {objects[other]['class']}?", "Yes"))
    return questions


def _presence_question(name: str, *, several: bool) -> str:
    if several or name in PLURAL_ONLY:
        return f"Are there any {plural(name)} in the image?"
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def plural(name: str) -> str:
    """Plural of one of GenEval's 80 objects."""
    return PLURALS.get(name) or name + ("es" if name.endswith(("s", "sh", "ch", "x")) else "s")

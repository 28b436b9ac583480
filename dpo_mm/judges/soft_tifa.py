"""Faithfulness atom by atom: yes-or-no and how-many questions about a picture, answered by a vision-language model.

    soft_tifa_am = mean of P(answer | image, question) over a prompt's questions
    soft_tifa_gm = their geometric mean: one atom missed is a prompt missed

Source: Soft-TIFA of GenEval 2 (2512.16853). Departures: an answer counts by its spellings that are one token, each token
once (the authors take each spelling's first token, which can count one twice), from the raw logits.

Questions come from a JSONL file, a prompt a line, in either form:

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

from dpo_mm.judges import JudgeName, LazyJudge
from dpo_mm.judges.vqa import Asked, Vlm, card_of, check, open_vlm
from dpo_mm.judges.weights import device, sha256

TEMPLATE = "{question} Answer in one word."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLACES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
PLURALS = {
    "person": "people",
    "knife": "knives",
    "computer mouse": "computer mice",
    **{same: same for same in ("sheep", "skis", "scissors", "broccoli")},
}

PAIRS = ("skis", "scissors")
"""Spoken of as many, though one."""


class TifaQuestion(NamedTuple):
    """One question about a picture and its right answer."""

    question: str
    answer: str


def soft_tifa_am(named: JudgeName) -> LazyJudge:
    """The mean of a prompt's atoms: `soft_tifa_am:MODEL@QUESTIONS.jsonl`."""
    return _open(named, geometric=False)


def soft_tifa_gm(named: JudgeName) -> LazyJudge:
    """The geometric mean of a prompt's atoms: `soft_tifa_gm:MODEL@QUESTIONS.jsonl`."""
    return _open(named, geometric=True)


def _open(named: JudgeName, *, geometric: bool) -> LazyJudge:
    check(named, None)
    if not named.where:
        raise ValueError(f"judge {named.judge!r} needs questions: {named.judge}:{named.model}@QUESTIONS.jsonl")
    path = Path(named.where).expanduser()
    atoms = read_questions(path)

    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        parts = ask(open_vlm(named.model, None, device()), images, prompts, atoms, where=named.where)
        return [mean_of(part, geometric=geometric) for part in parts]

    def card() -> dict[str, Any]:
        formula = f"{'geometric ' * geometric}mean of P(answer) over the prompt's questions"
        questions = {"questions": {"file": path.name, "sha256": sha256(path), "prompts": len(atoms)}}
        return card_of(named.model, None) | {"formula": formula, "template": TEMPLATE} | questions

    return LazyJudge(judge, card)


def ask(
    vlm: Vlm,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    atoms: Mapping[str, Sequence[TifaQuestion]],
    *,
    where: str,
) -> list[list[float]]:
    """How likely each atom's right answer is, [0, 1], a list a picture. Raises ValueError for a prompt without atoms."""
    unknown = next((prompt for prompt in prompts if prompt not in atoms), None)
    if unknown is not None:
        raise ValueError(f"{where}: no questions about the prompt {unknown!r}; add a line for it")
    asked = [
        Asked((image,), TEMPLATE.format(question=atom.question), spellings(atom.answer))
        for image, prompt in zip(images, prompts, strict=True)
        for atom in atoms[prompt]
    ]
    found = iter(vlm.probability(asked))
    return [[next(found) for _ in atoms[prompt]] for prompt in prompts]


def mean_of(parts: Sequence[float], *, geometric: bool) -> float:
    """The mean of probabilities, or their geometric mean (0 where one is 0)."""
    values = np.array(parts)
    if not geometric:
        return float(values.mean())
    return float(np.exp(np.log(values).mean())) if (values > 0).all() else 0.0


def spellings(answer: str) -> tuple[str, ...]:
    """Ways to write an answer at the start of a reply: small and capital, a number in digits too, after a space or not."""
    word = answer.strip()
    ways = [word, word.lower(), word.capitalize()]
    ways += [str(NUMBERS.index(word.lower()))] if word.lower() in NUMBERS else []
    ways += [NUMBERS[int(word)]] if word.isdecimal() and int(word) < len(NUMBERS) else []
    return tuple(dict.fromkeys(f"{space}{way}" for space in ("", " ") for way in ways))


def read_questions(path: Path) -> dict[str, list[TifaQuestion]]:
    """Atoms by prompt from a JSONL file. Raises ValueError that names the line, what was expected and what is there."""
    if not path.is_file():
        raise ValueError(
            f"questions {str(path)!r}: no such file; expected JSON lines with prompt and vqa_list or include"
        )
    found: dict[str, list[TifaQuestion]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            prompt, atoms = _atoms(row, where)
            found[prompt] = atoms
    if not found:
        raise ValueError(f"questions {str(path)!r}: the file is empty; expected a prompt a line")
    return found


def _atoms(row: Any, where: str) -> tuple[str, list[TifaQuestion]]:
    try:
        atoms = [TifaQuestion(*pair) for pair in row["vqa_list"]] if "vqa_list" in row else of_geneval(row)
        prompt = row["prompt"]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{where}: expected prompt with vqa_list [[question, answer], ...] or include ({error!r})"
        ) from error
    if (
        not isinstance(prompt, str)
        or not atoms
        or not all(isinstance(text, str) and text for one in atoms for text in one)
    ):
        raise ValueError(f"{where}: expected a prompt and questions with answers, all of them text")
    return prompt, atoms


def of_geneval(row: Mapping[str, Any]) -> list[TifaQuestion]:
    """The atoms of a line of GenEval's metadata: each object's presence, number, colour, and place beside another."""
    objects, atoms = row["include"], []
    for thing in objects:
        name, many = thing["class"], thing["count"] > 1
        the = f"Are the {plural(name)}" if many or name in PAIRS else f"Is the {name}"
        atoms.append(TifaQuestion(_any(name, many=many), "Yes"))
        if many or any(other["class"] == name for other in row.get("exclude", ())):
            atoms.append(TifaQuestion(f"How many {plural(name)} are in the image?", NUMBERS[thing["count"]]))
        if "color" in thing:
            atoms.append(TifaQuestion(f"{the} {thing['color']}?", "Yes"))
        if "position" in thing:
            relation, other = thing["position"]
            atoms.append(TifaQuestion(f"{the} {PLACES[relation]} the {objects[other]['class']}?", "Yes"))
    return atoms


def _any(name: str, *, many: bool) -> str:
    if many or name in PAIRS:
        return f"Are there any {plural(name)} in the image?"
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def plural(name: str) -> str:
    """The plural of one of GenEval's 80 objects."""
    return PLURALS.get(name) or name + ("es" if name.endswith(("s", "sh", "ch", "x")) else "s")

"""Judges that ask a vision-language model: on tiny random models against plain forward passes, and on made-up answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_mm.judges import judge_card, load_judge, load_pairwise, metric_of
from dpo_mm.judges.self_test import self_test
from dpo_mm.judges.soft_tifa import TifaQuestion, ask, mean_of, of_geneval, plural, read_questions, spellings
from dpo_mm.judges.vqa import PREFERS, SHOWS, Asked, Vlm, in_both_orders, open_vlm, place, token_ids, wrap
from tests.contracts import tiny_vlms

PROMPTS = ["a red square", "three small circles beside it", "no text at all and a blue field"]
PICTURES = [tiny_vlms.picture(n) for n in range(3)]
ANSWERS = ["Yes", "No", "two", "Two", "2", "first", "second"]


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose tokenizer knows the answers, as its stock files; its generation settings punish repetition."""
    family, words = request.param, tiny_vlms.tokenizer(request.param)
    words.add_tokens(ANSWERS)
    torch.manual_seed(3)
    model, processor = tiny_vlms.BUILDERS[family](words.convert_tokens_to_ids, words)
    processor.chat_template = tiny_vlms.template(family)
    model.generation_config.repetition_penalty = 1.5
    place = tmp_path_factory.mktemp(family)
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return str(place)


def forward(folder: str, images: Sequence[Any], question: str) -> torch.Tensor:
    """Next-token probabilities, one question alone: the bare model on what its processor makes of the template's text."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        return model(**inputs).logits[0, -1].double().softmax(-1)


def test_vqa_score_is_the_probability_of_yes(folder: str) -> None:
    from transformers import AutoTokenizer

    yes = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("Yes")
    expected = [
        float(forward(folder, [image], SHOWS.format(prompt=prompt))[yes])
        for image, prompt in zip(PICTURES, PROMPTS, strict=True)
    ]
    judge = load_judge(f"vqa_score:{folder}")
    assert judge(PICTURES, PROMPTS) == pytest.approx(expected, rel=1e-4)
    apart = [judge([image], [prompt])[0] for image, prompt in zip(PICTURES, PROMPTS, strict=True)]
    assert apart == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 9) for value in expected}) == 3


def test_each_token_counts_once(folder: str) -> None:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    ids = words.convert_tokens_to_ids(["two", "Two", "2"])
    p = forward(folder, PICTURES[:1], "How many?")
    vlm = open_vlm(folder, None, torch.device("cpu"))
    options = ("two", "Two", "2", "two", "twofold")
    assert vlm.probability([Asked((PICTURES[0],), "How many?", options)]) == pytest.approx(
        [float(p[ids].sum())], rel=1e-4
    )
    with pytest.raises(ValueError, match="cuts 'Maybe' into several tokens"):
        token_ids(words, ("Maybe", "maybe"), folder)


def test_a_real_model_is_asked_in_both_orders(folder: str) -> None:
    judge = load_pairwise(f"vlm_prefers:{folder}")
    got = judge(PICTURES[:2], PICTURES[1:], PROMPTS[:2])
    swapped = judge(PICTURES[1:], PICTURES[:2], PROMPTS[:2])
    assert all(value in (0, 0.5, 1) for value in got)
    assert [1 - value for value in swapped] == got


def test_the_self_test_knows_judges_that_ask(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"prompt": PROMPTS[0], "vqa_list": [["Is it red?", "Yes"]]}))
    for name, number in (
        (f"vqa_score:{folder}", 5),
        (f"vlm_prefers:{folder}", 4),
        (f"soft_tifa_gm:{folder}@{file}", 5),
    ):
        found = {check.name: check for check in self_test(name)}
        assert len(found) == number and found["weights model.safetensors"].passed is None
        assert all(
            found[one].passed for one in ("repeats itself", "batches don't matter", "swapped pairs") if one in found
        )
    assert found["captions"].passed is None


def says(answer: Callable[[Asked], str]) -> Vlm:
    return Vlm(lambda asked: [0.0] * len(asked), lambda asked: [answer(one) for one in asked])


def test_a_judge_that_always_says_first_finds_ties_alone() -> None:
    for stubborn in ("first", "The second.", "", "first or second", "neither", "1st"):
        assert in_both_orders(says(lambda _, s=stubborn: s), PICTURES, PICTURES[::-1], PROMPTS) == [0.5] * 3


def test_a_judge_that_looks_is_believed_in_either_order() -> None:
    bright = {id(image): n for n, image in enumerate(PICTURES)}
    vlm = says(lambda one: "First!" if bright[id(one.images[0])] > bright[id(one.images[1])] else "the second one")
    assert in_both_orders(vlm, [PICTURES[2], PICTURES[0]], [PICTURES[0], PICTURES[1]], PROMPTS[:2]) == [1.0, 0.0]
    asked: list[Asked] = []
    in_both_orders(
        Vlm(lambda _: [], lambda batch: asked.extend(batch) or ["x"] * len(batch)),
        PICTURES[:1],
        PICTURES[1:2],
        PROMPTS[:1],
    )
    assert [one.images for one in asked] == [(PICTURES[0], PICTURES[1]), (PICTURES[1], PICTURES[0])]
    assert {one.question for one in asked} == {PREFERS.format(prompt=PROMPTS[0])}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("First", "first"),
        ("It's the second.", "second"),
        ("firstly", ""),
        ("first and second", ""),
        ("", ""),
        ("2", ""),
    ],
)
def test_an_answer_names_one_place_or_none(answer: str, expected: str) -> None:
    assert place(answer) == expected


def test_atoms_of_geneval() -> None:
    position = {"include": [{"class": "tie", "count": 1}, {"class": "bench", "count": 1, "position": ["left of", 0]}]}
    assert [atom.question for atom in of_geneval(position)] == [
        "Is there a tie in the image?",
        "Is there a bench in the image?",
        "Is the bench to the left of the tie?",
    ]
    counting = {"include": [{"class": "knife", "count": 3}], "exclude": [{"class": "knife", "count": 4}]}
    assert of_geneval(counting)[1] == TifaQuestion("How many knives are in the image?", "three")
    one = {"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog", "count": 2}]}
    assert of_geneval(one)[1] == TifaQuestion("How many dogs are in the image?", "one")
    colours = {"include": [{"class": "scissors", "count": 1, "color": "purple"}]}
    assert [atom.question for atom in of_geneval(colours)] == [
        "Are there any scissors in the image?",
        "Are the scissors purple?",
    ]
    assert [plural(name) for name in ("bus", "person", "wine glass", "toothbrush", "dog")] == [
        "buses",
        "people",
        "wine glasses",
        "toothbrushes",
        "dogs",
    ]


def test_answers_are_spelt_as_models_write_them() -> None:
    assert set(spellings("four")) == {"four", "Four", "4", " four", " Four", " 4"}
    assert set(spellings("2")) == {"2", "two", " 2", " two"}
    assert set(spellings("Yes")) == {"Yes", "yes", " Yes", " yes"}


def test_soft_tifa_means() -> None:
    parts = [0.9, 0.4, 0.1]
    assert mean_of(parts, geometric=False) == pytest.approx(1.4 / 3)
    assert mean_of(parts, geometric=True) == pytest.approx((0.9 * 0.4 * 0.1) ** (1 / 3))
    assert mean_of([1.0, 0.0], geometric=True) == 0


def test_each_picture_is_asked_its_own_prompts_atoms() -> None:
    atoms = {
        PROMPTS[0]: [TifaQuestion("Is it red?", "Yes"), TifaQuestion("How many?", "two")],
        PROMPTS[1]: [TifaQuestion("Is it blue?", "Yes")],
    }
    asked: list[Asked] = []

    def probability(batch: Sequence[Asked]) -> list[float]:
        asked.extend(batch)
        return [0.1 * (n + 1) for n in range(len(batch))]

    found = ask(Vlm(probability, lambda _: []), PICTURES[:2], PROMPTS[1::-1], atoms, where="q.jsonl")
    assert found == [[0.1], [0.2, pytest.approx(0.3)]]
    assert [one.images[0] for one in asked] == [PICTURES[0], PICTURES[1], PICTURES[1]]
    assert asked[2].question == "How many? Answer in one word." and "2" in asked[2].options
    with pytest.raises(ValueError, match=r"q\.jsonl: no questions about the prompt 'no text"):
        ask(Vlm(probability, lambda _: []), PICTURES[:1], PROMPTS[2:], atoms, where="q.jsonl")


def test_soft_tifa_of_a_model_and_a_file(folder: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = tmp_path / "questions.jsonl"
    lines = [
        {"prompt": PROMPTS[0], "vqa_list": [["Is it red?", "Yes"], ["How many?", "two"]]},
        {"prompt": PROMPTS[1], "tag": "single_object", "include": [{"class": "dog", "count": 1}]},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    words = AutoTokenizer.from_pretrained(folder)
    yes, numbers = words.convert_tokens_to_ids("Yes"), words.convert_tokens_to_ids(["two", "Two", "2"])
    ways = [words.encode(way, add_special_tokens=False) for way in spellings("two")]
    assert {ids[0] for ids in ways if len(ids) == 1} == set(numbers)
    one = float(forward(folder, PICTURES[:1], "Is it red? Answer in one word.")[yes])
    two = float(forward(folder, PICTURES[:1], "How many? Answer in one word.")[numbers].sum())
    dog = float(forward(folder, PICTURES[1:2], "Is there a dog in the image? Answer in one word.")[yes])
    judges = [load_judge(f"soft_tifa_{kind}:{folder}@{file}") for kind in ("gm", "am")]
    assert judges[0](PICTURES[:2], PROMPTS[:2]) == pytest.approx([math.sqrt(one * two), dog], rel=1e-3)
    assert judges[1](PICTURES[:2], PROMPTS[:2]) == pytest.approx([(one + two) / 2, dog], rel=1e-3)
    card = judge_card(f"soft_tifa_gm:{folder}@{file}")
    assert card["questions"]["prompts"] == 2 and "{question}" in card["template"] and card["weights"]
    assert metric_of(f"vqa_score:{folder}") == f"VQAScore, P(Yes) ({Path(folder).name})"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "x"}', "line 1: expected prompt with vqa_list"),
        ('\n{"prompt": "x", "vqa_list": [["a"]]}', "line 2: expected prompt with vqa_list"),
        ('{"prompt": "x", "vqa_list": []}', "expected a prompt and questions with answers"),
        ('{"prompt": "x", "vqa_list": [["a", 1]]}', "expected a prompt and questions with answers"),
    ],
)
def test_broken_questions_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "questions.jsonl")


def test_a_judge_without_its_model_or_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a model: vqa_score:MODEL"):
        load_judge("vqa_score")
    with pytest.raises(ValueError, match="can't be opened"):
        load_judge(f"vqa_score:{tmp_path}/none")
    tiny_vlms.save("llava", tmp_path / "llava")
    with pytest.raises(ValueError, match=r"needs questions: soft_tifa_gm:.*@QUESTIONS\.jsonl"):
        load_judge(f"soft_tifa_gm:{tmp_path}/llava")
    with pytest.raises(ValueError, match="scores pictures one by one"):
        load_pairwise(f"vqa_score:{tmp_path}/llava")
    model, processor = tiny_vlms.build("llava")
    with pytest.raises(ValueError, match="cuts 'Yes' into several tokens"):
        wrap(model, processor, "x").probability([Asked((PICTURES[0],), "?", ("Yes",))])

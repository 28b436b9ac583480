"""Judges with a vision-language model: tiny random models against plain forward passes, and artificial answers."""

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
from dpo_mm.judges.soft_tifa import (
    TifaQuestion,
    answer_probabilities,
    geneval_questions,
    mean_of,
    plural,
    read_questions,
    spellings,
)
from dpo_mm.judges.vqa import (
    PREFERENCE_TEMPLATE,
    YES_NO_TEMPLATE,
    Vlm,
    VlmQuestion,
    named_image,
    open_vlm,
    prefer_in_both_orders,
    token_ids,
    wrap_vlm,
)
from tests.contracts import tiny_vlms

PROMPTS = ["a red square", "three small circles beside it", "no text at all and a blue field"]
IMAGES = [tiny_vlms.noise_image(n) for n in range(3)]
ANSWERS = ["Yes", "No", "two", "Two", "2", "first", "second"]


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Files of a tiny model. Its tokenizer knows the answers, and its generation settings penalise repetition."""
    family, words = request.param, tiny_vlms.tokenizer(request.param)
    words.add_tokens(ANSWERS)
    torch.manual_seed(3)
    model, processor = tiny_vlms.BUILDERS[family](words.convert_tokens_to_ids, words)
    processor.chat_template = tiny_vlms.chat_template(family)
    model.generation_config.repetition_penalty = 1.5
    path = tmp_path_factory.mktemp(family)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def forward(folder: str, images: Sequence[Any], question: str) -> torch.Tensor:
    """Next-token probabilities for a single question: the bare model on the processor's encoding of the template."""
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


def test_vqa_score_equals_probability_of_yes(folder: str) -> None:
    from transformers import AutoTokenizer

    yes = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("Yes")
    expected = [
        float(forward(folder, [image], YES_NO_TEMPLATE.format(prompt=prompt))[yes])
        for image, prompt in zip(IMAGES, PROMPTS, strict=True)
    ]
    judge = load_judge(f"vqa_score:{folder}")
    assert judge(IMAGES, PROMPTS) == pytest.approx(expected, rel=1e-4)
    single = [judge([image], [prompt])[0] for image, prompt in zip(IMAGES, PROMPTS, strict=True)]
    assert single == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 9) for value in expected}) == 3


def test_option_probability_counts_each_token_once(folder: str) -> None:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    ids = words.convert_tokens_to_ids(["two", "Two", "2"])
    p = forward(folder, IMAGES[:1], "How many?")
    vlm = open_vlm(Path(folder), torch.device("cpu"))
    options = ("two", "Two", "2", "two", "twofold")
    assert vlm.probability([VlmQuestion((IMAGES[0],), "How many?", options)]) == pytest.approx(
        [float(p[ids].sum())], rel=1e-4
    )
    with pytest.raises(ValueError, match="needs 'Maybe' as a single token"):
        token_ids(words, ("Maybe", "maybe"), folder)


def test_vlm_prefers_swapped_pairs_return_opposite_preferences(folder: str) -> None:
    judge = load_pairwise(f"vlm_prefers:{folder}")
    forward = judge(IMAGES[:2], IMAGES[1:], PROMPTS[:2])
    swapped = judge(IMAGES[1:], IMAGES[:2], PROMPTS[:2])
    assert all(value in (0, 0.5, 1) for value in forward)
    assert [1 - value for value in swapped] == forward


def test_self_test_covers_judges_with_a_vlm(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"prompt": PROMPTS[0], "vqa_list": [["Is it red?", "Yes"]]}))
    for name, number in (
        (f"vqa_score:{folder}", 5),
        (f"vlm_prefers:{folder}", 4),
        (f"soft_tifa_gm:{folder}@{file}", 5),
    ):
        results = {check.name: check for check in self_test(name)}
        assert len(results) == number and results["weights model.safetensors"].passed is None
        assert all(
            results[name].passed
            for name in ("same scores twice", "same scores in batches", "swapped pairs")
            if name in results
        )
    assert results["captions"].passed is None


def answering(answer: Callable[[VlmQuestion], str]) -> Vlm:
    return Vlm(lambda asked: [0.0] * len(asked), lambda asked: [answer(one) for one in asked])


def test_position_biased_vlm_returns_only_ties() -> None:
    for stubborn in ("first", "The second.", "", "first or second", "neither", "1st"):
        assert prefer_in_both_orders(answering(lambda _, s=stubborn: s), IMAGES, IMAGES[::-1], PROMPTS) == [0.5] * 3


def test_order_swapping_judge_returns_consistent_preference() -> None:
    bright = {id(image): n for n, image in enumerate(IMAGES)}
    vlm = answering(lambda one: "First!" if bright[id(one.images[0])] > bright[id(one.images[1])] else "the second one")
    assert prefer_in_both_orders(vlm, [IMAGES[2], IMAGES[0]], [IMAGES[0], IMAGES[1]], PROMPTS[:2]) == [1.0, 0.0]
    received: list[VlmQuestion] = []
    prefer_in_both_orders(
        Vlm(lambda _: [], lambda batch: received.extend(batch) or ["x"] * len(batch)),
        IMAGES[:1],
        IMAGES[1:2],
        PROMPTS[:1],
    )
    assert [one.images for one in received] == [(IMAGES[0], IMAGES[1]), (IMAGES[1], IMAGES[0])]
    assert {one.question for one in received} == {PREFERENCE_TEMPLATE.format(prompt=PROMPTS[0])}


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
def test_named_image_parses_first_second_or_neither(answer: str, expected: str) -> None:
    assert named_image(answer) == expected


def test_questions_geneval_questions() -> None:
    position = {"include": [{"class": "tie", "count": 1}, {"class": "bench", "count": 1, "position": ["left of", 0]}]}
    assert [atom.question for atom in geneval_questions(position)] == [
        "Is there a tie in the image?",
        "Is there a bench in the image?",
        "Is the bench to the left of the tie?",
    ]
    counting = {"include": [{"class": "knife", "count": 3}], "exclude": [{"class": "knife", "count": 4}]}
    assert geneval_questions(counting)[1] == TifaQuestion("How many knives are in the image?", "three")
    one = {"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog", "count": 2}]}
    assert geneval_questions(one)[1] == TifaQuestion("How many dogs are in the image?", "one")
    colours = {"include": [{"class": "scissors", "count": 1, "color": "purple"}]}
    assert [atom.question for atom in geneval_questions(colours)] == [
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


def test_spellings_include_case_digits_and_space() -> None:
    assert set(spellings("four")) == {"four", "Four", "4", " four", " Four", " 4"}
    assert set(spellings("2")) == {"2", "two", " 2", " two"}
    assert set(spellings("Yes")) == {"Yes", "yes", " Yes", " yes"}


def test_mean_of_returns_arithmetic_and_geometric_mean() -> None:
    parts = [0.9, 0.4, 0.1]
    assert mean_of(parts, geometric=False) == pytest.approx(1.4 / 3)
    assert mean_of(parts, geometric=True) == pytest.approx((0.9 * 0.4 * 0.1) ** (1 / 3))
    assert mean_of([1.0, 0.0], geometric=True) == 0


def test_answer_probabilities_use_the_questions_of_each_prompt() -> None:
    questions = {
        PROMPTS[0]: [TifaQuestion("Is it red?", "Yes"), TifaQuestion("How many?", "two")],
        PROMPTS[1]: [TifaQuestion("Is it blue?", "Yes")],
    }
    received: list[VlmQuestion] = []

    def probability(batch: Sequence[VlmQuestion]) -> list[float]:
        received.extend(batch)
        return [0.1 * (n + 1) for n in range(len(batch))]

    probabilities = answer_probabilities(
        Vlm(probability, lambda _: []), IMAGES[:2], PROMPTS[1::-1], questions, file_name="q.jsonl"
    )
    assert probabilities == [[0.1], [0.2, pytest.approx(0.3)]]
    assert [one.images[0] for one in received] == [IMAGES[0], IMAGES[1], IMAGES[1]]
    assert received[2].question == "How many? Answer in one word." and "2" in received[2].options
    with pytest.raises(ValueError, match=r"q\.jsonl: no questions for the prompt 'no text"):
        answer_probabilities(Vlm(probability, lambda _: []), IMAGES[:1], PROMPTS[2:], questions, file_name="q.jsonl")


def test_soft_tifa_equals_means_of_forward_passes(folder: str, tmp_path: Path) -> None:
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
    one = float(forward(folder, IMAGES[:1], "Is it red? Answer in one word.")[yes])
    two = float(forward(folder, IMAGES[:1], "How many? Answer in one word.")[numbers].sum())
    dog = float(forward(folder, IMAGES[1:2], "Is there a dog in the image? Answer in one word.")[yes])
    judges = [load_judge(f"soft_tifa_{kind}:{folder}@{file}") for kind in ("gm", "am")]
    assert judges[0](IMAGES[:2], PROMPTS[:2]) == pytest.approx([math.sqrt(one * two), dog], rel=1e-3)
    assert judges[1](IMAGES[:2], PROMPTS[:2]) == pytest.approx([(one + two) / 2, dog], rel=1e-3)
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
def test_read_questions_names_the_malformed_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "questions.jsonl")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("vqa_score:org/missing", "`hf download org/missing`, or name the judge vqa_score:org/missing@hub"),
        ("vqa_score:org/missing@v2", "`hf download org/missing --revision v2`."),
        ("vlm_prefers:missing", "`hf download missing`, or name the judge vlm_prefers:missing@hub"),
        ("soft_tifa_gm:org/missing@questions.jsonl", "`hf download org/missing`."),
        ("vqa_score:not/a/hub/id", "Pass a folder"),
    ],
)
def test_missing_model_fails_at_once_without_a_request(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[object]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    load = load_pairwise if name.startswith("vlm_prefers") else load_judge
    with pytest.raises(ValueError, match="not a folder and not in the hub's cache") as error:
        load(name)
    assert command in str(error.value) and "\n" not in str(error.value) and not no_network


def test_cached_model_loads_without_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[object]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    words = tiny_vlms.tokenizer("llava")
    words.add_tokens(ANSWERS)
    model, processor = tiny_vlms.BUILDERS["llava"](words.convert_tokens_to_ids, words)
    repo = tmp_path / "models--org--cached"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    processor.save_pretrained(repo / "snapshots" / "abc")
    model.config.save_pretrained(repo / "snapshots" / "abc")
    with pytest.raises(ValueError, match="not in the hub's cache"):  # without weights
        load_judge("vqa_score:org/cached")
    model.save_pretrained(repo / "snapshots" / "abc")
    assert 0 <= load_judge("vqa_score:org/cached")(IMAGES[:1], PROMPTS[:1])[0] <= 1
    assert load_judge("vqa_score:org/cached@main")(IMAGES[:1], PROMPTS[:1])
    card = judge_card("vqa_score:org/cached")
    assert (card["model"], card["revision"]) == ("org/cached", "abc") and card["weights"]
    assert not no_network


def test_vqa_score_downloads_only_with_hub_in_the_name(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    downloads: list[str] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, allow_patterns: downloads.append(repo) or folder
    )
    repo = f"org/{Path(folder).name}"
    assert load_judge(f"vqa_score:{repo}@hub")(IMAGES[:1], PROMPTS[:1]) and downloads == [repo]


def test_judge_without_model_or_questions_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a model: vqa_score:MODEL"):
        load_judge("vqa_score")
    with pytest.raises(ValueError, match="is not a folder and not in the hub's cache"):
        load_judge(f"vqa_score:{tmp_path}/none")
    tiny_vlms.save("llava", tmp_path / "llava")
    with pytest.raises(ValueError, match=r"needs questions: soft_tifa_gm:.*@QUESTIONS\.jsonl"):
        load_judge(f"soft_tifa_gm:{tmp_path}/llava")
    with pytest.raises(ValueError, match="scores single images"):
        load_pairwise(f"vqa_score:{tmp_path}/llava")
    model, processor = tiny_vlms.build("llava")
    with pytest.raises(ValueError, match="needs 'Yes' as a single token"):
        wrap_vlm(model, processor, "x").probability([VlmQuestion((IMAGES[0],), "?", ("Yes",))])

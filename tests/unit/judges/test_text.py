"""The judges of answers, on texts whose verdict is known."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_mm.data.schema import Response
from dpo_mm.judges import JUDGES, Ratio, better_of, explain, load_judge
from dpo_mm.judges import captions as chair
from dpo_mm.judges import text as judges


def said(text: str, *, cut: bool = False) -> Response:
    return Response(text, len(text), cut)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Index " + "." * 40, (6, 1, 40)),
        ("1 2 3 " + "na " * 20, (5, 3, 20)),
        ("x" + "ab" * 9 + "a", (1, 2, 9)),
        ("abcabcabcabc", (0, 3, 4)),
        ("0 0 0", None),
        ("the quick brown fox", None),
        ("aaa then something else", None),
        ("", None),
    ],
)
def test_the_loop_that_a_text_ends_in(text: str, expected: tuple[int, int, int] | None) -> None:
    assert judges.find_repetition(text) == expected


@given(st.text(alphabet="xyz", max_size=20), st.text(alphabet="abc", min_size=1, max_size=6), st.integers(12, 40))
def test_a_planted_loop_is_found_and_cut(before: str, unit: str, rounds: int) -> None:
    text = before + unit * rounds
    loop = judges.find_repetition(text)
    assert loop is not None and loop.start <= len(before) and len(unit) % loop.period == 0
    assert judges.truncate_repetition(text) == text[: loop.start + 3 * loop.period]


@pytest.mark.parametrize(
    ("text", "truth", "kept"),
    [
        ("Indox " + "." * 300, "Index .......... 41\nRoads .... 7", "Indox " + "." * 13),
        ("1" + " 0.0" * 90, "Total 0.0 0.0 0.0 0.0 2.1", "1" + " 0.0" * 7),
        ("never " * 60, "never never gone", "never " * 5),
        ("a" * 60, "b" + "a" * 99, "a" * 60),
        ("no loop at all", "no loop", "no loop at all"),
    ],
)
def test_a_loop_that_the_truth_has_too_is_cut_where_it_has_outrun_the_truth(text: str, truth: str, kept: str) -> None:
    assert judges.truncate_repetition(text, truth) == kept


def test_degeneration_is_a_repeated_tail_at_the_limit_that_the_truth_does_not_have() -> None:
    loop, table = "0.0 " * 40, "Total " + "0.0 " * 40
    answers = [said(loop, cut=True), said(loop), said("a long and honest answer that never ends", cut=True)]
    assert judges.degeneration(answers, ["short"] * 3) == [Ratio(1, 1), Ratio(0, 1), Ratio(0, 1)]
    assert judges.degeneration([said(loop, cut=True)], [table]) == [Ratio(0, 1)]


def test_runaway_counts_short_units_alone() -> None:
    answers = [said("a" * 31), said("a" * 30), said("abcde" * 31), said("abcdef" * 31), said("a" * 99)]
    found = judges.trailing_repetition(answers, ["", "", "", "", "b" + "a" * 99])
    assert [share.hits for share in found] == [1, 0, 1, 0, 0]


def test_repetition_is_what_exceeds_the_truth() -> None:
    unit = "0123456789"
    assert judges.rep(unit * 2) == pytest.approx(1 - 10 / 11)
    assert judges.rep("short") == 0
    more, same = judges.repetition([said(unit * 2), said(unit * 2)], [unit, unit * 2])
    assert more == (pytest.approx(1 / 11), 1) and same == (0, 1)


def test_error_rates_sum_over_answers() -> None:
    assert judges.cer([said("kitten"), said("")], ["sitting", "ab"]) == [Ratio(3, 7), Ratio(2, 2)]
    assert judges.cer([said("aaaa")], ["a"]) == [Ratio(3, 1)]
    assert judges.wer([said("the cat sat")], ["the cat sat down"]) == [Ratio(1, 4)]
    assert judges.anls([said("Hello "), said("xyz")], ["hello", "abc"]) == [Ratio(1, 1), Ratio(0, 1)]


def test_json_is_asked_for_where_the_truth_is_json() -> None:
    truth = json.dumps({"header": "a", "body": "b"})
    answers = [
        said('{"header": "x", "body": ""}'),
        said('{"header": "x"}'),
        said('{"header'),
        said("[1]"),
        said("text"),
    ]
    found = judges.valid_json(answers, [truth] * 4 + ["text"])
    assert found == [Ratio(1, 1), Ratio(0, 1), Ratio(0, 1), Ratio(0, 1), Ratio(0, 0)]


def test_chair_counts_inventions_recall_and_kinds_once() -> None:
    truth = "a red circle and a blue star."
    answers = [
        said("a red circle, a red circle and a green cross."),
        said(""),
        said("a red circle and a blue star."),
    ]
    assert chair.chair_i(answers, [truth] * 3) == [Ratio(1, 2), Ratio(0, 0), Ratio(0, 2)]
    assert chair.chair_s(answers, [truth] * 3) == [Ratio(1, 1), Ratio(0, 1), Ratio(0, 1)]
    assert chair.recall(answers, [truth] * 3) == [Ratio(1, 2), Ratio(0, 2), Ratio(2, 2)]


def test_another_vocabulary_is_another_function() -> None:
    synonyms = {"puppy": "dog", "dog": "dog", "kitten": "cat"}
    mentions = lambda text: [synonyms[word] for word in text.split() if word in synonyms]
    found = chair.counts([said("a puppy beside a kitten")], ["one dog"], mentions=mentions)
    assert found == [chair.Counts(mentioned=2, invented=1, there=1, found=1)]


def test_findings_name_what_is_wrong_and_where() -> None:
    text = "a red circle and a green cross."
    found = explain("chair_i", said(text), "a red circle.")
    assert found.reason == "invented: green cross"
    assert [text[a:b] for a, b in found.marks] == ["green cross"]
    loop = explain("degeneration", said("ok " + "na " * 9, cut=True), "ok")
    assert loop.reason == "' na' x 9 at the end, cut at the token limit" and loop.marks == ((2, 30),)
    assert explain("cer", said("x"), "y").reason == ""


def test_every_judge_of_answers_loads_and_gives_a_share_each() -> None:
    answers, truths = [said("a red circle."), said("")], ["a blue star.", '{"a": 1}']
    for name, judge in JUDGES.items():
        if judge.function.startswith(("dpo_mm.judges.text", "dpo_mm.judges.captions")):
            found = load_judge(name)(answers, truths)
            assert len(found) == 2 and all(share.hits >= 0 and share.of >= 0 for share in found), name
    assert better_of("cer") == "lower" and better_of("recall") == "higher" and better_of("num_words") == "neutral"


def test_a_loop_that_is_in_the_truth_is_no_finding() -> None:
    row = "rain, rain, rain, rain"
    assert judges.explain_loop(Response(row, 20, hit_limit=False), row).reason == ""
    assert "rain" in judges.explain_loop(Response(row + ", rain" * 30, 200, hit_limit=True), row).reason


def test_inventions_and_omissions_count_together() -> None:
    truth = "a red circle and a blue star."
    answers = [
        Response(words, 5, hit_limit=False) for words in (truth, "a red circle.", "a red circle and a green cross.")
    ]
    assert [share.hits / share.of for share in chair.hallucination_f1_error(answers, [truth] * 3)] == [0, 1 / 3, 2 / 4]

"""Pairs from own failures: chosen, rejected, truncation of loops, and resuming."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

import dpo_mm.mining.mine_responses as mining
from dpo_mm.config import MineResponsesConfig
from dpo_mm.data.lazy_images import LazyImages
from dpo_mm.data.questions import Question
from dpo_mm.data.schema import Response, load_responses
from dpo_mm.errors import TrainingInterrupted
from dpo_mm.mining.mine_responses import build_pair, mine_responses
from dpo_mm.policies.vlm.chat import ConversationEncoder
from tests.contracts.tiny_vlms import build, save

RED = Image.new("RGB", (8, 8), "#ff0000")
PAGE = Question("page", (RED,), "Transcribe this page.", "1 2 3", "digits")
SCENE = Question("scene", (RED,), "Describe the picture.", "a red circle and a blue star.", "2 things")
DECODINGS = ("greedy", "sampled at 1, seed 0", "sampled at 1, seed 1")


def config(**more: object) -> MineResponsesConfig:
    given = {"model": "m", "questions": "q", "output_dir": "o", "judges": "degeneration", **more}
    return MineResponsesConfig(**given)  # type: ignore[arg-type]


def test_loop_is_rejected_truncated_without_end_of_turn_and_with_reason() -> None:
    row = build_pair(PAGE, [Response("1 2 3", 5, False), Response("1 " + "7 " * 60, 121, True)], DECODINGS, config())
    assert row is not None
    assert row["rejected"] == "1 7 7 7" and row["rejected_truncated"] and row["chosen"] == "1 2 3"
    assert row["reason"] == "' 7' x 60 at the end, truncated at the token limit" and row["decoding"] == DECODINGS[1]
    assert row["id"] == "page/1" and row["score_gap"] == 1 and row["axis"] == "degeneration"


def test_response_without_failure_gives_no_pair() -> None:
    assert build_pair(PAGE, [Response("1 2 9", 5, False)], DECODINGS, config()) is None
    assert build_pair(PAGE, [Response("1 2 3 4", 7, False)], DECODINGS, config(judges="cer", min_score_gap=0.5)) is None
    row = build_pair(PAGE, [Response("1 2 3 4", 7, False)], DECODINGS, config(judges="cer"))
    assert row is not None and row["rejected"] == "1 2 3 4" and not row["rejected_truncated"]


def test_empty_page_is_a_valid_truth() -> None:
    """Catches a question that is skipped because its right response is empty."""
    page = dataclasses.replace(PAGE, ground_truth="")
    row = build_pair(page, [Response("7 " * 60, 120, True)], DECODINGS, config())
    assert row is not None and row["chosen"] == "" and row["score_gap"] == 1


def test_chosen_best_uses_recall_for_ties() -> None:
    responses = [
        Response("a green cross.", 4, False),
        Response("a red circle.", 4, False),
        Response("a red circle and a blue star.", 8, False),
    ]
    row = build_pair(SCENE, responses, DECODINGS, config(judges="chair_i", chosen="best"))
    assert row is not None and (row["chosen"], row["rejected"]) == (responses[2].text, responses[0].text)
    assert build_pair(SCENE, responses[1:], DECODINGS, config(judges="chair_i", chosen="best")) is None


def test_truncated_response_has_no_end_of_turn_as_chosen_either() -> None:
    """Mutation that it catches: the best response always gets an end of turn."""
    responses = [Response("a red circle and", 4, True), Response("a green cross.", 4, False)]
    row = build_pair(SCENE, responses, DECODINGS, config(judges="chair_i", chosen="best"))
    assert row is not None and row["chosen"] == "a red circle and"
    assert row["chosen_truncated"] and not row["rejected_truncated"]
    row = build_pair(SCENE, responses, DECODINGS, config(judges="chair_i"))
    assert row is not None and not row["chosen_truncated"]


def test_corrected_response_changes_only_what_the_judge_rejects() -> None:
    page = dataclasses.replace(PAGE, ground_truth="Mines ....... 44\nRoads ........ 75")
    looping = Response("Nines ....... 44\nRoads " + "." * 170, 200, True)
    row = build_pair(page, [looping], DECODINGS, config(chosen="corrected"))
    assert row is not None and row["chosen"] == "Nines ....... 44\nRoads ........ 75"
    assert row["rejected"] == "Nines ....... 44\nRoads " + "." * 11, "three more than the 8 dots of the ground truth"
    assert row["source"].endswith("chosen: corrected")
    caption = Response("a blue star and a green cross.", 8, False)
    row = build_pair(SCENE, [caption], DECODINGS, config(judges="hallucination_f1_error", chosen="corrected"))
    assert row is not None and row["chosen"] == "a blue star and a red circle."
    assert row["reason"] == "hallucinated: green cross; missing: red circle"


def test_truncated_response_has_no_end_of_turn() -> None:
    model, processor = build("llava")
    rows = ConversationEncoder(processor, model, max_length=None, overlong_rows="raise")
    end = rows.tokenizer.eos_token_id
    row = {"id": "r", "images": [RED], "prompt": "What?", "chosen": "a red circle", "rejected": "na na na"}
    whole, opened = (rows.encode_row({**row, "rejected_truncated": value}) for value in (False, True))
    assert whole is not None and opened is not None
    assert whole["rejected_ids"].tolist() == [*opened["rejected_ids"].tolist(), end]
    assert opened["chosen_ids"][-1] == end


def test_question_whose_image_does_not_decode_is_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Image.Image:
        raise ValueError("q.jsonl, row 7: image a.png cannot be read (image file is truncated)")

    damaged = dataclasses.replace(PAGE, images=LazyImages([broken]))
    assert mining._decodable([PAGE, damaged, SCENE]) == [PAGE, SCENE]
    assert "q.jsonl, row 7: image a.png" in caplog.text and "The question is left out" in caplog.text
    advanced: list[int] = []
    assert mining._mine_shard(None, [damaged], config(responses_per_question=3), advanced.append) == []  # type: ignore[arg-type]
    assert advanced == [3]


@pytest.fixture
def mining_config(tmp_path: Path) -> MineResponsesConfig:
    RED.save(tmp_path / "red.png")
    rows = [
        {"id": f"q{n}", "image": "red.png", "prompt": "What?", "ground_truth": f"a red field {n}"} for n in range(5)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return config(
        model=save("llava", tmp_path / "model"),
        questions=str(tmp_path / "q.jsonl"),
        output_dir=str(tmp_path / "mined"),
        judges="cer",
        responses_per_question=2,
        max_new_tokens=6,
        shard_size=2,
    )


def test_mined_rows_are_response_preferences(mining_config: MineResponsesConfig) -> None:
    rows = load_responses(str(mine_responses(mining_config)))
    assert len(rows) == 5
    for number, row in enumerate(rows):
        assert row["chosen"][0]["content"][0]["text"] == f"a red field {number}"
        assert row["rejected"][0]["content"][0]["text"] != f"a red field {number}"
        assert row["score_gap"] > 0 and row["reason"] and row["decoding"] and row["images"][0].size == (8, 8)


def test_mining_resumes_after_finished_shards(
    mining_config: MineResponsesConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = mining._mine_shard, []

    def interrupt(*arguments: object) -> object:
        calls.append(arguments[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(mining, "_mine_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mine_responses(mining_config)
    again = mine_responses(mining_config)
    assert len(calls) == 4  # the first shard was not mined again
    whole = mine_responses(dataclasses.replace(mining_config, output_dir=mining_config.output_dir + "-whole"))
    assert load_responses(str(again))["rejected"] == load_responses(str(whole))["rejected"]


def test_sigterm_ends_mining_after_its_shard_and_it_resumes(
    mining_config: MineResponsesConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = mining._mine_shard, []

    def signalled(*arguments: object) -> object:
        calls.append(arguments[1])
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)  # type: ignore[arg-type]

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(mining, "_mine_shard", signalled)
    with pytest.raises(TrainingInterrupted, match=r"2 complete shards are in .*mined, and the same command resumes"):
        mine_responses(mining_config)
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(load_responses(str(mine_responses(mining_config)))) == 5 and len(calls) == 3


def test_two_processes_share_the_shards(mining_config: MineResponsesConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_responses(str(mine_responses(mining_config)))
    shared = dataclasses.replace(mining_config, output_dir=mining_config.output_dir + "-shared")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, shards in (("1", ["00001"]), ("0", ["00000", "00001", "00002"])):
        monkeypatch.setenv("RANK", rank)
        pairs = mine_responses(shared)
        found = sorted(path.stem.removeprefix("shard-") for path in Path(shared.output_dir).glob("shard-*"))
        assert found == shards and pairs.exists() == (rank == "0")
    assert load_responses(str(pairs))["rejected"] == whole["rejected"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": "mine"}, "Use 'ground_truth', 'best' or 'corrected'"),
        ({"chosen": "corrected", "judges": "cer"}, "cannot correct a response"),
        ({"chosen": "best", "responses_per_question": 1}, "use at least 2"),
        ({"judges": "valid_json"}, "no response to 5 questions failed by valid_json"),
    ],
)
def test_invalid_response_mining_raises(
    change: dict[str, object], message: str, mining_config: MineResponsesConfig
) -> None:
    with pytest.raises(ValueError, match=message):
        mine_responses(dataclasses.replace(mining_config, **change))  # type: ignore[arg-type]


def test_question_without_ground_truth_raises_with_its_id(mining_config: MineResponsesConfig) -> None:
    Path(mining_config.questions).write_text(json.dumps({"id": "lost", "prompt": "What?"}))
    with pytest.raises(ValueError, match="question lost has no ground truth"):
        mine_responses(mining_config)

"""Rounds: which settings each round has, when they stop, what they return, and that an interrupted run continues."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpo_mm import rounds
from dpo_mm.config import CompareConfig, CompareResponsesConfig, MineConfig, SidePrompts, SideQuestions, TrainConfig
from dpo_mm.data.questions import read_questions
from dpo_mm.errors import NoPairsError
from dpo_mm.evaluation.round_charts import LogProbChange, distinct_bigrams, log_prob_change, round_charts
from dpo_mm.evaluation.statistics import holm_corrected, paired
from dpo_mm.evaluation.verdict import CompareResult, run_verdict
from dpo_mm.mining.mine_result import MineResult
from dpo_mm.recipe import Recipe, read_recipe, read_recipe_file, run_recipe
from dpo_mm.training.run import TrainResult
from tests.bench.round_alarms import rounds_passed

BETTER, SAME = 0.4, 0.0


def text_recipe(folder: Path, **overrides: str) -> Recipe:
    return read_recipe(
        "captioner", "shapes", {"output_dir": str(folder), "rounds": "3", "compare.max_questions": "4", **overrides}
    )


def image_recipe(folder: Path) -> Recipe:
    plain = read_recipe("faithfulness", "shapes", {"output_dir": str(folder), "rounds": "3", "seed": "5"})
    mining = MineConfig("shapes-sd", "shapes-train", str(folder / "mined"), "faithfulness", seed=5)
    return dataclasses.replace(plain, mine=mining)


def result_of(config: Any, gain: float, side_gain: float = 0.0) -> CompareResult:
    """Invented result of a comparison: 60 prompts whose score rises by about `gain`."""
    rng = np.random.default_rng(0)
    rows = []
    for name, size in (("primary", gain), ("side", side_gain)):
        base = rng.random(60)
        row = paired(base, base + size + rng.normal(0, 0.05, 60), clusters=np.arange(60), metric=name, judge=name)
        rows.append(dataclasses.replace(row, headline=name == "primary", side_set="" if name == "primary" else "there"))
    rows = holm_corrected(rows)
    return CompareResult(run_verdict(rows[0], [], rows[1:]), tuple(rows), (), Path(config.output_dir) / "report.html")


class Steps:
    """Stand-ins for mining, training and comparing that record their settings. Finished steps are not done again.

    Args:
        gains: gain of each comparison by its folder.
        fails: called with the folder of each step before it is done.
    """

    def __init__(self, gains: dict[str, float], fails: Callable[[str], None] = lambda _: None) -> None:
        self.gains, self.fails = gains, fails
        self.finished: dict[str, Any] = {}
        self.done: list[str] = []

    def __call__(self, config: Any, **_: Any) -> Any:
        name = Path(config.output_dir).name
        if name not in self.finished:
            self.fails(name)
            self.done.append(name)
            self.finished[name] = config
        assert self.finished[name] == config, "a finished step is read with other settings"
        if isinstance(config, TrainConfig):
            log = ({"eval_rewards/chosen": 0.2, "eval_rewards/rejected": -0.4, "step": 1.0},)
            return TrainResult(Path(config.output_dir), log, {}, 0.1)
        if isinstance(config, CompareConfig | CompareResponsesConfig):
            return result_of(config, self.gains.get(name, SAME))
        return MineResult(Path(config.output_dir) / "pairs.parquet")

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("mine", "train", "compare"):
            patch.setattr(rounds, name, self)
        patch.setattr(MineResult, "pairs", 7)
        patch.setattr("dpo_mm.training.builders.validate_config", lambda _: None)


def metrics(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text()))


def test_each_round_starts_from_the_one_before_on_fresh_material(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It catches a round that mines from the base, trains a new adapter, or is compared with the base or on used questions."""
    steps = Steps({"compared-1": BETTER, "compared-2": BETTER, "final": BETTER})
    steps.install(monkeypatch)
    run_recipe(text_recipe(tmp_path / "run"), command="c")
    assert steps.done == [f"{step}-{n}" for n in (1, 2, 3) for step in ("mined", "adapter", "compared")] + ["final"]
    first, second = (str(tmp_path / "run" / f"adapter-{n}") for n in (1, 2))
    made = steps.finished
    assert [made[f"mined-{n}"].adapter for n in (1, 2, 3)] == [None, first, second]
    assert [made[f"adapter-{n}"].adapter for n in (1, 2, 3)] == [None, first, second]
    assert made["adapter-2"].pairs == str(tmp_path / "run" / "mined-2" / "pairs.parquet")
    assert (made["compared-2"].base_adapter, made["compared-2"].adapter) == (first, second)
    assert (made["final"].base_adapter, made["final"].adapter) == (None, second)
    assert [made[name].part for name in ("compared-1", "compared-2", "compared-3", "final")] == [
        "1/4",
        "2/4",
        "3/4",
        "4/4",
    ]
    assert len({made[f"mined-{n}"].seed for n in (1, 2, 3)}) == 3


def test_rounds_of_images_have_fresh_seeds_also_on_side_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = Steps({"compared-1": BETTER})
    steps.install(monkeypatch)
    recipe = image_recipe(tmp_path / "run")
    recipe = dataclasses.replace(
        recipe, compare=dataclasses.replace(recipe.compare, side_sets=(SidePrompts("shapes-train"),))
    )
    run_recipe(recipe, command="c")
    configs = [steps.finished[name] for name in ("compared-1", "compared-2", "final")]
    assert [config.seed for config in configs] == [1005, 2005, 4005]
    assert all(config.side_sets == (SidePrompts("shapes-train"),) for config in configs)
    assert [config.scales for config in configs] == [(), (), (0.5, 1.5)]


def test_rounds_stop_at_the_first_that_is_not_better(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = Steps({"compared-1": BETTER, "final": BETTER})
    steps.install(monkeypatch)
    result = run_recipe(text_recipe(tmp_path / "run"), command="c")
    assert steps.done[-4:] == ["mined-2", "adapter-2", "compared-2", "final"]
    assert steps.finished["final"].adapter == str(tmp_path / "run" / "adapter-1")
    assert result.verdict == "better" and result.notes[0] == "Keep round 1. Round 2 did not pass."
    assert "on a part of the questions that no decision saw" in result.notes[1] and "adapter-1" in result.notes[1]
    written = metrics(tmp_path / "run")
    assert written["best_round"] == 1 and [point["passed"] for point in written["rounds"]] == [True, False]
    point = written["rounds"][0]
    assert point["log_probs"] == {"chosen": 2.0, "rejected": -4.0} and point["level"] == pytest.approx(0.05 / 3)
    assert "round 2" in (tmp_path / "run" / "report.html").read_text()


def test_rounds_without_an_improvement_keep_the_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = Steps({})
    steps.install(monkeypatch)
    result = run_recipe(text_recipe(tmp_path / "run"), command="c")
    assert steps.done == ["mined-1", "adapter-1", "compared-1"] and result.verdict == "no evidence"
    assert result.notes[0] == "Keep the base. Round 1 did not pass." and metrics(tmp_path / "run")["best_round"] == 0
    Steps({}).install(monkeypatch)
    own = run_recipe(text_recipe(tmp_path / "own", **{"train.adapter": "shapes-captioner-tuned"}), command="c")
    assert own.notes[0].startswith("Keep the adapter shapes-captioner-tuned, which is the base here.")


def test_a_killed_run_continues_with_the_same_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It catches a finished step that is done again, or that is read with other settings, for every place of a kill."""
    names = [f"{step}-{n}" for n in (1, 2) for step in ("mined", "adapter", "compared")] + ["final"]
    killed: set[str] = set()

    def kill_once(name: str) -> None:
        if name not in killed:
            killed.add(name)
            raise KeyboardInterrupt

    steps = Steps({"compared-1": BETTER, "final": BETTER}, kill_once)
    steps.install(monkeypatch)
    for _ in names:
        with pytest.raises(KeyboardInterrupt):
            run_recipe(text_recipe(tmp_path / "run"), command="c")
    assert run_recipe(text_recipe(tmp_path / "run"), command="c").verdict == "better"
    again = run_recipe(text_recipe(tmp_path / "run"), command="c")
    assert steps.done == names and again.notes[0].startswith("Keep round 1. ")
    with pytest.raises(ValueError, match=r"made with other settings \(train.beta: 0.1 -> 0.2\)"):
        run_recipe(text_recipe(tmp_path / "run", beta="0.2"), command="c")


def test_a_later_round_without_a_pair_ends_the_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_pairs(name: str) -> None:
        if name == empty:
            raise NoPairsError(f"{name}: no response failed.")

    empty = "mined-2"
    steps = Steps({"compared-1": BETTER, "final": BETTER}, no_pairs)
    steps.install(monkeypatch)
    result = run_recipe(text_recipe(tmp_path / "run"), command="c")
    assert result.notes[0].endswith(
        "Round 2 mined no pair, so there is nothing to train on. mined-2: no response failed."
    )
    assert result.notes[0].startswith("Keep round 1. ") and steps.done[-1] == "final" and "\n" not in result.notes[0]
    empty = "mined-1"
    with pytest.raises(NoPairsError, match="no response failed"):
        steps.__init__({}, no_pairs)  # type: ignore[misc]
        run_recipe(text_recipe(tmp_path / "other"), command="c")


def test_a_round_passes_by_its_part_of_the_level() -> None:
    """It catches a level that is not divided, and a fall on a side set that does not stop the rounds."""
    better = result_of(CompareConfig("m", "o"), BETTER)
    primary = better.comparisons[0]
    borderline = dataclasses.replace(
        better, comparisons=(dataclasses.replace(primary, p_holm=0.02), *better.comparisons[1:])
    )
    assert [rounds.decide(borderline, rounds=n).passes for n in (1, 2, 3)] == [True, True, False]
    assert "not at its part of it" in rounds.decide(borderline, rounds=3).reason
    worse_elsewhere = rounds.decide(result_of(CompareConfig("m", "o"), BETTER, side_gain=-0.4), rounds=1)
    assert not worse_elsewhere.passes and worse_elsewhere.reason.startswith("better here, worse elsewhere: ")


def test_a_policy_that_never_improves_stops_at_round_1() -> None:
    """With 1,000 simulations: `python -m tests.bench.round_alarms`."""
    assert rounds_passed((0.0,) * 3, simulations=60, prompts=24)[0] >= 57
    assert rounds_passed((3.0, 0.0), simulations=8, prompts=40)[1] >= 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mine": None}, "has no section mine"),
        ({"baseline": "sft"}, "baseline sft trains on the pairs of one round"),
        ({"train": {"tuning": "full"}}, "Set tuning: lora"),
        ({"mine": {"adapter": "a"}}, "mine.adapter a is not train.adapter None"),
        ({"compare": {"part": "1/2"}}, "part is chosen in each round"),
        ({"compare": {"side_sets": (SideQuestions("nothing.jsonl"),)}}, "side_sets: questions 'nothing.jsonl'"),
    ],
)
def test_settings_that_do_not_go_with_rounds_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path / "run")
    for name, value in change.items():
        new = dataclasses.replace(getattr(recipe, name), **value) if isinstance(value, dict) else value
        recipe = dataclasses.replace(recipe, **{name: new})
    with pytest.raises(ValueError) as error:
        run_recipe(recipe, command="c")
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_rounds_is_a_setting_of_the_recipe(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "recipes" / "presets" / "captioner-shapes.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(f"rounds: 4\n{text}")
    assert read_recipe_file(str(tmp_path / "mine.yaml"), {}).rounds == 4
    assert read_recipe_file(str(tmp_path / "mine.yaml"), {"rounds": "2"}).rounds == 2
    with pytest.raises(ValueError, match=r"rounds is '0'\. Expected a whole number from 1"):
        read_recipe("captioner", "shapes", {"rounds": "0"})


def test_parts_have_no_question_in_common(tmp_path: Path) -> None:
    """It catches parts that overlap, that leave questions out, or that are the rows of a file in turn."""
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"id": n, "prompt": f"q{n}"}) for n in range(30)))
    parts = [[q.id for q in read_questions(str(tmp_path / "q.jsonl"), part=f"{k}/3")] for k in (1, 2, 3)]
    assert {name for part in parts for name in part} == {str(n) for n in range(30)} and {
        len(part) for part in parts
    } == {10}
    assert len({int(name) % 3 for name in parts[0]}) == 3
    worlds = [read_questions("sums-held-out", limit=20, part=f"{k}/4") for k in (1, 4)]
    assert [len(part) for part in worlds] == [20, 20] and not {q.id for q in worlds[0]} & {q.id for q in worlds[1]}
    for part, message in (
        ("0/3", "expected k/n"),
        ("a", "expected k/n"),
        ("20/20", "do not make 20 parts of 2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            read_questions(str(tmp_path / "q.jsonl"), part=part)


def test_parts_have_no_image_in_common(tmp_path: Path) -> None:
    """6 images with 5 questions each. It catches decisions on one image in two rounds."""
    for n in range(6):
        Image.new("RGB", (4, 4 + n)).save(tmp_path / f"{n}.png")
    rows = [{"id": f"{n % 6}-{n}", "image": f"{n % 6}.png", "prompt": f"q{n}"} for n in range(30)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = [[q.id for q in read_questions(str(tmp_path / "q.jsonl"), part=f"{k}/3")] for k in (1, 2, 3)]
    images = [{name[0] for name in part} for part in parts]
    assert [len(part) for part in parts] == [10] * 3 and [len(each) for each in images] == [2] * 3
    assert set.union(*images) == set("012345")
    with pytest.raises(ValueError, match="30 questions about 6 images do not make 4 parts of 2 or more"):
        read_questions(str(tmp_path / "q.jsonl"), part="4/4")


def test_measures_of_a_round_equal_hand_arithmetic() -> None:
    assert distinct_bigrams(["a b a b", "c"]) == pytest.approx(2 / 3) and distinct_bigrams([]) == 0
    log: list[dict[str, float]] = [
        {"eval_rewards/chosen": 1.0, "eval_rewards/rejected": -2.0},
        {"rewards/chosen": 9.0, "rewards/rejected": 9.0},
    ]
    assert log_prob_change(log, beta=0.5) == LogProbChange(2.0, -4.0)
    assert log_prob_change(log[1:], beta=0.5) == LogProbChange(18.0, 18.0) and log_prob_change([], beta=0.5) is None
    assert round_charts((), None, 0) == []

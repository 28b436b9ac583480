from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from dpo_mm.cli.main import app
from dpo_mm.config import JudgeConfig
from dpo_mm.judges import scoring as module
from dpo_mm.judges.scoring import score
from dpo_mm.judges.self_test import CLIP_PROBABILITIES, CheckResult, clip_golden, self_test
from tests import forked
from tests.conftest import picture

HERE = "tests.unit.judges.test_scoring"


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


def slow(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    time.sleep(0.5)
    return brightness(images, prompts)


def restless(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return np.random.default_rng().random(len(images)).tolist()


def crowd(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(len(images))] * len(images)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for n in range(5):
        picture(n).save(place / f"{n}.png")
    (place / "3.png").write_bytes((place / "3.png").read_bytes()[:50])
    lines = [{"file_name": f"{n}.png", "prompt": f"prompt {n}"} for n in range(4)]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (place / "4.txt").write_text("prompt 4\n")
    return place


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> JudgeConfig:
    return JudgeConfig(f"{HERE}:brightness", str(folder), str(tmp_path / "scores.parquet"), shard_size=2)


def test_every_picture_of_a_folder_has_a_score_or_a_reason(config: JudgeConfig) -> None:
    done = score(config)
    assert done is not None and (done.scored, done.broken) == (4, 1)
    rows = pq.read_table(done.path).to_pylist()
    assert [(row["id"], row["prompt"]) for row in rows] == [(f"{n}.png", f"prompt {n}") for n in range(5)]
    for n, row in enumerate(rows):
        expected = None if n == 3 else float(np.asarray(picture(n)).mean())
        assert row["score"] == expected and bool(row["error"]) == (n == 3)
    assert json.loads(done.path.with_suffix(".json").read_text())["name"] == config.judge


def test_both_sides_of_a_set_are_scored(config: JudgeConfig, pairs: str) -> None:
    done = score(dataclasses.replace(config, images=pairs))
    assert done is not None and done.scored == 24
    rows = pq.read_table(done.path).to_pylist()
    assert [row["id"] for row in rows[:3]] == ["row-0/a", "row-0/b", "row-1/a"]
    assert [row["score"] for row in rows[:4]] == [float(np.asarray(picture(n)).mean()) for n in range(4)]


def test_scoring_goes_on_after_finished_shards(config: JudgeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = module._shard, []

    def cut(pictures: Sequence[module.Picture], *rest: object) -> object:
        calls.append([one.id for one in pictures])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(pictures, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        score(config)
    score(config)
    assert calls == [["0.png", "1.png"], ["2.png", "3.png"], ["2.png", "3.png"], ["4.png"]]
    with pytest.raises(ValueError, match=r"judged with other settings \(judge:"):
        score(dataclasses.replace(config, judge=f"{HERE}:crowd"))


@pytest.mark.slow
def test_sigterm_ends_it_well_and_it_goes_on(config: JudgeConfig) -> None:
    config = dataclasses.replace(config, judge=f"{HERE}:slow", shard_size=1)
    process = forked.Forked(call=partial(score, config))
    deadline = time.monotonic() + 300
    while (
        not list(Path(f"{config.output}.parts").glob("shard-*"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    ended = process.wait(timeout=120)
    assert ended.returncode == 143 and "the same command resumes" in ended.stderr
    kept = sorted(Path(f"{config.output}.parts").glob("shard-*"))
    assert 0 < len(kept) < 5 and not Path(config.output).exists()
    times = [path.stat().st_mtime_ns for path in kept]
    done = score(config)
    assert done is not None and done.scored == 4 and times == [path.stat().st_mtime_ns for path in kept]


def test_pictures_without_prompts_are_named(config: JudgeConfig, folder: Path, tmp_path: Path, pairs: str) -> None:
    (folder / "4.txt").unlink()
    with pytest.raises(ValueError, match=r"4\.png: no prompt; expected a line for it in metadata\.jsonl, a 4\.txt"):
        score(config)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="2 prompts for 5 pictures"):
        score(dataclasses.replace(config, prompts=str(tmp_path / "prompts.txt")))
    with pytest.raises(ValueError, match="prompts are for a folder of pictures"):
        score(dataclasses.replace(config, images=pairs, prompts=str(tmp_path / "prompts.txt")))
    (folder / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: expected"):
        score(config)


def checks(name: str) -> dict[str, CheckResult]:
    return {check.name: check for check in self_test(name)}


def test_a_judge_is_tested_by_what_any_judge_must_do() -> None:
    good = checks("faithfulness")
    assert all(check.passed for name, check in good.items() if name != "golden values")
    assert good["golden values"].passed is None and "no public ones" in good["golden values"].observed
    assert checks("aesthetic")["captions"].passed is None
    assert not checks(f"{HERE}:restless")["repeats itself"].passed
    assert not checks(f"{HERE}:crowd")["batches don't matter"].passed
    assert not checks(f"{HERE}:brightness")["captions"].passed


def test_a_judge_of_pairs_is_tested_by_swapping() -> None:
    found = checks("tests.unit.judges.test_relabel:brighter")
    assert found["swapped pairs"].passed
    assert not checks(f"{HERE}:partial_to_a")["swapped pairs"].passed


def partial_to_a(a: Sequence[Image.Image], b: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [1.0] * len(a)


partial_to_a.pairwise = True  # type: ignore[attr-defined]


def test_golden_values_are_compared() -> None:
    logits = np.log(CLIP_PROBABILITIES)
    cos = 0.27 + (logits - logits[0]) / 100
    assert clip_golden((2.5 * cos).tolist()).passed
    assert not clip_golden((100 * cos).tolist()).passed and not clip_golden((2.5 * cos[::-1]).tolist()).passed


def test_the_command_scores_and_says_what_is_wrong_with_a_judge(config: JudgeConfig) -> None:
    run = CliRunner().invoke
    done = run(app, ["judge", f"{HERE}:crowd", "--self-test"])
    assert done.exit_code == 1 and "FAIL  batches don't matter" in done.stdout
    assert run(app, ["judge", "faithfulness", "--self-test"]).exit_code == 0
    done = run(app, ["judge", config.judge, "--images", config.images, "--output", config.output])
    assert done.exit_code == 0 and "4 images, mean" in done.stdout and "1 without a score" in done.stdout
    assert "images missing" in str(run(app, ["judge", "faithfulness"]).exception)


def test_the_command_relabels(pairs: str, tmp_path: Path) -> None:
    out = str(tmp_path / "new.parquet")
    done = CliRunner().invoke(
        app, ["relabel", pairs, "--judges", f"{HERE}:brightness", "--output", out, "--trust", "0.8"]
    )
    assert done.exit_code == 0 and "ties that became wins" in done.stdout and f"--pairs {out}" in done.stdout
    done = CliRunner().invoke(app, ["relabel", pairs, "--judge", "x", "--output", out])
    assert "did you mean 'judges'" in str(done.exception)

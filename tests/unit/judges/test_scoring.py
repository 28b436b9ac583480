from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from dpo_mm.cli.main import app
from dpo_mm.config import JudgeConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.judges import scoring as module
from dpo_mm.judges.scoring import score
from dpo_mm.judges.self_test import CLIP_PROBABILITIES, CheckResult, compare_clip_probabilities, self_test
from tests import forked
from tests.conftest import noise_image, rows

HERE = "tests.unit.judges.test_scoring"


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


def source_brightness(
    images: Sequence[Image.Image], prompts: Sequence[str], sources: Sequence[Sequence[Image.Image]]
) -> list[float]:
    return brightness([source for (source,) in sources], prompts)


source_brightness.takes_sources = True  # type: ignore[attr-defined]


def slow(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    time.sleep(0.5)
    return brightness(images, prompts)


def restless(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return np.random.default_rng().random(len(images)).tolist()


def crowd(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(len(images))] * len(images)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for n in range(5):
        noise_image(n).save(path / f"{n}.png")
    (path / "._0.png").write_bytes(b"what macOS writes next to a file on a disk of another system")
    (path / "3.png").write_bytes((path / "3.png").read_bytes()[:50])
    lines = [{"file_name": f"{n}.png", "prompt": f"prompt {n}"} for n in range(4)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (path / "4.txt").write_text("prompt 4\n")
    return path


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> JudgeConfig:
    return JudgeConfig(f"{HERE}:brightness", str(folder), str(tmp_path / "scores.parquet"), shard_size=2)


def test_score_folder_writes_a_score_or_a_reason_per_image(config: JudgeConfig) -> None:
    done = score(config)
    assert done is not None and (done.scored, done.broken) == (4, 1)
    rows = pq.read_table(done.path).to_pylist()
    assert [(row["id"], row["prompt"]) for row in rows] == [(f"{n}.png", f"prompt {n}") for n in range(5)]
    for n, row in enumerate(rows):
        expected = None if n == 3 else float(np.asarray(noise_image(n)).mean())
        assert row["score"] == expected and bool(row["error"]) == (n == 3)
    assert json.loads(done.path.with_suffix(".json").read_text())["name"] == config.judge


def test_score_dataset_scores_both_images_of_a_pair(config: JudgeConfig, pairs: str) -> None:
    done = score(dataclasses.replace(config, images=pairs))
    assert done is not None and done.scored == 24
    rows = pq.read_table(done.path).to_pylist()
    assert [row["id"] for row in rows[:3]] == ["row-0/a", "row-0/b", "row-1/a"]
    assert [row["score"] for row in rows[:4]] == [float(np.asarray(noise_image(n)).mean()) for n in range(4)]


def test_score_interrupted_run_skips_finished_shards(config: JudgeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = module._score_shard, []

    def cut(pictures: Sequence[module.ImageToScore], *rest: object) -> object:
        calls.append([one.id for one in pictures])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(pictures, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_score_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        score(config)
    score(config)
    assert calls == [["0.png", "1.png"], ["2.png", "3.png"], ["2.png", "3.png"], ["4.png"]]
    with pytest.raises(ValueError, match=r"judged with other settings \(judge:"):
        score(dataclasses.replace(config, judge=f"{HERE}:crowd"))


@pytest.mark.slow
def test_score_sigterm_exits_cleanly_and_resumes(config: JudgeConfig) -> None:
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
    shards = sorted(Path(f"{config.output}.parts").glob("shard-*"))
    assert 0 < len(shards) < 5 and not Path(config.output).exists()
    times = [path.stat().st_mtime_ns for path in shards]
    done = score(config)
    assert done is not None and done.scored == 4 and times == [path.stat().st_mtime_ns for path in shards]


def test_score_missing_prompts_error_names_the_image(
    config: JudgeConfig, folder: Path, tmp_path: Path, pairs: str
) -> None:
    (folder / "4.txt").unlink()
    with pytest.raises(ValueError, match=r"4\.png: no prompt\. Add a line to metadata\.jsonl, a file 4\.txt"):
        score(config)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="2 prompts for 5 images"):
        score(dataclasses.replace(config, prompts=str(tmp_path / "prompts.txt")))
    with pytest.raises(ValueError, match="--prompts is only for a folder of images"):
        score(dataclasses.replace(config, images=pairs, prompts=str(tmp_path / "prompts.txt")))
    (folder / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: expected"):
        score(config)


def checks(name: str) -> dict[str, CheckResult]:
    return {check.name: check for check in self_test(name)}


def test_self_test_detects_random_and_batch_dependent_judges() -> None:
    good = checks("faithfulness")
    assert all(check.passed for name, check in good.items() if name != "golden values")
    assert good["golden values"].passed is None and "no public values" in good["golden values"].observed
    assert checks("aesthetic")["captions"].passed is None
    assert not checks(f"{HERE}:restless")["same scores twice"].passed
    assert not checks(f"{HERE}:crowd")["same scores in batches"].passed
    assert not checks(f"{HERE}:brightness")["captions"].passed
    brightness.uses_prompt = False  # type: ignore[attr-defined]
    try:
        assert checks(f"{HERE}:brightness")["captions"].passed is None
    finally:
        del brightness.uses_prompt  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"recipes.custom_judge:right' fails on images: .*judge of responses"):
        checks("recipes.custom_judge:right")


def test_self_test_swaps_pairs_for_a_pairwise_judge() -> None:
    results = checks("tests.unit.judges.test_relabel:brighter")
    assert results["swapped pairs"].passed
    assert not checks(f"{HERE}:partial_to_a")["swapped pairs"].passed


def partial_to_a(a: Sequence[Image.Image], b: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [1.0] * len(a)


partial_to_a.pairwise = True  # type: ignore[attr-defined]


def test_compare_clip_probabilities_detects_wrong_scale_and_order() -> None:
    logits = np.log(CLIP_PROBABILITIES)
    cos = 0.27 + (logits - logits[0]) / 100
    assert compare_clip_probabilities((2.5 * cos).tolist()).passed
    assert (
        not compare_clip_probabilities((100 * cos).tolist()).passed
        and not compare_clip_probabilities((2.5 * cos[::-1]).tolist()).passed
    )


def test_judge_command_scores_and_runs_the_self_test(config: JudgeConfig) -> None:
    run = CliRunner().invoke
    done = run(app, ["judge", f"{HERE}:crowd", "--self-test"])
    assert done.exit_code == 1 and "FAIL  same scores in batches" in done.stdout
    assert run(app, ["judge", "faithfulness", "--self-test"]).exit_code == 0
    done = run(app, ["judge", config.judge, "--images", config.images, "--output", config.output])
    assert done.exit_code == 0 and "4 images, mean" in done.stdout and "1 without a score" in done.stdout
    assert "images missing" in str(run(app, ["judge", "faithfulness"]).exception)


def test_relabel_command_prints_counts(pairs: str, tmp_path: Path) -> None:
    out = str(tmp_path / "new.parquet")
    done = CliRunner().invoke(
        app, ["relabel", pairs, "--judges", f"{HERE}:brightness", "--output", out, "--trust", "0.8"]
    )
    assert done.exit_code == 0 and "ties that became wins" in done.stdout and f"--pairs {out}" in done.stdout
    done = CliRunner().invoke(app, ["relabel", pairs, "--judge", "x", "--output", out])
    assert "did you mean 'judges'" in str(done.exception)


def test_judge_of_edits_gets_the_image_to_edit_of_its_row(write_pairs: Callable[..., str], tmp_path: Path) -> None:
    """Also: a source that does not decode has no score, and another source is another result."""
    cell = lambda number: {"bytes": encode_png(noise_image(number)), "path": None}
    some: list[dict[str, Any]] = [{**row, "image_source": cell(50 + n)} for n, row in enumerate(rows(3))]
    some[1]["image_source"] = {"bytes": b"<html>", "path": None}
    config = JudgeConfig(f"{HERE}:source_brightness", write_pairs(some), str(tmp_path / "s.parquet"))
    assert score(config) is not None
    records = pq.read_table(config.output).to_pylist()
    means = [float(np.asarray(noise_image(50 + n)).mean()) for n in (0, 2)]
    assert [record["score"] for record in records] == [means[0]] * 2 + [None] * 2 + [means[1]] * 2
    assert [record["error"] for record in records[2:4]] == ["image_source: it is text (SVG or HTML), not an image"] * 2
    before = module.ingredients(config, *module.read_images(config.images, None))["images"]
    some[0]["image_source"] = cell(60)
    assert module.ingredients(config, *module.read_images(write_pairs(some), None))["images"] != before
    some[0]["image_source"] = None
    with pytest.raises(ValueError, match="needs the image to edit of every prompt"):
        score(dataclasses.replace(config, images=write_pairs(some), output=str(tmp_path / "t.parquet")))

"""Tests of samples while a model trains: what they show, and that training does not notice them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_mm.config import TrainConfig
from dpo_mm.data.prompts import seeds_of
from dpo_mm.data.schema import make_response_rows
from dpo_mm.policies.families import load_policy
from dpo_mm.training.builders import validate_config
from dpo_mm.training.run import train
from dpo_mm.training.samples import _mean, free_sample_settings
from tests.contracts.tiny_vlms import save
from tests.unit.training.test_trainer import config, first_difference, weights

SAMPLING: dict[str, Any] = {"sample_steps": 2, "num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text("red\nblue\n")
    return str(tmp_path / "prompts.txt")


def without_samples(history: tuple[dict[str, float], ...]) -> list[dict[str, float]]:
    return [entry for entry in history if not any(name.startswith("samples/") for name in entry)]


@pytest.mark.slow
def test_images_of_each_step_and_unchanged_training(tiny_model: str, pairs: str, prompts: str, tmp_path: Path) -> None:
    plain = train(config(tiny_model, pairs, str(tmp_path / "plain"), steps=5, learning_rate=0.05))
    sampled = train(
        config(
            tiny_model, pairs, str(tmp_path / "sampled"), steps=5, learning_rate=0.05, sample_prompts=prompts,
            sample_judges=("aesthetic",), report_to=("tensorboard",), **SAMPLING,
        )
    )  # fmt: skip
    assert first_difference(weights(plain.folder), weights(sampled.folder)) is None
    assert without_samples(sampled.history) == list(plain.history)
    folder = sampled.folder / "samples"
    steps = {int(re.findall(r"step-(\d+)-1\.png", path.name)[0]) for path in folder.glob("step-*-1.png")}
    assert steps == {0, 2, 4, 5}
    record = json.loads((folder / "samples.json").read_text())
    logged = {entry["step"]: entry["samples/aesthetic"] for entry in sampled.history if "samples/aesthetic" in entry}
    assert logged == {int(step): pytest.approx(np.mean(entry["scores"]["aesthetic"])) for step, entry in record.items()}
    policy = load_policy(tiny_model)
    for adapter, step in ((None, 0), (sampled.folder, 5)):
        if adapter:
            policy.load_adapter(adapter)
        seeds = [seeds_of(prompt, 1, seed=0)[0] for prompt in ("red", "blue")]
        images = [i for b in policy.sample(["red", "blue"], seeds, steps=2, guidance=2.0, batch_size=2) for i in b]
        shown = [np.asarray(Image.open(folder / f"step-{step:06d}-{n}.png")) for n in (1, 2)]
        differ = [np.abs(np.asarray(i).astype(int) - f).max() for i, f in zip(images, shown, strict=True)]
        assert differ == [0, 0], step
    assert Image.open(folder / "strip.png").size == (4 * 186 + 10, 34 + 2 * 212)
    (logs,) = (sampled.folder / "logs").iterdir()
    events = EventAccumulator(str(logs))
    events.Reload()
    assert events.Tags()["images"] == ["samples/1 red", "samples/2 blue"]
    assert [event.step for event in events.Images("samples/1 red")] == [0, 2, 4, 5]


@pytest.mark.slow
def test_resumed_run_adds_to_the_strip_and_overwrite_removes_it(
    tiny_model: str, pairs: str, prompts: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"sample_prompts": prompts, "save_every": 2, **SAMPLING}
    folder = tmp_path / "out"
    train(config(tiny_model, pairs, str(folder), steps=2, **settings))
    start = (folder / "samples" / "step-000000-1.png").read_bytes()
    train(config(tiny_model, pairs, str(folder), steps=4, resume=True, **settings))
    assert list(json.loads((folder / "samples" / "samples.json").read_text())) == ["0", "2", "4"]
    assert (folder / "samples" / "step-000000-1.png").read_bytes() == start
    train(config(tiny_model, pairs, str(folder), steps=1, overwrite=True))
    assert not (folder / "samples").exists()


def test_responses_of_each_step(tmp_path: Path) -> None:
    model = save("llama", tmp_path / "model")
    rows = [{"id": str(n), "prompt": f"q {n}", "chosen": "a red", "rejected": "a dot"} for n in range(4)]
    make_response_rows(rows).to_parquet(tmp_path / "pairs.parquet")
    (tmp_path / "questions.jsonl").write_text('{"id": "1", "prompt": "q 1", "ground_truth": "a red"}\n')
    settings: dict[str, Any] = {"beta": 0.1, "eval_fraction": 0.0, "steps": 2, "batch_size": 2, "log_every": 1}
    plain = train(TrainConfig(model, str(tmp_path / "pairs.parquet"), str(tmp_path / "plain"), **settings))
    settings |= {"sample_questions": str(tmp_path / "questions.jsonl"), "max_new_tokens": 4, "sample_judges": ("cer",)}
    sampled = train(TrainConfig(model, str(tmp_path / "pairs.parquet"), str(tmp_path / "out"), **settings))
    assert without_samples(sampled.history) == list(plain.history)
    record = json.loads((tmp_path / "out" / "samples" / "samples.json").read_text())
    assert list(record) == ["0", "2"]
    policy: Any = load_policy(model)
    (base,) = policy.generate([()], ["q 1"], max_new_tokens=4, do_sample=False)
    assert record["0"]["responses"][0]["text"] == base.text and record["0"]["responses"][0]["tokens"] == base.tokens
    page = (tmp_path / "out" / "samples" / "responses.md").read_text()
    assert page.index("**start** cer") < page.index("**step 2** cer") and base.text in page


@pytest.mark.parametrize(("metric", "free"), [(None, True), ("eval_loss", True), ("samples/aesthetic", False)])
def test_settings_of_samples_are_free_unless_a_sample_chooses_the_weights(metric: str | None, free: bool) -> None:
    config = TrainConfig("m", "p", "out", metric_for_best_model=metric)
    assert ("sample_prompts" in free_sample_settings(config)) is free


def test_mean_leaves_out_samples_without_a_score() -> None:
    assert _mean([1.0, None, 0.0]) == 0.5 and _mean([None]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_steps": 5}, "sample_steps has no effect without sample_prompts. Remove one of the two settings"),
        ({"sample_questions": "q.jsonl"}, "sample_questions is a setting of vision-language models"),
        ({"sample_prompts": "none.txt"}, "none.txt"),
        ({"sample_prompts": "EMPTY"}, "the file is empty"),
        ({"sample_prompts": "shapes-held-out", "sample_judges": ("faithfulnes",)}, "did you mean 'faithfulness'"),
    ],
)
def test_samples_that_cannot_be_made_are_refused(
    changes: dict[str, Any], message: str, tiny_model: str, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    values = {name: str(tmp_path / "empty.txt") if value == "EMPTY" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        validate_config(TrainConfig(tiny_model, "pairs", "out", **values))

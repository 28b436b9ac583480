"""Objectives on liked and disliked rows, which belong to different prompts: the formulas, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import load_pairs, load_responses
from dpo_mm.training.builders import build_policy
from dpo_mm.training.encoding import encode_splits
from dpo_mm.training.run import dry_run, train
from dpo_mm.training.trainer import PreferenceTrainer
from tests.conftest import rows
from tests.contracts.test_vlm import upstream_log_prob
from tests.contracts.tiny_vlms import VOCABULARY, noise_image, save

BETA = {"text": 0.7, "image": 300.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> dict[str, str]:
    return {"text": save("llava", tmp_path_factory.mktemp("llava") / "model"), "image": tiny_model}


def write_rows(folder: Path, modality: str, likes: str) -> str:
    """Rows with one image or response each, each with another prompt. likes: "+" for a liked row, "-" for a disliked one."""
    if modality == "text":
        given = [
            {
                "images": [noise_image(n)],
                "prompt": " ".join(VOCABULARY[: 2 + n]),
                "completion": " ".join(VOCABULARY[n : 4 + 2 * n]),
                "label": like == "+",
            }
            for n, like in enumerate(likes)
        ]
    else:
        given = [
            {"id": row["id"], "prompt": row["prompt"], "image": row["image_a"], "liked": like == "+"}
            for row, like in zip(rows(len(likes)), likes, strict=True)
        ]
    Dataset.from_list(given).to_parquet(str(folder / "rows.parquet"))
    return str(folder / "rows.parquet")


def config(model: str, pairs: str, folder: Path, modality: str, objective: str, **more: Any) -> TrainConfig:
    given = {"steps": 2, "batch_size": 3, "eval_fraction": 0, "log_every": 1, "beta": BETA[modality], **more}
    return TrainConfig(model=model, pairs=pairs, output_dir=str(folder / "out"), objective=objective, **given)


def kto(liked: Tensor, disliked: Tensor, beta: float) -> Tensor:
    z = (beta * torch.cat([liked, disliked])).mean().clamp(min=0)
    return (1 - torch.sigmoid(beta * liked - z)).mean() + (1 - torch.sigmoid(z - beta * disliked)).mean()


def bco(liked: Tensor, disliked: Tensor, beta: float) -> Tensor:
    shift = (beta * torch.cat([liked, disliked])).mean()
    return -logsigmoid(beta * liked - shift).mean() - logsigmoid(shift - beta * disliked).mean()


def aot(liked: Tensor, disliked: Tensor, beta: float) -> Tensor:
    return -logsigmoid(beta * (liked.sort().values - disliked.sort().values)).mean()


FORMULAS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"kto": kto, "bco_pair": bco, "aot_unpaired": aot}


def text_log_probs(policy: Any, couples: list[dict[str, Any]]) -> list[Tensor]:
    """Log-probs of liked and disliked responses by the model's own forward pass on one sequence each."""
    kinds = couples, [couple["disliked"] for couple in couples]
    return [torch.stack([upstream_log_prob(policy, row, "chosen") for row in kind]) for kind in kinds]


def image_log_probs(policy: Any, couples: list[dict[str, Any]]) -> list[Tensor]:
    """-1/2 of the errors of liked and disliked images, each at its own prompt and one image at a time."""
    found: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
    for couple in couples:
        batch = policy.collate([couple])
        for side, prompt in (("chosen", "prompt"), ("rejected", "rejected_prompt")):
            given = {name: couple[prompt][name][None] for name in couple[prompt]}
            errors = policy.denoising_errors(policy.model, batch[side], batch["noise"], batch["timestep"], given)
            found[side].append(-0.5 * errors.mean[0])
    return [torch.stack(values) for values in found.values()]


@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("objective", list(FORMULAS))
def test_loss_on_liked_and_disliked_rows_equals_the_formula(
    objective: str, modality: str, models: dict[str, str], tmp_path: Path
) -> None:
    """Three liked and two disliked rows, with a policy that differs from its reference. The third couple repeats a disliked row.

    Catches swapped kinds, a disliked row at the prompt of the liked one, a mean over the wrong rows in KTO's z, and AOT
    without its sort.
    """
    settings = config(models[modality], write_rows(tmp_path, modality, "+-+-+"), tmp_path, modality, objective)
    policy: Any = build_policy(settings)
    couples = [{**encode_splits(policy, settings).rows[n], "visit": 0} for n in range(3)]
    assert [couple["id"] for couple in couples] == (
        ["0 and 1", "2 and 3", "4 and 1"]
        if modality == "text"
        else ["row-0 and row-1", "row-2 and row-3", "row-4 and row-1"]
    )
    policy.prepare(settings)
    torch.manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    trainer = PreferenceTrainer(policy, settings, [None])
    loss = trainer.compute_loss(policy.model, policy.collate(couples))
    log_probs = text_log_probs if modality == "text" else image_log_probs
    with torch.no_grad():
        tuned = log_probs(policy, couples)
        with policy.adapter_off():
            base = log_probs(policy, couples)
    ratios = [after - before for after, before in zip(tuned, base, strict=True)]
    expected = FORMULAS[objective](*ratios, BETA[modality])
    swapped = FORMULAS[objective](*ratios[::-1], BETA[modality])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and abs(swapped - expected) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["text", "image"])
def test_run_on_liked_and_disliked_rows(modality: str, models: dict[str, str], tmp_path: Path) -> None:
    """KTO starts at 1, as chosen_weight and rejected_weight are 1. sft trains on the liked rows and says so."""
    pairs = write_rows(tmp_path, modality, "++--++--")
    settings = config(models[modality], pairs, tmp_path, modality, "kto", eval_fraction=0.5)
    result = train(settings)
    assert result.history[0]["loss"] == pytest.approx(1.0, abs=1e-5)
    assert {"rewards/chosen", "rewards/rejected", "logps/rejected"} <= result.history[0].keys()
    assert (
        "layout" not in result.settings
        and "couples of" in result.settings["pairs"]
        and "liked" in result.settings["pairs"]
    )
    assert any("eval_rewards/chosen" in entry for entry in result.history)
    plain = config(models[modality], pairs, tmp_path / "sft", modality, "sft", beta=TrainConfig.beta)
    assert dry_run(plain)["pairs"].endswith("4 rows with a chosen side to train on (4 disliked rows are left out)")


@pytest.mark.slow
def test_liked_rows_on_disk_and_cached_features_give_the_losses_of_memory(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches features of the liked images at the disliked prompts, and a resumed run with other couples."""
    pairs = write_rows(tmp_path, "text", "+-+-+")
    losses = []
    for name, changes in (("memory", {}), ("features", {"cache_vision_features": True}), ("disk", {"workers": 0})):
        if name == "disk":
            monkeypatch.setattr("dpo_mm.training.response_rows.MAX_BYTES_IN_MEMORY", 0)
        given = {"steps": 4, "learning_rate": 1e-2, "save_every": 2, **changes}
        settings = config(models["text"], pairs, tmp_path / name, "text", "kto", **given)
        losses.append([entry["loss"] for entry in train(settings).history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] == losses[2] and losses[0][0] != losses[0][3]
    out = tmp_path / "disk" / "out"
    (tmp_path / "cut" / "out").mkdir(parents=True)
    (out / "checkpoint-2").rename(tmp_path / "cut" / "out" / "checkpoint-2")
    settings = config(models["text"], pairs, tmp_path / "cut", "text", "kto", **{**given, "resume": True})
    assert [entry["loss"] for entry in train(settings).history if "loss" in entry] == losses[0]


@pytest.mark.parametrize(
    ("likes", "changes", "message"),
    [
        ("++", {}, "every row is liked, and objective kto needs disliked rows too. Add some, or take objective sft"),
        ("--", {}, "every row is disliked, and objective kto needs liked rows too. Add some$"),
        ("--", {"objective": "sft", "beta": 5000.0}, "every row is disliked, and objective sft trains on liked"),
        ("+-", {"objective": "sigmoid"}, "its rows have one side each, and objective sigmoid needs pairs"),
        ("+-", {"beta": "auto"}, "beta auto needs pairs, and its rows are liked or disliked"),
        ("+-", {"buckets": True}, "buckets needs pairs, and its rows are liked or disliked"),
    ],
)
def test_rows_that_the_objective_cannot_use_are_refused(
    likes: str, changes: dict[str, Any], message: str, models: dict[str, str], tmp_path: Path
) -> None:
    settings = config(
        models["image"], write_rows(tmp_path, "image", likes), tmp_path, "image", **{"objective": "kto", **changes}
    )
    with pytest.raises(ValueError, match=message):
        train(settings)


def test_rows_with_one_side_load_with_null_on_the_other(tmp_path: Path) -> None:
    images = load_pairs(write_rows(tmp_path, "image", "+-"))
    assert list(images["preference"]) == ["a", "b"] and list(images["image_b"]) == [None, None]
    texts = load_responses(write_rows(tmp_path, "text", "+-"))
    assert [(row["chosen"] is None, row["rejected"] is None) for row in texts] == [(False, True), (True, False)]
    assert "label" not in texts.column_names
    Dataset.from_list([{"prompt": "p", "completion": "c", "liked": None}]).to_parquet(str(tmp_path / "null.parquet"))
    with pytest.raises(ValueError, match=r"null.parquet, row 0: liked is None. Expected true or false"):
        load_responses(str(tmp_path / "null.parquet"))

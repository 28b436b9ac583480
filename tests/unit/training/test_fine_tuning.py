"""Fine-tuning on a chosen side only (`sft`), and objectives on liked and disliked rows, for images and for text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import make_image_rows, make_response_rows
from dpo_mm.policies.families import load_policy
from dpo_mm.training.builders import build_policy, validate_config
from dpo_mm.training.encoding import encode_splits
from dpo_mm.training.pair_stream import training_stream
from dpo_mm.training.run import dry_run, train
from dpo_mm.training.trainer import PreferenceTrainer
from tests.conftest import rows
from tests.contracts.test_vlm import upstream_log_prob
from tests.contracts.tiny_vlms import VOCABULARY, noise_image, save

SFT = {"objective": "sft", "log_every": 1, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save("llava", tmp_path_factory.mktemp("llava") / "model")


def responses(count: int) -> list[dict[str, Any]]:
    """Response pairs whose chosen responses have 1, 4, 7 ... words."""
    return [
        {
            "id": f"r{n}",
            "images": [noise_image(n)],
            "prompt": f"describe the picture {n}",
            "chosen": " ".join((VOCABULARY * 2)[: 1 + 3 * n]),
            "rejected": "a red square",
        }
        for n in range(count)
    ]


def text_pairs(folder: Path, count: int = 4, *, without: str = "") -> str:
    path = folder / f"pairs{without}.parquet"
    table = make_response_rows(responses(count))
    (table.remove_columns(without) if without else table).to_parquet(str(path))
    return str(path)


def config(model: str, pairs: str, folder: Path, **more: Any) -> TrainConfig:
    given = {"steps": 2, "batch_size": 2, "eval_fraction": 0, **SFT, **more}
    return TrainConfig(model=model, pairs=pairs, output_dir=str(folder / "out"), **given)


def logs(settings: TrainConfig) -> list[dict[str, float]]:
    return [entry for entry in train(settings).history if "loss" in entry]


def image_pairs(folder: Path, *, one_sided: bool = False) -> str:
    """Four pairs, or the chosen image of each with its prompt only."""
    pairs, path = make_image_rows(rows(4)), folder / f"images-{one_sided}.parquet"
    if one_sided:
        kept = [{"id": r["id"], "prompt": r["prompt"], "image": r[f"image_{r['preference']}"]} for r in rows(4)]
        pairs = Dataset.from_list(kept)
    pairs.to_parquet(str(path))
    return str(path)


@pytest.mark.slow
def test_sft_of_images_takes_one_forward_pass_per_step_of_the_chosen_image_only(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is the denoising error of the chosen image. Rows without a rejected image give the same losses.

    Catches a forward pass of a reference, rejected images that are encoded or denoised, and the error of the wrong side.
    """
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy

    sizes: dict[str, list[int]] = {"denoised": [], "encoded": []}
    errors, images = DiffusionPolicy.denoising_errors, DiffusionPolicy.encode_images

    def denoising_errors(self: Any, model: Any, latents: Any, *rest: Any) -> Any:
        sizes["denoised"].append(len(latents))
        return errors(self, model, latents, *rest)

    def encode_images(self: Any, pictures: Any) -> Any:
        sizes["encoded"].append(len(pictures))
        return images(self, pictures)

    monkeypatch.setattr(DiffusionPolicy, "denoising_errors", denoising_errors)
    monkeypatch.setattr(DiffusionPolicy, "encode_images", encode_images)
    settings = config(tiny_model, image_pairs(tmp_path), tmp_path, accumulate=2)
    history = logs(settings)
    assert sizes["denoised"] == [2, 2, 2, 2] and sizes["encoded"] == [1, 4]  # one is measured for the disk
    assert {name for name in history[0] if "reward" in name or "logps" in name or "errors" in name} == set()
    alone = dataclasses.replace(
        settings, pairs=image_pairs(tmp_path, one_sided=True), output_dir=str(tmp_path / "alone")
    )
    assert [entry["loss"] for entry in logs(alone)] == [entry["loss"] for entry in history]
    monkeypatch.undo()
    policy = load_policy(tiny_model)
    pairs = dataclasses.replace(settings, objective="sigmoid", output_dir=str(tmp_path / "other"))
    stream = training_stream(settings, encode_splits(policy, pairs).rows, 1)
    policy.prepare(settings)
    with torch.no_grad():
        log_probs = policy.log_probs(policy.model, policy.collate([stream[n] for n in range(4)]))
    assert history[0]["loss"] == pytest.approx(-2 * log_probs.chosen.mean().item(), rel=1e-5)


def test_sft_of_text_is_the_mean_over_responses_of_their_means_per_token(text_model: str, tmp_path: Path) -> None:
    """Compute it from the logits of the model itself, over two forward passes of two rows of unequal length, and for eval.

    Catches a mean over all tokens, and a prompt whose tokens count.
    """
    settings = config(text_model, text_pairs(tmp_path, 8), tmp_path, accumulate=2, steps=1, learning_rate=0.0)
    settings = dataclasses.replace(settings, eval_fraction=0.5)
    result = train(settings)
    history = result.history
    assert result.settings["reduction"] == "mean per token of each chosen response"
    policy = build_policy(settings)
    splits = encode_splits(policy, settings)
    with torch.no_grad():
        for encoded, name in ((splits.rows, "loss"), (splits.eval_rows, "eval_loss")):
            assert len(encoded) == 4 and all("rejected_ids" not in row for row in encoded)
            means = [float(upstream_log_prob(policy, row, "chosen")) / len(row["chosen_ids"]) for row in encoded]
            loss = -sum(means) / len(means)
            assert next(e[name] for e in history if name in e) == pytest.approx(loss, rel=1e-5)
    assert not [name for entry in history for name in entry if "reward" in name or "rejected" in name]
    assert any("logps/chosen" in entry for entry in history)


@pytest.mark.slow
def test_sft_of_text_runs_the_model_once_per_forward_pass_and_needs_no_rejected_response(
    text_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a second forward pass for a reference, or for a rejected side."""
    counts: list[int] = []
    log_probs = PreferenceTrainer._policy_log_probs

    def count(self: Any, model: Any, inputs: Any) -> Any:
        handle = self.policy.base_model.register_forward_hook(lambda *_: counts.append(1))
        result = log_probs(self, model, inputs)
        handle.remove()
        return result

    monkeypatch.setattr(PreferenceTrainer, "_policy_log_probs", count)
    losses, passes = [], []
    for number, (missing, steps) in enumerate([("", 2), ("rejected", 2), ("rejected", 5)]):
        pairs, folder = text_pairs(tmp_path, without=missing), tmp_path / str(number)
        counts.clear()
        losses.append([entry["loss"] for entry in logs(config(text_model, pairs, folder, steps=steps))])
        passes.append(len(counts))
    assert losses[0] == losses[1] == losses[2][:2]
    assert passes[2] - passes[1] == 3 and passes[0] == passes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": "auto"}, "beta has no effect, because objective sft has no beta"),
        ({"sft_weight": 0.5}, "sft_weight has no effect, because objective sft is the loss on the chosen side only"),
        ({"ld_alpha": 0.5}, "ld_alpha has no effect, because objective sft"),
        ({"reference": "frozen_copy"}, "reference has no effect, because objective sft has no reference"),
    ],
)
def test_setting_without_effect_on_sft_is_refused(
    changes: dict[str, Any], message: str, text_model: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        validate_config(config(text_model, "pairs", tmp_path, **changes))


def test_objective_that_needs_pairs_refuses_rows_with_one_side_before_the_model_loads(
    text_model: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of sft says that the rejected side is not used, and names no reference."""
    plan = dry_run(config(text_model, text_pairs(tmp_path), tmp_path, beta=0.1, pair_layout="shared_prefix"))
    assert plan["no effect"] == "beta and pair_layout, because objective sft has none"
    assert plan["pairs"].endswith("4 rows with a chosen side to train on (the rejected side is not used)")
    assert plan["reference"] == "none" and "layout" not in plan and "effective beta" not in plan
    monkeypatch.setattr("dpo_mm.training.run.build_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    one_sided = text_pairs(tmp_path, without="rejected")
    for model, pairs, beta in ((text_model, one_sided, 0.1), (tiny_model, image_pairs(tmp_path, one_sided=True), 5.0)):
        with pytest.raises(ValueError, match="rows have one side each, and objective dpop needs pairs") as refused:
            train(config(model, pairs, tmp_path, objective="dpop", beta=beta))
        assert ("dpo-mm mine --chosen own" in str(refused.value)) == (model == tiny_model)
        with pytest.raises(ValueError, match="every row is liked, and objective kto needs disliked rows too"):
            train(config(model, pairs, tmp_path, objective="kto", beta=beta))

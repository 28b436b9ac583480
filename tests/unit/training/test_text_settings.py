"""What acts on answers before they are log-probs: corrupted images, edited spans, tails; and what trains on them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import load_responses, make_response_rows
from dpo_mm.objectives import OBJECTIVES
from dpo_mm.policies.families import load_policy
from dpo_mm.policies.vlm.chat import corrupt_image, edited_token_masks
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.training.builders import build_policy, validate_config
from dpo_mm.training.pair_stream import PairStream
from dpo_mm.training.reference import precompute_reference_log_probs
from dpo_mm.training.run import dry_run, train
from dpo_mm.training.trainer import PreferenceTrainer
from tests.contracts.tiny_vlms import noise_image, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save("llava", tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [
        {
            "id": f"row-{n}",
            "images": [noise_image(n)],
            "prompt": "describe the picture",
            "chosen": "a red square on a blue field",
            "probability": 0.9,
            "score_gap": 0.5,
            "rejected": "a red circle on a blue field with no text" if n % 2 else "a square",
        }
        for n in range(8)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    make_response_rows(rows).to_parquet(str(path))
    return str(path)


def config(model: str, pairs: str, folder: Path, **more: object) -> TrainConfig:
    given = {"beta": 0.1, "steps": 4, "batch_size": 2, "log_every": 1, "eval_fraction": 0.0, "learning_rate": 1e-2}
    return TrainConfig(model=model, pairs=pairs, output_dir=str(folder), **{**given, **more})  # type: ignore[arg-type]


def test_corrupted_image_is_a_small_crop_at_the_same_size() -> None:
    ramp = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp] * 3, -1))
    left = corrupt_image(image, seed="row 0")
    assert left.size == image.size and left.tobytes() == corrupt_image(image, seed="row 0").tobytes()
    assert left.tobytes() != corrupt_image(image, seed="row 1").tobytes()
    spans = [np.ptp(np.asarray(corrupt_image(image, seed=str(n)))) / np.ptp(ramp) for n in range(50)]
    assert max(spans) <= 0.2**0.5 + 0.05 and min(spans) < 0.3


def test_edited_tokens_are_those_not_shared_with_the_other_side() -> None:
    found = edited_token_masks([1, 2, 3, 4, 5], [1, 2, 9, 9, 4, 5])
    assert found["chosen_edited"].tolist() == [0, 0, 1, 0, 0]
    assert found["rejected_edited"].tolist() == [0, 0, 1, 1, 0, 0]


def encoded(model: str, pairs: str, folder: Path, **more: object) -> tuple[object, dict[str, object]]:
    policy = build_policy(config(model, pairs, folder, **more))
    return policy, policy.collate(policy.encode(load_responses(pairs))[:2])


def test_token_weights_equal_those_of_the_papers(model: str, pairs: str, tmp_path: Path) -> None:
    plain, batch = encoded(model, pairs, tmp_path)
    with torch.no_grad():
        scores = plain.token_log_probs(plain.model, batch)  # type: ignore[attr-defined]
    layout, mask = batch["layout"], batch["mask"][:, batch["layout"].prompt :].bool()  # type: ignore[attr-defined, index]
    sides = scores.split([layout.chosen, layout.rejected], 1), mask.split([layout.chosen, layout.rejected], 1)
    tokens = [[s[m].tolist() for s, m in zip(part, kept)] for part, kept in zip(*sides)]
    for tail in (0.0, 0.5):
        policy, other = encoded(model, pairs, tmp_path, ld_alpha=tail)
        with torch.no_grad():
            found = policy.log_probs(policy.model, other)  # type: ignore[attr-defined]
        numbers = found.num_tokens_chosen, found.num_tokens_rejected
        for row in range(2):
            shared = min(len(tokens[0][row]), len(tokens[1][row]))
            for side, value in enumerate((found.chosen, found.rejected)):
                expected = sum(tokens[side][row][:shared]) + tail * sum(tokens[side][row][shared:])
                assert value[row].item() == pytest.approx(expected, rel=1e-5)
                assert numbers[side][row].item() == shared + tail * (len(tokens[side][row]) - shared)
    policy, other = encoded(model, pairs, tmp_path, edited_token_weight=5.0)
    with torch.no_grad():
        found = policy.log_probs(policy.model, other)  # type: ignore[attr-defined]
    assert found.num_tokens_chosen.tolist() == [1, 1]
    for row in range(2):
        marks = other["chosen_edited"][row, : len(tokens[0][row])].tolist()  # type: ignore[index]
        weights = [5.0 if mark else 1.0 for mark in marks]
        expected = sum(w * t for w, t in zip(weights, tokens[0][row], strict=True)) / sum(weights)
        assert found.chosen[row].item() == pytest.approx(expected, rel=1e-5) and 0 < sum(marks) < len(marks)


def test_tail_begins_at_the_same_token_with_corrupted_images(model: str, pairs: str, tmp_path: Path) -> None:
    """The rejected response is one token there. It catches a tail that begins after it."""
    policy, batch = encoded(model, pairs, tmp_path, ld_alpha=0.5, objective={"image_conditional": 1.0})
    with torch.no_grad():
        whole = policy.log_probs(policy.model, batch)  # type: ignore[attr-defined]
        batch["corrupted"]["images"] = batch["images"]  # type: ignore[index]
        same = policy.log_probs(policy.model, batch["corrupted"])  # type: ignore[attr-defined, index]
    assert torch.allclose(whole.chosen, same.chosen, atol=1e-4)


def test_corrupted_ratio_is_of_the_chosen_response_with_corrupted_images(
    model: str, pairs: str, tmp_path: Path
) -> None:
    settings = config(model, pairs, tmp_path, objective={"image_conditional": 1.0})
    policy, batch = encoded(model, pairs, tmp_path, objective={"image_conditional": 1.0})
    policy.prepare(settings)  # type: ignore[attr-defined]
    trainer = PreferenceTrainer(policy, settings, [None])
    assert trainer.compute_loss(policy.model, batch).item() == pytest.approx(math.log(2), abs=1e-6)  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():  # type: ignore[attr-defined]
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        whole = policy.log_probs(policy.model, batch).chosen  # type: ignore[attr-defined]
        less = policy.log_probs(policy.model, batch["corrupted"]).chosen  # type: ignore[attr-defined]
        with policy.adapter_off():  # type: ignore[attr-defined]
            whole = whole - policy.log_probs(policy.model, batch).chosen  # type: ignore[attr-defined]
            less = less - policy.log_probs(policy.model, batch["corrupted"]).chosen  # type: ignore[attr-defined]
        batch["number"] = torch.arange(len(batch["id"]))  # as the stream of evaluation rows adds it
        loss = trainer.compute_loss(policy.model, batch)  # type: ignore[attr-defined]
    expected = -torch.nn.functional.logsigmoid(0.1 * (whole - less)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and abs(expected.item() - math.log(2)) > 1e-4


def test_cached_features_do_not_replace_corrupted_images(model: str, pairs: str, tmp_path: Path) -> None:
    settings = config(model, pairs, tmp_path, objective={"image_conditional": 1.0})
    policy = build_policy(settings)
    rows = policy.encode(load_responses(pairs))[:3]
    policy.prepare(settings)
    plain, kept = policy.collate(rows), policy.collate(policy.cache_vision_features(rows))
    assert "pixel_values" in kept["corrupted"]["images"] and "pixel_values" not in kept["images"]
    with torch.no_grad():
        asked = [
            policy.log_probs(policy.model, batch).chosen
            for batch in (plain, kept, plain["corrupted"], kept["corrupted"])
        ]
    torch.testing.assert_close(asked[1], asked[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(asked[3], asked[2], rtol=1e-5, atol=1e-5)
    assert (asked[0] - asked[2]).abs().min() > 1e-4


def test_mdpo_raises_image_reliance(model: str, pairs: str, tmp_path: Path) -> None:
    mixture = {"sigmoid": 1.0, "image_conditional": 1.0, "anchor": 1.0}
    trained = train(config(model, pairs, tmp_path, objective=mixture, steps=12))
    losses = [entry["loss"] for entry in trained.history if "loss" in entry]
    assert losses[0] == pytest.approx(3 * math.log(2), rel=1e-4) and losses[-1] < 0.8 * losses[0]
    reliance = [entry["image_reliance"] for entry in trained.history if "image_reliance" in entry]
    assert reliance[0] == 0 and sum(reliance[-4:]) / 4 > 0.8


@pytest.mark.parametrize(
    "more", [{"reference": "precomputed"}, {"cache_vision_features": True}, {"pair_layout": "separate"}]
)
def test_caches_do_not_change_the_loss(more: dict[str, object], model: str, pairs: str, tmp_path: Path) -> None:
    one, other = (
        [e["loss"] for e in train(config(model, pairs, tmp_path / name, **extra)).history if "loss" in e]
        for name, extra in (("plain", {}), ("kept", more))
    )
    assert one == pytest.approx(other, rel=1e-4)


def test_adapter_with_its_card_is_intact(model: str, pairs: str, tmp_path: Path) -> None:
    """PEFT writes a README, and training replaces it by the card. Mutation that it catches: a checksum of the README."""
    folder = train(config(model, pairs, tmp_path / "out", steps=1)).folder
    assert "library_name: peft" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("My own notes.")
    load_policy(model, adapter=str(folder))


def test_reference_cache_is_reused_by_the_next_run(
    model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))
    asked: list[int] = []
    real = VisionLanguage.log_probs

    def log_probs(self: VisionLanguage, given: object, batch: dict[str, object]) -> object:
        asked.append(len(batch["id"]))  # type: ignore[arg-type]
        return real(self, given, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(VisionLanguage, "log_probs", log_probs)

    def kept(**more: object) -> tuple[int, list[float]]:
        settings = config(model, pairs, tmp_path, reference="precomputed", **more)
        policy = build_policy(settings)
        rows = policy.encode(load_responses(pairs))[: 5 if more.get("lora_rank") == 3 else 6]
        policy.prepare(settings)
        asked.clear()
        found = precompute_reference_log_probs(
            policy, PairStream(rows, seed=0, length=len(rows), num_fixed_draws=1), settings
        )
        return sum(asked), [float(found[n]["reference_rejected"]) for n in range(5)]

    first = kept()
    assert first[0] == 6 and len(list((tmp_path / "cache" / "reference").glob("*/rows-00000.safetensors"))) == 1
    assert kept(lora_rank=8, batch_size=3, seed=5) == (0, first[1])
    assert kept(lora_rank=3)[0] == 6, "other rows: five of them, the last batch filled up"
    tails = kept(ld_alpha=0.5)
    assert tails[0] == 6 and tails[1] != first[1]


def test_split_is_by_image_if_all_prompts_are_equal(model: str, pairs: str, tmp_path: Path) -> None:
    settings = config(model, pairs, tmp_path, eval_fraction=0.25)
    trained = train(settings)
    assert any("eval_rewards/chosen" in entry for entry in trained.history)
    assert dry_run(settings)["pairs"].endswith("6 to train on")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ld_alpha": 2.0}, "ld_alpha must be in"),
        ({"pair_layout": "both"}, "Expected auto, shared_prefix or separate"),
        ({"overlong_rows": "cut"}, "Expected raise or drop"),
        ({"train_sampling_strategy": "group_by_lenght"}, "did you mean 'group_by_length'"),
        ({"reference": "precomputed", "objective": {"image_conditional": 1.0}}, "does not go with image_conditional"),
        ({"train_vision_tower": True, "cache_vision_features": True}, "the vision tower trains"),
    ],
)
def test_incompatible_text_settings_are_refused(
    more: dict[str, object], message: str, model: str, pairs: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(model, pairs, tmp_path, **more))


def test_text_settings_are_refused_for_an_image_generator(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout is a setting of vision-language models"):
        validate_config(config(tiny_model, "pairs", tmp_path, pair_layout="separate"))
    with pytest.raises(ValueError, match="train_sampling_strategy is a setting of vision-language models"):
        validate_config(config(tiny_model, "pairs", tmp_path, train_sampling_strategy="group_by_length"))
    with pytest.raises(ValueError, match="image_conditional"):
        validate_config(config(tiny_model, "pairs", tmp_path, objective={"image_conditional": 1.0}))


def test_corrupted_images_are_refused_for_rows_without_images(tmp_path: Path) -> None:
    language = save("llama", tmp_path / "llama")
    policy = load_policy(language, corrupt=True)
    with pytest.raises(ValueError, match="row r has no image to corrupt"):
        policy.encode([{"id": "r", "prompt": "a", "chosen": "red", "rejected": "blue"}])


NOT_OF_TEXT = {"linear", "mapo", "symmetric_image", "tdpo"}
"""Objectives of denoising errors, or of a forward that the trainer does not make; each is refused."""


@pytest.mark.slow
@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - NOT_OF_TEXT))
def test_objective_trains_text(objective: str, model: str, pairs: str, tmp_path: Path) -> None:
    given = {"objective": objective, "steps": 2, "pair_layout": "shared_prefix"}
    trained = train(config(model, pairs, tmp_path, **given))
    assert all(math.isfinite(entry["loss"]) for entry in trained.history if "loss" in entry)


@pytest.mark.parametrize("objective", sorted(NOT_OF_TEXT))
def test_objective_without_text_support_is_refused(objective: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=objective):
        validate_config(config(model, "pairs", tmp_path, objective=objective))

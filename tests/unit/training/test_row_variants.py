"""Variants of training rows: mirrored images and several captions are a pure function of the draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageOps

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import check_pairs, drop_ties, load_pairs, make_image_rows
from dpo_mm.policies.families import load_policy
from dpo_mm.sources.local_pairs import load_image_pairs
from dpo_mm.training.encoding import encode
from dpo_mm.training.pair_stream import eval_stream
from dpo_mm.training.run import train
from tests.conftest import noise_image, rows
from tests.unit.training.test_trainer import config, first_difference, weights

CAPTIONS = [["a red star", "star, red", "one star"], ["a blue circle"]]


def caption_rows() -> Any:
    """Twelve pairs, every second of which has three captions and the others one."""
    plain = make_image_rows(rows(12)).remove_columns("prompt")
    return plain.add_column("prompt", [CAPTIONS[n % 2] for n in range(12)])  # type: ignore[arg-type]


@pytest.fixture
def policy(tiny_model: str) -> Any:
    policy = load_policy(tiny_model)
    policy.prepare(TrainConfig("m", "p", "o", random_flip=True, seed=4))
    return policy


def test_flips_mirror_both_images_in_half_of_the_draws(policy: Any, pairs: str, tmp_path: Path) -> None:
    """Catches a flip of one side, a draw that depends on the batch or is global, and flipped evaluation rows."""
    given = drop_ties(load_pairs(pairs))
    plain = encode(policy, given, where="pairs", cache=tmp_path)
    found = encode(policy, given, where="pairs", cache=tmp_path, flipped=True)
    assert not any("flipped" in name for name in plain[0])
    sides = {"chosen": given[1]["image_b"], "rejected": given[1]["image_a"]}  # b wins
    for side, image in sides.items():
        (mean,), (std,) = policy.encode_images([ImageOps.mirror(image.convert("RGB"))])
        torch.testing.assert_close(found[1][f"{side}_mean_flipped"], mean)
        torch.testing.assert_close(found[1][f"{side}_std_flipped"], std)
    draws = [{**found[n], "visit": visit} for visit in range(20) for n in range(12)]
    without = [{**plain[n], "visit": visit} for visit in range(20) for n in range(12)]
    batch, unflipped = policy.collate(draws), policy.collate(without)
    backwards = [policy.collate([draw]) for draw in reversed(draws)][::-1]
    assert torch.equal(batch["chosen"], torch.cat([one["chosen"] for one in backwards]))
    moved = [(batch[side] != unflipped[side]).flatten(1).any(1) for side in ("chosen", "rejected")]
    assert torch.equal(*moved) and torch.equal(batch["noise"], unflipped["noise"])
    assert 0.35 < moved[0].float().mean() < 0.65 and len({tuple(part.tolist()) for part in moved[0].split(12)}) > 15
    stream = eval_stream(found, policy.config, modality="image")
    evaluated, unchanged = (
        policy.collate([eval_stream(part, policy.config, modality="image")[n] for n in range(48)])["chosen"]
        for part in (found, plain)
    )
    assert len(stream) == 48 and torch.equal(evaluated, unchanged)


def test_one_of_several_captions_is_drawn_per_epoch(policy: Any, tmp_path: Path) -> None:
    """Catches the first caption for all epochs, a draw per batch, and drawn captions in evaluation."""
    given = drop_ties(check_pairs(caption_rows(), "pairs"))
    assert given["prompt"][:2] == ["a red star", "a blue circle"]
    found = encode(policy, given, where="pairs", cache=tmp_path)
    draws = [{**found[n], "visit": visit} for visit in range(20) for n in range(12)]
    drawn = policy.collate(draws)["prompt"]["embeds"]
    backwards = [policy.collate([draw])["prompt"]["embeds"] for draw in reversed(draws)][::-1]
    assert torch.equal(drawn, torch.cat(backwards))
    encoded = policy.encode_prompts([*CAPTIONS[0], *CAPTIONS[1]])["embeds"]
    close = torch.stack([(drawn - each).abs().flatten(1).amax(1) < 1e-5 for each in encoded])
    assert (close.sum(0) == 1).all()
    shares = close[:, 0::2].float().mean(1)  # of the rows with three captions
    assert all(0.2 < share < 0.47 for share in shares[:3]) and close[3, 1::2].all() and shares[3] == 0
    stream = eval_stream(found, policy.config, modality="image")
    evaluated = policy.collate([stream[n] for n in range(48)])["prompt"]["embeds"]
    torch.testing.assert_close(evaluated[0::2], encoded[:1].expand(24, -1, -1))


@pytest.mark.slow
def test_precomputed_references_see_the_variants_that_the_policy_sees(tiny_model: str, tmp_path: Path) -> None:
    caption_rows().to_parquet(str(tmp_path / "pairs.parquet"))
    settings: dict[str, Any] = {"random_flip": True, "proportion_empty_prompts": 0.2, "fixed_draws_per_row": 2}
    plain, off, precomputed = (
        train(config(tiny_model, str(tmp_path / "pairs.parquet"), str(tmp_path / name), **changes))
        for name, changes in (
            ("plain", {"fixed_draws_per_row": 2}),
            ("off", settings),
            ("precomputed", {**settings, "reference": "precomputed"}),
        )
    )
    assert first_difference(weights(off.folder), weights(precomputed.folder)) is None
    assert first_difference(weights(off.folder), weights(plain.folder)) is not None
    assert off.settings["captions"] == "1 to 3 per row, one drawn per epoch"
    assert off.settings["flips"] == "both images of a pair, in half of the epochs" and "flips" not in plain.settings


def test_lists_of_captions_are_read_from_tables_and_captioned_folders(tmp_path: Path) -> None:
    pairs, folder = tmp_path / "pairs", tmp_path / "folder"
    for place in (pairs, folder):
        place.mkdir()
        for number in range(4):
            noise_image(number).save(place / f"{number}.png")
    table = [
        {"prompt": CAPTIONS[n], "image_a": f"{2 * n}.png", "image_b": f"{2 * n + 1}.png", "preference": "a"}
        for n in (0, 1)
    ]
    (pairs / "pairs.jsonl").write_text("\n".join(map(json.dumps, table)))
    captioned = [{"file_name": "0.png", "text": CAPTIONS[0]}, {"file_name": "1.png", "text": "one text"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, captioned)))
    found = load_image_pairs(str(pairs / "pairs.jsonl"))
    assert (found["prompt"][:], found["captions"][:]) == (["a red star", "a blue circle"], CAPTIONS)
    found = load_image_pairs(str(folder))
    assert (found["prompt"][:], found["captions"][:]) == (["a red star", "one text"], [CAPTIONS[0], None])
    assert found[0]["image_a"].size == (32, 32)


@pytest.mark.parametrize("wrong", [[], ["a", None]])
def test_list_without_captions_is_refused(wrong: list[Any]) -> None:
    damaged = caption_rows().select(range(2)).remove_columns("prompt").add_column("prompt", [["a"], wrong])
    with pytest.raises(
        ValueError, match=r"pairs, row 1: prompt is \[.*\]\. Expected a text, or a list of at least one"
    ):
        check_pairs(damaged, "pairs")

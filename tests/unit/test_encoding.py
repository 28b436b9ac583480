from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_mm import encoding
from dpo_mm.config import TrainConfig
from dpo_mm.encoding import encode
from dpo_mm.policies.protocol import load_policy
from dpo_mm.schema import decided, load_pairs
from tests.conftest import picture, rows


def test_what_is_kept_is_what_the_encoder_says(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    policy = load_policy(tiny_model)
    found = encode(policy, decided(load_pairs(pairs)), where="pairs", cache=tmp_path)
    assert len(found) == 12
    row = found[1]
    mean, std = policy.encode_images([picture(3), picture(2)])
    torch.testing.assert_close(row["chosen_mean"], mean[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(row["rejected_std"], std[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(row["prompt"]["embeds"], policy.encode_prompts([rows(2)[1]["prompt"]])["embeds"][0])
    assert (row["id"], float(row["probability"])) == ("row-1", 0.75)
    assert float(row["score_margin"]) == pytest.approx(0.8)


def test_a_second_run_encodes_nothing(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(tiny_model)
    encode(policy, decided(load_pairs(pairs)), where="pairs", cache=tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(type(policy), "encode_images", refuse)
    monkeypatch.setattr(type(policy), "encode_prompts", refuse)
    assert len(encode(policy, decided(load_pairs(pairs)), where="pairs", cache=tmp_path)) == 12
    with pytest.raises(AssertionError, match="encoded again"):
        encode(policy, decided(load_pairs(pairs)).select(range(4)), where="pairs", cache=tmp_path)


def test_a_run_cut_short_goes_on_where_it_was(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SHARD", 4)
    policy, given = load_policy(tiny_model), decided(load_pairs(pairs))
    real, calls = encoding._columns, []

    def cut(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(encoding, "_columns", cut)
    with pytest.raises(KeyboardInterrupt):
        encode(policy, given, where="pairs", cache=tmp_path)
    found = encode(policy, given, where="pairs", cache=tmp_path)
    assert len(calls) == 4
    assert list(found.pairs["id"]) == [f"row-{n}" for n in range(12)]


@pytest.fixture
def damaged(write_pairs: Callable[..., str]) -> str:
    some = rows(6)
    some[3]["image_b"] = {"bytes": some[3]["image_b"]["bytes"][:40], "path": None}  # type: ignore[index]
    return write_pairs(some, "damaged.parquet")


def test_a_damaged_picture_is_named(damaged: str, tiny_model: str, tmp_path: Path) -> None:
    given = decided(load_pairs(damaged))
    with pytest.raises(ValueError, match=r"row row-3 of d\.parquet: image_b does not decode .*--on-bad-image skip"):
        encode(load_policy(tiny_model), given, where="d.parquet", cache=tmp_path)


def test_a_damaged_picture_is_left_out_where_asked(damaged: str, tiny_model: str, tmp_path: Path) -> None:
    given = decided(load_pairs(damaged))
    found = encode(load_policy(tiny_model), given, where="d.parquet", cache=tmp_path, on_bad_image="skip")
    assert list(found.pairs["id"]) == ["row-0", "row-1", "row-2", "row-4", "row-5"]
    noted = json.loads((found.folder / "quarantine.jsonl").read_text())
    assert (noted["row"], noted["column"]) == ("row-3", "image_b")


def test_a_full_disk_is_said(tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Dataset, "save_to_disk", full)
    with pytest.raises(OSError, match=r"could not write .*No space left on device; free space or set DPO_MM_CACHE"):
        encode(load_policy(tiny_model), decided(load_pairs(pairs)), where="pairs", cache=tmp_path)


def test_a_fresh_sample_at_each_visit_is_what_encoding_in_the_step_gives(tiny_model: str) -> None:
    """mean + std * noise, with the visit's own noise, equals the posterior's sample under that noise."""
    from dpo_mm.policies import draws

    policy = load_policy(tiny_model)
    policy.prepare(TrainConfig(model="-", pairs="-", output_dir="-", seed=7))
    mean, std = policy.encode_images([picture(0), picture(1)])
    prompt = {"embeds": policy.encode_prompts(["a red circle"])["embeds"][0]}
    parts = {"chosen_mean": mean[0], "chosen_std": std[0], "rejected_mean": mean[1], "rejected_std": std[1]}
    batches = [policy.collate([{"id": "x", "visit": visit, "prompt": prompt, **parts}]) for visit in (0, 1, 0)]
    noise = torch.from_numpy(draws.noise(7, "x", 1, tuple(mean[0].shape), what="posterior"))
    torch.testing.assert_close(batches[1]["chosen"][0], (mean[0] + std[0] * noise) * 0.7)
    assert torch.equal(batches[0]["noise"], batches[2]["noise"]) and torch.equal(
        batches[0]["chosen"], batches[2]["chosen"]
    )
    assert not torch.equal(batches[0]["noise"], batches[1]["noise"])


def test_two_runs_that_encode_the_same_set_do_not_hinder_each_other(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard is there already by the time that ours would be renamed to its name."""
    import shutil

    whole = encode(load_policy(tiny_model), decided(load_pairs(pairs)), where="pairs", cache=tmp_path / "one")
    real = Path.rename

    def second(self: Path, target: Path) -> Path:
        if not target.exists():
            shutil.copytree(whole.folder / target.name, target)
        return real(self, target)

    monkeypatch.setattr(Path, "rename", second)
    ours = encode(load_policy(tiny_model), decided(load_pairs(pairs)), where="pairs", cache=tmp_path / "two")
    assert len(ours) == len(whole) and not list((tmp_path / "two").rglob(".*.[0-9]*"))

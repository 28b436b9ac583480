"""Changed bytes in files that dpo-mm wrote are noticed: the part is made again, or the error names it and the fix."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo_mm import train
from dpo_mm.config import RelabelConfig, TrainConfig
from dpo_mm.data.parquet import combine_shards, write_rows
from dpo_mm.data.schema import image_preference, load_pairs, make_image_rows
from dpo_mm.evaluation.image_store import ImageStore, append_lines, read_lines
from dpo_mm.files.checksums import (
    COMPLETE,
    check_trained_files,
    is_intact,
    missing_shards,
    what_is_wrong,
    write_checksums,
    write_with_checksum,
)
from dpo_mm.judges.relabel import relabel
from dpo_mm.policies.families import load_policy
from dpo_mm.training import arrow_shards, encoding, reference_cache
from dpo_mm.training.checkpoints import latest_complete_checkpoint
from tests.conftest import rows

HERE = "tests.reliability.test_checksums"


def flip(path: Path, *, at: float = 0.5) -> None:
    """Change one bit of a file, at this fraction of its length."""
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * at), len(data) - 1)] ^= 1
    path.write_bytes(data)


def constant(images: Any, prompts: Any) -> list[float]:
    return [float(n) for n in range(len(images))]


@pytest.fixture
def shards(tmp_path: Path) -> arrow_shards.Shards:
    columns = {"id": [f"{n}" for n in range(4)], "mean": torch.randn(4, 2, 8, 8), "probability": [0.5, 1, 0.25, 0.0]}
    arrow_shards.write_shard(tmp_path / "pairs-00000", {"1x1": arrow_shards.cast_columns(columns, "bf16", where="-")})
    (tmp_path / COMPLETE).write_text("{}")
    return arrow_shards.Shards(tmp_path, list(arrow_shards.list_parts(tmp_path, "pairs")))


def test_unchanged_rows_are_read(shards: arrow_shards.Shards) -> None:
    assert [shards[number]["probability"] for number in range(4)] == [0.5, 1.0, 0.25, 0.0]
    assert shards[3].keys() == {"id", "mean", "probability"}


@pytest.mark.parametrize("at", [0.02, 0.2, 0.35, 0.5, 0.65, 0.8, 0.98])
@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "tensors.json", "dataset_info.json"])
def test_changed_encoded_rows_are_never_used(file: str, at: float, shards: arrow_shards.Shards) -> None:
    """Every row is what was written, or the shard is removed and named. It catches a row that is not compared."""
    expected = [shards[number] for number in range(4)]
    flip(shards.folder / "pairs-00000" / "1x1" / file, at=at)
    again = arrow_shards.Shards(shards.folder, shards.parts)
    try:
        found = [again[number] for number in range(4)]
    except ValueError as error:
        assert "pairs-00000 has changed since it was written, and is removed. Run the same command again" in str(error)
        assert not (shards.folder / "pairs-00000").exists() and not (shards.folder / COMPLETE).exists()
        return
    for row, before in zip(found, expected, strict=True):
        assert row["id"] == before["id"] and row["probability"] == before["probability"]
        assert torch.equal(row["mean"], before["mean"])


def test_changed_latents_are_noticed(shards: arrow_shards.Shards) -> None:
    path = shards.folder / "pairs-00000" / "1x1" / "data-00000-of-00001.arrow"
    data = path.read_bytes()
    cell = shards[2]["mean"].bfloat16().view(torch.uint8).numpy().tobytes()
    start = data.index(cell)
    path.write_bytes(data[:start] + bytes([data[start] ^ 64]) + data[start + 1 :])
    again = arrow_shards.Shards(shards.folder, shards.parts)
    assert again[1]["id"] == "1"
    with pytest.raises(ValueError, match="has changed since it was written"):
        again[2]


def test_changed_part_of_the_encoded_cache_is_encoded_again(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, dataset = load_policy(tiny_model), load_pairs(pairs).filter(lambda row: row["preference"] == "a")
    encoded = encoding.encode(policy, dataset, where="pairs", cache=tmp_path)
    expected = [encoded[number] for number in range(len(encoded))]
    complete = encoded.folder / COMPLETE
    complete.write_text(complete.read_text().replace('"rows": ', '"rows": 1'))
    damaged = next(encoded.folder.glob("pairs-*/*/*.arrow"))
    data = damaged.read_bytes()
    cell = expected[0]["chosen_mean"].numpy().tobytes()
    damaged.write_bytes(data.replace(cell, bytes(len(cell))))
    with pytest.raises(ValueError, match="Run the same command again"):
        encoding.encode(policy, dataset, where="pairs", cache=tmp_path)[0]
    again = encoding.encode(policy, dataset, where="pairs", cache=tmp_path)
    for number, row in enumerate(expected):
        assert torch.equal(again[number]["chosen_mean"], row["chosen_mean"])


@pytest.fixture(scope="module")
def run_folder(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_image_rows(rows(4)).to_parquet(str(folder / "pairs.parquet"))
    train(run_config(tiny_model, folder / "out"))
    return folder / "out"


def run_config(model: str, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 1, "save_every": 2, "eval_fraction": 0.0, "beta": 100.0}
    pairs = str(out.parent / "pairs.parquet")
    return TrainConfig(model, pairs, str(out), **{**settings, "reference": "moving_average", **changes})


def test_one_changed_byte_of_any_checkpoint_file_falls_back_to_the_one_before(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It catches a check of sizes alone."""
    names = [path.name for path in (run_folder / "checkpoint-4").iterdir() if path.name != COMPLETE]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "dpo_mm.json"} < set(names)
    assert {"pytorch_lora_weights.safetensors", "reference.safetensors"} < set(names)
    assert latest_complete_checkpoint(run_folder) == run_folder / "checkpoint-4"
    for name in names:
        copy = tmp_path / name
        shutil.copytree(run_folder, copy)
        flip(copy / "checkpoint-4" / name)
        with caplog.at_level(logging.WARNING, logger="dpo_mm.training.checkpoints"):
            assert latest_complete_checkpoint(copy) == copy / "checkpoint-2"
        assert f"{name} has changed since it was written; taking the one before" in caplog.text
        flip(copy / "checkpoint-2" / name)
        with pytest.raises(ValueError, match="no checkpoint is whole"):
            latest_complete_checkpoint(copy)


def test_training_resumes_from_the_checkpoint_before_with_the_same_result(
    run_folder: Path, tiny_model: str, tmp_path: Path
) -> None:
    shutil.copytree(run_folder.parent, tmp_path / "run")
    out = tmp_path / "run" / "out"
    expected = load_file(out / "pytorch_lora_weights.safetensors")
    flip(out / "checkpoint-4" / "optimizer.pt")
    state = json.loads((out / "checkpoint-4" / "dpo_mm.json").read_text())
    train(dataclasses.replace(run_config(tiny_model, out, resume=True), pairs=state["pairs"]))
    found = load_file(out / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_changed_adapter_is_refused_with_the_fix(run_folder: Path, tiny_model: str, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(run_folder, copy)
    load_policy(tiny_model, adapter=copy)
    flip(copy / "pytorch_lora_weights.safetensors")
    message = (
        r"adapter: pytorch_lora_weights.safetensors has changed since it was written. Copy it again or train again"
    )
    with pytest.raises(ValueError, match=message):
        load_policy(tiny_model, adapter=copy)
    with pytest.raises(ValueError, match=r"pytorch_lora_weights.safetensors has changed"):
        flip(copy / "checkpoint-2" / "pytorch_lora_weights.safetensors")
        load_policy(tiny_model, adapter=copy / "checkpoint-2")
    (copy / COMPLETE).unlink()
    load_policy(tiny_model, adapter=copy)


def test_checksums_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.bin").write_bytes(b"abc")
    check_trained_files(tmp_path)
    write_checksums(tmp_path)
    assert what_is_wrong(tmp_path) is None
    (tmp_path / "part" / "a.bin").write_bytes(b"abd")
    assert what_is_wrong(tmp_path) == "part/a.bin has changed since it was written"
    (tmp_path / "part" / "a.bin").unlink()
    assert what_is_wrong(tmp_path) == "part/a.bin is missing"
    (tmp_path / COMPLETE).write_text("[]")
    assert what_is_wrong(tmp_path) == "complete.json is missing or broken"


def test_changed_or_unchecked_shard_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"shard-{number}" for number in range(4)]
    for path in paths[:3]:
        with write_with_checksum(path) as temporary:
            temporary.write_bytes(b"abc")
    assert missing_shards(paths) == [3] and all(is_intact(path) for path in paths[:3])
    flip(paths[1])
    (tmp_path / ".shard-2.checksum").unlink()
    assert missing_shards(paths) == [1, 2, 3]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert missing_shards(paths) == [1, 3]


def test_changed_relabel_shard_is_scored_again(pairs: str, tmp_path: Path) -> None:
    config = RelabelConfig(pairs, (f"{HERE}:constant",), str(tmp_path / "new.parquet"), shard_size=2)
    relabel(config)
    expected = load_pairs(config.output)[:]["score_a"]
    shard = next(Path(f"{config.output}.parts").glob("shard-*.npy"))
    scores = np.load(shard)
    np.save(shard, scores + 1)
    relabel(config)
    assert np.array_equal(np.load(shard), scores) and load_pairs(config.output)[:]["score_a"] == expected


def test_changed_byte_of_written_pairs_is_noticed_when_they_are_read(tmp_path: Path) -> None:
    """Pages of our Parquet files have checksums. It catches writers or readers without it."""
    make: Callable[..., Any] = make_image_rows
    write_rows(rows(2), tmp_path / "shard", make=make, features=image_preference())
    path = combine_shards([tmp_path / "shard"], tmp_path / "pairs.parquet", empty_message="")
    assert len(load_pairs(str(path))) == 2
    data = path.read_bytes()
    start = data.index(b"\x89PNG") + 60
    path.write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])
    with pytest.raises(ValueError, match=r"pairs.parquet: not readable as Parquet \(.*CRC"):
        load_pairs(str(path))


def test_changed_reference_log_probs_are_computed_again(tmp_path: Path) -> None:
    computed = []

    def compute(part: range) -> dict[str, torch.Tensor]:
        computed.append(part)
        return {"chosen": torch.arange(part.start, part.stop)[:, None].float()}

    for _ in range(2):
        found = reference_cache.load_or_compute(tmp_path, 300, compute)
        assert torch.equal(found["chosen"][:, 0], torch.arange(300.0)) and computed == [range(256), range(256, 300)]
    flip(tmp_path / "rows-00001.safetensors", at=0.99)
    found = reference_cache.load_or_compute(tmp_path, 300, compute)
    assert torch.equal(found["chosen"][:, 0], torch.arange(300.0)) and computed[2:] == [range(256, 300)]


def test_changed_scores_and_responses_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ImageStore(tmp_path)
    store.add_scores("j", "card", [("image", "a prompt with \u2028", 0.25), ("other", "b", 0.5)])
    assert ImageStore(tmp_path).scores == store.scores
    path = tmp_path / "scores.jsonl"
    path.write_text(path.read_text().replace("0.25", "0.35"))
    with caplog.at_level(logging.WARNING):
        assert ImageStore(tmp_path).scores == {("card", "other", "b"): 0.5}
    assert "1 rows have changed since they were written, and are made again" in caplog.text
    append_lines(tmp_path / "answers.jsonl", [{"text": "yes", "tokens": 1, "hit_limit": False}])
    assert read_lines(tmp_path / "answers.jsonl") == [{"text": "yes", "tokens": 1, "hit_limit": False}]

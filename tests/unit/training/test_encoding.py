from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import drop_ties, load_pairs
from dpo_mm.policies.families import load_policy
from dpo_mm.process import process_rank
from dpo_mm.training import arrow_shards, encoding
from dpo_mm.training.encoding import encode
from dpo_mm.training.pair_stream import eval_stream
from tests.conftest import noise_image, rows


def test_cached_latents_equal_the_encoder_output(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    policy = load_policy(tiny_model)
    found = encode(policy, drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path)
    assert len(found) == 12
    row = found[1]
    mean, std = policy.encode_images([noise_image(3), noise_image(2)])
    torch.testing.assert_close(row["chosen_mean"], mean[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(row["rejected_std"], std[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(row["prompt"]["embeds"], policy.encode_prompts([rows(2)[1]["prompt"]])["embeds"][0])
    assert (row["id"], float(row["probability"])) == ("row-1", 0.75)
    assert float(row["score_margin"]) == pytest.approx(0.8)


def test_second_run_reads_the_cache(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(tiny_model)
    encode(policy, drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(type(policy), "encode_images", refuse)
    monkeypatch.setattr(type(policy), "encode_prompts", refuse)
    assert len(encode(policy, drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path)) == 12
    with pytest.raises(AssertionError, match="encoded again"):
        encode(policy, drop_ties(load_pairs(pairs)).select(range(4)), where="pairs", cache=tmp_path)


def test_interrupted_encoding_resumes_at_its_shard(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SHARD", 4)
    policy, given = load_policy(tiny_model), drop_ties(load_pairs(pairs))
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
    assert found.ids() == [f"row-{n}" for n in range(12)]


@pytest.fixture
def damaged(write_pairs: Callable[..., str]) -> str:
    some = rows(6)
    some[3]["image_b"] = {"bytes": some[3]["image_b"]["bytes"][:40], "path": None}  # type: ignore[index]
    return write_pairs(some, "damaged.parquet")


def test_damaged_image_is_named_in_the_error(damaged: str, tiny_model: str, tmp_path: Path) -> None:
    given = drop_ties(load_pairs(damaged))
    with pytest.raises(
        ValueError, match=r"row row-3 of d\.parquet: image_b does not decode .*undecodable_images: drop"
    ):
        encode(load_policy(tiny_model), given, where="d.parquet", cache=tmp_path)


def test_damaged_image_is_dropped_if_set(damaged: str, tiny_model: str, tmp_path: Path) -> None:
    given = drop_ties(load_pairs(damaged))
    found = encode(load_policy(tiny_model), given, where="d.parquet", cache=tmp_path, undecodable_images="drop")
    assert found.ids() == ["row-0", "row-1", "row-2", "row-4", "row-5"]
    noted = json.loads((found.folder / "quarantine.jsonl").read_text())
    assert (noted["row"], noted["column"]) == ("row-3", "image_b")


def test_full_disk_is_reported_with_a_fix(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Dataset, "save_to_disk", full)
    with pytest.raises(OSError, match=r"could not write .*No space left on device\. Free space or set DPO_MM_CACHE"):
        encode(load_policy(tiny_model), drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path)


def test_fresh_latent_sample_equals_encoding_in_the_step(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """The kept posterior with a visit's noise is the autoencoder's own sample with that noise, to float32's rounding."""
    from dpo_mm.policies.diffusion import random_draws

    policy = load_policy(tiny_model)
    policy.prepare(TrainConfig(model="-", pairs="-", output_dir="-", seed=7))
    row = encode(policy, drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path)[0]
    batches = [policy.collate([{**row, "visit": visit}]) for visit in (0, 1, 0)]
    for batch, visit in zip(batches, (0, 1, 0), strict=True):
        noise = torch.from_numpy(random_draws.sample_noise(7, "row-0", visit, (4, 16, 16), purpose="posterior"))
        for side, place in (("chosen", 0), ("rejected", 1)):
            with torch.no_grad():
                own = policy.vae.encode(policy.pixels(noise_image(place))[None]).latent_dist
            torch.testing.assert_close(batch[side][0], ((own.mean + own.std * noise) * 0.7)[0], atol=2e-6, rtol=0)
    assert torch.equal(batches[0]["chosen"], batches[2]["chosen"])
    assert torch.equal(batches[0]["noise"], batches[2]["noise"])
    assert not torch.equal(batches[0]["chosen"], batches[1]["chosen"])
    assert not torch.equal(batches[0]["noise"], batches[1]["noise"])


def shaped(sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Rows whose pictures have these sizes, both sides alike."""
    some = rows(len(sizes))
    for number, (row, size) in enumerate(zip(some, sizes, strict=True)):
        for place, side in enumerate(("image_a", "image_b")):
            row[side] = {"bytes": encode_png(noise_image(2 * number + place, 64).resize(size)), "path": None}
    return some


SIZES = [(32, 32), (80, 48), (80, 48), (30, 30), (48, 80), (81, 49), (32, 32)]


@pytest.fixture
def several(write_pairs: Callable[..., str]) -> str:
    return write_pairs(shaped(SIZES), "several.parquet")


def test_pair_uses_the_bucket_of_its_aspect_ratio(
    several: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SHARD", 3)
    policy = load_policy(tiny_model)
    found = encode(policy, drop_ties(load_pairs(several)), where="several", cache=tmp_path, buckets=True)
    assert dict(zip(found.sizes, map(len, found.buckets), strict=True)) == {"24x40": 1, "32x32": 3, "40x24": 3}
    assert found.ids() == ["row-4", "row-0", "row-3", "row-6", "row-1", "row-2", "row-5"]
    for size, group in zip(found.sizes, found.buckets, strict=True):
        width, height = (int(side) // 2 for side in size.split("x"))
        for number in group:
            assert found[number]["chosen_mean"].shape == found[number]["rejected_std"].shape == (4, height, width)
    with policy.at_size((40, 24)):
        mean, _ = policy.encode_images([policy_picture(several, "row-1")])
    torch.testing.assert_close(found[4]["rejected_mean"], mean[0], atol=1e-5, rtol=0)


def policy_picture(path: str, row: str) -> Any:
    return next(each["image_a"] for each in load_pairs(path) if each["id"] == row)


def test_images_are_cropped_to_one_square_without_buckets(several: str, tiny_model: str, tmp_path: Path) -> None:
    found = encode(load_policy(tiny_model), drop_ties(load_pairs(several)), where="several", cache=tmp_path)
    assert found.sizes == ["32x32"] and found.buckets == [range(7)]
    assert found.ids() == [f"row-{n}" for n in range(7)]


def test_run_trains_on_several_buckets(several: str, tiny_model: str, tmp_path: Path) -> None:
    from dpo_mm.training.run import train

    config = TrainConfig(
        tiny_model, several, str(tmp_path / "out"), steps=5, batch_size=2, log_every=1, buckets=True, eval_fraction=0.34,
        reference="precomputed", fixed_draws_per_row=2, cache_precision="bf16",
    )  # fmt: skip
    history = train(config).history
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5]
    assert math.isfinite(history[-1]["eval_loss"])


def policy_batch(policy: Any, row: dict[str, Any]) -> Any:
    policy.config = TrainConfig("-", "-", "-")
    return policy.collate([{**row, "visit": 0}])


@pytest.mark.parametrize(("precision", "apart"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_half_precision_cache_is_within_its_rounding(
    precision: str, apart: float, tiny_model: str, pairs: str, tmp_path: Path
) -> None:
    policy, given = load_policy(tiny_model), drop_ties(load_pairs(pairs))
    exact, half = (encode(policy, given, where="p", cache=tmp_path, precision=kind) for kind in ("fp32", precision))
    for name in ("chosen_mean", "rejected_std"):
        assert half[3][name].dtype == arrow_shards.CACHE_DTYPES[precision]
        difference = (half[3][name] - exact[3][name]).abs()
        assert difference.max() > 0 and (difference <= apart * exact[3][name].abs() + 1e-7).all()
    batch = policy_batch(policy, half[3])
    assert batch["prompt"]["embeds"].dtype == arrow_shards.CACHE_DTYPES[precision]  # the device casts it
    assert batch["chosen"].dtype == torch.float32  # the posterior's sample has more digits than its mean
    size = lambda found: sum(file.stat().st_size for file in found.folder.rglob("*.arrow"))
    assert size(half) < 0.6 * size(exact)


def test_fp16_overflow_is_reported() -> None:
    with pytest.raises(ValueError, match=r"set: embeds is too large for fp16 \(7e\+04\); take cache_precision bf16"):
        arrow_shards.cast_columns({"embeds": torch.full((1, 2), 7e4)}, "fp16", where="set")


def test_ids_and_masks_are_not_cast(tmp_path: Path) -> None:
    kept = {"id": ["a", "b"], "mask": torch.tensor([[1, 0], [1, 1]]), "x": torch.tensor([[0.1], [70000.0]])}
    arrow_shards.write_shard(tmp_path / "pairs-00000", {"1x1": arrow_shards.cast_columns(kept, "bf16", where="-")})
    found = arrow_shards.Shards(tmp_path, list(arrow_shards.list_parts(tmp_path, "pairs")))
    assert found[1]["mask"].dtype == torch.int64 and found[1]["mask"].tolist() == [1, 1]
    assert found[0]["id"] == "a" and found[1]["x"].item() == pytest.approx(70000, rel=2**-8)


def test_half_precision_states_of_an_encoder_stay_halves_in_a_float32_cache() -> None:
    """Catches a cache that stores them twice as large, reads them slower, and moves them to the GPU as float32."""
    columns = {"embeds": torch.ones(2, 3, dtype=torch.bfloat16), "mean": torch.ones(2, 5, dtype=torch.float64)}
    cast = arrow_shards.cast_columns(columns, "fp32", where="-")
    assert (cast["embeds"].dtype, cast["mean"].dtype) == (torch.bfloat16, torch.float32)
    assert arrow_shards.row_bytes(cast, "fp32") == arrow_shards.row_bytes(columns, "fp32") == 3 * 2 + 5 * 4


def test_prompts_of_different_lengths_have_their_masks(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Lengths differ from shard to shard and are filled up in the batch alone."""
    policy = load_policy(tiny_model)
    plain = policy.encode_prompts

    def ragged(prompts: list[str]) -> dict[str, torch.Tensor]:
        length = max(len(prompt.split()) for prompt in prompts)
        mask = torch.tensor([[int(n < len(prompt.split())) for n in range(length)] for prompt in prompts])
        return {"embeds": plain(prompts)["embeds"][:, :length], "mask": mask}

    policy.encode_prompts = ragged
    encoding_shard, encoding.SHARD = encoding.SHARD, 1
    try:
        found = encode(policy, drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path / "ragged")
    finally:
        encoding.SHARD = encoding_shard
    policy.prepare(TrainConfig(model="-", pairs="-", output_dir="-"))
    some = [{**found[n], "visit": 0} for n in range(3)]
    lengths = [len(row["prompt"]["mask"]) for row in some]
    assert len(set(lengths)) > 1
    batch = policy.collate(some)
    assert batch["prompt"]["mask"].sum(1).tolist() == lengths
    assert batch["prompt"]["embeds"].shape[1] == max(lengths)


def test_too_little_disk_space_is_refused_before_encoding(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 4096))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"encoding takes about 0\.2 MiB and .* has 0\.0 MiB free; .*DPO_MM_CACHE"):
        encode(load_policy(tiny_model), drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path)
    assert not list(tmp_path.rglob("pairs-*"))


def test_predicted_cache_size_equals_the_size_on_disk(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    policy = load_policy(tiny_model)
    a_prompt, a_pair = encoding.sample_bytes(policy, "fp32")
    found = encode(policy, drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path)
    taken = sum(file.stat().st_size for file in found.folder.rglob("*.arrow"))
    assert 1 <= taken / (12 * a_pair + 3 * a_prompt) < 1.2


def test_two_processes_divide_the_shards(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that comes first leaves the other's shards to it and waits; both read the same."""
    monkeypatch.setattr(encoding, "SHARD", 2)
    policy, given = load_policy(tiny_model), drop_ties(load_pairs(pairs))
    whole = encode(policy, given, where="pairs", cache=tmp_path / "whole")
    monkeypatch.setattr(process_rank, "WAIT_TIMEOUT_S", 0.3)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        made: list[str] = []
        keep = arrow_shards.write_shard
        monkeypatch.setattr(
            arrow_shards,
            "write_shard",
            lambda place, sets, made=made, keep=keep: made.append(place.name) or keep(place, sets),
        )
        if rank == "1":
            with pytest.raises(ValueError, match=r"complete\.json has not come .*on a shared disk"):
                encode(policy, given, where="pairs", cache=tmp_path / "shared")
            assert made == ["prompts-00001", "pairs-00001", "pairs-00003", "pairs-00005"]
        else:
            shared = encode(policy, given, where="pairs", cache=tmp_path / "shared")
            assert made == ["prompts-00000", "pairs-00000", "pairs-00002", "pairs-00004"]
        monkeypatch.setattr(arrow_shards, "write_shard", keep)
    assert shared.ids() == whole.ids()
    assert all(torch.equal(shared[n]["chosen_mean"], whole[n]["chosen_mean"]) for n in range(12))


def test_concurrent_runs_encode_the_same_dataset(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard is there already by the time that ours would be renamed to its name."""
    import shutil

    whole = encode(load_policy(tiny_model), drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path / "one")
    real = Path.rename

    def second(self: Path, target: Path) -> Path:
        if not target.exists():
            shutil.copytree(whole.folder / target.name, target)
        return real(self, target)

    monkeypatch.setattr(Path, "rename", second)
    ours = encode(load_policy(tiny_model), drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path / "two")
    assert len(ours) == len(whole) and not list((tmp_path / "two").rglob(".*.[0-9]*"))


def test_empty_prompts_are_a_function_of_the_draw(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Catches a draw that depends on the batch, on global random numbers or on the order, and emptied evaluation rows."""
    policy = load_policy(tiny_model)
    assert policy.modality == "image"
    found = encode(policy, drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path, empty_prompt=True)
    plain = encode(policy, drop_ties(load_pairs(pairs)), where="pairs", cache=tmp_path)
    assert "empty_prompt" not in plain[0] and torch.equal(plain[3]["prompt"]["embeds"], found[3]["prompt"]["embeds"])
    torch.testing.assert_close(found[0]["empty_prompt"]["embeds"], policy.encode_prompts([""])["embeds"][0])
    policy.prepare(TrainConfig("m", "p", "o", proportion_empty_prompts=0.25, seed=4))
    draws = [{**found[n], "visit": visit} for visit in range(20) for n in range(12)]
    together = policy.collate(draws)["prompt"]["embeds"]
    backwards = torch.cat([policy.collate([draw])["prompt"]["embeds"] for draw in reversed(draws)]).flip(0)
    assert torch.equal(together, backwards)
    is_empty = (together == found[0]["empty_prompt"]["embeds"]).flatten(1).all(1)
    assert 0.15 < is_empty.float().mean() < 0.35 and len({tuple(part.tolist()) for part in is_empty.split(12)}) > 5
    stream = eval_stream(found, policy.config, modality="image")
    assert len(stream) == 48 and "empty_prompt" not in stream.row_at_epoch(0, 1)
    evaluated = policy.collate([stream[n] for n in range(48)])["prompt"]["embeds"]
    assert not (evaluated == found[0]["empty_prompt"]["embeds"]).flatten(1).all(1).any()

"""Response pairs that are encoded in the step that uses them, because they are too large for memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import load_responses, make_response_rows
from dpo_mm.policies.vlm.chat import ConversationEncoder
from dpo_mm.policies.vlm.row_sizes import RowMeasure
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.training import response_rows
from dpo_mm.training.builders import build_policy
from dpo_mm.training.encoding import encode_splits
from dpo_mm.training.pair_stream import training_stream
from dpo_mm.training.reference import precompute_reference_log_probs
from dpo_mm.training.response_rows import StreamedRows
from dpo_mm.training.run import TrainResult, dry_run, train
from dpo_mm.training.trainer import PreferenceTrainer
from tests.contracts.tiny_vlms import BUILDERS, build, noise_image, save
from tests.contracts.tiny_vlms import rows as rows_of

LONG = "a red square on a blue field "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save("llava", tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(response_rows, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))


def pairs(folder: Path, **changes: dict[str, Any]) -> str:
    """Write eight pairs. changes: columns of a row, by its id."""
    rows = [
        {
            "id": f"r{n}",
            "images": [{"bytes": encode_png(noise_image(n, (40 + n, 50))), "path": None}],
            "prompt": f"describe the picture {'red ' * n}",
            "chosen": "a red square on a blue field",
            "rejected": "a red circle" if n % 2 else "a square",
            **changes.get(f"r{n}", {}),
        }
        for n in range(8)
    ]
    make_response_rows(rows).to_parquet(str(folder / "pairs.parquet"))
    return str(folder / "pairs.parquet")


def config(model: str, rows: str, folder: Path, **more: Any) -> TrainConfig:
    given = {"beta": 0.1, "steps": 3, "batch_size": 2, "eval_fraction": 0.25, "learning_rate": 1e-2, "log_every": 1}
    return TrainConfig(model=model, pairs=rows, output_dir=str(folder), **{**given, **more})


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_lengths_from_headers_equal_the_encoded_lengths(family: str) -> None:
    """Images of other sizes and two images in a row take other numbers of tokens in many families."""
    policy = VisionLanguage(*build(family), family)
    counts = (1, 2, 1) if policy.encoder.takes_images else (0, 0, 0)
    measure = RowMeasure(policy.encoder)
    for number, row in enumerate(rows_of(family, counts)):
        row["images"] = [noise_image(n, (30 + 50 * number + 7 * n, 70)) for n, _ in enumerate(row["images"])]
        (encoded,) = policy.encode([row])
        size = measure(row)
        assert size is not None
        assert size.tokens == len(encoded["prompt_ids"]) + max(len(encoded["chosen_ids"]), len(encoded["rejected_ids"]))


def losses(run: TrainResult) -> list[float]:
    return [entry["loss"] for entry in run.history if "loss" in entry]


@pytest.mark.parametrize(
    ("workers", "order", "steps"),
    [(0, "random", 3), pytest.param(2, "group_by_length", 1, marks=pytest.mark.slow)],
)
def test_streamed_run_has_the_bits_of_a_run_in_memory(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, order: str, steps: int
) -> None:
    """With loader processes the streamed run is resumed after one step."""
    rows, more = pairs(tmp_path), {"train_sampling_strategy": order, "save_every": steps % 3}
    cut = config(model, rows, tmp_path / "streamed", workers=workers, **more)
    streamed = train(dataclasses.replace(cut, steps=steps))
    if steps < cut.steps:
        streamed = train(dataclasses.replace(cut, resume=True))
    monkeypatch.setattr(response_rows, "MAX_BYTES_IN_MEMORY", 2**40)
    in_memory = train(config(model, rows, tmp_path / "memory", **more))
    one, other = (load_file(run.folder / "adapter_model.safetensors") for run in (streamed, in_memory))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert losses(streamed) == losses(in_memory) and len(losses(streamed)) == 3
    assert streamed.history[-1]["eval_loss"] == in_memory.history[-1]["eval_loss"]


def test_rows_are_not_encoded_before_they_are_used(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode_row = ConversationEncoder.encode_row
    monkeypatch.setattr(
        ConversationEncoder, "encode_row", lambda self, row: encoded.append(row["id"]) or encode_row(self, row)
    )
    monkeypatch.setattr(response_rows, "SAMPLED_ROWS", 1)
    settings = config(model, pairs(tmp_path), tmp_path / "run")
    policy = build_policy(settings)
    splits = encode_splits(policy, settings)
    assert isinstance(splits.rows, StreamedRows) and isinstance(splits.eval_rows, StreamedRows)
    assert encoded == ["r0"], "only the sample for the estimate"
    assert len(splits.rows) + len(splits.eval_rows) == 8
    assert splits.rows[1]["id"] == encoded[-1] and len(encoded) == 2
    with pytest.raises(IndexError):
        splits.rows[len(splits.rows)]


def test_lengths_are_measured_once(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(model, pairs(tmp_path), tmp_path / "run")
    policy = build_policy(settings)
    before = encode_splits(policy, settings)
    measured: list[int] = []
    measure = response_rows._measure_in_processes
    monkeypatch.setattr(response_rows, "_measure_in_processes", lambda *a, **k: measured.append(1) or measure(*a, **k))
    again = encode_splits(policy, settings)
    assert not measured
    assert again.encoded_digest == before.encoded_digest and again.rows.lengths == before.rows.lengths
    for path in (tmp_path / "cache" / "lengths").iterdir():
        path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    assert encode_splits(policy, settings).rows.lengths == before.rows.lengths and measured


def test_row_that_is_too_long_is_named_or_left_out_before_the_first_step(model: str, tmp_path: Path) -> None:
    rows = pairs(tmp_path, r3={"chosen": LONG * 60})
    with pytest.raises(ValueError, match=r"row r3: \d+ tokens"):
        train(config(model, rows, tmp_path / "run", max_length=120))
    settings = config(model, rows, tmp_path / "run", max_length=120, overlong_rows="drop", eval_fraction=0.0)
    rows_left = encode_splits(build_policy(settings), settings).rows
    assert [rows_left[n]["id"] for n in range(len(rows_left))] == [f"r{n}" for n in range(8) if n != 3]


def test_image_without_a_header_is_listed_and_left_out(model: str, tmp_path: Path) -> None:
    rows = pairs(tmp_path, r2={"images": [{"bytes": b"no image", "path": None}]})
    with pytest.raises(ValueError, match=r"row r2 of .*image 0 does not decode"):
        train(config(model, rows, tmp_path / "run"))
    settings = config(model, rows, tmp_path / "run", undecodable_images="drop", eval_fraction=0.0)
    rows_left = encode_splits(build_policy(settings), settings).rows
    assert len(rows_left) == 7 and '"row": "r2"' in (tmp_path / "run" / "quarantine.jsonl").read_text()


@pytest.mark.slow
def test_precomputed_reference_of_streamed_rows_gives_the_same_losses(model: str, tmp_path: Path) -> None:
    rows = pairs(tmp_path)
    runs = [train(config(model, rows, tmp_path / name, reference=name)) for name in ("adapter_off", "precomputed")]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)


def test_streamed_rows_are_loaded_by_processes_unless_set(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    rows = pairs(tmp_path)
    for workers, limit, expected in ((None, 0, 3), (1, 0, 1), (None, 2**40, 0)):
        monkeypatch.setattr(response_rows, "MAX_BYTES_IN_MEMORY", limit)
        settings = config(model, rows, tmp_path / "run", workers=workers)
        policy = build_policy(settings)
        splits = encode_splits(policy, settings)
        policy.prepare(settings)
        trainer = PreferenceTrainer(policy, settings, splits.rows, splits.eval_rows)
        assert trainer.get_train_dataloader().num_workers == expected


def test_dry_run_prints_the_lengths(model: str, tmp_path: Path) -> None:
    summary = dry_run(config(model, pairs(tmp_path), tmp_path / "run", eval_fraction=0.0))
    median = summary["tokens"].removeprefix("median ").partition(",")[0]
    policy = build_policy(config(model, "-", tmp_path))
    lengths = sorted(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in policy.encode(load_responses(pairs(tmp_path)))
    )
    assert int(median) == (lengths[3] + lengths[4]) // 2 and summary["tokens"].endswith(f"longest {lengths[-1]}")


def test_precomputed_reference_of_other_images_with_equal_texts_is_another(model: str, tmp_path: Path) -> None:
    """Catches a cache of log-probs whose key has only the texts of the rows."""
    sets = [pairs(tmp_path)]
    (tmp_path / "other").mkdir()
    images = {
        f"r{n}": {"images": [{"bytes": encode_png(noise_image(50 + n, (40 + n, 50))), "path": None}]} for n in range(8)
    }
    sets.append(pairs(tmp_path / "other", **images))
    logps = []
    for name, rows in zip(("one", "two"), sets, strict=True):
        settings = config(model, rows, tmp_path / name, reference="precomputed", eval_fraction=0.0)
        policy = build_policy(settings)
        splits = encode_splits(policy, settings)
        policy.prepare(settings)
        stream = dataclasses.replace(training_stream(settings, splits.rows, 1), num_fixed_draws=1)
        logps.append(precompute_reference_log_probs(policy, stream, settings).chosen)
    assert not torch.equal(*logps)

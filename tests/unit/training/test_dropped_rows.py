"""Images that break, and loader processes that die, while a run reads its rows."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import make_response_rows
from dpo_mm.policies.vlm.chat import ConversationEncoder
from dpo_mm.training import response_rows
from dpo_mm.training.builders import build_policy
from dpo_mm.training.dropped_rows import DroppedRows, rows_of_run
from dpo_mm.training.encoding import encode_splits
from dpo_mm.training.pair_stream import PairStream
from dpo_mm.training.reference import precompute_reference_log_probs
from dpo_mm.training.run import train
from tests.contracts.tiny_vlms import noise_image, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save("llava", tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(response_rows, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))


def pairs(folder: Path, *, truncated: int | None = None) -> str:
    """Write eight pairs with image files. The pixels of one of them may be cut off, which its header does not tell."""
    rows = []
    for n in range(8):
        data = encode_png(noise_image(n, (40 + n, 50)))
        (folder / f"{n}.png").write_bytes(data[: len(data) // 2] if n == truncated else data)
        image = {"bytes": None, "path": str(folder / f"{n}.png")}
        texts = {"chosen": "a red square on a blue field", "rejected": "a red circle" if n % 2 else "a square"}
        rows.append({"id": f"r{n}", "images": [image], "prompt": f"describe the picture {'red ' * n}", **texts})
    make_response_rows(rows).to_parquet(str(folder / "pairs.parquet"))
    return str(folder / "pairs.parquet")


def config(model: str, rows: str, folder: Path, **more: Any) -> TrainConfig:
    given = {"beta": 0.1, "steps": 4, "batch_size": 4, "eval_fraction": 0.0, "learning_rate": 1e-2, "log_every": 1}
    return TrainConfig(model=model, pairs=rows, output_dir=str(folder), **{**given, **more})


def ids(rows: Any) -> list[str]:
    return [rows[number]["id"] for number in range(len(rows))]


def test_dropped_row_is_replaced_in_every_process_and_stays_dropped(model: str, tmp_path: Path) -> None:
    settings = config(model, pairs(tmp_path), tmp_path / "run", undecodable_images="drop")
    policy = build_policy(settings)
    splits = encode_splits(policy, settings)
    dropped, of_another_process = (
        DroppedRows(tmp_path / "run", "drop", splits.row_digests),
        DroppedRows(tmp_path / "run", "drop"),
    )
    rows, others = rows_of_run(splits.rows, dropped), rows_of_run(splits.rows, of_another_process)
    assert ids(rows) == ids(others) == [f"r{n}" for n in range(8)]
    images = [(tmp_path / f"{n}.png").read_bytes() for n in (2, 3)]
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes(images[1][:60])
    with pytest.raises(ValueError, match=r"^row r3 of .*pairs.parquet: image 0 does not decode \(.*3\.png: .*\)\. Fix"):
        rows_of_run(splits.rows, DroppedRows(tmp_path / "run", "raise"))[3]
    expected = ["r0", "r1", "r4", "r4", "r4", "r5", "r6", "r7"]
    assert ids(rows) == expected
    for n, data in zip((2, 3), images, strict=True):
        (tmp_path / f"{n}.png").write_bytes(data)
    assert ids(rows) == ids(others) == expected
    listed = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["row"] for line in listed] == ["r2", "r3"]
    assert all(f"{n}.png" in line["reason"] for n, line in zip((2, 3), listed, strict=True))
    assert [len(record["digests"]) for record in dropped.records()] == [1, 1]
    assert ids(encode_splits(policy, settings).rows) == [f"r{n}" for n in range(8)]
    assert not (tmp_path / "run" / "quarantine.jsonl").exists(), "a new run begins without dropped rows"


def test_reference_of_a_replaced_row_is_its_own(model: str, tmp_path: Path) -> None:
    """Catches log-probs by place: r2 breaks after they were computed, and r6 before."""
    settings = config(
        model, pairs(tmp_path, truncated=6), tmp_path / "run", undecodable_images="drop", reference="precomputed"
    )
    policy = build_policy(settings)
    splits = encode_splits(policy, settings)
    policy.prepare(settings)
    dropped = DroppedRows(tmp_path / "run", "drop", splits.row_digests)
    stored = precompute_reference_log_probs(policy, PairStream(splits.rows, 0, 8, num_fixed_draws=1), settings, dropped)
    own = {f"r{n}": float(stored.chosen[n, 0]) for n in range(8)}
    (tmp_path / "2.png").unlink()
    found = [(row["id"], float(row["reference_chosen"])) for row in rows_of_run(stored, dropped)]
    assert [name for name, _ in found] == ["r0", "r1", "r3", "r3", "r4", "r5", "r7", "r7"]
    assert all(own[name] == value for name, value in found) and len(set(own.values())) == 8
    (tmp_path / "run" / "quarantine.jsonl").unlink()
    rows = rows_of_run(stored, DroppedRows(tmp_path / "run", "drop"))
    assert rows[6]["id"] == "r7", (
        "its log-probs are not known, so it is dropped by a run that reads them from the cache"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "more"), [(0, {}), (2, {"reference": "precomputed"})])
def test_resumed_run_has_the_same_rows(model: str, tmp_path: Path, workers: int, more: dict[str, Any]) -> None:
    """The broken image is whole again, or gone, when the run is resumed."""
    rows = pairs(tmp_path, truncated=2)
    settings = config(model, rows, tmp_path / "whole", undecodable_images="drop", workers=workers, **more)
    whole = train(settings)
    cut = dataclasses.replace(settings, output_dir=str(tmp_path / "cut"), save_every=2)
    train(dataclasses.replace(cut, steps=2))
    record = json.loads((tmp_path / "cut" / "checkpoint-2" / "dpo_mm.json").read_text())
    assert [entry["row"] for entry in record["dropped_rows"]] == ["r2"]
    (tmp_path / "2.png").unlink()
    if workers:
        (tmp_path / "2.png").write_bytes(encode_png(noise_image(2, (42, 50))))
    resumed = train(dataclasses.replace(cut, resume=True))
    assert '"row": "r2"' in (tmp_path / "cut" / "quarantine.jsonl").read_text()
    one, other = (load_file(run.folder / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    train(dataclasses.replace(cut, resume=False))  # finished: its pairs count as unchanged
    (tmp_path / "3.png").write_bytes(encode_png(noise_image(99, (43, 50))))
    with pytest.raises(ValueError, match=r"pairs\.parquet has changed since"):
        train(dataclasses.replace(cut, resume=True, steps=6))


@pytest.mark.slow
def test_error_or_death_of_a_loader_process_is_one_line_with_the_row(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(model, pairs(tmp_path, truncated=5), tmp_path / "run", workers=2)
    with pytest.raises(ValueError, match=r"^row r5 of .*5\.png: [^\n]*$"):
        train(settings)
    encode_row = ConversationEncoder.encode_row

    def die(encoder: ConversationEncoder, row: Any) -> Any:
        if row["id"] == "r3" and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_row(encoder, row)

    monkeypatch.setattr(ConversationEncoder, "encode_row", die)
    settings = config(model, pairs(tmp_path), tmp_path / "run", workers=1)
    with pytest.raises(
        ChildProcessError, match=r"^a process that loads rows \(pid \d+\) was killed while it read row r3 of [^\n]*$"
    ):
        train(settings)

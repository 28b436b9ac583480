"""Vision features on disk: several processes and interrupted runs share the work, and changed bytes are not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_mm.config import TrainConfig
from dpo_mm.files.content_key import content_hash
from dpo_mm.policies.families import load_policy
from dpo_mm.process import process_rank
from dpo_mm.training import feature_cache
from dpo_mm.training.dropped_rows import DroppedRows
from dpo_mm.training.feature_cache import FeatureRows, cache_vision_features
from dpo_mm.training.tensor_shards import read_value, write_values
from tests.contracts.tiny_vlms import rows, save


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(feature_cache, "ROWS_PER_SHARD", 2)
    monkeypatch.setattr(process_rank, "WAIT_TIMEOUT_S", 0.3)
    policy: Any = load_policy(save("llava", tmp_path / "model"))
    policy.vision_trains = False
    return policy


class Counted:
    """Encoded rows. It records which are read, and reading row `broken` fails as often as it is tried."""

    def __init__(self, encoded: list[Any], broken: int | None = None) -> None:
        self.encoded, self.broken, self.read = encoded, broken, []
        self.lengths, self.content_digest = [3] * len(encoded), "digest"

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, number: int) -> Any:
        self.read.append(number)  # type: ignore[attr-defined]
        if number == self.broken:
            raise KeyboardInterrupt
        return self.encoded[number]


def test_processes_share_the_work_and_an_interrupted_pass_continues(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = policy.encode(rows("llava", (1, 2, 1, 1, 2)))
    config = TrainConfig("m", "p", str(tmp_path / "run"))

    def cached(source: Counted, rank: int = 0, count: int = 1) -> FeatureRows:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))
        return cache_vision_features(policy, source, config, tmp_path, DroppedRows(tmp_path, "raise"))

    with pytest.raises(KeyboardInterrupt):
        cached(Counted(encoded, broken=3))
    second = Counted(encoded)
    with pytest.raises(ValueError, match=r"rows-00002\.safetensors has not come"):
        cached(second, rank=1, count=2)
    assert second.read == [2, 3], "the first shard is complete, the third is the other process's"
    first = Counted(encoded)
    found = cached(first, rank=0, count=2)
    assert first.read == [4]
    for number, row in enumerate(policy.cache_vision_features(encoded)):
        assert found[number].keys() == row.keys() and "pixel_values" not in found[number]["images"]
        assert content_hash(found[number]) == content_hash(row)
    assert found.lengths == [3] * 5 and not cached(again := Counted(encoded)).rows.read and not again.read
    policy.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert cached(other := Counted(encoded)).paths[0] != found.paths[0] and other.read == list(range(5))


def test_changed_bytes_are_removed_and_named(tmp_path: Path) -> None:
    path = tmp_path / "rows-00000.safetensors"
    value = {"id": "a", "parts": [torch.ones(3, dtype=torch.bfloat16), {"empty": torch.zeros(0)}], "p": 0.5, "no": None}
    write_values(path, ["a line", value])
    assert read_value(path, 0) == "a line"
    assert content_hash(read_value(path, 1)) == content_hash(value)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    read_value.__globals__["_open"].cache_clear()  # as in a new process
    with pytest.raises(
        ValueError, match=r"rows-00000\.safetensors is missing or has changed .* Run the same command again"
    ):
        read_value(path, 1)
    assert not path.exists()

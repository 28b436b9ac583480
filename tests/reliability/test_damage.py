"""A damaged or half-deleted file of stored work is made again, or named with the fix. It is never a decoding error."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpo_mm.files.checksums import is_intact, write_with_checksum
from dpo_mm.files.outputs import OutputKind, output_folder
from dpo_mm.sources.importing import import_set
from dpo_mm.training import arrow_shards
from tests.conftest import noise_image

Harm = Callable[[Path], object]
HARMS: dict[str, Harm] = {
    "random": lambda path: path.write_bytes(random.Random(0).randbytes(200)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[1, 2]", encoding="utf-8"),
}


@pytest.fixture
def imported(tmp_path: Path) -> Callable[[], Path]:
    """Function that imports two pairs, or continues the import, and returns its folder."""
    raw = tmp_path / "raw"
    raw.mkdir()
    noise_image(0).save(raw / "0.png")
    rows = "".join(f"{n},a cat,0.png,0.png,a\n" for n in range(2))
    (raw / "labels.csv").write_text(f"id,prompt,image_a,image_b,preference\n{rows}", encoding="utf-8")
    return lambda: import_set("custom-images", str(raw), str(tmp_path / "out")).folder


@pytest.mark.parametrize("harm", [*HARMS, "another object"])
def test_damaged_record_of_an_import_is_named(harm: str, imported: Callable[[], Path]) -> None:
    """Mutation that it catches: an entry of import.json that is not known ends in a traceback."""
    record = imported() / "import.json"
    if harm == "another object":
        record.write_text('{"kind": "an imported dataset", "settings": {}, "left": 1}', encoding="utf-8")
    else:
        HARMS[harm](record)
    with pytest.raises(ValueError, match=rf"{record} is damaged.*Remove {record.parent} and import again"):
        imported()


def test_damaged_shard_of_a_finished_import_is_named(imported: Callable[[], Path]) -> None:
    """Mutation that it catches: the import is called finished, and its shard is gone."""
    shard = imported() / "part-00000.parquet"
    HARMS["truncated"](shard)
    with pytest.raises(ValueError, match=f"{shard} has changed since it was written"):
        imported()
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard} is missing. Import again with --overwrite"):
        imported()


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_record_of_settings_is_named(harm: str, tmp_path: Path) -> None:
    """Mutation that it catches: the record itself is called a file that dpo-mm did not make."""
    kind, settings = OutputKind("mining.json", done="mined"), {"seed": 1}
    with output_folder(tmp_path / "out", kind, settings):
        (tmp_path / "out" / "shard-00000.parquet").touch()
    HARMS[harm](tmp_path / "out" / "mining.json")
    message = (
        f"Choose another output_dir, or restore {tmp_path / 'out' / 'mining.json'} if it is of dpo-mm: it is damaged"
    )
    with pytest.raises(ValueError, match=message), output_folder(tmp_path / "out", kind, settings):
        pass


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["shard-0", ".shard-0.checksum"])
def test_damaged_shard_or_checksum_is_not_intact(harm: str, name: str, tmp_path: Path) -> None:
    """Mutation that it catches: a checksum that is not text ends in a decoding error."""
    with write_with_checksum(tmp_path / "shard-0") as temporary:
        temporary.write_bytes(bytes(100))
    assert is_intact(tmp_path / "shard-0")
    HARMS[harm](tmp_path / name)
    assert not is_intact(tmp_path / "shard-0")


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("harm", [*HARMS, "deleted"])
def test_damaged_shard_of_an_encoded_cache_without_its_list_is_removed(harm: str, file: str, tmp_path: Path) -> None:
    """Mutation that it catches: complete.json is gone too, and listing the shards ends in the error of a library."""
    columns = {"id": ["a", "b"], "mean": torch.zeros(2, 3)}
    for number in range(2):
        arrow_shards.write_shard(tmp_path / f"pairs-0000{number}", {"8x8": columns})
    path = tmp_path / "pairs-00001" / "8x8" / file
    path.unlink() if harm == "deleted" else HARMS[harm](path)
    try:
        parts = list(arrow_shards.list_parts(tmp_path, "pairs"))
        rows = arrow_shards.Shards(tmp_path, parts)
        assert [rows[number]["id"] for number in range(len(rows))] == ["a", "b"] * 2  # the file does not matter
    except ValueError as error:
        assert f"{tmp_path / 'pairs-00001'} has changed" in str(error) and "Run the same command again" in str(error)
        assert [path.name for path in tmp_path.iterdir()] == ["pairs-00000"]

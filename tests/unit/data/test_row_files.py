"""Parquet files that are too large for memory are mapped from a copy in the cache."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_mm.data import row_files
from dpo_mm.data.row_files import open_rows
from dpo_mm.data.schema import load_pairs, make_image_rows
from dpo_mm.doctor.loading import load_dataset
from tests.conftest import rows


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(row_files, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))


def write(path: Path, count: int) -> str:
    pq.write_table(
        make_image_rows(rows(count)).data.table, path, write_page_checksum=True, compression="none", row_group_size=3
    )
    return str(path)


def test_mapped_rows_equal_the_rows_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "p.parquet", 8)
    mapped, again = load_pairs(path), load_pairs(path)
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 1
    monkeypatch.setattr(row_files, "MAX_BYTES_IN_MEMORY", 2**30)
    in_memory = load_pairs(path)
    assert mapped.features == in_memory.features
    assert mapped.with_format("arrow")[:].equals(in_memory.with_format("arrow")[:])
    assert again["id"] == in_memory["id"] and mapped[3]["image_a"].tobytes() == in_memory[3]["image_a"].tobytes()


def test_files_whose_columns_differ_are_joined(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"id": ["a"], "n": [1]}), tmp_path / "folder" / "1.parquet")
    pq.write_table(pa.table({"n": [2], "more": ["x"]}), tmp_path / "folder" / "2.parquet")
    assert open_rows(str(tmp_path / "folder")).to_dict() == {"id": ["a", None], "n": [1, 2], "more": [None, "x"]}


def test_rows_of_a_folder_with_mined_pairs_are_read_once(tmp_path: Path) -> None:
    """Mutation: read the shards too."""
    for name in ("shard-00000.parquet", "mining.json"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="was interrupted"):
        open_rows(str(tmp_path))
    write(tmp_path / "pairs.parquet", 3)
    write(tmp_path / "shard-00000.parquet", 3)
    assert len(open_rows(str(tmp_path))) == 3
    assert load_dataset(str(tmp_path)).num_rows == 3


def test_table_of_a_spreadsheet_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("prompt\timage_a\timage_b\tpreference\n")
    with pytest.raises(ValueError, match=r"p.tsv: tables in this format are not read. Save it as CSV with commas"):
        open_rows(str(tmp_path / "p.tsv"))


def test_changed_file_is_copied_again_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", 4)
    assert len(load_pairs(path)) == 4
    write(tmp_path / "p.parquet", 5)
    assert len(load_pairs(path)) == 5
    data = bytearray(Path(path).read_bytes())
    data[data.index(b"\x89PNG") + 100] ^= 1
    Path(path).write_bytes(data)
    with pytest.raises(ValueError, match=r"p.parquet: not readable as Parquet"):
        load_pairs(path)


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="Set DPO_MM_CACHE to a folder that you can write"):
        load_pairs(write(tmp_path / "p.parquet", 4))

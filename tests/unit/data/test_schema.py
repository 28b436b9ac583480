from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from dpo_mm.data.schema import drop_ties, load_pairs, make_image_rows, split_by_prompt
from tests.conftest import rows


def table(some: list[dict[str, Any]], path: Path) -> str:
    Dataset.from_list(some).to_parquet(str(path))
    return str(path)


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    given = rows(4)
    make_image_rows(given).to_parquet(str(tmp_path / "p.parquet"))
    found = load_pairs(str(tmp_path / "p.parquet"))
    assert found["id"] == [row["id"] for row in given]
    assert found["preference"] == ["a", "b", "a", "b"]
    assert found[0]["image_a"].size == (32, 32)
    assert load_pairs(str(tmp_path))["id"] == found["id"]


def test_plain_columns_are_enough(tmp_path: Path) -> None:
    plain = [{k: v for k, v in row.items() if k in ("prompt", "image_a", "image_b", "preference")} for row in rows(3)]
    found = load_pairs(table(plain, tmp_path / "p.parquet"))
    assert list(found["id"]) == ["0", "1", "2"] and found[0]["p_a"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row: {("imageA" if k == "image_a" else k): v for k, v in row.items()},
            r"'image_a' is missing.*is it 'imageA'",
        ),
        (
            lambda row: {**row, "preference": "left"},
            r"row 0: preference is 'left'; expected one of a, b, tie, both_bad",
        ),
    ],
)
def test_wrong_rows_are_named(change: Any, message: str, tmp_path: Path) -> None:
    path = table([change(row) for row in rows(3)], tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=message):
        load_pairs(path)


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    make_image_rows(rows(1)).select([]).to_parquet(str(tmp_path / "p.parquet"))
    with pytest.raises(ValueError, match=r"p\.parquet: the set is empty"):
        load_pairs(str(tmp_path / "p.parquet"))


def test_missing_files_and_other_formats_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        load_pairs(str(tmp_path / "nothing.parquet"))
    with pytest.raises(ValueError, match=r"no \*\.parquet"):
        load_pairs(str(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not readable as Parquet"):
        load_pairs(str(tmp_path / "x.parquet"))


def test_ties_never_become_wins() -> None:
    given = [{**row, "preference": p} for row, p in zip(rows(4), ("a", "tie", "both_bad", "b"), strict=True)]
    assert list(drop_ties(make_image_rows(given))["id"]) == ["row-0", "row-3"]
    with pytest.raises(ValueError, match="none of the 2 pairs has a winner"):
        drop_ties(make_image_rows([{**row, "preference": "tie"} for row in rows(2)]))


def test_unknown_columns_are_refused_when_rows_are_made() -> None:
    with pytest.raises(ValueError, match="'preferred' is not part of ImagePreference"):
        make_image_rows([{**rows(1)[0], "preferred": "a"}])


def test_prompts_are_split_whole() -> None:
    inside, watched = split_by_prompt(make_image_rows(rows(12)), 0.34, seed=0)
    assert watched is not None and len(inside) + len(watched) == 12
    assert not set(inside["prompt"]) & set(watched["prompt"])
    assert split_by_prompt(make_image_rows(rows(12)), 0.1, seed=0)[1] is None

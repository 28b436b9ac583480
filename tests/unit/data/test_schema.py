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


def test_load_pairs_returns_the_rows_that_were_saved(tmp_path: Path) -> None:
    original = rows(4)
    make_image_rows(original).to_parquet(str(tmp_path / "p.parquet"))
    loaded = load_pairs(str(tmp_path / "p.parquet"))
    assert loaded["id"] == [row["id"] for row in original]
    assert loaded["preference"] == ["a", "b", "a", "b"]
    assert loaded[0]["image_a"].size == (32, 32)
    assert load_pairs(str(tmp_path))["id"] == loaded["id"]


def test_load_pairs_required_columns_are_enough(tmp_path: Path) -> None:
    plain = [{k: v for k, v in row.items() if k in ("prompt", "image_a", "image_b", "preference")} for row in rows(3)]
    loaded = load_pairs(table(plain, tmp_path / "p.parquet"))
    assert list(loaded["id"]) == ["0", "1", "2"] and loaded[0]["p_a"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row: {("imageA" if k == "image_a" else k): v for k, v in row.items()},
            r"'image_a' is missing.*Is it 'imageA'",
        ),
        (
            lambda row: {**row, "preference": "left"},
            r"row 0: preference is 'left'. Expected one of a, b, tie, both_bad",
        ),
    ],
)
def test_load_pairs_bad_row_is_named_in_the_error(change: Any, message: str, tmp_path: Path) -> None:
    path = table([change(row) for row in rows(3)], tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=message):
        load_pairs(path)


def test_load_pairs_empty_dataset_is_refused(tmp_path: Path) -> None:
    make_image_rows(rows(1)).select([]).to_parquet(str(tmp_path / "p.parquet"))
    with pytest.raises(ValueError, match=r"p\.parquet: the dataset is empty"):
        load_pairs(str(tmp_path / "p.parquet"))


def test_load_pairs_missing_or_other_file_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        load_pairs(str(tmp_path / "nothing.parquet"))
    with pytest.raises(ValueError, match=r"no \*\.parquet"):
        load_pairs(str(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not readable as Parquet"):
        load_pairs(str(tmp_path / "x.parquet"))


def test_ties_never_become_wins() -> None:
    original = [{**row, "preference": p} for row, p in zip(rows(4), ("a", "tie", "both_bad", "b"), strict=True)]
    assert list(drop_ties(make_image_rows(original))["id"]) == ["row-0", "row-3"]
    with pytest.raises(ValueError, match="none of the 2 pairs has a winner"):
        drop_ties(make_image_rows([{**row, "preference": "tie"} for row in rows(2)]))


def test_make_image_rows_unknown_column_is_refused() -> None:
    with pytest.raises(ValueError, match="'preferred' is not part of ImagePreference"):
        make_image_rows([{**rows(1)[0], "preferred": "a"}])


def test_split_by_prompt_shares_no_prompt() -> None:
    train, evaluation = split_by_prompt(make_image_rows(rows(12)), 0.34, seed=0)
    assert evaluation is not None and len(train) + len(evaluation) == 12
    assert not set(train["prompt"]) & set(evaluation["prompt"])
    assert split_by_prompt(make_image_rows(rows(12)), 0.1, seed=0)[1] is None

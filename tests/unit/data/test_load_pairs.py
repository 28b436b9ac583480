from __future__ import annotations

import pytest

from dpo_mm.data.load_pairs import data_columns
from dpo_mm.data.schema import make_image_rows
from tests.conftest import rows


def test_a_rows_own_probability_counts_before_its_votes() -> None:
    """Catches votes that are preferred over p_a, votes counted for the wrong side, and a default where both are missing."""
    labels = [
        {"preference": "a", "p_a": 0.9, "votes_a": 1, "votes_b": 3},
        {"preference": "b", "p_a": 0.2, "votes_a": 9, "votes_b": 1},
        {"preference": "a", "p_a": None, "votes_a": 3, "votes_b": 1},
        {"preference": "b", "p_a": None, "votes_a": 1, "votes_b": 4},
    ]
    pairs = [{**row, **label} for row, label in zip(rows(4), labels, strict=True)]
    assert data_columns(make_image_rows(pairs))["probability"] == pytest.approx([0.9, 0.8, 0.75, 0.8])
    pairs[0] |= {"p_a": None, "votes_a": 0, "votes_b": 0}
    assert "probability" not in data_columns(make_image_rows(pairs))

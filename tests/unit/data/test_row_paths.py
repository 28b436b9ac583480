from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from dpo_mm.data.row_paths import confine_rows

CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
BYTES, PATH = {"bytes": b"x" * 1000, "path": "a.png"}, {"bytes": None, "path": "a.png"}
CONTENT = pa.list_(pa.struct([("type", pa.string()), ("image", CELL)]))


def dataset(name: str, cells: list[Any], kind: pa.DataType) -> Dataset:
    return Dataset(pa.table({name: pa.array(cells, kind)}))


@pytest.mark.parametrize(
    ("name", "cell", "kind"),
    [
        ("image_a", BYTES, CELL),
        ("images", [BYTES, BYTES], pa.list_(CELL)),
        ("prompt", [{"type": "image", "image": BYTES}], CONTENT),
        ("prompt", "text", pa.string()),
    ],
)
def test_rows_without_a_path_are_not_copied(name: str, cell: Any, kind: pa.DataType) -> None:
    """A dataset of many gigabytes remains mapped from disk. Catches a rebuilt column, whose images would be in memory."""
    rows = dataset(name, [cell, None, cell], kind)
    before = pa.total_allocated_bytes()
    confined = confine_rows(rows, Path("/data"))
    assert confined is rows and pa.total_allocated_bytes() - before < 1000


@pytest.mark.parametrize(
    ("name", "cell", "kind", "expected"),
    [
        ("image_a", PATH, CELL, {"bytes": None, "path": "/data/./a.png"}),
        ("images", [BYTES, PATH], pa.list_(CELL), [BYTES, {"bytes": None, "path": "/data/./a.png"}]),
        ("images", ["a.png"], pa.list_(pa.string()), ["/data/./a.png"]),
        ("image", "a.png", pa.string(), "/data/./a.png"),
        (
            "prompt",
            [{"type": "image", "image": PATH}],
            CONTENT,
            [{"type": "image", "image": {"bytes": None, "path": "/data/./a.png"}}],
        ),
        ("other", {"bytes": 0, "path": "a.png"}, pa.struct([("bytes", pa.int64()), ("path", pa.string())]), None),
    ],
)
def test_path_at_any_depth_is_marked_with_the_folder(name: str, cell: Any, kind: pa.DataType, expected: Any) -> None:
    confined = confine_rows(dataset(name, [cell], kind), Path("/data"))[0][name]
    assert confined == (expected or {"bytes": 0, "path": "/data/./a.png"})

"""Text files are read by their first bytes: compressed, in UTF-16, with a byte order mark."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_mm.data.prompts import read_prompts
from dpo_mm.data.questions import read_questions
from dpo_mm.data.text_files import read_lines, table_suffix
from dpo_mm.sources.raw_rows import find_origin, raw_rows

LINES = ["a cat\u2028on a mat", "a dog\u0085in fog", "é"]
TEXT = "".join(f"{line}\r\n" for line in LINES)
CONTENT = {
    "plain": TEXT.encode(),
    "mark": TEXT.encode("utf-8-sig"),
    "utf-16": TEXT.encode("utf-16"),
    "gzip": gzip.compress(TEXT.encode()),
    "zstd": pa.compress(TEXT.encode(), "zstd", asbytes=True),
    "gzip of utf-16": gzip.compress(TEXT.encode("utf-16")),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_read_lines_is_the_same_for_every_encoding(kind: str, tmp_path: Path) -> None:
    """Catches str.splitlines, a byte order mark in the first line, and bytes of a compressed file as text."""
    (tmp_path / "p.txt").write_bytes(CONTENT[kind])
    assert read_lines(tmp_path / "p.txt") == LINES
    assert read_prompts(str(tmp_path / "p.txt")) == LINES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"a" * 1000, mtime=0)[:-9], "its compressed content is damaged"),
        (b"\x28\xb5\x2f\xfd" + bytes(range(64)), "its compressed content is damaged"),
        (b"caf\xe9\n", "not UTF-8 text"),
    ],
    ids=["gzip", "zstd", "latin-1"],
)
def test_read_lines_names_a_file_that_is_not_text(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"p.txt: {message}"):
        read_lines(tmp_path / "p.txt")


def test_compressed_json_lines_are_rows_and_questions(tmp_path: Path) -> None:
    """Catches suffixes of the compression that hide the format and the split."""
    rows = "".join(json.dumps({"prompt": line, "ground_truth": "x"}, ensure_ascii=False) + "\n" for line in LINES)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "test.jsonl.zst").write_bytes(pa.compress(rows.encode()[:40], "zstd", asbytes=True))
    origin = find_origin(str(tmp_path), split="train", patterns=(), whole=False)
    assert [row["prompt"] for row in raw_rows(origin)] == LINES
    assert [question.prompt for question in read_questions(str(tmp_path / "train.jsonl.gz"))] == LINES
    assert table_suffix(Path("a.csv.gz")) == ".csv" and table_suffix(Path("a.b.parquet")) == ".parquet"

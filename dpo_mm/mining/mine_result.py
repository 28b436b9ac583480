"""Result of mining: the file with the pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpo_mm.printing.notebook_html import table_of_values
from dpo_mm.printing.printed_text import quoted


@dataclass(frozen=True)
class MineResult:
    """The Parquet file with the mined pairs. It does not exist while other processes have unfinished shards."""

    path: Path

    @property
    def pairs(self) -> int:
        """Number of pairs, 0 if the file does not exist yet."""
        import pyarrow.parquet as pq

        return int(pq.read_metadata(self.path).num_rows) if self.path.exists() else 0

    def __repr__(self) -> str:
        return f"MineResult({str(self.path)!r}, {self.pairs} pairs)"

    def _repr_html_(self) -> str:
        command = f"dpo-mm train CONFIG.yaml --pairs {quoted(self.path)}"
        return table_of_values("Mined pairs", {"file": self.path, "pairs": f"{self.pairs:,}", "next": command})

"""Which judges made the pairs that an adapter was trained on: they may stand in its report, but not at its head.

A tuned model has learned what pleases the judge that chose its pairs, with all that the judge gets wrong; so a learned
judge is no witness for a model that it taught. A judge by rule (it counts, runs or compares, nothing in it is learned)
may be one, on other prompts, and is marked. A set says it itself: mined rows name their judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from dpo_mm.assets import resolve_asset
from dpo_mm.judges import JUDGES, load_judge, parse_judge_name

MADE = re.compile(r"\b(?:(?:mined|relabelled|judged) (?:with|by)|guarded by) ([^,]+)")
CARD_KEY = "pairs_made_by"


def training_judges_of(pairs: str) -> tuple[str, ...]:
    """Names of the judges that made a preference set, as its rows' `source` and `axis` have them.

    Empty for votes of people, for a set that is not a Parquet file (or a folder of them) here, and where none is named.
    """
    import pyarrow.parquet as pq

    path = Path(resolve_asset(pairs))
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    found: dict[str, None] = {}
    for file in files:
        try:
            opened = pq.ParquetFile(file)
        except Exception:  # whatever reads the pairs says what is wrong with them
            return ()
        columns = [name for name in ("source", "axis") if name in opened.schema_arrow.names]
        for batch in opened.iter_batches(columns=columns) if "source" in columns else ():
            rows = {(row["source"] or "", row.get("axis") or "") for row in batch.to_pylist()}
            found |= dict.fromkeys(name for row in sorted(rows) for name in _named(*row))
    return tuple(found)


def _named(source: str, axis: str) -> list[str]:
    if source.startswith("own failures") and axis:
        return [axis]
    return [name for names in MADE.findall(source) for name in names.split("+")]


def made_by(adapter: str | None) -> tuple[str, ...]:
    """Names of the judges that made an adapter's training pairs: what its card says, else what the set that it names says."""
    folder = Path(adapter or "")
    if adapter is None or not folder.is_dir():
        return ()
    card = folder / "README.md"
    if card.is_file():
        front = card.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---\n")[0]
        try:
            said = yaml.safe_load(front)
        except yaml.YAMLError:
            said = None
        if isinstance(said, dict) and CARD_KEY in said:
            return tuple(str(name) for name in said[CARD_KEY] or ())
    settings = folder / "dpo_mm.json"
    return training_judges_of(json.loads(settings.read_text()).get("pairs") or "") if settings.is_file() else ()


def by_rule(name: str) -> bool:
    """Whether nothing in a judge is learned: one of JUDGES without a model, or a function whose attribute `by_rule` says so."""
    found = parse_judge_name(name)
    if found:
        return not JUDGES[found.judge].opens
    return bool(getattr(load_judge(name), "by_rule", False))


def order_judges(judges: Sequence[str], made: Iterable[str]) -> tuple[str, ...]:
    """The judges, before all others the first that may be the headline: it did not make the pairs, or judges by rule.

    Raises ValueError where none may.
    """
    taught = set(made)
    head = next((name for name in judges if name not in taught or by_rule(name)), None)
    if head is None:
        raise ValueError(
            f"judges: {', '.join(judges)} made the training pairs, so none can be the headline; add one that did not, "
            "or say `by_rule = True` on a function in which nothing is learned"
        )
    return (head, *(name for name in judges if name != head))

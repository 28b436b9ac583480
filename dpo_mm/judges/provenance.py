"""Judges that built the training pairs of an adapter: allowed in its report, but not as the primary metric if learned.

A tuned model has learned to raise the score of the judge that chose its pairs, including that judge's errors. So a
learned judge gives no independent evidence for a model that was trained on its choices. A rule-based judge (it counts,
runs or compares, and no part of it is learned) can be the primary metric on other prompts, and the report marks it.
Mined rows name their judge, so the dataset itself contains the information.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from dpo_mm.assets import BUNDLED, resolve_asset
from dpo_mm.data.row_paths import is_regular
from dpo_mm.errors import name_row
from dpo_mm.judges import JUDGES, load_judge, parse_judge_name, takes_questions

BUILT_BY = re.compile(r"\b(?:(?:mined|relabelled|judged) (?:with|by)|guarded by) ([^,]+)")
CARD_KEY = "pairs_made_by"


def training_judges_of(pairs: str) -> tuple[str, ...]:
    """Names of the judges that built a preference dataset, from the columns `source` and `axis`.

    Empty for human votes, for a dataset that is not a local Parquet file or a folder of them, and if no row names a judge.
    """
    import pyarrow.parquet as pq

    path = Path(resolve_asset(pairs))
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    judges: dict[str, None] = {}
    for file in files:
        try:
            parquet = pq.ParquetFile(file)
        except Exception:  # load_pairs reports what is wrong with the file
            return ()
        columns = [name for name in ("source", "axis") if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(columns=columns) if "source" in columns else ():
            rows = {(row["source"] or "", row.get("axis") or "") for row in batch.to_pylist()}
            judges |= dict.fromkeys(name for row in sorted(rows) for name in _judges_in_row(*row))
    return tuple(judges)


def _judges_in_row(source: str, axis: str) -> list[str]:
    if source.startswith("own failures") and axis:
        return [axis]
    return [name for names in BUILT_BY.findall(source) for name in names.split("+")]


def training_judges_of_adapter(adapter: str | None) -> tuple[str, ...]:
    """Names of the judges that built an adapter's training pairs.

    They come from the adapter's model card, or else from the dataset that the adapter names, if it is bundled or in the
    adapter's folder. Other files are not opened, because an adapter may come from somebody else.
    """
    folder = Path(adapter or "")
    if adapter is None or not folder.is_dir():
        return ()
    card = folder / "README.md"
    if is_regular(card, folder):
        front_matter = card.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---\n")[0]
        try:
            metadata = yaml.safe_load(front_matter)
        except yaml.YAMLError:
            metadata = None
        if isinstance(metadata, dict) and CARD_KEY in metadata:
            names = metadata[CARD_KEY]
            return tuple(str(name) for name in names) if isinstance(names, list) else ()
    settings = folder / "dpo_mm.json"
    if not is_regular(settings, folder):
        return ()
    with name_row(str(settings), "Train the adapter again, or remove this file"):
        pairs = json.loads(settings.read_text(encoding="utf-8")).get("pairs")
    if not isinstance(pairs, str) or not (pairs in BUNDLED or is_regular(Path(pairs), folder)):
        return ()
    return training_judges_of(pairs)


def is_rule_based(name: str) -> bool:
    """Check if no part of a judge is learned: a judge in JUDGES without a model or with `by_rule`, or a function with `by_rule = True`."""
    parsed = parse_judge_name(name)
    if parsed:
        return not JUDGES[parsed.judge].needs_model or JUDGES[parsed.judge].by_rule
    return bool(getattr(load_judge(name), "by_rule", False))


def built_pairs(name: str, training_judges: Iterable[str]) -> bool:
    """Check if a judge built the training pairs. A model on a server counts at each address and for each of its judges."""
    return _identity(name) in {_identity(judge) for judge in training_judges}


def _identity(name: str) -> tuple[str, str]:
    parsed = parse_judge_name(name)
    return ("model on a server", parsed.model) if parsed and takes_questions(name) else (name, "")


def order_judges(judges: Sequence[str], training_judges: Iterable[str]) -> tuple[str, ...]:
    """Order the judges so that the first is allowed as the primary metric.

    A judge is allowed if it did not build the training pairs, or is rule-based.

    Raises:
        ValueError: if no judge is allowed.
    """
    built = tuple(training_judges)
    primary = next((name for name in judges if not built_pairs(name, built) or is_rule_based(name)), None)
    if primary is None:
        raise ValueError(
            f"judges: {', '.join(judges)} built the training pairs, so none of them can be the primary metric. Add a "
            "judge that did not, or set `by_rule = True` on a function with no learned part."
        )
    return (primary, *(name for name in judges if name != primary))

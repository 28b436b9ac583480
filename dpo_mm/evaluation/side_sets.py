"""Side sets of a comparison: base and tuned on further prompts or questions, tested together with the primary ones.

All metrics with a better direction, of the primary and of the side sets, share one correction by Holm. If the primary metric is
better and a metric of a side set is worse, the verdict is "better here, worse elsewhere".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from dpo_mm.config import CompareConfig, CompareResponsesConfig
from dpo_mm.evaluation.statistics import Comparison, holm_corrected
from dpo_mm.evaluation.verdict import interval_text
from dpo_mm.judges import better_of

C = TypeVar("C", bound=CompareConfig | CompareResponsesConfig)
S = TypeVar("S")


def source_of(config: CompareConfig | CompareResponsesConfig) -> str:
    """Return the name of a comparison's prompts or questions."""
    return config.questions if isinstance(config, CompareResponsesConfig) else config.prompts


def side_configs(config: C) -> list[C]:
    """Return the settings of the comparison on each side set.

    Raises:
        ValueError: if a set is compared twice, or no judge of a set has a better direction.
    """
    names = [source_of(config)]
    configs: list[C] = []
    for side in config.side_sets:
        values: dict[str, Any] = {name: value for name, value in vars(side).items() if value is not None}
        values["side_sets"] = ()
        values["judges"] = side.judges or (config.judges[0], *getattr(config, "guards", config.judges[1:]))
        if isinstance(config, CompareResponsesConfig):
            values["guards"] = ()
        configs.append(dataclasses.replace(config, **values))
        name = source_of(configs[-1])
        if name in names:
            raise ValueError(f"side_sets: {name} is compared twice. Name it once, with all of its judges")
        names.append(name)
        if all(better_of(judge) == "neutral" for judge in values["judges"]):
            raise ValueError(
                f"side_sets: {name} has only judges without a better direction ({', '.join(values['judges'])}), so it cannot "
                "get worse. Add another judge"
            )
    return configs


def judges_of(config: CompareConfig | CompareResponsesConfig) -> list[str]:
    """Return the names of all judges of a comparison, those of its side sets included."""
    return list(dict.fromkeys([*config.judges, *(judge for side in config.side_sets for judge in side.judges)]))


def name_side_sets(config: CompareConfig | CompareResponsesConfig) -> dict[str, str]:
    """Return the line of a report's settings that names the side sets, empty without one."""
    sets = [f"{source_of(side)} ({', '.join(side.judges)})" for side in side_configs(config)]
    return {"side sets": "; ".join(sets)} if sets else {}


def read_sets(config: C, read: Callable[[C], S], size: Callable[[S], int]) -> list[tuple[C, S]]:
    """Read the prompts or questions of a comparison and of its side sets, before anything is generated.

    Args:
        config: settings of the comparison.
        read: reads those of one config.
        size: how many distinct ones were read.

    Returns:
        Settings and content, of the comparison itself first, then of each side set.

    Raises:
        ValueError: as `side_configs` and `read`, or if a side set has fewer than 2. The message names the side set.
    """
    sets = [(config, read(config))]
    for side in side_configs(config):
        try:
            content = read(side)
        except ValueError as error:
            raise ValueError(f"side_sets: {error}") from None
        if size(content) < 2:
            raise ValueError(f"side_sets: {source_of(side)} has only one entry. An interval needs 2 or more")
        sets.append((side, content))
    return sets


def with_side_sets(
    primary: Sequence[Comparison], sides: Sequence[tuple[CompareConfig | CompareResponsesConfig, Sequence[Comparison]]]
) -> list[Comparison]:
    """Put the comparisons of side sets after those of the primary set, with p corrected for the number of all of them.

    Args:
        primary: comparisons of base and tuned on the primary set.
        sides: settings and comparisons of each side set. Comparisons by no judge of the settings are left out.
    """
    marked = [
        dataclasses.replace(result, side_set=source_of(config), headline=False)
        for config, results in sides
        for result in results
        if result.judge in config.judges
    ]
    return holm_corrected([*primary, *marked]) if marked else list(primary)


def note_side_sets(comparisons: Sequence[Comparison]) -> list[str]:
    """Name the metrics of side sets that got significantly worse, or report that none did."""
    sides = [result for result in comparisons if result.side_set]
    if not sides:
        return []
    together = sum(result.p_holm is not None and result.direction != "neutral" for result in comparisons)
    worse = [
        f"{result.name} from {result.base:.3f} to {result.tuned:.3f} ({interval_text(result)}, sign test p = "
        f"{result.p_holm:.2g} after Holm)"
        for result in sides
        if result.verdict == "worse"
    ]
    count = len({result.side_set for result in sides})
    tested = f"Corrected for {together} metrics of the primary and the side sets."
    if worse:
        return [f"Worse on side sets: {'; '.join(worse)}. {tested}"]
    return [f"No metric got significantly worse on the {count} side set{'s' * (count > 1)}. {tested}"]

"""A recipe: pairs, training and comparison in one file of settings, and the walk through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.assets import presets_folder
from dpo_mm.config import (
    CompareConfig,
    CompareResponsesConfig,
    MineConfig,
    MineResponsesConfig,
    TrainConfig,
    build,
    read,
)
from dpo_mm.errors import nearest

if TYPE_CHECKING:
    from dpo_mm.evaluation.verdict import Outcome


@dataclass(frozen=True)
class Recipe:
    """What a recipe does, in order: mine (where it says so), train, SFT beside it (where asked for), compare."""

    title: str
    train: TrainConfig
    compare: CompareConfig | CompareResponsesConfig
    mine: MineConfig | MineResponsesConfig | None = None
    baseline: str | None = None


def presets(task: str) -> list[str]:
    """Names of a task's presets."""
    return sorted(path.stem.removeprefix(f"{task}-") for path in presets_folder().glob(f"{task}-*.yaml"))


def read_recipe(task: str, preset: str, given: Mapping[str, str]) -> Recipe:
    """A preset with flags on top. A flag goes to the part that has it: `train.seed` to one, `seed` to all.

    Raises ValueError for an unknown preset or flag, with the nearest one.
    """
    if preset not in presets(task):
        raise ValueError(f"preset {preset!r} of {task} is unknown; {nearest(preset, presets(task))}")
    where = f"{task}-{preset}.yaml"
    values = read(presets_folder() / where)
    output = Path(given.get("output_dir") or values.get("output_dir") or f"runs/{task}")
    baseline = given.get("baseline") or values.get("baseline")
    if baseline not in (None, "sft"):
        raise ValueError(f"baseline {baseline!r} is unknown; expected 'sft'")
    answers = "questions" in values.get("compare", {})
    kinds: dict[str, Any] = {
        "train": TrainConfig,
        "compare": CompareResponsesConfig if answers else CompareConfig,
        "mine": MineResponsesConfig if answers else MineConfig,
    }
    places = {"train": output / "adapter", "compare": output, "mine": output / "mined"}
    flags = {key: value for key, value in given.items() if key not in ("output_dir", "baseline")}
    parts: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name in values:
            own = {**values[name], **_for(name, kind, flags), "output_dir": str(places[name])}
            parts[name] = own
    _refuse_unknown(flags, {name: kinds[name] for name in parts}, where)
    if "mine" in parts:
        parts["train"].setdefault("pairs", str(places["mine"] / "pairs.parquet"))
    parts["compare"].setdefault("adapter", str(places["train"]))
    built = {name: build(kinds[name], own, where=f"{where}: {name}") for name, own in parts.items()}
    return Recipe(title=values.get("title", task), baseline=baseline, **built)


def _for(name: str, kind: Any, flags: Mapping[str, str]) -> dict[str, str]:
    known = {field.name for field in dataclasses.fields(kind)}
    plain = {key: value for key, value in flags.items() if key in known}
    return plain | {key.partition(".")[2]: value for key, value in flags.items() if key.startswith(f"{name}.")}


def _refuse_unknown(flags: Mapping[str, str], kinds: Mapping[str, Any], where: str) -> None:
    known = {field.name for kind in kinds.values() for field in dataclasses.fields(kind)}
    for key in flags:
        part, dot, rest = key.partition(".")
        if key not in known and not (
            dot and part in kinds and rest in {f.name for f in dataclasses.fields(kinds[part])}
        ):
            raise ValueError(f"{where}: {key!r} is not a setting; {nearest(key, known)}")


def run(recipe: Recipe, *, command: str) -> Outcome:
    """Walk through a recipe and show what came of it.

    Raises ValueError for an unknown judge, or where none may be the headline, before anything runs.
    """
    from dpo_mm.judges.provenance import headline_first
    from dpo_mm.training.run import train

    _know_judges(recipe.compare.judges)
    headline_first(recipe.compare.judges, _made(recipe))
    if recipe.mine:
        mine(recipe.mine)
    trained = train(recipe.train)
    beside = train(sft_of(recipe.train)) if recipe.baseline else None
    outcome = compare(
        recipe.compare,
        title=recipe.title,
        command=command,
        baseline=str(beside.folder) if beside else None,
        history=trained.history,
        settings=trained.settings,
        beta=trained.beta,
    )
    show(outcome)
    return outcome


def _made(recipe: Recipe) -> tuple[str, ...]:
    """The judges that make, or made, the pairs of a recipe."""
    from dpo_mm.judges.provenance import judges_of
    from dpo_mm.mining.mine_images import names

    if recipe.mine is None:
        return judges_of(recipe.train.pairs)
    return (*names(recipe.mine.judges), *names(getattr(recipe.mine, "guards", None)))


def mine(config: MineConfig | MineResponsesConfig) -> Path:
    """Pairs from a model's own pictures or answers, as the kind of config says."""
    if isinstance(config, MineResponsesConfig):
        from dpo_mm.mining.mine_responses import mine_answers

        _know_judges([config.judge])
        return mine_answers(config)
    from dpo_mm.mining.mine_images import mine, names

    _know_judges([*names(config.judges), *names(config.guards)])
    return mine(config)


def compare(config: CompareConfig | CompareResponsesConfig, *, beta: float | None = None, **about: Any) -> Outcome:
    """Base against tuned, pictures or answers, as the kind of config says; into the adapter's card too.

    beta: of the training.
    """
    from dpo_mm.training.model_card import add_results

    _know_judges(config.judges)
    if isinstance(config, CompareResponsesConfig):
        from dpo_mm.evaluation.compare_responses import compare_answers

        outcome = compare_answers(config, beta=beta, **about)
    else:
        from dpo_mm.evaluation.compare_images import compare

        outcome = compare(config, **about)
    if config.adapter:
        add_results(config.adapter, outcome.comparisons, verdict=outcome.verdict, command=about.get("command", ""))
    return outcome


def _know_judges(names: Iterable[str]) -> None:
    """Raises ValueError for an unknown judge, before minutes have gone into what it was to judge."""
    from dpo_mm.judges import load_judge

    for name in names:
        load_judge(name)


def sft_of(config: TrainConfig) -> TrainConfig:
    """The cheap baseline: plain fine-tuning on the same chosen side, with the same steps and adapter."""
    return dataclasses.replace(
        config,
        objective="sft",
        objective_kwargs={},
        sft_weight=0.0,
        reference="auto",
        fixed_draws_per_row=0,
        output_dir=f"{config.output_dir}-sft",
    )


def show(outcome: Outcome) -> None:
    """Print a comparison's table, its verdict and where the report is."""
    from rich.console import Console

    from dpo_mm.evaluation.report import terminal_table

    console = Console()
    console.print(terminal_table(outcome.comparisons))
    for note in outcome.notes:
        console.print(note, markup=False, highlight=False)
    print(f"Verdict: {outcome.verdict}\nReport: {outcome.report}")

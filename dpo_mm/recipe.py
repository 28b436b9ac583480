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
)
from dpo_mm.config_parsing import config_from_mapping, known_names, read_yaml, with_field_names
from dpo_mm.errors import did_you_mean

if TYPE_CHECKING:
    from dpo_mm.evaluation.verdict import CompareResult
    from dpo_mm.training.run import TrainResult


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
        raise ValueError(f"preset {preset!r} of {task} is unknown; {did_you_mean(preset, presets(task))}")
    where = f"{task}-{preset}.yaml"
    values = read_yaml(presets_folder() / where)
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
            own = with_field_names(kind, values[name], source=f"{where}: {name}")
            parts[name] = {**own, **_for(name, kind, flags), "output_dir": str(places[name])}
    _refuse_unknown(flags, {name: kinds[name] for name in parts}, where)
    if "mine" in parts:
        parts["train"].setdefault("pairs", str(places["mine"] / "pairs.parquet"))
    parts["compare"].setdefault("adapter", str(places["train"]))
    built = {name: config_from_mapping(kinds[name], own, source=f"{where}: {name}") for name, own in parts.items()}
    return Recipe(title=values.get("title", task), baseline=baseline, **built)


def _for(name: str, kind: Any, flags: Mapping[str, str]) -> dict[str, str]:
    plain = {key: value for key, value in flags.items() if key in known_names(kind)}
    dotted = {key.partition(".")[2]: value for key, value in flags.items() if key.startswith(f"{name}.")}
    return with_field_names(kind, plain, source="flags") | with_field_names(kind, dotted, source=f"flags: {name}")


def _refuse_unknown(flags: Mapping[str, str], kinds: Mapping[str, Any], where: str) -> None:
    known = list(dict.fromkeys(name for kind in kinds.values() for name in known_names(kind)))
    for key in flags:
        part, _, rest = key.partition(".")
        if key not in known and not (part in kinds and rest in known_names(kinds[part])):
            raise ValueError(f"{where}: {key!r} is not a setting; {did_you_mean(key, known)}")


def run_recipe(recipe: Recipe, *, command: str) -> CompareResult:
    """Walk through a recipe and show what came of it.

    Raises ValueError for an unknown judge, or where none may be the headline, before anything runs.
    """
    from dpo_mm.judges.provenance import order_judges
    from dpo_mm.training.run import train

    _know_judges(recipe.compare.judges)
    order_judges(recipe.compare.judges, _training_judges(recipe))
    if recipe.mine:
        mine(recipe.mine)
    train_result = train(recipe.train)
    sft_result = train(sft_baseline_config(recipe.train)) if recipe.baseline else None
    outcome = compare(
        recipe.compare,
        title=recipe.title,
        command=command,
        sft_adapter=str(sft_result.folder) if sft_result else None,
        training=train_result,
    )
    print_result(outcome)
    return outcome


def _training_judges(recipe: Recipe) -> tuple[str, ...]:
    """The judges that make, or made, the pairs of a recipe."""
    from dpo_mm.judges.provenance import training_judges_of
    from dpo_mm.mining.mine_images import parse_judges

    if recipe.mine is None:
        return training_judges_of(recipe.train.pairs)
    return (*parse_judges(recipe.mine.judges), *parse_judges(getattr(recipe.mine, "guards", None)))


def mine(config: MineConfig | MineResponsesConfig) -> Path:
    """Make preference pairs from a model's own images or responses.

    Interrupted mining resumes.

    Args:
        config: what to mine. Its type decides the modality.

    Returns:
        Path of the Parquet file with the pairs.

    Raises:
        ValueError: if a judge, the model, the prompts or a setting is unknown or does not fit, or if no pair results.
        TrainingInterrupted: after a SIGTERM, when the current part is saved.
    """
    if isinstance(config, MineResponsesConfig):
        from dpo_mm.mining.mine_responses import mine_responses

        _know_judges([config.judge])
        return mine_responses(config)
    from dpo_mm.mining.mine_images import mine_images, parse_judges

    _know_judges([*parse_judges(config.judges), *parse_judges(config.guards)])
    return mine_images(config)


def compare(
    config: CompareConfig | CompareResponsesConfig,
    *,
    title: str = "Base and tuned",
    command: str = "dpo_mm.compare(config)",
    sft_adapter: str | None = None,
    training: TrainResult | None = None,
) -> CompareResult:
    """Compare the base model with its tuned adapter, in images or in responses, and write a report.

    The results are added to the adapter's model card too. An interrupted comparison resumes: images, responses and
    scores on disk are not made again.

    Args:
        config: what to compare. Its type decides the modality.
        title: heading of the report.
        command: how to repeat the comparison, printed in the report.
        sft_adapter: folder of an adapter fine-tuned on the chosen side only, to compare with.
        training: result of the training run, for the report's curves and settings.

    Returns:
        The verdict, one comparison per judge, notes and the path of the report.

    Raises:
        ValueError: if a judge, the model, the adapter, the prompts or a setting is unknown or does not fit.
    """
    from dpo_mm.training.model_card import add_results

    _know_judges(config.judges)
    about: dict[str, Any] = {"title": title, "command": command, "baseline": sft_adapter}
    if training is not None:
        about |= {"history": training.history, "settings": training.settings}
    if isinstance(config, CompareResponsesConfig):
        from dpo_mm.evaluation.compare_responses import compare_responses

        outcome = compare_responses(config, beta=training.beta if training else None, **about)
    else:
        from dpo_mm.evaluation.compare_images import compare_images

        outcome = compare_images(config, **about)
    if config.adapter:
        add_results(config.adapter, outcome.comparisons, verdict=outcome.verdict, command=command)
    return outcome


def _know_judges(names: Iterable[str]) -> None:
    """Raises ValueError for an unknown judge, before minutes have gone into what it was to judge."""
    from dpo_mm.judges import load_judge

    for name in names:
        load_judge(name)


def sft_baseline_config(config: TrainConfig) -> TrainConfig:
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


def print_result(outcome: CompareResult) -> None:
    """Print a comparison's table, its verdict and where the report is."""
    from rich.console import Console

    from dpo_mm.evaluation.report import terminal_table

    console = Console()
    console.print(terminal_table(outcome.comparisons))
    for note in outcome.notes:
        console.print(note, markup=False, highlight=False)
    print(f"Verdict: {outcome.verdict}\nReport: {outcome.report}")

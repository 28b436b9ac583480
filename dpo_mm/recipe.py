"""Recipes: mining, training and comparison in one settings file, and the function that runs them."""

from __future__ import annotations

import itertools
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
from dpo_mm.config.config_parsing import config_from_mapping, known_names, overridden, read_yaml, with_field_names
from dpo_mm.errors import did_you_mean
from dpo_mm.files.checksums import COMPLETE, saved_shards
from dpo_mm.mining.mine_result import MineResult
from dpo_mm.printing.printed_text import print_rows
from dpo_mm.process.interruption import stop_on_signal
from dpo_mm.process.process_rank import process_rank

if TYPE_CHECKING:
    from dpo_mm.evaluation.verdict import CompareResult
    from dpo_mm.training.run import TrainResult


@dataclass(frozen=True)
class Recipe:
    """Steps of a recipe in their order: mine if it is set, train, train an SFT baseline if it is set, compare.

    Args:
        title: heading of the report.
        train, compare, mine: settings of each step.
        baseline: "sft" to also train on the chosen side only and compare with that. None for no baseline.
        rounds: largest number of rounds of all steps, see `dpo_mm.rounds`. 1: each step once.
    """

    title: str
    train: TrainConfig
    compare: CompareConfig | CompareResponsesConfig
    mine: MineConfig | MineResponsesConfig | None = None
    baseline: str | None = None
    rounds: int = 1


STEP_FOLDERS = {"mine": "mined", "train": "adapter", "compare": ""}
"""Folder of each step in the recipe's output folder."""


def presets(task: str) -> list[str]:
    """Return the names of a task's presets."""
    return sorted(path.stem.removeprefix(f"{task}-") for path in presets_folder().glob(f"{task}-*.yaml"))


def read_recipe(task: str, preset: str, overrides: Mapping[str, str]) -> Recipe:
    """Read a preset and apply overrides to it.

    Args:
        task: the task of the preset.
        preset: its name.
        overrides: values by setting. `train.seed` sets one step's seed, and `seed` that of every step which has one.

    Raises:
        ValueError: if the preset or a setting is unknown. The message suggests the nearest name.
    """
    if preset not in presets(task):
        raise ValueError(f"preset {preset!r} of {task} is unknown; {did_you_mean(preset, presets(task))}")
    return read_recipe_file(f"{task}-{preset}", overrides)


def read_recipe_file(file: str, overrides: Mapping[str, str]) -> Recipe:
    """Read a recipe and apply overrides to it.

    Args:
        file: YAML file, or the name of a preset with its task, for example faithfulness-sdxl.
        overrides: as in `read_recipe`.

    Raises:
        ValueError: if the file is no recipe, or a setting is unknown. The message suggests the nearest name.
    """
    values = read_yaml(file)
    source = Path(file).name
    missing = [step for step in ("train", "compare") if step not in values]
    if missing:
        raise ValueError(f"{source}: a recipe has the sections train and compare, but {missing[0]} is missing")
    output = overrides.get("output_dir") or values.get("output_dir") or f"runs/{Path(file).stem}"
    baseline = overrides.get("baseline") or values.get("baseline")
    if baseline not in (None, "sft"):
        raise ValueError(f"baseline {baseline!r} is unknown; expected 'sft'")
    rounds = _rounds(overrides.get("rounds") or values.get("rounds", 1))
    is_text = "questions" in values["compare"]
    config_types: dict[str, Any] = {
        "train": TrainConfig,
        "compare": CompareResponsesConfig if is_text else CompareConfig,
        "mine": MineResponsesConfig if is_text else MineConfig,
    }
    overrides = {key: value for key, value in overrides.items() if key not in ("output_dir", "baseline", "rounds")}
    settings: dict[str, Any] = {
        step: {
            **overridden(
                with_field_names(config_type, values[step], source=f"{source}: {step}"),
                _overrides_for(step, config_type, overrides),
            ),
            "output_dir": str(Path(output, STEP_FOLDERS[step])),
        }
        for step, config_type in config_types.items()
        if step in values
    }
    _check_known(overrides, {step: config_types[step] for step in settings}, source)
    configs = {
        step: config_from_mapping(
            config_types[step], own | _made_by_earlier_steps(step, output, settings, own), source=f"{source}: {step}"
        )
        for step, own in settings.items()
    }
    from dpo_mm.judges.working_folder import import_from_working_folder

    recipe = Recipe(title=values.get("title", source), baseline=baseline, rounds=rounds, **configs)
    import_from_working_folder(recipe)
    return recipe


def _rounds(value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"rounds is {value!r}. Expected a whole number from 1")
    return int(value)


def step_settings(values: Mapping[str, Any], step: str, *, source: str) -> dict[str, Any]:
    """Return the settings of one step: its section of a recipe, or all of a file without sections.

    In a recipe, folders and files that the section does not name are those of the whole recipe's run.

    Args:
        values: content of the file.
        step: train, compare or mine.
        source: the file, for the error.

    Raises:
        ValueError: if the file is a recipe without this step.
    """
    steps = [name for name in STEP_FOLDERS if name in values]
    if not steps:
        return dict(values)
    if step not in values:
        raise ValueError(f"{source}: it has no section {step}, only {' and '.join(steps)}")
    own = dict(values[step])
    if "output_dir" not in values:
        return own
    output = values["output_dir"]
    own.setdefault("output_dir", str(Path(output, STEP_FOLDERS[step])))
    return own | _made_by_earlier_steps(step, output, values, own)


def _made_by_earlier_steps(step: str, output: str, steps: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    """Return the inputs of a step that earlier steps of the recipe make and that its settings do not name."""
    if step == "train" and "mine" in steps and "pairs" not in own:
        return {"pairs": str(Path(output, STEP_FOLDERS["mine"], "pairs.parquet"))}
    if step != "compare" or "train" not in steps:
        return {}
    start = steps["train"].get("adapter")
    adapters = {"adapter": str(Path(output, STEP_FOLDERS["train"])), **({"base_adapter": start} if start else {})}
    return {name: value for name, value in adapters.items() if name not in own}


def _overrides_for(step: str, config_type: Any, overrides: Mapping[str, str]) -> dict[str, str]:
    """Return the overrides that apply to one step. `step.name` takes precedence over `name`.

    An adapter is where mining and training start. What is compared with it is the result of the training.
    """
    general = {key: value for key, value in overrides.items() if key in known_names(config_type)}
    if step == "compare":
        general.pop("adapter", None)
    specific = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith(f"{step}.")}
    return with_field_names(config_type, general, source="flags") | with_field_names(
        config_type, specific, source=f"flags: {step}"
    )


def _check_known(overrides: Mapping[str, str], config_types: Mapping[str, Any], file_name: str) -> None:
    """Raise ValueError for an override that no step has."""
    names = {step: known_names(config_type) for step, config_type in config_types.items()}
    known = list(dict.fromkeys(itertools.chain.from_iterable(names.values())))
    for key in overrides:
        step, _, name = key.partition(".")
        if key not in known and name not in names.get(step, ()):
            raise ValueError(f"{file_name}: {key!r} is not a setting; {did_you_mean(key, known)}")


def run_recipe(recipe: Recipe, *, command: str) -> CompareResult:
    """Run the steps of a recipe, or its rounds, and print its result.

    Args:
        recipe: the steps.
        command: how to repeat them, printed in the report.

    Raises:
        ValueError: before anything runs, if the output folder has other files, or a setting of the training, a judge, a prompt or a
            question does not fit.
    """
    from dpo_mm.evaluation.compare_responses import read_question_sets
    from dpo_mm.evaluation.finished_comparison import COMPARISON
    from dpo_mm.evaluation.tables import print_result
    from dpo_mm.files.outputs import refuse_foreign_folder
    from dpo_mm.policies.vlm.served import check_server_settings
    from dpo_mm.training.objective_settings import sft_baseline_config
    from dpo_mm.training.run import train
    from dpo_mm.training.shared_work import wait_for_files

    if recipe.rounds > 1:
        from dpo_mm.rounds import run_rounds

        return run_rounds(recipe, command=command)
    refuse_foreign_folder(Path(recipe.compare.output_dir), COMPARISON)
    for config in (recipe.mine, recipe.compare):
        if isinstance(config, MineResponsesConfig | CompareResponsesConfig):
            check_server_settings(config, sft_adapter=recipe.baseline if config is recipe.compare else None)
    trainings = [recipe.train, *([sft_baseline_config(recipe.train)] if recipe.baseline else [])]
    check_recipe(recipe, trainings)
    if isinstance(recipe.compare, CompareResponsesConfig):
        read_question_sets(recipe.compare)
    with stop_on_signal(lambda: _completed_steps(recipe)):
        if recipe.mine:
            wait_for_files([mine(recipe.mine).path], Path(recipe.mine.output_dir), fix="or mine in one process first")
        train_result = train(recipe.train, show_plan=print_rows)
        sft_result = train(trainings[1]) if recipe.baseline else None
        result = compare(
            recipe.compare,
            title=recipe.title,
            command=command,
            sft_adapter=str(sft_result.folder) if sft_result else None,
            training=train_result,
        )
    print_result(result)
    return result


def _completed_steps(recipe: Recipe) -> str:
    """Describe what the steps of a recipe have written, for the message of an interruption."""
    steps = [(recipe.mine, "pairs.parquet", "mined pairs"), (recipe.train, COMPLETE, "trained adapter")]
    done = [
        f"the {name} in {config.output_dir}"
        for config, file, name in steps
        if config and (Path(config.output_dir) / file).exists()
    ]
    return f"It has saved {' and '.join(done)}" if done else ""


def check_recipe(recipe: Recipe, trainings: Iterable[TrainConfig]) -> None:
    """Raise ValueError if a setting of a training or a judge does not fit, or no judge may be the primary metric."""
    from dpo_mm.evaluation.side_sets import judges_of
    from dpo_mm.judges.provenance import order_judges
    from dpo_mm.training.builders import validate_config

    _check_judges(judges_of(recipe.compare), recipe.compare)
    order_judges(recipe.compare.judges, _training_judges(recipe))
    for config in trainings:
        validate_config(config)


def _training_judges(recipe: Recipe) -> tuple[str, ...]:
    """Return the judges that build, or built, the pairs of a recipe."""
    from dpo_mm.judges.provenance import training_judges_of
    from dpo_mm.mining.mine_images import parse_judges

    if recipe.mine is None:
        return training_judges_of(recipe.train.pairs)
    return (*parse_judges(recipe.mine.judges), *parse_judges(getattr(recipe.mine, "guards", None)))


def mine(config: MineConfig | MineResponsesConfig) -> MineResult:
    """Make preference pairs from a model's own images or responses.

    Args:
        config: what to mine. Its type decides the modality.

    Returns:
        The Parquet file with the pairs.

    Raises:
        ValueError: if a judge, the model, the prompts or a setting is unknown or does not fit, or if no pair results.
        TrainingInterrupted: after SIGTERM or Ctrl-C. Completed shards are saved, and the same call continues.
    """
    with stop_on_signal(lambda: saved_shards(config.output_dir)):
        if isinstance(config, MineResponsesConfig):
            from dpo_mm.mining.mine_responses import mine_responses

            _check_judges([config.judge], config)
            return MineResult(mine_responses(config))
        from dpo_mm.mining.mine_images import mine_images, parse_judges

        _check_judges([*parse_judges(config.judges), *parse_judges(config.guards)], config)
        return MineResult(mine_images(config))


def compare(
    config: CompareConfig | CompareResponsesConfig,
    *,
    title: str = "Base and tuned",
    command: str = "dpo_mm.compare(config)",
    sft_adapter: str | None = None,
    training: TrainResult | None = None,
) -> CompareResult:
    """Compare the base model with its tuned adapter, in images or in responses, and write a report.

    The results are added to the adapter's model card too. An interrupted comparison resumes, and the result of a finished
    one is returned. Several processes (RANK of WORLD_SIZE) share generating and scoring, and the first writes the report.

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
    from dpo_mm.evaluation.finished_comparison import COMPARISON, ingredients, read_result, saved_lines
    from dpo_mm.evaluation.side_sets import judges_of, side_configs, source_of
    from dpo_mm.files.outputs import output_folder, refuse_foreign_folder, settings_of
    from dpo_mm.policies.vlm.served import check_server_settings

    folder = Path(config.output_dir)
    inputs = [config.model, config.adapter, config.base_adapter, sft_adapter]
    inputs += [source_of(own) for own in (config, *side_configs(config))]
    refuse_foreign_folder(folder, COMPARISON, inputs=inputs)
    if isinstance(config, CompareResponsesConfig):
        check_server_settings(config, sft_adapter=sft_adapter)
    _check_judges(judges_of(config), config)
    options: dict[str, Any] = {"title": title, "command": command, "sft_adapter": sft_adapter}
    if training is not None:
        options |= {"history": training.history, "settings": training.settings}
    settings = settings_of("comparison", ingredients(config, sft_adapter))
    with (
        stop_on_signal(lambda: saved_lines(folder)),
        output_folder(folder, COMPARISON, settings, inputs=inputs, overwrite=config.overwrite) as finished,
    ):
        return read_result(folder) if finished else _compare(config, options, training)


def _compare(
    config: CompareConfig | CompareResponsesConfig, options: dict[str, Any], training: TrainResult | None
) -> CompareResult:
    """Compare, and add the results to the adapter's model card."""
    from dpo_mm.training.model_card import add_results

    if isinstance(config, CompareResponsesConfig):
        from dpo_mm.evaluation.compare_responses import compare_responses

        result = compare_responses(config, beta=training.beta if training else None, **options)
    else:
        from dpo_mm.evaluation.compare_images import compare_images

        result = compare_images(config, **options)
    if config.adapter and process_rank().is_first:
        add_results(config.adapter, result.comparisons, verdict=result.verdict, command=options["command"])
    return result


def _check_judges(names: Iterable[str], config: Any) -> None:
    """Raise ValueError for a judge that is unknown or does not fit, or for images' prompts, before time is spent on them."""
    from dpo_mm.judges import check_outputs, load_judge, load_response_judge, takes_questions

    is_text = isinstance(config, CompareResponsesConfig | MineResponsesConfig)
    for name in names:
        load_response_judge(name) if is_text else load_judge(name)
        check_outputs(name, "responses" if is_text else "images")
    if is_text and config.rubric and not any(takes_questions(name) for name in names):
        raise ValueError("rubric: none of the judges reads it. Add rubric_score:SERVED@SERVER, or remove rubric")
    if isinstance(config, CompareConfig):
        from dpo_mm.evaluation.compare_images import read_plans

        read_plans(config)

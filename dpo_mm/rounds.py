"""Rounds of a recipe: mine, train, compare, and again from the result, until a paired test does not say better.

Round k mines from the current policy (the model with the adapter of the last round that passed), trains that adapter further and
compares the result with it. It passes if the verdict is "better" and the primary metric's p, after Holm's correction, is at most
0.05 / N for at most N rounds. The first round that does not pass ends the rounds, and the one before it is the round to keep. A
policy that never improves passes a first round with a probability of at most 0.05 / N, and any round with at most 0.05, because
the test is exact (`python -m tests.bench.round_alarms`).

No decision uses held-out material twice: images have fresh seeds in each round, responses another random part of the questions.
At the end, the base is compared with the round to keep on seeds, or on a part, that no decision has seen.

Each step has its own folder and record. So an interrupted run continues with the same command.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpo_mm.config import CompareResponsesConfig, as_dict
from dpo_mm.errors import NoPairsError
from dpo_mm.evaluation.compare_images import PIXELS
from dpo_mm.evaluation.report import Report, write_report
from dpo_mm.evaluation.round_charts import BeforeAfter, RoundPoint, log_prob_change, measure_responses
from dpo_mm.evaluation.significance import LEVEL
from dpo_mm.evaluation.statistics import Comparison
from dpo_mm.evaluation.tables import print_result
from dpo_mm.evaluation.verdict import CompareResult, interval_text, run_summary, voters
from dpo_mm.files.outputs import OutputKind, output_folder, write_results
from dpo_mm.printing.printed_text import print_rows
from dpo_mm.process.interruption import stop_on_signal
from dpo_mm.process.process_rank import process_rank
from dpo_mm.recipe import Recipe, check_recipe, compare, mine
from dpo_mm.training.run import TrainResult, train

logger = logging.getLogger(__name__)

ROUNDS = OutputKind("rounds.json", "made", results=("report.html", "metrics.json"))
FRESH = 1000
"""Distance of the seeds of two rounds. Seeds of runs that are closer share no images with them."""
NOT_DECISIVE = ("output_dir", "overwrite", "resume", "workers")
LAST = "final"
"""Folder of the last comparison."""


class Decision(NamedTuple):
    """Decision on a round: if it passes, and the reason."""

    passes: bool
    reason: str


@dataclass(frozen=True)
class Round:
    """A finished round.

    Args:
        point: its measures for the report, with the decision.
        adapter: folder of its adapter.
        result: comparison with the round before.
    """

    point: RoundPoint
    adapter: str
    result: CompareResult


def run_rounds(recipe: Recipe, *, command: str) -> CompareResult:
    """Run the rounds of a recipe and print their result.

    Args:
        recipe: the steps, with at most `recipe.rounds` rounds.
        command: how to repeat them, printed in the report.

    Returns:
        The last comparison, of the base with the round to keep. If no round passed, the comparison of round 1.

    Raises:
        ValueError: before anything runs, if a setting does not go with rounds. Later, if the first round mines no pair.
        TrainingInterrupted: after SIGTERM or Ctrl-C.
    """
    check_rounds(recipe)
    folder = Path(recipe.compare.output_dir)
    steps = {name: _decisive(getattr(recipe, name)) for name in ("mine", "train", "compare")}
    settings = {"title": recipe.title, "rounds": recipe.rounds, **steps}
    with output_folder(folder, ROUNDS, settings, overwrite=recipe.compare.overwrite) as finished:
        with stop_on_signal(lambda: _saved_rounds(folder)):
            rounds, end = walk_rounds(recipe, command=command)
            passed = [each for each in rounds if each.point.passed]
            last = _compare_last(recipe, passed[-1], command) if passed else rounds[0].result
        report = _report(recipe, rounds, end, last, command)
        if not finished:
            with write_results(folder) as temporary:
                write_report(temporary, report)
    result = CompareResult(report.verdict, report.comparisons, report.notes, folder / "report.html")
    print_result(result)
    return result


def check_rounds(recipe: Recipe) -> None:
    """Check what can be checked before anything runs.

    Raises:
        ValueError: if a setting does not go with rounds, a judge is unknown or none may be the primary metric, or there are too few
            questions for the parts.
    """
    if recipe.mine is None:
        raise ValueError("rounds: the recipe has no section mine, so a second round has no new pairs. Add one")
    if recipe.baseline:
        raise ValueError("rounds: baseline sft trains on the pairs of one round. Leave out baseline, or rounds")
    if recipe.train.tuning != "lora" or recipe.train.adapter_result != "continued":
        raise ValueError(
            "rounds: each round trains the adapter of the one before. Set tuning: lora, adapter_result: continued"
        )
    if recipe.mine.adapter not in (None, recipe.train.adapter):
        raise ValueError(
            f"rounds: mine.adapter {recipe.mine.adapter} is not train.adapter {recipe.train.adapter}. A round mines from the policy "
            "that it trains. Set both, or only train.adapter"
        )
    if getattr(recipe.mine, "server", None) or getattr(recipe.compare, "server", None):
        raise ValueError("rounds: a server does not have the adapters of the rounds. Leave out server and served")
    if isinstance(recipe.compare, CompareResponsesConfig) and recipe.compare.part:
        raise ValueError("rounds: part is chosen in each round. Leave it out")
    if process_rank().count > 1:
        raise ValueError(
            "rounds: they run in one process. For several, run mine, train and compare of each round yourself"
        )
    check_recipe(recipe, [round_recipe(recipe, 1, recipe.train.adapter).train])
    last = fresh_material(recipe, recipe.rounds + 1)
    if isinstance(last, CompareResponsesConfig):
        from dpo_mm.evaluation.compare_responses import read_question_sets

        read_question_sets(last)


def walk_rounds(recipe: Recipe, *, command: str) -> tuple[list[Round], str]:
    """Run rounds until one does not pass, mines no pair, or is the last.

    Args:
        recipe: the steps.
        command: how to repeat them, for the reports.

    Returns:
        The rounds, and why there are no more of them, a sentence without its full stop.

    Raises:
        NoPairsError: if the first round mines no pair.
    """
    rounds: list[Round] = []
    adapter = recipe.train.adapter
    for number in range(1, recipe.rounds + 1):
        try:
            rounds.append(_run_round(recipe, number, adapter, command))
        except NoPairsError as error:
            if not rounds:
                raise
            return rounds, f"Round {number} mined no pair, so there is nothing to train on. {error}".rstrip(".")
        print_rows({f"round {number}": rounds[-1].point.decision})
        if not rounds[-1].point.passed:
            return rounds, f"Round {number} did not pass"
        adapter = rounds[-1].adapter
    return rounds, f"All {recipe.rounds} rounds passed. More of them may help"


def _run_round(recipe: Recipe, number: int, adapter: str | None, command: str) -> Round:
    """Mine from an adapter, train it further and compare the result with it. Steps that are finished are read."""
    steps = round_recipe(recipe, number, adapter)
    assert steps.mine is not None
    mined = mine(steps.mine)
    training = train(steps.train, show_plan=print_rows)
    result = compare(steps.compare, title=f"{recipe.title}: round {number}", command=command, training=training)
    decision = decide(result, rounds=recipe.rounds)
    point = _point(number, result, training, decision, pairs=mined.pairs, level=LEVEL / recipe.rounds)
    return Round(point, steps.train.output_dir, result)


def round_recipe(recipe: Recipe, number: int, adapter: str | None) -> Recipe:
    """Return the settings of one round.

    Args:
        recipe: the recipe.
        number: of the round, from 1.
        adapter: the current adapter, from which the round mines and trains. None: the model alone.
    """
    folder, shift = Path(recipe.compare.output_dir), FRESH * (number - 1)
    assert recipe.mine is not None
    mining = dataclasses.replace(
        recipe.mine,
        adapter=adapter,
        seed=_seed(recipe.mine.seed + shift),
        output_dir=str(folder / f"mined-{number}"),
    )
    training = dataclasses.replace(
        recipe.train,
        adapter=adapter,
        pairs=str(folder / f"mined-{number}" / "pairs.parquet"),
        seed=_seed(recipe.train.seed + shift),
        output_dir=str(folder / f"adapter-{number}"),
    )
    unswept = {"scales": (), "checkpoints": False} if not isinstance(recipe.compare, CompareResponsesConfig) else {}
    comparison = dataclasses.replace(
        fresh_material(recipe, number),
        adapter=training.output_dir,
        base_adapter=adapter,
        output_dir=str(folder / f"compared-{number}"),
        **unswept,  # type: ignore[arg-type]
    )
    return dataclasses.replace(recipe, mine=mining, train=training, compare=comparison)


def fresh_material(recipe: Recipe, number: int) -> Any:
    """Return the settings of a comparison on new held-out material: seeds of images, or a part of the questions.

    Args:
        recipe: the recipe.
        number: of the round, or one more than there are rounds for the last comparison.
    """
    config = recipe.compare
    if isinstance(config, CompareResponsesConfig):
        return dataclasses.replace(config, part=f"{number}/{recipe.rounds + 1}")
    return dataclasses.replace(config, seed=_seed(config.seed + FRESH * number))


def decide(result: CompareResult, *, rounds: int) -> Decision:
    """Decide whether a round passes.

    Args:
        result: comparison with the round before.
        rounds: largest number of rounds N, which share the level: 0.05 / N each.
    """
    primary = _headline(result)
    p, level = primary.p if primary.p_holm is None else primary.p_holm, LEVEL / rounds
    numbers = f"{primary.metric} {primary.base:.4g} to {primary.tuned:.4g} ({interval_text(primary)}, p = {p:.2g}, level {level:.3g})"
    if result.verdict != "better":
        return Decision(False, f"{result.verdict}: {numbers}")
    if p > level:
        return Decision(False, f"better at 0.05, but not at its part of it: {numbers}")
    return Decision(True, f"better: {numbers}")


def _compare_last(recipe: Recipe, best: Round, command: str) -> CompareResult:
    """Compare the base with the round to keep, on material that no decision saw."""
    config = dataclasses.replace(
        fresh_material(recipe, recipe.rounds + 1),
        adapter=best.adapter,
        base_adapter=recipe.train.adapter,
        output_dir=str(Path(recipe.compare.output_dir, LAST)),
    )
    return compare(config, title=f"{recipe.title}: round {best.point.number} against the base", command=command)


def _report(recipe: Recipe, rounds: list[Round], end: str, last: CompareResult, command: str) -> Report:
    """Put the rounds and the last comparison into one report."""
    is_text = isinstance(recipe.compare, CompareResponsesConfig)
    passed = [each.point.number for each in rounds if each.point.passed]
    if passed:
        best = rounds[passed[-1] - 1].adapter
        keep = f"Keep round {passed[-1]}. {end}."
        material = "a part of the questions" if is_text else "seeds"
        which = f"The table compares the base with round {passed[-1]}, on {material} that no decision saw. Its adapter is {best}."
    else:
        start = recipe.train.adapter
        keep = f"Keep {f'the adapter {start}, which is the base here' if start else 'the base'}. {end}."
        which = "The table compares the base with round 1."
    notes = [f"Round {each.point.number}: {each.point.decision}." for each in rounds]
    own = [each for each in last.comparisons if each.models == ("base", "tuned")]
    summary = run_summary(own, last.verdict, unit=voters(_headline(last), "responses") if is_text else "prompts")
    return Report(
        title=recipe.title,
        verdict=last.verdict,
        summary=f"{keep} {summary}",
        command=command,
        comparisons=last.comparisons,
        notes=(keep, which, *notes, *last.notes),
        settings={
            "model": recipe.compare.model,
            "rounds": f"{len(rounds)} of at most {recipe.rounds}",
            "level": f"{LEVEL:g} / {recipe.rounds} = {LEVEL / recipe.rounds:.3g} per round",
            "folders": "mined-k, adapter-k and compared-k for round k"
            + f", {LAST} for the last comparison" * bool(passed),
        },
        unit=voters(_headline(last), "questions") if is_text else "prompts",
        rounds=tuple(each.point for each in rounds),
        best_round=passed[-1] if passed else 0,
    )


def _point(
    number: int, result: CompareResult, training: TrainResult, decision: Decision, *, pairs: int, level: float
) -> RoundPoint:
    """Collect the measures of a round."""
    diversity = next((one for one in result.comparisons if one.judge == PIXELS), None)
    measures: dict[str, Any] = measure_responses(result.report.parent)
    if diversity is not None:
        measures["diversity"] = BeforeAfter(diversity.base, diversity.tuned)
    return RoundPoint(
        number=number,
        headline=_headline(result),
        decision=decision.reason,
        passed=decision.passes,
        level=level,
        pairs=pairs,
        log_probs=log_prob_change(training.history, training.beta),
        **measures,
    )


def _headline(result: CompareResult) -> Comparison:
    return next(one for one in result.comparisons if one.headline)


def _seed(number: int) -> int:
    return number % 2**32


def _decisive(config: Any) -> dict[str, Any]:
    """Settings that decide a result."""
    return {name: value for name, value in as_dict(config).items() if name not in NOT_DECISIVE}


def _saved_rounds(folder: Path) -> str:
    """Describe the finished steps, for the message of an interruption."""
    from dpo_mm.files.checksums import COMPLETE

    names: Iterable[Path] = sorted(folder.glob(f"*-*/{COMPLETE}"))
    done = [path.parent.name for path in names]
    return f"{', '.join(done)} in {folder} {'is' if len(done) == 1 else 'are'} finished" if done else ""

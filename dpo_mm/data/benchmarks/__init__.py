"""Question files of published benchmarks, read in the format in which their authors publish them.

The first row of a file of questions tells its format. To add a benchmark, write a module with the keys of its rows (`KEYS`)
and a function (`questions`) from these rows to rows of questions, and list it in BENCHMARKS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from dpo_mm.data.benchmarks import (
    amber_questions,
    ocrbench_questions,
    olmocr_questions,
    omnidocbench_questions,
    pope_questions,
)

Rows = Iterable[dict[str, Any]]


class Benchmark(NamedTuple):
    """Format of a published benchmark.

    Attributes:
        name: name of the benchmark.
        keys: keys that each of its rows has, and that together no other format has.
        questions: function (rows, file) -> rows of questions: prompt, image or images, ground_truth, id, category.
        unit: what a question is about, if a name of a file with # and the unit selects it.
    """

    name: str
    keys: frozenset[str]
    questions: Callable[[Rows, Path], Iterator[dict[str, Any]]]
    unit: str = ""


BENCHMARKS = (
    Benchmark("AMBER", amber_questions.KEYS, amber_questions.questions),
    Benchmark("OCRBench", ocrbench_questions.KEYS, ocrbench_questions.questions),
    Benchmark("olmOCR-bench", olmocr_questions.KEYS, olmocr_questions.questions),
    Benchmark("OmniDocBench", omnidocbench_questions.KEYS, omnidocbench_questions.questions),
    Benchmark("OmniDocBench", omnidocbench_questions.PAGE_KEYS, omnidocbench_questions.page_questions, unit="pages"),
    Benchmark("POPE", pope_questions.KEYS, pope_questions.questions),
)


def question_rows(rows: Rows, file: Path, unit: str = "") -> Iterator[dict[str, Any]]:
    """Convert the rows of a benchmark's file to rows of questions. Rows in no known format are returned unchanged.

    Args:
        rows: rows of a file of questions.
        file: the file, for its folder and for errors.
        unit: what a question is about, for benchmarks with a choice.

    Raises:
        ValueError: if no benchmark with this unit has such rows, a row has not the keys of the first, or a file next to it is missing. It names the file and the row.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    everything = chain([first], rows)
    suiting = (each for each in BENCHMARKS if each.keys <= first.keys() and "prompt" not in first and each.unit == unit)
    benchmark = next(suiting, None)
    if benchmark is None and unit:
        units = " or ".join(f"{each.name}#{each.unit}" for each in BENCHMARKS if each.unit)
        raise ValueError(f"{file}#{unit}: only {units} is known. Use the file as published, or leave out #{unit}")
    if benchmark is None:
        yield from everything
    else:
        yield from benchmark.questions(_checked(everything, benchmark, file), file)


def _checked(rows: Rows, benchmark: Benchmark, file: Path) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        missing = sorted(benchmark.keys - row.keys())
        if missing:
            raise ValueError(
                f"{file}, row {number}: no {missing[0]}, which rows of {benchmark.name} have. Use the file as published"
            )
        yield row

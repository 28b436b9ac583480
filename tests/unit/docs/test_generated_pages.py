"""Documentation pages that are generated from the code equal the current output of their generators."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


def script(name: str) -> ModuleType:
    """Load a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_equal_the_code() -> None:
    assert script("write_reference").stale() == []


@pytest.mark.slow
def test_page_with_a_different_default_is_stale(tmp_path: Path) -> None:
    write = script("write_reference")
    texts = {name: page() for name, page in write.PAGES.items()}
    write.PAGES = {name: partial(str, text) for name, text in texts.items()}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    write.FOLDER = tmp_path
    assert write.stale() == []
    page = tmp_path / "settings.md"
    page.write_text(page.read_text().replace("| `constant_with_warmup` |", "| `cosine` |"))
    assert write.stale() == ["settings.md"]
    (tmp_path / "cli.md").unlink()
    assert write.stale() == ["settings.md", "cli.md"]
    with pytest.raises(SystemExit):
        write.main(["--check"])


def test_pages_of_objectives_and_judges_list_all_of_them() -> None:
    from dpo_mm.judges.table import JUDGES
    from dpo_mm.objectives import OBJECTIVES

    for page, names in (("objectives", OBJECTIVES), ("judges", JUDGES)):
        cells = "".join(
            line.split("|")[1]
            for line in (ROOT / f"docs/reference/{page}.md").read_text().splitlines()
            if line[:1] == "|"
        )
        assert len(names) > 20 and [name for name in names if not re.search(rf"`{name}[`:@\[]", cells)] == []


def test_every_page_that_code_or_docs_name_exists() -> None:
    folders = [ROOT / name for name in ("dpo_mm", "recipes", "demos", "docs", "tests")]
    files = [
        file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".html", ".md", ".yaml")
    ]
    names = {
        (file, name)
        for file in [*files, *ROOT.glob("*.md")]
        for name in re.findall(r"(?<![\w/])docs/[\w./-]+\.(?:md|json|png|svg|py)", file.read_text())
    }
    assert len(names) > 50
    assert sorted(f"{file.name}: {name}" for file, name in names if not (ROOT / name).exists()) == []


def test_every_setting_has_a_row() -> None:
    import dataclasses

    from dpo_mm import config

    settings = (ROOT / "docs" / "reference" / "settings.md").read_text()
    kinds = [kind for name, kind in vars(config).items() if name.endswith("Config") and dataclasses.is_dataclass(kind)]
    assert len(kinds) == 7
    for kind in kinds:
        section = settings.partition(f"## {kind.__name__}\n")[2].partition("\n## ")[0]
        assert [line.split("`")[1] for line in section.splitlines() if line.startswith("| **`")] == [
            field.name for field in dataclasses.fields(kind)
        ]


def test_parity_page_contains_the_measured_tables() -> None:
    page = (ROOT / "docs" / "background" / "parity.md").read_text()
    measured = json.loads((ROOT / "docs" / "benchmarks" / "parity.json").read_text())
    block = page.partition("<!-- comparisons -->")[2].partition("<!-- /comparisons -->")[0]
    lines = [line for line in block.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(measured["rows"]) > 60
    for line, row in zip(lines[1:], measured["rows"], strict=True):
        assert f"| {row['value']:.1e} | {row['gradient']:.1e} |" in line and row["peer"] in line


@pytest.mark.slow
def test_figures_are_rendered_to_identical_bytes(tmp_path: Path) -> None:
    draw = script("draw_figures")
    draw.FOLDER = tmp_path
    (tmp_path / "concepts").mkdir()
    (tmp_path / "background").mkdir()
    draw.main()
    first = (tmp_path / "concepts" / "preference-loss.svg").read_bytes()
    draw.main()
    assert (tmp_path / "concepts" / "preference-loss.svg").read_bytes() == first
    assert draw.optimal_policy(draw.REFERENCE, draw.REWARDS, 0.5).sum() == pytest.approx(1)
    assert draw.optimal_policy(draw.REFERENCE, draw.REWARDS, 1e9) == pytest.approx(draw.REFERENCE)


def test_tables_of_drawings_equal_the_measurements() -> None:
    write = script("write_drawings_table")
    by_arm = write.runs()
    assert {"base", "sft", "dpo"} <= set(by_arm)
    page = write.PAGE.read_text(encoding="utf-8")
    assert write.written(page, by_arm) == page


def test_arms_are_compared_by_seed_and_prompt() -> None:
    write = script("write_drawings_table")
    prompts = [str(number) for number in range(20)]
    base = [{"seed": 0, "prompts": prompts, "right": "10" * 20}]
    tuned = [{"seed": seed, "prompts": prompts, "right": right} for seed, right in ((0, "11" * 20), (1, "10" * 20))]
    result = write.compare(base, tuned, "right")
    assert (result.base, result.tuned, result.n, result.clusters) == (0.5, 0.75, 80, 20)
    result = write.compare(tuned, tuned[1:], "right")
    assert result.difference == 0 and result.n == 40


def smollm2_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))  # the script imports write_drawings_table
    return script("write_smollm2_table")


def test_tables_of_smollm2_equal_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    write = smollm2_table(monkeypatch)
    by_arm = write.runs(write.RESULTS, write.NAMES)
    assert {"base", "sft", "dpo, sft term"} <= set(by_arm) <= set(write.NAMES)
    page = write.PAGE.read_text(encoding="utf-8")
    assert write.written(page, by_arm) == page


def test_table_of_rounds_equals_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))  # the script imports write_drawings_table
    write = script("write_rounds_table")
    results = json.loads(write.RESULTS.read_text(encoding="utf-8"))
    assert set(results) <= set(write.TASKS)
    page = write.PAGE.read_text(encoding="utf-8")
    assert write.written(page, results) == page


def test_tables_of_smollm2_have_shares_of_tasks_and_shared_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    write = smollm2_table(monkeypatch)

    def run(arm: str, seed: int, right: str, side: str) -> dict[str, object]:
        prompts = [f"{task}-{number}" for number in range(20) for task in ("json", "list")]
        names = {"prompts": prompts, "side_prompts": [f"sum-{number}" for number in range(20)]}
        return {
            "arm": arm,
            "seed": seed,
            **names,
            "right": right,
            "side_right": side,
            "tokens": 30.4,
            "train_cpu_seconds": 90,
        }

    base = run("base", 0, "10" * 20, "1" * 20)
    sft = [run("sft", seed, "11" * 20, "10" * 10) for seed in (0, 1)]
    term = [run("dpo, sft term", 1, "01" * 20, "1" * 20)]
    by_arm = {"base": [base], "sft": sft, "dpo, sft term": term}
    lines = write.arms_table(by_arm).splitlines()[2:]
    assert lines[0].startswith("| base |  | 50.0% |  | 100.0% | 0.0% | 30 | 100.0% |")
    assert lines[1].startswith("| SFT on the chosen | 0, 1 | 100.0% | +50.0 (") and "| 50.0% | -50.0 (" in lines[1]
    (against,) = write.against_table(by_arm).splitlines()[2:]
    assert against.startswith("| DPO with the SFT term | SFT on the chosen | 1 | -50.0 (") and "| +50.0 (" in against


def published_walk_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))  # the script imports write_drawings_table
    return script("write_published_walk_table")


def test_tables_of_the_published_stages_equal_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    write = published_walk_table(monkeypatch)
    by_tuning = write.measured()
    assert {"base", "sft", "dpo, 16 per step"} <= set(by_tuning["lora"]) <= set(write.NAMES)
    page = write.PAGE.read_text(encoding="utf-8")
    assert write.written(page, by_tuning) == page


def test_published_stages_are_compared_by_page_over_the_seeds_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    write = published_walk_table(monkeypatch)

    def run(arm: str, seed: int, hits: list[int], totals: list[int]) -> dict[str, object]:
        return {"arm": arm, "seed": seed, "cer": {"hits": hits, "totals": totals}, "degeneration": {"hits": hits}}

    first = [run("sft", seed, [2] * 20, [10] * 20) for seed in (0, 1)]
    second = [run("dpo, 16 per step", seed, [seed] * 20, [10] * 20) for seed in (1, 2)]
    result = write.compare(first, second, "cer")
    assert (result.base, result.tuned, result.n, result.direction) == (0.2, 0.1, 20, "lower")
    base = [run("base", 0, [3] * 20, [10] * 20)]
    assert write.compare(base, second, "cer").base == 0.3
    assert write.compare(base, second, "degeneration").difference == pytest.approx(-1.5)

"""Shortcut tests rarely give false alarms, duplicates are found, and the report and the command work."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import pytest

from dpo_mm.doctor import Diagnosis
from dpo_mm.doctor.checks import CHECKS, SEVERITIES, Finding
from dpo_mm.doctor.dataset_statistics import plain_text
from dpo_mm.doctor.doctor_report import ExampleRow, render, shorten, write_report
from dpo_mm.doctor.duplicates import exact_duplicates, near_duplicates
from dpo_mm.doctor.shortcuts import MIN_GROUPS, Z, run_regression_test, run_sign_test


def ranked_pairs(seed: int, prompts: int = 20, images: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of the images of each prompt, ordered by a quality that is independent of the features."""
    rng = np.random.default_rng(seed)
    rows, groups = [], []
    for prompt in range(prompts):
        features, quality = rng.normal(size=(images, 4)), rng.normal(size=images)
        for a in range(images):
            rows += [features[a] - features[b] for b in range(images) if quality[a] > quality[b]]
            groups += [prompt for b in range(images) if quality[a] > quality[b]]
    return np.array(rows), np.array(groups)


def test_a_perfect_shortcut_is_significant_from_the_fewest_prompts_on() -> None:
    for prompts in (MIN_GROUPS - 1, MIN_GROUPS):
        assert run_sign_test(np.ones(prompts), np.arange(prompts)).significant == (prompts == MIN_GROUPS)


def test_shortcut_tests_random_labels_shared_images_are_not_significant() -> None:
    ungrouped = grouped = regressions = 0
    for seed in range(60):
        rows, groups = ranked_pairs(seed)
        grouped += run_sign_test(rows[:, 0], groups).significant
        ungrouped += run_sign_test(rows[:, 0], np.arange(len(rows))).significant
        regressions += seed < 20 and run_regression_test(rows, groups).test.significant
    assert grouped == 0 and regressions == 0
    assert ungrouped >= 3  # false alarms if every pair counts as one observation


def test_sign_test_one_pair_per_group_is_binomial() -> None:
    """With one pair per group, significant means |wins - losses| > Z sqrt(n)."""
    for n in (100, 900):
        edge = int(Z * n**0.5)
        for extra, significant in ((-2, False), (2, True)):
            wins = (n + edge + extra) // 2 + 1 if significant else (n + edge + extra) // 2
            difference = np.r_[np.ones(wins), -np.ones(n - wins)]
            test = run_sign_test(difference, np.arange(n))
            assert (
                test.significant is significant
                and test.fraction_more == pytest.approx(wins / n)
                and test.num_differing == n
            )
            assert test.accuracy == pytest.approx(test.fraction_more)
            assert run_sign_test(-difference, np.arange(n)).fraction_more == pytest.approx(1 - wins / n)


def test_sign_test_equal_pairs_count_as_guesses() -> None:
    test = run_sign_test(np.r_[np.ones(50), np.zeros(150)], np.arange(200))
    assert (test.fraction_more, test.num_differing, test.accuracy, test.significant) == (1.0, 50, 0.625, True)


def test_regression_test_finds_combined_features() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 5))
    x *= np.sign(x[:, 0] - x[:, 1])[:, None]  # the difference of the first two predicts every winner
    test, weights, scores = run_regression_test(x, np.arange(600))
    assert (
        test.significant and test.accuracy > 0.97 and weights[0] > 1 and weights[1] < -1 and (scores > 0).mean() > 0.97
    )
    assert all(run_sign_test(x[:, n], np.arange(600)).accuracy < 0.8 for n in range(5))
    mirrored = run_regression_test(-x, np.arange(600)).test
    assert mirrored.accuracy == test.accuracy  # a and b are interchangeable


def test_exact_duplicates_in_either_order_are_found() -> None:
    prompts = np.array([1, 1, 1, 1, 2])
    winners, losers = np.array([7, 8, 7, 9, 7]), np.array([8, 7, 8, 7, 8])
    findings = {finding.check: finding for finding in exact_duplicates(prompts, winners, losers, list("abcde"))}
    assert set(findings) == {"contradictory-labels", "duplicate-pairs"}
    assert (findings["contradictory-labels"].rows, findings["duplicate-pairs"].rows) == (3, 1)
    assert [row for row, _ in findings["duplicate-pairs"].examples] == ["c"]
    assert exact_duplicates(prompts[:1], winners[:1], losers[:1], ["a"]) == []


@pytest.mark.parametrize(("bits", "light", "count"), [(3, 2, 2), (4, 2, 0), (3, 9, 0), (0, 0, 2)])
def test_near_duplicates_by_hash_and_thumbnail(bits: int, light: int, count: int) -> None:
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**63, (300, 2), dtype=np.uint64)
    thumbs = rng.integers(20, 200, (300, 2, 48), dtype=np.uint8)
    hashes[299], thumbs[299] = hashes[0], thumbs[0] + light
    hashes[299, 0] ^= np.uint64(sum(1 << bit for bit in (0, 17, 33, 50)[:bits]))
    findings = near_duplicates(
        hashes, thumbs, np.arange(600, dtype=np.uint64).reshape(300, 2), [str(n) for n in range(300)]
    )
    assert sum(finding.rows for finding in findings) == count
    if count:
        assert findings[0].examples == (("299", "like 0"),)


def test_plain_text_ignores_case_and_spaces() -> None:
    assert plain_text(" A  red\tFox. ") == plain_text("a red fox") != plain_text("a red foxes")


NASTY = "<img src=x onerror=alert(1)>{{ 7*7 }}</style><script>"


def diagnosis(*severities: str) -> Diagnosis:
    names = {"error": "undecodable-images", "warning": "licence-missing", "note": "no-ties-or-votes"}
    findings = [Finding(names[s], s, 3, 200, NASTY, ((NASTY, NASTY), ("row 2", ""))) for s in severities]
    return Diagnosis(NASTY, "images", 200, tuple(findings), {NASTY: NASTY}, ("identical-sides",))


def test_report_escapes_text_and_is_self_contained(tmp_path: Path) -> None:
    examples = {
        "row 2": ExampleRow(NASTY, (("a", NASTY), ("b", ""))),
        NASTY: ExampleRow(NASTY, (("winner", ""), ("loser", NASTY))),
    }
    page = render(diagnosis("error", "warning", "note"), examples, command=NASTY)
    assert (
        page.count("<img") == 6 and "<img src=x" not in page and "<script" not in page and page.count("</style>") == 1
    )
    assert page.count(html.escape(NASTY)) == page.count("&lt;img src=x") > 8 and "{{ 7*7 }}" in page
    assert "default-src 'none'" in page and "http://" not in page and "https://" not in page
    assert "1 error, 1 warning, 1 note" in page and "Images that do not decode" in page and "of 200" in page
    assert write_report(tmp_path / "deep" / "r.html", diagnosis(), command="x").read_text().count("no findings") == 2
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    ("severities", "failed", "strict"),
    [((), False, False), (("note",), False, False), (("warning",), False, True), (("error",), True, True)],
)
def test_diagnosis_failed_by_severity_and_strict(severities: tuple[str, ...], failed: bool, strict: bool) -> None:
    result = diagnosis(*severities)
    assert (result.failed(), result.failed(strict=True)) == (failed, strict)


def test_checks_have_title_advice_and_severity() -> None:
    assert len(CHECKS) == 29
    assert all(spec.title and spec.advice and spec.severity in SEVERITIES for spec in CHECKS.values())


def test_shorten_long_text_removes_its_middle() -> None:
    assert shorten("a\n b") == "a b" and len(shorten("x" * 1000)) < 210 and shorten("y" * 999 + "end").endswith("end")


@pytest.mark.parametrize(("arguments", "status"), [((), 0), (("--strict",), 1), (("--held-out", "shapes-train"), 1)])
def test_doctor_command_exit_status(
    arguments: tuple[str, ...],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from datasets import Dataset

    from dpo_mm.cli import main as cli
    from dpo_mm.data.schema import load_pairs

    rows = load_pairs("shapes-faithfulness").select(range(30))
    assert isinstance(rows, Dataset)
    rows.to_parquet(str(tmp_path / "few.parquet"))
    report = str(tmp_path / "r.html")
    monkeypatch.setattr("sys.argv", ["dpo-mm", "doctor", str(tmp_path / "few.parquet"), "--output", report, *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code or 0) == status
    printed = capsys.readouterr().out
    assert "Rows without a licence" in printed and f"Report: {report}" in printed and Path(report).exists()
    assert ("Prompts that also appear in the held-out set" in printed) == bool(status and "--strict" not in arguments)


def test_datasets_page_tables_match_code() -> None:
    import importlib.util

    file = Path(__file__).parents[3] / "docs" / "write_sets_table.py"
    spec = importlib.util.spec_from_file_location("write_sets_table", file)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text()
    assert page == script.written(page) and "| `pickapic` | pairs of images |" in page
    assert script.written(page.replace("| `pickapic` |", "| `other` |")) == page

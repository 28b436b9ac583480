"""False alarms are rare, also where pairs of a prompt share pictures; copies are found; the page and the command."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import pytest

from dpo_mm.doctor import Diagnosis
from dpo_mm.doctor.checks import CHECKS, SEVERITIES, Finding
from dpo_mm.doctor.dataset_statistics import plain
from dpo_mm.doctor.doctor_report import Shown, cut, render, write_report
from dpo_mm.doctor.duplicates import near, repeated
from dpo_mm.doctor.shortcuts import Z, told_by, told_by_regression


def ranked(seed: int, prompts: int = 20, pictures: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rankings: of each prompt's pictures every two, ordered by a quality that no feature knows."""
    rng = np.random.default_rng(seed)
    rows, groups = [], []
    for prompt in range(prompts):
        features, quality = rng.normal(size=(pictures, 4)), rng.normal(size=pictures)
        for a in range(pictures):
            rows += [features[a] - features[b] for b in range(pictures) if quality[a] > quality[b]]
            groups += [prompt for b in range(pictures) if quality[a] > quality[b]]
    return np.array(rows), np.array(groups)


def test_chance_raises_no_alarm_though_pairs_share_pictures() -> None:
    alone = together = regressions = 0
    for seed in range(60):
        rows, groups = ranked(seed)
        together += told_by(rows[:, 0], groups).sure
        alone += told_by(rows[:, 0], np.arange(len(rows))).sure
        regressions += seed < 20 and told_by_regression(rows, groups)[0].sure
    assert together == 0 and regressions == 0
    assert alone >= 3  # as if every pair were a throw of its own


def test_the_sign_test_is_binomial_where_pairs_are_apart() -> None:
    """With pairs apart, sure means |wins - losses| > Z sqrt(n)."""
    for n in (100, 900):
        edge = int(Z * n**0.5)
        for extra, sure in ((-2, False), (2, True)):
            wins = (n + edge + extra) // 2 + 1 if sure else (n + edge + extra) // 2
            difference = np.r_[np.ones(wins), -np.ones(n - wins)]
            told = told_by(difference, np.arange(n))
            assert told.sure is sure and told.share == pytest.approx(wins / n) and told.differ == n
            assert told.accuracy == pytest.approx(told.share)
            assert told_by(-difference, np.arange(n)).share == pytest.approx(1 - wins / n)


def test_pairs_that_do_not_differ_count_as_guessed() -> None:
    told = told_by(np.r_[np.ones(50), np.zeros(150)], np.arange(200))
    assert (told.share, told.differ, told.accuracy, told.sure) == (1.0, 50, 0.625, True)


def test_the_regression_finds_what_no_feature_tells_alone() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 5))
    x *= np.sign(x[:, 0] - x[:, 1])[:, None]  # the sum of two tells all
    told, weights, predicted = told_by_regression(x, np.arange(600))
    assert told.sure and told.accuracy > 0.97 and weights[0] > 1 and weights[1] < -1 and (predicted > 0).mean() > 0.97
    assert all(told_by(x[:, n], np.arange(600)).accuracy < 0.8 for n in range(5))
    again = told_by_regression(-x, np.arange(600))[0]
    assert again.accuracy == told.accuracy  # sides have no names


def test_copies_in_either_order() -> None:
    prompts = np.array([1, 1, 1, 1, 2])
    winners, losers = np.array([7, 8, 7, 9, 7]), np.array([8, 7, 8, 7, 8])
    found = {finding.check: finding for finding in repeated(prompts, winners, losers, list("abcde"))}
    assert set(found) == {"contradictory-labels", "duplicate-pairs"}
    assert (found["contradictory-labels"].rows, found["duplicate-pairs"].rows) == (3, 1)
    assert [row for row, _ in found["duplicate-pairs"].examples] == ["c"]
    assert repeated(prompts[:1], winners[:1], losers[:1], ["a"]) == []


@pytest.mark.parametrize(("bits", "light", "count"), [(3, 2, 2), (4, 2, 0), (3, 9, 0), (0, 0, 2)])
def test_near_copies_by_hash_and_light(bits: int, light: int, count: int) -> None:
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**63, (300, 2), dtype=np.uint64)
    thumbs = rng.integers(20, 200, (300, 2, 48), dtype=np.uint8)
    hashes[299], thumbs[299] = hashes[0], thumbs[0] + light
    hashes[299, 0] ^= np.uint64(sum(1 << place for place in (0, 17, 33, 50)[:bits]))
    found = near(hashes, thumbs, np.arange(600, dtype=np.uint64).reshape(300, 2), [str(n) for n in range(300)])
    assert sum(finding.rows for finding in found) == count
    if count:
        assert found[0].examples == (("299", "like 0"),)


def test_prompts_are_compared_without_case_and_spaces() -> None:
    assert plain(" A  red\tFox. ") == plain("a red fox") != plain("a red foxes")


NASTY = "<img src=x onerror=alert(1)>{{ 7*7 }}</style><script>"


def diagnosis(*severities: str) -> Diagnosis:
    names = {"error": "pictures-broken", "warning": "licence-missing", "note": "ties-and-votes-lost"}
    found = [Finding(names[s], s, 3, 200, NASTY, ((NASTY, NASTY), ("row 2", ""))) for s in severities]
    return Diagnosis(NASTY, "images", 200, tuple(found), {NASTY: NASTY}, ("identical-sides",))


def test_the_page_is_inert_and_whole(tmp_path: Path) -> None:
    shown = {"row 2": Shown(NASTY, (("a", NASTY), ("b", ""))), NASTY: Shown(NASTY, (("winner", ""), ("loser", NASTY)))}
    page = render(diagnosis("error", "warning", "note"), shown, command=NASTY)
    assert (
        page.count("<img") == 6 and "<img src=x" not in page and "<script" not in page and page.count("</style>") == 1
    )
    assert page.count(html.escape(NASTY)) == page.count("&lt;img src=x") > 8 and "{{ 7*7 }}" in page
    assert "default-src 'none'" in page and "http://" not in page and "https://" not in page
    assert "1 error, 1 warning, 1 note" in page and "Pictures that do not decode" in page and "of 200" in page
    assert write_report(tmp_path / "deep" / "r.html", diagnosis(), command="x").read_text().count("nothing found") == 2
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    ("severities", "failed", "strict"),
    [((), False, False), (("note",), False, False), (("warning",), False, True), (("error",), True, True)],
)
def test_what_fails(severities: tuple[str, ...], failed: bool, strict: bool) -> None:
    found = diagnosis(*severities)
    assert (found.failed(), found.failed(strict=True)) == (failed, strict)


def test_every_check_has_words_and_a_severity() -> None:
    assert len(CHECKS) == 29
    assert all(about.title and about.advice and about.severity in SEVERITIES for about in CHECKS.values())


def test_long_examples_are_cut_in_their_middle() -> None:
    assert cut("a\n b") == "a b" and len(cut("x" * 1000)) < 210 and cut("y" * 999 + "end").endswith("end")


@pytest.mark.parametrize(("arguments", "status"), [((), 0), (("--strict",), 1), (("--held-out", "shapes-train"), 1)])
def test_the_exit_status_is_for_scripts(
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
    assert ("Prompts that are in the held-out set too" in printed) == bool(status and "--strict" not in arguments)


def test_the_page_on_sets_has_the_tables_of_the_code() -> None:
    import importlib.util

    file = Path(__file__).parents[3] / "docs" / "write_sets_table.py"
    spec = importlib.util.spec_from_file_location("write_sets_table", file)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text()
    assert page == script.written(page) and "| `pickapic` | pairs of images |" in page
    assert script.written(page.replace("| `pickapic` |", "| `other` |")) == page

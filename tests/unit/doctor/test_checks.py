"""Every check of the doctor finds a planted fault, in image and response datasets, and none in a clean dataset."""

from __future__ import annotations

import base64
import copy
import io
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpo_mm.data.schema import image_preference, response_preference
from dpo_mm.doctor import Diagnosis, examine, image_checks, response_checks
from dpo_mm.doctor.checks import CHECKS, SHORTCUT_CHECKS
from dpo_mm.doctor.doctor_report import write_report
from dpo_mm.doctor.image_features import extract_features
from dpo_mm.doctor.shortcuts import MIN_GROUPS

ROWS = 210
MODELS = ("red", "green", "blue", "grey")
Rows = list[dict[str, Any]]


def random_image(seed: int, side: int = 24) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str = "BMP", **options: Any) -> bytes:
    """Encode an image. BMP is lossless, and its files of images of one size have one size."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def image_rows() -> Rows:
    """Rows without a fault: balanced labels, four models, votes that agree with the label, ties, two pairs per prompt."""
    rng = random.Random(0)
    rows = []
    for n in range(ROWS):
        preference = rng.choice(("a", "b", "a", "b", "a", "b", "a", "b", "tie"))
        votes = {"a": (4, 1), "b": (1, 4), "tie": (2, 2)}[preference]
        rows.append(
            {
                "id": f"pair {n}",
                "prompt": f"Prompt {n // 2} of some kind.",
                "image_a": {"bytes": encode(random_image(2 * n)), "path": None},
                "image_b": {"bytes": encode(random_image(2 * n + 1)), "path": None},
                "preference": preference,
                "votes_a": votes[0],
                "votes_b": votes[1],
                "model_a": rng.choice(MODELS),
                "model_b": rng.choice(MODELS),
                "source": "rapidata",
                "license": "cc0-1.0",
            }
        )
    return rows


def response_rows() -> Rows:
    """Rows without a fault: chosen and rejected have the same distribution of length, lists and refusals. One image per row."""
    rng = random.Random(1)
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "sits",
        "runs",
        "on",
        "under",
        "red",
        "green",
        "mat",
        "tree",
        "quickly",
        "slowly",
        "and",
        "then",
        "looks",
    ]

    def response() -> str:
        text = " ".join(rng.choice(words) for _ in range(rng.randint(5, 40))) + "."
        if rng.random() < 0.1:
            text = "I'm sorry, but I can't help with that. " + text
        return "- one\n- two\n" + text if rng.random() < 0.2 else text

    return [
        {
            "id": f"row {n}",
            "images": [{"bytes": encode(random_image(n)), "path": None}],
            "prompt": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Question {n % 9}?"}]}
            ],
            "chosen": message(response()),
            "rejected": message(response()),
            "score_gap": rng.random(),
            "chosen_model": rng.choice(MODELS),
            "rejected_model": rng.choice(MODELS),
            "source": "vl-feedback",
            "license": "cc0-1.0",
        }
        for n in range(ROWS)
    ]


def message(text: str, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": role, "content": [{"type": "text", "text": text}]}]


def text_of(row: dict[str, Any], column: str) -> str:
    return row[column][0]["content"][-1]["text"]


def winner(row: dict[str, Any]) -> tuple[str, str] | None:
    """Return the letters of winner and loser."""
    return {"a": ("a", "b"), "b": ("b", "a")}.get(row["preference"])


def change_images(rows: Rows, change: Callable[[bytes, bool], bytes]) -> None:
    """Change both images of every pair with a winner. change(data, is_winner) returns the new file."""
    for row in rows:
        for n, letter in enumerate(winner(row) or ()):
            row[f"image_{letter}"] = {"bytes": change(row[f"image_{letter}"]["bytes"], n == 0), "path": None}


def add_copy(rows: Rows, number: int, **changes: Any) -> None:
    rows.append({**copy.deepcopy(rows[number]), "id": f"copy of {number}", **changes})


def first_win_of_a(rows: Rows, start: int = 3) -> int:
    """Return the first row from `start` that a won."""
    return next(n for n, row in enumerate(rows) if n >= start and row["preference"] == "a")


def add_swapped(rows: Rows, preference: str, start: int) -> None:
    """Add a copy with a and b swapped. With preference b the winner is swapped too, so only the order differs."""
    number = first_win_of_a(rows, start)
    row = rows[number]
    votes = {"votes_a": 1, "votes_b": 4} if preference == "b" else {}
    add_copy(rows, number, image_a=row["image_b"], image_b=row["image_a"], preference=preference, **votes)


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def brighten_winner(data: bytes, won: bool) -> bytes:
    return encode(decode(data).point(lambda value: min(255, value + 30))) if won else data


def enlarge_winner(data: bytes, won: bool) -> bytes:
    return encode(decode(data).resize((26, 26))) if won else data


def encode_winner_as_png(data: bytes, won: bool) -> bytes:
    return encode(decode(data), "PNG") if won else encode(decode(data), "WEBP", lossless=True)


def set_all(rows: Rows, **values: Any) -> None:
    for row in rows:
        row.update(values)


def update(rows: Rows, number: int, **values: Any) -> None:
    rows[number].update(values)


def set_models(rows: Rows, models_of: Callable[[int], tuple[str, str]], names: tuple[str, str]) -> None:
    """Set the models of winner and loser, in the columns of images (a, b) or of responses (chosen, rejected)."""
    for n, row in enumerate(rows):
        first, second = winner(row) or ("a", "b") if "preference" in row else names
        row[names[0].format(first)], row[names[1].format(second)] = models_of(n)


def as_jpeg(cell: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": encode(decode(cell["bytes"]), "JPEG", quality=95, subsampling=0), "path": None}


IMAGE_MODELS = ("model_{}", "model_{}")
RESPONSE_MODELS = ("chosen_model", "rejected_model")
ALWAYS, TWO = (lambda n: ("red", MODELS[1 + n % 3])), (lambda n: ("red", "blue") if n % 2 else ("blue", "red"))

IMAGE_FAULTS: dict[str, Callable[..., object]] = {
    "labels-unknown": lambda rows, n=3: update(rows, n, preference="left"),
    "labels-against-evidence": lambda rows, n=3: update(rows, first_win_of_a(rows, n), votes_a=2, votes_b=2),
    "contradictory-labels": lambda rows, n=3: add_swapped(rows, "a", n),
    "duplicate-pairs": lambda rows, n=3: add_swapped(rows, "b", n),
    "ids-repeated": lambda rows, n=3: update(rows, first_win_of_a(rows, n), id=rows[first_win_of_a(rows, 190)]["id"]),
    "near-duplicate-pairs": lambda rows, n=3: add_copy(
        rows,
        first_win_of_a(rows, n),
        **{column: as_jpeg(rows[first_win_of_a(rows, n)][column]) for column in ("image_a", "image_b")},
    ),
    "identical-sides": lambda rows, n=3: update(
        rows, first_win_of_a(rows, n), image_b=rows[first_win_of_a(rows, n)]["image_a"]
    ),
    "near-identical-sides": lambda rows, n=3: update(
        rows, first_win_of_a(rows, n), image_b=as_jpeg(rows[first_win_of_a(rows, n)]["image_a"])
    ),
    "undecodable-images": lambda rows, n=3: [
        update(rows, n + k, image_a={"bytes": data, "path": None})
        for k, data in enumerate(
            (b"", b"<html>", rows[n]["image_a"]["bytes"][:300], encode(random_image(1), "JPEG")[:400])
        )
    ],
    "held-out-prompts": lambda rows, n=3: update(rows, n, prompt="a  prompt HELD out"),
    "held-out-images": lambda rows, n=3: update(
        rows, n, image_a={"bytes": encode(random_image(9999), "PNG"), "path": None}
    ),
    "model-always-wins": lambda rows, n=3: set_models(rows, ALWAYS, IMAGE_MODELS),
    "same-two-models": lambda rows, n=3: set_models(rows, TWO, IMAGE_MODELS),
    "resolution-shortcut": lambda rows, n=3: change_images(rows, enlarge_winner),
    "colour-shortcut": lambda rows, n=3: change_images(rows, brighten_winner),
    "format-shortcut": lambda rows, n=3: change_images(rows, encode_winner_as_png),
    "file-size-shortcut": lambda rows, n=3: change_images(rows, lambda data, won: data + b"0" * (400 * won)),
    "trivial-features": lambda rows, n=3: change_images(rows, brighten_winner),
    "empty-prompts": lambda rows, n=3: update(rows, n, prompt=" "),
    "no-ties-or-votes": lambda rows, n=3: [
        row.update(votes_a=None, votes_b=None, preference=row["preference"].replace("tie", "a")) for row in rows
    ],
    "licence-missing": lambda rows, n=3: update(rows, n, license=None),
    "licence-non-commercial": lambda rows, n=3: update(rows, n, license="cc-by-nc-4.0"),
}
RESPONSE_FAULTS: dict[str, Callable[..., object]] = {
    "labels-against-evidence": lambda rows, n=3: update(rows, n, score_gap=-0.5),
    "contradictory-labels": lambda rows, n=3: add_copy(rows, n, chosen=rows[n]["rejected"], rejected=rows[n]["chosen"]),
    "duplicate-pairs": lambda rows, n=3: add_copy(rows, n),
    "ids-repeated": lambda rows, n=3: update(rows, n, id=rows[n + 1]["id"]),
    "identical-sides": lambda rows, n=3: update(rows, n, rejected=message(text_of(rows[n], "chosen") + " \n")),
    "undecodable-images": lambda rows, n=3: update(rows, n, images=[{"bytes": b"GIF89a", "path": None}]),
    "held-out-prompts": lambda rows, n=3: update(
        rows,
        3,
        prompt=message("What is HELD out?", "user"),
        images=[{"bytes": encode(random_image(9999)), "path": None}],
    ),
    "held-out-images": lambda rows, n=3: update(
        rows, n, images=[{"bytes": encode(random_image(9999), "PNG"), "path": None}]
    ),
    "model-always-wins": lambda rows, n=3: set_models(rows, ALWAYS, RESPONSE_MODELS),
    "same-two-models": lambda rows, n=3: set_models(rows, TWO, RESPONSE_MODELS),
    "length-shortcut": lambda rows, n=3: [
        row.update(chosen=message(text_of(row, "chosen") + " And so on." * 9)) for row in rows
    ],
    "markup-shortcut": lambda rows, n=3: [
        row.update(
            chosen=message(f"**Yes**: {text_of(row, 'chosen')}"),
            rejected=message(f"Yes:     {text_of(row, 'rejected')}"),
        )
        for row in rows
    ],
    "refusal-shortcut": lambda rows, n=3: [
        update(rows, n, rejected=message("I cannot help with this one.")) for n in range(40, 90)
    ],
    "trivial-features": lambda rows, n=3: [
        row.update(chosen=message(text_of(row, "chosen") + " And so on." * 9)) for row in rows
    ],
    "empty-responses": lambda rows, n=3: update(rows, n, chosen=message("\n")),
    "empty-prompts": lambda rows, n=3: update(rows, n, prompt=message("", "user")),
    "prompts-differ": lambda rows, n=3: update(rows, n, chosen=[*message("Really?", "user"), *rows[n]["chosen"]]),
    "tokens-in-text": lambda rows, n=3: update(rows, n, prompt=message("<image>\nWhat?", "user")),
    "images-misplaced": lambda rows, n=3: update(rows, n, images=rows[n]["images"] * 2),
    "no-ties-or-votes": lambda rows, n=3: set_all(rows, score_gap=None),
    "licence-missing": lambda rows, n=3: update(rows, n, license=None),
    "licence-non-commercial": lambda rows, n=3: update(rows, n, license="Research-only"),
}
SIDE_FINDINGS = {
    "resolution-shortcut": {"file-size-shortcut", "trivial-features"},
    "format-shortcut": {"file-size-shortcut", "trivial-features"},
    "file-size-shortcut": {"trivial-features"},
    "colour-shortcut": {"trivial-features"},
    "trivial-features": {"colour-shortcut", "length-shortcut"},
    "length-shortcut": {"trivial-features"},
    "markup-shortcut": {"trivial-features"},
    "refusal-shortcut": {"trivial-features", "length-shortcut"},
    "held-out-prompts": {"held-out-images"},
}
"""Findings that a planted fault also causes, correctly."""


def write(rows: Rows, path: Path, kind: str) -> str:
    from datasets import Dataset

    features = image_preference() if kind == "images" else response_preference()
    full = [{name: row.get(name) for name in features} for row in rows]
    Dataset.from_list(full, features=features).to_parquet(str(path))
    return str(path)


@pytest.fixture(scope="module")
def clean() -> dict[str, Rows]:
    return {"images": image_rows(), "responses": response_rows()}


CACHE: dict[bytes, Any] = {}


@pytest.fixture(autouse=True)
def cache_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the features of each file once. The tests share a few hundred files."""

    def cached(cell: Any) -> Any:
        data = bytes(cell["bytes"] or b"")
        if data not in CACHE:
            CACHE[data] = extract_features(cell)
        return CACHE[data]

    for module in (image_checks, response_checks):
        monkeypatch.setattr(module, "extract_features", cached)


@pytest.fixture
def diagnose(tmp_path: Path, clean: dict[str, Rows]) -> Callable[..., Diagnosis]:
    """Function that examines a clean dataset after changes, with a held-out dataset of one prompt and one image."""

    def diagnose(kind: str, *changes: Callable[[Rows], object]) -> Diagnosis:
        rows = copy.deepcopy(clean[kind])
        for change in changes:
            change(rows)
        cell = {"bytes": encode(random_image(9999)), "path": None}
        held: dict[str, Any] = {"id": "h", "prompt": "A prompt held out.", "preference": "a"}
        held |= {"image_a": cell, "image_b": {"bytes": encode(random_image(9998)), "path": None}}
        if kind == "responses":
            held = {"id": "h", "prompt": message("What is held out?", "user"), "images": [cell], "chosen": message("x")}
            held["rejected"] = message("y")
        held_out = write([held], tmp_path / "held.parquet", kind)
        uncertain = frozenset({"rapidata", "vl-feedback"})
        return examine(write(rows, tmp_path / "set.parquet", kind), held_out=held_out, uncertain=uncertain)

    return diagnose


@pytest.mark.parametrize("kind", ["images", "responses"])
def test_examine_clean_dataset_has_no_findings(kind: str, diagnose: Callable[..., Diagnosis]) -> None:
    diagnosis = diagnose(kind)
    assert diagnosis.rows == ROWS and diagnosis.findings == () and not diagnosis.failed(strict=True)
    assert set(diagnosis.passed) == {check for check, spec in CHECKS.items() if kind in spec.kinds}


CASES = [("images", name) for name in IMAGE_FAULTS] + [("responses", name) for name in RESPONSE_FAULTS]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_examine_each_planted_fault_is_reported(kind: str, name: str, diagnose: Callable[..., Diagnosis]) -> None:
    diagnosis = diagnose(kind, (IMAGE_FAULTS if kind == "images" else RESPONSE_FAULTS)[name])
    checks = {finding.check for finding in diagnosis.findings}
    assert name in checks and checks <= {name} | SIDE_FINDINGS.get(name, set())
    (finding,) = (finding for finding in diagnosis.findings if finding.check == name)
    assert 0 < finding.rows <= finding.total and finding.summary and finding.advice
    assert len(finding.examples) == min(5, finding.rows) or name in ("no-ties-or-votes", "near-duplicate-pairs")
    assert diagnosis.failed(strict=True) == (finding.severity != "note")


@pytest.mark.parametrize("kind", ["images", "responses"])
def test_examine_all_planted_faults_are_reported(kind: str, diagnose: Callable[..., Diagnosis]) -> None:
    faults = dict(IMAGE_FAULTS if kind == "images" else RESPONSE_FAULTS)
    excluded = {"same-two-models", "no-ties-or-votes", "trivial-features", "near-identical-sides"}
    ordered = sorted(
        faults, key=lambda name: not name.endswith(("shortcut", "wins"))
    )  # faults that change all rows come first
    changes = [partial(faults[name], n=5 + 8 * k) for k, name in enumerate(ordered) if name not in excluded]
    diagnosis = diagnose(kind, *changes)
    assert {finding.check for finding in diagnosis.findings} >= set(faults) - excluded
    assert diagnosis.findings[0].severity == "error" and diagnosis.failed()


def test_checks_each_have_a_planted_fault() -> None:
    for kind, faults in (("images", IMAGE_FAULTS), ("responses", RESPONSE_FAULTS)):
        assert set(faults) == {check for check, spec in CHECKS.items() if kind in spec.kinds}


@pytest.mark.parametrize(
    ("kind", "name", "row", "words"),
    [
        ("images", "labels-against-evidence", "pair 4", "the label is a, but the votes are 2 to 2"),
        ("images", "undecodable-images", "pair 3", "image_a does not decode (it is missing)"),
        ("responses", "empty-responses", "row 3", "chosen is empty"),
        ("responses", "images-misplaced", "row 3", "2 images, 1 image parts"),
        ("responses", "tokens-in-text", "row 3", "<image>"),
    ],
)
def test_finding_examples_have_row_id_and_reason(
    kind: str, name: str, row: str, words: str, diagnose: Callable[..., Diagnosis]
) -> None:
    diagnosis = diagnose(kind, (IMAGE_FAULTS if kind == "images" else RESPONSE_FAULTS)[name])
    assert diagnosis.findings[0].examples[0] == (row, words)


def test_report_shows_example_rows(tmp_path: Path, clean: dict[str, Rows]) -> None:
    rows = copy.deepcopy(clean["images"])
    winning = first_win_of_a(rows, 100)
    IMAGE_FAULTS["labels-against-evidence"](rows, n=100)
    IMAGE_FAULTS["undecodable-images"](rows, n=30)
    update(rows, 31, preference="tie", votes_a=None, votes_b=None)
    page = write_report(tmp_path / "r.html", examine(write(rows, tmp_path / "set.parquet", "images")), command="c")
    text = page.read_text()
    assert text.count("data:image/png") == 2 + 3 and text.count("does not decode</em>") == 3
    assert text.count('class="a"') == text.count('class="b"') == 1
    first = text.index(f"winner of pair {winning}")
    image = Image.open(io.BytesIO(base64.b64decode(text[:first].rpartition("base64,")[2].partition('"')[0])))
    assert (np.asarray(image) == np.asarray(random_image(2 * winning))).all()
    rows = copy.deepcopy(clean["responses"])
    update(rows, 7, rejected=message("same <b>"), chosen=message("same <b>"))
    page = write_report(tmp_path / "r.html", examine(write(rows, tmp_path / "set.parquet", "responses")), command="c")
    assert page.read_text().count("<p>same &lt;b&gt;</p>") == 2


def test_shortcut_findings_report_fraction_and_accuracy(diagnose: Callable[..., Diagnosis]) -> None:
    diagnosis = diagnose("images", IMAGE_FAULTS["resolution-shortcut"])
    first = diagnosis.findings[0]
    assert (first.check, first.severity) == ("resolution-shortcut", "error")
    assert (
        "the winner has more pixels in 100% of the 187 pairs" in first.summary
        and "predicts 100% of all winners" in first.summary
    )
    longer = diagnose("responses", RESPONSE_FAULTS["length-shortcut"]).findings[0]
    assert longer.check == "length-shortcut" and "its correlation with the score gap is" in longer.summary
    shorter = diagnose(
        "responses", lambda rows: [row.update(rejected=message(text_of(row, "rejected") * 4)) for row in rows]
    )
    assert "the winner is shorter in" in next(f for f in shorter.findings if f.check == "length-shortcut").summary


@pytest.mark.parametrize("kind", ["images", "responses"])
def test_shortcuts_of_few_prompts_are_not_tested(kind: str, diagnose: Callable[..., Diagnosis]) -> None:
    """Mutation that it catches: checks that cannot fail count as passed."""
    for prompts, tested in ((MIN_GROUPS - 1, False), (MIN_GROUPS, True)):

        def share_prompts(rows: Rows, prompts: int = prompts) -> None:
            for number, row in enumerate(rows):
                row["group_id"] = f"group {number % prompts}"

        diagnosis = diagnose(kind, share_prompts)
        shortcuts = {check for check in SHORTCUT_CHECKS if kind in CHECKS[check].kinds}
        assert shortcuts & set(diagnosis.passed) == (shortcuts if tested else set())
        assert ("not tested" in diagnosis.facts) == (not tested)


def test_examine_held_out_text_file_is_checked(tmp_path: Path, clean: dict[str, Rows]) -> None:
    path = write(clean["images"], tmp_path / "set.parquet", "images")
    (tmp_path / "held.txt").write_text("something else\nprompt 3 of some kind\n")
    (finding,) = examine(path, held_out=str(tmp_path / "held.txt")).findings
    assert (finding.check, finding.rows, finding.examples[0][0]) == ("held-out-prompts", 2, "pair 6")
    prompts = (tmp_path / "held.txt").read_text().splitlines()
    (tmp_path / "held.csv").write_text("\n".join(["prompt,category", *(f'"{prompt}",all' for prompt in prompts)]))
    assert examine(path, held_out=str(tmp_path / "held.csv")).findings == (finding,)


def test_examine_folder_and_bundled_dataset(tmp_path: Path, clean: dict[str, Rows]) -> None:
    (tmp_path / "set").mkdir()
    for n in range(3):
        write(clean["images"][n * 80 : n * 80 + 80], tmp_path / "set" / f"{n}.parquet", "images")
    diagnosis = examine(str(tmp_path / "set"))
    assert diagnosis.rows == ROWS and not diagnosis.findings
    bundled = examine("shapes-faithfulness", held_out="shapes-held-out")
    assert not bundled.failed() and bundled.rows == 708
    assert {f.check for f in bundled.findings} <= {"licence-missing", "trivial-features"}


def test_examine_unreadable_dataset_raises_with_its_name(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"caption": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=r"x\.parquet: has columns caption\. Expected prompt, image_a, .*dpo-mm import"
    ):
        examine(str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match="no such file or folder"):
        examine(str(tmp_path / "y.parquet"))
    (tmp_path / "z.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not readable as Parquet"):
        examine(str(tmp_path / "z.parquet"))


def test_votes_of_a_relabelled_row_are_about_its_old_label() -> None:
    """Mutation: compare the new label with them."""
    row = {"preference": "a", "p_a": 0.7, "votes_a": 0, "votes_b": 1}
    assert "votes are 0 to 1" in image_checks._label_contradiction(row)
    assert not image_checks._label_contradiction({**row, "given_preference": "b"})
    assert "p_a is 0.3" in image_checks._label_contradiction({**row, "given_preference": "b", "p_a": 0.3})

"""One planted fault of each kind is found and named, in a set of pictures and in one of answers; a clean set is clean."""

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
from dpo_mm.doctor.checks import CHECKS
from dpo_mm.doctor.doctor_report import write_report
from dpo_mm.doctor.image_features import look

ROWS = 210
MODELS = ("red", "green", "blue", "grey")
Rows = list[dict[str, Any]]


def picture(seed: int, side: int = 24) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "BMP", **options: Any) -> bytes:
    """BMP: of two pictures of one size the files are of one size, and nothing is lost."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_rows() -> Rows:
    """A clean set: balanced sides, four models, votes that agree with the label, ties, two pairs a prompt."""
    rng = random.Random(0)
    rows = []
    for n in range(ROWS):
        preference = rng.choice(("a", "b", "a", "b", "a", "b", "a", "b", "tie"))
        votes = {"a": (4, 1), "b": (1, 4), "tie": (2, 2)}[preference]
        rows.append(
            {
                "id": f"pair {n}",
                "prompt": f"Prompt {n // 2} of some kind.",
                "image_a": {"bytes": encoded(picture(2 * n)), "path": None},
                "image_b": {"bytes": encoded(picture(2 * n + 1)), "path": None},
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


def answer_rows() -> Rows:
    """A clean set: answers of any length, some with lists, some that refuse, on either side alike; a picture a row."""
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

    def answer() -> str:
        text = " ".join(rng.choice(words) for _ in range(rng.randint(5, 40))) + "."
        if rng.random() < 0.1:
            text = "I'm sorry, but I can't help with that. " + text
        return "- one\n- two\n" + text if rng.random() < 0.2 else text

    return [
        {
            "id": f"row {n}",
            "images": [{"bytes": encoded(picture(n)), "path": None}],
            "prompt": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Question {n % 9}?"}]}
            ],
            "chosen": say(answer()),
            "rejected": say(answer()),
            "score_gap": rng.random(),
            "chosen_model": rng.choice(MODELS),
            "rejected_model": rng.choice(MODELS),
            "source": "vl-feedback",
            "license": "cc0-1.0",
        }
        for n in range(ROWS)
    ]


def say(text: str, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": role, "content": [{"type": "text", "text": text}]}]


def text_of(row: dict[str, Any], side: str) -> str:
    return row[side][0]["content"][-1]["text"]


def winner(row: dict[str, Any]) -> tuple[str, str] | None:
    """The winner's letter and the loser's."""
    return {"a": ("a", "b"), "b": ("b", "a")}.get(row["preference"])


def sided(rows: Rows, change: Callable[[bytes, bool], bytes]) -> None:
    """Change every decided pair's pictures, told which is the winner's."""
    for row in rows:
        for place, letter in enumerate(winner(row) or ()):
            row[f"image_{letter}"] = {"bytes": change(row[f"image_{letter}"]["bytes"], place == 0), "path": None}


def again(rows: Rows, number: int, **changes: Any) -> None:
    rows.append({**copy.deepcopy(rows[number]), "id": f"copy of {number}", **changes})


def decided(rows: Rows, start: int = 3) -> int:
    """The first pair from there on that its side a won."""
    return next(n for n, row in enumerate(rows) if n >= start and row["preference"] == "a")


def swapped(rows: Rows, preference: str, start: int) -> None:
    """The same pair again with its sides swapped; "b": and its winner, so that nothing but the order is new."""
    place = decided(rows, start)
    row = rows[place]
    votes = {"votes_a": 1, "votes_b": 4} if preference == "b" else {}
    again(rows, place, image_a=row["image_b"], image_b=row["image_a"], preference=preference, **votes)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def lighter(data: bytes, won: bool) -> bytes:
    return encoded(opened(data).point(lambda value: min(255, value + 30))) if won else data


def larger(data: bytes, won: bool) -> bytes:
    return encoded(opened(data).resize((26, 26))) if won else data


def in_formats(data: bytes, won: bool) -> bytes:
    return encoded(opened(data), "PNG") if won else encoded(opened(data), "WEBP", lossless=True)


def set_all(rows: Rows, **values: Any) -> None:
    for row in rows:
        row.update(values)


def put(rows: Rows, number: int, **values: Any) -> None:
    rows[number].update(values)


def models(rows: Rows, choose: Callable[[int], tuple[str, str]], names: tuple[str, str]) -> None:
    """Models of winner and loser, in the columns that go by the side or by the outcome."""
    for n, row in enumerate(rows):
        first, second = winner(row) or ("a", "b") if "preference" in row else names
        row[names[0].format(first)], row[names[1].format(second)] = choose(n)


def jpeg(cell: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": encoded(opened(cell["bytes"]), "JPEG", quality=95, subsampling=0), "path": None}


SIDES = ("model_{}", "model_{}")
OUTCOMES = ("chosen_model", "rejected_model")
ALWAYS, TWO = (lambda n: ("red", MODELS[1 + n % 3])), (lambda n: ("red", "blue") if n % 2 else ("blue", "red"))

IMAGE_FAULTS: dict[str, Callable[..., object]] = {
    "labels-unknown": lambda rows, n=3: put(rows, n, preference="left"),
    "labels-against-evidence": lambda rows, n=3: put(rows, decided(rows, n), votes_a=2, votes_b=2),
    "contradictory-labels": lambda rows, n=3: swapped(rows, "a", n),
    "duplicate-pairs": lambda rows, n=3: swapped(rows, "b", n),
    "ids-repeated": lambda rows, n=3: put(rows, decided(rows, n), id=rows[decided(rows, 190)]["id"]),
    "near-duplicate-pairs": lambda rows, n=3: again(
        rows, decided(rows, n), **{side: jpeg(rows[decided(rows, n)][side]) for side in ("image_a", "image_b")}
    ),
    "identical-sides": lambda rows, n=3: put(rows, decided(rows, n), image_b=rows[decided(rows, n)]["image_a"]),
    "near-identical-sides": lambda rows, n=3: put(
        rows, decided(rows, n), image_b=jpeg(rows[decided(rows, n)]["image_a"])
    ),
    "pictures-broken": lambda rows, n=3: [
        put(rows, n + k, image_a={"bytes": data, "path": None})
        for k, data in enumerate((b"", b"<html>", rows[n]["image_a"]["bytes"][:300], encoded(picture(1), "JPEG")[:400]))
    ],
    "held-out-prompts": lambda rows, n=3: put(rows, n, prompt="a  prompt HELD out"),
    "held-out-pictures": lambda rows, n=3: put(rows, n, image_a={"bytes": encoded(picture(9999), "PNG"), "path": None}),
    "model-always-wins": lambda rows, n=3: models(rows, ALWAYS, SIDES),
    "same-two-models": lambda rows, n=3: models(rows, TWO, SIDES),
    "resolution-shortcut": lambda rows, n=3: sided(rows, larger),
    "look-shortcut": lambda rows, n=3: sided(rows, lighter),
    "format-shortcut": lambda rows, n=3: sided(rows, in_formats),
    "file-size-shortcut": lambda rows, n=3: sided(rows, lambda data, won: data + b"0" * (400 * won)),
    "trivial-features": lambda rows, n=3: sided(rows, lighter),
    "empty-prompts": lambda rows, n=3: put(rows, n, prompt=" "),
    "ties-and-votes-lost": lambda rows, n=3: [
        row.update(votes_a=None, votes_b=None, preference=row["preference"].replace("tie", "a")) for row in rows
    ],
    "licence-missing": lambda rows, n=3: put(rows, n, license=None),
    "licence-non-commercial": lambda rows, n=3: put(rows, n, license="cc-by-nc-4.0"),
}
ANSWER_FAULTS: dict[str, Callable[..., object]] = {
    "labels-against-evidence": lambda rows, n=3: put(rows, n, score_gap=-0.5),
    "contradictory-labels": lambda rows, n=3: again(rows, n, chosen=rows[n]["rejected"], rejected=rows[n]["chosen"]),
    "duplicate-pairs": lambda rows, n=3: again(rows, n),
    "ids-repeated": lambda rows, n=3: put(rows, n, id=rows[n + 1]["id"]),
    "identical-sides": lambda rows, n=3: put(rows, n, rejected=say(text_of(rows[n], "chosen") + " \n")),
    "pictures-broken": lambda rows, n=3: put(rows, n, images=[{"bytes": b"GIF89a", "path": None}]),
    "held-out-prompts": lambda rows, n=3: put(
        rows, 3, prompt=say("What is HELD out?", "user"), images=[{"bytes": encoded(picture(9999)), "path": None}]
    ),
    "held-out-pictures": lambda rows, n=3: put(
        rows, n, images=[{"bytes": encoded(picture(9999), "PNG"), "path": None}]
    ),
    "model-always-wins": lambda rows, n=3: models(rows, ALWAYS, OUTCOMES),
    "same-two-models": lambda rows, n=3: models(rows, TWO, OUTCOMES),
    "length-shortcut": lambda rows, n=3: [
        row.update(chosen=say(text_of(row, "chosen") + " And so on." * 9)) for row in rows
    ],
    "format-of-text-shortcut": lambda rows, n=3: [
        row.update(
            chosen=say(f"**Yes**: {text_of(row, 'chosen')}"), rejected=say(f"Yes:     {text_of(row, 'rejected')}")
        )
        for row in rows
    ],
    "refusal-shortcut": lambda rows, n=3: [
        put(rows, n, rejected=say("I cannot help with this one.")) for n in range(40, 90)
    ],
    "trivial-features": lambda rows, n=3: [
        row.update(chosen=say(text_of(row, "chosen") + " And so on." * 9)) for row in rows
    ],
    "empty-answers": lambda rows, n=3: put(rows, n, chosen=say("\n")),
    "empty-prompts": lambda rows, n=3: put(rows, n, prompt=say("", "user")),
    "prompts-differ": lambda rows, n=3: put(rows, n, chosen=[*say("Really?", "user"), *rows[n]["chosen"]]),
    "tokens-in-text": lambda rows, n=3: put(rows, n, prompt=say("<image>\nWhat?", "user")),
    "images-misplaced": lambda rows, n=3: put(rows, n, images=rows[n]["images"] * 2),
    "ties-and-votes-lost": lambda rows, n=3: set_all(rows, score_gap=None),
    "licence-missing": lambda rows, n=3: put(rows, n, license=None),
    "licence-non-commercial": lambda rows, n=3: put(rows, n, license="Research-only"),
}
COMES_WITH = {
    "resolution-shortcut": {"file-size-shortcut", "trivial-features"},
    "format-shortcut": {"file-size-shortcut", "trivial-features"},
    "file-size-shortcut": {"trivial-features"},
    "look-shortcut": {"trivial-features"},
    "trivial-features": {"look-shortcut", "length-shortcut"},
    "length-shortcut": {"trivial-features"},
    "format-of-text-shortcut": {"trivial-features"},
    "refusal-shortcut": {"trivial-features", "length-shortcut"},
    "held-out-prompts": {"held-out-pictures"},
}
"""What else a planted fault is, so that it is rightly found with it."""


def write(rows: Rows, path: Path, kind: str) -> str:
    from datasets import Dataset

    features = image_preference() if kind == "images" else response_preference()
    full = [{name: row.get(name) for name in features} for row in rows]
    Dataset.from_list(full, features=features).to_parquet(str(path))
    return str(path)


@pytest.fixture(scope="module")
def clean() -> dict[str, Rows]:
    return {"images": image_rows(), "answers": answer_rows()}


LOOKS: dict[bytes, Any] = {}


@pytest.fixture(autouse=True)
def each_file_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same few hundred files go through every test; what a file looks like is a function of its bytes."""

    def cached(cell: Any) -> Any:
        data = bytes(cell["bytes"] or b"")
        if data not in LOOKS:
            LOOKS[data] = look(cell)
        return LOOKS[data]

    for module in (image_checks, response_checks):
        monkeypatch.setattr(module, "look", cached)


@pytest.fixture
def diagnose(tmp_path: Path, clean: dict[str, Rows]) -> Callable[..., Diagnosis]:
    """Looks at a clean set with changes, beside a held-out set with one prompt and one picture."""

    def diagnose(kind: str, *changes: Callable[[Rows], object]) -> Diagnosis:
        rows = copy.deepcopy(clean[kind])
        for change in changes:
            change(rows)
        cell = {"bytes": encoded(picture(9999)), "path": None}
        held: dict[str, Any] = {"id": "h", "prompt": "A prompt held out.", "preference": "a"}
        held |= {"image_a": cell, "image_b": {"bytes": encoded(picture(9998)), "path": None}}
        if kind == "answers":
            held = {"id": "h", "prompt": say("What is held out?", "user"), "images": [cell], "chosen": say("x")}
            held["rejected"] = say("y")
        held_out = write([held], tmp_path / "held.parquet", kind)
        uncertain = frozenset({"rapidata", "vl-feedback"})
        return examine(write(rows, tmp_path / "set.parquet", kind), held_out=held_out, uncertain=uncertain)

    return diagnose


@pytest.mark.parametrize("kind", ["images", "answers"])
def test_a_clean_set_is_clean(kind: str, diagnose: Callable[..., Diagnosis]) -> None:
    found = diagnose(kind)
    assert found.rows == ROWS and found.findings == () and not found.failed(strict=True)
    assert set(found.fine) == {check for check, about in CHECKS.items() if kind in about.kinds}


CASES = [("images", name) for name in IMAGE_FAULTS] + [("answers", name) for name in ANSWER_FAULTS]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_each_fault_is_found_and_named(kind: str, name: str, diagnose: Callable[..., Diagnosis]) -> None:
    found = diagnose(kind, (IMAGE_FAULTS if kind == "images" else ANSWER_FAULTS)[name])
    checks = {finding.check for finding in found.findings}
    assert name in checks and checks <= {name} | COMES_WITH.get(name, set())
    (finding,) = (finding for finding in found.findings if finding.check == name)
    assert 0 < finding.rows <= finding.total and finding.what and finding.advice
    assert len(finding.examples) == min(5, finding.rows) or name in ("ties-and-votes-lost", "near-duplicate-pairs")
    assert found.failed(strict=True) == (finding.severity != "note")


@pytest.mark.parametrize("kind", ["images", "answers"])
def test_all_faults_at_once_are_found(kind: str, diagnose: Callable[..., Diagnosis]) -> None:
    faults = dict(IMAGE_FAULTS if kind == "images" else ANSWER_FAULTS)
    left_out = {"same-two-models", "ties-and-votes-lost", "trivial-features", "near-identical-sides"}
    ordered = sorted(faults, key=lambda name: not name.endswith(("shortcut", "wins")))  # what changes all rows first
    apart = [partial(faults[name], n=5 + 8 * k) for k, name in enumerate(ordered) if name not in left_out]
    found = diagnose(kind, *apart)
    assert {finding.check for finding in found.findings} >= set(faults) - left_out
    assert found.findings[0].severity == "error" and found.failed()


def test_every_check_has_its_fault() -> None:
    for kind, faults in (("images", IMAGE_FAULTS), ("answers", ANSWER_FAULTS)):
        assert set(faults) == {check for check, about in CHECKS.items() if kind in about.kinds}


@pytest.mark.parametrize(
    ("kind", "name", "row", "words"),
    [
        ("images", "labels-against-evidence", "pair 4", "a is called the winner, votes are 2 to 2"),
        ("images", "pictures-broken", "pair 3", "image_a does not decode (it is missing)"),
        ("answers", "empty-answers", "row 3", "chosen is empty"),
        ("answers", "images-misplaced", "row 3", "2 images, 1 places"),
        ("answers", "tokens-in-text", "row 3", "<image>"),
    ],
)
def test_examples_say_which_row_and_why(
    kind: str, name: str, row: str, words: str, diagnose: Callable[..., Diagnosis]
) -> None:
    found = diagnose(kind, (IMAGE_FAULTS if kind == "images" else ANSWER_FAULTS)[name])
    assert found.findings[0].examples[0] == (row, words)


def test_the_page_shows_the_rows_to_look_at(tmp_path: Path, clean: dict[str, Rows]) -> None:
    rows = copy.deepcopy(clean["images"])
    place = decided(rows, 100)
    IMAGE_FAULTS["labels-against-evidence"](rows, n=100)
    IMAGE_FAULTS["pictures-broken"](rows, n=30)
    put(rows, 31, preference="tie", votes_a=None, votes_b=None)
    page = write_report(tmp_path / "r.html", examine(write(rows, tmp_path / "set.parquet", "images")), command="c")
    text = page.read_text()
    assert text.count("data:image/png") == 2 + 3 and text.count("can't be shown") == 3
    assert text.count('class="a"') == text.count('class="b"') == 1
    first = text.index(f"winner of pair {place}")
    image = Image.open(io.BytesIO(base64.b64decode(text[:first].rpartition("base64,")[2].partition('"')[0])))
    assert (np.asarray(image) == np.asarray(picture(2 * place))).all()
    rows = copy.deepcopy(clean["answers"])
    put(rows, 7, rejected=say("same <b>"), chosen=say("same <b>"))
    page = write_report(tmp_path / "r.html", examine(write(rows, tmp_path / "set.parquet", "answers")), command="c")
    assert page.read_text().count("<p>same &lt;b&gt;</p>") == 2


def test_shortcuts_say_how_far_they_reach(diagnose: Callable[..., Diagnosis]) -> None:
    found = diagnose("images", IMAGE_FAULTS["resolution-shortcut"])
    first = found.findings[0]
    assert (first.check, first.severity) == ("resolution-shortcut", "error")
    assert (
        "the winner has more pixels in 100% of the 187 pairs" in first.what
        and "tells 100% of all winners" in first.what
    )
    longer = diagnose("answers", ANSWER_FAULTS["length-shortcut"]).findings[0]
    assert longer.check == "length-shortcut" and "its correlation with the margin is" in longer.what
    shorter = diagnose("answers", lambda rows: [row.update(rejected=say(text_of(row, "rejected") * 4)) for row in rows])
    assert "the winner is shorter in" in next(f for f in shorter.findings if f.check == "length-shortcut").what


def test_a_text_list_is_held_out_too(tmp_path: Path, clean: dict[str, Rows]) -> None:
    path = write(clean["images"], tmp_path / "set.parquet", "images")
    (tmp_path / "held.txt").write_text("something else\nprompt 3 of some kind\n")
    (finding,) = examine(path, held_out=str(tmp_path / "held.txt")).findings
    assert (finding.check, finding.rows, finding.examples[0][0]) == ("held-out-prompts", 2, "pair 6")


def test_sets_of_several_files_and_shipped_ones(tmp_path: Path, clean: dict[str, Rows]) -> None:
    (tmp_path / "set").mkdir()
    for n in range(3):
        write(clean["images"][n * 80 : n * 80 + 80], tmp_path / "set" / f"{n}.parquet", "images")
    found = examine(str(tmp_path / "set"))
    assert found.rows == ROWS and not found.findings
    shipped = examine("shapes-faithfulness", held_out="shapes-held-out")
    assert not shipped.failed() and shipped.rows == 708
    assert {f.check for f in shipped.findings} <= {"licence-missing", "trivial-features"}


def test_what_is_no_set_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"caption": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: has columns caption; expected prompt, image_a, .*dpo-mm import"):
        examine(str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match="no such file or folder"):
        examine(str(tmp_path / "y.parquet"))
    (tmp_path / "z.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not readable as Parquet"):
        examine(str(tmp_path / "z.parquet"))

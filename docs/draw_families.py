"""Write the tables of docs/reference/models.md from the contract tests' own results; nothing in them is written by hand.

python docs/draw_families.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from dpo_mm.policies.families import FAMILIES, VLM_POLICY

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).parent / "reference" / "models.md"
GREEN, RED = "✓", "**fails**"
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


class Kind(NamedTuple):
    """One table: what its rows are, the test file that fills it, and which of its tests, parametrised by `family`, is
    which column; whether each family has a file of its own."""

    rows: str
    tests: str
    columns: dict[str, str]
    files: bool


KINDS = {
    "images": Kind(
        "tiny pipeline",
        "tests/contracts/test_diffusion.py",
        {
            "1 fresh": "test_fresh_adapter_gives_the_reference_log_probs",
            "2 swap": "test_swapping_chosen_and_rejected_swaps_their_log_probs",
            "3 batch": "test_log_probs_do_not_depend_on_the_batch",
            "4 first step": "test_denoise_equals_the_upstream_pipelines_first_step",
            "4 decodes": "test_latents_decode_to_the_image_in_the_upstream_pipeline",
            "6 upstream": "test_saved_adapter_generates_the_same_pixels_in_the_upstream_library",
            "7 learns": "test_ten_steps_on_one_pair_raise_its_delta",
        },
        files=True,
    ),
    "responses": Kind(
        "tiny model",
        "tests/contracts/test_vlm.py",
        {
            "1 fresh": "test_fresh_adapter_gives_the_reference_log_probs_despite_dropout",
            "2 swap": "test_swapping_chosen_and_rejected_negates_the_delta",
            "3 batch": "test_log_probs_do_not_depend_on_the_batch",
            "5 prefix": "test_shared_prefix_equals_two_separate_forward_passes",
            "5 all weights": "test_all_parameters_get_the_gradients_of_separate_forward_passes",
            "5 padding": "test_separate_sequences_give_the_same_log_probs_with_left_and_right_padding",
            "5 bf16": "test_bf16_autocast_gives_close_log_probs",
            "cached features": "test_cached_features_give_the_log_probs_of_pixels_and_the_tower_runs_once",
            "6 upstream": "test_saved_adapter_gives_the_same_outputs_in_upstream_classes",
            "7 learns": "test_ten_steps_raise_the_delta_with_and_without_checkpointing",
        },
        files=False,
    ),
}
"""By the name in the page's markers. tests/contracts/conftest.py notes each test's family; the tests note the class (of)
and, where a contract is held in another way, the reason."""


class Result(NamedTuple):
    test: str
    family: str
    passed: bool
    of: str | None
    reason: str | None


def results(tests: str) -> list[Result]:
    """Run a test file. Raises ValueError where pytest wrote no results."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", tests, f"--junitxml={file}"], cwd=ROOT, check=False)
        if not file.exists():
            raise ValueError(f"{tests}: pytest wrote no results; run it by itself to see why")
        return [one for case in ElementTree.parse(file).getroot().iter("testcase") if (one := _result(case))]


def _result(case: ElementTree.Element) -> Result | None:
    noted = {one.get("name"): one.get("value") for one in case.iter("property")}
    if not (family := noted.get("family")):
        return None
    passed = all(case.find(tag) is None for tag in ("failure", "error", "skipped"))
    return Result((case.get("name") or "").partition("[")[0], family, passed, noted.get("of"), noted.get("reason"))


def table(kind: Kind, found: list[Result]) -> str:
    """A row a family, a column a contract; reasons below it."""
    notes: list[str] = []
    of = {one.family: one.of for one in found if one.of}
    head = [kind.rows, "class", *kind.columns, *(["file"] if kind.files else [])]
    rows = [
        [
            family,
            f"`{of[family]}`",
            *(
                cell([r for r in found if (r.test, r.family) == (test, family)], notes)
                for test in kind.columns.values()
            ),
            *([_file(of[family])] if kind.files else []),
        ]
        for family in sorted(of, key=lambda name: (list(FAMILIES).index(of[name]) if of[name] in FAMILIES else 0, name))
    ]
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join([*lines, "", *(f"[{n}] {note}" for n, note in enumerate(notes, 1))]).strip()


def cell(ran: list[Result], notes: list[str]) -> str:
    """Green where every one passed, with the number of its reason where it gave one."""
    if not ran or not all(one.passed for one in ran):
        return RED
    reason = next((one.reason for one in ran if one.reason), None)
    if reason is None:
        return GREEN
    if reason not in notes:
        notes.append(reason)
    return f"{GREEN} [{notes.index(reason) + 1}]"


def _file(of: str) -> str:
    """The file of a class's family."""
    spec = find_spec(FAMILIES.get(of, VLM_POLICY).partition(":")[0])
    assert spec and spec.origin
    return Path(spec.origin).name


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    for name, kind in KINDS.items():
        found = results(kind.tests)
        head = f"By `python docs/draw_families.py`, which runs `{kind.tests}` ({libraries})."
        before, _, rest = page.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        assert end, f"{PAGE}: no markers for {name}"
        page = f"{before}<!-- {name} -->\n{head}\n\n{table(kind, found)}\n{end}{after}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

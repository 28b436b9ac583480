"""The notebooks and the example without this library run, with smaller sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import forked

DOCS = Path(__file__).parents[3] / "docs"
SIZES = {
    "images": "PAIRS, STEPS, SAMPLING_STEPS = 8, 2, 2",
    "judge-and-compare": "PROMPTS, IMAGES_PER_PROMPT, SAMPLING_STEPS = 4, 1, 2",
    "responses": "SCENES, STEPS = 20, 2",
}
"""The first cell of each notebook, smaller."""
RESULTS = {
    "images": "notebook-images/pytorch_lora_weights.safetensors",
    "judge-and-compare": "notebook-compared/report.html",
    "responses": "notebook-responses/adapter_model.safetensors",
}


def cells(name: str) -> list[str]:
    """Code of the cells of a notebook."""
    notebook = json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), f"{name}: strip its results"
    return ["".join(cell["source"]) for cell in code]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SIZES))
def test_notebook_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))
    sizes, *rest = cells(name)
    assert sizes.partition(" = ")[0] == SIZES[name].partition(" = ")[0] and sizes.count("\n") == 0
    (tmp_path / "notebook.py").write_text("\n\n".join([SIZES[name], *rest]))
    forked.run("notebook.py", call=forked.script, cwd=tmp_path, check=True)
    assert (tmp_path / "runs" / RESULTS[name]).exists()


def test_every_notebook_is_run_and_listed() -> None:
    names = sorted(path.stem for path in (DOCS / "notebooks").glob("*.ipynb"))
    assert names == sorted(SIZES) == sorted(RESULTS)
    assert sorted(re.findall(r"\((.+)\.ipynb\)", (DOCS / "notebooks" / "index.md").read_text())) == names


def test_pages_include_files() -> None:
    """Catches a line that a formatter of code in Markdown has changed, which the site then shows in place of the file."""
    found = [
        line for page in DOCS.rglob("*.md") for line in page.read_text(encoding="utf-8").splitlines() if "--8" in line
    ]
    assert len(found) == 4 and all(re.fullmatch(r'--8<--( "[^"]+")?', line) for line in found)


@pytest.mark.slow
def test_example_without_this_library_moves_the_points_to_the_right(tmp_path: Path) -> None:
    """Mutation: swap chosen and rejected."""
    script = DOCS / "examples" / "standalone_diffusion_dpo.py"
    assert "dpo_mm" not in script.read_text()
    done = forked.run(str(script), "200", "30", "500", call=forked.script, cwd=tmp_path, check=True)
    means = [float(number) for number in re.findall("mean x (.+)", done.stdout)]
    assert len(means) == 4 and means[3] > means[0] + 0.1
    assert (tmp_path / "standalone-diffusion-dpo.png").read_bytes().startswith(b"\x89PNG")

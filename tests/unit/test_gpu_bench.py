"""The measurements for a GPU run on a CPU with tiny shapes, resume, and count FLOPs as torch does."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.bench import step_flops
from tests.bench.gpu import __main__ as command
from tests.bench.gpu import figures, running
from tests.bench.gpu.cells import BrokenDevice, Cells, Skipped
from tests.bench.gpu.models import vlm, vlm_rows
from tests.bench.gpu.parts import PARTS, choose
from tests.bench.vlm_step import OURS, our_step

STEP = {"loss", "first_s", "ms", "all_ms", "weights_mib", "peak_mib", "kernels", "kernel_ms", "copies", "longest",
        "attention_kernels", "synchronisations"}  # fmt: skip
FLOPS = {"step_gflop", "allow"}
LEAK = {"leak", "chosen_moved", "shared_minus_separate", "separate_minus_float32", "shared_minus_float32", "log_probs",
        "repeat_separate", "repeat_shared", "attention_kernels"}  # fmt: skip
RATES = {"verdict", "metrics"}
MEMORY = {"estimate_mib", "step_mib", "step_ratio", "weights_mib", "training_mib", "training_ratio"}
HALF = {"pairs", "margin_std", "margins"}
OPTIMIZER = {"optimizer", "ms", "all_ms", "update_ms", "trained", "resident_mib", "step_mib"}
SWITCH = {"layers", "ours_ms", "flag_ms", "peft_ms"}
BATCHES = {"two_ms", "one_ms", "two_peak_bytes", "one_peak_bytes", "margin", "largest_difference"}
RESUMED = {"same_bits", "largest_difference", "largest_weight", "log_lines", "equal_log_lines", "losses"}
COMPILED = {"compile_s", "plan", "graphs", "breaks"}
SECONDS, NO_PACKAGE = {"seconds"}, {"skipped"}
TEXT_TASK = {"mine": SECONDS, "train": SECONDS, "compare": SECONDS, "rates": RATES}
PUBLISHED = {"loss_on_one_draw": {"published", "online", "precomputed"}, "published": STEP | {"parts_ms"},
             "online": STEP | {"parts_ms"}, "precomputed": STEP | {"parts_ms"}, "flops": FLOPS}  # fmt: skip
GENERATED = {"responses", "seconds", "useful_tokens", "slots", "useful_share", "useful_tokens_per_s", "forward_passes"}
EXPECTED: dict[str, dict[str, set[str]]] = {
    "bundled_images": {"train": SECONDS, "compare": SECONDS, "rates": RATES},
    "bundled_ocr": TEXT_TASK,
    "bundled_captioner": TEXT_TASK,
    "steps_sd15": PUBLISHED,
    "steps_sdxl": PUBLISHED,
    "steps_flux": {"online, without cuDNN attention": STEP, "precomputed, without cuDNN attention": STEP, "online": STEP,
                   "flops": {"step_gflop"}},
    "runs_sd15": {"fp32": {"ms", "seconds", "peak_mib"}},
    "vlm_3b_576": {"plain": STEP, "flops": FLOPS},
    "vlm_3b_1024": {"prefix": STEP, "flops": FLOPS},
    "vlm_7b_576": {"reference kept": STEP, "flops": FLOPS},
    "vlm_7b_1024": {"trl": NO_PACKAGE, "flops": FLOPS},
    "attention": {f"{precision}, {kernel}": LEAK for precision in ("fp32", "bf16") for kernel in ("math", "default")},
    "half_images": {"SD1.5": HALF | {"bf16"}},
    "half_flux": {"FLUX.1-dev": HALF | {"fp16"}},
    "half_responses": {f"3B, {layout}": HALF | {"bf16"} for layout in ("separate", "shared_prefix")},
    "memory_images": {"SD1.5, tuning full": MEMORY},
    "memory_large": {f"Qwen2.5-VL-3B, {layout}": MEMORY for layout in ("separate", "shared_prefix")},
    "compile_images": {"off": STEP, "on": STEP | COMPILED},
    "compile_responses": {"off, shared_prefix": STEP, "on, shared_prefix": STEP | COMPILED},
    "optimizers": {"LoRA, channels_last": OPTIMIZER, "full, fused": OPTIMIZER, "full, 8 bits": NO_PACKAGE},
    "references": {"off and on, SD1.5": SWITCH, "off and on, Qwen2.5-VL-3B": SWITCH, "one batch or two": BATCHES},
    "resume": {"whole": SECONDS, "again": SECONDS, "killed": {"exit_code", "checkpoint"}, "resumed": SECONDS,
               "resumed and whole": RESUMED, "whole and again": RESUMED},
    "generation": {"ocr": GENERATED},
}  # fmt: skip
"""Cells of each part with --tiny, and their keys."""


def run_here(out: Path, name: str, tiny: bool, _: float) -> None:
    running.run_part(out, name, tiny=tiny)


def never(*_: Any) -> None:
    raise AssertionError("a part that is done ran again")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which every part has run."""
    out = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_MM_CACHE", str(out / "cache"))
        assert running.run_parts(out, None, tiny=True, limit=0, run=run_here) == 0
    return out


def cells_of(folder: Path, part: str) -> dict[str, Any]:
    return json.loads((folder / f"{part}.json").read_text())["cells"]


@pytest.mark.slow
def test_every_part_runs_and_a_second_start_skips_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(EXPECTED) == set(PARTS) and len(PARTS) == 23
    for part, cells in EXPECTED.items():
        stored = json.loads((folder / f"{part}.json").read_text())
        assert {"part", "question", "commit", "source", "device", "versions", "settings", "seconds"} <= set(stored)
        assert stored["cells"].keys() == cells.keys(), part
        for name, keys in cells.items():
            cell = stored["cells"][name]
            assert set(cell) == keys or (keys == NO_PACKAGE and "error" not in cell), (part, name, cell)
    assert running.run_parts(folder, None, tiny=True, limit=0, run=never) == 0
    assert capsys.readouterr().out.count("done before") == len(PARTS)


@pytest.mark.slow
def test_useful_tokens_are_some_of_those_generated(folder: Path) -> None:
    """Catches a pass over prompts, of which each row starts several responses, that counts one token per row."""
    assert 0 < cells_of(folder, "generation")["ocr"]["useful_share"] <= 1


@pytest.mark.slow
def test_the_figures_are_of_the_same_work(folder: Path) -> None:
    """Ten images are encoded in two parts, each with the noise of its rows, so the losses are equal within rounding."""
    losses = cells_of(folder, "steps_sd15")["loss_on_one_draw"]
    assert losses["published"] == pytest.approx(losses["online"], abs=5e-4)
    resumed = cells_of(folder, "resume")
    assert resumed["killed"]["exit_code"] == -9 and resumed["resumed and whole"]["same_bits"]
    assert resumed["resumed and whole"]["equal_log_lines"] == resumed["resumed and whole"]["log_lines"] == 8
    for cell in cells_of(folder, "attention").values():
        assert not any(cell["leak"]) and all(cell["chosen_moved"]) and cell["attention_kernels"]
    batches = cells_of(folder, "references")["one batch or two"]
    assert batches["largest_difference"] < 0.01 * abs(batches["margin"][0])
    compiled = cells_of(folder, "compile_images")
    assert compiled["on"]["graphs"] and compiled["on"]["loss"] == pytest.approx(compiled["off"]["loss"], rel=1e-3)
    memory = cells_of(folder, "memory_images")["SD1.5, tuning full"]
    assert memory["step_ratio"] == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_a_part_with_another_commit_or_setting_or_without_its_end_runs_again(folder: Path) -> None:
    expected, file = running.identity("optimizers", tiny=True), folder / "optimizers.json"
    assert running.is_done(file, expected)
    for changed in ({"commit": "another"}, {"source": "another"}, {"settings": {}}, {"versions": {}}, {"tiny": False}):
        assert not running.is_done(file, {**expected, **changed})
    stored = json.loads(file.read_text())
    del stored["seconds"]
    cut = folder / "cut.json"
    cut.write_text(json.dumps(stored))
    assert not running.is_done(cut, expected)


@pytest.mark.slow
def test_flops_of_a_published_configuration_equal_torchs_count() -> None:
    rows = vlm_rows({"image_tokens": 16, "response_tokens": 8, "pairs": 1})
    step = our_step(vlm("tiny", "fp32", "cpu"), rows, **OURS["prefix"])
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    expected = step_flops.response_step_flops(
        "tiny", 16, 8, attention=False
    )  # of a CPU's kernels torch counts none of it
    assert counter.get_total_flops() == pytest.approx(expected["prefix"], rel=0.01)


def test_the_counted_flops_are_those_of_the_formula() -> None:
    stored = json.loads((running.ROOT / "docs/benchmarks/step-flops.json").read_text())
    assert stored["responses"] == step_flops.count_responses()


def test_without_a_gpu_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert running.run_parts(tmp_path / "out", ["steps"], tiny=False, limit=0, run=never) == 0
    assert capsys.readouterr().out == f"{running.NO_GPU}\n" and not (tmp_path / "out").exists()


def test_parts_are_chosen_by_the_beginning_of_their_names() -> None:
    assert choose(["vlm_7b", "steps_flux"]) == ["steps_flux", "vlm_7b_576", "vlm_7b_1024"]
    with pytest.raises(ValueError, match=r"no part begins with 'x'\. Expected one of bundled_images"):
        choose(["x"])


def test_an_error_is_a_result_and_a_broken_gpu_ends_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    cells = Cells("cuda", True, {}, lambda values: saved.append(dict(values)))

    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cells.measure("skipped", lambda: fail(Skipped("not installed")))
    cells.measure("failed", lambda: fail(RuntimeError("mha_graph.execute\n false")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: fail(RuntimeError("CUBLAS")))
    with pytest.raises(BrokenDevice, match="does not respond after 'last'"):
        cells.measure("last", lambda: 1)
    assert saved[-1] == {
        "skipped": {"skipped": "not installed"},
        "failed": {"error": "RuntimeError: mha_graph.execute false"},
        "last": 1,
    }


def test_figures_of_a_gpu_come_from_its_allocator_and_its_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 * figures.MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10 * figures.MIB)

    class Profile:
        """Three events of CUDA and one of the CPU."""

        def __init__(self, activities: Any) -> None:
            assert activities == [figures.ProfilerActivity.CUDA]
            kinds = [figures.DeviceType.CUDA] * 3 + [figures.DeviceType.CPU]
            names = ("flash_fwd_kernel", "gemm", "Memcpy DtoH", "cudaLaunchKernel")
            results = SimpleNamespace(events=lambda: [self.event(*each) for each in zip(names, kinds, strict=True)])
            self.profiler = SimpleNamespace(kineto_results=results)

        @staticmethod
        def event(name: str, kind: Any) -> Any:
            values = {"name": name, "device_type": kind, "is_user_annotation": False, "duration_ns": 2_000_000}
            return SimpleNamespace(**{key: (lambda value=value: value) for key, value in values.items()})

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(figures, "profile", Profile)

    def step() -> float:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return 0.5

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = figures.step_figures(step, "cuda", rounds=3)
    assert set(measured) == STEP and len(measured["all_ms"]) == 3
    assert (measured["loss"], measured["weights_mib"], measured["peak_mib"]) == (0.5, 3, 7)
    assert (measured["kernels"], measured["kernel_ms"], measured["copies"]) == (2, 4, 1)
    assert measured["attention_kernels"] == [{"name": "flash_fwd_kernel", "count": 1, "ms": 2}]
    (place,) = measured["synchronisations"]
    assert place.startswith("tests/unit/test_gpu_bench.py:") and measured["synchronisations"][place] == 1


def test_float32_is_exact_only_inside() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    torch.backends.fp32_precision = "tf32"  # as the Trainer sets it
    try:
        with figures.exact_float32():
            assert matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = "none"
        matmul.fp32_precision = before


def test_a_part_that_fails_or_takes_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(out: Path, name: str, _: bool, limit: float) -> None:
        code = "import time; time.sleep(60)" if name == "resume" else "print('of the card'); raise SystemExit(3)"
        running.run_command([sys.executable, "-c", code], out / f"{name}.log", limit if name == "resume" else 60)

    machine = running.identity("resume", tiny=True)
    monkeypatch.setattr(running, "identity", lambda name, tiny: machine)
    assert running.run_parts(tmp_path, ["resume", "generation"], tiny=True, limit=0.3, run=run) == 2
    printed = capsys.readouterr().out
    assert "resume: ended after 0.3 s" in printed and "generation: exit code 3: of the card" in printed


def test_the_command_prints_its_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "--list"])
    command.main()
    assert len(capsys.readouterr().out.splitlines()) == len(PARTS)

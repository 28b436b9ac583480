"""A result folder has the files of one run, and models with other files or schedulers are read or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMScheduler, EDMEulerScheduler, StableDiffusionPipeline

from dpo_mm.files.checksums import COMPLETE, write_checksums
from dpo_mm.policies.diffusion.noise_process import noise_process_for
from dpo_mm.policies.families import load_policy
from dpo_mm.training.checkpoints import move_into_place


def test_files_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    """Catches a kohya file of an earlier run next to new weights, and a removal outside the folder or of files that the user changed."""
    folder, aside = tmp_path / "out", tmp_path / "aside"
    for path in (folder, aside, tmp_path / "outside"):
        path.mkdir()
    for name in ("kohya.safetensors", "lora.safetensors"):
        (folder / name).write_text("old")
    write_checksums(folder)
    record = json.loads((folder / COMPLETE).read_text())
    (tmp_path / "outside" / "x").write_text("old")
    (folder / "card.json").write_text("edited by the user")
    outside = dict.fromkeys(("../outside/x", str(tmp_path / "outside" / "x")), record["kohya.safetensors"])
    (folder / COMPLETE).write_text(json.dumps(record | outside | {"card.json": record["kohya.safetensors"]}))
    (folder / "notes.txt").write_text("of the user")
    (aside / "lora.safetensors").write_text("new")
    move_into_place(aside, folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "lora.safetensors": "new",
        "notes.txt": "of the user",
        "card.json": "edited by the user",
    }
    assert (tmp_path / "outside" / "x").read_text() == "old"


@pytest.mark.parametrize("record", ["[]", "{", '"text"'])
def test_broken_record_of_an_earlier_run_does_not_lose_the_new_one(record: str, tmp_path: Path) -> None:
    folder, aside = tmp_path / "out", tmp_path / "aside"
    for path in (folder, aside):
        path.mkdir()
    (folder / COMPLETE).write_text(record)
    (aside / "lora.safetensors").write_text("new")
    write_checksums(aside)
    move_into_place(aside, folder)
    assert (folder / "lora.safetensors").read_text() == "new" and "lora" in (folder / COMPLETE).read_text()


def test_pipeline_with_the_fp16_variant_only_is_read(tiny_model: str, tmp_path: Path) -> None:
    """Catches models whose files are all named ...fp16.safetensors, as many of SDXL."""
    StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None).save_pretrained(tmp_path, variant="fp16")
    policy: Any = load_policy(str(tmp_path))
    expected: Any = load_policy(tiny_model)
    state = policy.model.state_dict()
    assert all(bool((state[name] == value).all()) for name, value in expected.model.state_dict().items())


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            EDMEulerScheduler(),
            "the noise process of scheduler EDMEulerScheduler is not supported. Expected that of DDPM",
        ),
        (DDPMScheduler(prediction_type="sample"), "DDPMScheduler with prediction_type 'sample' is not supported"),
    ],
)
def test_scheduler_of_another_noise_process_is_refused(scheduler: Any, message: str) -> None:
    """Catches an error that refuses epsilon and expects epsilon."""
    with pytest.raises(ValueError, match=message):
        noise_process_for(scheduler, source="m")

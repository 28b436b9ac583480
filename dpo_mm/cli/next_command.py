"""The command that a finished mining, training or quickstart names next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dpo_mm.printing.printed_text import quoted

if TYPE_CHECKING:
    from dpo_mm.config import CompareConfig, CompareResponsesConfig, MineConfig, MineResponsesConfig, TrainConfig

HELD_OUT = {
    "shapes-sd": "--prompts shapes-held-out --judges faithfulness",
    "drawings-sd": "--prompts drawings-held-out --judges drawings_faithfulness",
    "shapes-editor": "--prompts shapes-edits-held-out --judges edit_followed,edit_preserved",
    "shapes-captioner": "--questions scenes-held-out --judges chair_i,recall,num_words",
    "page-reader": "--questions pages-held-out --judges degeneration,cer,num_tokens",
    "sums-writer": "--questions sums-held-out --judges cer,num_tokens",
}
"""Held-out inputs and judges of the bundled models."""
SAME_IN_COMPARE = ("revision", "quantize", "min_pixels", "max_pixels")
"""Settings of a training that its comparison needs too."""


def after_mining(settings: MineConfig | MineResponsesConfig, path: Path, file: str | None = None) -> str:
    """Return the line that names the training on mined pairs. It starts from the adapter that generated them, if there is one.

    Args:
        settings: of the mining.
        path: its pairs.
        file: preset or file from which the mining took its settings, or its first flag. It is named if it has those of a
            training too.
    """
    from dpo_mm.config.config_parsing import read_yaml
    from dpo_mm.recipe import step_settings

    values = read_yaml(file) if file and not file.startswith("--") else {}
    if "train" not in values:
        return f"Next: dpo-mm train CONFIG.yaml --pairs {quoted(path)}{_flag('adapter', settings.adapter)}"
    model = step_settings(values, "train", source=str(file)).get("model")
    is_served = bool(getattr(settings, "server", None))  # the model is what the server calls it
    other = settings.model if settings.model != model and not is_served else None
    flags = _flag("model", other) + _flag("adapter", settings.adapter)
    return f"Next: dpo-mm train {quoted(file)} --pairs {quoted(path)}{flags}"


def _flag(name: str, value: str | None) -> str:
    return f" --{name} {quoted(value)}" if value else ""


def after_training(settings: TrainConfig, folder: Path) -> str:
    """Return the line that names the comparison of a trained model.

    Replace the words in capitals by held-out prompts or questions, and by a judge.

    Args:
        settings: of the training.
        folder: its result.
    """
    from dpo_mm.policies.families import policy_class

    base = f"--base-adapter {quoted(settings.adapter)} " if settings.adapter else ""
    command = f"dpo-mm compare --model {quoted(settings.model)} {base}--adapter {quoted(folder)}"
    same = {name: getattr(settings, name) for name in SAME_IN_COMPARE}
    options = [f"--{name.replace('_', '-')} {quoted(value)}" for name, value in same.items() if value is not None]
    end = " ".join([*options, f"--output-dir {quoted(f'{folder}-compared')}"])
    if settings.model in HELD_OUT:
        return f"Next: {command} {HELD_OUT[settings.model]} {end}"
    if policy_class(settings.model, revision=settings.revision).modality == "text":
        return f"Next, with held-out questions: {command} --questions QUESTIONS.jsonl {end}"
    return f"Next, with held-out prompts and a judge: {command} --prompts PROMPTS.txt --judges JUDGE {end}"


def after_quickstart(config: CompareConfig | CompareResponsesConfig, output_dir: str, seed: int) -> str:
    """Return the line that names another comparison of a quickstart's models.

    Args:
        config: settings of its comparison.
        output_dir: folder of the quickstart.
        seed: its seed.
    """
    from dpo_mm.config import CompareResponsesConfig

    again = (
        f"dpo-mm compare --model {quoted(config.model)} --adapter {quoted(config.adapter)} "
        f"--judges {','.join(config.judges)} --output-dir {quoted(f'{output_dir}-again')}"
    )
    if isinstance(config, CompareResponsesConfig):
        return f"Next, sampled instead of greedy: {again} --questions {quoted(config.questions)} --temperature 1"
    sampling = f"--num-inference-steps {config.num_inference_steps} --guidance-scale {config.guidance_scale:g}"
    return f"Next, on other seeds: {again} --prompts {quoted(config.prompts)} {sampling} --seed {seed + 1}"

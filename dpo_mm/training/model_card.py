"""Write the model card of a tuned adapter: data, settings, code to load it, results of comparisons."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dpo_mm.assets import BUNDLED, path_for_others
from dpo_mm.config import TrainConfig
from dpo_mm.files.checksums import complete_files, write_complete
from dpo_mm.files.content_key import file_hash
from dpo_mm.files.resumable import atomic_write
from dpo_mm.judges.provenance import CARD_KEY, training_judges_of, training_judges_of_adapter
from dpo_mm.policies.start_adapter import is_stacked
from dpo_mm.training.objective_settings import is_fine_tuning

if TYPE_CHECKING:
    from dpo_mm.evaluation.statistics import Comparison

CARD = "README.md"
RESULTS = "## Compared with its base"
MADE, FINE_TUNED = "tuned on preferences with dpo-mm.", "fine-tuned on chosen examples with dpo-mm."
"""Words of every card that dpo-mm wrote: one of both."""
RESULTS_SECTION = re.compile(rf"{RESULTS}\n\nVerdict: [^\n]*\n\n(\|[^\n]*\n)+")
LOADING = {
    "lora": 'processor = AutoProcessor.from_pretrained("{base}")\n'
    'model = AutoModelForImageTextToText.from_pretrained("{base}", dtype={dtype})\n'
    'model = PeftModel.from_pretrained(model, "{folder}")',
    "stacked": 'processor = AutoProcessor.from_pretrained("{base}")\n'
    'model = AutoModelForImageTextToText.from_pretrained("{base}", dtype={dtype})\n'
    'model = PeftModel.from_pretrained(model, "{folder}/start_adapter").merge_and_unload()\n'
    'model = PeftModel.from_pretrained(model, "{folder}")',
    "full": 'processor = AutoProcessor.from_pretrained("{base}")\n'
    'model = AutoModelForImageTextToText.from_pretrained("{folder}", dtype={dtype})',
}
"""Python that loads a tuned text model, by tuning method, or on top of the adapter from which it started."""
IMPORTS = {
    "PeftModel": "from peft import PeftModel",
    "AutoModelForImageTextToText": "from transformers import AutoModelForImageTextToText, AutoProcessor",
    "AutoModelForCausalLM": "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "DiffusionPipeline": "from diffusers import DiffusionPipeline",
    "StableDiffusionPipeline": "from diffusers import StableDiffusionPipeline",
    "StableDiffusionXLPipeline": "from diffusers import StableDiffusionXLPipeline",
    "load_image": "from diffusers.utils import load_image",
}


def generating_lines(*, edits: bool, clips: bool) -> list[str]:
    """Return Python that generates with an image pipeline `pipe`, which edits an image or makes clips."""
    seed = "generator=torch.Generator().manual_seed(0)"
    if clips:
        return [
            f'frames = pipe("a red star", output_type="pil", {seed}).frames[0]',
            'frames[0].save("clip.webp", save_all=True, append_images=frames[1:])',
        ]
    source = 'image=load_image("source.png"), prompt=' if edits else ""
    return [f'image = pipe({source}"a red star", {seed}).images[0]', 'image.save("image.png")']


def usage_code(config: TrainConfig, *, family: str = "", image_lines: Sequence[str] | None = None) -> str:
    """Python that runs a tuned model with diffusers, transformers and peft only.

    It expects the folder above output_dir as the working folder. A base that is bundled or a folder is given by its absolute path on
    this machine. The dtype is the training's: weights on disk may be in half precision.

    Args:
        config: settings of the training.
        family: the family that the run's summary prints, which tells a text-only model from a VLM.
        image_lines: Python that loads an image pipeline as `pipe` and generates. None for a text model.
    """
    base, folder = path_for_others(config.model), Path(config.output_dir).name
    if image_lines is not None:
        lines = "\n".join(image_lines)
    else:
        dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}.get(config.precision, "torch.float32")
        lines = LOADING["stacked" if is_stacked(config) else config.tuning].format(
            base=base, folder=folder, dtype=dtype
        )
        if "ForCausalLM" in family:
            lines = lines.replace("AutoModelForImageTextToText", "AutoModelForCausalLM")
            lines = lines.replace("AutoProcessor", "AutoTokenizer").replace("processor =", "tokenizer =")
    imports = [line for name, line in IMPORTS.items() if re.search(rf"\b{name}\b", lines)]
    return "\n".join(["import torch", *sorted(imports), "", lines])


def write_card(
    config: TrainConfig,
    settings: Mapping[str, str],
    *,
    text: bool,
    image_lines: Sequence[str] | None = None,
    into: Path | None = None,
) -> Path:
    """Write the model card of a run.

    Args:
        config, settings: settings of the training, and its summary as printed.
        text: whether the model generates text rather than images.
        image_lines: Python that loads the pipeline as `pipe` and generates, for an image model.
        into: folder of the card. None: the run's output_dir.
    """
    folder = Path(config.output_dir)
    library = "transformers" if config.tuning == "full" else "peft"
    kind = ["sft"] if is_fine_tuning(config) else ["dpo", "preference-optimization"]
    front: dict[str, Any] = {
        "base_model": config.model,
        "library_name": library if text else "diffusers",
        "tags": [*kind, *(["lora"] if config.tuning == "lora" else [])],
    }
    judges = (*training_judges_of_adapter(config.adapter), *training_judges_of(config.pairs))
    if made := list(dict.fromkeys(judges)):
        front[CARD_KEY] = made
    code = usage_code(config, family=settings.get("family", ""), image_lines=image_lines)
    place = f" `{_cell(config.model)}` is bundled with dpo-mm." if config.model in BUNDLED else ""
    place += (
        " The path of the model is the one at training time." if path_for_others(config.model) != config.model else ""
    )
    where = f"Run this in the folder that contains `{_cell(folder.name)}`.{place}"
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in settings.items())
    card = (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {_cell(folder.name)}\n\n"
        f"`{_cell(config.model)}` {FINE_TUNED if is_fine_tuning(config) else MADE}{_start(settings)}\n\n"
        f"## How to use it\n\n{where}\n\n```python\n{code}\n```\n\n"
        f"## How it was trained\n\n| | |\n|---|---|\n{rows}\n\nEvery setting is in `dpo_mm.json`.\n"
    )
    return _write((into or folder) / CARD, card)


def _start(settings: Mapping[str, str]) -> str:
    """Sentence on the adapter from which a run started, "" if there was none."""
    return f" It was trained from adapter {_cell(settings['adapter'])}." if "adapter" in settings else ""


def add_results(adapter: str | Path, comparisons: Sequence[Comparison], *, verdict: str, command: str) -> Path | None:
    """Replace the results in an adapter's card by those of a comparison. The rest of the card is unchanged.

    Args:
        adapter: the adapter's folder.
        comparisons: of base and tuned. Those with other models are left out.
        verdict: of the run.
        command: how to repeat the comparison.

    Returns:
        Path of the card, or None if the folder has none that dpo-mm wrote.
    """
    path = Path(adapter) / CARD
    if path.is_symlink() or not path.is_file():
        return None
    before = path.read_text(encoding="utf-8")
    if MADE not in before and FINE_TUNED not in before:
        return None
    rows = "".join(
        f"| {_cell(one.name)} | {one.base:.4g} | {one.tuned:.4g} | {_interval(one)} | {one.verdict} |\n"
        for one in comparisons
        if one.models == ("base", "tuned")
    )
    table = f"| measure | base | tuned | difference, 95 % interval | verdict |\n|---|---|---|---|---|\n{rows}"
    section = f"{RESULTS}\n\nVerdict: {verdict}. By `{_cell(command)}`.\n\n{table}"
    if RESULTS_SECTION.search(before):
        card = RESULTS_SECTION.sub(lambda _: section, before, count=1)
    else:
        card = f"{before.rstrip()}\n\n{section}"
    if card == before:
        return path
    checksums, checksum = complete_files(path.parent), file_hash(path)
    _write(path, card)
    if checksums.get(CARD) == checksum:  # a card with the user's changes stays one
        write_complete(path.parent, checksums | {CARD: file_hash(path)})
    return path


def _interval(comparison: Comparison) -> str:
    low, high = comparison.low, comparison.high
    return "too few differ" if low is None or high is None else f"{low:+.4g} to {high:+.4g}"


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(str(text).split()).translate(
        {ord("|"): "\\|", ord("<"): "&lt;", ord("`"): "'", ord("["): "\\[", ord("!"): "\\!"}
    )


def _write(path: Path, card: str) -> Path:
    with atomic_write(path) as beside:
        beside.write_text(card, encoding="utf-8")
    return path

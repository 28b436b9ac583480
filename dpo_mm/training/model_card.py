"""The model card of a tuned adapter: what it was made from and how, how to load it, and what comparing it showed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dpo_mm.config import TrainConfig
from dpo_mm.judges.provenance import CARD_KEY, judges_of
from dpo_mm.resumable import aside

if TYPE_CHECKING:
    from dpo_mm.evaluation.statistics import Comparison

CARD = "README.md"
RESULTS = "## Compared with its base"
LOADING = {
    ("lora", False): 'pipe = DiffusionPipeline.from_pretrained("{base}")\npipe.load_lora_weights("{folder}")',
    ("lora", True): 'model = AutoModelForImageTextToText.from_pretrained("{base}")\n'
    'model = PeftModel.from_pretrained(model, "{folder}")',
    ("full", False): "pipe.unet = type(pipe.unet).from_pretrained(\"{folder}\", subfolder=\"unet\")",
    ("full", True): 'model = AutoModelForImageTextToText.from_pretrained("{folder}")',
}  # fmt: skip


def write_card(config: TrainConfig, settings: Mapping[str, str], *, text: bool, stock: str | None = None) -> Path:
    """Write the card of what a run trained into its output_dir. text: whether it answers rather than draws.

    stock: Python that loads it in stock classes; None: as most models are loaded.
    """
    folder = Path(config.output_dir)
    library = "transformers" if config.tuning == "full" else "peft"
    front: dict[str, Any] = {
        "base_model": config.model,
        "library_name": library if text else "diffusers",
        "tags": ["dpo", "preference-optimization", *(["lora"] if config.tuning == "lora" else [])],
    }
    if made := judges_of(config.pairs):
        front[CARD_KEY] = list(made)
    loading = LOADING[config.tuning, text].format(base=config.model, folder=folder.name)
    if "ForCausalLM" in settings.get("family", ""):
        loading = loading.replace("AutoModelForImageTextToText", "AutoModelForCausalLM")
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in settings.items())
    card = (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {_cell(folder.name)}\n\n"
        f"`{_cell(config.model)}` tuned on preferences with dpo-mm.\n\n```python\n{stock or loading}\n```\n\n"
        f"## How it was trained\n\n| | |\n|---|---|\n{rows}\n\nEvery setting is in `dpo_mm.json`.\n"
    )
    return _write(folder / CARD, card)


def add_results(adapter: str | Path, comparisons: Sequence[Comparison], *, verdict: str, command: str) -> Path | None:
    """Put what a comparison showed into an adapter's card, in place of what stood there. None where it has no card."""
    from dpo_mm.evaluation.tables import within

    path = Path(adapter) / CARD
    if not path.is_file():
        return None
    before = path.read_text(encoding="utf-8").partition(RESULTS)[0].rstrip()
    rows = "\n".join(
        f"| {_cell(one.metric)} | {one.base:.4g} | {one.tuned:.4g} | {one.low:+.4g} to {one.high:+.4g} | {one.verdict} |"
        for one in comparisons
        if not within(one.metric)
    )
    table = f"| measure | base | tuned | difference, 95 % interval | verdict |\n|---|---|---|---|---|\n{rows}"
    return _write(path, f"{before}\n\n{RESULTS}\n\nVerdict: {verdict}. By `{_cell(command)}`.\n\n{table}\n")


def _cell(text: str) -> str:
    """Text that stays within its cell of a table and is no markup."""
    return " ".join(str(text).split()).translate(
        {ord("|"): "\\|", ord("<"): "&lt;", ord("`"): "'", ord("["): "\\[", ord("!"): "\\!"}
    )


def _write(path: Path, card: str) -> Path:
    with aside(path) as beside:
        beside.write_text(card, encoding="utf-8")
    return path

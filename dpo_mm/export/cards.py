"""Model card of an exported run: the run's own card with code for the exported files, licences and metrics for the hub."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dpo_mm.assets import BUNDLED, path_for_others, resolve_asset
from dpo_mm.export.finished_run import FinishedRun
from dpo_mm.export.vllm_limits import served_rank
from dpo_mm.policies.adapter_checks import ADAPTER_FILE
from dpo_mm.policies.adapter_sources import HUB_ID
from dpo_mm.policies.adapters import KOHYA_FILE
from dpo_mm.policies.families import policy_class
from dpo_mm.policies.single_file import load_line
from dpo_mm.training.model_card import CARD, IMPORTS, LOADING, RESULTS

USE = "## How to use it"
USE_SECTION = re.compile(rf"{USE}\n.*?\n```\n", re.DOTALL)
RESULT_ROW = re.compile(r"^\| (?!measure)([^|]+) \| ([^|]+) \| ([^|]+) \| [^|]+ \| [^|]+ \|$", re.MULTILINE)
DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}
LIBRARIES = {"diffusers": "diffusers", "kohya": "diffusers", "vllm": "peft"}


def export_card(run: FinishedRun, to: str, place: str, *, hub: bool) -> str:
    """Write the model card of an export, as text.

    Args:
        run: a finished run.
        to: format of the export.
        place: folder or hub id from which the card's code loads the files.
        hub: True if `place` is a hub id.

    Returns:
        A card in the hub's format: base_model, datasets, tags and the metrics of a comparison in the front matter, and in the
        text the rows' licences by number.
    """
    path = run.folder / CARD
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    card = ModelCard(before if before.startswith("---") else f"---\n{{}}\n---\n{before}", ignore_metadata_errors=True)
    front: dict[str, Any] = card.data.to_dict()
    title = place.rpartition("/")[2]
    is_text = policy_class(run.model, revision=run.settings.get("revision")).modality == "text"
    front |= {
        "base_model": run.model,
        "library_name": LIBRARIES.get(to, "transformers" if is_text else "diffusers"),
        "tags": [tag for tag in front.get("tags") or ["dpo"] if to != "merged" or tag != "lora"],
    }
    if hub and (not HUB_ID.fullmatch(run.model) or Path(run.model).exists()):
        del front["base_model"]  # a folder of this machine, or bundled
    pairs = str(run.settings.get("pairs", ""))
    if HUB_ID.fullmatch(pairs) and not Path(pairs).exists():
        front["datasets"] = [pairs]
    if results := eval_results(card.text):
        front |= {"model_name": title, "eval_results": results}
    text = card.text.strip() or f"# {title}\n\n`{run.model}` tuned on preferences with dpo-mm."
    text = re.sub(r"\A# .*", lambda _: f"# {title}", text)
    use = _use_section(run, to, place, hub=hub, is_text=is_text, card=card.text)
    if USE_SECTION.search(text + "\n"):
        text = USE_SECTION.sub(lambda _: use, text + "\n", count=1).rstrip()
    else:
        text += f"\n\n{use.rstrip()}"
    return f"---\n{ModelCardData(**front)}\n---\n{text}\n{_licence_section(pair_licences(pairs))}"


def eval_results(card: str) -> list[EvalResult]:
    """Return the metrics of the tuned model from the table of a comparison in a card's text."""
    section = card.partition(RESULTS)[2].partition("\n## ")[0]
    return [
        EvalResult(
            task_type="preference-optimization",
            dataset_type="held-out",
            dataset_name="held-out prompts or questions",
            metric_type=name.replace(" ", "_"),
            metric_name=f"{name} (base: {base})",
            metric_value=float(tuned),
        )
        for name, base, tuned in RESULT_ROW.findall(section)
        if re.fullmatch(r"-?[\d.]+(e[-+]\d+)?", tuned)
    ]


def pair_licences(pairs: str) -> dict[str, int]:
    """Count the rows of a dataset by licence. Empty if its Parquet files are not on this machine.

    Args:
        pairs: a Parquet file, a folder of them, or a bundled dataset.
    """
    import pyarrow.parquet as parquet

    path = Path(resolve_asset(pairs))
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    counts: Counter[str] = Counter()
    for file in files:
        if not file.is_file():
            continue
        table = parquet.ParquetFile(file)
        if "license" in table.schema_arrow.names:
            counts.update(str(value or "none") for value in table.read(columns=["license"])["license"].to_pylist())
        else:
            counts["none"] += table.metadata.num_rows
    return dict(counts.most_common())


def _licence_section(licences: dict[str, int]) -> str:
    if not licences:
        return ""
    rows = "".join(f"| {' '.join(name.split()).replace('|', '/')} | {count:,} |\n" for name, count in licences.items())
    return f"\n## Licences of the pairs\n\n| licence | rows |\n|---|---|\n{rows}"


def _use_section(run: FinishedRun, to: str, place: str, *, hub: bool, is_text: bool, card: str) -> str:
    """Section with the code that loads the exported files."""
    base = run.model if hub else path_for_others(run.model)
    dtype = DTYPES.get(str(run.settings.get("precision")), "torch.float32")  # weights on disk may be in half precision
    bundled = f" `{run.model}` is bundled with dpo-mm." if run.model in BUNDLED else ""
    if to == "kohya":
        return (
            f"{USE}\n\nCopy `{KOHYA_FILE}` to the LoRA folder of ComfyUI or A1111.{bundled} With diffusers:\n\n```python\n"
            f"{_image_code(base, place, dtype=dtype, file=KOHYA_FILE)}\n```\n"
        )
    if to == "vllm":
        rank = json.loads((run.folder / ADAPTER_FILE).read_text(encoding="utf-8"))["r"]
        served = f"vllm serve {base} --enable-lora --max-lora-rank {served_rank(rank)} --lora-modules tuned={place}"
        return f"{USE}\n\nRequest the model `tuned`.{bundled}\n\n```bash\n{served}\n```\n"
    if is_text:
        code = LOADING["full"].format(base=place, folder=place, dtype='"auto"')
        if "AutoModelForCausalLM" in card:
            code = code.replace("AutoModelForImageTextToText", "AutoModelForCausalLM")
            code = code.replace("AutoProcessor", "AutoTokenizer").replace("processor =", "tokenizer =")
        code = "\n".join([*sorted(line for name, line in IMPORTS.items() if name in code), "", code])
    else:
        code = _image_code(place if to == "merged" else base, None if to == "merged" else place, dtype=dtype)
    return f"{USE}\n\n{bundled.strip()}\n\n```python\n{code}\n```\n".replace("\n\n\n\n", "\n\n")


def _image_code(base: str, place: str | None, *, dtype: str, file: str | None = None) -> str:
    weight = f', weight_name="{file}"' if file else ""
    load = load_line(base, dtype)
    lines = ["import torch", IMPORTS[load.split()[2].partition(".")[0]], "", load]
    lines += [f'pipe.load_lora_weights("{place}"{weight})'] if place else []
    return "\n".join([*lines, 'image = pipe("a red star").images[0]', 'image.save("image.png")'])

"""Write docs/reference/settings.md, cli.md and api.md from the code: dataclasses, `--help` and public names.

python docs/write_reference.py            # write the pages
python docs/write_reference.py --check    # exit with 1 if a page differs from the code
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from dpo_mm import config
from dpo_mm.config.descriptions import REQUIRED, describe_settings, yaml_value

PACKAGE = Path(__file__).parents[1] / "dpo_mm"
FOLDER = Path(__file__).parent / "reference"
COLUMNS = "100"
"""Width of the help text."""

SECTIONS = {
    "TrainConfig": "`dpo-mm train`, `dpo-mm verify`, `dpo_mm.train`, section `train` of a recipe.",
    "CompareConfig": "`dpo-mm compare` with `--prompts`, section `compare` of a recipe. Image generators.",
    "CompareResponsesConfig": "`dpo-mm compare` with `--questions`, section `compare` of a recipe. Vision-language and text models.",
    "MineConfig": "`dpo-mm mine` with `--prompts`, section `mine` of a recipe. Image generators.",
    "MineResponsesConfig": "`dpo-mm mine` with `--questions`, section `mine` of a recipe. Vision-language and text models.",
    "SidePrompts": "An entry of `side_sets` of CompareConfig.",
    "SideQuestions": "An entry of `side_sets` of CompareResponsesConfig.",
    "JudgeConfig": "`dpo-mm judge`.",
    "RelabelConfig": "`dpo-mm relabel`.",
}
"""Where each dataclass is used; a dataclass that is not listed gets no sentence."""

PEERS = {
    "model": "TRL `model`",
    "revision": "TRL `model_revision`",
    "objective": "TRL `loss_type`",
    "beta": "TRL `beta`",
    "sft_weight": "TRL `rpo_alpha`",
    "label_smoothing": "TRL `label_smoothing`",
    "ld_alpha": "TRL `ld_alpha`",
    "reference_ema_decay": "TRL `ref_model_mixup_alpha` (1 minus it)",
    "reference_sync_steps": "TRL `ref_model_sync_steps`",
    "lora_rank": "PEFT `r`",
    "lora_alpha": "PEFT `lora_alpha`",
    "lora_targets": "PEFT `target_modules`",
    "max_length": "TRL `max_length`",
    "learning_rate": "Trainer `learning_rate`",
    "warmup_steps": "Trainer `warmup_steps`",
    "max_grad_norm": "Trainer `max_grad_norm`",
    "weight_decay": "Trainer `weight_decay`",
    "precision": "Trainer `bf16`, `fp16`",
    "gradient_checkpointing": "Trainer `gradient_checkpointing`",
    "seed": "Trainer `seed`",
    "output_dir": "Trainer `output_dir`",
    "save_total_limit": "Trainer `save_total_limit`",
    "resume": "Trainer `resume_from_checkpoint`",
}
"""Names of the same setting of a training run in transformers' Trainer, TRL or PEFT. TRAINER_NAMES of train_config.py has more."""

ONLY = {
    "images": ("IMAGE_ONLY_SETTINGS", "OF_IMAGES"),
    "text": ("TEXT_ONLY_SETTINGS", "OF_TEXT"),
}
"""Modality, and the names that its tuple of settings may have in dpo_mm/training/builders.py."""


def applies_to() -> dict[str, str]:
    """The modality of each training setting that only one modality has."""
    tree = ast.parse((PACKAGE / "training" / "builders.py").read_text(encoding="utf-8"))
    tuples = {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        for target in node.targets
        if isinstance(target, ast.Name) and all(_is_text(part) for part in node.value.elts)
    }
    known = {kind: next((tuples[name] for name in names if name in tuples), None) for kind, names in ONLY.items()}
    missing = [kind for kind, names in known.items() if names is None]
    if missing:
        raise ValueError(f"builders.py has no tuple of the settings of {missing[0]}; expected {ONLY[missing[0]]}")
    return {name: kind for kind, names in known.items() for name in names or ()}


def _default(value: Any) -> str:
    return REQUIRED if value is dataclasses.MISSING else f"`{yaml_value(value)}`"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _peers() -> dict[str, str]:
    from dpo_mm.config import TRAINER_NAMES

    return PEERS | {field: f"Trainer `{name}`" for name, field in TRAINER_NAMES.items()}


def trainer_names_table() -> list[str]:
    """The names of transformers' TrainingArguments that TrainConfig accepts too."""
    from dpo_mm.config import TRAINER_NAMES

    return [
        "### Names of transformers' Trainer",
        "",
        "Files and flags may use these names of transformers' `TrainingArguments` for a training run. Giving both names of a "
        "setting is an error. In Python, use the names of the fields.",
        "",
        "| name of the Trainer | setting |",
        "|---|---|",
        *(f"| `{name}` | `{field}` |" for name, field in TRAINER_NAMES.items()),
    ]


def _type(text: str) -> str:
    """A type in words: float or null."""
    return _cell(text.replace(" | None", " or null").replace(" | ", " or "))


def settings_page() -> str:
    """One section per dataclass, one row per setting."""
    only, peers = applies_to(), _peers()
    parts = [
        "---\nhide:\n  - toc\nsearch:\n  boost: 2\n---\n",
        "# Settings",
        "",
        "Every setting of every command, generated from the dataclasses in `dpo_mm/config/` by "
        "`python docs/write_reference.py`. In a YAML file a setting has the name below. On the command line it is a flag, "
        "with dashes instead of underscores, and `null` is written `none`. An unknown setting is refused, and the error names the "
        "nearest known one.",
    ]
    for name in SECTIONS:
        kind = getattr(config, name)
        parts += ["", f"## {name}", "", " ".join(inspect.getdoc(kind).split()), "", SECTIONS[name], ""]
        train = name == "TrainConfig"
        head = ["setting, type", "default", "meaning", *(["applies to", "elsewhere"] if train else [])]
        for group, settings in itertools.groupby(describe_settings(kind), key=lambda setting: setting.group):
            parts += [f"### {group}", ""] if group else []
            parts += ['<div class="settings" markdown>', ""]
            parts += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
            for one in settings:
                row = [f"**`{one.name}`**<br>{_type(one.type)}", _default(one.default), _cell(one.description)]
                row += [only.get(one.name, "both"), peers.get(one.name, "")] if train else []
                parts.append(f"| {' | '.join(row)} |")
            parts += ["", "</div>", ""]
        parts += ["", *trainer_names_table()] if train else []
    return "\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


def cli_page() -> str:
    """The help text of every command."""
    os.environ.update({"COLUMNS": COLUMNS, "TERMINAL_WIDTH": COLUMNS, "NO_COLOR": "1"})
    import typer
    from typer.testing import CliRunner

    from dpo_mm.cli.main import app
    from dpo_mm.cli.settings_help import SettingsCommand

    runner = CliRunner()

    def section(words: list[str], command: Any) -> list[str]:
        with mock.patch.object(SettingsCommand, "format_epilog"):  # the page Settings has them
            result = runner.invoke(app, [*words, "--help"], prog_name="dpo-mm", env={"COLUMNS": COLUMNS})
        if result.exit_code:
            raise ValueError(f"dpo-mm {' '.join(words)} --help failed: {result.output}")
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        title = " ".join(["dpo-mm", *words])
        lines = ["", f"{'#' * min(2 + max(len(words) - 1, 0), 3)} {title}", "", "```text", text, "```"]
        for name, inner in getattr(command, "commands", {}).items():
            lines += section([*words, name], inner)
        return lines

    head = [
        "# Command line",
        "",
        "The help text of every command, generated by `python docs/write_reference.py`. `python -m dpo_mm` is the same as "
        "`dpo-mm`.",
        "",
        "The commands `train`, `verify`, `mine`, `compare` and `relabel` also accept every [setting](settings.md) as a flag, and their `--help` lists all of them: "
        "`--learning-rate 1e-5` sets `learning_rate`. A flag overrides the YAML file.",
        "",
        "The exit status is 0 if a command succeeds and 2 if it reports an error. `doctor`, `verify` and `judge --self-test` exit "
        "with 1 if a check fails. A command that SIGTERM interrupts exits with 143, and one that Ctrl-C interrupts with 130.",
    ]
    return "\n".join(head + section([], typer.main.get_command(app))) + f"\n\n<!-- typer {version('typer')} -->\n"


API = """# Python API

Everything under "Functions" and "Results and classes" is importable from `dpo_mm`. Importing `dpo_mm` loads no heavy library: each name
loads when it is first used.

```python
from dpo_mm import TrainConfig, train

settings = TrainConfig(model="shapes-sd", pairs="shapes-faithfulness", output_dir="runs/mine", beta=500, steps=100)
result = train(settings)
```

The settings classes ({configs}) are described field by field in [Settings](settings.md).
"""


def api_page() -> str:
    """mkdocstrings blocks for the public names, the interfaces of models, and the objectives."""
    import dpo_mm

    protocol = importlib.import_module("dpo_mm.policies.protocol")
    table = importlib.import_module("dpo_mm.objectives").OBJECTIVES
    public = {name: getattr(dpo_mm, name) for name in dpo_mm.__all__}
    blocks = [
        ("Functions", [_path(one) for one in public.values() if inspect.isfunction(one)]),
        (
            "Results and classes",
            [_path(one) for name, one in public.items() if inspect.isclass(one) and not name.endswith("Config")],
        ),
        (
            "Interfaces of models",
            [_path(o) for _, o in inspect.getmembers(protocol, inspect.isclass) if o.__module__ == protocol.__name__],
        ),
        ("Objectives", sorted({_path(one) for one in table.values() if inspect.isfunction(one)})),
    ]
    configs = ", ".join(f"`{name}`" for name in dpo_mm.__all__ if name.endswith("Config"))
    seen: set[str] = set()
    text = API.format(configs=configs)
    for title, paths in blocks:
        text += f"\n## {title}\n"
        for path in paths:
            if path not in seen:
                text += f"\n::: {path}\n"
            seen.add(path)
    return text


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


PAGES = {"settings.md": settings_page, "cli.md": cli_page, "api.md": api_page}


def stale() -> list[str]:
    """Names of the pages that differ from what the code gives.

    Another version of typer may wrap lines in another way: then only the commands and flags of cli.md are compared.
    """
    names = []
    for name, page in PAGES.items():
        path, now = FOLDER / name, page()
        written = path.read_text(encoding="utf-8") if path.exists() else ""
        if _typer(written) != _typer(now):
            written, now = _commands(written), _commands(now)
        if written != now:
            names.append(name)
    return names


def _typer(page: str) -> str:
    return page.rpartition("<!-- typer ")[2] if "<!-- typer " in page else ""


def _commands(page: str) -> str:
    return "\n".join(re.findall(r"^##+ .*|--[a-z][a-z-]+", page, re.MULTILINE))


def main(arguments: list[str]) -> None:
    if arguments == ["--check"]:
        if names := stale():
            print(f"differ from the code: {', '.join(names)}. Run python docs/write_reference.py", file=sys.stderr)
            sys.exit(1)
        return
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

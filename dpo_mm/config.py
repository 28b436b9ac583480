"""What a recipe or the command line fills in: frozen dataclasses, read from YAML and flags.

A key that no dataclass knows is refused with the nearest one; a value of the wrong type is refused with the type.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class TrainConfig:
    """One preference-tuning run. Defaults are those for an image generator on real pairs with a LoRA."""

    model: str
    """Folder or hub id of a pipeline or model, or the name of a shipped one."""
    pairs: str
    """Preference pairs: a Parquet file, a folder of them, a set on the hub, or the name of a shipped set."""
    output_dir: str
    revision: str | None = None
    """Revision of the model on the hub; recorded in the run."""

    objective: str | dict[str, float] = "sigmoid"
    """A name in dpo_mm.objectives.OBJECTIVES, or several with weights."""
    beta: float = 5000.0
    """1/nats, with the authors' 1/2 in the log-ratio and the error's mean over elements (Wallace et al. 2023: SD1.5
    2000, SDXL 5000; diffusers' script calls half of this number beta_dpo)."""
    settings: dict[str, float] = field(default_factory=dict)
    """Further settings of the objective, such as smoothing."""
    sft_weight: float = 0.0
    """Weight of the SFT term on the chosen side."""

    reference: str = "auto"
    """auto | adapter_off | frozen_copy | precomputed. auto: adapter_off with a LoRA, else frozen_copy."""
    reference_draws: int = 0
    """K fixed (noise, timestep) draws a row instead of fresh ones; precomputed references need at least 1."""

    tuning: str = "lora"
    """lora | full."""
    lora_rank: int = 16
    lora_alpha: int = 16
    lora_targets: tuple[str, ...] | None = None
    """Module names; None: the family's own."""
    lora_format: str = "diffusers"
    """diffusers | kohya. kohya writes kohya_lora_weights.safetensors beside diffusers' file, as ComfyUI and A1111 read it."""

    steps: int = 1000
    batch_size: int = 4
    """Pairs a process and step."""
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "constant_with_warmup"
    max_grad_norm: float = 1.0
    weight_decay: float = 1e-2
    precision: str = "fp32"
    """fp32 | bf16 | fp16. Errors and losses are float32 always."""
    gradient_checkpointing: bool = False
    seed: int = 0
    timestep_range: tuple[float, float] = (0.0, 1.0)
    """Part of the schedule to draw timesteps from; 0 is clean, 1 pure noise."""

    include_vision: bool = False
    """Adapt (or train) the vision tower and projector of a vision-language model too."""
    max_length: int | None = None
    """Tokens of a row of text, images and prompt included; None: what the model was made for."""
    on_too_long: str = "raise"
    """raise | drop. Image tokens are never cut."""
    layout: str = "auto"
    """auto | shared | plain: chosen and rejected behind one prompt where that is exact, see policies/shared_prefix.py."""
    keep_features: bool = False
    """Compute the features of a frozen vision tower once and keep them in memory."""
    tail_weight: float = 1.0
    """Weight of tokens past the shorter answer's length, [0, 1] (LD-DPO's alpha; 1: all count alike)."""
    edited_weight: float = 1.0
    """Weight of tokens that differ between chosen and rejected (RLHF-V's gamma, 5 there); other than 1, log-probs become
    weighted means a token."""

    eval_fraction: float = 0.05
    """Share of the pairs, whole prompts of them, kept out of training to watch it on fixed draws."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the end alone."""
    save_every: int = 0
    """Steps between checkpoints; 0: none but the result."""
    keep_checkpoints: int = 2
    log_every: int = 10
    workers: int = 0
    """Loader processes."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir."""
    on_bad_image: str = "raise"
    """raise | skip."""


@dataclass(frozen=True)
class CompareConfig:
    """Base and tuned from the same seeds on held-out prompts."""

    model: str
    output_dir: str
    adapter: str | None = None
    """Folder of a LoRA in diffusers' format, or of a fully tuned pipeline; None compares the base with itself."""
    revision: str | None = None
    prompts: str = "shapes-held-out"
    """A text file with a prompt a line, or the name of a shipped list."""
    limit: int | None = None
    """Prompts, spread over the categories; None: all."""
    samples: int = 4
    """Seeds a prompt."""
    judges: tuple[str, ...] = ("faithfulness",)
    """Names of judges or module:function; the first one is the headline."""
    sampling_steps: int = 50
    guidance: float = 7.5
    batch_size: int = 16
    precision: str = "fp32"
    scales: tuple[float, ...] = ()
    """LoRA scales to sweep beside 0 and 1."""
    seed: int = 0


@dataclass(frozen=True)
class MineConfig:
    """Preference pairs from a model's own samples: best against worst of each prompt."""

    model: str
    prompts: str
    output_dir: str
    judge: str
    adapter: str | None = None
    revision: str | None = None
    guard: str | None = None
    """A second judge on which the chosen side must not be worse, so that one axis isn't bought with the other."""
    samples: int = 8
    min_gap: float = 0.0
    """Least difference of the judge's scores between chosen and rejected, exclusive."""
    pairs_per_prompt: int = 1
    limit: int | None = None
    sampling_steps: int = 50
    guidance: float = 7.5
    batch_size: int = 16
    precision: str = "fp32"
    seed: int = 0
    shard_size: int = 64
    """Prompts a shard; a restarted run skips finished shards."""


@dataclass(frozen=True)
class CompareAnswersConfig:
    """Base and tuned vision-language model on the same held-out questions."""

    model: str
    output_dir: str
    questions: str
    """A world's name (pages-held-out, scenes-held-out), or Parquet or JSON lines with images, prompt and truth."""
    adapter: str | None = None
    """Folder of a LoRA in PEFT's format, or of a fully tuned model; None compares the base with itself."""
    revision: str | None = None
    limit: int | None = None
    """Questions; None: all of a file, 400 of a world."""
    judges: tuple[str, ...] = ("degeneration", "cer", "tokens")
    """Names of judges of answers or module:function; the first one is the headline."""
    guards: tuple[str, ...] = ()
    """Judges of these that must not be significantly worse."""
    max_new_tokens: int = 512
    temperature: float = 0.0
    """0: greedy."""
    batch_size: int = 16
    precision: str = "fp32"
    seed: int = 0


@dataclass(frozen=True)
class MineAnswersConfig:
    """Preference pairs from a model's own failures: the worst of its answers against the truth, or its own best."""

    model: str
    questions: str
    output_dir: str
    judge: str
    adapter: str | None = None
    revision: str | None = None
    chosen: str = "truth"
    """truth | best: the model's own best answer, by the judge and then by `tie_break` | corrected: the rejected answer
    with what the judge found wrong mended and nothing else."""
    tie_break: str = "recall"
    """Judge that decides between own answers that the first finds equal, where chosen is best."""
    samples: int = 0
    """Answers drawn beside the greedy one."""
    temperature: float = 1.0
    min_gap: float = 0.0
    """Least difference between chosen and rejected by the judge, exclusive."""
    max_new_tokens: int = 512
    limit: int | None = None
    batch_size: int = 16
    precision: str = "fp32"
    seed: int = 0
    shard_size: int = 128
    """Questions a shard; a restarted run skips finished shards."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error: the nearest known name, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def build(kind: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """A config of `kind` from plain values. Raises ValueError that names `where`, the key, and the fix."""
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"{where}: {key!r} is not a setting; {nearest(key, hints)}")
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]  # type: ignore[arg-type]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(
            f"{where}: {' and '.join(missing)} missing; give it in the file or as --{missing[0].replace('_', '-')}"
        )
    return kind(**{key: _coerce(value, hints[key], f"{where}: {key}") for key, value in values.items()})


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type that the dataclass states; strings from the command line and YAML's lists are converted."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in options):
            return None
        kinds = [option for option in options if option is not type(None)]
        preferred = [k for k in kinds if isinstance(value, typing.get_origin(k) or k)]
        return _coerce(value, (preferred or kinds)[0], where)
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else list(value)
        return tuple(_coerce(part, options[0], where) for part in parts)
    if origin is dict:
        return _mapping(value, where)
    return _plain(value, hint, where)


def _mapping(value: Any, where: str) -> dict[str, float]:
    if isinstance(value, str) and all(":" in part for part in value.split(",")):
        value = dict(part.split(":", 1) for part in value.split(","))
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected names with numbers, such as 'sigmoid:0.8,sft:0.2', got {value!r}")
    return {str(key): _plain(number, float, f"{where}.{key}") for key, number in value.items()}


def _plain(value: Any, kind: type, where: str) -> Any:
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
    elif kind is str and isinstance(value, str | Path):
        return str(value)
    elif kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and (kind is float or number == int(number)):
            return kind(number)
    if isinstance(value, kind):
        return value
    raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")


def read(path: str | Path) -> dict[str, Any]:
    """The plain values of a YAML file. Raises ValueError where it is missing, broken or not a mapping."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a recipe is a YAML file with settings, see recipes/presets/") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected settings as 'key: value' lines")
    return values


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain values that JSON and YAML can hold."""
    return dataclasses.asdict(config)

"""What a recipe or the command line fills in: frozen dataclasses, read from YAML and flags.

A key that no dataclass knows is refused with the nearest one; a value of the wrong type is refused with the type.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dpo_mm.assets import presets_folder
from dpo_mm.errors import did_you_mean

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
    beta: float | str = 5000.0
    """1/nats, or auto (see dpo_mm/training/auto_beta.py), with the authors' 1/2 in the log-ratio and the error's mean over elements (Wallace et al. 2023: SD1.5
    2000, SDXL 5000; diffusers' script calls half of this number beta_dpo)."""
    objective_kwargs: dict[str, float] = field(default_factory=dict)
    """Further settings of the objective, such as label_smoothing."""
    sft_weight: float = 0.0
    """Weight of the SFT term on the chosen side."""

    reference: str = "auto"
    """auto | adapter_off | frozen_copy | precomputed | moving_average | synced. auto: adapter_off with a LoRA, else
    frozen_copy."""
    fixed_draws_per_row: int = 0
    """K fixed (noise, timestep) draws a row instead of fresh ones; precomputed references need at least 1."""
    reference_ema_decay: float = 0.99
    """Share of itself that a moving average keeps at each step, [0, 1)."""
    reference_sync_steps: int = 512
    """Steps between two copies of the policy into a synced reference (TR-DPO's tau, 2404.09656)."""

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
    optimizer: str = "adamw"
    """adamw | adamw_8bit (bitsandbytes, the extra `8bit`) | adafactor."""
    schedule: str = "constant_with_warmup"
    max_grad_norm: float = 1.0
    weight_decay: float = 1e-2
    precision: str = "fp32"
    """fp32 | bf16 | fp16. Errors and losses are float32 always."""
    gradient_checkpointing: bool = False
    seed: int = 0
    timestep_sampling: str = "uniform"
    """uniform | logit_normal: how timesteps are drawn from the schedule."""
    timestep_range: tuple[float, float] = (0.0, 1.0)
    """Part of the schedule to draw timesteps from; 0 is clean, 1 pure noise."""
    loss_weighting: str = "target"
    """target | epsilon: what beta is constant on where the network predicts v or a velocity."""
    stratified_timesteps: bool = False
    """A step's pairs take their timesteps from as many parts of the schedule, one each; of K fixed draws, a row's do."""
    antithetic_noise: bool = False
    """Each pair comes twice in a row, the second time with its noise negated; batch_size counts both."""

    train_vision_tower: bool = False
    """Adapt (or train) the vision tower and projector of a vision-language model too."""
    max_length: int | None = None
    """Tokens of a row of text, images and prompt included; None: what the model was made for."""
    overlong_rows: str = "raise"
    """raise | drop. Image tokens are never cut."""
    pair_layout: str = "auto"
    """auto | shared_prefix | separate: chosen and rejected behind one prompt where that is exact, see policies/shared_prefix.py."""
    cache_vision_features: bool = False
    """Compute the features of a frozen vision tower once and keep them in memory."""
    ld_alpha: float = 1.0
    """Weight of tokens past the shorter answer's length, [0, 1] (LD-DPO's alpha; 1: all count alike)."""
    edited_token_weight: float = 1.0
    """Weight of tokens that differ between chosen and rejected (RLHF-V's gamma, 5 there); other than 1, log-probs become
    weighted means a token."""

    eval_fraction: float = 0.05
    """Share of the pairs, whole prompts of them, kept out of training to watch it on fixed draws."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the end alone."""
    save_every: int = 0
    """Steps between checkpoints; 0: none but the result."""
    save_total_limit: int = 2
    log_every: int = 10
    workers: int = 0
    """Loader processes."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir."""
    undecodable_images: str = "raise"
    """raise | drop."""

    resolution: int | None = None
    """Pixels on a side of what an image generator is trained on; None: the pipeline's own."""
    buckets: bool = False
    """Fit pairs to frames of about that area by their aspect ratio instead of cropping all to a square."""
    cache_precision: str = "fp32"
    """fp32 (exact) | bf16 | fp16: how encoded pictures and prompts are kept on disk."""


@dataclass(frozen=True)
class CompareConfig:
    """Base and tuned from the same seeds on held-out prompts."""

    model: str
    output_dir: str
    adapter: str | None = None
    """Folder of a LoRA in diffusers' format, or of a fully tuned pipeline; None compares the base with itself."""
    revision: str | None = None
    prompts: str = "shapes-held-out"
    """A text file with a prompt a line, a published set's own file or folder (GenEval, PartiPrompts, T2I-CompBench,
    DPG-Bench), or the name of a shipped list."""
    max_prompts: int | None = None
    """Prompts, spread over the categories; None: all."""
    images_per_prompt: int = 4
    """Seeds a prompt."""
    judges: tuple[str, ...] = ("faithfulness",)
    """Names of judges or module:function; the first one is the headline, but for a learned one that made the pairs."""
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    batch_size: int = 16
    precision: str = "fp32"
    scales: tuple[float, ...] = ()
    """LoRA scales to sweep beside 0 and 1."""
    checkpoints: bool = False
    """Sweep the checkpoints in the adapter's folder too."""
    save_images: bool = True
    """Leave the pictures in output_dir, as PNG with a manifest; else they are removed once the report is there."""
    seed: int = 0


@dataclass(frozen=True)
class MineConfig:
    """Preference pairs from a model's own samples: best against worst of each prompt."""

    model: str
    prompts: str
    output_dir: str
    judges: tuple[str, ...] | str
    """Ranks a prompt's pictures. Several (a list, or with commas) rank by the mean of their z-scores within the prompt."""
    adapter: str | None = None
    revision: str | None = None
    guards: tuple[str, ...] | str | None = None
    """Judges on each of which the chosen side must not be worse, so that one axis isn't bought with the other."""
    images_per_prompt: int = 8
    min_score_gap: float = 0.0
    """Least difference between chosen and rejected, exclusive: of the judge's scores, or of several judges' mean z-score."""
    pairs_per_prompt: int = 1
    max_prompts: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    batch_size: int = 16
    precision: str = "fp32"
    seed: int = 0
    shard_size: int = 64
    """Prompts a shard; a restarted run skips finished shards."""


@dataclass(frozen=True)
class JudgeConfig:
    """Scores of one judge for pictures."""

    judge: str
    images: str
    """Folder of pictures, or a preference set."""
    output: str
    """Parquet file to write."""
    prompts: str | None = None
    """A prompt a line, in the order of the pictures' names; None: metadata.jsonl in the folder, or a text file each."""
    shard_size: int = 256
    """Pictures a shard; a restarted run skips finished shards."""


@dataclass(frozen=True)
class RelabelConfig:
    """New labels of an image preference set by an ensemble of judges: soft, ties kept, the old ones beside them."""

    pairs: str
    """Parquet file, a folder of them, a set on the hub, or the name of a shipped set."""
    judges: tuple[str, ...]
    """Names of judges or module:function; of single pictures or of pairs."""
    output: str
    """Parquet file to write."""
    scale: str = "spread"
    """spread | labels. What difference counts as one unit of log-odds: the root mean square of the judge's differences on
    this set, or what makes the set's own labels likeliest."""
    scales: tuple[float, ...] = ()
    """That unit of each judge, in the judge's own scores; instead of `scale`."""
    trust: float | None = None
    """How likely a label of the set is right, [0.5, 1): the labels then count as one more judge, of independent errors.
    None: they are kept beside and have no say."""
    agreement: float = 0.5
    """Least share of judges on one side, a tie counting for both by halves; other pairs are left out. 1: all agree."""
    tie: float = 0.0
    """Probabilities no further from 1/2 than this are ties."""
    undecodable_images: str = "raise"
    """raise | drop."""
    shard_size: int = 256
    """Pairs a shard; a restarted run skips finished shards."""


@dataclass(frozen=True)
class CompareResponsesConfig:
    """Base and tuned vision-language model on the same held-out questions."""

    model: str
    output_dir: str
    questions: str
    """A world's name (pages-held-out, scenes-held-out), or Parquet or JSON lines with images, prompt and truth."""
    adapter: str | None = None
    """Folder of a LoRA in PEFT's format, or of a fully tuned model; None compares the base with itself."""
    revision: str | None = None
    max_questions: int | None = None
    """Questions; None: all of a file, 400 of a world."""
    judges: tuple[str, ...] = ("degeneration", "cer", "num_tokens")
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
class MineResponsesConfig:
    """Preference pairs from a model's own failures: the worst of its answers against the truth, or its own best."""

    model: str
    questions: str
    output_dir: str
    judges: tuple[str, ...] | str
    """The judge that finds failures. Exactly one."""
    adapter: str | None = None
    revision: str | None = None
    chosen: str = "ground_truth"
    """ground_truth | best: the model's own best answer, by the judge and then by `tie_break` | corrected: the rejected answer
    with what the judge found wrong mended and nothing else."""
    tie_break: str = "recall"
    """Judge that decides between own answers that the first finds equal, where chosen is best."""
    responses_per_question: int = 1
    """Responses generated per question: one greedy, the others sampled."""
    temperature: float = 1.0
    min_score_gap: float = 0.0
    """Least difference between chosen and rejected by the judge, exclusive."""
    max_new_tokens: int = 512
    max_questions: int | None = None
    batch_size: int = 16
    precision: str = "fp32"
    seed: int = 0
    shard_size: int = 128
    """Questions a shard; a restarted run skips finished shards."""

    @property
    def judge(self) -> str:
        """Name of the one judge. Raises ValueError if `judges` names several or none."""
        names = self.judges.split(",") if isinstance(self.judges, str) else list(self.judges)
        if len(names) != 1:
            raise ValueError(f"judges {', '.join(names)!r}: responses are mined with exactly one judge")
        return names[0]


def config_from_mapping(kind: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """A config of `kind` from plain values. Raises ValueError that names `where`, the key, and the fix."""
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"{where}: {key!r} is not a setting; {did_you_mean(key, hints)}")
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
        if float in kinds and isinstance(value, str | int) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                return float(value)
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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The plain values of a YAML file. Raises ValueError where it is missing, broken or not a mapping."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file. A recipe is a YAML file of settings; examples are in {presets_folder()}"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected settings as 'key: value' lines")
    return values


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain values that JSON and YAML can hold."""
    return dataclasses.asdict(config)

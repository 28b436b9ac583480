"""Settings of the commands and recipes: frozen dataclasses. The text below a field is its documentation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dpo_mm.setting_limits import Settings


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of one preference-tuning run. The defaults suit an image generator, real pairs and a LoRA."""

    model: str
    """Folder or hub id of a pipeline or model, or the name of a bundled one."""
    pairs: str
    """Preference pairs: a Parquet file, a folder of Parquet files, a dataset on the hub, or the name of a bundled dataset."""
    output_dir: str
    """Folder for the result, the log and the checkpoints."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub. The commit is recorded in the run. null: the default branch."""

    objective: str | dict[str, float] = "sigmoid"
    """Name of an objective, or several names with weights."""
    beta: float | str = 5000.0
    """KL strength in 1/nats, > 0, or "auto" (measured on the first pairs). Images use the convention of the Diffusion-DPO
    authors: 2000 for SD1.5, 5000 for SDXL. diffusers' script uses half of this number. For text, about 0.1."""
    objective_kwargs: dict[str, float] = field(default_factory=dict)
    """Further arguments of the objective, for example label_smoothing."""
    sft_weight: float = 0.0
    """Weight of the SFT loss on the chosen side. Increase it if the log-prob of the chosen side falls."""

    reference: str = "auto"
    """auto | adapter_off | frozen_copy | precomputed | moving_average | synced. auto is adapter_off with a LoRA and
    frozen_copy otherwise."""
    fixed_draws_per_row: int = 0
    """Number K of fixed (noise, timestep) draws per row that repeat over the epochs. 0: fresh draws in each epoch.
    Image models with precomputed references need at least 1."""
    reference_ema_decay: float = 0.99
    """Decay per step of the moving-average reference, in [0, 1)."""
    reference_sync_steps: int = 512
    """Steps between two copies of the policy into a synced reference (tau of TR-DPO, 2404.09656)."""

    tuning: str = "lora"
    """lora | full. full trains all weights and needs much more memory."""
    lora_rank: int = 16
    """Rank of the LoRA matrices. A higher rank can learn more and needs more memory."""
    lora_alpha: int = 16
    """Scale of the LoRA: its update is multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] | None = None
    """Names of the modules that get a LoRA. null: the defaults of the model family."""
    lora_format: str = "diffusers"
    """diffusers | kohya. kohya also writes kohya_lora_weights.safetensors, which ComfyUI and A1111 load."""

    steps: int = 1000
    """Number of optimizer steps."""
    batch_size: int = 4
    """Pairs per process and forward pass. Decrease it if memory runs out, and increase accumulate by the same factor."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-4
    """Peak learning rate. Full fine-tuning needs a smaller one than a LoRA."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly from 0."""
    optimizer: str = "adamw"
    """adamw | adamw_8bit (bitsandbytes, the extra `8bit`) | adafactor. The last two need less memory."""
    schedule: str = "constant_with_warmup"
    """Learning-rate schedule of transformers, for example linear or cosine."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient. Larger gradients are scaled down."""
    weight_decay: float = 1e-2
    """Weight decay of the optimizer."""
    precision: str = "auto"
    """auto | fp32 | bf16 | fp16. Precision of forward and backward passes and, with a LoRA, of the frozen weights. Errors and
    losses are always float32. auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. Use it if memory runs out. It costs about one more forward pass."""
    seed: int = 0
    """Seed of the LoRA's initial weights, the order of the rows, the noise, the timesteps and the evaluation split."""
    timestep_sampling: str = "uniform"
    """uniform | logit_normal. Distribution of the timesteps over the schedule."""
    timestep_range: tuple[float, float] = (0.0, 1.0)
    """Part of the schedule from which timesteps are sampled. 0 is a clean image, 1 is pure noise."""
    loss_weighting: str = "target"
    """target | epsilon. Error on which beta is constant if the network predicts v or a velocity: its own, or that of the noise."""
    stratified_timesteps: bool = False
    """Take the timesteps of a step's pairs from equal parts of the schedule, one pair per part. With fixed draws: the K
    timesteps of each row. It lowers the variance of the gradient."""
    antithetic_noise: bool = False
    """Use each pair twice in succession, the second time with negated noise. batch_size counts both, so it must be even."""

    train_vision_tower: bool = False
    """Also train the vision tower and the projector of a vision-language model."""
    max_length: int | None = None
    """Largest number of tokens per row: images, prompt and the longer response. null: the limit of the model."""
    overlong_rows: str = "raise"
    """raise | drop. What happens to rows longer than max_length. Image tokens are never truncated."""
    pair_layout: str = "auto"
    """auto | shared_prefix | separate. shared_prefix puts both responses behind one copy of the prompt, which saves time.
    auto uses it if a check on the first batch shows that log-probs stay the same."""
    cache_vision_features: bool = False
    """Compute the features of a frozen vision tower once and cache them in memory. It saves time in each step."""
    ld_alpha: float = 1.0
    """Weight of tokens beyond the length of the shorter response, in [0, 1] (alpha of LD-DPO). 1: all tokens count alike."""
    edited_token_weight: float = 1.0
    """Weight of tokens that differ between chosen and rejected (gamma of RLHF-V, which uses 5). Unless it is 1, log-probs
    are weighted means per token."""

    eval_fraction: float = 0.05
    """Fraction of prompts held out for evaluation, in [0, 1). Their pairs are evaluated with fixed noise. 0: none."""
    eval_every: int = 0
    """Steps between two evaluations. 0: only at the end."""
    save_every: int = 0
    """Steps between two checkpoints. 0: only the final result."""
    save_total_limit: int = 2
    """Number of checkpoints on disk. Older ones are deleted."""
    log_every: int = 10
    """Steps between two lines of the log."""
    workers: int | None = None
    """Number of processes that load rows. 0: rows are loaded in the training process. null: one per CPU core, at most 4, for
    large vision-language rows, which are encoded in each step, else 0."""
    resume: bool = False
    """Continue from the newest complete checkpoint in output_dir, with other steps too. There must be one. The same command
    without it continues as well."""
    overwrite: bool = False
    """Remove an earlier result in output_dir first. Only files that dpo-mm wrote and that are unchanged are removed."""
    undecodable_images: str = "raise"
    """raise | drop. What happens to rows with an image that does not decode. Dropped rows are listed in a file."""

    resolution: int | None = None
    """Edge of the training images in pixels. null: the native resolution of the pipeline. Smaller values save memory."""
    buckets: bool = False
    """Resize pairs to buckets of about the same area by their aspect ratio. Otherwise all are cropped to a square."""
    cache_precision: str = "fp32"
    """fp32 | bf16 | fp16. Precision of the encoded images and prompts on disk. fp32 is exact, the others halve the size."""


TRAINER_NAMES = {
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "optim": "optimizer",
    "lr_scheduler_type": "schedule",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "logging_steps": "log_every",
    "dataloader_num_workers": "workers",
}
"""Names of transformers' TrainingArguments that files and flags may use, and the fields of TrainConfig that they set."""


@dataclass(frozen=True)
class CompareConfig(Settings):
    """Settings of a comparison of images: the base and the tuned model, same held-out prompts and seeds."""

    model: str
    """Folder or hub id of the base pipeline, or the name of a bundled one."""
    output_dir: str
    """Folder for the images, their scores and the report."""
    adapter: str | None = None
    """Folder of a LoRA in diffusers' format, or of a fully tuned pipeline. null: compare the base with itself."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the hub. null: the default branch."""
    prompts: str = "shapes-held-out"
    """Prompts: a text file with one prompt per line, a file or folder of a published benchmark (GenEval, PartiPrompts,
    T2I-CompBench, DPG-Bench), or the name of a bundled list. They must not be in the training data."""
    max_prompts: int | None = None
    """Largest number of prompts, spread over the categories. null: all."""
    images_per_prompt: int = 4
    """Number of images per prompt and model, each from its own seed."""
    judges: tuple[str, ...] = ("faithfulness",)
    """Names of judges, or module:function. The first one is the primary metric, unless it is learned and built the
    training pairs."""
    num_inference_steps: int = 50
    """Denoising steps per image."""
    guidance_scale: float = 7.5
    """Strength of classifier-free guidance."""
    batch_size: int = 16
    """Images that are generated at once. Decrease it if memory runs out."""
    precision: str = "auto"
    """auto | fp32 | bf16 | fp16. Precision of the models. auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    scales: tuple[float, ...] = ()
    """Further LoRA scales to evaluate, in addition to 0 and 1."""
    checkpoints: bool = False
    """Also evaluate the checkpoints in the adapter's folder."""
    save_images: bool = True
    """Leave the images in output_dir, as PNG with a manifest. Otherwise they are deleted after the report is written."""
    seed: int = 0
    """Seed of the images."""
    overwrite: bool = False
    """Remove an earlier report in output_dir first. Only files that dpo-mm wrote and that are unchanged are removed."""


@dataclass(frozen=True)
class MineConfig(Settings):
    """Settings for building pairs from a model's own images: the best against the worst of each prompt."""

    model: str
    """Folder or hub id of the pipeline that generates the images, or the name of a bundled one."""
    prompts: str
    """Prompts: a text file with one prompt per line, a file or folder of a published benchmark, or a bundled list."""
    output_dir: str
    """Folder for the pairs. They are in pairs.parquet."""
    judges: tuple[str, ...] | str
    """Judges that rank the images of a prompt. Several (a list, or names with commas) rank by the mean of their z-scores
    within the prompt."""
    adapter: str | None = None
    """Folder of a LoRA or of a tuned pipeline to generate with. null: the base model."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub. null: the default branch."""
    guards: tuple[str, ...] | str | None = None
    """Judges by which the chosen image must not be worse. Use them so that one quality does not improve at the expense of
    another."""
    images_per_prompt: int = 8
    """Number of images per prompt, at least 2. More of them give clearer pairs and take longer."""
    min_score_gap: float = 0.0
    """Chosen and rejected must differ by more than this: in the judge's score, or in the mean z-score of several judges."""
    pairs_per_prompt: int = 1
    """Largest number of pairs per prompt: best with worst, then second best with second worst, and so on."""
    max_prompts: int | None = None
    """Largest number of prompts, spread over the categories. null: all."""
    num_inference_steps: int = 50
    """Denoising steps per image."""
    guidance_scale: float = 7.5
    """Strength of classifier-free guidance."""
    batch_size: int = 16
    """Images that are generated at once. Decrease it if memory runs out."""
    precision: str = "auto"
    """auto | fp32 | bf16 | fp16. Precision of the model. auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    seed: int = 0
    """Seed of the images."""
    shard_size: int = 64
    """Prompts per shard. An interrupted run resumes after the last complete shard."""
    overwrite: bool = False
    """Remove an earlier result in output_dir first. Only files that dpo-mm wrote and that are unchanged are removed."""


@dataclass(frozen=True)
class JudgeConfig(Settings):
    """Settings for scoring images with one judge."""

    judge: str
    """Name of a judge, or module:function."""
    images: str
    """Folder of images, or a preference dataset."""
    output: str
    """Parquet file to write."""
    prompts: str | None = None
    """Text file with one prompt per line, in the order of the images' names. null: metadata.jsonl in the folder, or one
    text file per image."""
    shard_size: int = 256
    """Images per shard. An interrupted run resumes after the last complete shard."""
    overwrite: bool = False
    """Replace an earlier result. Only a file that dpo-mm wrote and that is unchanged is replaced."""


@dataclass(frozen=True)
class RelabelConfig(Settings):
    """Settings for relabelling image pairs with judges. The old labels stay in the rows."""

    pairs: str
    """Preference pairs: a Parquet file, a folder of Parquet files, a dataset on the hub, or the name of a bundled dataset."""
    judges: tuple[str, ...]
    """Names of judges, or module:function. They score single images or compare pairs."""
    output: str
    """Parquet file to write."""
    scale: str = "spread"
    """spread | labels. Score difference that counts as one unit of log-odds: the root mean square of the judge's
    differences on this dataset, or the value that makes the dataset's own labels most likely."""
    scales: tuple[float, ...] = ()
    """The same unit for each judge, in the judge's own scores. It replaces `scale`."""
    trust: float | None = None
    """Assumed probability that a label of the dataset is right, in [0.5, 1). The labels then count as one more judge with
    independent errors. null: they do not count."""
    agreement: float = 0.5
    """Least fraction of judges that prefer the same image, in [0.5, 1]. A tie counts half for each image. Other pairs are
    dropped. 1: all judges agree."""
    tie: float = 0.0
    """Pairs whose probability differs from 1/2 by at most this become ties, in [0, 0.5)."""
    undecodable_images: str = "raise"
    """raise | drop. What happens to pairs with an image that does not decode."""
    shard_size: int = 256
    """Pairs per shard. An interrupted run resumes after the last complete shard."""
    overwrite: bool = False
    """Replace an earlier result. Only a file that dpo-mm wrote and that is unchanged is replaced."""


@dataclass(frozen=True)
class CompareResponsesConfig(Settings):
    """Settings of a comparison of responses: the base and the tuned model, same held-out questions."""

    model: str
    """Folder or hub id of the base model, or the name of a bundled one."""
    output_dir: str
    """Folder for the responses, their scores and the report."""
    questions: str
    """Name of a synthetic dataset (pages-held-out, scenes-held-out, sums-held-out), or Parquet or JSON lines with images,
    prompt and ground_truth. They must not be in the training data."""
    adapter: str | None = None
    """Folder of a LoRA in PEFT's format, or of a fully tuned model. null: compare the base with itself."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the hub. null: the default branch."""
    max_questions: int | None = None
    """Largest number of questions. null: all of a file, 400 of a synthetic dataset."""
    judges: tuple[str, ...] = ("degeneration", "cer", "num_tokens")
    """Names of judges of responses, or module:function. The first one is the primary metric, unless it is learned and
    built the training pairs."""
    guards: tuple[str, ...] = ()
    """Guardrail metrics: judges from the list above that must not get significantly worse."""
    max_new_tokens: int = 512
    """Largest number of tokens per response. Longer responses are truncated."""
    temperature: float = 0.0
    """Sampling temperature. 0: greedy decoding."""
    batch_size: int = 16
    """Responses that are generated at once. Decrease it if memory runs out."""
    precision: str = "auto"
    """auto | fp32 | bf16 | fp16. Precision of the models. auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    seed: int = 0
    """Seed of sampled responses."""
    overwrite: bool = False
    """Remove an earlier report in output_dir first. Only files that dpo-mm wrote and that are unchanged are removed."""


@dataclass(frozen=True)
class MineResponsesConfig(Settings):
    """Settings for building pairs from a model's own failures: its worst response against a better one."""

    model: str
    """Folder or hub id of the model that responds, or the name of a bundled one."""
    questions: str
    """Name of a synthetic dataset (pages-train, scenes-train, sums-train), or Parquet or JSON lines with images, prompt
    and ground_truth."""
    output_dir: str
    """Folder for the pairs. They are in pairs.parquet."""
    judges: tuple[str, ...] | str
    """The judge that finds failures. Exactly one."""
    adapter: str | None = None
    """Folder of a LoRA or of a tuned model to respond with. null: the base model."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub. null: the default branch."""
    chosen: str = "ground_truth"
    """ground_truth | best | corrected. best: the model's best response, by the judge and then by `tie_break`. corrected: the
    rejected response, in which only the mistakes that the judge flagged are corrected."""
    tie_break: str = "recall"
    """Judge that decides between responses with equal scores if chosen is best."""
    responses_per_question: int = 1
    """Number of responses per question: one greedy, the others sampled. best needs at least 2."""
    temperature: float = 1.0
    """Sampling temperature of the sampled responses."""
    min_score_gap: float = 0.0
    """Chosen and rejected must differ by more than this in the judge's score."""
    max_new_tokens: int = 512
    """Largest number of tokens per response. Longer responses are truncated."""
    max_questions: int | None = None
    """Largest number of questions. null: all of a file, 400 of a synthetic dataset."""
    batch_size: int = 16
    """Responses that are generated at once. Decrease it if memory runs out."""
    precision: str = "auto"
    """auto | fp32 | bf16 | fp16. Precision of the model. auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    seed: int = 0
    """Seed of the sampled responses."""
    shard_size: int = 128
    """Questions per shard. An interrupted run resumes after the last complete shard."""
    overwrite: bool = False
    """Remove an earlier result in output_dir first. Only files that dpo-mm wrote and that are unchanged are removed."""

    @property
    def judge(self) -> str:
        """Name of the one judge.

        Raises:
            ValueError: if `judges` names several or none.
        """
        names = self.judges.split(",") if isinstance(self.judges, str) else list(self.judges)
        if len(names) != 1:
            raise ValueError(f"judges {', '.join(names)!r}: responses are mined with exactly one judge")
        return names[0]


def as_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain values for JSON and YAML."""
    return dataclasses.asdict(config)

"""Settings of the commands that generate images."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_mm.config.setting_limits import Settings
from dpo_mm.config.side_set_configs import SidePrompts


@dataclass(frozen=True)
class CompareConfig(Settings):
    """Settings of a comparison of images: the base and the tuned model, same held-out prompts and seeds."""

    model: str
    """Folder or hub id of the base pipeline, or the name of a bundled one."""
    output_dir: str
    """Folder for the images, their scores and the report."""
    adapter: str | None = None
    """LoRA in diffusers' format or another that it reads (a folder, a safetensors file, a hub id), or folder of a fully tuned
    pipeline. null: compare the base with itself."""
    base_adapter: str | None = None
    """Adapter of the base. Use it to compare a second stage of training with the first. null: the base is the model."""
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
    side_sets: tuple[SidePrompts, ...] = ()
    """Further prompts that must not get significantly worse by a judge: names of files or bundled lists, or prompts, judges and
    max_prompts of each."""
    num_inference_steps: int = 50
    """Denoising steps per image."""
    guidance_scale: float = 7.5
    """Strength of classifier-free guidance."""
    batch_size: int = 16
    """Images that are generated at once. Decrease it if memory runs out."""
    precision: str = "auto"
    """auto | fp32 | bf16 | fp16. Precision of the models. auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    quantize: str | None = None
    """nf4 | int8 | fp8. Quantises the linear layers of the denoiser and of large text encoders, as in training. It needs the extra `quantized`."""
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
    judges: tuple[str, ...] | str = ()
    """Judges that rank the images of a prompt. Several (a list, or names with commas) rank by the mean of their z-scores
    within the prompt. Required, except with chosen own."""
    adapter: str | None = None
    """LoRA (a folder, a safetensors file, a hub id) or folder of a tuned pipeline to generate with. null: the base model."""
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
    chosen: str | None = None
    """own: prompts is a folder of captioned images, which are chosen. The rejected images are generated for their captions,
    pairs_per_prompt for each, and no judge is used. null: the judges choose."""
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
    quantize: str | None = None
    """nf4 | int8 | fp8. Quantises the linear layers of the denoiser and of large text encoders, as in training. It needs the extra `quantized`."""
    seed: int = 0
    """Seed of the images."""
    shard_size: int = 64
    """Prompts per shard. An interrupted run resumes after the last complete shard."""
    overwrite: bool = False
    """Remove an earlier result in output_dir first. Only files that dpo-mm wrote and that are unchanged are removed."""

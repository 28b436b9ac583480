"""Settings of a training run, and their names in transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpo_mm.config.setting_limits import Settings


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of one preference-tuning run. The defaults suit an image generator, real pairs and a LoRA."""

    # Model and data
    model: str
    """Folder or hub id of a pipeline or model, the name of a bundled one, or a .safetensors file of Stable Diffusion 1.5 or SDXL
    with its configs in the folder of the same name, see the page Models."""
    pairs: str
    """Preference pairs: Parquet, two folders better/ and worse/, kohya's w/ and l/, CSV, JSON lines as TRL, LLaMA-Factory and
    ms-swift write them, a dataset on the hub, or the name of a bundled dataset. Some objectives also take rows with one image or
    response each, such as a folder of captioned images, see the page Objectives."""
    output_dir: str
    """Folder for the result, the log and the checkpoints."""
    columns: dict[str, str] | None = None
    """New names of columns of pairs in another format: caption=prompt, or {caption: prompt} in a file. null: their names stay."""
    media_dir: str | None = None
    """Folder of the images that pairs in another format name. null: the folder of the dataset."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub. The commit is recorded in the run. null: the default branch."""
    adapter: str | None = None
    """LoRA from which policy and reference start: a folder in PEFT's or diffusers' format, a safetensors file such as kohya's,
    or a hub id. null: they start at the model."""
    adapter_result: str = "continued"
    """continued | stacked. What a LoRA run with an adapter makes of it. continued trains the adapter further, with its rank,
    alpha and targets. stacked merges it into the model and trains a new LoRA on top. With tuning full, it is merged."""

    # Objective
    objective: str | dict[str, float] = "sigmoid"
    """Name of an objective, or several names with weights."""
    beta: float | str = 5000.0
    """KL strength in 1/nats, > 0, or "auto" (measured on the first pairs). Images use the convention of the Diffusion-DPO
    authors: 2000 for SD1.5, 5000 for SDXL. diffusers' script uses half of this number. Text has no default: about 0.1."""
    objective_kwargs: dict[str, float] = field(default_factory=dict)
    """Further arguments of the objective, for example label_smoothing."""
    sft_weight: float = 0.0
    """Weight of the SFT loss on the chosen side. Increase it if the log-prob of the chosen side falls."""

    # Reference
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

    # Trained weights
    tuning: str = "lora"
    """lora | full. full trains all weights and needs much more memory."""
    lora_rank: int = 16
    """Rank of the LoRA matrices. A higher rank can learn more and needs more memory."""
    lora_alpha: int = 16
    """Scale of the LoRA: its update is multiplied by lora_alpha / lora_rank."""
    use_rslora: bool = False
    """Divide lora_alpha by the root of the rank instead of the rank (rsLoRA, 2312.03732). It keeps high ranks effective."""
    use_dora: bool = False
    """Train the size of each weight row apart from its direction (DoRA, 2402.09353). It takes more memory and time per step."""
    lora_targets: tuple[str, ...] | None = None
    """Names of the modules that get a LoRA. null: the defaults of the model family."""
    train_text_encoder: bool = False
    """Also train a LoRA on the text encoders, with the rank and alpha of the denoiser's. Stable Diffusion and SDXL only. Prompts are
    encoded in each step, and the text encoders stay in memory."""
    lora_format: str = "diffusers"
    """diffusers | kohya. kohya also writes kohya_lora_weights.safetensors, which ComfyUI and A1111 load."""

    # Optimisation
    steps: int = 1000
    """Number of optimizer steps."""
    num_train_epochs: float | None = None
    """Passes over the training pairs. It replaces steps, and the plan shows how many steps it is. null: steps."""
    batch_size: int = 4
    """Pairs per process and forward pass. Decrease it if memory runs out, and increase accumulate by the same factor."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-4
    """Peak learning rate. Full fine-tuning needs a smaller one than a LoRA."""
    warmup_steps: float = 0
    """Steps in which the learning rate rises linearly from 0. A value below 1 is a fraction of all steps."""
    optimizer: str = "adamw"
    """A name of the Trainer: adamw_torch_fused | adamw_torch | adamw_bnb_8bit | paged_adamw_8bit | paged_adamw_32bit | adafactor.
    adamw is the first, adamw_8bit the third. Those with bits need the extra `8bit`, and a GPU if they are paged."""
    schedule: str = "constant_with_warmup"
    """Learning-rate schedule of transformers, for example linear or cosine."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient. Larger gradients are scaled down."""
    weight_decay: float = 1e-2
    """Weight decay of the optimizer."""
    precision: str = "auto"
    """auto | fp32 | bf16 | fp16. Precision of forward and backward passes and, with a LoRA, of the frozen weights. Errors and
    losses are always float32. auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    quantize: str | None = None
    """nf4 | int8 | fp8. Quantises the frozen linear layers of the denoiser, of text encoders with 1e9 weights and more, or of
    the language model, in 4 or 8 bits. It needs the extra `quantized` and a LoRA. null: `precision` for all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. Use it if memory runs out. It costs about one more forward pass."""
    compile: bool = False
    """Compile the blocks of the denoiser or of the language model with torch.compile. Starting takes longer, so it can pay for
    long runs only. If compiling fails, the run says so and continues without it."""
    seed: int = 0
    """Seed of the LoRA's initial weights, the order of the rows, the noise, the timesteps and the evaluation split."""
    # Timesteps and noise of image generators
    timestep_sampling: str = "uniform"
    """uniform | logit_normal. Distribution of the timesteps over the schedule."""
    timestep_range: tuple[float, float] = (0.0, 1.0)
    """Part of the schedule from which timesteps are sampled. 0 is a clean image, 1 is pure noise."""
    loss_weighting: str = "target"
    """target | epsilon. Error on which beta is constant if the network predicts v or a velocity: its own, or that of the noise."""
    stratified_timesteps: bool = False
    """Take the timesteps of a step's pairs from equal parts of the schedule, one pair per part. With fixed draws: the K
    timesteps of each row. It lowers the variance of the gradient."""
    proportion_empty_prompts: float = 0.0
    """Fraction of the draws with the empty prompt, in [0, 1). The published code of Diffusion-DPO uses 0.2 under this name. It trains
    what classifier-free guidance subtracts. Both images, policy and reference get the same prompt. Evaluation rows keep theirs."""
    random_flip: bool = False
    """Mirror the images of a row in half of its epochs, both of a pair and the image to edit alike. Leave it off if prompts name
    left or right, or if images have text. Both variants are encoded, which takes twice the disk. Evaluation rows stay unchanged."""
    antithetic_noise: bool = False
    """Use each pair twice in succession, the second time with negated noise. batch_size counts both, so it must be even."""

    # Vision-language models
    train_vision_tower: bool = False
    """Also train the vision tower and the projector of a vision-language model."""
    max_length: int | None = None
    """Largest number of tokens per row: images, prompt and the longer response. null: the limit of the model."""
    min_pixels: int | None = None
    """Smallest number of pixels of an image. Smaller ones are enlarged by processors that have this limit. null: the model's."""
    max_pixels: int | None = None
    """Largest number of pixels of an image. Larger ones are reduced by processors that have this limit, such as Qwen's, where
    28 x 28 or 32 x 32 pixels are a token. Train, mine and compare with the same value. null: the model's."""
    overlong_rows: str = "raise"
    """raise | drop. What happens to rows longer than max_length. Image tokens are never truncated."""
    train_sampling_strategy: str = "random"
    """random | group_by_length. Order of the rows, under the Trainer's name. group_by_length puts rows of similar length into a
    step, so that less is padding."""
    pair_layout: str = "auto"
    """auto | shared_prefix | separate. shared_prefix puts both responses behind one copy of the prompt, which saves time.
    auto uses it if a check on the first batch shows that log-probs stay the same."""
    cache_vision_features: bool = False
    """Compute the features of a frozen vision tower once and cache them on disk. It saves time in each step."""
    ld_alpha: float = 1.0
    """Weight of tokens beyond the length of the shorter response, in [0, 1] (alpha of LD-DPO). 1: all tokens count alike."""
    edited_token_weight: float = 1.0
    """Weight of tokens that differ between chosen and rejected (gamma of RLHF-V, which uses 5). Unless it is 1, log-probs
    are weighted means per token."""

    # Evaluation, checkpoints and files
    eval_fraction: float = 0.05
    """Fraction of prompts held out for evaluation, in [0, 1). Their pairs are evaluated with fixed noise. 0: none."""
    eval_every: int = 0
    """Steps between two evaluations. 0: only at the end."""
    metric_for_best_model: str | None = None
    """Save the weights with the best value of this metric instead of the last ones: eval_loss, eval_rewards/accuracies,
    eval_rewards/margins, eval_errors/chosen, or samples/JUDGE with one of sample_judges. An SFT baseline uses
    eval_loss instead of measures of pairs. null: the last ones."""
    early_stopping_patience: int = 0
    """End the run after this many values of metric_for_best_model without a better one. 0: never."""
    save_every: int = 0
    """Steps between two checkpoints. 0: only the final result."""
    save_total_limit: int = 2
    """Number of checkpoints on disk. Older ones are deleted."""
    log_every: int = 10
    """Steps between two lines of the log."""
    sample_prompts: str | None = None
    """Prompts to generate images from before, during and after training: a file or a bundled list, of which eight are used. The
    images and a strip of them are in output_dir/samples. The text encoders stay in memory for it. null: no images."""
    sample_questions: str | None = None
    """Questions to respond to before, during and after training, of which eight are used, as in compare. null: no responses."""
    sample_steps: int = 0
    """Steps between two samples. 0: only before the first and after the last step."""
    sample_judges: tuple[str, ...] = ()
    """Judges of the samples. Their means are in the log as samples/JUDGE."""
    num_inference_steps: int = 50
    """Denoising steps per sample image."""
    guidance_scale: float = 7.5
    """Strength of classifier-free guidance in sample images."""
    max_new_tokens: int = 256
    """Largest number of tokens of a sample response."""
    report_to: tuple[str, ...] = ()
    """Trackers that also get the log: tensorboard (the extra `tracking`), or wandb, trackio, mlflow and others that transformers
    knows, if they are installed."""
    run_name: str | None = None
    """Name of the run in the trackers. null: the name of output_dir."""
    logging_dir: str | None = None
    """Folder of TensorBoard's files. null: a new folder in output_dir/logs for each start."""
    workers: int | None = None
    """Number of processes that load rows. 0: rows are loaded in the training process. null: one per CPU core, at most 4, for
    large vision-language rows, which are encoded in each step, 2 for images on a GPU, else 0."""
    resume: bool = False
    """Continue from the newest complete checkpoint in output_dir, with other steps too. There must be one. The same command
    without it continues as well."""
    overwrite: bool = False
    """Remove an earlier result in output_dir first. Only files that dpo-mm wrote and that are unchanged are removed."""
    undecodable_images: str = "raise"
    """raise | drop. What happens to rows with an image that does not decode. Dropped rows are listed in quarantine.jsonl."""

    # Images
    resolution: int | None = None
    """Edge of the training images in pixels. null: the native resolution of the pipeline. Smaller values save memory."""
    buckets: bool = False
    """Resize pairs to buckets of about the same area by their aspect ratio. Otherwise all are cropped to a square."""
    cache_precision: str = "fp32"
    """fp32 | bf16 | fp16. Precision of the encoded images and prompts on disk. fp32 is exact: what encoders compute in half
    precision is stored in it. The others halve the size of the rest."""


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

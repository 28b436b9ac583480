"""Vision-language models as a policy: the log-prob of a response given images and prompt.

    log p(y) = sum over the completion's tokens of log p(token | images, prompt, previous tokens), nats

It supports any `AutoModelForImageTextToText` with its `AutoProcessor`, with zero, one or several images per row, and any
`AutoModelForCausalLM` with its tokenizer, without images. A LoRA adapts the language model. Vision tower and projector
stay frozen unless `train_vision_tower` is set. Chosen and rejected share one sequence if that is exact, see `shared_prefix`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from accelerate.utils import send_to_device
from torch import nn

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import Response
from dpo_mm.files.content_key import content_hash
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.adapters import has_lora
from dpo_mm.policies.lora_layers import reference_weights, train_attached, train_in_float32
from dpo_mm.policies.protocol import Batch
from dpo_mm.policies.vlm import generation, model_files, pair_batches
from dpo_mm.policies.vlm.architecture import disable_dropout, lora_targets, non_language_modules
from dpo_mm.policies.vlm.chat import ConversationEncoder
from dpo_mm.policies.vlm.decoding import Decoding
from dpo_mm.policies.vlm.host_values import add_host_values
from dpo_mm.policies.vlm.packed_attention import pack_vision_attention
from dpo_mm.policies.vlm.row_sizes import RowMeasure
from dpo_mm.policies.vlm.shared_prefix import unwrap
from dpo_mm.policies.vlm.token_log_probs import TokenLogProbs, sdpo_gradient_scale
from dpo_mm.policies.vlm.vision_features import features_agree, features_to, join_features, vision_features

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class VisionLanguage:
    """A transformers model that is trained on preferences over responses.

    Args:
        model: a transformers model.
        processor: its processor, or its tokenizer if it takes no images.
        source: folder or hub id of the model.
        corrupt: True also encodes corrupted images, for objectives that need them.

    The other arguments are settings of `TrainConfig` with the same names.
    """

    modality: ClassVar[Literal["text"]] = "text"
    with_encoders: ClassVar[None] = None
    config: TrainConfig

    def __init__(
        self,
        model: Any,
        processor: Any,
        source: str,
        *,
        train_vision_tower: bool = False,
        max_length: int | None = None,
        overlong_rows: str = "raise",
        pair_layout: str = "auto",
        ld_alpha: float = 1.0,
        edited_token_weight: float = 1.0,
        corrupt: bool = False,
    ) -> None:
        if model.device.type != "meta":
            pack_vision_attention(model)
        self.model: Any = model
        self.processor, self.source, self.train_vision_tower = processor, source, train_vision_tower
        self.ld_alpha, self.edited_token_weight = ld_alpha, edited_token_weight
        self.encoder = ConversationEncoder(
            processor,
            model,
            max_length=max_length,
            overlong_rows=overlong_rows,
            corrupt=corrupt,
            mark_edits=edited_token_weight != 1,
        )
        self.token_log_probs = TokenLogProbs(f"{type(model).__name__} ({source})", layout=pair_layout)
        self.generated, self.vision_trains = False, False
        self.untuned: tuple[Any, Any, ConversationEncoder] | None = None
        """The base's model, processor and encoder, if `load_adapter` replaced them."""
        self.features_are_exact: bool | None = None
        """True if vision features can replace pixels. None until the first batch with pixels."""

    @classmethod
    def load(
        cls,
        source: str,
        *,
        revision: str | None = None,
        precision: str = "fp32",
        device: str | None = None,
        quantize: str | None = None,
        **options: Any,
    ) -> Self:
        """Load a transformers model as a policy.

        Args:
            source: a folder or hub id.
            revision: a branch, tag or commit of a hub model.
            precision: fp32, bf16 or fp16.
            device: cpu, cuda or cuda:1. None is the GPU if there is one.
            quantize: nf4, int8 or fp8 for the language model, see `dpo_mm.models.quantization`.
            **options: further arguments of the class, and the limits of `load_processor`.

        Raises:
            ValueError: if the precision is unknown, or the model is missing or not supported.
        """
        if precision not in DTYPES:
            raise ValueError(f"precision {precision!r} is unknown. Expected one of {', '.join(DTYPES)}")
        limits = {name: options.pop(name, None) for name in model_files.PIXEL_LIMITS}
        model, processor = model_files.load(
            source, revision=revision, dtype=DTYPES[precision], device=device, quantize=quantize, limits=limits
        )
        policy = cls(model, processor, source, **options)
        model_files.try_processor(policy)
        return policy

    @property
    def base_model(self) -> Any:
        """The transformers model inside the adapter."""
        return unwrap(self.model)

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        return self.base_model.device

    @property
    def pad_token_id(self) -> int:
        """Token id of padding."""
        tokenizer = self.encoder.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    def prepare(self, config: TrainConfig) -> None:
        """Freeze the model, then add a LoRA or make all weights trainable, except a frozen vision tower.

        Raises:
            ValueError: if `tuning` is unknown, or `lora_targets` match no linear layer.
        """
        self.config = config
        base_model = self.base_model.requires_grad_(False)
        disable_dropout(base_model)
        if config.tuning == "lora":
            self._add_lora(base_model, config)
        elif config.tuning == "full":
            base_model.float().requires_grad_(True)
            for module in () if self.train_vision_tower else non_language_modules(base_model):
                module.requires_grad_(False)
        else:
            raise ValueError(f"tuning {config.tuning!r} is unknown. Expected 'lora' or 'full'")
        # Noted once, because PEFT turns requires_grad off while its adapter is disabled.
        outside = non_language_modules(self.base_model)
        self.vision_trains = any(parameter.requires_grad for module in outside for parameter in module.parameters())
        if config.gradient_checkpointing:
            base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base_model.enable_input_require_grads()

    def _add_lora(self, base_model: Any, config: TrainConfig) -> None:
        from peft import LoraConfig, get_peft_model

        if has_lora(self.model):
            return train_attached(self.model)
        adapter = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            target_modules=lora_targets(base_model, config.lora_targets, train_vision_tower=self.train_vision_tower),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = get_peft_model(base_model, adapter)
        train_in_float32(self.model)

    # Encoding, done once per dataset

    def fingerprint(self) -> str:
        """Return a hash of what determines reference log-probs: `encoding_fingerprint`, the base's weights, token weights."""
        model = self.base_model
        weights = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
        base = {name: tensor for name, tensor in weights.items() if ".lora_" not in name}
        return content_hash([self.encoding_fingerprint(), base, self.ld_alpha, self.edited_token_weight])

    def encoding_fingerprint(self) -> str:
        """Return a hash of what determines token ids: configuration, tokenizer, processor, chat template and limits."""
        model, encoder = self.base_model, self.encoder
        settings = [encoder.max_length, encoder.overlong_rows, encoder.corrupt, encoder.mark_edits]
        return content_hash([type(model).__name__, model.config, self.processor, settings])

    def row_measure(self) -> RowMeasure:
        """Return a function that counts a row's tokens. See `RowMeasure`."""
        return RowMeasure(self.encoder)

    def encode(self, rows: Any) -> list[dict[str, Any]]:
        """Encode rows of the schema `response_preference` as token ids and image tensors.

        Raises:
            ValueError: as `ConversationEncoder.encode_row`.
        """
        return self.encoder.encode(rows)

    def cache_vision_features(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Replace the pixels of encoded rows by the vision tower's features, on the CPU.

        Raises:
            ValueError: if the tower is trained, because its features would become stale, or if the features cannot be
                computed separately.
        """
        if self.vision_trains:
            raise ValueError(
                "cache_vision_features: features cannot be cached, because the vision tower trains (train_vision_tower)"
            )
        return [self._with_features(row) for row in rows]

    def _with_features(self, row: dict[str, Any]) -> dict[str, Any]:
        if "pixel_values" not in row["images"]:
            return row
        if self.features_are_exact is None:
            batch = send_to_device(self.collate([row]), self.device)
            self.features_are_exact = features_agree(self.token_log_probs, self.model, batch)
        if not self.features_are_exact:
            raise ValueError(
                f"{self.source}: cannot compute vision features separately for this model. "
                "Set cache_vision_features: false"
            )
        images = {name: value.to(self.device) for name, value in row["images"].items()}
        without_pixels = {name: value for name, value in row["images"].items() if not name.startswith("pixel_values")}
        features = vision_features(self.base_model, {"images": images})
        return {**row, "images": without_pixels, "features": features_to(features, "cpu")}

    def free_encoders(self) -> None:
        """Do nothing: the vision tower runs in every step unless its features are cached."""

    # Training

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Make a batch from encoded rows.

        Raises:
            ValueError: if only some of the rows with images have cached features.
        """
        batch = pair_batches.collate(rows, self.pad_token_id)
        features = [row["features"] for row in pair_batches.sequences(rows) if "features" in row]
        if features and "pixel_values" in batch["images"]:
            raise ValueError(
                "only some rows of a batch have cached vision features. Cache them for all rows or for none"
            )
        if features:
            batch["features"] = join_features(features)
        add_host_values(self.base_model, batch)
        return batch

    def log_probs(self, model: nn.Module, batch: Batch) -> LogProbs:
        """Compute the sums of the completions' token log-probs. See `Policy.log_probs`.

        The features of a frozen vision tower are added to the batch, so that reference and policy share them.
        """
        return self._sum_per_response(self._token_log_probs(model, batch), batch)

    def log_probs_and_gradient_scale(
        self, model: nn.Module, batch: Batch, *, slack: float
    ) -> tuple[LogProbs, torch.Tensor]:
        """Compute `log_probs` and `sdpo`'s scale of the rejected gradient in one forward pass, (pairs,)."""
        token_log_probs = self._token_log_probs(model, batch)
        scale = sdpo_gradient_scale(batch, token_log_probs.detach(), slack=slack)
        return self._sum_per_response(token_log_probs, batch), scale

    def _token_log_probs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Log-probs of the completions' tokens, (pairs, columns of chosen and rejected)."""
        if self._can_use_features(model, batch):
            batch["features"] = vision_features(unwrap(model), batch)
        return self.token_log_probs(model, batch)

    def _sum_per_response(self, token_log_probs: torch.Tensor, batch: Batch) -> LogProbs:
        """Log-probs of the responses: sums, or weighted by `ld_alpha` or `edited_token_weight`."""
        if not batch["layout"].rejected:
            return pair_batches.response_log_probs(token_log_probs, batch)
        weights = {"ld_alpha": self.ld_alpha, "edited_token_weight": self.edited_token_weight}
        return pair_batches.pair_log_probs(token_log_probs, batch, **weights)

    def _can_use_features(self, model: nn.Module, batch: Batch) -> bool:
        """True if features can replace pixels: the tower is frozen, and they were exact on the first batch."""
        if "features" in batch or "pixel_values" not in batch["images"] or self.vision_trains:
            return False
        if self.features_are_exact is None:
            self.features_are_exact = features_agree(self.token_log_probs, model, batch)
        return self.features_are_exact

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Context manager with the weights from before the first step. Raises ValueError if there is no LoRA."""
        if not hasattr(self.model, "disable_adapter"):
            raise ValueError(
                "reference 'adapter_off' needs a LoRA (tuning: lora). For full fine-tuning use 'frozen_copy'"
            )
        with reference_weights(self.model):
            yield

    def frozen_copy(self) -> nn.Module:
        """Return a copy of the model that is never trained."""
        return copy.deepcopy(self.model).requires_grad_(False).eval()

    # Files

    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write the adapter in PEFT's format, or the whole model with its processor."""
        model_files.save(self, folder, weights)

    def load_weights(self, folder: Path) -> None:
        """Load what `save` wrote into the prepared model. Raises ValueError if it does not fit."""
        model_files.load_weights(self, folder)

    def load_adapter(self, folder: str | Path) -> None:
        """Load a trained adapter or model for generation. Raises ValueError if the folder contains neither."""
        model_files.load_adapter(self, Path(folder))

    @contextlib.contextmanager
    def base_weights(self) -> Iterator[None]:
        """Context manager in which the policy has the model and the processor from before `load_adapter`."""
        if self.untuned is not None:
            tuned = self.model, self.processor, self.encoder
            self.model, self.processor, self.encoder = self.untuned
            try:
                yield
            finally:
                self.model, self.processor, self.encoder = tuned
        elif hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield
        else:
            yield

    def generate(
        self,
        images: Sequence[Sequence[Any]],
        messages: Sequence[Any],
        *,
        max_new_tokens: int,
        do_sample: bool,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
        loop_references: Sequence[str] | None = None,
    ) -> list[Response]:
        """Generate one response per conversation. See `TextPolicy.generate`."""
        limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "loop_references": loop_references}
        return self.generate_each(images, messages, [Decoding(temperature if do_sample else 0.0, seed)], **limits)[0]

    def generate_each(
        self, images: Sequence[Sequence[Any]], messages: Sequence[Any], decodings: Sequence[Decoding], **limits: Any
    ) -> list[list[Response]]:
        """Generate one response per decoding and conversation. See `TextPolicy.generate_each`."""
        return generation.generate(self, images, messages, decodings, **limits)

    # Summary of the run

    def _reduction(self) -> str:
        if self.edited_token_weight != 1:
            return f"mean per token, with weight {self.edited_token_weight:g} for edited tokens (RLHF-V)"
        tail = f", tokens past the shorter response's length count {self.ld_alpha:g} (LD-DPO)"
        return f"sum over the completion's tokens{tail if self.ld_alpha != 1 else ''}"

    def describe(self, config: TrainConfig) -> dict[str, str]:
        """Return family, target, reduction, layout of the pairs, and the effective beta."""
        layout = {"auto": "one sequence per pair if that is exact, checked on the first batch"}
        return {
            "family": f"{type(self.base_model).__name__}, {type(self.processor).__name__}",
            "target": f"token log-probs, {'vision tower and ' if self.train_vision_tower else ''}language model",
            "reduction": self._reduction(),
            "layout": layout.get(self.token_log_probs.layout, self.token_log_probs.layout),
            "effective beta": f"{config.beta} per nat of the whole completion, as in Rafailov et al. 2023",
        }

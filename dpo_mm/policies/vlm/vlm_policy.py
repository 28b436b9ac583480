"""Vision-language models as a policy: the log-prob of a text, images and prompt given.

    log p(y) = sum over the completion's tokens of log p(token | images, prompt, tokens before), nats

Any `AutoModelForImageTextToText` with its `AutoProcessor`, zero, one or many images a row, and any
`AutoModelForCausalLM` with its tokenizer: the case of no image. A LoRA adapts the language model; vision tower and
projector stay frozen unless asked otherwise. Chosen and rejected are one sequence where that is exact, see
`dpo_mm.policies.vlm.shared_prefix`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import Response
from dpo_mm.model_loading import load_module
from dpo_mm.objectives import LogProbs, segment_mean, shared_length
from dpo_mm.policies.adapters import refuse_pickle
from dpo_mm.policies.protocol import Batch
from dpo_mm.policies.vlm import chat, generation
from dpo_mm.policies.vlm.architecture import classes_of, lora_targets, outside_language, without_dropout
from dpo_mm.policies.vlm.chat import ConversationEncoder
from dpo_mm.policies.vlm.shared_prefix import unwrap
from dpo_mm.policies.vlm.token_log_probs import (
    TokenLogProbs,
    features_agree,
    features_to,
    join_features,
    sdpo_gradient_scale,
    vision_features,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTER_FILE = "adapter_config.json"


class VisionLanguage:
    """A stock transformers model that preferences over texts act on.

    Options as `TrainConfig` has them; corrupt: rows carry corrupted images too, for objectives that ask about them.
    """

    modality: ClassVar[Literal["text"]] = "text"
    config: TrainConfig

    def __init__(
        self,
        core: Any,
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
        self.model: Any = core
        self.processor, self.source, self.train_vision_tower = processor, source, train_vision_tower
        self.ld_alpha, self.edited_token_weight = ld_alpha, edited_token_weight
        marks = edited_token_weight != 1
        self.rows = ConversationEncoder(
            processor, core, max_length=max_length, overlong_rows=overlong_rows, corrupt=corrupt, mark_edits=marks
        )
        self.scorer = TokenLogProbs(f"{type(core).__name__} ({source})", layout=pair_layout)
        self.base: Any = None
        self.features_apart: bool | None = None

    @classmethod
    def load(
        cls,
        source: str,
        *,
        revision: str | None = None,
        precision: str = "fp32",
        device: str | None = None,
        **options: Any,
    ) -> Self:
        """The policy of a model's folder or hub id; options as the class takes them.

        Raises ValueError for an unknown precision, a model that isn't there, or one of a kind that isn't handled.
        """
        if precision not in DTYPES:
            raise ValueError(f"precision {precision!r} is unknown; expected one of {', '.join(DTYPES)}")
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(source, revision=revision)
        except (OSError, ValueError) as error:
            raise ValueError(f"model {source!r} can't be opened: {' '.join(str(error).split())[:300]}") from error
        model_class, processor_class = classes_of(config, source)
        core = load_module(model_class, source, revision=revision, dtype=DTYPES[precision])
        core.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        return cls(core, processor_class.from_pretrained(source, revision=revision), source, **options)

    @property
    def base_model(self) -> Any:
        """The transformers model, without adapter."""
        return unwrap(self.model)

    @property
    def device(self) -> torch.device:
        return self.base_model.device

    @property
    def pad(self) -> int:
        tokenizer = self.rows.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    def prepare(self, config: TrainConfig) -> None:
        """Make the model ready to train as the config says: a LoRA, or whole; vision as `train_vision_tower` says.

        Raises ValueError for another tuning.
        """
        self.config = config
        core = self.base_model.requires_grad_(False)
        without_dropout(core)
        if config.tuning == "lora":
            self._add_lora(core, config)
        elif config.tuning == "full":
            core.float().requires_grad_(True)
            for module in () if self.train_vision_tower else outside_language(core):
                module.requires_grad_(False)
        else:
            raise ValueError(f"tuning {config.tuning!r} is unknown; expected 'lora' or 'full'")
        if config.gradient_checkpointing:
            core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            core.enable_input_require_grads()

    def _add_lora(self, core: Any, config: TrainConfig) -> None:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules=lora_targets(core, config.lora_targets, train_vision_tower=self.train_vision_tower),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = get_peft_model(core, adapter)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    # Frozen work, done once

    def fingerprint(self) -> str:
        """Hash what decides a row's encoding and its reference: weights without a LoRA, processor, template, lengths."""
        digest = hashlib.sha256(
            f"{type(self.base_model).__name__} {self.base_model.dtype} {self.rows.max_length}".encode()
        )
        digest.update(f"{self.processor} {self.processor.chat_template} {self.rows.overlong_rows}".encode())
        weights = {name.replace(".base_layer.", "."): tensor for name, tensor in self.base_model.state_dict().items()}
        for name, tensor in sorted((name, tensor) for name, tensor in weights.items() if ".lora_" not in name):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def encode(self, rows: Any) -> list[dict[str, Any]]:
        """Rows of `response_preference` as ids and image tensors. Raises ValueError as `Conversations.encode_row`."""
        return self.rows.encode(rows)

    def cache_vision_features(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Encoded rows with the vision tower's features in place of pixels, on the CPU.

        Raises ValueError where the tower trains: its features would go stale.
        """
        if self._vision_trains():
            raise ValueError("vision features can't be kept: the vision tower trains (train_vision_tower)")
        return [self._with_features(row) for row in rows]

    def _with_features(self, row: dict[str, Any]) -> dict[str, Any]:
        if "pixel_values" not in row["images"]:
            return row
        if self.features_apart is None:
            batch = self.collate([row])
            moved = {name: value.to(self.device) for name, value in batch["images"].items()}
            ids = {name: batch[name].to(self.device) for name in ("ids", "mask")}
            types = {name: value.to(self.device) for name, value in batch["types"].items()}
            self.features_apart = features_agree(
                self.scorer, self.model, {**batch, **ids, "types": types, "images": moved}
            )
        if not self.features_apart:
            raise ValueError(f"{self.source}: its vision features can't be taken apart from the model; keep none")
        images = {name: value.to(self.device) for name, value in row["images"].items()}
        kept = {name: value for name, value in row["images"].items() if name != "pixel_values"}
        features = vision_features(self.base_model, {"images": images})
        return {**row, "images": kept, "features": features_to(features, "cpu")}

    def _vision_trains(self) -> bool:
        outside = outside_language(self.base_model)
        return any(parameter.requires_grad for module in outside for parameter in module.parameters())

    def free_encoders(self) -> None:
        """Nothing leaves memory: the vision tower answers in every step unless its features are kept."""

    # Training

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """One batch from encoded rows. Raises ValueError where only some rows with images have their features kept."""
        batch = chat.collate(rows, self.pad)
        features = [row["features"] for row in rows if "features" in row]
        if features and "pixel_values" in batch["images"]:
            raise ValueError("some rows of a batch have their vision features kept and some don't; keep all or none")
        if features:
            batch["features"] = join_features(features)
        return batch

    def log_probs(self, model: nn.Module, batch: Batch) -> LogProbs:
        """Return the sums of the completions' token log-probs, (pairs,) each, float32.

        The features of a frozen vision tower are left in the batch, so that reference and policy share them.
        """
        return self._summed(self._token_log_probs(model, batch), batch)

    def log_probs_and_gradient_scale(
        self, model: nn.Module, batch: Batch, *, slack: float
    ) -> tuple[LogProbs, torch.Tensor]:
        """Return `log_probs` and `sdpo`'s scale of the rejected gradient, (pairs,), from the same forward."""
        scores = self._token_log_probs(model, batch)
        return self._summed(scores, batch), sdpo_gradient_scale(batch, scores.detach(), slack=slack)

    def _token_log_probs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Log-probs of the completions' tokens, (pairs, columns of chosen and rejected)."""
        if self._shares_features(model, batch):
            batch["features"] = vision_features(unwrap(model), batch)
        return self.scorer(model, batch)

    def _summed(self, scores: torch.Tensor, batch: Batch) -> LogProbs:
        """Token log-probs as those of the answers: sums, or as `ld_alpha` or `edited_token_weight` say."""
        layout = batch["layout"]
        masks = batch["mask"][:, layout.prompt :].to(scores.device).split([layout.chosen, layout.rejected], 1)
        parts = scores.split([layout.chosen, layout.rejected], 1)
        num_tokens_chosen, num_tokens_rejected = (
            batch[f"num_tokens_{side}"].to(scores.device) for side in ("chosen", "rejected")
        )
        if self.edited_token_weight != 1:
            edited = [batch[f"{side}_edited"].to(scores.device) for side in ("chosen", "rejected")]
            chosen, rejected = (
                segment_mean(*of, edited_token_weight=self.edited_token_weight)
                for of in zip(parts, masks, edited, strict=True)
            )
            num_tokens_chosen, num_tokens_rejected = torch.ones_like(chosen), torch.ones_like(rejected)
        elif self.ld_alpha != 1:
            chosen, rejected = shared_length(*parts, *masks, ld_alpha=self.ld_alpha)
        else:
            chosen, rejected = (part.sum(1) for part in parts)
        return LogProbs(chosen, rejected, num_tokens_chosen, num_tokens_rejected, is_likelihood=True)

    def _shares_features(self, model: nn.Module, batch: Batch) -> bool:
        """Whether features of this batch stand for its pixels: the tower is frozen, and they gave the same once."""
        if "features" in batch or "pixel_values" not in batch["images"] or self._vision_trains():
            return False
        if self.features_apart is None:
            self.features_apart = features_agree(self.scorer, model, batch)
        return self.features_apart

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        if not hasattr(self.model, "disable_adapter"):
            raise ValueError(
                "reference 'adapter_off' needs a LoRA (tuning: lora); full fine-tuning takes 'frozen_copy'"
            )
        tuner = self.model.base_model  # PEFT's own context manager lists all layers each time, 10 ms and more
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable_adapter_layers()

    def frozen_copy(self) -> nn.Module:
        return copy.deepcopy(self.model).requires_grad_(False).eval()

    # Files

    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """The adapter in PEFT's own format, or the whole model with its processor."""
        if hasattr(self.model, "disable_adapter"):
            self.model.active_peft_config.base_model_name_or_path = self.config.model
            self.model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
        else:
            self.model.save_pretrained(folder, state_dict=weights)
            self.processor.save_pretrained(folder)

    def load_weights(self, folder: Path) -> None:
        """Read what `save` wrote into the model as `prepare` set it up. Raises ValueError where it does not fit."""
        if hasattr(self.model, "disable_adapter"):
            refuse_pickle(folder)
            from peft import load_peft_weights, set_peft_model_state_dict

            weights = load_peft_weights(str(folder), device="cpu")
            result: Any = set_peft_model_state_dict(self.model, weights)
            missing = [name for name in result.missing_keys if "lora_" in name]
            if result.unexpected_keys or missing:
                raise ValueError(f"{folder}: {(result.unexpected_keys + missing)[0]} does not fit this model's LoRA")
        else:
            stored = load_module(type(self.model), str(folder))
            self.model.load_state_dict(stored.state_dict())

    def load_adapter(self, folder: str | Path) -> None:
        """Load a tuned adapter or model with the stock library, to answer. Raises ValueError where there is none."""
        folder = Path(folder)
        if (folder / ADAPTER_FILE).exists():
            refuse_pickle(folder)
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.base_model, str(folder)).eval()
        elif (folder / "config.json").exists():
            self.base = self.base_model
            tuned = load_module(type(self.base), str(folder), dtype=self.base.dtype)
            self.model = tuned.to(self.base.device).eval()
        else:
            raise ValueError(f"adapter {str(folder)!r}: neither {ADAPTER_FILE} nor config.json there")

    # Answering

    @contextlib.contextmanager
    def base_weights(self) -> Iterator[None]:
        """Within it the policy answers as it did before `load_adapter`."""
        if self.base is not None:
            tuned, self.model = self.model, self.base
            try:
                yield
            finally:
                self.model = tuned
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
    ) -> list[Response]:
        """Generate one response per conversation. See `TextPolicy.generate`."""
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}
        limits = {"do_sample": do_sample, **sampling, "max_new_tokens": max_new_tokens}
        return generation.generate(self, images, messages, limits=limits, seed=seed, batch_size=batch_size)

    # What the run says of itself

    def _reduction(self) -> str:
        if self.edited_token_weight != 1:
            return f"mean a token, edited ones {self.edited_token_weight:g} times (RLHF-V)"
        tail = f", past the shorter answer's length {self.ld_alpha:g} of it (LD-DPO)" * (self.ld_alpha != 1)
        return f"sum over the completion's tokens{tail}"

    def describe(self, config: TrainConfig) -> dict[str, str]:
        """Family, what trains, how pairs are laid out and what beta means."""
        layout = {"auto": "one sequence a pair where that is exact, checked on the first batch"}
        return {
            "family": f"{type(self.base_model).__name__}, {type(self.processor).__name__}",
            "target": f"token log-probs, {'vision tower and ' if self.train_vision_tower else ''}language model",
            "reduction": self._reduction(),
            "layout": layout.get(self.scorer.layout, self.scorer.layout),
            "effective beta": f"{config.beta} a nat of the whole completion, as in Rafailov et al. 2023",
        }

"""Image inputs of a vision-language model: pixels, or features that the frozen vision tower computed before."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dpo_mm.policies.vlm.layout_check import is_sharded, relative_difference, unwrapped_eval_mode
from dpo_mm.policies.vlm.packed_attention import remember_sequences
from dpo_mm.policies.vlm.pair_batches import join_images
from dpo_mm.policies.vlm.shared_prefix import unwrap

if TYPE_CHECKING:
    from dpo_mm.policies.vlm.token_log_probs import TokenLogProbs

logger = logging.getLogger(__name__)


class ImageFeatures(BaseModelOutputWithPooling):
    """Output of a vision tower. What was not stored is None, such as the logits of a router (Granite Docling)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def image_inputs(base_model: Any, batch: dict[str, Any], *, repeated: bool = False) -> dict[str, Any]:
    """Build the model inputs of a batch's images: pixels, or features that were computed before.

    Args:
        base_model: a transformers model without wrappers.
        batch: from `pair_batches.collate`.
        repeated: True repeats them, for separate sequences of chosen and rejected.
    """
    images = {k: v.to(base_model.dtype) if v.is_floating_point() else v for k, v in batch["images"].items()}
    images = join_images([images, images]) if repeated else images
    features = batch.get("features")
    if features is None:
        return images
    output = ImageFeatures()
    for name, value in (join_features([features, features]) if repeated else features).items():
        output[name] = value
    return {
        **{k: v for k, v in images.items() if not k.startswith("pixel_values")},
        "mm_encoder_outputs": {"image": output},
    }


def features_agree(token_log_probs: TokenLogProbs, model: nn.Module, batch: dict[str, Any]) -> bool:
    """Return True if the model computes the same log-probs from vision features as from pixels.

    Args:
        token_log_probs: computes the log-probs of the model.
        model: the model, possibly wrapped. The result is False for sharded weights.
        batch: from `pair_batches.collate`, with pixels, on the model's device.
    """
    base_model = unwrap(model)
    if is_sharded(base_model):
        return False
    if not token_log_probs.checked:
        token_log_probs.check(model, batch)  # of the layout, so that both sides below have the same one
    with unwrapped_eval_mode(model) as model:
        try:
            from_features = token_log_probs(model, {**batch, "features": vision_features(base_model, batch)})
            difference = relative_difference(from_features, token_log_probs(model, batch))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any error of a model is a reason, because pixels always work
            logger.warning(
                "%s: the vision tower runs twice per step, because it fails alone (%s)", token_log_probs.name, error
            )
            return False
    agrees = difference <= token_log_probs.limit
    if not agrees:
        logger.warning(
            "%s: the vision tower runs twice per step, because its features alone change log-probs by %.1e (allowed %.1e)",
            token_log_probs.name,
            difference,
            token_log_probs.limit,
        )
    return agrees


@torch.no_grad()
def vision_features(base_model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Compute a batch's image features with the vision tower and the projector, without gradient."""
    inputs = image_inputs(base_model, {"images": batch["images"]})
    if "tower" in batch:
        inputs |= _tower_inputs(batch["tower"])
    output = base_model.get_image_features(**inputs, return_dict=True)
    return {name: output[name] for name in ("pooler_output", "deepstack_features") if output.get(name) is not None}


def _tower_inputs(tower: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `get_image_features` that spare the tower from reading the sizes of images on the device."""
    arguments = tower["arguments"]
    for name, fields in tower["sequences"].items():
        remember_sequences(arguments[name], fields)
    sizes = torch.tensor(tower["sizes"])  # on the host, where the model reads the number of features of each image
    return {"image_grid_thw": sizes, **{f"image_{name}": value for name, value in arguments.items()}}


def features_to(features: Any, device: str) -> Any:
    """Move features to another device."""
    if isinstance(features, Tensor):
        return features.to(device)
    if isinstance(features, dict):
        return {name: features_to(value, device) for name, value in features.items()}
    return [features_to(value, device) for value in features]


def join_features(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate the image features of rows, in each layer of a deep stack."""
    return {name: _join([row[name] for row in rows], deep=name == "deepstack_features") for name in rows[0]}


def _join(values: Sequence[Any], *, deep: bool) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    if deep:
        return [_join(layers, deep=False) for layers in zip(*values, strict=True)]
    return [image for value in values for image in value]

"""Vision-language models without weights, on the meta device, to count what a run needs."""

from __future__ import annotations

from typing import Any

from dpo_mm.models.meta_device import meta_device
from dpo_mm.models.model_loading import load_part
from dpo_mm.policies.diffusion.meta_pipeline import fill_small_buffers
from dpo_mm.policies.vlm.architecture import auto_classes_for
from dpo_mm.policies.vlm.model_files import load_processor
from dpo_mm.policies.vlm.vlm_policy import DTYPES, VisionLanguage


def load_vlm_on_meta_device(source: str, *, revision: str | None, precision: str, **options: Any) -> VisionLanguage:
    """Build the policy of a transformers model from its config file.

    Args:
        source: a folder or hub id.
        revision: a branch, tag or commit of a hub model.
        precision: fp32, bf16 or fp16.
        **options: further arguments of `VisionLanguage`.

    Raises:
        ValueError: if the model is missing or not supported.
    """
    from transformers import AutoConfig

    config = load_part(AutoConfig, source, name=f"model {source!r}", revision=revision)
    model_class, processor_class = auto_classes_for(config, source)
    with meta_device():
        model = model_class.from_config(config, dtype=DTYPES[precision]).eval()
    model.tie_weights()
    processor = load_processor(processor_class, source, revision=revision)
    return without_checks(VisionLanguage(fill_small_buffers(model), processor, source, **options))


def without_checks(policy: VisionLanguage) -> VisionLanguage:
    """Set what the first batch decides: separate sequences, which take most memory, and vision features of a frozen tower."""
    policy.token_log_probs.checked, policy.features_are_exact = True, True
    if policy.token_log_probs.layout == "auto":
        policy.token_log_probs.layout = "separate"
    return policy

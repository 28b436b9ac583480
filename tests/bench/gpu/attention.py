"""The shared prefix per attention backend and precision: leak from chosen to rejected, difference, and the noise of repeating."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpo_mm.policies.vlm.layout_check import unwrapped_eval_mode
from dpo_mm.policies.vlm.token_log_probs import separate_log_probs, shared_prefix_log_probs
from dpo_mm.policies.vlm.vlm_policy import DTYPES
from tests.bench.gpu.cells import Cells
from tests.bench.gpu.figures import count_kernels, exact_float32
from tests.bench.gpu.models import vlm, vlm_policy, vlm_rows

BACKENDS: dict[str, Any] = {
    "math": SDPBackend.MATH,
    "efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "default": None,
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH],
}
"""With math, which takes what a backend refuses, such as masks. cuDNN comes last, because its errors can break the process."""


def leak_by_backend(cells: Cells) -> None:
    """Nats per response, (pairs,): chosen first, then rejected."""
    settings = cells.settings
    size = "tiny" if cells.tiny else settings["size"]
    model, processor = vlm(size, "fp32", cells.device)
    model.to(torch.bfloat16).to(torch.float32)  # so that half precision has the same weights
    policy = vlm_policy((model, processor), "shared_prefix")
    rows = vlm_rows(settings)
    others = [{**row, "chosen": " ".join(reversed(row["chosen"].split()[:-1])) + " </s>"} for row in rows]
    batch, other = (send_to_device(policy.collate(policy.encode(each)), cells.device) for each in (rows, others))
    split = batch["layout"].chosen
    exact: list[Tensor] = []

    def compare(backend: Any) -> dict[str, Any]:
        chosen_kernel = sdpa_kernel(backend) if backend is not None else contextlib.nullcontext()
        with chosen_kernel, exact_float32(), unwrapped_eval_mode(model) as plain:
            log_probs = lambda function, rows: function(plain, dict(rows)).float()
            separate, separate_again = (log_probs(separate_log_probs, batch) for _ in range(2))
            shared, again = (log_probs(shared_prefix_log_probs, batch) for _ in range(2))
            moved: list[Tensor] = []
            kernels = count_kernels(lambda: moved.append(log_probs(shared_prefix_log_probs, other)), cells.device)
        exact[:] = exact or [separate]
        sides = lambda values: [values[:, :split].sum(1).tolist(), values[:, split:].sum(1).tolist()]
        return {
            "leak": (shared - moved[0])[:, split:].sum(1).tolist(),
            "chosen_moved": (shared - moved[0])[:, :split].sum(1).tolist(),
            "attention_kernels": kernels["attention_kernels"],
            "shared_minus_separate": sides(shared - separate),
            "separate_minus_float32": sides(separate - exact[0]),
            "shared_minus_float32": sides(shared - exact[0]),
            "repeat_separate": float((separate - separate_again).abs().max()),
            "repeat_shared": float((shared - again).abs().max()),
            "log_probs": sides(separate),
        }

    for precision in settings["precisions"]:
        model.to(DTYPES[precision])
        for name in settings["backends"]:
            cells.measure(f"{precision}, {name}", lambda name=name: compare(BACKENDS[name]))

"""The policy interface is typed: no function takes a policy as Any, and both implementations have every member."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy
from dpo_mm.policies.protocol import ImagePolicy, Policy, TextPolicy
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage

PACKAGE = Path(__file__).parents[2] / "dpo_mm"
UNTYPED: set[str] = set()
"""Functions that take `policy: Any`, as file:line-free signatures. At most three, each with a reason next to it."""


def members(protocol: type) -> set[str]:
    return {
        name for cls in protocol.__mro__ if "Policy" in cls.__name__ for name in vars(cls) if not name.startswith("_")
    }


def test_no_function_takes_a_policy_as_any() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    found = {
        f"{path.name}: {line.strip()}"
        for path in files
        for line in path.read_text().splitlines()
        if re.search(r"\bpolicy: Any\b", line)
    }
    assert found == UNTYPED and len(UNTYPED) <= 3


def test_implementations_have_every_member_of_their_protocol() -> None:
    assert members(Policy) < members(ImagePolicy) and members(Policy) < members(TextPolicy)
    assert {"log_probs", "log_probs_and_gradient_scale", "prepare", "fingerprint", "save"} <= members(Policy)
    assert {"encode_images", "sample"} <= members(ImagePolicy) - members(TextPolicy)
    assert {"encode", "generate"} <= members(TextPolicy) - members(ImagePolicy)
    for protocol, cls in ((ImagePolicy, DiffusionPolicy), (TextPolicy, VisionLanguage)):
        source = inspect.getsource(cls)
        assert not {name for name in members(protocol) if not hasattr(cls, name) and f"self.{name}" not in source}

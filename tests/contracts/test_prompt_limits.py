"""What a family's text encoders do not read is reported, for each family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo_mm.policies.diffusion.prompt_limits import truncated_prompts
from dpo_mm.policies.families import load_policy
from tests.contracts.families import BUILDERS, WORDS


@pytest.mark.parametrize(
    "family", sorted(set(BUILDERS) - {"qwen-image-2.1", "qwen-image-edit"})
)  # they truncate nothing
def test_a_prompt_whose_end_changes_no_encoding_is_reported_as_truncated(family: str, tmp_path: Path) -> None:
    policy = load_policy(str(BUILDERS[family].build(tmp_path)), resolution=BUILDERS[family].size)
    long = f"{WORDS[1]} " * 200
    ends = [policy.encode_prompts([long + end]) for end in WORDS[::2]]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert truncated_prompts(policy, [WORDS[0], long, long]).startswith("1 of 2 have more than ")
    assert truncated_prompts(policy, WORDS[:1]) == ""


def test_the_longest_prompt_that_clip_reads_is_not_reported(tmp_path: Path) -> None:
    """CLIP's two end tokens count: the tiny models have 16 positions, so 14 tokens of text fit and 15 do not."""
    policy = load_policy(
        str(BUILDERS["stable-diffusion"].build(tmp_path)), resolution=BUILDERS["stable-diffusion"].size
    )
    assert truncated_prompts(policy, ["a " * 14]) == ""
    assert (
        truncated_prompts(policy, ["a " * 15])
        == "1 of 1 have more than 16 tokens (up to 17), of which CLIPTokenizer passes on the first 16"
    )

"""Tests of the smallest and largest number of pixels of an image in a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import load_responses, make_response_rows
from dpo_mm.policies.families import load_text_policy
from dpo_mm.training.builders import build_policy
from tests.contracts.tiny_vlms import save

SIZE = (224, 168)


def test_limits_change_the_image_tokens_in_training_and_generation(tmp_path: Path) -> None:
    model = save("qwen2_5_vl", tmp_path / "model")
    row = {
        "id": "0",
        "prompt": "what is this",
        "chosen": "a red",
        "rejected": "a dot",
        "images": [Image.new("RGB", SIZE)],
    }
    make_response_rows([row]).to_parquet(tmp_path / "pairs.parquet")
    rows = load_responses(str(tmp_path / "pairs.parquet"))
    settings: dict[str, Any] = {"beta": 0.1}
    tokens, keys = {}, set()
    for name, limits in {"own": {}, "smaller": {"max_pixels": 112 * 84}, "larger": {"min_pixels": 448 * 336}}.items():
        values: dict[str, Any] = {**settings, **limits}
        policy: Any = build_policy(TrainConfig(model, "pairs", "out", **values))
        (encoded,) = policy.encode(rows)
        tokens[name] = int((encoded["prompt_ids"] == policy.base_model.config.image_token_id).sum())
        response = max(len(encoded["chosen_ids"]), len(encoded["rejected_ids"]))
        assert policy.row_measure()(rows[0]).tokens == len(encoded["prompt_ids"]) + response
        keys.add(policy.encoding_fingerprint())
    assert tokens == {"own": 48, "smaller": 12, "larger": 192} and len(keys) == 3


@pytest.mark.parametrize(("family", "limit"), [("smolvlm", "max_pixels"), ("llama", "min_pixels")])
def test_limit_without_effect_is_refused(family: str, limit: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "model")
    with pytest.raises(ValueError, match=f"{limit} has no effect: model .* resizes images by its own rule"):
        load_text_policy(model, **{limit: 3136})

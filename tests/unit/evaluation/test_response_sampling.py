"""Tests of the responses that a comparison generates and saves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dpo_mm.config import CompareResponsesConfig
from dpo_mm.data.lazy_images import LazyImages
from dpo_mm.data.questions import Question
from dpo_mm.data.schema import Response
from dpo_mm.evaluation import response_sampling
from dpo_mm.files.json_lines import read_lines


def test_each_image_is_read_once_for_the_keys_of_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering a page takes as long as responding to it."""
    reads: list[int] = []

    def page(number: int) -> Image.Image:
        reads.append(number)
        return Image.new("RGB", (8, 8), (number, 0, 0))

    questions = [Question(f"q{n}", LazyImages([partial(page, n)]), f"prompt {n}", "truth", "scenes") for n in range(20)]
    config = CompareResponsesConfig("m", "q", "out", judges=["degeneration"], batch_size=10)
    policy = SimpleNamespace(generate=lambda images, prompts, **settings: [Response("yes", 1, False) for _ in prompts])
    monkeypatch.setattr(response_sampling, "generation_settings", lambda policy, config, *, base: settings)
    names = ("max_new_tokens", "temperature", "seed", "dtype", "device", "libraries", "weights", "generation")
    settings = dict.fromkeys(names, "same")
    for _ in range(2):
        scored = response_sampling.generate_responses(
            policy,
            questions,
            config,
            base=False,
            title="tuned",
            output_dir=tmp_path,  # type: ignore[arg-type]
        )
        assert len(scored.responses) == 20
    assert sorted(reads) == sorted(list(range(20)) * 2)
    keys = [row["key"] for row in read_lines(tmp_path / response_sampling.RESPONSES_FILE)]
    assert len(set(keys)) == 20

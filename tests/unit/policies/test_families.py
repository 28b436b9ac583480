"""A model is found by its index file, in a folder, in the hub's cache or on the hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from dpo_mm.policies.families import VLM_POLICY, policy_path_for


def test_model_that_is_not_cached_is_named_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached: dict[str, str] = {}

    def offline(model: str, file: str, *, revision: str | None) -> str:
        if file in cached:
            return cached[file]
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        ValueError, match="'owner/name' is neither a folder nor reachable on the hub, and it is not in the"
    ):
        policy_path_for("owner/name")
    cached["config.json"] = str(tmp_path / "config.json")
    assert policy_path_for("owner/name") == VLM_POLICY  # its missing model_index.json is not an error

"""From an empty folder to thirty labels, an adapter trained on them, and a page that compares it with its base."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dpo_mm.labels.pairs import open_pairs
from dpo_mm.labels.store import VoteStore
from tests import forked
from tests.demos.test_label_page import begin, press

pytestmark = pytest.mark.slow

NUM_LABELS, BY_KEY = 30, 6
"""Number of labels, and how many of them are given in the browser. tests/demos/test_label_page.py gives thirty."""
SHORT = ("--steps", "4", "--warmup-steps", "1")


def test_thirty_labels_train_an_adapter_that_the_page_compares(
    serve: Callable[..., Any],
    page: Any,
    tmp_path: Path,
) -> None:
    rows = open_pairs("shapes-faithfulness")
    preferences = dict(zip(rows["id"], rows["preference"], strict=True))
    server = serve("label", "--votes", "labels.sqlite")
    store = VoteStore(tmp_path / "labels.sqlite", rows["id"], source="shapes-faithfulness")

    def next_label() -> tuple[int, bool]:
        """Return the presentation that is open, and True if the ground truth prefers its left image."""
        shown = store.next_pair("Ada")
        assert shown is not None
        return shown.id, preferences[shown.pair] == "ab"[shown.swapped]

    while len({vote.pair for vote in store.votes()}) < NUM_LABELS - BY_KEY:
        presentation, left = next_label()
        store.cast("Ada", presentation, "left" if left else "right")
    begin(page, server.address, "Ada")
    while len({vote.pair for vote in store.votes()}) < NUM_LABELS:
        press(page, "ArrowLeft" if next_label()[1] else "ArrowRight")
    page.get_by_text("From votes to a trained adapter").click()
    shell_commands = page.locator("#command").inner_text().strip()
    server.kill()

    assert shell_commands.startswith("dpo-mm label export labels.sqlite") and "&& dpo-mm train" in shell_commands
    listing = "dpo-mm() { printf '%s\\0' \"$@\"; echo; }\n" + shell_commands
    lines = subprocess.run(["bash", "-c", listing], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (export, train) = (line.split("\0")[:-1] for line in lines.splitlines())
    subprocess.run([sys.executable, "-m", "dpo_mm", *export], cwd=tmp_path, check=True)
    forked.run(*train, *SHORT, cwd=tmp_path, check=True)
    exported = pd.read_parquet(tmp_path / "labels.parquet")
    assert len(exported) == NUM_LABELS and all(preferences[row.id] == row.preference for row in exported.itertuples())
    assert (tmp_path / "runs" / "labelled" / "pytorch_lora_weights.safetensors").exists()

    side_by_side = serve("images", "--adapter", "runs/labelled", "--judges", "faithfulness")
    page.goto(side_by_side.address)
    page.locator("#both img").nth(1).wait_for()
    sources = [page.locator("#both img").nth(n).get_attribute("src") for n in range(2)]
    assert sources[0] != sources[1]

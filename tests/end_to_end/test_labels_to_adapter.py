"""From an empty folder to thirty labels, an adapter trained on them, and a page that compares it with its base."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dpo_mm.labels.pairs import open_pairs
from dpo_mm.labels.store import VoteStore
from tests.demos.test_label_page import begin, press

pytestmark = pytest.mark.slow

NUM_LABELS = 30


def test_thirty_labels_train_an_adapter_that_the_page_compares(
    serve: Callable[..., Any],
    page: Any,
    tmp_path: Path,
) -> None:
    rows = open_pairs("shapes-faithfulness")
    preferences = dict(zip(rows["id"], rows["preference"], strict=True))
    server = serve("label", "--votes", "labels.sqlite")
    begin(page, server.address, "Ada")
    store = VoteStore(tmp_path / "labels.sqlite", rows["id"], source="shapes-faithfulness")
    while len({vote.pair for vote in store.votes()}) < NUM_LABELS:
        shown = store.next_pair("Ada")
        assert shown is not None
        left = preferences[shown.pair] == "ab"[shown.swapped]
        press(page, "ArrowLeft" if left else "ArrowRight")
    page.get_by_text("From votes to a trained adapter").click()
    shell_commands = page.locator("#command").inner_text().strip()
    server.kill()

    assert shell_commands.startswith("dpo-mm label export labels.sqlite") and "&& dpo-mm train" in shell_commands
    command = shell_commands.replace("dpo-mm ", f"{shlex.quote(sys.executable)} -m dpo_mm ")
    short = " --steps 4 --warmup-steps 1"
    done = subprocess.run(["bash", "-c", command + short], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported = pd.read_parquet(tmp_path / "labels.parquet")
    assert len(exported) == NUM_LABELS and all(preferences[row.id] == row.preference for row in exported.itertuples())
    assert (tmp_path / "runs" / "labelled" / "pytorch_lora_weights.safetensors").exists()

    side_by_side = serve("images", "--adapter", "runs/labelled", "--judges", "faithfulness")
    page.goto(side_by_side.address)
    page.wait_for_function("() => /6 of 6/.test(document.querySelector('#status')?.innerText ?? '')")
    sources = [page.locator("#both img").nth(n).get_attribute("src") for n in range(2)]
    assert sources[0] != sources[1]

"""Two stages end to end: a set is imported, fine-tuned on, and preferred from the result, for images and for text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import make_response_rows
from dpo_mm.sources.importing import import_set
from dpo_mm.training.run import TrainResult, train
from tests.conftest import rows
from tests.contracts.tiny_vlms import VOCABULARY, noise_image, save

pytestmark = pytest.mark.slow


def run(model: str, pairs: Path, folder: Path, objective: str, **more: Any) -> TrainResult:
    given = {"steps": 12, "batch_size": 4, "log_every": 1, "learning_rate": 1e-2, "eval_fraction": 0.0, **more}
    return train(TrainConfig(model=model, pairs=str(pairs), output_dir=str(folder), objective=objective, **given))


def check_stages(model: str, chosen: Path, pairs: Path, folder: Path, *, beta: float) -> None:
    """Stage one lowers the loss, of other prompts too if they are similar, and continues from an adapter.

    Stage two starts where stage one ended: at ln 2, with chosen sides more likely than under the base.
    """
    first = run(model, chosen, folder / "sft", "sft", eval_fraction=0.34, eval_every=6)
    losses = [entry["loss"] for entry in first.history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3]) and sum("eval_loss" in entry for entry in first.history) == 2
    again = run(model, chosen, folder / "again", "sft", adapter=str(folder / "sft"), steps=2)
    assert again.history[0]["loss"] < losses[0]
    base = run(model, pairs, folder / "base", "sigmoid", beta=beta, steps=1).history[0]
    card = (folder / "sft" / "README.md").read_text()
    assert "fine-tuned on chosen examples" in card and "preference-optimization" not in card
    second = run(model, pairs, folder / "dpo", "sigmoid", beta=beta, steps=2, adapter=str(folder / "sft"))
    start = second.history[0]
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-5) and start["rewards/margins"] == pytest.approx(
        0, abs=1e-4
    )
    assert start["logps/chosen"] > base["logps/chosen"]
    assert second.settings["reference"] == "adapter_off, which is the adapter"


def test_captioned_images_then_pairs(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for row in rows(12):
        (folder / f"{row['id']}.png").write_bytes(row[f"image_{row['preference']}"]["bytes"])  # type: ignore[index]
        (folder / f"{row['id']}.txt").write_text(str(row["prompt"]))
    import_set("captioned-images", str(folder), str(tmp_path / "set"))
    check_stages(tiny_model, tmp_path / "set", Path(pairs), tmp_path, beta=2000.0)


def test_chats_then_pairs(tmp_path: Path) -> None:
    model, folder = save("llava", tmp_path / "model"), tmp_path / "chats"
    folder.mkdir()
    chats, pairs = [], []
    for n in range(8):
        (folder / f"{n}.png").write_bytes(encode_png(noise_image(n)))
        question, answer = f"describe the picture {n}", " ".join(VOCABULARY[: 4 + n])
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        chats.append({"messages": turns, "images": [f"{n}.png"]})
        pairs.append({"images": [noise_image(n)], "prompt": question, "chosen": answer, "rejected": "no text"})
    (folder / "train.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    make_response_rows(pairs).to_parquet(str(tmp_path / "pairs.parquet"))
    import_set("chat", str(folder), str(tmp_path / "set"))
    check_stages(model, tmp_path / "set", tmp_path / "pairs.parquet", tmp_path, beta=0.1)

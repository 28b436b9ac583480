"""Judges that built the training pairs, from the dataset or the card, and the choice of the primary metric."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import make_response_rows
from dpo_mm.judges import JUDGES
from dpo_mm.judges.provenance import is_rule_based, order_judges, training_judges_of, training_judges_of_adapter
from dpo_mm.training.model_card import write_card
from tests.conftest import rows


def learned(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    return [0.0] * len(images)


def counting(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    return [0.0] * len(images)


counting.by_rule = True  # type: ignore[attr-defined]
HERE = "tests.unit.judges.test_provenance"


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["mined with faithfulness"], ("faithfulness",)),
        (["mined with a:b, guarded by c:d", "mined with a:b"], ("a:b", "c:d")),
        (["set.parquet, relabelled by clip_score:ViT-B-32+me:mine"], ("clip_score:ViT-B-32", "me:mine")),
        (["mined with a:b+c:d, guarded by e:f, relabelled by g:h"], ("a:b", "c:d", "e:f", "g:h")),
        (["votes of 3 people", None], ()),
        (["HPDv3-PlusPlus, train_aes"], ()),
    ],
)
def test_training_judges_of_dataset_reads_sources(
    sources: list[str | None], expected: tuple[str, ...], write_pairs: Callable[..., str]
) -> None:
    some = [{**row, "source": sources[n % len(sources)], "axis": "aesthetic"} for n, row in enumerate(rows(4))]
    assert training_judges_of(write_pairs(some)) == expected


def test_training_judges_of_mined_responses_reads_the_axis(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "axis": "cer", "source": "own failures on x, chosen: truth"}
    make_response_rows([row]).to_parquet(str(tmp_path / "pairs.parquet"))
    assert training_judges_of(str(tmp_path / "pairs.parquet")) == training_judges_of(str(tmp_path)) == ("cer",)


def test_training_judges_of_bundled_and_missing_datasets() -> None:
    assert training_judges_of("shapes-faithfulness") == ("faithfulness",) and training_judges_of(
        "shapes-aesthetic"
    ) == ("aesthetic",)
    assert training_judges_of("some/hub-set") == training_judges_of("missing.parquet") == ()


def test_training_judges_of_adapter_reads_card_then_dataset(tmp_path: Path, write_pairs: Callable[..., str]) -> None:
    outside = write_pairs([{**row, "source": "mined with a:b"} for row in rows(2)])
    (tmp_path / "dpo_mm.json").write_text(json.dumps({"pairs": outside}))
    assert training_judges_of_adapter(str(tmp_path)) == ()  # an adapter does not choose a file to open
    pairs = shutil.copy(outside, tmp_path)
    config = TrainConfig(model="m", pairs=pairs, output_dir=str(tmp_path))
    (tmp_path / "dpo_mm.json").write_text(json.dumps({"pairs": pairs}))
    assert training_judges_of_adapter(str(tmp_path)) == ("a:b",)
    card = write_card(config, {}, text=False)
    front = yaml.safe_load(card.read_text().split("---\n")[1])
    assert front["pairs_made_by"] == ["a:b"]
    Path(pairs).unlink()
    assert training_judges_of_adapter(str(tmp_path)) == ("a:b",)
    assert training_judges_of_adapter(None) == training_judges_of_adapter("some/adapter") == ()


def test_order_judges_learned_training_judge_is_not_primary() -> None:
    mine, rule = f"{HERE}:learned", f"{HERE}:counting"
    assert order_judges((mine, "aesthetic"), [mine]) == ("aesthetic", mine)
    assert order_judges((mine, "aesthetic"), []) == (mine, "aesthetic")
    assert order_judges(("faithfulness", "aesthetic"), ["faithfulness"]) == ("faithfulness", "aesthetic")
    assert order_judges((rule, mine), [rule, mine]) == (rule, mine)
    with pytest.raises(ValueError, match="built the training pairs, so none of them can be the primary metric"):
        order_judges((mine,), [mine])


def test_is_rule_based_matches_judges_without_a_model() -> None:
    assert all(is_rule_based(name) == (judge.by_rule or not judge.needs_model) for name, judge in JUDGES.items())
    assert is_rule_based("amber_chair_words@data") and not is_rule_based("amber_chair@data")
    assert (
        is_rule_based("pope_f1")
        and not is_rule_based("clip_score:ViT-B-32/openai")
        and not is_rule_based(f"{HERE}:learned")
        and is_rule_based(f"{HERE}:counting")
    )

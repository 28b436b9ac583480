"""Who made the pairs is read from the set or the card, and a learned judge that did is kept from the head."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import make_response_rows
from dpo_mm.judges import JUDGES
from dpo_mm.judges.provenance import by_rule, made_by, order_judges, training_judges_of
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
def test_a_set_names_its_judges(
    sources: list[str | None], expected: tuple[str, ...], write_pairs: Callable[..., str]
) -> None:
    some = [{**row, "source": sources[n % len(sources)], "axis": "aesthetic"} for n, row in enumerate(rows(4))]
    assert training_judges_of(write_pairs(some)) == expected


def test_answers_name_their_judge_as_their_axis(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "axis": "cer", "source": "own failures on x, chosen: truth"}
    make_response_rows([row]).to_parquet(str(tmp_path / "pairs.parquet"))
    assert training_judges_of(str(tmp_path / "pairs.parquet")) == training_judges_of(str(tmp_path)) == ("cer",)


def test_shipped_sets_name_theirs_and_what_is_not_there_none() -> None:
    assert training_judges_of("shapes-faithfulness") == ("faithfulness",) and training_judges_of(
        "shapes-aesthetic"
    ) == ("aesthetic",)
    assert training_judges_of("some/hub-set") == training_judges_of("missing.parquet") == ()


def test_an_adapter_is_asked_by_its_card_then_by_its_set(tmp_path: Path, write_pairs: Callable[..., str]) -> None:
    pairs = write_pairs([{**row, "source": "mined with a:b"} for row in rows(2)])
    config = TrainConfig(model="m", pairs=pairs, output_dir=str(tmp_path))
    (tmp_path / "dpo_mm.json").write_text(json.dumps({"pairs": pairs}))
    assert made_by(str(tmp_path)) == ("a:b",)
    card = write_card(config, {}, text=False)
    front = yaml.safe_load(card.read_text().split("---\n")[1])
    assert front["pairs_made_by"] == ["a:b"]
    Path(pairs).unlink()
    assert made_by(str(tmp_path)) == ("a:b",)
    assert made_by(None) == made_by("some/adapter") == ()


def test_no_learned_judge_that_made_the_pairs_is_at_the_head() -> None:
    mine, rule = f"{HERE}:learned", f"{HERE}:counting"
    assert order_judges((mine, "aesthetic"), [mine]) == ("aesthetic", mine)
    assert order_judges((mine, "aesthetic"), []) == (mine, "aesthetic")
    assert order_judges(("faithfulness", "aesthetic"), ["faithfulness"]) == ("faithfulness", "aesthetic")
    assert order_judges((rule, mine), [rule, mine]) == (rule, mine)
    with pytest.raises(ValueError, match="made the training pairs, so none can be the headline; add one that did not"):
        order_judges((mine,), [mine])


def test_every_rule_of_ours_is_one() -> None:
    assert all(by_rule(name) == (not judge.opens) for name, judge in JUDGES.items())
    assert (
        by_rule("pope_f1")
        and not by_rule("clip_score:ViT-B-32/openai")
        and not by_rule(f"{HERE}:learned")
        and by_rule(f"{HERE}:counting")
    )

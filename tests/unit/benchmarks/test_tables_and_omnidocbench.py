"""TEDS by PubTabNet's worked example and by brute force, and OmniDocBench's rules on blocks of its demo data."""

from __future__ import annotations

import json
import random
import sys
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio, load_judge
from dpo_mm.judges.benchmarks.omnidocbench import compared_table, compared_text, text_distance
from dpo_mm.judges.benchmarks.teds import table_similarity
from dpo_mm.judges.benchmarks.tree_distance import Node, tree_distance

HEAD = "<html><body><table><thead><tr><td><b>{}</b></td><td><b>{}</b></td></tr></thead><tbody>"
ROW = "<tr><td>{}</td><td>{}</td></tr>"
ROWS = (
    ("MACS [23]", "Uses both a control library and local statistics to minimize bias"),
    ("SICER [14]", "Designed for detecting diffusely enriched regions; for example, histone modification"),
    ("PeakSeq [24]", "Corrects for reference genome mappability and local statistics"),
    ("SISSRs [25]", "High resolution, precise identification of binding-site location"),
    ("F-seq [26]", "Uses kernel density estimation"),
)


def table(head: tuple[str, str], **changed: str) -> str:
    rows = "".join(ROW.format(changed.get(name.split()[0], name), text) for name, text in ROWS)
    return HEAD.format(*head) + rows + "</tbody></table></body></html>"


def test_teds_of_pubtabnets_worked_example() -> None:
    truth = table(("Name of algorithm", "Notable features"))
    response = table(("Name of algori", "Notablefeatures"), SICER="SICER [15]", PeakSeq="PeakSEQ [24]")
    assert table_similarity(response, truth) == pytest.approx(0.9781765018607124, abs=1e-12)
    assert table_similarity(response, truth, structure_only=True) == 1 == table_similarity(truth, truth)


def test_teds_by_hand() -> None:
    truth = "<table><tr><td>ab</td><td>cd</td></tr></table>"  # three nodes below the table
    assert table_similarity("<table><tr><td>ax</td><td>cd</td></tr></table>", truth) == pytest.approx(1 - 0.5 / 3)
    assert table_similarity("Here:\n<table><tr><td>ab</td></tr></table>", truth) == pytest.approx(1 - 1 / 3)
    spanning = "<table><tr><td colspan='2'>ab</td><td>cd</td></tr></table>"
    assert table_similarity(spanning, truth) == table_similarity(spanning, truth, structure_only=True) == 1 - 1 / 3
    for wrong in ("", "| a | b |", "<table><tr><td colspan='x'>ab</td></tr></table>"):
        assert table_similarity(wrong, truth) == 0, wrong


def brute_force(a: tuple, b: tuple) -> float:
    """Edit distance of two forests of (label, forest) by its definition: the last root is deleted, inserted or renamed."""

    @cache
    def distance(a: tuple, b: tuple) -> float:
        if not a and not b:
            return 0
        deleted = distance(a[:-1] + a[-1][1], b) + 1 if a else 99
        inserted = distance(a, b[:-1] + b[-1][1]) + 1 if b else 99
        if not a or not b:
            return min(deleted, inserted)
        renamed = distance(a[-1][1], b[-1][1]) + distance(a[:-1], b[:-1]) + rename(a[-1][0], b[-1][0])
        return min(deleted, inserted, renamed)

    return distance(a, b)


def rename(one: int, two: int) -> float:
    return abs(one - two) / 4


def random_tree(rng: random.Random, size: int) -> tuple:
    rest, children = size - 1, []
    while rest:
        part = rng.randint(1, rest)
        children.append(random_tree(rng, part))
        rest -= part
    return (rng.randrange(5), tuple(children))


def as_node(tree: tuple) -> Node[int]:
    return Node(tree[0], [as_node(child) for child in tree[1]])


def test_tree_distance_equals_the_definition_on_random_trees() -> None:
    rng = random.Random(0)
    for _ in range(60):
        a, b = (random_tree(rng, rng.randint(1, 7)) for _ in range(2))
        assert tree_distance(as_node(a), as_node(b), rename) == pytest.approx(brute_force((a,), (b,)))


def test_omnidocbench_compares_letters_and_digits() -> None:
    assert text_distance("Human Factors", "- Human Factors") == Ratio(0, 12)
    assert compared_text(r"price \$5, $x^2_{i}$ and $y$") == compared_text("price 5 x^2_i and y")
    assert compared_text(r"energy $\alpha \_ b$") == "energyαb"
    assert text_distance("...", "!!") == Ratio(
        3, 3
    )  # nothing is left to compare, so the texts count as they are written


def test_omnidocbench_normalises_tables() -> None:
    text = '```html\n<table class="a"><thead><tr><th>x<sup>2</sup></th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>\n```'
    expected = '<html><body><table border="1" ><tr><td>x2</td></tr><tr><td>1</td></tr></table></body></html>'
    assert compared_table(text) == expected and compared_table("| 1 |") == ""
    truths = ["<table><tr><td>x2</td></tr><tr><td>1</td></tr></table>", "x2 1"]
    responses = [Response(text, 1, hit_limit=False)] * 2
    assert load_judge("omnidocbench_teds")(responses, truths) == [Ratio(1, 1), Ratio(0, 0)]
    assert load_judge("omnidocbench_text")(responses, truths)[0] == Ratio(0, 0)


def test_omnidocbench_file_as_published(tmp_path: Path) -> None:
    blocks = [
        {"category_type": "title", "poly": [2, 1, 6, 1, 6, 4, 2, 4], "anno_id": 2, "text": "- Human Factors"},
        {"category_type": "table", "poly": [0, 0, 9, 0, 9, 7, 0, 7], "anno_id": 3, "html": "<table></table>"},
        {"category_type": "figure", "poly": [0, 0, 9, 0, 9, 7, 0, 7], "anno_id": 4},
    ]
    page = {"layout_dets": blocks, "page_info": {"image_path": "yanbao.pdf_7.jpg"}, "extra": {"relation": []}}
    (tmp_path / "images").mkdir()
    Image.new("RGB", (10, 8)).save(tmp_path / "images" / "yanbao.pdf_7.jpg")
    file = tmp_path / "OmniDocBench.json"
    file.write_text(json.dumps([page]))
    title, html = read_questions(str(file))
    assert (title.id, title.category, title.images[0].size) == ("yanbao.pdf_7-2", "title", (5, 4))
    assert title.ground_truth == "- Human Factors" and "HTML" in html.prompt
    assert title.content["images"] != html.content["images"]  # other parts of the same page
    file.write_text(json.dumps([{**page, "layout_dets": [{"category_type": "title"}]}, page]))
    assert len(read_questions(str(file))) == 2
    file.write_text(json.dumps([{**page, "layout_dets": [{"category_type": "title", "text": "x"}]}]))
    with pytest.raises(ValueError, match=r"OmniDocBench\.json, row 0: .*is missing.*Use the file as published"):
        read_questions(str(file))


def test_missing_package_is_named_when_the_judge_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lxml.html", None)
    monkeypatch.delitem(sys.modules, "dpo_mm.judges.benchmarks.teds")
    with pytest.raises(ValueError, match=r"needs lxml.*pip install 'dpo-mm\[measures\]'"):
        load_judge("teds")

"""Pages of OmniDocBench: a made-up page with the figures of the published code, its rules by hand, and its file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from dpo_mm.config import CompareResponsesConfig, MineResponsesConfig
from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import Response
from dpo_mm.evaluation.compare_responses import read_question_sets
from dpo_mm.judges import Ratio, load_judge
from dpo_mm.judges.benchmarks.omnidocbench_page import matching
from dpo_mm.judges.benchmarks.omnidocbench_page.formulas import array_lines, compared_formula
from dpo_mm.judges.benchmarks.omnidocbench_page.judges import pair_page
from dpo_mm.judges.benchmarks.omnidocbench_page.markdown import split_markdown
from dpo_mm.judges.benchmarks.omnidocbench_page.matching import Pair, pair_texts, part_distance
from dpo_mm.judges.benchmarks.omnidocbench_page.truth import read_truth
from dpo_mm.mining.mine_responses import mine_responses

EXAMPLE = json.loads((Path(__file__).parent / "omnidocbench_page.json").read_text(encoding="utf-8"))
TRUTH = json.dumps(EXAMPLE["page"])
JUDGES = ("text", "formulas", "order", "teds", "teds_s")
PUBLISHED = {
    "as the page": (0, 0.08695652173913043, 0, 1, 1),
    "joined, split and moved": (0.2, 0.5217391304347826, 0.4, 0.7083333333333333, 0.75),
    "other tables and formulas": (0.5951417004048583, 0.1111111111111111, 0.4, 0, 0),
    "more tables, one line each": (0.4238095238095238, 0.5, 0, 0.9285714285714286, 1),
    "another page": (0.9247787610619469, 0.9565217391304348, 0.6, 0, 0),
    "nothing": (1, 1, 1, 0, 0),
}
"""Figures by the published code, commit 7bd6c2e, with pylatexenc 3.0a30, in the order of JUDGES."""


def figures(text: str, truth: str = TRUTH) -> list[Ratio]:
    response = Response(text, 1, hit_limit=False)
    return [load_judge(f"omnidocbench_page_{name}")([response], [truth])[0] for name in JUDGES]


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_of_the_published_code(name: str) -> None:
    ratios = figures(EXAMPLE["responses"][name])
    assert [ratio.total for ratio in ratios] == [1] * len(JUDGES)
    assert [ratio.hits for ratio in ratios] == pytest.approx(PUBLISHED[name], abs=1e-12)
    assert PUBLISHED.keys() == EXAMPLE["responses"].keys()


def page(*blocks: dict, relation: tuple = ()) -> str:
    layout = [{"anno_id": number, "order": number, **block} for number, block in enumerate(blocks, start=1)]
    return json.dumps({"layout_dets": layout, "extra": {"relation": list(relation)}})


def test_pages_without_what_is_compared_are_skipped() -> None:
    header = page({"category_type": "header", "text": "a header"})
    assert figures("a header", header) == [Ratio(0, 0)] * len(JUDGES)
    text = page({"category_type": "title", "text": "abcd"})
    assert figures("abxd", text) == [Ratio(0.25, 1), Ratio(0, 0), Ratio(0, 1), Ratio(0, 0), Ratio(0, 0)]


def test_a_formula_whose_counterpart_is_a_text_counts_as_text() -> None:
    truth = page({"category_type": "equation_isolated", "latex": r"$$\alpha + beta$$"})
    assert figures("αbeta", truth)[:3] == [Ratio(0, 1), Ratio(0, 0), Ratio(0, 0)]


def test_extra_paragraphs_cost_nothing_and_headers_may_be_left_out() -> None:
    truth = page(
        {"category_type": "text_block", "text": "the only one"}, {"category_type": "footer", "text": "page foot"}
    )
    assert (
        figures("the only one\n\nsomething else", truth)[0]
        == figures("the only one\n\npage foot", truth)[0]
        == Ratio(0, 1)
    )


def test_blocks_without_a_number_are_left_out_of_the_order() -> None:
    blocks = [{"category_type": "text_block", "text": text} for text in ("first", "second", "third")]
    assert figures("third\n\nsecond\n\nfirst", page({**blocks[0], "order": None}, *blocks[1:]))[2] == Ratio(1, 1)
    # Nothing of the header is compared, so the blocks have the number of the one before them, as in the published code.
    header = {"category_type": "header", "text": "...", "order": None}
    assert figures("third\n\nsecond", page(header, *blocks[1:]))[2] == Ratio(0, 1)


def test_pages_with_most_tables_in_latex_have_none() -> None:
    html = "<table><tr><td>a</td></tr></table>"
    truth = page({"category_type": "table", "html": html, "latex": "a"})
    latex = "\\begin{tabular}{l} a \\end{tabular}\n\n"
    assert [figures(text, truth)[3] for text in (html, latex + html, 2 * latex + html)] == [
        Ratio(1, 1),
        Ratio(1, 1),
        Ratio(0, 1),
    ]


def test_truncated_paragraphs_are_joined_in_order() -> None:
    def truncated(source: int, target: int) -> dict:
        return {"relation_type": "truncated", "source_anno_id": source, "target_anno_id": target}

    blocks = [{"category_type": "text_block", "text": text} for text in ("one ", "two ", "three ", "four")]
    two = read_truth(page(*blocks, relation=(truncated(3, 1),))).blocks
    assert [block.text for block in two] == ["one three ", "two ", "four"]
    chain = read_truth(page(*blocks, relation=(truncated(1, 2), truncated(2, 4)))).blocks
    assert [block.text for block in chain] == ["one two two four", "three "]  # the published code counts block 2 twice


def test_parts_of_a_response() -> None:
    text = "# Title\n\nwith $x$ in it\n\n$$a\n= b$$\n\n| c | d |\n|---|---|\n| e | 1:2 |\n\n\\begin{tabular}{l} f \\end{tabular}"
    parts = {(part.kind, part.text.replace("\n", "").replace(" ", "")) for part in split_markdown(text)}
    rows = "".join(
        f'<tr>{"".join(f"""<tdcolspan="1"rowspan="1">{cell}</td>""" for cell in row)}</tr>' for row in ("cd", "e")
    )
    assert parts == {
        ("text", "#Title"),
        ("text", "with$x$init"),
        ("inline formula", r"\[x\]"),
        ("formula", r"\[a=b\]"),
        ("table", f'<tableborder="1">{rows}</table>'),  # the cell with a colon is lost, as in the published code
        ("LaTeX table", r"\begin{tabular}{l}f\end{tabular}"),
    }
    assert [part.text for part in split_markdown("a\n\n b \n c\n\n```py\nx = 1``` d")] == ["a", "b\nc", "d", "x = 1"]
    assert [part.text for part in split_markdown("<html>a ____________ b</html>")] == ["a ____ b"]
    positions = {part.text: part.position for part in split_markdown("ab\n\n\\[c\\]\n\nde")}
    assert positions == {"ab": 0, "\\[c\\]": 4, "de": 7}  # 2 + 5 characters, without the blank lines


def test_tables_inside_tables_are_one() -> None:
    inner = "<table><tr><td><table>x</table></td></tr></table>"
    assert [part.text for part in split_markdown(f"{inner} {inner}")] == [inner, inner]
    (left,) = split_markdown("<table> " + "-" * 9 + "<table>y</table>")[1:]
    assert left.text == "<table>y</table>" and left.kind == "table"


def test_what_is_compared_of_a_formula() -> None:
    assert compared_formula(r"$$\mathbf{W} \left( x \right) = \text{ A} \tag{3}.$$") == "{w}(x)={a}"
    assert array_lines(r"\[\begin{array}{|l|} a \\ b \end{array}\]") == [(r"\[a\]", 21), (r"\[b\]", 26)]
    array = {"category_type": "equation_isolated", "latex": r"\begin{array}{c} a \\ b \end{array}"}
    assert [(block.text, block.order) for block in read_truth(page(array)).blocks] == [(r"\[a\]", 1.1), (r"\[b\]", 1.2)]
    assert array_lines(r"\[\begin{array}{ll} a \\ b \end{array}\]") is None


def test_pairs_by_hand() -> None:
    assert pair_texts(["abcdefgh", "xyz"], ["xyz", "abcd", "efgh"]) == [Pair((0,), (1, 2)), Pair((1,), (0,))]
    both = pair_texts(["abcdefghij", "klmnop"], ["abcdefghij klmnop"])
    assert both == [Pair((0, 1), (0,))]
    assert pair_texts(["aaaa", "bbbb"], ["cccc"]) == [Pair((0,), (0,)), Pair((1,), ())]
    assert pair_texts(["abcdefghij"], ["abcdef", "ghij"]) == [Pair((0,), (0, 1))]  # neither is similar alone
    assert pair_texts(["abcdefghij"], ["abcde", "fXhij"]) == [Pair((0,), (0, 1))]  # both are like a part
    assert pair_texts(["abcdefgh"], ["abcdefXX", "abc"]) == [Pair((0,), (0,))]  # together they are worse
    assert pair_texts(["abcdefghij", "klmnop"], ["abcdefghij kXmnYp"]) == [Pair((0, 1), (0,))]
    assert pair_texts(["abcdefghij", "klmnop"], ["abcdefghij kXmYYp"]) == [Pair((0,), (0,)), Pair((1,), ())]
    assert pair_texts(["aaaa"], []) == [Pair((0,), ())] and pair_texts([], ["aaaa"]) == []


def test_pages_with_too_many_comparisons_are_paired_without_joining(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MAX_COMPARED", 3)
    assert pair_texts(["abcdefgh", "xyz"], ["xyz", "abcd", "efgh"]) == [Pair((0,), (1,)), Pair((1,), (0,))]


def test_distance_to_a_part_equals_the_definition() -> None:
    rng = random.Random(0)
    near = 0
    for _ in range(400):
        part, whole = ("".join(rng.choices("abc", k=rng.randint(*lengths))) for lengths in ((1, 9), (9, 30)))
        expected = min(
            matching.Levenshtein.distance(whole[n : n + len(part)], part) / len(part)
            for n in range(len(whole) - len(part) + 1)
        )
        distance = part_distance(part, whole, 0.4)
        assert distance == expected or min(distance, expected) > 0.4
        near += expected <= 0.4
    assert 100 < near < 390


def test_whole_pages_of_a_file_as_published(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (10, 8)).save(tmp_path / "images" / "garden.jpg")
    file = tmp_path / "OmniDocBench.json"
    published = {
        **EXAMPLE["page"],
        "layout_dets": [{**block, "poly": [0] * 8} for block in EXAMPLE["page"]["layout_dets"]],
    }
    file.write_text(json.dumps([published, published]))
    first, _ = read_questions(f"{file}#pages")
    assert (first.id, first.category, first.images[0].size, first.truth_is_response) == (
        "garden",
        "book",
        (10, 8),
        False,
    )
    assert (
        "Markdown" in first.prompt and json.loads(first.ground_truth)["layout_dets"] == EXAMPLE["page"]["layout_dets"]
    )
    assert pair_page("", first.ground_truth) == pair_page("", TRUTH)
    assert len(read_questions(str(file))) == 2 * 12  # one per text and per table
    with pytest.raises(ValueError, match=r"#lines: only OmniDocBench#pages is known"):
        read_questions(f"{file}#lines")


def test_the_wrong_kind_of_questions_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    page_row = {"image": "page.png", "prompt": "Read", "ground_truth": EXAMPLE["page"]}
    rows = {"pages": page_row, "blocks": {**page_row, "ground_truth": "a text"}}
    Image.new("RGB", (10, 8)).save(tmp_path / "page.png")
    files = {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, row in rows.items():
        files[name].write_text(2 * (json.dumps(row) + "\n"))
    no_page = r"is not a page of OmniDocBench\. Add #pages"
    for name, judge, message in (
        ("pages", "omnidocbench_text", "scores single blocks.*leave out #pages"),
        ("blocks", "omnidocbench_page_text", no_page),
    ):
        settings = {"model": "none", "questions": str(files[name]), "output_dir": str(tmp_path / "out")}
        with pytest.raises(ValueError, match=message):
            read_question_sets(CompareResponsesConfig(**settings, judges=(judge,)))
        with pytest.raises(ValueError, match=message):
            mine_responses(MineResponsesConfig(**settings, judges=judge))

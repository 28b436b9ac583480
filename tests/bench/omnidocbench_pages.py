"""How many pages score as in the published code of OmniDocBench, on random distortions of its demo pages.

    python -m tests.bench.omnidocbench_pages distort DEMO_DATA WORK --count 25

writes WORK/pages.json and WORK/responses. Evaluate both with the published code: set data_path of `ground_truth` and `prediction`
in its configs/end2end.yaml to them. It writes a folder `result`. Then

    python -m tests.bench.omnidocbench_pages compare WORK RESULT --out docs/benchmarks/omnidocbench-pages.json

The file lists the counts by version of pylatexenc. The published code is installed with 3.0a30.

DEMO_DATA is the folder `demo_data` of github.com/opendatalab/OmniDocBench (Apache-2.0).
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_mm.data.benchmarks.omnidocbench_questions import page_truth
from dpo_mm.data.schema import Response
from dpo_mm.judges import load_judge

FIGURES = {
    "omnidocbench_page_text": "text_block_per_page_edit",
    "omnidocbench_page_formulas": "display_formula_per_page_edit",
    "omnidocbench_page_order": "reading_order_per_page_edit",
    "omnidocbench_page_teds": "TEDS",
    "omnidocbench_page_teds_s": "TEDS_structure_only",
}
"""Judges, and the published file or metric with the figure of each page."""
TOLERANCE = 1e-6
FORMULA = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]", re.DOTALL)
TABLE = re.compile(r"<table.*?</table>", re.DOTALL)
Blocks = list[str]
Rng = random.Random


def cells(table: str) -> list[list[str]]:
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)] for row in rows]


def as_markdown(table: str, rng: Rng) -> str:
    rows = ["| " + " | ".join(cell.replace("|", "") for cell in row) + " |" for row in cells(table)]
    rule = "|" + " --- |" * (rows[0].count("|") - 1) if rows else ""
    return "\n".join([*rows[:1], rule, *rows[1:]] if rng.random() < 0.8 else rows)


def as_latex(table: str, rng: Rng) -> str:
    rows = " \\\\\n".join(" & ".join(row) for row in cells(table))
    tabular = "\\begin{tabular}{lll}\n" + rows + "\n\\end{tabular}"
    return f"\\begin{{table}}\n{tabular}\n\\end{{table}}" if rng.random() < 0.5 else tabular


def broken(table: str, rng: Rng) -> str:
    place = rng.randrange(1, len(table))
    return table[:place] + rng.choice(("", "<table>", "</table>", "<td>x</td>")) + table[place + rng.randrange(12) :]


def change_tables(text: str, rng: Rng) -> str:
    change: Callable[[str, Rng], str] = rng.choice((as_markdown, as_markdown, as_latex, broken))
    return TABLE.sub(lambda match: change(match[0], rng) if rng.random() < 0.8 else match[0], text)


def change_formulas(text: str, rng: Rng) -> str:
    marks = rng.choice(
        (("$$", "$$"), ("$$\n", "\n$$"), ("\\[", "\\]"), ("\\[\n", "\n\\]"), ("$", "$"), ("\\(", "\\)"), ("", ""))
    )
    array = rng.random() < 0.3

    def changed(match: re.Match[str]) -> str:
        inner = (match[1] or match[2]).strip()
        if array:
            inner = rf"\begin{{array}}{{{rng.choice('lcr')}}} {inner[: len(inner) // 2]} \\ {inner[len(inner) // 2 :]} \end{{array}}"
        return marks[0] + inner + marks[1]

    return FORMULA.sub(changed, text)


def drop(blocks: Blocks, rng: Rng) -> Blocks:
    share = rng.choice((0.1, 0.4, 0.8))
    return [block for block in blocks if rng.random() > share]


def swap(blocks: Blocks, rng: Rng) -> Blocks:
    for _ in range(rng.randint(1, 4)):
        i, j = rng.randrange(len(blocks)), rng.randrange(len(blocks))
        blocks[i], blocks[j] = blocks[j], blocks[i]
    return blocks


def merge(blocks: Blocks, rng: Rng) -> Blocks:
    for _ in range(rng.randint(1, 5)):
        if len(blocks) > 1:
            i = rng.randrange(len(blocks) - 1)
            blocks[i : i + 2] = [blocks[i] + rng.choice(("\n", " ", "")) + blocks[i + 1]]
    return blocks


def split(blocks: Blocks, rng: Rng) -> Blocks:
    for _ in range(rng.randint(1, 6)):
        i = rng.randrange(len(blocks))
        if len(blocks[i]) > 3:
            place = rng.randrange(1, len(blocks[i]))
            blocks[i : i + 1] = [blocks[i][:place], blocks[i][place:]]
    return blocks


def repeat(blocks: Blocks, rng: Rng) -> Blocks:
    i = rng.randrange(len(blocks))
    return blocks[:i] + [blocks[i]] * rng.randint(2, 4) + blocks[i + 1 :]


def damage(blocks: Blocks, rng: Rng) -> Blocks:
    share = rng.choice((0.02, 0.1, 0.3))

    def damaged(block: str) -> str:
        return "".join(
            rng.choice("ax1 .$|\\") if rng.random() < share / 3 else character
            for character in block
            if rng.random() > share
        )

    return [damaged(block) if rng.random() < 0.6 else block for block in blocks]


def insert(blocks: Blocks, rng: Rng) -> Blocks:
    extra = (
        "12",
        "![](a.png)",
        "Chapter 3",
        "```python\nx = 1```",
        "$x^2$",
        "...",
        "<td>1</td>",
        "| a | b: c |\n| 1 | 2 |",
        "$$",
        "# A & B",
    )
    for _ in range(rng.randint(1, 4)):
        blocks.insert(rng.randrange(len(blocks) + 1), rng.choice(extra))
    return blocks


CHANGES = (drop, swap, merge, split, repeat, damage, insert)


def distort(text: str, rng: Rng) -> str:
    """Apply one to four changes to the blocks of a response."""
    for change in (change_tables, change_formulas):
        text = change(text, rng) if rng.random() < 0.5 else text
    blocks = text.split("\n\n")
    for change in rng.choices(CHANGES, k=rng.randint(1, 4)):
        blocks = change(blocks, rng) if blocks else blocks
    text = rng.choice(("\n\n", "\n\n", "\n\n", "\n", "\n\n\n")).join(blocks)
    return f"```markdown\n{text}\n```" if rng.random() < 0.1 else text


def distort_page(page: dict[str, Any], rng: Rng) -> None:
    """Change categories, texts and relations of a page's ground truth."""
    for block in page["layout_dets"]:
        if block.get("text") and rng.random() < 0.1:
            block["category_type"] = rng.choice(("title", "header", "page_footnote", "figure_caption", "reference"))
        if block.get("text") and rng.random() < 0.05:
            block["text"] = rng.choice(("...", "—", "$\\alpha$"))
        if block.get("latex") and block["category_type"] == "equation_isolated" and rng.random() < 0.3:
            inner = block["latex"].strip("$").strip()
            block["latex"] = rf"$$\begin{{array}}{{l}} {inner} \\ x = {inner[:9]} \end{{array}}$$"
    texts = [
        block["anno_id"]
        for block in page["layout_dets"]
        if block["category_type"] == "text_block" and block.get("order")
    ]
    for source, target in itertools.pairwise(texts):
        if rng.random() < 0.08:
            page["extra"]["relation"].append(
                {"relation_type": "truncated", "source_anno_id": source, "target_anno_id": target}
            )


def write_distorted(demo: Path, work: Path, count: int, seed: int) -> None:
    """Write the demo pages, and distortions of the responses to them and of pages that are right."""
    rng = random.Random(seed)
    pages = json.loads((demo / "omnidocbench_demo" / "OmniDocBench_demo.json").read_text(encoding="utf-8"))
    (work / "responses").mkdir(parents=True)
    written = []
    for page in pages:
        name = page["page_info"]["image_path"]
        texts = [
            (demo / folder / f"{name[:-4]}.md").read_text(encoding="utf-8")
            for folder in ("end2end", "omnidocbench_demo/mds")
        ]
        for number in range(count):
            own, text = copy.deepcopy(page), texts[number % 2]
            if number > 1:
                text = distort(text, rng)
            if number % 4 == 3:
                distort_page(own, rng)
            own["page_info"]["image_path"] = f"{number}-{name}"
            (work / "responses" / f"{number}-{name[:-4]}.md").write_text(text, encoding="utf-8")
            written.append(own)
    (work / "pages.json").write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")


def published_figures(result: Path) -> dict[str, dict[str, float]]:
    """Read the published figures by judge and page."""
    figures: dict[str, dict[str, float]] = {}
    tables: dict[str, list[dict[str, float]]] = {}
    for name, table in json.loads(next(result.glob("*_per_table_TEDS.json")).read_text()).items():
        tables.setdefault(name.rpartition("_[")[0], []).append(table)
    for judge, published in FIGURES.items():
        if published.startswith("TEDS"):
            figures[judge] = {page: sum(table[published] for table in own) / len(own) for page, own in tables.items()}
        else:
            figures[judge] = json.loads(next(result.glob(f"*{published}.json")).read_text())
    return figures


def compare(work: Path, result: Path, show: int) -> dict[str, Any]:
    """Count the pages whose figures are equal, different, or absent in both."""
    published, judges = published_figures(result), {name: load_judge(name) for name in FIGURES}
    rows = {name: {"equal": 0, "different": 0, "absent in both": 0} for name in FIGURES}
    start = time.process_time()
    pages = json.loads((work / "pages.json").read_text(encoding="utf-8"))
    for page in pages:
        name = page["page_info"]["image_path"]
        response = Response((work / "responses" / f"{name[:-4]}.md").read_text(encoding="utf-8"), 1, hit_limit=False)
        for judge, score in judges.items():
            ratio = score([response], [json.dumps(page_truth(page), ensure_ascii=False)])[0]
            own, other = (ratio.hits if ratio.total else None), published[judge].get(name)
            if own is None and other is None:
                outcome = "absent in both"
            elif own is None or other is None or abs(own - other) > TOLERANCE:
                outcome, show = "different", show - 1
                if show >= 0:
                    print(name, judge, own, other)
            else:
                outcome = "equal"
            rows[judge][outcome] += 1
    return {
        "pages": len(pages),
        "tolerance": TOLERANCE,
        "rows": rows,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("distort", "compare"))
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "distort":
        write_distorted(arguments.first, arguments.second, arguments.count, arguments.seed)
        return
    counts = compare(arguments.first, arguments.second, arguments.show)
    print(json.dumps(counts, indent=2))
    if arguments.out:
        known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        known[f"pylatexenc {importlib.metadata.version('pylatexenc')}"] = counts
        arguments.out.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Compare the judges of olmOCR-bench with the published code, test by test.

    git clone https://github.com/allenai/olmocr
    python -m tests.bench.olmocr_rules --olmocr olmocr --out docs/benchmarks/olmocr-rules.json   # 12 minutes

Equations are those of the published tests and sample pages, and random variations of them: spaces, fractions, fonts, sizes,
order of scripts, and symbols that are missing, added, changed or swapped. They are compared in pairs, and as tests on pages with
several equations. The sample pages come with responses of olmOCR, which all judges score. Other tests are random facts about random pages with text, Markdown, HTML and tables. Tests on which the
published code stops are counted apart.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import Response
from dpo_mm.judges import load_judge
from dpo_mm.judges.benchmarks.equation_browser import EquationBrowser, Rendering, Symbol, presentation
from dpo_mm.judges.benchmarks.equation_match import shows
from dpo_mm.judges.benchmarks.olmocr_equations import find_equations
from tests.bench.olmocr_pages import random_tests
from tests.browser import CHROMIUM

VARIATIONS, PAIRS_PER_EQUATION, PAGES, FACTS = 700, 3, 600, 20_000
CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "spaces removed": lambda latex, _: re.sub(r"(?<![a-zA-Z]) | (?![a-zA-Z])", "", latex),
    "spaces added": lambda latex, rng: re.sub(r"([=+,])", rng.choice([r" \1 ", r"\,\1\;", r"\\quad \1", r"~\1"]), latex),
    "over": lambda latex, _: re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"{\1 \\over \2}", latex),
    "another fraction": lambda latex, rng: latex.replace(r"\frac", rng.choice([r"\dfrac", r"\tfrac", r"\binom"])),
    "divided by": lambda latex, _: re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", latex),
    "font": lambda latex, rng: _at_letter(latex, rng, rng.choice([r"\mathrm{%s}", r"\mathbf{%s}", r"\text{%s}", r"\mathcal{%s}", r"\mathbb{%s}"])),
    "accent": lambda latex, rng: _at_letter(latex, rng, rng.choice([r"\hat{%s}", r"\bar{%s}", r"\overline{%s}", r"\tilde{%s}", r"\vec{%s}"])),
    "size": lambda latex, rng: _at_letter(latex, rng, rng.choice([r"\scriptstyle{%s}", r"\large{%s}", r"\tiny{%s}", r"{\displaystyle %s}"])),
    "braces": lambda latex, _: re.sub(r"([_^])\{(\w)\}", r"\1\2", latex),
    "scripts swapped": lambda latex, _: re.sub(r"(_\{[^{}]*\})(\^\{[^{}]*\})", r"\2\1", latex),
    "scripts exchanged": lambda latex, _: latex.translate(str.maketrans("_^", "^_")),
    "brackets": lambda latex, rng: latex.replace(r"\left", "").replace(r"\right", "") if r"\left" in latex else re.sub(r"([()\[\]])", rng.choice([r"\\big\1", r"\\bigg\1"]), latex),
    "aligned": lambda latex, rng: _in_environment(latex, rng.choice(["align*", "aligned", "gathered"])),
    "letter removed": lambda latex, rng: _at_letter(latex, rng, "{}" if rng.random() < 0.5 else ""),
    "letter changed": lambda latex, rng: _at_letter(latex, rng, rng.choice(["x", "y", r"\alpha ", "1", "O"])),
    "added": lambda latex, rng: rng.choice(["%s .", "%s,", "y = %s", r"%s \tag{1}", r"\text{where } %s", r"%s \\ x", "%s+1"]) % latex,
    "half": lambda latex, rng: rng.choice(latex.split("=")),
    "sides swapped": lambda latex, _: "=".join(reversed(latex.split("="))),
    "broken": lambda latex, rng: latex.replace("}", "", 1) if rng.random() < 0.5 else latex + r"\nothing",
    "limits": lambda latex, _: re.sub(r"(\\sum|\\int)", r"\1\\limits ", latex),
    "colour": lambda latex, _: rf"\color{{red}}{{{latex}}}",
}  # fmt: skip


def _in_environment(latex: str, name: str) -> str:
    return rf"\begin{{{name}}}{latex}\end{{{name}}}"


def _at_letter(latex: str, rng: random.Random, replacement: str) -> str:
    """Replace a random letter or digit that is no part of a command."""
    places = [match.start() for match in re.finditer(r"(?<![\\a-zA-Z{])[a-zA-Z0-9](?![a-zA-Z])", latex)]
    if not places:
        return latex
    place = rng.choice(places)
    return latex[:place] + replacement.replace("%s", latex[place]) + latex[place + 1 :]


def vary(latex: str, rng: random.Random) -> str:
    for change in rng.sample(list(CHANGES), rng.choice((1, 1, 1, 2, 3))):
        latex = CHANGES[change](latex, rng)
    return latex


def published_code(checkout: Path) -> tuple[Any, Any]:
    """Import the published tests and renderer, whose cache of equations is in a new folder, with the browser of this machine."""
    from playwright.sync_api import BrowserType

    os.environ["HOME"] = tempfile.mkdtemp()
    sys.path.insert(0, str(checkout))
    package = types.ModuleType("olmocr")
    package.__path__ = [str(checkout / "olmocr")]
    sys.modules["olmocr"] = package
    launch = BrowserType.launch
    BrowserType.launch = lambda self, **options: launch(self, executable_path=CHROMIUM, **options)  # type: ignore[method-assign]
    import olmocr.bench.katex.render as renderer
    import olmocr.bench.tests as tests

    return tests, renderer


def published_pairs(checkout: Path) -> list[tuple[str, str]]:
    """Pairs of equations that the published tests compare, and the math tests of its sample pages with each equation of the page."""
    pairs = []
    for function in ast.walk(ast.parse((checkout / "tests" / "test_katex_render.py").read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            calls = [
                node for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            ]
            latex = [call.args[0].value for call in calls if call.func.id == "render_equation"]  # type: ignore[attr-defined]
            pairs += [(one, other) for one in latex for other in latex]
    samples = checkout / "olmocr" / "bench" / "sample_data"
    lines = (samples / "dataset.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = [test["math"] for test in (json.loads(line) for line in lines if line.strip()) if test["type"] == "math"]
    pages = [path.read_text(encoding="utf-8") for path in sorted(samples.rglob("*.md"))]
    written = list(dict.fromkeys(latex for page in pages for latex in find_equations(page) if 2 < len(latex) < 300))
    return pairs + [(one, other) for one in dict.fromkeys(wanted) for other in written]


def rendered(equations: list[str], katex: Path, renderer: Any) -> tuple[dict[str, Rendering | None], dict[str, Any]]:
    """Render equations here and with the published code."""
    with EquationBrowser(katex) as browser:
        own = {latex: browser.render(latex) for latex in equations}
    with ThreadPoolExecutor(2) as threads:
        return own, dict(zip(equations, threads.map(renderer.render_equation, equations), strict=True))


def looks_equal(own: Rendering | None, theirs: Any) -> bool:
    """Check if both renderings have the same MathML and the same symbols at the same places, or are both broken."""
    if own is None or theirs.error:
        return own is None and bool(theirs.error)
    spans = [
        Symbol(text[n], box.x + box.width * n / len(text) + box.width / len(text) / 2, box.y + box.height / 2)
        for text, box in (
            (re.sub(r"[\s\u200a-\u200d\u2060\ufeff]+", "", span.text), span.bounding_box) for span in theirs.spans
        )
        for n in range(len(text))
    ]
    return presentation(theirs.mathml) == own.mathml and tuple(spans) == own.symbols


def compare_pairs(
    pairs: list[tuple[str, str]], own: dict[str, Any], theirs: dict[str, Any], renderer: Any
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    different = []
    for reference, latex in pairs:
        if own[reference] is None:
            counts["reference is broken"] += 1
            continue
        expected = renderer.compare_rendered_equations(theirs[reference], theirs[latex])
        verdict = own[latex] is not None and shows(own[latex], own[reference])
        counts["pairs"] += 1
        counts["match"] += expected
        counts["equal LaTeX"] += reference == latex
        counts["broken"] += own[latex] is None
        counts["same verdict"] += verdict == expected
        different += [(reference, latex, verdict)] if verdict != expected else []
    return {**counts, "different": different[:20]}


def compare_pages(pairs: list[tuple[str, str]], katex: Path, tests: Any, rng: random.Random) -> dict[str, Any]:
    """Compare math tests on pages with one to four equations."""
    judge, counts, different = load_judge(f"olmocr_math@{katex}"), Counter[str](), []
    pages, truths, expected = [], [], []
    for number in range(PAGES):
        reference, *others = rng.choice(pairs)[0], *(rng.choice(pairs)[1] for _ in range(rng.randint(0, 3)))
        others += [latex for one, latex in rng.sample(pairs, len(pairs)) if one == reference][:1]
        forms = rng.choices((r"\(%s\)", r"\[%s\]", "$$%s$$", "$%s$", "$ %s $"), k=len(others))
        page = " and ".join(form.replace("%s", latex) for form, latex in zip(forms, others, strict=True))
        test = {"pdf": "a.pdf", "page": 1, "id": str(number), "type": "math", "math": reference, "ignore_dollar_delimited": rng.random() < 0.2}  # fmt: skip
        pages.append(Response(page, 1, hit_limit=False))
        truths.append(json.dumps({"tests": [test]}))
        expected.append(tests.MathTest(**test).run(page)[0])
    for page, truth, verdict, ratio in zip(pages, truths, expected, judge(pages, truths), strict=True):
        counts["pages"] += 1
        counts["match"] += verdict
        counts["same verdict"] += bool(ratio.hits) == verdict
        different += [(page.text, truth)] if bool(ratio.hits) != verdict else []
    return {**counts, "different": different[:20]}


def compare_samples(checkout: Path, tests: Any) -> dict[str, Any]:
    """Score olmOCR's responses to the sample pages of the published code."""
    samples = checkout / "olmocr" / "bench" / "sample_data"
    questions = read_questions(str(samples))
    files = [re.sub(r"\.pdf-page-(\d+)$", r"_pg\1_repeat1.md", question.id) for question in questions]
    texts = [(samples / "olmocr_pipeline" / file).read_text(encoding="utf-8") for file in files]
    cases: dict[str, list[tuple[dict[str, Any], str]]] = {"tests": [], "baseline": [], "math": []}
    for question, text in zip(questions, texts, strict=True):
        for test in json.loads(question.ground_truth)["tests"]:
            cases[test["type"] if test["type"] in cases else "tests"].append((test, text))
    counts: dict[str, Any] = {"pages": len(questions)}
    for kind in (*cases, "latex"):
        tested = cases.get(kind, cases["math"])
        judge = load_judge(f"olmocr_math@{checkout}/olmocr/bench/katex" if kind == "math" else f"olmocr_{kind}")
        truths = [json.dumps({"tests": [test]}) for test, _ in tested]
        passed = [bool(each.hits) for each in judge([Response(text, 1, hit_limit=False) for _, text in tested], truths)]
        expected = [tests.load_single_test(dict(test)).run(text)[0] for test, text in tested]
        same = sum(one == other for one, other in zip(passed, expected, strict=True))
        counts[f"olmocr_{kind}"] = {"tests": len(tested), "pass": sum(passed), "same verdict": same}
    return counts


def compare_facts(tests: Any, rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compare tests of the other types on random pages."""
    judges = {True: load_judge("olmocr_baseline"), False: load_judge("olmocr_tests")}
    counts: dict[str, Counter[str]] = {}
    different: dict[str, list[Any]] = {}
    for test, page in random_tests(rng, FACTS):
        kind = test["type"]
        count = counts.setdefault(kind, Counter())
        try:
            expected = tests.load_single_test(dict(test)).run(page)[0]
        except Exception:
            count["published code stops"] += 1
            continue
        ratio = judges[kind == "baseline"]([Response(page, 1, hit_limit=False)], [json.dumps({"tests": [test]})])[0]
        count["tests"] += 1
        count["pass"] += expected
        count["same verdict"] += bool(ratio.hits) == expected
        if bool(ratio.hits) != expected:
            different.setdefault(kind, []).append((test, page))
    yield from ((kind, {**counts[kind], "different": different.get(kind, [])[:5]}) for kind in sorted(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--olmocr", type=Path, required=True, help="checkout of the published code")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("equations", "samples", "facts"), help="keep the other parts of the file")
    arguments = parser.parse_args()
    tests, renderer = published_code(arguments.olmocr.resolve())
    measured: dict[str, Any] = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.only else {}
    measured["command"] = "python -m tests.bench.olmocr_rules --olmocr olmocr"
    if arguments.only in (None, "samples"):
        measured["sample_pages"] = compare_samples(arguments.olmocr, tests)
    if arguments.only in (None, "equations"):
        katex, rng = arguments.olmocr / "olmocr" / "bench" / "katex", random.Random(0)
        published = published_pairs(arguments.olmocr)
        bases = list(dict.fromkeys(latex for pair in published for latex in pair))
        varied = [(latex, vary(latex, rng)) for latex in rng.choices(bases, k=VARIATIONS)]
        varied += [(other, latex) for latex, other in varied]
        equations = list(dict.fromkeys(latex for pair in published + varied for latex in pair))
        varied += [(latex, rng.choice(equations)) for latex in equations for _ in range(PAIRS_PER_EQUATION)]
        own, theirs = rendered(equations, katex, renderer)
        same = sum(looks_equal(own[latex], theirs[latex]) for latex in equations)
        measured["equations"] = {"rendered": len(equations), "same symbols at the same places": same, "broken": sum(each is None for each in own.values())}  # fmt: skip
        measured["published_pairs"] = compare_pairs(published, own, theirs, renderer)
        measured["varied_pairs"] = compare_pairs(varied, own, theirs, renderer)
        usable = [pair for pair in published + varied if own[pair[0]] is not None]
        measured["pages"] = compare_pages(usable, katex, tests, rng)
    if arguments.only in (None, "facts"):
        measured["facts"] = dict(compare_facts(tests, random.Random(1)))
    arguments.out.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()

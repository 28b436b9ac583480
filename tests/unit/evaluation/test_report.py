"""The report: its contents, its files, and that everything put into it is escaped."""

import base64
import errno
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from dpo_mm.evaluation import report as module
from dpo_mm.evaluation.answer import answer, provenance_line
from dpo_mm.evaluation.charts import INK, PANELS, history_charts, scale_chart
from dpo_mm.evaluation.contact_sheet import MostChanged
from dpo_mm.evaluation.marked_text import transcription_spans
from dpo_mm.evaluation.report import (
    Example,
    Report,
    TextExample,
    contact_sheet,
    is_rate,
    render,
    terminal_table,
    text_spans,
    write_report,
)
from dpo_mm.evaluation.statistics import Comparison

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</style><script>alert(1)</script>",
    "{{ 7*7 }}{% raw %}",
    '" onload="alert(1)" x="',
    "</title></svg><svg onload=alert(1)>",
    "<style>*{display:none}</style>",
)
RED, BLUE = Image.new("RGB", (64, 64), "#ff0000"), Image.new("RGB", (64, 64), "#0000ff")


def comparison(metric="fully correct rate", base=0.5, tuned=0.625, low=0.0625, high=0.1875, **rest) -> Comparison:
    values = {"judge": "faithfulness", "headline": False, "n": 80, "verdict": "better"} | rest
    votes = {"wins": 12, "ties": 5, "losses": 3, "p": 0.035, "clusters": 20}
    return Comparison(metric, base=base, tuned=tuned, difference=tuned - base, low=low, high=high, **(votes | values))


def report(**rest) -> Report:
    given = {"title": "Shapes", "verdict": "better", "summary": "It learned.", "command": "dpo-mm quickstart"}
    return Report(**(given | {"comparisons": (comparison(headline=True),)} | rest))


def full(word: str) -> Report:
    """Build a report with the same text in every place for text."""
    one = comparison(metric=word, judge=word)
    return report(
        title=word,
        verdict=word,
        summary=word,
        command=word,
        comparisons=(replace(one, headline=True), one),
        categories=(one, one),
        scales=((0.0, one), (1.0, one)),
        control=one,
        history=({"step": 1.0, "loss": 0.7}, {"step": 2.0, "loss": 0.6}),
        examples=(Example(word, word, RED, BLUE, 0.0, 1.0, 3),),
        text_examples=(TextExample(RED, word, word, word * 20, word, ((0, 4),), ((2, 9),), word),),
        settings={word: word},
        notes=(word,),
    )


class Page(HTMLParser):
    """Elements of a page with their attributes, and its text outside <style>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] != "style":
            self.words += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_text_is_escaped_everywhere(word):
    hostile, tame = Page(render(full(word))), Page(render(full("plain words of some length")))
    assert hostile.words.count(word) >= 20
    assert "49" not in hostile.words.replace(word, "")
    for page in (hostile, tame):
        names = {tag for tag, _ in page.elements}
        assert not names & {"script", "iframe", "object", "embed", "link", "base", "form"}
        assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
        assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert len(hostile.all("img")) == len(tame.all("img")) == 3
    assert len(hostile.all("style")) == len(tame.all("style")) == 1


def test_page_has_no_external_resources_and_forbids_scripts():
    page = render(full("words"))
    assert re.findall(r"(?:https?:)?//(?!www\.w3\.org/)[a-z]", page) == []
    assert re.findall(r"url\((?!#)", page) == []
    policy = Page(page).all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'; img-src data:")


@pytest.mark.parametrize("headlines", [0, 2])
def test_report_without_exactly_one_primary_metric_raises(headlines):
    marked = tuple(comparison(headline=n < headlines) for n in range(3))
    with pytest.raises(ValueError, match=f"{headlines} primary metrics"):
        report(comparisons=marked)


def test_only_rates_are_shown_in_per_cent():
    page = Page(render(report(comparisons=(comparison(headline=True), comparison("diversity", 0.21, 0.2, -0.02, 0.0)))))
    assert "50.0 %" in page.words and "62.5 %" in page.words
    assert "+12.5 pts" in page.words and "+6.2 to +18.8" in page.words
    assert "0.210" in page.words and "−0.020 to 0.000" in page.words
    assert [is_rate(comparison(name)) for name in ("share of loops", "accuracy", "brightness", "CER")] == [
        True,
        True,
        False,
        False,
    ]
    assert not is_rate(comparison("word error rate", base=1.4))


def test_significant_control_warns():
    calm = Page(render(report(control=comparison(low=-0.1, verdict="no evidence")))).words
    moved = Page(render(report(control=comparison()))).words
    assert "This is the expected result" in calm and "do not trust" not in calm
    assert "do not trust" in moved and "expected result" not in moved


def test_base_is_left_of_tuned_with_score_marks():
    shown = Page(render(report(examples=(Example("a red circle", "colours", RED, BLUE, 0.0, 1.0),))))
    images = shown.all("img")
    assert [image["alt"] for image in images] == ["base: a red circle", "tuned: a red circle"]
    drawn = [Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) for image in images]
    assert [image.getpixel((9, 9)) for image in drawn] == [(255, 0, 0), (0, 0, 255)]
    assert {image.get("class") for image in images} == {"pixelated"}
    marks = [attributes["aria-label"] for attributes in shown.all("span") if "mark" in (attributes.get("class") or "")]
    assert marks == ["wrong", "right"]


def test_page_says_how_many_examples_of_all_prompts_it_shows():
    example = Example("a red circle", "colours", RED, BLUE, 0.0, 1.0)
    assert "1 of 20 prompts are shown." in Page(render(report(examples=(example,)))).words
    assert "are shown" not in Page(render(report(examples=(example,) * 20))).words


def test_other_scores_are_numbers_and_large_images_are_smooth_and_shrunk():
    large = Image.new("RGB", (1024, 512))
    page = Page(
        render(report(examples=(Example("a dog", "", large, large, 1.0, 0.25), Example("a cat", "", RED, BLUE))))
    )
    assert "0.25" in page.words and not [a for a in page.all("span") if a.get("aria-label") == "right"]
    first, *_, last = page.all("img")
    assert (first["width"], first["height"], first.get("class")) == ("768", "384", None)
    assert first["src"].startswith("data:image/webp;base64,") and last["src"].startswith("data:image/png;base64,")
    assert last["class"] == "pixelated"


def test_text_spans_follow_marks_and_join_to_the_text():
    spans = text_spans("a cat and a dog", ((2, 5), (12, 15), (12, 13)))
    assert [span.text for span in spans if span.marked] == ["cat", "d", "og"]
    assert "".join(span.text for span in spans) == "a cat and a dog"
    assert text_spans("") == []
    for wrong in ((3, 2), (-1, 2), (0, 16)):
        with pytest.raises(ValueError, match="outside its text of 15"):
            text_spans("a cat and a dog", (wrong,))


def test_only_long_loops_are_folded_with_their_length():
    text = "Total: 12.40\n" + "thank you " * 30 + "goodbye"
    spans = text_spans(text, ((250, 260),))
    folded = [span for span in spans if span.repeats]
    assert [(span.repeats, len(span.text), span.marked) for span in folded] == [(27, 270, True)]
    assert "".join(span.text for span in spans) == text
    assert not any(span.repeats for span in text_spans("ha " * 20))
    assert not any(span.repeats for span in text_spans("A sentence that is said twice, as poems do. " * 2))
    page = render(report(text_examples=(TextExample(None, "Read.", text, "short", None),)))
    assert "27 more repeats, 270 characters" in page


def test_transcription_shows_extra_and_missing_words():
    """Mutation that it catches: differences of the ground truth from the text, missing words at another place."""
    spans = transcription_spans("Total 5.2O\nThank you", "Total 5.20\nThank you for your visit")
    assert [(span.text, "extra" if span.marked else "missing" if span.missing else "") for span in spans] == [
        ("Total 5.", ""),
        ("2O", "extra"),
        ("20", "missing"),
        ("\nThank you", ""),
        (" for your visit", "missing"),
    ]
    looped = transcription_spans("thank you " * 30, "thank you")
    assert "".join(span.text for span in looped if not span.missing) == "thank you " * 30
    assert [span.marked for span in looped if span.repeats] == [True]
    example = TextExample(None, "Read.", "a <b>", "a b", "a b", is_transcription=True)
    page = render(report(text_examples=(example,)))
    assert "<del>b</del>" not in page and "<mark>&lt;</mark>" in page and 'class="both mono"' in page


def test_page_starts_with_answer_and_folds_the_rest():
    worse = comparison("diversity", 0.21, 0.2, -0.02, -0.001, verdict="worse")
    log = ({"step": 1.0, "loss": 0.7}, {"step": 300.0, "loss": 0.6})
    example = Example("a red circle", "colours", RED, BLUE, 0.0, 1.0)
    changed = MostChanged((example,), ())
    made = report(
        comparisons=(comparison(headline=True), worse), history=log, examples=(example,), most_changed=changed
    )
    page = Page(render(made))
    start = page.words[: page.words.index("What was measured")].replace("\N{NO-BREAK SPACE}", " ")
    assert "Yes, the tuned model is better." in start
    assert "Fully correct rate rose from 50.0 % to 62.5 %: +12.5 pts. 95 % interval +6.2 to +18.8." in start
    assert "12 improved, 3 got worse and 5 did not change (sign test p = 0.035)" in start
    assert "Significantly worse: diversity (0.210 to 0.200). Training took 300 steps." in start
    assert start.index("Improved most") < start.index("a red circle") < start.index("Got worse most")
    folds = [attributes for attributes in page.all("details") if attributes.get("class") == "part"]
    assert len(folds) == 3 and not any("open" in attributes for attributes in folds)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [("no evidence", "no evidence that the tuned model is better"), ("worse", "No, the tuned model is worse")],
)
def test_answer_without_interval_or_change(verdict, words):
    none = comparison(tuned=0.5, low=None, high=None, verdict=verdict, headline=True, p_holm=0.0001)
    given = answer((none, comparison("CLIP")), verdict, unit="prompts")
    assert words in given.short
    assert given.change == "Fully correct rate did not change from 50.0\N{NO-BREAK SPACE}%."
    assert (
        given.certainty.startswith("Too few items differ for an interval.")
        and "correction p < 0.001" in given.certainty
    )
    assert given.price == "No other metric got significantly worse."


def test_metrics_json_has_the_documented_keys(tmp_path):
    history = ({"step": 1, "loss": math.nan}, {"step": 2, "loss": 0.5})
    scales = ((0.5, comparison("scale 0.5")),)
    path = write_report(tmp_path / "new" / "run", report(history=history, scales=scales, settings={"beta": "2500"}))
    metrics = json.loads((path.parent / "metrics.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert metrics["verdict"] == "better"
    (one,) = metrics["comparisons"]
    assert list(one)[:10] == [
        "metric",
        "judge",
        "headline",
        "base",
        "tuned",
        "difference",
        "low",
        "high",
        "n",
        "verdict",
    ]
    assert (one["base"], one["tuned"], one["difference"], one["headline"]) == (0.5, 0.625, 0.125, True)
    assert metrics["scales"][0]["scale"] == 0.5 and metrics["scales"][0]["metric"] == "scale 0.5"
    assert metrics["history"] == [{"step": 1.0, "loss": None}, {"step": 2.0, "loss": 0.5}]
    assert (metrics["categories"], metrics["control"], metrics["settings"]) == ([], None, {"beta": "2500"})


def test_date_and_hardware_are_on_the_page_alone(tmp_path):
    line = provenance_line()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC, dpo-mm \S+, torch \S+, .+", line)
    path = write_report(tmp_path, report(provenance=line))
    assert line in Page(path.read_text()).words and "UTC" not in (tmp_path / "metrics.json").read_text()


def test_contact_sheet_is_written_only_with_image_examples(tmp_path):
    assert write_report(tmp_path, report()) == tmp_path / "report.html"
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "metrics.json"}
    write_report(tmp_path, report(examples=(Example("a circle", "", RED, BLUE),)))
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "metrics.json", "contact_sheet.png"}
    assert Image.open(tmp_path / "contact_sheet.png").mode == "RGB"


def test_full_disk_leaves_the_previous_report_unchanged(tmp_path, monkeypatch):
    write_report(tmp_path, report(title="the old one"))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, report(title="the new one"))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_contact_sheet_has_base_above_tuned_with_check_and_cross():
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    sheet = contact_sheet([Example("a", "", RED, BLUE, 0, 1), Example("b", "", BLUE, clear, 1, 0)], tile=100)
    column = 64 + 50
    assert [sheet.getpixel((column, y)) for y in (60, 170)] == [(255, 0, 0), (0, 0, 255)]
    assert [sheet.getpixel((column + 110, y)) for y in (60, 170)] == [(0, 0, 255), (255, 255, 255)]
    marks = [sheet.getpixel((column + 33 - 9, y + 33)) for y in (60, 170)]
    assert [("green" if g > r else "red") for r, g, _ in marks] == ["red", "green"]
    many = contact_sheet([Example("a", "", RED, BLUE)] * 9, tile=50, columns=4)
    assert many.width == 64 + 4 * 60 + 10 and many.height > 3 * 120


def test_history_charts_draw_every_panel_in_the_log():
    names = sorted({name for panel in PANELS for name, _ in panel.lines})
    assert len(names) == 10
    history = [{"step": n} | {name: n / 100 for name in names} for n in range(100)]
    charts = history_charts(history)
    assert [chart.title for chart in charts] == [panel.title for panel in PANELS]
    for chart in charts:
        assert chart.svg.startswith("<svg ") and chart.svg.rstrip().endswith("</svg>")
        assert "var(--tuned)" in chart.svg and not set(re.findall("#0101[0-9]+", chart.svg)) & set(INK.values())
        assert "<style" not in chart.svg and "<?xml" not in chart.svg
    assert [chart.title for chart in history_charts([{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}])] == ["Loss"]
    assert history_charts([{"step": 1, "loss": 0.7}, {"step": 2, "loss": math.nan}, {"loss": 0.1}]) == []


def test_history_charts_draw_last_evaluation_by_noise_quartile():
    """Mutation that it catches: an earlier evaluation, quartiles in another order, a quartile that is not finite."""
    log = [
        {"step": n}
        | {
            f"eval_{name}_quartile{q}": n / 10 + q / 100
            for name in ("rewards/accuracies", "rewards/margins")
            for q in (1, 2, 3, 4)
        }
        for n in (1, 2)
    ]
    charts = history_charts(log)
    assert [chart.title for chart in charts] == ["Implicit accuracy by noise", "Reward margin by noise"]
    assert all("from the least noisy quartile to the noisiest: 0.21, 0.22, 0.23, 0.24" in chart.svg for chart in charts)
    assert (
        history_charts(
            [log[0] | {"eval_rewards/accuracies_quartile3": math.nan, "eval_rewards/margins_quartile1": math.inf}]
        )
        == []
    )


def test_scale_chart_needs_two_scales():
    sweep = ((1.0, comparison()), (0.0, comparison(tuned=0.5, low=0.0, high=0.0)))
    assert scale_chart(sweep[:1], percent=True) == ""
    assert "scales 0, 1" in scale_chart(sweep, percent=True)


def test_terminal_table_has_groups_and_ignores_markup():
    output = io.StringIO()
    rows = (
        comparison("[red]right[/red] rate", headline=True),
        comparison("diversity", verdict="worse", models=("sft", "tuned")),
    )
    Console(file=output, width=160).print(terminal_table(rows))
    first, against, second = (
        line for line in output.getvalue().splitlines() if "right" in line or "diversity" in line or "SFT" in line
    )
    assert "DPO against SFT" in against and "better" not in against and "│    SFT │    DPO │" in against
    assert "[red]right[/red] rate" in first and "+12.5 pts" in first and "better" in first
    assert "0.50 " in second and "+0.06 to +0.19" in second and "worse" in second

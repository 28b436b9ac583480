"""Edits through comparing and mining: the same text with another image to edit is another prompt everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from dpo_mm.config import CompareConfig, MineConfig, TrainConfig
from dpo_mm.data.image_files import encode_png, rgb_image
from dpo_mm.data.load_pairs import check_source_images
from dpo_mm.data.prompts import read_prompt_set
from dpo_mm.data.schema import load_pairs
from dpo_mm.evaluation import compare_images as comparing
from dpo_mm.evaluation import contact_sheet as contact_sheet_module
from dpo_mm.evaluation.contact_sheet import Example, contact_sheet
from dpo_mm.evaluation.image_sampling import ImageRequest, ImageSampler, SamplingPlan, sampling_plan, score_images
from dpo_mm.evaluation.image_store import ImageFiles, ImageStore
from dpo_mm.evaluation.saved_comparison import load_comparison
from dpo_mm.judges.score_checks import image_scores
from dpo_mm.labels import export, fresh_samples
from dpo_mm.labels.pairs import open_pairs
from dpo_mm.labels.training_worker import _prompts_of
from dpo_mm.mining import mine_images as mining
from dpo_mm.mining import own_images
from dpo_mm.pages.gallery import saved_pair_html
from dpo_mm.pages.label_page import pair_html
from dpo_mm.pages.server import load_page
from dpo_mm.policies.families import load_policy
from dpo_mm.training import samples
from dpo_mm.training.encoding import encode
from tests.conftest import noise_image
from tests.contracts.families import BUILDERS, WORDS

JUDGE = "tests.unit.evaluation.test_edits:closeness"
PLAIN = object.__new__(StableDiffusionPipeline)
judged: list[tuple[str, float]] = []


def closeness(
    images: Sequence[Image.Image], prompts: Sequence[str], sources: Sequence[Sequence[Image.Image]]
) -> list[float]:
    mean = lambda image: float(np.asarray(image).mean())
    judged.extend((prompt, mean(source)) for prompt, (source,) in zip(prompts, sources, strict=True))
    return [-abs(mean(image) - mean(source)) for image, (source,) in zip(images, sources, strict=True)]


def lightness(
    images: Sequence[Image.Image], prompts: Sequence[str], sources: Sequence[Sequence[Image.Image]]
) -> list[float]:
    judged.extend((prompt, len(own)) for prompt, own in zip(prompts, sources, strict=True))
    return [float(np.asarray(image).mean()) for image in images]


closeness.takes_sources = lightness.takes_sources = True  # type: ignore[attr-defined]
LIGHTNESS = "tests.unit.evaluation.test_edits:lightness"


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_policy(str(BUILDERS["flux-kontext"].build(tmp_path_factory.mktemp("kontext"))), resolution=32)


@pytest.fixture
def prompts(tmp_path: Path, editor: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A list of one text with two images, and another text. Commands get the tiny editor."""
    rows = []
    for number, text in enumerate((WORDS[0], WORDS[0], WORDS[1])):
        noise_image(number).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"prompt": text, "image": f"{number}.png"}))
    (tmp_path / "edits.jsonl").write_text("\n".join(rows))
    for module in (comparing, mining):
        monkeypatch.setattr(module, "load_image_policy", lambda *_, **__: editor)
    judged.clear()
    return str(tmp_path / "edits.jsonl")


def config(editor: Any, prompts: str, folder: Path, **changes: Any) -> CompareConfig:
    values: dict[str, Any] = {"judges": (JUDGE,), "num_inference_steps": 1, "images_per_prompt": 2, **changes}
    return CompareConfig(editor.source, str(folder / "out"), prompts=prompts, **values)


def test_same_text_and_seed_with_another_image_is_another_image_and_score(
    editor: Any, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation that it catches: an image's key, or a score's, without the image to edit."""
    one, other, _ = (prompt.sources for prompt in read_prompt_set(prompts).prompts)
    settings, store = config(editor, prompts, tmp_path, batch_size=1), ImageStore(tmp_path / "images")
    plan = lambda *sources: SamplingPlan((WORDS[0],) * 2, (5, 5), 1, ("all",) * 2, sources=sources)
    both = ImageSampler(editor, settings, store).generate(plan(one, other), scale=0.0, label="base")
    assert both.plan.items[0] != both.plan.items[1]
    assert not np.array_equal(both.images[0], both.images[1])
    assert judged == [(WORDS[0], float(np.asarray(noise_image(n)).mean())) for n in (0, 1)]
    rows = [json.loads(line) for line in (tmp_path / "images" / "manifest.jsonl").read_text().splitlines()]
    assert [row["sources"] for row in rows] == [list(one.file_hashes), list(other.file_hashes)]
    again = ImageStore(tmp_path / "images")
    monkeypatch.setattr(ImageSampler, "_generate_batch", lambda *_: pytest.fail("generated again"))
    swapped = ImageSampler(editor, settings, again).generate(plan(other, one), scale=0.0, label="base")
    assert np.array_equal(swapped.images[0], both.images[1]) and len(judged) == 2
    assert swapped.scores[JUDGE].tolist() == both.scores[JUDGE][::-1].tolist()


def test_score_of_the_same_pixels_depends_on_the_image_to_edit(prompts: str, tmp_path: Path) -> None:
    """Mutation that it catches: a score's key without the image to edit."""
    one, other, _ = (prompt.sources for prompt in read_prompt_set(prompts).prompts)
    requests = [ImageRequest("text", 1, sources) for sources in (one, other)]
    files, store = ImageFiles([tmp_path / "2.png"] * 2), ImageStore(tmp_path / "images")
    scores = score_images(JUDGE, files, ["same"] * 2, requests, store)
    means = [float(np.asarray(noise_image(n)).mean()) for n in range(3)]
    assert scores.tolist() == [-abs(means[2] - means[0]), -abs(means[2] - means[1])]
    assert (
        score_images(JUDGE, files, ["same"] * 2, requests, ImageStore(tmp_path / "images")).tolist() == scores.tolist()
    )
    assert len(judged) == 2


def test_compare_counts_text_and_image_as_one_item_and_shows_the_source(
    editor: Any, prompts: str, tmp_path: Path
) -> None:
    """Mutation that it catches: clusters by text, which would be two."""
    result = comparing.compare_images(config(editor, prompts, tmp_path), title="t", command="c")
    assert result.comparisons[0].clusters == 3 and len(judged) == 6
    page = result.report.read_text()
    assert "The image to edit on the left, then base and tuned, from the same seed." in page
    assert page.count('<figure class="source"><figcaption>source</figcaption>') == 3


def test_page_shows_the_images_to_edit_of_a_saved_comparison(editor: Any, prompts: str, tmp_path: Path) -> None:
    """Mutation that it catches: sources that are not saved, or those of another prompt."""
    settings = config(editor, prompts, tmp_path, images_per_prompt=1)
    sampler = ImageSampler(editor, settings, ImageStore(tmp_path / "pictures"))
    for scale, label in ((0.0, "base"), (1.0, "tuned")):
        sampler.generate(sampling_plan(settings), scale=scale, label=label)
    (tmp_path / "metrics.json").write_text('{"comparisons": []}')
    pairs = load_comparison(tmp_path, judges=[]).pairs
    for number, pair in enumerate(pairs):
        (source,) = pair.sources
        assert source is not None and np.array_equal(np.asarray(Image.open(source)), np.asarray(noise_image(number)))
    html = saved_pair_html(pairs[0])
    assert (
        len(pairs) == 3
        and html.count("<img") == 3
        and html.index("image to edit") < html.index("base") < html.index("tuned")
    )
    assert pairs[0].sources[0] is not None
    copied = shutil.copytree(tmp_path, tmp_path / "copy")
    ImageStore(copied / "pictures").remove()
    assert not (copied / "pictures").exists()
    pairs[0].sources[0].unlink()
    assert saved_pair_html(load_comparison(tmp_path, judges=[]).pairs[0]).count("is missing or broken") == 1


@pytest.mark.slow
def test_several_images_to_edit_go_through_mining_labelling_and_comparing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It catches any step that drops the second image, swaps the two, or gives them to another prompt."""
    editor = load_policy(str(BUILDERS["qwen-image-edit"].build(tmp_path / "model")), resolution=32)
    for module in (comparing, mining, fresh_samples, own_images):
        monkeypatch.setattr(module, "load_image_policy", lambda *_, **__: editor)
    numbers, lines = {WORDS[0]: (1, 2), WORDS[1]: (3,)}, []
    for text, images in numbers.items():
        for number in images:
            noise_image(number).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"prompt": text, "images": [f"{number}.png" for number in images]}))
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    files, common = str(tmp_path / "edits.jsonl"), {"num_inference_steps": 2}

    def check(rows: Any) -> None:
        assert len(rows) >= 2
        for row in rows:
            shown = [rgb_image(cell) for cell in row["image_source"]]
            expected = [noise_image(number) for number in numbers[row["prompt"]]]
            assert [image.tobytes() for image in shown] == [image.tobytes() for image in expected]

    mined = mining.mine_images(
        MineConfig(editor.source, files, str(tmp_path / "mined"), LIGHTNESS, images_per_prompt=2, **common)
    )
    check(load_pairs(str(mined)))
    with pytest.raises(
        ValueError, match=r"mined: the text encoder of .* sees the images to edit, so random_flip is not"
    ):
        encode(editor, load_pairs(str(mined)), where="mined", cache=tmp_path, flipped=True)
    assert [len(prompt.sources) for prompt in read_prompt_set(str(mined)).prompts] == [2, 1]
    own = MineConfig(editor.source, str(mined), str(tmp_path / "own"), chosen="own", **common)
    check(load_pairs(str(own_images.mine_own_images(own))))

    (tmp_path / "other").symlink_to(editor.source)
    models = [editor.source, str(tmp_path / "other")]
    folder = fresh_samples.generate_samples(
        models, files, tmp_path / "samples", max_prompts=None, guidance_scale=1.0, **common
    )
    pairs = open_pairs(str(folder))
    check(pairs)
    check(
        [
            {"prompt": one.text, "image_source": [encode_png(i) for i in one.sources]}
            for one in read_prompt_set(_prompts_of(pairs, tmp_path)).prompts
        ]
    )
    assert all(name in pair_html(pairs[0], 0, "ada", swapped=False) for name in ("image 1 to edit", "image 2 to edit"))
    vote = {"preference": "a", "p_a": 1.0, "votes_a": 1, "votes_b": 0}
    assert (
        export._write_rows((export._labelled(row, vote) or {} for row in pairs), tmp_path / "labels.parquet", pairs)
        == 2
    )
    check(load_pairs(str(tmp_path / "labels.parquet")))

    settings = config(editor, files, tmp_path, judges=(LIGHTNESS,), images_per_prompt=1, batch_size=2, **common)
    judged.clear()
    page = comparing.compare_images(settings, title="t", command="c").report.read_text()
    assert page.count('<figure class="source">') == 3
    assert judged == [(WORDS[0], 2), (WORDS[1], 1)]


def test_saved_comparison_pairs_base_and_tuned_of_the_same_image_to_edit(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "pictures")
    for number, (side, source) in enumerate((s, h) for s in ("base", "tuned") for h in ("one", "other")):
        store.add({"side": side, "sources": [source]}, [("p", 1, noise_image(number))], label=side)
        digest = list(store.rows.values())[-1]["sha256"]
        store.add_scores("aesthetic", "card", [(digest, "p", source, number / 10)])
    (tmp_path / "metrics.json").write_text('{"comparisons": [{"judge": "aesthetic", "headline": true}]}')
    pairs = load_comparison(tmp_path).pairs
    assert [pair.scores["aesthetic"] for pair in pairs] == [(0.0, 0.2), (0.1, 0.3)]


def test_contact_sheet_has_a_row_of_sources() -> None:
    image, source = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    plain = contact_sheet([Example("p", "c", image, image)], tile=64)
    sheet = contact_sheet([Example("p", "c", image, image, sources=(source,))], tile=64)
    assert sheet.height == plain.height + 74
    pixels = np.asarray(sheet)
    assert [tuple(pixels[10 + 74 * row + 32, 64 + 32]) for row in range(3)] == [(0, 0, 255), (255, 0, 0), (255, 0, 0)]


def test_mined_rows_have_the_image_that_their_pair_edits(editor: Any, prompts: str, tmp_path: Path) -> None:
    settings = MineConfig(editor.source, prompts, str(tmp_path / "mined"), JUDGE, images_per_prompt=3, num_inference_steps=1)  # fmt: skip
    rows = load_pairs(str(mining.mine_images(settings)))
    assert rows["prompt"] == [WORDS[0], WORDS[0], WORDS[1]] and len(set(rows["id"])) == len(set(rows["group_id"])) == 3
    for number, row in enumerate(rows):
        assert np.array_equal(rgb_image(row["image_source"]), noise_image(number))
    check_source_images(rows, "mined", pipeline="FluxKontextPipeline", is_image_editing=True)
    before = mining.ingredients(settings, read_prompt_set(prompts).prompts)["prompts"]
    noise_image(9).save(tmp_path / "1.png")
    assert mining.ingredients(settings, read_prompt_set(prompts).prompts)["prompts"] != before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"edits.jsonl', prompt 'x': no image\. FluxKontextPipeline edits an image"),
        ({"images": ["0.png", "1.png"]}, r"prompt 'x': 2 images to edit, but FluxKontextPipeline takes 1"),
        ({"image": "half.png"}, r"edits.jsonl, line 4: image half.png cannot be read"),
    ],
)
def test_prompt_that_does_not_fit_is_refused_before_anything_is_generated(
    row: dict[str, Any], message: str, editor: Any, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode_png(noise_image(0))
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with Path(prompts).open("a") as file:
        file.write("\n" + json.dumps({"prompt": "x", **row}))
    monkeypatch.setattr(type(editor), "sample", lambda *_, **__: pytest.fail("generated"))
    with pytest.raises(ValueError, match=message):
        comparing.compare_images(config(editor, prompts, tmp_path), title="t", command="c")
    settings = MineConfig(editor.source, prompts, str(tmp_path / "mined"), JUDGE)
    with pytest.raises(ValueError, match=message):
        mining.mine_images(settings)


def test_fresh_images_to_label_have_their_images_to_edit(
    editor: Any, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It catches the same source for all prompts, and seeds that ignore it."""
    monkeypatch.setattr(fresh_samples, "load_image_policy", lambda *_, **__: editor)
    (tmp_path / "other").symlink_to(editor.source)
    models, settings = [editor.source, str(tmp_path / "other")], {"num_inference_steps": 1, "guidance_scale": 2.5}
    folder = fresh_samples.generate_samples(models, prompts, tmp_path / "samples", max_prompts=None, **settings)
    rows = open_pairs(str(folder))
    specs = read_prompt_set(prompts).prompts
    assert [Image.open(folder / f"000{n}.png").tobytes() for n in (1, 2, 3)] == [
        spec.sources[0].tobytes() for spec in specs
    ]
    assert rows["prompt"] == [spec.text for spec in specs] and all(rows["image_source"])
    again = read_prompt_set(_prompts_of(rows, tmp_path)).prompts
    assert [(spec.text, spec.sources[0].tobytes()) for spec in again] == [
        (s.text, s.sources[0].tobytes()) for s in specs
    ]
    with pytest.raises(ValueError, match="which StableDiffusionPipeline does not take"):
        monkeypatch.setattr(
            fresh_samples,
            "load_image_policy",
            lambda *_, **__: SimpleNamespace(pipe=PLAIN, is_image_editing=False, edits_optionally=False),
        )
        fresh_samples.generate_samples(models, prompts, tmp_path / "refused", max_prompts=None, **settings)


def test_samples_of_a_training_run_edit_their_images(editor: Any, prompts: str, tmp_path: Path) -> None:
    """It catches samples that get another prompt's image to edit, and a strip without it."""
    settings: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 2.5, "sample_judges": (JUDGE,)}
    run = TrainConfig(editor.source, "-", str(tmp_path), sample_prompts=prompts, **settings)
    callback = samples.sample_callback(editor, run)
    assert callback is not None
    callback._sample(0)
    spec = read_prompt_set(prompts).prompts
    assert judged == [(one.text, float(np.asarray(one.sources[0]).mean())) for one in spec]
    strip = Image.open(tmp_path / "samples" / "strip.png")
    expected = contact_sheet_module._fit(spec[1].sources[0], 176)
    assert strip.crop((10, 34 + 212 + 20, 186, 34 + 212 + 196)).tobytes() == expected.tobytes()


def test_page_edits_the_uploaded_image(editor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It catches a page that generates without the upload, or scores without it."""
    import gradio

    page = load_page("compare_images")
    monkeypatch.setattr(page, "load_image_policy", lambda *_, **__: editor)
    model = page.load(editor.source, "tuned", [JUDGE], precision="fp32")
    controls = (WORDS[0], 3, 1, 2.5, 1.0)
    with pytest.raises(gradio.Error, match="Upload an image first"):
        next(page.compare(model, *controls, ()))
    shown = []
    for number in (0, 1):
        sources, html = page.use_upload(encode_png(noise_image(number)), (b"another",), several=False)
        shown.append(list(page.compare(model, *controls, sources))[-1][1])
        assert "image to edit" in html and "no score" not in shown[-1]
    assert shown[0] != shown[1] and model.edits
    with pytest.raises(gradio.Error, match="can’t be used"):
        page.use_upload(b"words", (), several=False)
    (one,), _ = page.use_upload(encode_png(noise_image(0)), (), several=True)
    both, html = page.use_upload(encode_png(noise_image(1)), (one,), several=True)
    assert both[0] == one and len(both) == 2 and html.index("image 1 to edit") < html.index("image 2 to edit")


def test_list_with_images_is_refused_by_a_model_that_takes_none(prompts: str, tiny_model: str, tmp_path: Path) -> None:
    from dpo_mm.policies.diffusion.prompt_sources import check_prompt_sources

    plan, plain = sampling_plan(CompareConfig(tiny_model, "o", prompts=prompts)), load_policy(tiny_model)
    with pytest.raises(ValueError, match="has an image to edit, which StableDiffusionPipeline does not take"):
        check_prompt_sources(plain, prompts, plan.prompts, plan.sources)
    check_prompt_sources(plain, prompts, plan.prompts, ())


def test_judge_of_edits_needs_the_images_to_edit() -> None:
    with pytest.raises(ValueError, match="scores edits, so it needs the image to edit of every prompt"):
        image_scores(JUDGE, [noise_image(0)], ["x"])
    assert image_scores(JUDGE, [noise_image(0)], ["x"], [[noise_image(0)]]).tolist() == [0.0]

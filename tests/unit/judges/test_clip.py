"""CLIP judges on small random towers: formulas against independent arithmetic, files in their published layout."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers as hf
from PIL import Image

from dpo_mm.config import MineConfig, RelabelConfig
from dpo_mm.data.schema import load_pairs
from dpo_mm.judges import (
    JUDGES,
    JudgeName,
    better_of,
    clip_towers,
    judge_card,
    load_judge,
    metric_of,
    parse_judge_name,
    self_test,
    weights,
)
from dpo_mm.judges import clip as clip_judges
from dpo_mm.judges.clip import head
from dpo_mm.judges.clip_towers import OPENAI, Preprocessing, pooled, prepare
from dpo_mm.judges.relabel import relabel
from dpo_mm.judges.weights import in_batches, load_weights, read_state
from dpo_mm.mining.mine_images import mine_images
from tests.contracts.families.words import clip_tokenizer as tokenizer

SIDE, WIDTH = 32, 24
PROMPTS = ["a red circle", "two blue squares left of a green star", "a red circle"]
MEAN, STD = (np.array(part, dtype=np.float64) for part in OPENAI)


def random_image(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


IMAGES = [random_image(0), random_image(1, (40, 64)), random_image(2, (32, 32))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Name of a tiny open_clip architecture, registered with a config file as open_clip's own are."""
    name = "ViT-tiny-dpo-mm"
    file = tmp_path_factory.mktemp("architecture") / f"{name}.json"
    vision = {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    file.write_text(json.dumps({"embed_dim": WIDTH, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(file)
    yield name


@pytest.fixture(scope="module")
def model(tiny: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = open_clip.create_model(tiny, pretrained=None)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(30))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half-precision weights under `state_dict`, as in HPS_v2.1_compressed.pt."""
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 3, "state_dict": {k: v.half() for k, v in model.state_dict().items()}}, path)
    return path


def pixels(image: Image.Image, fit: str) -> np.ndarray:
    """Pixels of a tower, (3, edge, edge), with only Pillow and numpy. HPS's resize uses torch's bicubic."""
    width, height = image.size
    if fit == "shortest":
        scale = SIDE / min(width, height)
        small = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        left, top = round((small.width - SIDE) / 2), round((small.height - SIDE) / 2)
        values = np.asarray(small.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255
    else:
        scale = SIDE / max(width, height)
        inner = round(height * scale), round(width * scale)
        values = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        if scale != 1:
            values = torch.nn.functional.interpolate(values, inner, mode="bicubic", antialias=True)
        canvas = np.zeros((SIDE, SIDE, 3))
        top, left = (SIDE - inner[0]) // 2, (SIDE - inner[1]) // 2
        canvas[top : top + inner[0], left : left + inner[1]] = values[0].permute(1, 2, 0).numpy()
        values = canvas
    return ((values - MEAN) / STD).transpose(2, 0, 1)


def cosines(model: torch.nn.Module, fit: str) -> np.ndarray:
    """Cosines of one image and one prompt at a time, in numpy from the unnormalised features."""
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        with torch.no_grad():
            seen = model.encode_image(torch.from_numpy(pixels(image, fit)).float()[None])[0].double().numpy()
            read = model.encode_text(open_clip.SimpleTokenizer()([prompt]))[0].double().numpy()
        expected.append(seen @ read / np.sqrt((seen @ seen) * (read @ read)))
    return np.array(expected)


@pytest.mark.parametrize("image", [*IMAGES, random_image(3, (300, 20)), random_image(4, (28, 28))])
@pytest.mark.parametrize("fit", ["shortest", "longest"])
def test_prepare_matches_pillow_and_numpy(image: Image.Image, fit: str) -> None:
    ours = prepare(image, Preprocessing(SIDE, fit)).numpy()  # type: ignore[arg-type]
    np.testing.assert_allclose(ours, pixels(image, fit), atol=2e-6)


def test_prepare_matches_open_clip() -> None:
    for mode in ("shortest", "squash"):
        theirs = open_clip.image_transform(SIDE, is_train=False, mean=OPENAI[0], std=OPENAI[1], resize_mode=mode)
        for image in IMAGES:
            assert torch.equal(prepare(image, Preprocessing(SIDE, mode)), theirs(image))  # type: ignore[arg-type]


def test_prepare_longest_edge_is_antialiased() -> None:
    large = random_image(5, (256, 256))
    values = torch.from_numpy(np.asarray(large, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    rough = torch.nn.functional.interpolate(values, (SIDE, SIDE), mode="bicubic", antialias=False)[0]
    ours = (
        prepare(large, Preprocessing(SIDE, "longest")) * torch.tensor(STD)[:, None, None]
        + torch.tensor(MEAN)[:, None, None]
    )
    assert (ours - rough).abs().mean() > 0.02


def test_prepare_flattens_transparency_on_white() -> None:
    clear = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0))
    assert torch.equal(
        prepare(clear, Preprocessing(SIDE)), prepare(Image.new("RGB", (SIDE, SIDE), "white"), Preprocessing(SIDE))
    )


def test_clip_score_equals_2_5_times_positive_cosine(tiny: str, model: torch.nn.Module, tmp_path: Path) -> None:
    expected = cosines(model, "shortest")
    for sign in (1, -1):
        state = {k: sign * v if k == "text_projection" else v for k, v in model.state_dict().items()}
        torch.save(state, tmp_path / f"whole{sign}.pt")
        scores = load_judge(f"clip_score:{tiny}@{tmp_path / f'whole{sign}.pt'}")(IMAGES, PROMPTS)
        np.testing.assert_allclose(scores, 2.5 * np.maximum(sign * expected, 0), atol=2e-6)


def test_hps_equals_cosine_with_half_precision_weights(tiny: str, model: torch.nn.Module, checkpoint: Path) -> None:
    halved = open_clip.create_model(tiny, pretrained=None).eval()
    halved.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    expected = cosines(halved, "longest")
    for version in ("hps_v2", "hps_v2.1"):
        scores = load_judge(f"{version}:{tiny}@{checkpoint}")(IMAGES, PROMPTS)
        np.testing.assert_allclose(scores, expected, atol=2e-6)
    assert np.abs(expected - cosines(halved, "shortest")).max() > 1e-3, "the two kinds of resize must differ here"


def test_laion_head_equals_linear_layers_on_unit_vector(tiny: str, model: torch.nn.Module, tmp_path: Path) -> None:
    widths, rng = (WIDTH, 64, 32, 16, 8, 1), np.random.default_rng(1)
    layers = [(rng.normal(size=(b, a)) / math.sqrt(a), rng.normal(size=b)) for a, b in itertools.pairwise(widths)]
    places = (0, 2, 4, 6, 7)
    state = {}
    for place, (weight, bias) in zip(places, layers, strict=True):
        state |= {f"layers.{place}.weight": torch.tensor(weight), f"layers.{place}.bias": torch.tensor(bias)}
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save({k: v.float() for k, v in state.items()}, folder / "sac+logos+ava1-l14-linearMSE.pth")
    place = folder / "open_clip" / tiny / "open_clip_model.safetensors"
    place.parent.mkdir(parents=True)
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, place)
    tower = clip_towers.open_clip_tower(tiny, place, Preprocessing(SIDE), torch.device("cpu"))
    embeddings = tower.embed_images(IMAGES)
    values = embeddings.double().numpy()
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    for weight, bias in layers:
        values = values @ weight.T + bias
    scores = head(embeddings, clip_judges.read_head(folder / "sac+logos+ava1-l14-linearMSE.pth"))
    np.testing.assert_allclose(scores.numpy(), values[:, 0], atol=1e-5)
    np.testing.assert_allclose(load_judge(f"laion_aesthetic:{tiny}@{folder}")(IMAGES, PROMPTS), values[:, 0], atol=1e-5)
    assert torch.allclose(head(3 * embeddings, {k: v.float() for k, v in state.items()}), scores, atol=1e-5)


def test_laion_golden_values_are_compared_only_for_the_published_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths, rng = (768, 8, 4, 4, 2, 1), np.random.default_rng(2)
    layers = [(rng.normal(size=(b, a)) / 8, rng.normal(size=b)) for a, b in itertools.pairwise(widths)]
    path, values = tmp_path / "aesthetic-model.pth", np.stack([np.zeros(768), np.full(768, 768**-0.5), np.eye(768)[0]])
    state = {}
    for place, (weight, bias) in zip(clip_judges.HEAD_LAYERS, layers, strict=True):
        state |= {f"layers.{place}.weight": torch.tensor(weight), f"layers.{place}.bias": torch.tensor(bias)}
        values = values @ weight.T + bias
    torch.save(state, path)
    name = f"laion_aesthetic@{path}"
    card = {"weights": {path.name: {"published": False}}}
    assert self_test.check_laion_head(name, card).passed is None
    card["weights"][path.name]["published"] = True
    assert self_test.check_laion_head(name, card).passed is False
    monkeypatch.setattr(self_test, "HEAD_VALUES", dict(zip("abc", values[:, 0].tolist(), strict=True)))
    assert self_test.check_laion_head(name, card).passed is True


def test_read_head_other_architecture_is_rejected(tmp_path: Path) -> None:
    torch.save({"layers.0.weight": torch.ones(1, 2), "layers.1.weight": torch.ones(1)}, tmp_path / "relu.pth")
    with pytest.raises(ValueError, match=r"layers\.0\.bias is missing\. Expected LAION's linear head"):
        clip_judges.read_head(tmp_path / "relu.pth")


@pytest.fixture(scope="module")
def pick_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny CLIP and its tokenizer, in the layout of PickScore's repository."""
    folder = tmp_path_factory.mktemp("pick")
    words = tokenizer(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = {**sizes, **ids, "vocab_size": len(words), "max_position_embeddings": 16}
    vision = {**sizes, "image_size": SIDE, "patch_size": 8}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_pick_score_equals_scaled_cosine_of_features_projected_once(pick_folder: Path) -> None:
    model = hf.CLIPModel.from_pretrained(pick_folder).eval()
    words = hf.AutoTokenizer.from_pretrained(pick_folder)
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        ids = words([prompt], return_tensors="pt")
        with torch.no_grad():
            seen = model.visual_projection(
                model.vision_model(torch.from_numpy(pixels(image, "shortest")).float()[None]).pooler_output
            )[0]
            read = model.text_projection(model.text_model(**ids).pooler_output)[0]
        one, other = seen.double().numpy(), read.double().numpy()
        expected.append(100 * one @ other / np.sqrt((one @ one) * (other @ other)))
    scores = load_judge(f"pick_score@{pick_folder}")(IMAGES, PROMPTS)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    assert max(expected) - min(expected) > 0.1
    assert torch.equal(pooled(torch.ones(2)), torch.ones(2))


def test_hps_scores_do_not_depend_on_the_batch(tiny: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = load_judge(f"hps_v2.1:{tiny}@{checkpoint}")
    together = judge(IMAGES, PROMPTS)
    apart = [judge([image], [prompt])[0] for image, prompt in zip(IMAGES, PROMPTS, strict=True)]
    np.testing.assert_allclose(together, apart, atol=1e-6)
    assert together == judge(IMAGES, PROMPTS)
    monkeypatch.setattr(clip_towers, "BATCH", 2)
    np.testing.assert_allclose(judge(IMAGES, PROMPTS), together, atol=1e-6)


def test_in_batches_out_of_memory_halves_the_batch() -> None:
    sizes: list[int] = []

    def judge(batch: list[int]) -> list[int]:
        if len(batch) > 3:
            raise torch.cuda.OutOfMemoryError
        sizes.append(len(batch))
        return [n + 1 for n in batch]

    assert in_batches(judge, list(range(11)), 8) == list(range(1, 12)) and max(sizes) <= 3  # type: ignore[arg-type]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        in_batches(lambda batch: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError), [1], 4)


def test_tower_weights_load_once_at_the_first_score(
    tiny: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip_towers.open_clip_tower.cache_clear()
    reads: list[Path] = []
    monkeypatch.setattr(
        clip_towers, "load_weights", lambda model, path: reads.append(path) or load_weights(model, path)
    )
    judge = load_judge(f"hps_v2:{tiny}@{checkpoint}")
    assert not reads, "load_judge must not load weights"
    for _ in range(2):
        judge(IMAGES[:1], PROMPTS[:1])
    load_judge(f"hps_v2.1:{tiny}@{checkpoint}")(IMAGES[:1], PROMPTS[:1])
    assert reads == [checkpoint]


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("harmed"),)  # type: ignore[return-value]


def test_read_state_rejects_pickles_without_running_code(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"logit_scale": Harm()}}, tmp_path / "harmful.pt")
    with pytest.raises(ValueError, match=r"harmful\.pt: not readable as plain weights"):
        load_judge(f"clip_score:{tiny}@harmful.pt")(IMAGES[:1], PROMPTS[:1])
    assert not (tmp_path / "harmed").exists()
    torch.save({"state_dict": {"logit_scale": 3.0}}, tmp_path / "number.pt")
    with pytest.raises(ValueError, match="'logit_scale' is not a tensor"):
        read_state(tmp_path / "number.pt")


def test_load_weights_of_another_model_is_rejected(tiny: str, checkpoint: Path, tmp_path: Path) -> None:
    state = read_state(checkpoint)
    torch.save({**state, "attn_mask": torch.ones(1)}, tmp_path / "old.pt")
    assert load_judge(f"hps_v2:{tiny}@{tmp_path / 'old.pt'}")(IMAGES[:1], PROMPTS[:1])
    for change, message in (
        ({"visual.odd": torch.ones(1)}, "has the unexpected visual.odd"),
        ({"logit_scale": torch.ones(2)}, "has another shape of logit_scale"),
    ):
        torch.save({**state, **change}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=message):
            load_weights(open_clip.create_model(tiny, pretrained=None), tmp_path / "other.pt")
    torch.save({k: v for k, v in state.items() if k != "logit_scale"}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="lacks logit_scale"):
        load_weights(open_clip.create_model(tiny, pretrained=None), tmp_path / "other.pt")


@pytest.mark.parametrize("judge", ["hps_v2.1", "pick_score", "laion_aesthetic", "clip_score"])
def test_missing_weights_error_names_file_and_path(judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_MM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=rf"needs .* of huggingface\.co/.*Save it as {tmp_path}/weights.*@hub"):
        load_judge(judge)
    with pytest.raises(ValueError, match="no such file or folder"):
        load_judge(f"{judge}@{tmp_path}/nothing")


def test_find_weights_uses_the_weights_folder(
    tiny: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_MM_WEIGHTS", str(tmp_path))
    place = tmp_path / "xswu" / "HPSv2" / "HPS_v2_compressed.pt"
    place.parent.mkdir(parents=True)
    place.write_bytes(checkpoint.read_bytes())
    assert load_judge(f"hps_v2:{tiny}")(IMAGES[:1], PROMPTS[:1])


def test_find_weights_downloads_only_with_hub_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    monkeypatch.setenv("DPO_MM_WEIGHTS", str(tmp_path / "weights"))
    requests: list[str] = []

    def fetch(repo: str, file: str) -> str:
        requests.append(f"{repo}/{file}")
        if file == "aesthetic-model.pth":
            raise EntryNotFoundError("gone")
        (tmp_path / file).touch()
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert weights.find_weights(clip_judges.LAION_HEAD, JudgeName("laion_aesthetic", "", "hub")).name.startswith(
        "sac+logos"
    )
    assert (
        weights.find_weights(clip_judges.PICK_SCORE, JudgeName("pick_score", "", "hub"))
        == tmp_path / "model.safetensors"
    )
    assert [name.rpartition("/")[2] for name in requests[2:]] == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ]

    def offline(repo: str, file: str) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        ValueError,
        match=r"the hub cannot be reached\. Download HPS_v2_compressed\.pt of huggingface\.co/xswu/HPSv2 on another machine",
    ):
        load_judge("hps_v2@hub")


def test_clip_score_missing_tokenizer_fails_at_once_without_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[object]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "weights.safetensors").touch()
    name = f"clip_score:ViT-B-16-SigLIP/webli@{tmp_path / 'weights.safetensors'}"
    with pytest.raises(
        ValueError, match=r"the tokenizer of ViT-B-16-SigLIP is not in the hub's cache.*`hf download timm"
    ):
        load_judge(name)
    snapshot = tmp_path / "hub" / "models--timm--ViT-B-16-SigLIP" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer_config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    with pytest.raises(ValueError, match="the text tower of ViT-B-16-SigLIP cannot be opened"):
        load_judge(name)(IMAGES[:1], PROMPTS[:1])
    assert not no_network


def test_device_follows_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_MM_DEVICE", "cuda:3")
    assert weights.device() == torch.device("cuda", 3)
    monkeypatch.delenv("DPO_MM_DEVICE")
    assert weights.device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_several_clip_judges_mine_and_relabel(
    tiny: str, checkpoint: Path, pick_folder: Path, tiny_model: str, pairs: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    hps, pick, guard = f"hps_v2.1:{tiny}@{checkpoint}", f"pick_score@{pick_folder}", f"clip_score:{tiny}@{checkpoint}"
    how = {"images_per_prompt": 4, "num_inference_steps": 1, "output_dir": str(tmp_path / "mined")}
    mined = load_pairs(
        str(mine_images(MineConfig(tiny_model, str(tmp_path / "prompts.txt"), judges=(hps, pick), guards=guard, **how)))
    )
    assert len(mined) and set(mined["axis"]) == {f"{hps}+{pick}"}
    for row in mined:
        better, worse = ("a", "b") if row["preference"] == "a" else ("b", "a")
        sides = [row[f"image_{side}"] for side in (better, worse)]
        first, second = load_judge(guard)(sides, [row["prompt"]] * 2)
        assert first >= second - 1e-6
    done = relabel(RelabelConfig(pairs, (hps, pick, guard), str(tmp_path / "new.parquet"), scale="labels"))
    assert done is not None and [one["card"]["name"] for one in done.summary["judges"]] == [hps, pick, guard]


def test_judge_card_contains_weights_formula_and_versions(tiny: str, checkpoint: Path, pick_folder: Path) -> None:
    import hashlib

    card = judge_card(f"hps_v2.1:{tiny}@{checkpoint}")
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert card["weights"] == {checkpoint.name: {"repo": "xswu/HPSv2", "sha256": digest, "published": False}}
    assert card["formula"] == "cos(image, prompt)" and "antialiased" in card["preprocessing"]
    assert card["versions"]["open_clip_torch"] == open_clip.__version__ and card["model"] == tiny
    assert card["better"] == "higher" and card["metric"] == f"HPS v2.1, cos ({tiny})"
    assert "published" in judge_card(f"pick_score@{pick_folder}")["weights"]["model.safetensors"]
    plain = judge_card("aesthetic")
    assert plain["function"] == "dpo_mm.judges.aesthetic:aesthetic" and len(plain["code_sha256"]) == 64
    assert json.loads(json.dumps([card, plain])) == [card, plain]


def test_parse_judge_name_splits_judge_model_and_location() -> None:
    assert parse_judge_name("clip_score:ViT-B-32/openai@/w/a.pt") == ("clip_score", "ViT-B-32/openai", "/w/a.pt")
    assert parse_judge_name("hps_v2.1@hub") == ("hps_v2.1", "", "hub") and parse_judge_name("aesthetic") == (
        "aesthetic",
        "",
        "",
    )
    assert parse_judge_name("aesthetic:score") is None and parse_judge_name("mine:score") is None
    assert metric_of("mine:score") == "score" and better_of("clip_score:ViT-B-32/openai") == "higher"
    assert sum(judge.needs_model and not judge.by_rule for judge in JUDGES.values()) == 21
    with pytest.raises(ValueError, match="has no model 'ViT-B-3'; did you mean"):
        load_judge("clip_score:ViT-B-3")
    with pytest.raises(ValueError, match="no weights 'opena' of ViT-B-32; did you mean 'openai'"):
        load_judge("clip_score:ViT-B-32/opena")
    with pytest.raises(ValueError, match=r"'ViT-B-32' names no weights\. Use"):
        load_judge("clip_score:ViT-B-32")
    with pytest.raises(ValueError, match="compares two images and does not score one"):
        load_judge("vlm_prefers:model")

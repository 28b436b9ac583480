"""The key of stored work contains everything that decides its content, for every kind of stored work."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from dpo_mm.config import (
    CompareConfig,
    CompareResponsesConfig,
    JudgeConfig,
    MineConfig,
    MineResponsesConfig,
    RelabelConfig,
    TrainConfig,
)
from dpo_mm.data.prompts import PromptSpec
from dpo_mm.data.questions import Question
from dpo_mm.data.row_digest import digest
from dpo_mm.data.schema import load_pairs, make_image_rows, make_response_rows
from dpo_mm.evaluation import finished_comparison, image_sampling, response_sampling
from dpo_mm.evaluation.image_store import ImageStore
from dpo_mm.files.content_key import INGREDIENTS, content_hash, library_versions
from dpo_mm.files.outputs import OutputKind, output_folder, settings_of
from dpo_mm.judges import judge_digests, model_judge, relabel, scoring
from dpo_mm.labels import fresh_samples
from dpo_mm.mining import mine_images, mine_responses
from dpo_mm.policies.families import load_policy, model_content
from dpo_mm.policies.lora_layers import lora_layers, train_attached
from dpo_mm.policies.vlm import served
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.training import encoding, reference_cache, response_rows
from dpo_mm.training.checkpoints import check_same_content
from tests.conftest import noise_image
from tests.contracts import tiny_vlms

Change = Callable[[SimpleNamespace], object]
JUDGE = (
    "def red(images, prompts):\n    return [1.0 for _ in images]\n\n\ndef right(responses, truths):\n    return []\n"
)


@pytest.fixture
def world(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Inputs of stored work, all of which a test may change."""
    model, adapter, images = tmp_path / "model", tmp_path / "adapter", tmp_path / "images"
    shutil.copytree(tiny_model, model)
    for folder in (adapter, images):
        folder.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 8}')
    for number in range(2):
        noise_image(number).save(images / f"{number}.png")
    (tmp_path / "key_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "key_judge", raising=False)
    cells = {f"image_{side}": {"bytes": None, "path": str(images / f"{n}.png")} for n, side in enumerate("ab")}
    make_image_rows([{"prompt": "a", "preference": "a", "p_a": 0.9, **cells}]).to_parquet(str(tmp_path / "p.parquet"))
    yield SimpleNamespace(
        folder=tmp_path, model=model, adapter=adapter, image=images / "0.png", images=images, patch=monkeypatch,
        judge=tmp_path / "key_judge.py", prompts=["a red square"], precision="fp32", sizes=((32, 32),), steps=2,
        pairs=str(tmp_path / "p.parquet"), guidance=5.0, limit=8, temperature=0.0, seed=0, scale=1.0, truth="yes",
    )  # fmt: skip
    library_versions.cache_clear()


def flip(path: Path) -> None:
    """Change one byte of a file and leave its size and time as they are."""
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-3] ^= 1
    path.write_bytes(data)
    __import__("os").utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def other_version(w: SimpleNamespace) -> None:
    version = importlib.metadata.version
    w.patch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "tokenizers" else version(name))
    library_versions.cache_clear()


def on_gpu(w: SimpleNamespace) -> None:
    w.patch.setattr(type(w.policy), "device", property(lambda policy: torch.device("cuda")))
    w.patch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def put(**values: Any) -> Change:
    return lambda w: vars(w).update(values)


def add(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.flatten()[:1].add_(1e-3)


def questions(w: SimpleNamespace) -> list[Question]:
    return [Question("q", (Image.open(w.image).convert("RGB"),), "what?", w.truth, "all")]


def image_policy(w: SimpleNamespace) -> Any:
    w.policy = getattr(w, "policy", None) or load_policy(str(w.model))
    return w.policy


def text_policy(w: SimpleNamespace) -> Any:
    w.policy = getattr(w, "policy", None) or VisionLanguage(*tiny_vlms.build("llama"), "m")
    return w.policy


def encoded_pairs(w: SimpleNamespace) -> Any:
    return encoding._key(image_policy(w), digest(load_pairs(w.pairs)), w.sizes, w.precision)


def reference(w: SimpleNamespace) -> Any:
    row = {"id": "a", "ids": torch.tensor([1, 2, w.limit])}
    return reference_cache.frozen_output_key("reference log-probs", text_policy(w), [row], w.precision)


def features(w: SimpleNamespace) -> Any:
    policy, row = text_policy(w), {"id": "a", "ids": torch.tensor([1, 2, w.limit])}
    return reference_cache.frozen_output_key("vision features", policy, [row], policy.encoding_fingerprint())


def start_at_an_adapter(w: SimpleNamespace) -> None:
    w.policy.prepare(TrainConfig("m", "p", "o", beta=0.1))
    train_attached(w.policy.model)


def adapt_text_encoder(w: SimpleNamespace) -> None:
    encoder = w.policy.pipe.text_encoder
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), encoder)


def lengths(w: SimpleNamespace) -> Any:
    config = TrainConfig("m", "p.parquet", "out", max_length=w.limit + 20)
    return response_rows.lengths_path(text_policy(w), config, w.folder, content=w.truth)


def mined_images(w: SimpleNamespace) -> Any:
    config = MineConfig(
        str(w.model),
        "p.txt",
        "out",
        "key_judge:red",
        str(w.adapter),
        precision=w.precision,
        num_inference_steps=w.steps,
    )
    return mine_images.ingredients(config, [PromptSpec(text, "all") for text in w.prompts])


def mined_responses(w: SimpleNamespace) -> Any:
    config = MineResponsesConfig(
        str(w.model), "q.jsonl", "out", "key_judge:right", adapter=str(w.adapter), precision=w.precision
    )
    return mine_responses.ingredients(config, questions(w))


def scores(w: SimpleNamespace) -> Any:
    config = JudgeConfig("key_judge:red", str(w.images), "s.parquet", shard_size=w.steps)
    return scoring.ingredients(config, *scoring.read_images(w.pairs, None)), scoring.ingredients(
        config, [scoring.ImageToScore("0.png", w.prompts[0], w.image)], None
    )


def relabelled(w: SimpleNamespace) -> Any:
    config = RelabelConfig(w.pairs, ("key_judge:red",), "new.parquet", shard_size=w.steps)
    return relabel.ingredients(config, load_pairs(w.pairs))


def compared_image(w: SimpleNamespace) -> Any:
    config = CompareConfig(str(w.model), "p.txt", "out", num_inference_steps=w.steps, guidance_scale=w.guidance)
    sampler = image_sampling.ImageSampler(image_policy(w), config, ImageStore(w.folder / "store"))
    settings = {**sampler.settings(w.scale), "batch": content_hash(list(w.prompts))}
    return ImageStore.key(settings, w.prompts[0], w.seed)


def compared_response(w: SimpleNamespace) -> Any:
    config = CompareResponsesConfig(
        "m", "q", "out", max_new_tokens=w.limit, temperature=w.temperature, seed=w.seed, precision=w.precision
    )
    settings = response_sampling.generation_settings(text_policy(w), config, base=False)
    return response_sampling._keys(settings, questions(w))[0]


def served_response(w: SimpleNamespace) -> Any:
    config = CompareResponsesConfig(
        "m", "q", "out", str(w.adapter), max_new_tokens=w.limit, server="http://127.0.0.1/v1", served_tuned=w.truth
    )
    decoding = served.Decoding(w.temperature, w.seed)
    return served.response_keys(config, w.truth, questions(w), [decoding])[0, decoding]


def judge_reply(w: SimpleNamespace) -> Any:
    return model_judge.reply_key(w.truth, [{"role": "user", "content": w.prompts[0]}])


def sample_hotter(w: SimpleNamespace) -> None:
    w.patch.setitem(model_judge.SAMPLING, "temperature", 1.0)


def comparison(w: SimpleNamespace) -> Any:
    (w.folder / "prompts.txt").write_text("\n".join(w.prompts))
    config = CompareConfig(
        str(w.model),
        "out",
        str(w.adapter),
        prompts=str(w.folder / "prompts.txt"),
        judges=("key_judge:red",),
        precision=w.precision,
    )
    return finished_comparison.ingredients(config)


def score_key(w: SimpleNamespace) -> Any:
    return [image_sampling.judge_card_digest("key_judge:red"), w.image.read_bytes(), w.prompts]


def labels(w: SimpleNamespace) -> Any:
    models = [str(w.model), f"{w.model}+{w.adapter}"]
    return fresh_samples.ingredients(models, w.prompts, {"steps": w.steps, "precision": w.precision})


IMAGE: Change = lambda w: flip(w.image)
PIXELS: Change = lambda w: noise_image(9).save(w.image)
CODE: Change = lambda w: w.judge.write_text(JUDGE.replace("1.0", "2.0"))
FILES: list[Change] = [
    lambda w: flip(w.model / "text_encoder" / "model.safetensors"),
    lambda w: flip(next((w.model / "tokenizer").glob("*.json"))),
    lambda w: flip(w.model / "scheduler" / "scheduler_config.json"),
]
ADAPTER: list[Change] = [
    lambda w: flip(w.adapter / "adapter_model.safetensors"),
    lambda w: flip(w.adapter / "adapter_config.json"),
]
PROMPT: Change = put(prompts=["a blue circle"])
HALF: Change = put(precision="bf16")
TEMPLATE: Change = lambda w: setattr(w.policy.processor, "chat_template", w.policy.processor.chat_template + " ")
TOKEN: Change = lambda w: w.policy.encoder.tokenizer.add_tokens(["another"])
CASES: dict[str, tuple[Change, dict[str, list[Change]]]] = {
    "encoded pairs": (
        encoded_pairs,
        {
            "encoders": [
                lambda w: add(next(w.policy.pipe.text_encoder.parameters())),
                lambda w: w.policy.pipe.vae.register_to_config(scaling_factor=0.5),
                lambda w: w.policy.pipe.tokenizer.add_tokens(["another"]),
                lambda w: setattr(w.policy, "resolution", 16),
                adapt_text_encoder,
                lambda w: lora_layers(w.policy.pipe.text_encoder)[0].lora_alpha.update(default=9),
            ],
            "rows": [IMAGE],
            "sizes": [put(sizes=((32, 16),))],
            "precision": [HALF],
        },
    ),
    "reference log-probs": (
        reference,
        {
            "model": [
                lambda w: add(next(w.policy.model.parameters())),
                TEMPLATE,
                TOKEN,
                lambda w: setattr(w.policy, "ld_alpha", 0.5),
                lambda w: setattr(w.policy.model.config, "rms_norm_eps", 0.1),
            ],
            "adapter": [
                start_at_an_adapter,
                lambda w: add(next(p for name, p in w.policy.model.named_parameters() if ".reference" in name)),
                lambda w: lora_layers(w.policy.model)[0].lora_alpha.update(reference=9),
            ],
            "rows": [put(limit=9)],
            "settings": [HALF],
            "device": [on_gpu],
        },
    ),
    "vision features": (
        features,
        {
            "model": [lambda w: add(next(w.policy.model.parameters()))],
            "adapter": [start_at_an_adapter],
            "rows": [put(limit=9)],
            "settings": [TEMPLATE, TOKEN, lambda w: setattr(w.policy.encoder, "corrupt", True)],
            "device": [on_gpu],
        },
    ),
    "lengths of rows": (
        lengths,
        {
            "model": [TOKEN, lambda w: setattr(w.policy.model.config, "rms_norm_eps", 0.1)],
            "rows": [put(truth="no")],
            "settings": [put(limit=9)],
            "example": [TEMPLATE],
        },
    ),
    "mined image pairs": (
        mined_images,
        {"settings": [HALF, put(steps=3)], "model": FILES, "adapter": ADAPTER, "prompts": [PROMPT], "judges": [CODE]},
    ),
    "mined response pairs": (
        mined_responses,
        {
            "settings": [HALF],
            "model": FILES,
            "adapter": ADAPTER,
            "questions": [PIXELS, put(truth="no")],
            "judges": [CODE],
        },
    ),
    "scores of images": (scores, {"settings": [put(steps=3)], "images": [IMAGE, PROMPT], "judges": [CODE]}),
    "relabelled pairs": (relabelled, {"settings": [put(steps=3)], "images": [IMAGE], "judges": [CODE]}),
    "image of a comparison": (
        compared_image,
        {
            "weights": [
                lambda w: add(next(w.policy.model.parameters())),
                lambda w: w.policy.model.register_to_config(addition_embed_type="text"),
                lambda w: w.policy.pipe.tokenizer.add_tokens(["another"]),
            ],
            "scale": [put(scale=0.5)],
            "scheduler": [lambda w: w.policy.scheduler.register_to_config(steps_offset=7)],
            "steps": [put(steps=3)],
            "guidance": [put(guidance=2.0)],
            "size": [lambda w: setattr(w.policy, "resolution", 16)],
            "dtype": [lambda w: setattr(w.policy, "dtype", torch.bfloat16)],
            "device": [on_gpu],
            "batch": [lambda w: w.prompts.append("another")],
        },
    ),
    "response of a comparison": (
        compared_response,
        {
            "weights": [lambda w: add(next(w.policy.model.parameters())), TEMPLATE, TOKEN],
            "generation": [lambda w: setattr(w.policy.model.generation_config, "repetition_penalty", 1.2)],
            "max_new_tokens": [put(limit=9)],
            "temperature": [put(temperature=1.0)],
            "seed": [put(seed=1)],
            "dtype": [HALF],
            "device": [on_gpu],
            "batch": [PIXELS],
        },
    ),
    "response of a server": (
        served_response,
        {
            "served": [put(truth="another")],
            "adapter": ADAPTER,
            "max_new_tokens": [put(limit=9)],
            "temperature": [put(temperature=1.0)],
            "seed": [put(seed=1)],
            "question": [PIXELS],
        },
    ),
    "reply of a judge": (
        judge_reply,
        {"model": [put(truth="another")], "messages": [PROMPT], "sampling": [sample_hotter]},
    ),
    "comparison": (
        comparison,
        {"settings": [HALF], "model": FILES, "adapters": ADAPTER, "prompts": [PROMPT], "judges": [CODE]},
    ),
    "score of a comparison": (score_key, {"judge": [CODE], "image": [IMAGE], "prompt": [PROMPT]}),
    "images to label": (labels, {"settings": [HALF], "models": [*FILES, *ADAPTER], "prompts": [PROMPT]}),
}
"""The function that makes the key of each kind of work, and at least one change of every ingredient."""


def test_cases_cover_every_kind_and_ingredient() -> None:
    assert {*CASES, "training run"} == set(INGREDIENTS), "a new kind of stored work needs a case here"
    for kind, (_, changes) in CASES.items():
        assert {*changes, "libraries"} >= set(INGREDIENTS[kind]) >= set(changes), kind


@pytest.mark.parametrize("kind", CASES)
def test_every_ingredient_changes_the_key(kind: str, world: SimpleNamespace) -> None:
    """Each change, on top of those before, gives a key that did not occur. It catches an ingredient that is left out."""
    key, changes = CASES[kind]
    seen = [key(world)]
    assert key(world) == seen[0], "the same inputs give the same key"
    if "libraries" in INGREDIENTS[kind]:
        changes = {**changes, "libraries": [other_version]}
    for ingredient, several in changes.items():
        for number, change in enumerate(several):
            change(world)
            new = key(world)
            assert new not in seen, f"{kind}: change {number} of {ingredient} does not change the key"
            seen.append(new)


@pytest.mark.parametrize("kind", [kind for kind in CASES if "settings" in INGREDIENTS[kind]])
def test_changed_ingredient_refuses_to_continue_a_folder(kind: str, world: SimpleNamespace) -> None:
    if kind in ("reference log-probs", "vision features", "lengths of rows"):
        return  # has a file or a folder of its own for each key
    made, (key, changes) = world.folder / "out", CASES[kind]
    parts = lambda: key(world)[0] if kind == "scores of images" else key(world)  # type: ignore[index]
    take = lambda: output_folder(made, OutputKind("mining.json", "made"), settings_of(kind, parts()))
    for _ in range(2):
        with take():
            (made / "shard-00000").write_text("made")
    changes["judges" if "judges" in changes else "prompts"][0](world)
    with pytest.raises(ValueError, match=r"was made with other settings .* Choose another output_dir"), take():
        pass


def test_changed_ingredient_refuses_to_resume_training(world: SimpleNamespace) -> None:
    before = {
        "model": model_content(str(world.model)),
        "libraries": library_versions(),
        "adapter": "3",
        "pairs": "1",
        "encoded rows": "2",
    }
    assert {*before, "settings"} == set(INGREDIENTS["training run"])
    config = TrainConfig(str(world.model), "p.parquet", "out", adapter="a")
    check_same_content(Path("checkpoint-2"), before, before, config)
    FILES[1](world)
    changed = before | {"model": model_content(str(world.model))}
    for name, message in {
        "model": "a file of model .* has changed since checkpoint-2 was made. Restore it",
        "adapter": "a file of adapter a has changed",
        "libraries": "the version of a library",
        "pairs": "p.parquet has changed",
        "encoded rows": "what the chat template or the tokenizer makes of p.parquet",
    }.items():
        now = {**before, name: changed[name] if name == "model" else "another"}
        with pytest.raises(ValueError, match=message):
            check_same_content(Path("checkpoint-2"), before, now, config)
    with pytest.raises(ValueError, match="has changed"):
        check_same_content(Path("checkpoint-2"), None, before, config)


def test_encoded_text_digest_depends_on_the_template(write_pairs: Any, tmp_path: Path) -> None:
    """A template that prints the date makes other text of the same pairs, so a resumed run would train on other prompts."""
    make_response_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}]).to_parquet(str(tmp_path / "p.parquet"))
    config = TrainConfig("m", str(tmp_path / "p.parquet"), "out", eval_fraction=0.0)
    policy = VisionLanguage(*tiny_vlms.build("llama"), "m")
    one = encoding.encode_splits(policy, config)
    assert one.encoded_digest == encoding.encode_splits(policy, config).encoded_digest
    policy.processor.chat_template = policy.processor.chat_template.replace("user", "man") + "a"
    other = encoding.encode_splits(VisionLanguage(policy.model, policy.processor, "m"), config)
    assert one.digest == other.digest and one.encoded_digest != other.encoded_digest


def test_hash_tells_values_apart_and_ignores_places() -> None:
    values: list[Any] = [
        None, 0, 0.0, "0", b"0", "", [], {}, [""], ["a", "b"], ["ab"], [["a"], "b"], {"a": "b"}, True,
        torch.zeros(2), torch.zeros(1, 2), torch.zeros(2, dtype=torch.float64), torch.zeros(2).numpy(),
        Image.new("L", (2, 8)), Image.new("L", (4, 4)),
    ]  # fmt: skip
    assert len({content_hash(value) for value in values}) == len(values)
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash([torch.bfloat16.itemsize, torch.ones(2).bfloat16()]) != content_hash([2, torch.ones(2).half()])
    with pytest.raises(TypeError, match="content of a object is unknown"):
        content_hash(object())


def test_partial_judges_with_other_arguments_are_other_judges(world: SimpleNamespace) -> None:
    world.judge.write_text(
        f"{JUDGE}\n\nimport functools\none = functools.partial(red, 1)\ntwo = functools.partial(red, 2)\n"
    )
    digests = judge_digests(["key_judge:one", "key_judge:two"])
    names = {name: dataclasses.replace(JudgeConfig(name, "i", "o")).judge for name in digests}
    assert len(set(digests.values())) == len(names) == 2

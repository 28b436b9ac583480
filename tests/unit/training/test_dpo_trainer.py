"""`DPOTrainer` on objects makes the run that `train` makes from files, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from dpo_mm import DPOConfig, DPOTrainer, TrainConfig, train
from dpo_mm.data.schema import make_image_rows
from dpo_mm.training.given_rows import given_training_rows
from tests.conftest import noise_image, rows
from tests.contracts.tiny_vlms import save

STEPS: dict[str, Any] = {"beta": 0.1, "learning_rate": 1e-2, "max_steps": 3, "logging_steps": 1, "seed": 3}


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save("llava", tmp_path_factory.mktemp("llava") / "model")


def trl_rows(count: int = 6, *, start: int = 0, **columns: Any) -> Dataset:
    """Conversational rows of TRL, with one image each."""
    image = {"type": "image", "text": None}
    return Dataset.from_list(
        [
            {
                "images": [noise_image(n)],
                "prompt": [{"role": "user", "content": [image, {"type": "text", "text": f"describe the picture {n}"}]}],
                "chosen": [
                    {"role": "assistant", "content": [{"type": "text", "text": "a red square on a blue field"}]}
                ],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a square " * (n % 3 + 1)}]}],
            }
            for n in range(start, start + count)
        ]
    )


def pipeline(path: str) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(path)


def vlm(path: str) -> dict[str, Any]:
    model = transformers.AutoModelForImageTextToText.from_pretrained(path)
    return {"model": model, "processing_class": transformers.AutoProcessor.from_pretrained(path)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_run(result: Any, expected: Any) -> None:
    assert result.history == expected.history and len(result.history) >= 3
    ours, theirs = weights(result.folder), weights(expected.folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(tensor.abs().max() > 0 for name, tensor in ours.items() if "lora_B" in name)


@pytest.mark.slow
def test_vlm_and_rows_of_trl_give_the_run_of_the_command(text_model: str, tmp_path: Path) -> None:
    """Catches another order of rows, another seed of the LoRA, and a peft_config that is not used."""
    dataset, evaluation = trl_rows(), trl_rows(2, start=10)
    dataset.to_parquet(str(tmp_path / "pairs.parquet"))
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    seen: list[int] = []

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    args = DPOConfig(
        tmp_path / "by-class", **STEPS, loss_type=["sigmoid"], per_device_train_batch_size=2, bf16=False, eval_steps=2
    )
    given: dict[str, Any] = {"train_dataset": dataset, "eval_dataset": evaluation, "peft_config": lora}
    trainer = DPOTrainer(**vlm(text_model), args=args, **given, callbacks=[Callback()])
    shown = f"DPOTrainer(LlavaForConditionalGeneration, {str(tmp_path / 'by-class')!r}, "
    assert repr(trainer) == f"{shown}not trained yet)"
    result = trainer.train()
    assert repr(trainer) == f"{shown}{result!r})"
    expected = train(
        TrainConfig(
            text_model, str(tmp_path / "pairs.parquet"), str(tmp_path / "by-command"), beta=0.1, learning_rate=1e-2,
            steps=3, log_every=1, seed=3, batch_size=2, eval_fraction=0.0, lora_rank=4, lora_alpha=8, lora_targets=("q_proj", "v_proj"),
        )
    )  # fmt: skip
    *earlier, evaluated = [entry for entry in result.history if "eval_loss" in entry]
    assert [entry["step"] for entry in earlier] == [2]  # eval_steps does not split off rows
    steps = tuple(entry for entry in result.history if "eval_loss" not in entry)
    assert_same_run(dataclasses.replace(result, history=steps), expected)
    assert seen == [1, 2, 3]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == evaluated["eval_loss"] and metrics.items() - {("epoch", 1.0)} <= evaluated.items()
    assert isinstance(trainer.model, peft.PeftModel)
    record = json.loads((result.folder / "dpo_mm.json").read_text())
    assert record["model"] == text_model and record["pairs"] == "train_dataset"
    copied = trainer.save_model(tmp_path / "copy")
    assert {path.name for path in copied.iterdir()} == {path.name for path in result.folder.iterdir()} - {".lock"}
    with pytest.raises(ValueError, match="model has an adapter already"):
        DPOTrainer(**(vlm(text_model) | {"model": trainer.model.base_model.model}), args=args, train_dataset=dataset)

    again = DPOTrainer(**vlm(text_model), args=args, **given)
    assert again.train() == result and seen == [1, 2, 3]
    loaded = dict(again.model.named_parameters())
    assert all(torch.equal(loaded[n], p) for n, p in trainer.model.named_parameters())


@pytest.mark.slow
def test_pipeline_and_pairs_of_images_give_the_run_of_the_command(
    tiny_model: str, write_pairs: Callable[..., str], tmp_path: Path
) -> None:
    """Catches a pipeline whose encoders are gone after training, and rows that are validated differently."""
    path, pipe = write_pairs(rows(6)), pipeline(tiny_model)
    args = DPOConfig(tmp_path / "by-class", **STEPS | {"beta": 500.0}, per_device_train_batch_size=2)
    dataset = Dataset.from_parquet(path)
    result = DPOTrainer(pipe, args=args, train_dataset=dataset).train()
    settings: dict[str, Any] = {"beta": 500.0, "learning_rate": 1e-2, "steps": 3, "log_every": 1, "seed": 3}
    expected = train(
        TrainConfig(tiny_model, path, str(tmp_path / "by-command"), batch_size=2, eval_fraction=0.0, **settings)
    )
    assert_same_run(result, expected)
    tuned = pipe(
        "a red circle", num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    plain = pipeline(tiny_model)
    plain.load_lora_weights(str(result.folder))
    same = plain(
        "a red circle", num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert abs(tuned - same).max() < 1e-5


@pytest.mark.slow
def test_reference_of_another_model_changes_the_first_loss(text_model: str, tmp_path: Path) -> None:
    """Catches a ref_model that is not used: with a copy of the model, the first loss is ln 2."""
    args = DPOConfig(tmp_path / "out", **STEPS | {"max_steps": 1}, tuning="full")
    other = vlm(text_model)["model"]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    result = DPOTrainer(**vlm(text_model), args=args, train_dataset=trl_rows(2), ref_model=other).train()
    assert abs(result.history[0]["loss"] - 0.6931) > 1e-3


def test_pick_a_pic_rows_are_converted(tmp_path: Path) -> None:
    """Catches a winner that is swapped, and images that are lost on the way through the cache."""
    dataset = Dataset.from_list(
        [
            {"caption": f"star {n}", "jpg_0": noise_image(2 * n), "jpg_1": noise_image(2 * n + 1), "label_0": n % 2, "label_1": 1 - n % 2}
            for n in range(3)
        ]
    )  # fmt: skip
    config = DPOConfig(tmp_path).named("model", "train_dataset")
    loaded = given_training_rows(dataset, None, config, modality="image")
    assert list(loaded.train["preference"]) == ["b", "a", "b"] and loaded.about.startswith("rows as Pick-a-Pic's")
    assert loaded.train[1]["image_b"].tobytes() == noise_image(3).tobytes()


def test_settings_of_trl_become_fields() -> None:
    """Catches each translation if it is removed."""
    args = DPOConfig(
        "out", max_steps=5, loss_type=["sigmoid", "sft"], loss_weights=[0.8, 0.2], bf16=True, report_to="none", rpo_alpha=0.5,
        label_smoothing=0.1, eval_strategy="no", save_strategy="steps", warmup_ratio=0.1, remove_unused_columns=False,
    )  # fmt: skip
    assert args.objective == {"sigmoid": 0.8, "sft": 0.2} and args.objective_kwargs == {"label_smoothing": 0.1}
    assert (args.steps, args.precision, args.report_to, args.sft_weight) == (5, "bf16", (), 0.5)
    assert (args.eval_every, args.save_every, args.warmup_steps, args.eval_fraction) == (0, 500, 0.1, 0.0)
    assert DPOConfig("out", loss_type=["ipo"]).objective == "ipo" and DPOConfig("out", bf16=False).precision == "fp32"
    assert dataclasses.replace(args, lora_rank=3).lora_rank == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_step": 5}, "DPOConfig: 'max_step' is not a setting; .*max_steps"),
        ({"max_steps": 5, "steps": 6}, "max_steps and steps are the same setting"),
        ({"bf16": True, "precision": "fp16"}, "bf16 and precision are the same setting"),
        ({"model": "x"}, "model is a setting of the model or the dataset"),
        ({"max_pixels": 9}, "max_pixels is a setting of the processor"),
        ({"save_strategy": "epoch"}, "save_strategy is 'epoch'. Expected 'no' or 'steps'"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 numbers for 2 losses"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
    ],
)
def test_invalid_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPOConfig("out", **settings)


def test_invalid_argument_is_named(
    text_model: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches each check if it is removed. Nothing is trained."""
    good: dict[str, Any] = {
        **vlm(text_model),
        "args": DPOConfig(tmp_path / "out", beta=0.1),
        "train_dataset": trl_rows(2),
    }
    args = {name: DPOConfig(tmp_path / "out", beta=0.1, **values) for name, values in {
        "full": {"tuning": "full"}, "averaged": {"tuning": "full", "reference": "moving_average"}, "split": {"eval_fraction": 0.5},
    }.items()}  # fmt: skip
    lora, tokenizer = peft.LoraConfig(), good["processing_class"].tokenizer
    tiny = pipeline(tiny_model)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": text_model}, "model is the text .*. Load it first"),
        ({"model": torch.nn.Linear(1, 1)}, "model is a Linear. Expected a model of transformers or a pipeline"),
        ({"args": TrainConfig("a", "b", "c")}, "args is a TrainConfig. Expected dpo_mm.DPOConfig"),
        ({"processing_class": None}, "processing_class is missing. LlavaForConditionalGeneration needs its processor"),
        ({"processing_class": tokenizer}, "processing_class is a .*needs its processor: AutoProcessor"),
        ({"model": tiny}, "processing_class has no effect"),
        ({"train_dataset": [{"prompt": "a"}]}, "train_dataset is a list. Expected a Dataset"),
        ({"train_dataset": DatasetDict(train=trl_rows(1))}, r"train_dataset has the splits train. .*dataset\['train'\]"),
        ({"eval_dataset": {}}, "eval_dataset is a dict"),
        ({"peft_config": peft.PromptTuningConfig()}, "peft_config is a PromptTuningConfig. Expected a LoraConfig"),
        ({"peft_config": peft.LoraConfig(lora_dropout=0.1)}, "lora_dropout is 0.1, and only 0.0 is supported"),
        ({"peft_config": peft.LoraConfig(target_modules=".*q")}, "target_modules is '.\\*q'. Expected a list"),
        ({"peft_config": lora, "ref_model": good["model"]}, "ref_model has no use with peft_config"),
        ({"peft_config": lora, "args": args["full"]}, "peft_config has no effect, because tuning is full"),
        ({"ref_model": tiny, "args": args["full"]}, "ref_model is a StableDiffusionPipeline and model a Llava"),
        ({"ref_model": good["model"], "args": args["full"]}, "ref_model shares modules with model"),
        ({"ref_model": vlm(text_model)["model"]}, "ref_model has no use with a LoRA"),
        ({"ref_model": vlm(text_model)["model"], "args": args["averaged"]}, "ref_model and reference 'moving_average'"),
        ({"args": args["split"], "eval_dataset": trl_rows(1)}, "eval_fraction has no effect, because eval_dataset"),
        ({"train_dataset": trl_rows(2).remove_columns(["chosen", "prompt"])}, "columns images, rejected|images, rejected"),
        ({"model": tiny, "processing_class": None}, "train_dataset: .*(image_a|responses)"),
    ]  # fmt: skip
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            DPOTrainer(**{**good, **changes}).train()
    trainer = DPOTrainer(**good)
    with pytest.raises(ValueError, match=r"trained nothing yet\. Call train first"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="save_model: nothing was trained yet"):
        trainer.save_model(tmp_path / "copy")


def test_shuffled_rows_are_those_that_were_selected() -> None:
    """Mutation: read the columns of the dataset before it was shuffled."""
    shuffled = make_image_rows(rows(6)).shuffle(seed=1).select(range(3))
    config = TrainConfig("m", "-", "-", eval_fraction=0.0)
    loaded = given_training_rows(shuffled, None, config, modality="image")
    assert loaded.train["id"][:] == shuffled["id"][:] and len(loaded.train) == 3


@pytest.mark.slow
def test_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "train-in-python.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    exec("\n".join(examples), {})
    assert (tmp_path / "runs/reader/adapter_model.safetensors").exists()
    assert (tmp_path / "runs/generator/pytorch_lora_weights.safetensors").exists()

"""Exports of finished runs: stock libraries give the same pixels and tokens, names are kohya's, and errors are one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_mm.assets import resolve_asset
from dpo_mm.export.cards import export_card
from dpo_mm.export.exporting import export
from dpo_mm.export.finished_run import read_run
from dpo_mm.export.vllm_limits import served_rank, why_not_served
from dpo_mm.policies.families import load_policy
from dpo_mm.policies.kohya_names import sdxl_module

IMAGE_RUN, TEXT_RUN = "shapes-sd-faithful", "page-reader-tuned"
SDXL_LEVELS = {"input_blocks": {4: 2, 5: 2, 7: 10, 8: 10}, "middle_block": {None: 10}, "output_blocks": {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2}}  # fmt: skip
"""Blocks of kohya's SDXL UNet that have transformers, with the number of their layers."""


def sdxl_unet() -> UNet2DConditionModel:
    """SDXL's UNet in the shape of the base model, without weights and with few channels."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(8, 16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(1, 2, 4),
            norm_num_groups=4,
            cross_attention_dim=8,
            use_linear_projection=True,
        )


@pytest.mark.slow
def test_kohya_names_of_sdxl_are_those_of_its_own_unet() -> None:
    """The names are listed from the blocks of kohya's UNet, in the order in which they run."""
    unet = sdxl_unet()
    expected = []
    for group, blocks in SDXL_LEVELS.items():
        for number, depth in blocks.items():
            place = "middle_block.1" if number is None else f"{group}.{number}.1"
            expected += [f"{place}.transformer_blocks.{n}.{a}.to_q" for n in range(depth) for a in ("attn1", "attn2")]
    names = [name for name, _ in unet.named_modules() if name.endswith("to_q")]
    order = {"down": 0, "mid_": 1, "up_b": 2}
    names.sort(key=lambda name: order[name[:4]])
    assert [sdxl_module(name, unet.config) for name in names] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.2.resnets.1.time_emb_proj", "input_blocks.8.0.emb_layers.1"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("mid_block.resnets.1.conv2", "middle_block.2.0.out_layers.3".replace(".0.", ".")),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.resnets.2.conv_shortcut", "output_blocks.5.0.skip_connection"),
        ("conv_in", "conv_in"),
    ],
)
def test_kohya_names_of_layers_outside_attention(name: str, expected: str) -> None:
    config = {"layers_per_block": 2, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
    assert sdxl_module(name, config) == expected


def pixels(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipe("a red star", num_inference_steps=2, generator=generator).images[0], dtype=int)


@pytest.mark.slow
def test_exported_image_files_give_the_runs_pixels(tmp_path: Path) -> None:
    base = resolve_asset("shapes-sd")
    expected = pixels(load_policy(base, adapter=resolve_asset(IMAGE_RUN), device="cpu").pipe)  # type: ignore[union-attr]
    assert np.abs(expected - pixels(DiffusionPipeline.from_pretrained(base, dtype=torch.float32))).max() > 10
    for to in ("diffusers", "kohya", "merged"):
        export(IMAGE_RUN, to, str(tmp_path / to))
        pipe: Any = DiffusionPipeline.from_pretrained(
            str(tmp_path / to) if to == "merged" else base, dtype=torch.float32
        )
        if to != "merged":
            pipe.load_lora_weights(str(tmp_path / to))
        assert np.abs(pixels(pipe) - expected).max() <= (to == "merged"), to
    assert len({file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file()}) == 1
    names = load_file(tmp_path / "kohya" / "kohya_lora_weights.safetensors")
    unet = {name.replace(".", "_") for name, _ in pipe.unet.named_modules()}
    assert {name.partition(".")[0].removeprefix("lora_unet_") for name in names} <= unet  # sd-scripts' rule for SD 1.5
    assert {name.partition(".")[2] for name in names} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert export(IMAGE_RUN, "kohya", str(tmp_path / "kohya"))["files"].startswith("2,")
    with pytest.raises(ValueError, match="was exported with other settings"):
        export(IMAGE_RUN, "diffusers", str(tmp_path / "kohya"))


@pytest.mark.slow
def test_exported_text_files_give_the_runs_logits(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base = resolve_asset("page-reader")
    policy: Any = load_policy(base, adapter=resolve_asset(TEXT_RUN), device="cpu")
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        export(TEXT_RUN, "vllm", str(tmp_path / "vllm"))
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(model, str(tmp_path / "vllm"))
        assert torch.equal(adapted(input_ids=ids).logits, expected)
        export(TEXT_RUN, "merged", str(tmp_path / "merged"))
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert AutoProcessor.from_pretrained(tmp_path / "merged").chat_template == policy.processor.chat_template


@pytest.mark.parametrize(
    ("run", "to", "message"),
    [
        (IMAGE_RUN, "koya", "to 'koya' is unknown; .*kohya"),
        (IMAGE_RUN, "vllm", "generates images, which vLLM does not"),
        (TEXT_RUN, "kohya", "is of a text model, and this format is for images"),
        ("nowhere", "kohya", "run 'nowhere' is not a folder"),
    ],
)
def test_export_that_does_not_fit_is_one_line(run: str, to: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        export(run, to, str(tmp_path / "out"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_unfinished_runs_stacked_runs_and_other_folders_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(resolve_asset(IMAGE_RUN), run)
    with pytest.raises(ValueError, match=r"is not finished: complete.json is missing. Run the same train command"):
        export(str(run), "diffusers", str(tmp_path / "out"))
    (run / "complete.json").write_text("{}")
    with pytest.raises(ValueError, match=r"complete.json is missing or broken"):
        export(str(run), "diffusers", str(tmp_path / "out"))
    from dpo_mm.files.checksums import write_checksums

    write_checksums(run)
    with pytest.raises(ValueError, match="is an input of the command"):
        export(str(run), "diffusers", str(run))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="has files that dpo-mm did not make"):
        export(str(run), "diffusers", str(tmp_path / "mine"))
    (run / "start_adapter").mkdir()
    with pytest.raises(ValueError, match=r"is stacked on another adapter, and one file has one. Use merged"):
        export(str(run), "diffusers", str(tmp_path / "out"))
    (run / "pytorch_lora_weights.safetensors").unlink()
    (run / "complete.json").write_text(json.dumps({}))
    (run / "dpo_mm.json").write_text("{")
    with pytest.raises(ValueError, match=r"has no readable dpo_mm.json"):
        read_run(str(run))


@pytest.mark.parametrize(
    ("settings", "weight", "reason"),
    [
        ({}, "base_model.model.model.language_model.q_proj.lora_A.weight", None),
        ({"use_dora": True}, "q_proj.lora_A.weight", "has DoRA"),
        ({"bias": "all"}, "q_proj.lora_A.weight", "has bias all"),
        ({"r": 600}, "q_proj.lora_A.weight", "has rank 600, above 512"),
        ({"lora_bias": True}, "q_proj.lora_A.weight", "has biases, which vLLM does not load"),
        ({"init_lora_weights": "pissa"}, "q_proj.lora_A.weight", "has init_lora_weights pissa"),
        ({"init_lora_weights": "gaussian", "use_rslora": True}, "q_proj.lora_A.weight", None),
        ({"rank_pattern": {"q_proj": 8}}, "q_proj.lora_A.weight", "has several ranks, which vLLM before 0.32"),
        ({}, "model.vision_tower.q_proj.lora_A.weight", "adapts more than the language model"),
        ({}, "model.multi_modal_projector.linear_1.lora_A.weight", "adapts more than the language model"),
    ],
)
def test_adapters_that_vllm_does_not_serve(
    settings: dict[str, Any], weight: str, reason: str | None, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "bias": "none", **settings}))
    save_file({weight: torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    given = why_not_served(tmp_path)
    assert given is None if reason is None else str(given).startswith(reason)
    assert [served_rank(rank) for rank in (4, 16, 17)] == [8, 16, 32]


@pytest.mark.parametrize("model", ["page-reader", "shapes-captioner"])
def test_bundled_models_have_the_weight_names_that_vllm_knows(model: str) -> None:
    """Those of published LLaVA models. A model that transformers 5 has made from a config has others."""
    with safe_open(Path(resolve_asset(model)) / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    tower = [name for name in names if name.startswith("vision_tower.")]
    assert len(tower) == 71 and all(name.startswith("vision_tower.vision_model.") for name in tower)


def test_card_on_the_hub_names_no_folder_of_this_machine() -> None:
    """It loads the hub's files, and has the comparison's metrics and the licences of the rows."""
    card = export_card(read_run(IMAGE_RUN), "diffusers", "me/stars", hub=True)
    assert 'load_lora_weights("me/stars")' in card and resolve_asset("shapes-sd") not in card
    assert "value: 0.5556" in card and "base_model" not in card and card.count("## How to use it") == 1
    assert re.search(r"## Licences of the pairs\n\n\| licence \| rows \|\n\|---\|---\|\n\| [^|]+ \| [\d,]+ \|", card)

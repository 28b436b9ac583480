"""Write a tiny Stable Diffusion or SDXL pipeline as one file in the layout of the original code (LDM, sgm).

It is written from the original code's module names, independently of the conversion in diffusers that reads it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
VAE = {
    "conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample", "upsamplers.0": "upsample", "resnets": "block",
    "down_blocks": "down", "up_blocks": "up",
}  # fmt: skip
OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final", "text_model.encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def write_original(pipe: Any, file: Path) -> Path:
    """Write a pipeline's weights as one file."""
    tensors = {
        f"model.diffusion_model.{_unet(name, pipe.unet)}": tensor for name, tensor in pipe.unet.state_dict().items()
    }
    tensors |= {
        f"first_stage_model.{_vae(name, pipe.vae)}": _vae_tensor(name, t) for name, t in pipe.vae.state_dict().items()
    }
    is_xl = hasattr(pipe, "text_encoder_2")
    clip = "conditioner.embedders.0.transformer." if is_xl else "cond_stage_model.transformer."
    first = pipe.text_encoder.state_dict()
    inside = "" if next(iter(first)).startswith("text_model.") else "text_model."
    tensors |= {f"{clip}{inside}{name}": tensor for name, tensor in first.items()}
    if is_xl:
        tensors |= _open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    return file


def write_configs(pipeline: Path, folder: Path) -> Path:
    """Copy a pipeline's configs and tokenizers, without weights."""
    for path in pipeline.rglob("*"):
        if path.suffix in (".json", ".txt"):
            target = folder / path.relative_to(pipeline)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert json.loads((folder / "model_index.json").read_text())
    return folder


def _replaced(name: str, table: dict[str, str]) -> str:
    for ours, original in table.items():
        name = re.sub(rf"(?<![\w]){re.escape(ours)}(?![\w])", original, name)
    return name


def _unet(name: str, unet: Any) -> str:
    """Blocks of the original code are numbered across all resolutions: layers, then the change of resolution."""
    layers = unet.config.layers_per_block
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
        side, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            place = 2 if "CrossAttn" in unet.config.up_block_types[block] else 1
            return f"output_blocks.{block * (layers + 1) + layers}.{place}.{rest}"
        number = 1 + block * (layers + 1) + layer if side == "down" else block * (layers + 1) + layer
        inner = _replaced(rest, RESNET) if kind == "resnets" else rest
        return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{inner}"
    outer = _replaced(name, UNET)
    return _replaced(outer, RESNET) if "middle_block.0" in outer or "middle_block.2" in outer else outer


def _vae(name: str, vae: Any) -> str:
    """The decoder's blocks are numbered from the highest resolution."""
    last = len(vae.config.block_out_channels) - 1
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{last - int(found[1])}", name)
    return _replaced(name, VAE)


def _vae_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    is_linear = ".attentions." in name and name.endswith("weight") and "group_norm" not in name
    return tensor[:, :, None, None] if is_linear else tensor


def _open_clip(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Queries, keys and values are one matrix, and the projection is transposed."""
    tensors = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            tensors[f"{prefix}text_projection"] = tensor.T
        elif found := re.match(r"(.*self_attn)\.q_proj\.(weight|bias)", name):
            parts = [state[f"{found[1]}.{part}_proj.{found[2]}"] for part in "qkv"]
            layer = _replaced(found[1].removesuffix(".self_attn"), OPEN_CLIP)
            tensors[f"{prefix}{layer}.attn.in_proj_{found[2]}"] = torch.cat(parts)
        elif not re.search(r"\.(k|v)_proj\.", name) and not name.endswith("position_ids"):
            tensors[f"{prefix}{_replaced(name, OPEN_CLIP)}"] = tensor
    return tensors

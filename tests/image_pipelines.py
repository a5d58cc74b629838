"""Tiny pipelines of image models with random weights, and files for them named as trainers name them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 12, "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32,
    "cross_attention_dim": 24, "use_linear_projection": True,
}  # fmt: skip
SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 4,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 8, "pooled_projection_dim": 16,
    "out_channels": 4, "pos_embed_max_size": 8,
}  # fmt: skip
FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
NOTHING = ("vae", "tokenizer", "scheduler", "tokenizer_2", "text_encoder_3", "tokenizer_3")


def text_encoder(cls: type = CLIPTextModel) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=40, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=12, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    ).eval()  # fmt: skip


@functools.cache
def components(kind: str) -> Mapping[str, nn.Module]:
    """The models of a pipeline, which must not be changed."""
    torch.manual_seed(0)
    if kind == "sd":
        return {"unet": diffusers.UNet2DConditionModel(**UNET).eval(), "text_encoder": text_encoder()}
    if kind == "xl":
        return {
            "unet": diffusers.UNet2DConditionModel(**UNET | XL).eval(),
            "text_encoder": text_encoder(),
            "text_encoder_2": text_encoder(CLIPTextModelWithProjection),
        }
    if kind == "sd3":
        return {
            "transformer": diffusers.SD3Transformer2DModel(**SD3).eval(),
            "text_encoder": text_encoder(CLIPTextModelWithProjection),
            "text_encoder_2": text_encoder(CLIPTextModelWithProjection),
        }
    return {"transformer": diffusers.FluxTransformer2DModel(**FLUX).eval(), "text_encoder": text_encoder()}


def pipeline(kind: str, models: Mapping[str, nn.Module]) -> Any:
    """A pipeline of diffusers around these models; what is not needed for LoRA is missing."""
    import inspect

    name = {"sd": "StableDiffusion", "xl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}[kind]
    cls = getattr(diffusers, f"{name}Pipeline")
    takes = inspect.signature(cls).parameters
    absent = dict.fromkeys((*NOTHING, "text_encoder_2"))
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    given = absent | {"scheduler": diffusers.EulerDiscreteScheduler(steps_offset=1)} | options | dict(models)
    return cls(**{key: value for key, value in given.items() if key in takes})


def inputs(kind: str, name: str, rows: int = 2) -> dict[str, Any]:
    """Arguments for a component."""
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=draw)

    if name.startswith("text_encoder"):
        return {"input_ids": torch.randint(3, 40, (rows, 7), generator=draw)}
    if name == "unet":
        width = 24 if kind == "xl" else 12
        found = {"sample": normal(4, 8, 8), "timestep": torch.tensor(7), "encoder_hidden_states": normal(5, width)}
        added = {"text_embeds": normal(8), "time_ids": normal(6)}
        return found | ({"added_cond_kwargs": added} if kind == "xl" else {})
    if kind == "sd3":
        return {
            "hidden_states": normal(4, 8, 8), "encoder_hidden_states": normal(5, 12), "pooled_projections": normal(16),
            "timestep": torch.full((rows,), 7),
        }  # fmt: skip
    return {
        "hidden_states": normal(16, 4), "encoder_hidden_states": normal(5, 12), "pooled_projections": normal(8),
        "timestep": torch.full((rows,), 0.5), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def outputs(model: Any, given: dict[str, Any]) -> Tensor:
    found: Tensor = model(**given, return_dict=False)[0]
    return found


def layers(model: nn.Module, ends: Iterable[str] = ("",)) -> dict[str, nn.Module]:
    """The linear layers and convolutions of a model whose names end so."""
    ends = tuple(ends)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(ends)
    }


def kohya(
    file: Path, parts: Mapping[str, Mapping[str, nn.Module]], ranks: Iterable[int], alphas: Iterable[float]
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Write a file as kohya's scripts do, and return the factors and the α of each layer.

    Args:
        file: the file.
        parts: prefix of the names -> the layers, by their names in the scripts.
        ranks: of the layers in turn.
        alphas: of the layers in turn.
    """
    import itertools

    draw, turn, tensors, found = torch.Generator().manual_seed(3), itertools.count(), dict[str, Tensor](), {}
    ranks, alphas = [*ranks], [*alphas]
    for prefix, modules in parts.items():
        for name, module in modules.items():
            i = next(turn)
            r, alpha, weight = ranks[i % len(ranks)], alphas[i % len(alphas)], module.weight
            assert isinstance(weight, Tensor)
            down = torch.randn(r, *weight.shape[1:], generator=draw) / 3
            up = torch.randn(weight.shape[0], r, *(1 for _ in weight.shape[2:]), generator=draw) / 3
            key = f"{prefix}_{name.replace('.', '_')}"
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(alpha),
            }
            found[f"{prefix}.{name}"] = (down, up, alpha)
    save_file(tensors, file, metadata={"ss_network_module": "networks.lora"})
    return found

"""Tiny transformers checkpoints and PEFT adapters on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

_TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
}  # fmt: skip


def _llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT, **changes))


def _moe(**changes: Any) -> Any:
    sizes = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**_TEXT, num_key_value_heads=1, **sizes, **changes)
    )


MODELS: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "gpt2": lambda **changes: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=1, **changes
        )
    ),
    "bert": lambda **changes: transformers.BertForMaskedLM(transformers.BertConfig(**_TEXT, **changes)),
    "t5": lambda **changes: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=40, **changes)
    ),
    "vit": lambda **changes: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8,
            patch_size=4, **changes,
        )
    ),
    "resnet": lambda **changes: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], **changes)
    ),
    "mixtral": lambda **changes: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_TEXT, num_key_value_heads=1, num_local_experts=3, **changes)
    ),
    "qwen2-moe": _moe,
}  # fmt: skip


def save_base(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, shard: str | None = None, **changes: Any
) -> Any:
    """Write a model with random weights, biases included, and return it."""
    model = MODELS[kind](**changes)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model = model.to(dtype)
    model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    return model


def load(folder: Path, cls: Any, **options: Any) -> Any:
    return cls.from_pretrained(folder, local_files_only=True, **options).eval()


def save_adapter(base: Path, cls: Any, folder: Path, **options: Any) -> None:
    """Write a PEFT adapter with random factors for the model in a folder."""
    model = peft.get_peft_model(load(base, cls), peft.LoraConfig(**{"r": 2, "lora_alpha": 3} | options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def merged_by_peft(base: Path, cls: Any, adapter: Path) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = peft.PeftModel.from_pretrained(load(base, cls), adapter).merge_and_unload().state_dict()
    return merged


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, as its files have them."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}

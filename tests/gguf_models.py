"""Tiny models of the families that GGUF adapters are for, and their files for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

import funclora as fl

SIZES = {"vocab_size": 17, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 0}
DECODER = SIZES | {"hidden_size": 16, "intermediate_size": 12, "num_key_value_heads": 2, "tie_word_embeddings": False}

EXPERTS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True},
}


def build(kind: str, **fields: Any) -> Any:
    """A tiny model with random weights."""
    import transformers

    torch.manual_seed(0)
    if kind == "GPT2":
        sizes = SIZES | {"n_embd": 16, "n_inner": 12, "n_positions": 32, "n_layer": 2, "n_head": 4}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | {"eos_token_id": 0} | fields)))
    sizes = DECODER | ({"head_dim": 6} if kind.startswith(("Gemma", "Qwen3")) else {}) | {"eos_token_id": 0}
    sizes |= EXPERTS.get(kind, {})
    name = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{name}Config")(**(sizes | fields))
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def random(model: nn.Module, config: fl.LoraConfig, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, Any] = fl.init(model, config, generator=generator)
    return {
        name: fl.LoRA(
            torch.randn(rule.a.shape, generator=generator), torch.randn(rule.b.shape, generator=generator),
            scaling=rule.scaling, layout=rule.layout,
        )
        for name, rule in adapters.items()
    }  # fmt: skip


def lora(model: Any, **fields: Any) -> tuple[dict[str, Any], fl.LoraConfig]:
    given: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"} | fields
    config = fl.LoraConfig(**given)
    return random(model, config), config


def in_llama_cpp(model: Any, name: str, weight: Tensor) -> Tensor:
    """A dense weight, or its change, as llama.cpp's converter of checkpoints lays it out: `[out, in]`."""
    config = model.config
    if config.model_type == "gpt2" and ".c_" in name and name.endswith("weight"):
        return weight.T
    if config.model_type in ("llama", "mistral", "mixtral") and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        d = weight.shape[0] // heads
        order = [h * d + half * (d // 2) + i for h in range(heads) for i in range(d // 2) for half in (0, 1)]
        return weight[order]
    return weight


GATE_UP = ("gate_proj", "up_proj")
ARCHITECTURES = {
    "mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe",
}  # fmt: skip


def base_gguf(model: Any, file: Path) -> None:
    """The model in float32 as llama.cpp loads it, with a vocabulary of bare names.

    Written from llama.cpp's documentation of the format; only the names of tensors come from the package, and llama.cpp
    refuses a file in which one is missing.
    """
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.n_inner if arch == "gpt2" else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    experts = EXPERTS.get(type(model).__name__.removesuffix("ForCausalLM"))
    if experts:
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(experts.get("moe_intermediate_size", config.intermediate_size))
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", *(f"t{i}" for i in range(4, config.vocab_size))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    kinds = {"<unk>": gguf.TokenType.UNKNOWN, "<0x0A>": gguf.TokenType.BYTE}
    kinds |= dict.fromkeys(("<s>", "</s>"), gguf.TokenType.CONTROL)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(
        next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    for name, parameter in model.named_parameters():  # tied ones once
        weight = in_llama_cpp(model, name, parameter.detach())
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        parts = {name: weight}
        if name.endswith(".gate_up_proj"):  # of experts
            prefix = name.removesuffix("gate_up_proj")
            parts = {f"{prefix}{n}.weight": half for n, half in zip(GATE_UP, weight.chunk(2, dim=1), strict=True)}
        elif name.endswith("experts.down_proj"):
            parts = {f"{name}.weight": weight}
        for part, values in parts.items():
            writer.add_tensor(names.get_name(part, (".weight", ".bias")), values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""llama.cpp's LoRA adapters: `save_gguf` and `load_gguf`.

A file has the same meaning as in llama.cpp: each update is scaled by alpha/r, with one alpha for the file and the r of
the tensor. Anything that llama.cpp would refuse, ignore or stop at is refused.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from funclora._api.arguments import check_model, check_path
from funclora._bind.checks import check_adapters, check_rules
from funclora._bind.params import base_params
from funclora._config.config import LoraConfig
from funclora._config.infer import configured, layouts_of, targeting
from funclora.errors import ConfigError, FormatError, NonFiniteError, ParamsError, UnsupportedError, near
from funclora.io.gguf.file import GGUF_DTYPES, AdapterFile, package, read_adapter, write_adapter
from funclora.io.gguf.names import MERGE, Pair, Slot, by_tensor, family_of, slots_of
from funclora.rules.base import Adapters, Rule
from funclora.rules.layouts import Conv1D, Embedding, Linear, Parameter
from funclora.rules.low_rank import LoRA

# A factor closer to 1 than this changes no number by more than rounding in float32.
_ROUNDING = 2.0**-24
_Layout = Linear | Conv1D | Embedding | Parameter
_KNOWN = (Linear, Conv1D, Embedding, Parameter)


def save_gguf(
    path: str | os.PathLike[str], adapters: Adapters, model: nn.Module, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write adapters as a GGUF file that llama.cpp loads together with the base model's file.

    llama.cpp scales every update by alpha/r, with one alpha for all. The most common alpha of the rules is written; for
    a rule with another one (`alpha_pattern`, rsLoRA with several ranks), B is multiplied by the quotient. Dropout,
    which acts only in training, is not written.

    Args:
        path: the file. It is replaced atomically; its folder is made if it does not exist.
        adapters: full parameter name -> `LoRA`.
        model: the base model, of transformers: Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Phi-3, OLMo 2, GPT-2
            or Gemma (1 to 3, text) with a language modelling head. Only its structure is read: it may be on the meta
            device.
        dtype: of the written factors, float32 or float16.

    Raises:
        UnsupportedError: llama.cpp does not support an adapter, or the model's family; or the package `gguf` is not
            installed.
        ParamsError: an adapter does not fit the model, or has no effect.
        ConfigError: there are no adapters, or dtype is not one of these.
        NonFiniteError: an adapter contains NaN or infinity, or numbers outside the range of dtype.
        OSError: the file cannot be written. An existing file is then unchanged.

    Examples:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from funclora import init
        >>> sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        >>> adapters = init(model, LoraConfig(r=2, target_modules=["q_proj"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_gguf(f"{folder}/adapter.gguf", adapters, model)
        ...     sorted(read_adapter(Path(folder, "adapter.gguf")).tensors)
        ['blk.0.attn_q.weight.lora_a', 'blk.0.attn_q.weight.lora_b']
    """
    check_path(path, order="path, adapters, model")
    check_rules(adapters)
    check_model(model)
    if dtype not in GGUF_DTYPES:
        raise ConfigError(f"dtype: expected {' or '.join(map(str, GGUF_DTYPES))}, got {dtype!r}.")
    gguf = package()
    family, slots = family_of(model), slots_of(model, gguf)
    rules = {name: _supported(name, rule, slots) for name, rule in adapters.items()}
    if not rules:
        raise ConfigError("adapters: there is no low-rank adapter to write.")
    check_adapters(base_params(model), rules)
    alpha = _alpha(rules)
    tensors: dict[str, Tensor] = {}
    for name, rule in rules.items():
        slot, factor = slots[name], float(rule.scaling) * rule.r / alpha
        b = rule.b if abs(factor - 1) <= _ROUNDING else rule.b.double() * factor
        for there, pair in slot.pack(rule.a, b).items():
            for leaf, tensor in zip("ab", pair, strict=True):
                tensors[f"{there}.lora_{leaf}"] = _rounded(f"{name!r}: {leaf}", tensor, dtype)
    write_adapter(Path(path), gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.arch]], alpha, tensors, dtype)


def load_gguf(path: str | os.PathLike[str], model: nn.Module) -> tuple[dict[str, Rule], LoraConfig]:
    """Read a LoRA adapter from llama.cpp's format.

    The factors are on the devices of their base weights, in float32 or in the base's dtype if it is wider. Quantised
    factors are dequantised. The configuration has the ranks and alphas of the file, and the shortest names of the
    targets.

    Args:
        path: the file.
        model: the base model, as for `save_gguf`.

    Returns:
        Full parameter name -> `LoRA`, and a configuration with which `save_peft` writes the same adapter.

    Raises:
        FormatError: the file is missing or broken, is not a LoRA adapter, or does not fit the model.
        UnsupportedError: this kind of file or model is not supported; or `gguf` is not installed.
        NonFiniteError: a tensor contains NaN or infinity.

    Examples:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from funclora import init
        >>> sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        >>> adapters = init(model, LoraConfig(r=2, target_modules=["q_proj"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_gguf(f"{folder}/adapter.gguf", adapters, model)
        ...     loaded, config = load_gguf(f"{folder}/adapter.gguf", model)
        >>> name = "model.layers.0.self_attn.q_proj.weight"
        >>> torch.equal(loaded[name].a, adapters[name].a), config.target_modules
        (True, ('q_proj',))
    """
    check_path(path, order="path, model")
    check_model(model)
    gguf, file = package(), Path(path)
    arch, slots = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family_of(model).arch]], slots_of(model, gguf)
    stored = read_adapter(file)
    if stored.arch != arch:
        raise FormatError(
            f"{file}: the adapter is for {stored.arch!r}, but {type(model).__name__} is {arch!r} in llama.cpp."
        )
    known, found = dict(by_tensor(slots)), dict[str, Slot]()
    for tensor in _pairs(file, stored):
        if tensor not in known:
            raise FormatError(f"{file}: {type(model).__name__} has no weight {tensor!r}.{near(tensor, known, n=3)}")
        name, slot = known[tensor]
        if slot.why_not:
            raise UnsupportedError(f"{file}: the adapter of {name!r} cannot be read: {slot.why_not}")
        found[name] = slot
    layouts = _layouts(model, [name for name in slots if name in found])
    adapters: dict[str, Rule] = {
        name: _read_rule(file, stored, found[name], model.get_parameter(name), layout)
        for name, layout in layouts.items()
    }
    return configured(adapters, [targeting(model, adapters)])


def _supported(name: str, rule: Rule, slots: Mapping[str, Slot]) -> LoRA:
    """The rule, if llama.cpp supports it."""
    why = ""
    if type(rule) is not LoRA:
        why = f"llama.cpp does not support the rule {type(rule).__name__}, only LoRA."
    elif name not in slots:
        why = "there is no such weight in GGUF."
    elif slots[name].why_not:
        why = slots[name].why_not
    elif not isinstance(rule.layout, _KNOWN) or (isinstance(rule.layout, Parameter) and rule.layout.transposed):
        why = f"llama.cpp does not support adapters of the layout {type(rule.layout).__name__}."
    if why:
        raise UnsupportedError(f"{name!r} cannot be written for llama.cpp: {why} {MERGE}")
    assert isinstance(rule, LoRA)
    if not float(rule.scaling):
        raise ParamsError(f"{name!r} has scaling 0, so it has no effect. Leave it out.")
    return rule


def _alpha(rules: Mapping[str, LoRA]) -> float:
    """The most common α = s·r, rounded to float32."""
    alphas = [torch.tensor(float(rule.scaling) * rule.r, dtype=torch.float32).item() for rule in rules.values()]
    alpha = Counter(alphas).most_common(1)[0][0]
    if not alpha or not math.isfinite(alpha):
        raise NonFiniteError(f"adapters: their scaling gives alpha={alpha:g} in float32. Scale their B instead.")
    return alpha


def _rounded(what: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor on the CPU in this dtype; its values must be in range."""
    tensor = tensor.detach().cpu()
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(f"{what} contains NaN or infinity. Such an adapter is not written.")
    rounded = tensor.to(dtype)
    if not torch.isfinite(rounded).all():
        raise NonFiniteError(
            f"{what} reaches {tensor.abs().max():g}, beyond the range of {dtype} ({torch.finfo(dtype).max:g})."
            + (" Write it in torch.float32." if dtype != torch.float32 else "")
        )
    if tensor.any() and not rounded.any():
        raise NonFiniteError(
            f"{what} reaches {tensor.abs().max():g}, which {dtype} rounds to 0, so it would have no effect."
        )
    return rounded


def _pairs(file: Path, stored: AdapterFile) -> Iterable[str]:
    """The names of the weights that have both factors, after refusing everything else."""
    names = list(dict.fromkeys(key.removesuffix(".lora_a").removesuffix(".lora_b") for key in stored.tensors))
    if not names:
        raise FormatError(f"{file}: there are no tensors in this file.")
    for name in names:
        if name in stored.tensors:
            raise UnsupportedError(f"{file}: {name!r} is not a factor of a low-rank update; llama.cpp would ignore it.")
        for key in (f"{name}.lora_a", f"{name}.lora_b"):
            if key not in stored.tensors:
                raise FormatError(f"{file}: there is no {key!r}, the other factor of {name!r}.")
    return names


def _read_rule(file: Path, stored: AdapterFile, slot: Slot, weight: Tensor, layout: _Layout) -> LoRA:
    found = {
        tensor: (stored.tensors[f"{tensor}.lora_a"], stored.tensors[f"{tensor}.lora_b"])
        for tensor in slot.tensors
        if f"{tensor}.lora_b" in stored.tensors
    }
    ranks = {_check_pair(file, tensor, pair, slot, layout) for tensor, pair in found.items()}
    if len(ranks) > 1:
        raise UnsupportedError(
            f"{file}: {' and '.join(found)} are one weight in transformers, but their adapters have ranks of their own."
        )
    r, (some_a, some_b) = ranks.pop(), next(iter(found.values()))
    # A part that the file leaves as it is, is changed by 0.
    pairs = [found.get(tensor, (some_a, torch.zeros_like(some_b))) for tensor in slot.tensors]
    if not math.isfinite(stored.alpha):
        raise NonFiniteError(f"{file}: adapter.lora.alpha is {stored.alpha}.")
    device = torch.device("cpu") if weight.is_meta else weight.device
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = (leaf.contiguous().to(device, dtype) for leaf in slot.unpack(pairs))
    return LoRA(a, b, scaling=stored.alpha / r if stored.alpha else 1.0, layout=layout)


def _check_pair(file: Path, tensor: str, pair: Pair, slot: Slot, layout: _Layout) -> int:
    """The rank of two tensors of the file, after comparing them with the weight."""
    r = pair[1].shape[-1]  # where llama.cpp reads it
    blank = [torch.empty(shape, device="meta") for shape in layout.factor_shapes(slot.shape, r)]
    for leaf, have, want in zip("ab", pair, slot.pack(*blank)[tensor], strict=True):
        if not r or have.shape != want.shape:
            raise FormatError(
                f"{file}: '{tensor}.lora_{leaf}' has shape {list(have.shape)}, expected {list(want.shape)} for a "
                f"weight of shape {list(slot.shape)} and rank {r}."
            )
        if not torch.isfinite(have).all():
            raise NonFiniteError(f"{file}: '{tensor}.lora_{leaf}' contains NaN or infinity.")
    return r


def _layouts(model: nn.Module, names: Sequence[str]) -> dict[str, _Layout]:
    """The layouts of weights, in that order: of modules, or of parameters such as experts."""
    layouts: dict[str, _Layout] = {}
    for name, layout in layouts_of(model, names).items():
        if not isinstance(layout, _KNOWN):
            raise UnsupportedError(
                f"{name!r} is not the weight of a linear layer, an embedding or experts of the model."
            )
        layouts[name] = layout
    return layouts

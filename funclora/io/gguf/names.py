"""The names and layouts of a transformers model's weights in llama.cpp.

The names come from the `gguf` package. What llama.cpp's checkpoint converter does to a weight, besides renaming it, is
applied here to the factors of its update:

    weight                     in llama.cpp                         lora_a         lora_b
    nn.Linear, Conv1D          [out, in]                            A [r, in]      B [out, r]
    q_proj, k_proj of Llama    its rows reordered (see `Slot`)      A [r, in]      B [out, r], its rows reordered
    token embedding            [ids, dimension]                     Aᵀ [ids, r]    B [dimension, r]
    experts                    [experts, out, in]                   A [E, r, in]   B [E, out, r]
    gate_up_proj of experts    two weights, its halves              A, A           the halves of B
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from funclora._bind.params import named_tensors
from funclora._config.embeddings import input_embeddings, output_embeddings, setting_of
from funclora.errors import UnsupportedError
from funclora.rules.layouts import stacked

MERGE = (
    "Merge the adapter into the base (funclora.merge), save the model, and convert that with llama.cpp's "
    "convert_hf_to_gguf.py."
)


@dataclass(frozen=True)
class Family:
    """How llama.cpp represents models of a class.

    Attributes:
        arch: the name of the architecture in `gguf.MODEL_ARCH`.
        pairs: llama.cpp rotates neighbouring rows of a query or key head, transformers rows half a head apart.
        tied: llama.cpp has no separate output layer for this architecture.
    """

    arch: str
    pairs: bool = False
    tied: bool = False


FAMILIES = {
    "GPT2LMHeadModel": Family("GPT2"),
    "Gemma2ForCausalLM": Family("GEMMA2", tied=True),
    "Gemma3ForCausalLM": Family("GEMMA3"),
    "GemmaForCausalLM": Family("GEMMA", tied=True),
    "LlamaForCausalLM": Family("LLAMA", pairs=True),
    "MistralForCausalLM": Family("LLAMA", pairs=True),
    "MixtralForCausalLM": Family("LLAMA", pairs=True),
    "Olmo2ForCausalLM": Family("OLMO2"),
    "Phi3ForCausalLM": Family("PHI3"),
    "Qwen2ForCausalLM": Family("QWEN2"),
    "Qwen3ForCausalLM": Family("QWEN3"),
    "Qwen3MoeForCausalLM": Family("QWEN3MOE"),
}
# The tensors to which llama.cpp applies adapters, in the graphs of these families.
_ADAPTABLE = frozenset({
    "ATTN_K", "ATTN_OUT", "ATTN_Q", "ATTN_QKV", "ATTN_V", "FFN_DOWN", "FFN_DOWN_EXP", "FFN_GATE", "FFN_GATE_EXP",
    "FFN_GATE_INP", "FFN_UP", "FFN_UP_EXP", "OUTPUT", "TOKEN_EMBD",
})  # fmt: skip
# transformers keeps the experts' gate_proj above their up_proj, in one parameter.
_JOINED = re.compile(r"\.experts\.gate_up_proj$")
Pair = tuple[Tensor, Tensor]  # lora_a and lora_b


@dataclass(frozen=True)
class Slot:
    """The representation of one weight in llama.cpp.

    Attributes:
        tensors: the names of the weight there: one, or those of the parts that it is cut into along its outputs.
        shape: the shape of the weight in transformers.
        heads: if not 0, the number of heads that the rows belong to. Within each head, the two halves are interleaved:
            row i of the first half becomes row 2i, row i of the second half becomes row 2i + 1.
        table: the weight is an embedding.
        why_not: why llama.cpp cannot adapt it; empty if it can.
    """

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    heads: int = 0
    table: bool = False
    why_not: str = ""

    def pack(self, a: Tensor, b: Tensor) -> dict[str, Pair]:
        """Name there -> `lora_a` and `lora_b`, of the factors `a: [*experts, r, in]` and `b: [*experts, out, r]`."""
        if self.heads:
            b = b.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        parts = b.chunk(len(self.tensors), dim=-2)
        return {name: (a.mT if self.table else a, part) for name, part in zip(self.tensors, parts, strict=True)}

    def unpack(self, pairs: Sequence[Pair]) -> Pair:
        """The inverse of `pack`, of one pair for each name. Parts with different `lora_a` add up their ranks."""
        a, b = stacked(pairs)
        if self.heads:
            b = b.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return (a.mT, b) if self.table else (a, b)


def family_of(model: nn.Module) -> Family:
    """The family of a model, by its class or one of its base classes.

    Raises:
        UnsupportedError: it belongs to none.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith("transformers."):
            return FAMILIES[cls.__name__]
    raise UnsupportedError(
        f"model: {type(model).__name__} has no form in GGUF; supported are: {', '.join(sorted(FAMILIES))}. {MERGE}"
    )


def slots_of(model: nn.Module, gguf: ModuleType) -> dict[str, Slot]:
    """The weights of a model that have a name in llama.cpp, by their full name.

    Args:
        model: a model of one of the families. Only its structure is read, so it may be on the meta device.
        gguf: the package of that name.
    """
    family = family_of(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.arch], setting_of(model, "num_hidden_layers"))
    tied = family.tied or _is_tied(model)
    found = {}
    for name, tensor, _, _ in named_tensors(model):
        joined = _JOINED.search(name)
        parts = [_JOINED.sub(f".experts.{part}_proj", name) for part in ("gate", "up")] if joined else [name]
        known = [names.get_type_and_name(part, try_suffixes=(".weight",)) for part in parts]
        if name.endswith(".bias") or not all(known):
            continue
        # The parameters of experts have no ".weight" in transformers.
        tensors = tuple(each[1] if each[1].endswith(".weight") else f"{each[1]}.weight" for each in known)
        kind, heads = known[0][0].name, 0
        if family.pairs and kind in ("ATTN_Q", "ATTN_K"):
            heads = setting_of(model, "num_attention_heads" if kind == "ATTN_Q" else "num_key_value_heads")
        why_not = "" if kind in _ADAPTABLE else f"llama.cpp does not apply adapters to {tensors[0]!r}."
        if tied and kind == "OUTPUT":
            why_not = f"llama.cpp has no {tensors[0]!r} for a model whose output layer is tied to its token embedding."
        if tied and kind == "TOKEN_EMBD":
            why_not = "llama.cpp also uses the adapter of a tied token embedding for the output layer, and stops."
        found[name] = Slot(tensors, tuple(tensor.shape), heads, kind == "TOKEN_EMBD", why_not)
    return found


def _is_tied(model: nn.Module) -> bool:
    table, head = (
        model.get_parameter(f"{name}.weight") for name in (input_embeddings(model), output_embeddings(model))
    )
    return bool(setting_of(model, "tie_word_embeddings")) or head is table


def by_tensor(slots: dict[str, Slot]) -> Iterator[tuple[str, tuple[str, Slot]]]:
    """`(name in llama.cpp, (full name, slot))` for each weight."""
    return ((tensor, (name, slot)) for name, slot in slots.items() for tensor in slot.tensors)

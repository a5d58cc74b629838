"""How PEFT 0.21 stores adapters: one mapping from layouts to keys and tensors, used in both directions.

A key is `base_model.model.` + path of the module + `.` + suffix. PEFT puts a wrapper around every module it adapts
and calls what it wraps `base_layer`, so a path that leads through an adapted module has `.base_layer` after it:

    q_proj.lora_A.weight [r, in]              q_proj.lora_B.weight [out, r]            nn.Linear, HF Conv1D
    emb.lora_embedding_A [r, N]               emb.lora_embedding_B [D, r]              nn.Embedding
    conv.lora_A.weight   [r, in, *k]          conv.lora_B.weight   [out, r, 1, ..]     nn.Conv1d/2d/3d
    attn.lora_A.weight, attn.base_layer.out_proj.lora_A.weight, ...                    nn.MultiheadAttention
    experts.lora_A.weight [E·r, in]           experts.lora_B.weight [out, r·E]         target_parameters, 3-D
    q_proj.lora_magnitude_vector [out]        conv.lora_magnitude_vector [1, out, 1, ..]
    q_proj.base_layer.bias, head.weight                                                trained in full
    q_proj.lora_B.bias [out]                                                           lora_bias
    emb.token_adapter.trainable_tokens_delta [n, D]                                    trainable_token_indices

A new layout is one entry of `FORMS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from funclora.rules.layouts import Attention, Conv, Conv1D, Embedding, Layout, Linear, Matrices, Parameter

PREFIX = "base_model.model."
Leaves = dict[str, Tensor]  # by field of the rule: "a", "b", "magnitude"


@dataclass(frozen=True)
class PeftTarget:
    """A weight with a low-rank rule, as PEFT sees it.

    Attributes:
        name: full name of the parameter.
        module: full name of the module that PEFT adapts.
        layout: where the matrix is in the weight.
        shape: shape of the weight.
        by_parameter: it is named in `target_parameters`.
    """

    name: str
    module: str
    layout: Layout
    shape: tuple[int, ...]
    by_parameter: bool

    @property
    def owner(self) -> str:
        """Full name of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """The name that the patterns of ranks and alphas are matched with."""
        return self.name if self.by_parameter else self.module

    @property
    def form(self) -> Form:
        """How PEFT stores the leaves of the rule."""
        return PARAMETER if self.by_parameter else FORMS[type(self.layout)]

    @property
    def experts(self) -> int:
        """How many matrices the weight holds."""
        return self.shape[0] if self.by_parameter and len(self.shape) == 3 else 1

    @property
    def in_out_linear(self) -> bool:
        """It is the weight of a `Conv1D` of transformers, for which PEFT has a field in its configuration."""
        return isinstance(self.layout, Conv1D)

    @property
    def stored_as_in_out(self) -> bool:
        """The weight holds `[*lead, in, out]`."""
        return isinstance(self.layout, Matrices) and self.layout.transposed


# --- leaves and the tensors of a file --------------------------------------------------------------------------


def _same(leaves: Leaves, _: PeftTarget) -> Leaves:
    return leaves


def _pack_conv(leaves: Leaves, wrapped: PeftTarget) -> Leaves:
    """A magnitude broadcasts over the weight."""
    if "magnitude" not in leaves:
        return leaves
    return leaves | {"magnitude": leaves["magnitude"].reshape(1, -1, *(1 for _ in wrapped.shape[2:]))}


def _unpack_conv(leaves: Leaves, _: PeftTarget) -> Leaves:
    return leaves | {"magnitude": leaves["magnitude"].flatten()} if "magnitude" in leaves else leaves


def _pack_parameter(leaves: Leaves, wrapped: PeftTarget) -> Leaves:
    """The factors of experts are stored together: grouped by expert in A, but by rank in B.

    A plain matrix is `[out, in]` to PEFT, whatever its owner says.
    """
    a, b = leaves["a"], leaves["b"]
    if len(wrapped.shape) == 3:
        return {"a": a.flatten(0, 1), "b": b.permute(1, 2, 0).flatten(1)}
    return swapped(leaves) if wrapped.stored_as_in_out else leaves


def _unpack_parameter(leaves: Leaves, wrapped: PeftTarget) -> Leaves:
    a, b = leaves["a"], leaves["b"]
    if len(wrapped.shape) == 3:
        n = wrapped.experts
        return {"a": a.unflatten(0, (n, -1)), "b": b.unflatten(1, (-1, n)).permute(2, 0, 1)}
    return swapped(leaves) if wrapped.stored_as_in_out else leaves


def swapped(leaves: Leaves) -> Leaves:
    """The factors of the transposed update: (B·A)ᵀ = Aᵀ·Bᵀ."""
    return {"a": leaves["b"].mT, "b": leaves["a"].mT}


@dataclass(frozen=True)
class Form:
    """How the leaves of a rule are stored.

    Attributes:
        a: suffix of the key of A.
        b: suffix of the key of B.
        magnitude: suffix of the key of a DoRA magnitude.
        pack: leaves of the rule -> tensors of the file.
        unpack: tensors of the file -> leaves of the rule.
    """

    a: str = "lora_A.weight"
    b: str = "lora_B.weight"
    magnitude: str = "lora_magnitude_vector"
    pack: Callable[[Leaves, PeftTarget], Leaves] = _same
    unpack: Callable[[Leaves, PeftTarget], Leaves] = _same

    def suffix(self, leaf: str) -> str:
        """The suffix of the key of a leaf."""
        suffix: str = getattr(self, leaf)
        return suffix


FORMS: dict[type[Layout], Form] = {
    Linear: Form(),
    Conv1D: Form(),
    Attention: Form(),
    Embedding: Form(a="lora_embedding_A", b="lora_embedding_B"),
    Conv: Form(pack=_pack_conv, unpack=_unpack_conv),
}
PARAMETER = Form(pack=_pack_parameter, unpack=_unpack_parameter)


# --- keys ------------------------------------------------------------------------------------------------------


class Keys:
    """The keys of one adapter.

    Examples:
        >>> linear = PeftTarget("attn.q.weight", "attn.q", Linear(), (2, 2), by_parameter=False)
        >>> keys = Keys([linear])
        >>> keys.leaf(linear, "a"), keys.full("attn.q.bias")
        ('base_model.model.attn.q.lora_A.weight', 'base_model.model.attn.q.base_layer.bias')
    """

    def __init__(self, wrapped: Iterable[PeftTarget]) -> None:
        # Every adapted parameter of target_parameters has a wrapper of its own around the module.
        self._wrappers = Counter(w.owner for w in wrapped)

    def leaf(self, wrapped: PeftTarget, leaf: str) -> str:
        """The key of a leaf of a low-rank rule."""
        inner = 0  # the parameter that was registered first has the innermost wrapper
        if isinstance(wrapped.layout, Parameter):
            inner = wrapped.layout.siblings - 1 - wrapped.layout.position
        path, _, last = wrapped.owner.rpartition(".")
        owner = f"{self._through(path)}{last}" + ".base_layer" * inner
        return f"{PREFIX}{owner}.{wrapped.form.suffix(leaf)}"

    def full(self, name: str) -> str:
        """The key of a parameter that is stored as it is."""
        path, _, last = name.rpartition(".")
        return f"{PREFIX}{self._through(path)}{last}"

    def bias_of_b(self, name: str) -> str:
        """The key of the value that `lora_bias` adds to the bias with this full name."""
        path, _, last = name.rpartition(".")[0].rpartition(".")
        return f"{PREFIX}{self._through(path)}{last}.lora_B.bias"

    def tokens(self, name: str) -> str:
        """The key of the trained rows of the embedding with this full name."""
        return f"{PREFIX}{self._through(name.rpartition('.')[0])}token_adapter.trainable_tokens_delta"

    def _through(self, path: str) -> str:
        """The path with its wrappers, ending with a dot; "" for the model itself."""
        parts: list[str] = []
        done: list[str] = []
        for part in path.split(".") if path else ():
            parts.append(part)
            done += [part, *["base_layer"] * self._wrappers[".".join(parts)]]
        return "".join(f"{part}." for part in done)

"""The change of one weight, as matrices: its rows before and after, and the factors if there are any.

Every analysis reads its input through this module, one parameter at a time. A tuned weight counts as the rule `Full`,
so two state dicts are a special case of a base and an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from funclora._api.arguments import check_model, check_params, refuse
from funclora._config.layers import weights_of
from funclora._many.stack import Stack
from funclora._quant.tensor import plain_weight
from funclora.errors import NonFiniteError, ParamsError, UnsupportedError, near
from funclora.rules.base import Params, Rule
from funclora.rules.dense import Delta, Full
from funclora.rules.dora import NORM_BLOCK
from funclora.rules.layouts import Conv, Layout, Linear, Parameter
from funclora.rules.low_rank import LoRA, LowRank, lora_of
from funclora.rules.tokens import Tied, TrainableTokens
from funclora.rules.weights import refuse_weight

Tuned = Mapping[str, Rule] | Mapping[str, Tensor]
"""The analysed object: an adapter, or tuned weights. A mapping that reads on demand is read item by item."""

# Changes with more elements are stored in float32, which needs half the memory.
_DOUBLE = 2**20


@dataclass(frozen=True)
class Change:
    """The change of one weight by a rule.

    Attributes:
        name: full name of the parameter.
        given: the rule as the adapter has it.
        rule: the same for `weight`.
        weight: M, `[*lead, out, in]`, not copied; None without the base.
        is_matrix: the parameter is a matrix, or several. A vector is represented as one row, a weight of unknown layout
            as the rows of its first dimension.
        low_rank_part: only s·B·A of a DoRA rule is known, because the base is missing.
    """

    name: str
    given: Rule
    rule: Rule
    weight: Tensor | None
    is_matrix: bool = True
    low_rank_part: bool = False

    @property
    def of(self) -> str:
        """The name of the change: ΔW, or s·B·A if only this part is known."""
        return "s·B·A" if self.low_rank_part else "ΔW"

    @property
    def shape(self) -> tuple[int, ...]:
        """`[*lead, out, in]`."""
        if self.weight is not None:
            return tuple(self.weight.shape)
        if isinstance(self.rule, LowRank):
            return (*self.rule.b.shape[:-1], self.rule.a.shape[-1])
        assert isinstance(self.rule, Delta)
        return tuple(self.rule.value.shape)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A `[*lead, r, in]` and s·B `[*lead, out, r]` in float64, if ΔW is their product."""
        if not isinstance(self.rule, LoRA):
            return None
        a, b = self.rule.a.detach().double(), self.rule.scaling * self.rule.b.detach().double()
        refuse_nonfinite(self.name, a, b)
        return a, b

    @cached_property
    def core(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Q `[*lead, out, k]`, C and P `[*lead, in, l]` with ΔW = Q·C·Pᵀ, Q and P orthonormal, if ΔW is a product."""
        if self.factors is None:
            return None
        a, b = self.factors
        q, r1 = torch.linalg.qr(b)
        p, r2 = torch.linalg.qr(a.mT)
        return q, r1 @ r2.mT, p

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of M and the same rows rewritten, in float64: `[*lead, n, in]`, block after block."""
        if self.weight is None:
            raise AssertionError(f"{self.name}: no base weight")
        for start, rows in _rows(self.weight):
            after = _of_rows(self.rule, start, rows.shape[-2]).dense(rows).detach().double()
            refuse_nonfinite(self.name, rows, after)
            yield rows, after

    def dense(self) -> Tensor:
        """ΔW, `[*lead, out, in]`: in float64, or in float32 if it is large."""
        dtype = torch.float64 if torch.Size(self.shape).numel() <= _DOUBLE else torch.float32
        if self.factors is not None:
            a, b = self.factors
            return (b @ a).to(dtype)
        if isinstance(self.rule, Delta):
            value = self.rule.scaling * self.rule.value.detach().double()
            refuse_nonfinite(self.name, value)
            return value.to(dtype)
        return torch.cat([(after - before).to(dtype) for before, after in self.blocks()], dim=-2)

    def norm(self) -> float:
        """‖ΔW‖ over all its matrices (Frobenius norm)."""
        if self.core is not None:
            return _norm(self.core[1])
        if isinstance(self.rule, Delta):
            return _norm(self.dense())
        return math.sqrt(sum(float((after - before).square().sum()) for before, after in self.blocks()))

    def base_norm(self) -> float | None:
        """‖W‖, if the base is there."""
        if self.weight is None:
            return None
        norm = math.sqrt(sum(float(rows.square().sum()) for _, rows in _rows(self.weight)))
        if not math.isfinite(norm):
            raise NonFiniteError(f"the base weight {self.name!r} holds NaN or infinity.")
        return norm


def changes(tuned: Tuned, params: Params | None, model: nn.Module | None = None) -> Iterator[Change]:
    """The change of each weight, one after the other.

    Args:
        tuned: full parameter name -> rule, or -> tuned weight. Integer tensors, which are not trained, are skipped.
        params: the base weights. Each name is read once.
        model: gives the layouts of weights whose rule does not have one: any tensor, `Full` and `Delta`.

    Raises:
        ArgumentError: `tuned` is neither an adapter nor weights.
        UnsupportedError: it is a member of a stack inside vmap.
        ParamsError: a rule or tensor does not match its base weight, or needs one that is missing.
    """
    known = _checked("tuned", tuned, params, model)
    for name in tuned:
        if (found := _found(name, tuned, params, known)) is not None:
            yield found


def paired(
    first: Tuned, second: Tuned, params: Params | None, model: nn.Module | None = None
) -> Iterator[tuple[Change | None, Change | None]]:
    """The changes of each weight by two adapters, None if one has no change of it; as `changes`.

    Every parameter that one of them changes appears once: first the parameters of the first adapter, then the others.
    """
    known = _checked("first", first, params, model)
    _checked("second", second, params, model)
    for name in dict.fromkeys([*first, *second]):
        here = None if params is None else {name: _base(name, params)}  # read once for both
        sides = [side for side in (first, second) if name in side]
        # A tuned weight is read with the layout of the other adapter's rule, if that rule has one.
        said = [value.layout for side in sides if isinstance(value := side[name], Rule) and value.layout is not None]
        layout = {name: said[0]} if said else known
        one, two = (_found(name, side, here, layout) if name in side else None for side in (first, second))
        if one is not None and two is not None and one.shape != two.shape:
            raise ParamsError(
                f"{name!r}: one adapter changes a matrix of shape {list(one.shape)}, the other one of "
                f"{list(two.shape)}. They are not of one model."
            )
        if one is not None or two is not None:
            yield one, two


def change(name: str, rule: Rule, weight: Tensor | None, layout: Layout | None = None) -> Change:
    """The change of one weight by a rule.

    Args:
        name: full name of the parameter.
        rule: the rule.
        weight: the base weight, as its module stores it; None if there is none.
        layout: where its matrix is, if the rule does not have a layout.

    Raises:
        ParamsError: the rule does not match the weight, or needs one.
    """
    if weight is not None:
        refuse_weight(name, weight)
        rule.check(name, weight)
        weight = plain_weight(weight).detach()
    low = rule if isinstance(rule, LowRank) else lora_of(rule)
    if low is not None:
        return replace(_of_low_rank(name, low, weight), given=rule)
    if isinstance(rule, TrainableTokens) and weight is not None:
        return Change(name, rule, replace(rule, layout=Parameter()), rule.layout.to_matrix(weight))
    if weight is None and not isinstance(rule, Delta):
        raise ParamsError(
            f"{name!r}: {type(rule).__name__} replaces values, and what it changes depends on the base weight. Give "
            "the base weights (params=)."
        )
    if not isinstance(rule, (Full, Delta)):  # a rule from outside: only its dense form is known
        assert weight is not None
        return replace(change(name, Full(rule.dense(weight).detach()), weight, layout), given=rule)
    whole: Tensor = rule.value.detach()
    if layout is None and whole.dim() in (2, 4, 5):
        layout = Linear() if whole.dim() == 2 else Conv()
    matrix = None if weight is None else _as_rows(weight, layout)
    return Change(name, rule, replace(rule, value=_as_rows(whole, layout)), matrix, is_matrix=layout is not None)


def layouts(model: nn.Module) -> dict[str, Layout]:
    """Full parameter name -> layout, for all parameters that are matrices."""
    found: dict[str, Layout] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        of_kind = weights_of(module) or {}
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1:
                layout = of_kind.get(leaf) or Parameter(bool(getattr(module, "is_transposed", False)))
                found[f"{path}.{leaf}" if path else leaf] = layout
    return found


def refuse_nonfinite(name: str, *tensors: Tensor) -> None:
    """Raise `NonFiniteError` if one of them holds NaN or infinity."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NonFiniteError(f"{name!r}: the base weight, or what is done to it, holds NaN or infinity.")


def _checked(where: str, tuned: object, params: Params | None, model: nn.Module | None) -> dict[str, Layout]:
    """The layouts that the model gives. Raises if `tuned` is neither an adapter nor a state dict."""
    if not isinstance(tuned, Mapping):
        remedy = "Take the members of a stack one by one: stack[i]." if isinstance(tuned, Stack) else ""
        refuse(where, "an adapter (a dict of rules) or tuned weights (a dict of tensors)", tuned, remedy)
    check_model(model, optional=True)
    check_params(params, optional=True)
    if not tuned:
        raise ParamsError(f"{where}: expected an adapter or a state dict, got one with nothing in it.")
    return {} if model is None else layouts(model)


def _found(name: str, tuned: Tuned, params: Params | None, known: Mapping[str, Layout]) -> Change | None:
    """The change of one weight; None for integers."""
    value = tuned[name]
    if isinstance(value, Tensor) and not value.is_floating_point():
        return None
    return change(name, _rule(name, value, tuned), None if params is None else _base(name, params), known.get(name))


def _rule(name: str, value: object, tuned: Tuned) -> Rule:
    if isinstance(value, Tensor):
        return Full(value)
    if isinstance(value, Tied):
        followed = tuned.get(value.to)
        if not isinstance(followed, Rule) or isinstance(followed, Tied):
            raise ParamsError(f"{name!r} is tied to {value.to!r}, which has no rule of its own.")
        value = followed
    if not isinstance(value, Rule):
        refuse(repr(name), "a rule (LoRA, DoRA, Full, ...) or a tensor", value)
    if isinstance(value.scaling, Tensor):
        raise UnsupportedError(
            f"{name!r}: the scaling is a tensor, as inside vmap over members whose scalings differ. Analyse the "
            "members one by one."
        )
    return value


def _base(name: str, params: Params) -> Tensor:
    weight = params.get(name)
    if weight is None:
        raise ParamsError(f"params lack {name!r}, the base weight of what is analysed.{near(name, params)}")
    check_params({name: weight})  # one item only: a mapping may read on demand
    if weight.is_meta:
        raise ParamsError(f"params hold {name!r} on the meta device, but its values are needed. Give real tensors.")
    return weight


def _of_low_rank(name: str, rule: LowRank, weight: Tensor | None) -> Change:
    a, b = rule.layout.factors(rule.a, rule.b)
    flat = replace(rule, a=a, b=b, layout=Parameter())
    if weight is not None:
        return Change(name, rule, flat, rule.layout.to_matrix(weight))
    part = LoRA(a, b, scaling=rule.scaling, layout=Parameter())
    return Change(name, rule, part, None, low_rank_part=not isinstance(rule, LoRA))


def _as_rows(tensor: Tensor, layout: Layout | None) -> Tensor:
    """The matrices of a weight, `[*lead, out, in]`; rows of its first dimension if the layout is unknown."""
    if layout is not None:
        return layout.to_matrix(tensor)
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)


def _rows(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rows of a matrix `[*lead, out, in]` in float64, some at a time, with the index of the first."""
    n_out = matrix.shape[-2]
    n = max(1, min(n_out, NORM_BLOCK * n_out // max(1, matrix.numel())))
    for start in range(0, n_out, n):
        yield start, matrix[..., start : start + n, :].double()


def _of_rows(rule: Rule, start: int, length: int) -> Rule:
    """The rule of the rows from `start` on."""
    if isinstance(rule, (Full, Delta)):
        return replace(rule, value=rule.value.narrow(-2, start, length))
    part = rule.narrow_outputs(start, length)
    assert part is not None
    return part


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def describe(rule: Rule) -> tuple[str, int | None, float | None]:
    """The class name of a rule, and its rank and scaling if it has them."""
    return type(rule).__name__, rule.r, None if rule.scaling is None else float(rule.scaling)

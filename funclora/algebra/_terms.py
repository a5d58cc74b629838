"""The terms of a combination: for every parameter, the rules of the adapters that rewrite it, with their weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funclora._api.arguments import check_numbers, refuse
from funclora._bind.checks import check_rules
from funclora._many.stack import Stack
from funclora._torch.functions import is_mapped
from funclora.errors import ConfigError, NonFiniteError, ParamsError, UnsupportedError, near
from funclora.rules.base import Adapters, Params, Rule
from funclora.rules.dense import Full
from funclora.rules.layouts import Layout, Parameter
from funclora.rules.low_rank import LoRA, lora_of, low_rank_of
from funclora.rules.weights import refuse_weight


class Term(NamedTuple):
    """One term in the sum for one parameter.

    Attributes:
        weight: w.
        rule: the rule.
        low: its update s·B·A; None if it replaces the weight.
        linear: the rule adds this update to the weight, and does nothing else.
    """

    weight: float
    rule: Rule
    low: LoRA | None
    linear: bool

    @staticmethod
    def of(weight: float, rule: Rule) -> Term:
        """The term of a rule that `rules` has checked, with a weight."""
        lora = lora_of(rule)
        return Term(weight, rule, low_rank_of(rule) if lora is None else lora, lora is not None)

    @property
    def coefficient(self) -> float:
        """The factor of B·A of a low-rank rule: w·s."""
        assert self.low is not None
        return self.weight * float(self.low.scaling)


def gather(adapters: Sequence[Adapters], weights: Sequence[float] | None) -> dict[str, list[Term]]:
    """The terms of every parameter that at least one adapter rewrites, in the order of the adapters.

    Args:
        adapters: one or more adapters.
        weights: one number for each; 1 for all if None.

    Raises:
        ConfigError: the weights are not one finite number for each adapter.
        ArgumentError: an argument is not an adapter.
        UnsupportedError: an adapter has rules that cannot be combined.
        ParamsError: rules of one parameter do not match each other.
    """
    given: object = adapters
    if not isinstance(given, (list, tuple)):
        remedy = "Give the members of a stack: list(stack)." if isinstance(given, Stack) else ""
        refuse("adapters", "a list of adapters", given, remedy or "Put a single adapter into a list: [adapters].")
    if not adapters:
        raise ConfigError("adapters: expected at least one adapter, got an empty list.")
    if weights is None:
        weights = [1.0] * len(adapters)
    check_numbers(weights, "weights")
    if len(weights) != len(adapters):
        raise ConfigError(f"weights: expected {len(adapters)}, one for each adapter, got {len(weights)}.")
    terms: dict[str, list[Term]] = {}
    for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        where = f"adapters[{i}]"
        number = finite(f"weights[{i}]", weight)
        for name, rule in rules(where, adapter).items():
            terms.setdefault(name, []).append(Term.of(number, rule))
    for name, of_one in terms.items():
        _check_fit(name, of_one)
    return terms


def rules(where: str, adapters: object) -> dict[str, Rule]:
    """The rules of one adapter, after checking that they can be combined."""
    check_rules(adapters, where)
    assert isinstance(adapters, Mapping)
    if not adapters:
        raise ParamsError(f"{where}: the adapter has no rules.")
    found: dict[str, Rule] = {}
    for name, rule in adapters.items():
        if not isinstance(rule, Full) and (not isinstance(rule, Rule) or low_rank_of(rule) is None):
            raise UnsupportedError(
                f"{where}[{name!r}]: expected LoRA, DoRA or Full, or a rule that has as_lora or low_rank, got "
                f"{type(rule).__name__}. Leave the parameter out, or merge its adapter into the base weights first."
            )
        if isinstance(rule.scaling, Tensor):
            raise UnsupportedError(
                f"{where}[{name!r}]: the scaling is a tensor, as inside vmap over members whose scalings differ. "
                "Combine the members one by one."
            )
        found[name] = rule
    return found


def finite(where: str, number: object) -> float:
    """A finite number, or `ConfigError`."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ConfigError(f"{where}: expected a finite number, got {number!r}.")
    return float(number)


def positive(where: str, number: object) -> int:
    """A positive integer, or `ConfigError`."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ConfigError(f"{where}: expected a positive integer, got {number!r}.")
    return number


def base_of(name: str, terms: Iterable[Term], params: Params | None, why: str) -> Tensor:
    """The base weight of a parameter, after checking that every rule matches it."""
    if params is None:
        raise ParamsError(f"{name!r}: {why} Give the base weights: params=.")
    if name not in params:
        raise ParamsError(f"params lack {name!r}. {why}{near(name, params)}")
    weight = params[name]
    if weight.is_meta:
        raise ParamsError(f"params have {name!r} on the meta device. {why} Give real tensors.")
    refuse_weight(name, weight)
    for term in terms:
        term.rule.check(name, weight)
    return weight


def change(rule: Rule, weight: Tensor) -> Tensor:
    """The change of the weight by the rule, in the weight's shape and in at least float32."""
    dense = rule.dense(weight)
    dtype = compute_dtype(dense.dtype, weight.dtype)
    return dense.to(dtype) - weight.to(dtype)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The widest of the dtypes and float32."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def lead(rule: LoRA) -> int:
    """The number of leading dimensions of the factors that count matrices (experts)."""
    return rule.layout.factors(rule.a, rule.b)[0].dim() - 2


def made_of(name: str, like: Sequence[LoRA], a: Tensor, b: Tensor, *, scaling: float = 1.0) -> LoRA:
    """The rule s·B·A that replaces other rules: with their layout and dtype, and their dropout if all have the same.

    Args:
        name: of the parameter, for messages.
        like: the rules that it replaces.
        a: `[*lead, r, in]`, or as the layout stores it.
        b: `[*lead, out, r]`, or as the layout stores it.
        scaling: s.
    """
    first, n = like[0], lead(like[0])
    r = a.shape[n]
    a = a.reshape(*a.shape[: n + 1], *first.a.shape[n + 1 :])
    b = b.reshape(*b.shape[: n + 1], r, *first.b.shape[n + 2 :])
    dtype = reduce(torch.promote_types, (leaf.dtype for rule in like for leaf in (rule.a, rule.b)))
    dropout = first.dropout if all(rule.dropout == first.dropout for rule in like) else 0.0
    # The layout whose place among siblings counts most of them.
    layout = max((rule.layout for rule in like), key=lambda it: it.siblings if isinstance(it, Parameter) else 0)
    factors = (rounded(f"{name!r}: {leaf}", f, dtype) for leaf, f in (("a", a), ("b", b)))
    return LoRA(*factors, scaling=scaling, dropout=dropout, layout=layout)


def rounded(where: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in the given dtype, or `NonFiniteError` if it is outside its range."""
    result = value.to(dtype)
    # Inside vmap or grad values cannot be read; the caller can check them outside.
    if not is_mapped(result) and not torch.isfinite(result).all():
        raise NonFiniteError(
            f"{where} of the result contains NaN or infinity in {dtype}. Check the adapters, or use a wider dtype."
        )
    return result


def _check_fit(name: str, terms: Sequence[Term]) -> None:
    """Raise `ParamsError` if the rules of one parameter are for weights of different shapes or devices."""
    low_rank = [term.low for term in terms if term.low is not None]
    seen: dict[str, set[Any]] = {
        "layouts": {_place(rule.layout) for rule in low_rank},
        "shapes of a, except for the rank": {_without(rule.a, lead(rule)) for rule in low_rank},
        "shapes of b, except for the rank": {_without(rule.b, lead(rule) + 1) for rule in low_rank},
        "shapes": {tuple(term.rule.value.shape) for term in terms if isinstance(term.rule, Full)},
        "devices": {str(getattr(term.rule, leaf).device) for term in terms for leaf in term.rule.leaf_names},
    }
    for what, values in seen.items():
        if len(values) > 1:
            listed = " and ".join(sorted(map(str, values)))
            raise ParamsError(f"{name!r}: the adapters have different {what}: {listed}. They are not of one model.")


def _place(layout: Layout) -> Layout:
    """The layout without the place among siblings, which depends on the other targets of the adapter."""
    return replace(layout, position=0, siblings=1) if isinstance(layout, Parameter) else layout


def _without(factor: Tensor, dim: int) -> tuple[int, ...]:
    return (*factor.shape[:dim], *factor.shape[dim + 1 :])

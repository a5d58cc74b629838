"""Exact arithmetic: sums of adapters by concatenation of their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import cast

import torch

from funclora._api.arguments import check_params
from funclora._api.deprecated import warn_old
from funclora.algebra._elementwise import Mixing
from funclora.algebra._terms import (
    Term,
    base_of,
    change,
    compute_dtype,
    finite,
    gather,
    lead,
    made_of,
    rounded,
    rules,
)
from funclora.errors import ConfigError, UnsupportedError
from funclora.rules.base import Adapters, Params, Rule
from funclora.rules.dense import Full
from funclora.rules.low_rank import LoRA

_FULL = "Full replaces the weight, so its change can only be computed with the base weight."


def scale(adapters: Adapters, factor: float, *, params: Params | None = None) -> dict[str, Rule]:
    """The adapter with its changes of the weights multiplied by `factor`.

    Only the scaling is multiplied; A and B are the same tensors. `Full` becomes `base + factor·(value − base)`.

    Args:
        adapters: full parameter name -> rule.
        factor: any finite number; 1 returns the rules as they are.
        params: the base weights, needed for `Full` only.

    Returns:
        Full parameter name -> rule.

    Raises:
        ConfigError: `factor` is not a finite number.
        UnsupportedError: the adapter has a DoRA rule. Its change is not linear in its tensors, so no DoRA rule has
            a multiple of this change.
        ParamsError: the base weight of a `Full` is missing.

    Examples:
        >>> from funclora import LoRA
        >>> scale({"weight": LoRA(torch.ones(1, 3), torch.ones(2, 1), scaling=2.0)}, 0.25)["weight"].scaling
        0.5
    """
    check_params(params, optional=True)
    factor = finite("factor", factor)
    found = rules("adapters", adapters)
    if factor == 1:
        return dict(found)
    return {name: _scaled(name, Term.of(factor, rule), params) for name, rule in found.items()}


def negate(adapters: Adapters, *, params: Params | None = None) -> dict[str, Rule]:
    """The adapter with the opposite changes (task negation, arXiv 2212.04089).

    Args:
        adapters: full parameter name -> rule.
        params: the base weights, needed for `Full` only.

    Returns:
        Full parameter name -> rule. Factors are the same tensors.

    Raises:
        UnsupportedError: the adapter has a DoRA rule.
        ParamsError: the base weight of a `Full` is missing.

    Examples:
        >>> from funclora import LoRA
        >>> adapters = {"weight": LoRA(torch.ones(1, 3), torch.ones(2, 1))}
        >>> add([adapters, negate(adapters)])["weight"].dense(torch.zeros(2, 3)).any()
        tensor(False)
    """
    return scale(adapters, -1.0, params=params)


def add(adapters: Sequence[Adapters], *more: Adapters, params: Params | None = None) -> dict[str, Rule]:
    """The exact sum of adapters: their factors are concatenated, and their ranks add up.

    Ranks, scalings and targets may differ. `recompress` reduces the rank of the result.

    Args:
        adapters: adapters of one model.
        *more: deprecated, and so is a single adapter instead of the list.
        params: the base weights, needed if several adapters rewrite a parameter and one of their rules is `Full`.

    Returns:
        Full parameter name -> rule, as from `task_arithmetic` with the weight 1 for each.

    Raises:
        UnsupportedError: one of several rules of a parameter is DoRA.
        ParamsError: rules do not match each other, or base weights are missing.

    Examples:
        >>> from funclora import LoRA
        >>> one = {"weight": LoRA(torch.ones(1, 3), torch.ones(2, 1), scaling=2.0)}
        >>> other = {"weight": LoRA(torch.ones(4, 3), torch.ones(2, 4), scaling=0.5)}
        >>> total = add([one, other])["weight"]
        >>> total.r, total.dense(torch.zeros(2, 3))
        (5, tensor([[4., 4., 4.], [4., 4., 4.]]))
    """
    check_params(params, optional=True)
    if more or isinstance(adapters, Mapping):
        warn_old("add(one, other)", "add([one, other])")
        adapters = [cast(Adapters, adapters), *more]
    return summed_up(gather(adapters, None), params)


def interpolate(start: Adapters, end: Adapters, t: float, *, params: Params | None = None) -> dict[str, Rule]:
    """The adapter with exactly the changes `(1 − t)·start + t·end`.

    t = 0 returns `start` and t = 1 returns `end`, with any rules; other numbers, also below 0 or above 1, give a sum.

    Args:
        start: full parameter name -> rule.
        end: the other adapter. If one of the two does not rewrite a parameter, its change of it is 0.
        t: any finite number.
        params: the base weights, needed for `Full` only.

    Returns:
        Full parameter name -> rule, whose rank is the sum of the ranks unless t is 0 or 1.

    Raises:
        ConfigError: `t` is not a finite number.
        UnsupportedError: an adapter has a DoRA rule, and t is neither 0 nor 1.
        ParamsError: rules do not match each other, or base weights are missing.

    Examples:
        >>> from funclora import LoRA
        >>> low, high = ({"weight": LoRA(torch.ones(1, 2), torch.full((1, 1), x))} for x in (1.0, 5.0))
        >>> interpolate(low, high, 0.25)["weight"].dense(torch.zeros(1, 2))
        tensor([[2., 2.]])
    """
    t = finite("t", t)
    return task_arithmetic([start, end], [1 - t, t], params=params)


def task_arithmetic(
    adapters: Sequence[Adapters], weights: Sequence[float], *, params: Params | None = None
) -> dict[str, Rule]:
    """The exact weighted sum of adapters (task arithmetic, arXiv 2212.04089).

    With c = w·s of each term, B is `[B₁ B₂ …]` and A is `[c₁·A₁; c₂·A₂; …]` with scaling 1; if all c are equal, A is
    `[A₁; A₂; …]` and c is the scaling. A term of weight 0 is left out.

    Args:
        adapters: adapters of one model; ranks, scalings and targets may differ.
        weights: a number for each.
        params: the base weights, needed for `Full` only: it becomes `base + Σ w·(value − base)`.

    Returns:
        Full parameter name -> rule, in the widest dtype of the factors. Dropout is kept if the rules of a parameter
        have the same dropout, and is 0 otherwise.

    Raises:
        ConfigError: the weights are not one finite number for each adapter, or all are 0.
        UnsupportedError: a DoRA rule has a weight other than 1 or is one of several.
        ParamsError: rules do not match each other, or base weights are missing.

    Examples:
        >>> from funclora import LoRA
        >>> one, other = ({name: LoRA(torch.ones(1, 2), torch.ones(1, 1))} for name in ("q.weight", "v.weight"))
        >>> total = task_arithmetic([one, other], [0.5, -2])
        >>> total["q.weight"].scaling, total["v.weight"].scaling
        (0.5, -2.0)
    """
    check_params(params, optional=True)
    return summed_up(gather(adapters, weights), params)


def summed_up(terms: Mapping[str, Sequence[Term]], params: Params | None) -> dict[str, Rule]:
    """The exact weighted sums of all parameters."""
    return nonzero({name: summed(name, of_one, params) for name, of_one in terms.items()})


def nonzero(found: dict[str, Rule | None]) -> dict[str, Rule]:
    """The rules without None; an adapter without any rule is an error."""
    result = {name: rule for name, rule in found.items() if rule is not None}
    if not result:
        raise ConfigError("weights: all of them are 0, so the result would have no effect.")
    return result


def summed(name: str, terms: Sequence[Term], params: Params | None) -> Rule | None:
    """The exact weighted sum of the rules of one parameter; None if all weights are 0."""
    terms = [term for term in terms if term.weight]
    if not terms:
        return None
    if len(terms) == 1:
        return _scaled(name, terms[0], params)
    if any(term.low is None for term in terms):
        return mixed_in_full(name, terms, Mixing(), params)
    return concatenated(name, terms)


def mixed_in_full(name: str, terms: Sequence[Term], mixing: Mixing, params: Params | None) -> Full:
    """The base weight plus the combination of the rules' changes."""
    weight = base_of(name, terms, params, _FULL)
    total = mixing(repr(name), [change(term.rule, weight) for term in terms], [term.weight for term in terms])
    dtype = reduce(torch.promote_types, (term.rule.value.dtype for term in terms if isinstance(term.rule, Full)))
    return Full(rounded(repr(name), weight.to(total.dtype) + total, dtype))


def concatenated(name: str, terms: Sequence[Term]) -> LoRA:
    """The exact weighted sum of low-rank rules of one parameter."""
    loras = low_rank(name, terms)
    coefficients = [term.coefficient for term in terms]
    n, first = lead(loras[0]), coefficients[0]
    b = torch.cat([rule.b for rule in loras], n + 1)
    if all(c == first for c in coefficients):
        return made_of(name, loras, torch.cat([rule.a for rule in loras], n), b, scaling=first)
    scaled = [rule.a.to(compute_dtype(rule.a.dtype)) * c for rule, c in zip(loras, coefficients, strict=True)]
    return made_of(name, loras, torch.cat(scaled, n), b)


def low_rank(name: str, terms: Sequence[Term]) -> list[LoRA]:
    """The updates of one parameter. A rule like DoRA, which normalises the weight, is an error."""
    for term in terms:
        if not term.linear:
            kind = type(term.rule).__name__
            raise UnsupportedError(
                f"{name!r}: {kind} normalises the weight, or scales it, so its change is not linear in its factors and "
                f"a {kind} rule cannot be scaled or added to another. Combine the changes of the weights instead: "
                "combine(..., combination_type='svd', params=...), or one of the other types that end with _svd."
            )
    return [term.low for term in terms if term.low is not None]


def _scaled(name: str, term: Term, params: Params | None) -> Rule:
    """One rule with a weight."""
    if term.weight == 1:
        return term.rule
    if term.low is None:
        return mixed_in_full(name, [term], Mixing(), params)
    low_rank(name, [term])  # raises its error
    scaled = term.rule.scaled(term.weight)
    assert scaled is not None
    return scaled

"""`combine`: the combination types of PEFT's `add_weighted_adapter`, on values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from funclora._api.arguments import check_generator, check_params
from funclora.algebra._elementwise import SIGN_METHODS, Mixing, Pruning
from funclora.algebra._low_rank import truncated, truncated_product
from funclora.algebra._sums import concatenated, low_rank, mixed_in_full, nonzero, summed
from funclora.algebra._terms import Term, base_of, change, compute_dtype, finite, gather, made_of, positive
from funclora.errors import ConfigError, ParamsError, near
from funclora.rules.base import Adapters, Params, Rule
from funclora.rules.low_rank import LoRA

_DORA = "The change by a DoRA rule depends on the base weight."


@dataclass(frozen=True)
class _Type:
    """A combination type: the operation, and the tensors that it is applied to.

    Attributes:
        on_changes: the tensors are the changes of the weights, and the result is decomposed; otherwise the factors.
    """

    pruning: Pruning | None = None
    elect: bool = False
    on_changes: bool = False


_TYPES = {
    "svd": _Type(on_changes=True),
    "linear": _Type(),
    "cat": _Type(),
    "ties": _Type("magnitude", elect=True),
    "ties_svd": _Type("magnitude", elect=True, on_changes=True),
    "dare_ties": _Type("random", elect=True),
    "dare_linear": _Type("random"),
    "dare_ties_svd": _Type("random", elect=True, on_changes=True),
    "dare_linear_svd": _Type("random", on_changes=True),
    "magnitude_prune": _Type("magnitude"),
    "magnitude_prune_svd": _Type("magnitude", on_changes=True),
}
COMBINATION_TYPES = tuple(_TYPES)
"""The types that `combine` supports, by PEFT's names."""


def combine(
    adapters: Sequence[Adapters],
    weights: Sequence[float] | None = None,
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    params: Params | None = None,
    generator: Generator | None = None,
) -> dict[str, Rule]:
    """Combine adapters as PEFT's `add_weighted_adapter` does, with the same names and results.

    Every parameter is combined over the adapters that rewrite it.

    | type | result |
    |---|---|
    | "cat" | the exact weighted sum, by concatenation; ranks add up |
    | "svd" | the best approximation of this sum with rank `svd_rank` |
    | "linear" | weighted sums of A and of B; because of cross terms, this is not the sum of the changes |
    | "ties", "dare_linear", "dare_ties", "magnitude_prune" | the method applied to A, and to B |
    | the same with "_svd" | the method applied to the changes of the weights, then the best approximation |

    On factors the weights are √w·s, and ranks must be equal. The methods are defined on changes: on factors they are a
    heuristic.

    Changes are computed densely, one parameter at a time, except for "svd" without `svd_clamp`. A `Full` rule is
    combined by its change `value − base`, and the result is `Full`. A `DoRA` rule is combined by its change in the
    types that end with "svd", and the result is a `LoRA`; in "cat" it must be the only rule, with weight 1; the other
    types refuse it.

    Differences from PEFT: with one adapter PEFT uses "linear" for any type; it ignores surplus weights or adapters,
    and options that a type does not use; with rsLoRA its result is √r times too large.

    Args:
        adapters: adapters of one model. Their order matters for random pruning only.
        weights: a number for each, also negative; 1 for all if None.
        combination_type: one of `COMBINATION_TYPES`.
        svd_rank: the rank of decomposed updates; the largest of all adapters if None. It is limited by the shape of
            the weight and by the sum of the ranks.
        svd_clamp: clamp the decomposed factors to ± this quantile of their entries.
        density: the share of the entries that pruning keeps, above 0 and at most 1.
        majority_sign_method: for TIES: "total" elects the sign of the sum, "frequency" the sign of most entries.
            Votes are unweighted.
        params: the base weights, needed for `Full` and `DoRA` only.
        generator: of DARE's random numbers; torch's default one if None. They are drawn parameter by parameter, in
            the order of the first adapter.

    Returns:
        Full parameter name -> rule, with scaling 1 ("cat" may give another scaling, see `task_arithmetic`).

    Raises:
        ConfigError: an option is invalid, missing, or not used by the type.
        UnsupportedError: an adapter has rules that the type does not combine.
        ParamsError: rules do not match each other, or base weights are missing.
        NonFiniteError: an adapter, or the result in its dtype, contains NaN or infinity.

    Examples:
        >>> import torch
        >>> from funclora import LoRA
        >>> one = {"weight": LoRA(torch.tensor([[1.0, 0.0]]), torch.ones(2, 1), scaling=2.0)}
        >>> other = {"weight": LoRA(torch.tensor([[0.0, 1.0]]), torch.ones(2, 1))}
        >>> combine([one, other], [1.0, -3.0], "cat")["weight"].dense(torch.zeros(2, 2))
        tensor([[ 2., -3.],
                [ 2., -3.]])
        >>> combine([one, other], [1.0, -3.0], "ties", density=0.5)["weight"].r
        1
    """
    check_params(params, optional=True)
    check_generator(generator)
    kind, mixing = _settings(combination_type, svd_rank, svd_clamp, density, majority_sign_method, generator)
    terms = gather(adapters, weights)
    ranks = (term.low.r for of_one in terms.values() for term in of_one if term.low is not None)
    rank = svd_rank or max(ranks, default=1)

    def combined(name: str, of_one: list[Term]) -> Rule | None:
        if combination_type == "cat":
            return summed(name, of_one, params)
        if not any(term.weight for term in of_one):
            return None
        if any(term.low is None for term in of_one):
            return mixed_in_full(name, of_one, mixing, params)
        if not kind.on_changes:
            return _on_factors(name, of_one, mixing, combination_type)
        return _on_changes(name, of_one, mixing, rank, svd_clamp, params)

    return nonzero({name: combined(name, of_one) for name, of_one in terms.items()})


def _settings(
    combination_type: str,
    svd_rank: int | None,
    svd_clamp: float | None,
    density: float | None,
    majority_sign_method: str,
    generator: Generator | None,
) -> tuple[_Type, Mixing]:
    """The type and its operation on tensors, or `ConfigError`."""
    kind = _TYPES.get(combination_type) if isinstance(combination_type, str) else None
    if kind is None:
        raise ConfigError(
            f"combination_type: expected one of {', '.join(COMBINATION_TYPES)}, got {combination_type!r}."
            f"{near(str(combination_type), COMBINATION_TYPES, n=3)}"
        )
    if majority_sign_method not in SIGN_METHODS:
        raise ConfigError(f"majority_sign_method: expected 'total' or 'frequency', got {majority_sign_method!r}.")
    given = {
        "svd_rank": (svd_rank is not None, kind.on_changes),
        "svd_clamp": (svd_clamp is not None, kind.on_changes),
        "density": (density is not None, kind.pruning is not None),
        "majority_sign_method": (majority_sign_method != "total", kind.elect),
        "generator": (generator is not None, kind.pruning == "random"),
    }
    for option, (is_given, has_meaning) in given.items():
        if is_given and not has_meaning:
            raise ConfigError(f"{option}: combination_type={combination_type!r} does not use it. Leave it out.")
    if svd_rank is not None:
        positive("svd_rank", svd_rank)
    if svd_clamp is not None and not 0.5 < finite("svd_clamp", svd_clamp) <= 1:
        raise ConfigError(f"svd_clamp: expected a quantile above 0.5 and at most 1, got {svd_clamp!r}.")
    if kind.pruning is None:
        return kind, Mixing()
    if density is None:
        raise ConfigError(f"density: combination_type={combination_type!r} needs it, above 0 and at most 1.")
    if not 0 < finite("density", density) <= 1:
        raise ConfigError(f"density: expected a number above 0 and at most 1, got {density!r}.")
    return kind, Mixing(kind.pruning, kind.elect, float(density), majority_sign_method, generator)


def _on_factors(name: str, terms: Sequence[Term], mixing: Mixing, combination_type: str) -> LoRA:
    """A and B combined separately. Each is multiplied by √|w·s|, and A by the sign of w·s."""
    loras = low_rank(name, terms)
    ranks = [rule.r for rule in loras]
    if len(set(ranks)) > 1:
        raise ParamsError(
            f"{name!r}: combination_type={combination_type!r} combines A and B separately, but the ranks differ: "
            f"{', '.join(map(str, ranks))}. Use 'cat', 'svd' or a type that ends with _svd."
        )
    coefficients = [term.coefficient for term in terms]
    halves = [math.sqrt(abs(c)) for c in coefficients]
    signed = [math.copysign(half, c) for half, c in zip(halves, coefficients, strict=True)]
    a = mixing(f"{name!r}: a", [_wide(rule).a for rule in loras], signed)
    b = mixing(f"{name!r}: b", [_wide(rule).b for rule in loras], halves)
    return made_of(name, loras, a, b)


def _on_changes(
    name: str, terms: Sequence[Term], mixing: Mixing, rank: int, clamp: float | None, params: Params | None
) -> LoRA:
    """The best approximation of the combined changes."""
    like = [term.low for term in terms if term.low is not None]
    if mixing == Mixing() and clamp is None and all(term.linear for term in terms):
        wide = [term._replace(low=_wide(rule)) for term, rule in zip(terms, like, strict=True)]
        return made_of(name, like, *truncated_product(name, concatenated(name, wide), rank))
    changes = [_change(name, term, terms, params) for term in terms]
    turned = like[0].layout.transposed  # random numbers follow the order of the weight's entries, as in PEFT
    oriented = [each.mT if turned else each for each in changes]
    total = mixing(f"the change of {name!r}", oriented, [term.weight for term in terms])
    return made_of(name, like, *truncated(name, total.mT if turned else total, rank, clamp))


def _change(name: str, term: Term, terms: Sequence[Term], params: Params | None) -> Tensor:
    """The change of the weight by the rule, as a matrix `[*lead, out, in]`."""
    assert term.low is not None
    if term.linear:
        return term.low.delta()
    return term.low.layout.to_matrix(change(term.rule, base_of(name, terms, params, _DORA)))


def _wide(rule: LoRA) -> LoRA:
    """The rule with its factors in at least float32."""
    dtype = compute_dtype(rule.a.dtype, rule.b.dtype)
    return replace(rule, a=rule.a.to(dtype), b=rule.b.to(dtype))

"""The algebra of adapters: laws over every layout and dtype, against dense sums and the dense decomposition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import make_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import factor_shapes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import funclora as fl
from funclora import algebra
from funclora.errors import ArgumentError, ConfigError, NonFiniteError, ParamsError, UnsupportedError
from funclora.rules.base import Rule
from funclora.rules.layouts import (
    Attention,
    Conv,
    Conv1D,
    ConvTranspose,
    Embedding,
    Layout,
    Linear,
    Parameter,
    Recurrent,
)

# Name of a layout -> the layout and the shape of a weight.
WEIGHTS: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "linear": (Linear(), (6, 9)),
    "conv1d-hf": (Conv1D(), (9, 6)),
    "embedding": (Embedding(), (11, 5)),
    "attention": (Attention(), (12, 4)),
    "recurrent": (Recurrent(), (8, 3)),
    "matrix": (Parameter(stored_transposed=True), (7, 5)),
    "experts": (Parameter(), (3, 6, 5)),
    "experts-transposed": (Parameter(stored_transposed=True, position=1, siblings=2), (3, 5, 6)),
    "conv": (Conv(), (6, 4, 2, 3)),
    "conv-groups": (Conv(groups=2), (6, 2, 3)),
    "conv-transposed": (ConvTranspose(), (4, 6, 2)),
    "conv-transposed-groups": (ConvTranspose(groups=2), (4, 3, 2, 2)),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.04, torch.float16: 5e-3}
LAYOUTS = pytest.mark.parametrize("name", list(WEIGHTS))
NUMBERS = st.floats(-3, 3).map(lambda x: round(x, 2))


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight_of(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    _, shape = WEIGHTS[name]
    return torch.randn(shape, generator=gen(99), dtype=torch.float64).to(dtype)


def lora(name: str, r: int, seed: int, dtype: torch.dtype = torch.float64, scaling: float = 1.3) -> fl.LoRA:
    layout, _ = WEIGHTS[name]
    rule: fl.LoRA = make_rule("lora", layout, weight_of(name), gen(seed), dtype, r=r)
    return replace(rule, scaling=scaling)


def change(rule: Any, name: str) -> Tensor:
    """What the rule adds to the weight, in float64."""
    wide = replace(rule, **{leaf: getattr(rule, leaf).double() for leaf in rule.leaf_names})
    weight = weight_of(name)
    result: Tensor = wide.dense(weight) - weight
    return result


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64, scale: float | None = None) -> None:
    size = expected.abs().max().item() if scale is None else scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype] * max(size, 1e-6))


def total(rules: Sequence[Any], weights: Sequence[float], name: str) -> tuple[Tensor, float]:
    """The dense weighted sum, and the size of its largest term."""
    terms = [weight * change(rule, name) for weight, rule in zip(weights, rules, strict=True)]
    return torch.stack(terms).sum(0), max(term.abs().max().item() for term in terms)


# --- exact sums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@LAYOUTS
@settings(max_examples=6)  # of each of 48
@given(st.lists(st.tuples(st.integers(1, 4), NUMBERS, st.sampled_from([0.5, 1.0, -2.0])), min_size=1, max_size=3))
def test_weighted_sums_are_dense_sums(name: str, dtype: torch.dtype, terms: list[tuple[int, float, float]]) -> None:
    rules = [lora(name, r, seed, dtype, s) for seed, (r, _, s) in enumerate(terms)]
    weights = [weight for _, weight, _ in terms]
    adapters = [{"w": rule} for rule in rules]
    if not any(weights):
        with pytest.raises(ConfigError, match="all of them are 0"):
            algebra.task_arithmetic(adapters, weights)
        return
    want, size = total(rules, weights, name)
    for found in (algebra.task_arithmetic(adapters, weights), algebra.combine(adapters, weights, "cat")):
        rule: Any = found["w"]
        assert type(rule) is fl.LoRA
        assert (rule.a.dtype, rule.b.dtype, rule.layout) == (dtype, dtype, WEIGHTS[name][0])
        assert rule.r == sum(r for r, weight, _ in terms if weight)
        rule.check("w", weight_of(name))
        close(change(rule, name), want, dtype, size)


@LAYOUTS
@settings(max_examples=6)
@given(st.integers(1, 4), st.integers(1, 4))
def test_addition_is_a_group(name: str, r1: int, r2: int) -> None:
    x, y = {"w": lora(name, r1, 1)}, {"w": lora(name, r2, 2, scaling=-0.7)}
    both, swapped = algebra.add([x, y])["w"], algebra.add([y, x])["w"]
    want, size = total([x["w"], y["w"]], [1, 1], name)
    assert both.r == r1 + r2
    close(change(both, name), want)
    close(change(swapped, name), want)
    nothing = algebra.add([x, y, algebra.negate(algebra.add([x, y]))])["w"]
    close(change(nothing, name), torch.zeros_like(want), scale=size)
    once, twice = algebra.add([algebra.add([x, y]), x])["w"], algebra.add([x, algebra.add([y, x])])["w"]
    close(change(once, name), change(twice, name), scale=size)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_scaling_touches_no_factor(dtype: torch.dtype) -> None:
    rule = replace(lora("conv", 2, 0, dtype), dropout=0.1)
    for found, want in ((algebra.scale({"w": rule}, 0.25), 0.25 * 1.3), (algebra.negate({"w": rule}), -1.3)):
        scaled: Any = found["w"]
        assert scaled.a is rule.a
        assert scaled.b is rule.b
        assert (scaled.scaling, scaled.dropout, scaled.layout) == (want, 0.1, rule.layout)


def test_equal_coefficients_leave_factors_as_they_are() -> None:
    x, y = lora("linear", 2, 0, torch.bfloat16, 0.3), lora("linear", 1, 1, torch.bfloat16, 0.6)
    found: Any = algebra.task_arithmetic([{"w": x}, {"w": y}], [2.0, 1.0])["w"]
    assert found.scaling == 0.6
    assert torch.equal(found.a, torch.cat([x.a, y.a]))
    assert torch.equal(found.b, torch.cat([x.b, y.b], 1))


@given(NUMBERS)
def test_interpolation(t: float) -> None:
    x = {"w": lora("linear", 2, 0), "only-x": lora("conv", 1, 1)}
    y = {"w": lora("linear", 3, 2), "only-y": lora("conv", 1, 3)}
    if t in (0, 1):
        t = 0.5
    found = algebra.interpolate(x, y, t)
    want, size = total([x["w"], y["w"]], [1 - t, t], "linear")
    close(change(found["w"], "linear"), want, scale=size)
    close(change(found["only-x"], "conv"), (1 - t) * change(x["only-x"], "conv"))
    close(change(found["only-y"], "conv"), t * change(y["only-y"], "conv"))


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_ends_of_interpolation_are_the_adapters(kind: str) -> None:
    weight = weight_of("linear")
    x, y = ({"w": make_rule(kind, Linear(), weight, gen(seed))} for seed in (0, 1))
    for found, end in ((algebra.interpolate(x, y, 0), x), (algebra.interpolate(x, y, 1.0), y)):
        assert list(found) == ["w"]
        assert found["w"] is end["w"]


def test_targets_of_one_adapter_stay() -> None:
    x, y = {"q": lora("linear", 2, 0), "v": lora("linear", 2, 1)}, {"v": lora("linear", 3, 2), "k": lora("conv", 1, 3)}
    found: Any = algebra.task_arithmetic([x, y], [1.0, -2.0])
    assert list(found) == ["q", "v", "k"]
    assert found["q"] is x["q"]
    assert found["v"].r == 5
    assert found["k"].scaling == -2 * 1.3
    assert list(algebra.task_arithmetic([x, y], [1.0, 0.0])) == ["q", "v"]


def test_dropout_is_kept_where_it_is_the_same() -> None:
    x, y = ({"w": replace(lora("linear", 2, seed), dropout=0.1)} for seed in (0, 1))
    z = {"w": lora("linear", 2, 2)}
    kinds: list[tuple[str, dict[str, Any]]] = [("cat", {}), ("svd", {}), ("linear", {}), ("ties", {"density": 0.5})]
    for kind, options in kinds:
        assert algebra.combine([x, y], None, kind, **options)["w"].dropout_p == 0.1
        assert algebra.combine([x, z], None, kind, **options)["w"].dropout_p == 0


def test_dtypes_widen() -> None:
    x, y = {"w": lora("linear", 2, 0, torch.bfloat16)}, {"w": lora("linear", 2, 1, torch.float16)}
    for kind in ("cat", "svd", "linear"):
        found: Any = algebra.combine([x, y], [1.0, 0.5], kind)["w"]
        assert (found.a.dtype, found.b.dtype) == (torch.float32, torch.float32)


def test_half_precision_is_rounded_once() -> None:
    x, y = ({"w": lora("linear", 3, seed, torch.bfloat16)} for seed in (0, 1))
    for kind in ("linear", "svd"):
        half: Any = algebra.combine([x, y], [0.7, -1.9], kind)["w"]
        wide: Any = algebra.combine(
            [{"w": replace(z["w"], a=z["w"].a.float(), b=z["w"].b.float())} for z in (x, y)], [0.7, -1.9], kind
        )["w"]
        assert torch.equal(half.a, wide.a.bfloat16())
        assert torch.equal(half.b, wide.b.bfloat16())


def test_gradients_reach_the_adapters() -> None:
    x, y = {"w": lora("linear", 2, 0)}, {"w": lora("linear", 1, 1, scaling=0.4)}
    weight = weight_of("linear")

    def size(x: Any) -> Tensor:
        return algebra.recompress(algebra.add([x, y]), 2)["w"].dense(weight).square().sum()

    def dense(x: Any) -> Tensor:
        u, s, vh = torch.linalg.svd(x["w"].delta() + y["w"].delta(), full_matrices=False)
        return (weight + u[:, :2] * s[:2] @ vh[:2]).square().sum()

    found, want = torch.func.grad(size)(x), torch.func.grad(dense)(x)
    for leaf in ("a", "b"):
        close(getattr(found["w"], leaf), getattr(want["w"], leaf), torch.float32)


# --- rank ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@LAYOUTS
@settings(max_examples=10)
@given(st.integers(1, 9), st.integers(1, 9))
def test_recompression_is_the_truncated_decomposition(name: str, dtype: torch.dtype, r: int, rank: int) -> None:
    rule = lora(name, r, r, dtype)
    found: Any = algebra.recompress({"w": rule}, rank)["w"]
    found.check("w", weight_of(name))
    assert found.r <= rank
    if r <= rank:
        assert found is rule
        return
    assert found.scaling == 1
    layout, shape = WEIGHTS[name]
    matrix = layout.to_matrix(change(rule, name))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    want = layout.from_matrix(u[..., :rank] * s[..., None, :rank] @ vh[..., :rank, :], shape)
    close(change(found, name), want, dtype)
    # Eckart and Young: what is left has the remaining singular values.
    left = layout.to_matrix(change(rule, name) - change(found, name))
    rest = s[..., rank:].square().sum(-1).sqrt()
    torch.testing.assert_close(left.flatten(-2).norm(dim=-1), rest, rtol=1e-4, atol=1e-5 * s.max().item())
    rows = layout.factors(found.a.double(), found.b.double())[0]
    close(rows @ rows.mT, torch.eye(found.r, dtype=torch.float64).expand(*rows.shape[:-2], -1, -1), dtype)


@LAYOUTS
def test_recompression_at_full_rank_is_exact(name: str) -> None:
    layout, _ = WEIGHTS[name]
    full = min(layout.to_matrix(weight_of(name)).shape[-2:])
    rule = lora(name, full + 3, 0)
    found: Any = algebra.recompress({"w": rule}, full)["w"]
    assert found.r == full
    close(change(found, name), change(rule, name))


@LAYOUTS
def test_svd_is_a_sum_recompressed(name: str) -> None:
    x, y = {"w": lora(name, 2, 0)}, {"w": lora(name, 3, 1)}
    found: Any = algebra.combine([x, y], [0.5, -2], "svd", svd_rank=2)["w"]
    want: Any = algebra.recompress(algebra.task_arithmetic([x, y], [0.5, -2]), 2)["w"]
    close(change(found, name), change(want, name))
    by_default: Any = algebra.combine([x, y], [0.5, -2])["w"]
    assert by_default.r == min(3, *WEIGHTS[name][0].to_matrix(weight_of(name)).shape[-2:])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_dense_update_is_made() -> None:
    n, r = 512, 4
    x, y = ({"w": fl.LoRA(torch.randn(r, n), torch.randn(n, r))} for _ in range(2))
    with Largest() as largest:
        algebra.recompress(x, 2)
        algebra.combine([x, y], [0.5, 2], "svd")
        algebra.interpolate(x, algebra.negate(y), 0.3)
    assert 2 * r * n <= largest.numel <= 4 * r * n
    with Largest() as largest:  # the measure sees one where it is made
        algebra.magnitude_prune([x], density=0.5)
    assert largest.numel >= n * n


def test_dora_keeps_its_magnitude() -> None:
    weight = weight_of("linear")
    rule: Any = make_rule("dora", Linear(), weight, gen(0), r=4)
    found: Any = algebra.recompress({"w": rule}, 2)["w"]
    assert type(found) is fl.DoRA
    assert found.magnitude is rule.magnitude
    u, s, vh = torch.linalg.svd(rule.delta())
    row = weight + u[:, :2] * s[:2] @ vh[:2]
    close(found.dense(weight), rule.magnitude[:, None] * row / row.norm(dim=1, keepdim=True))


# --- pruning ---------------------------------------------------------------------------------------------------


@LAYOUTS
def test_methods_act_on_the_changes_of_every_layout(name: str) -> None:
    layout, _ = WEIGHTS[name]
    x, y = lora(name, 2, 0), lora(name, 2, 1)
    rank = min(layout.to_matrix(weight_of(name)).shape[-2:])
    changes = [change(rule, name) for rule in (x, y)]
    pruned = []
    for each in changes:
        limit = each.abs().flatten().sort(descending=True).values[int(0.5 * each.numel()) - 1]
        pruned.append(torch.where(each.abs() >= limit, each, 0))
    found = algebra.magnitude_prune([{"w": x}, {"w": y}], [2, -1], density=0.5, rank=rank)["w"]
    close(change(found, name), 2 * pruned[0] - pruned[1])
    elected = torch.where(pruned[0] + pruned[1] >= 0, 1.0, -1.0)
    agree = [each * (each.sign() == elected) for each in pruned]
    count = sum((each != 0).double() for each in agree)
    assert isinstance(count, Tensor)
    found = algebra.ties([{"w": x}, {"w": y}], [2, -1], density=0.5, rank=rank)["w"]
    close(change(found, name), (2 * agree[0] - agree[1]) / count.clamp(min=1))


# --- Full and DoRA ---------------------------------------------------------------------------------------------

PARAMS = {"w": weight_of("linear"), "b": torch.randn(6, generator=gen(5), dtype=torch.float64)}


def full(seed: int) -> dict[str, Rule]:
    return {name: fl.Full(torch.randn(value.shape, generator=gen(seed)).to(value)) for name, value in PARAMS.items()}


def test_full_is_combined_by_its_difference() -> None:
    x, y = full(0), full(1)
    found = algebra.task_arithmetic([x, y], [0.3, -2.0], params=PARAMS)
    halved = algebra.scale(x, 0.5, params=PARAMS)
    nothing = algebra.add([x, algebra.negate(x, params=PARAMS)], params=PARAMS)
    for name, base in PARAMS.items():
        assert type(found[name]) is fl.Full
        one, other = x[name].dense(base), y[name].dense(base)
        close(found[name].dense(base), base + 0.3 * (one - base) - 2 * (other - base))
        close(halved[name].dense(base), (one + base) / 2)
        close(nothing[name].dense(base), base)
    pruned = algebra.magnitude_prune([x], density=0.5, params=PARAMS)
    assert (pruned["w"].dense(PARAMS["w"]) == PARAMS["w"]).sum() == PARAMS["w"].numel() / 2
    kinds: list[tuple[str, dict[str, Any]]] = [("svd", {}), ("linear", {}), ("cat", {}), ("ties", {"density": 1.0})]
    for kind, options in kinds:
        result = algebra.combine([x, y], [1.0, 1.0], kind, params=PARAMS, **options)
        assert {type(rule) for rule in result.values()} == {fl.Full}


def test_full_and_low_rank_together() -> None:
    x, y = full(0), {"w": lora("linear", 2, 1)}
    found = algebra.task_arithmetic([x, y], [0.5, 2.0], params=PARAMS)["w"]
    base = PARAMS["w"]
    close(found.dense(base), base + 0.5 * (x["w"].dense(base) - base) + 2 * change(y["w"], "linear"))
    assert type(found) is fl.Full


def test_full_needs_the_base() -> None:
    for call in (algebra.negate, lambda x, **_: algebra.add([x, full(1)]), lambda x, **_: algebra.combine([x, x])):
        with pytest.raises(ParamsError, match=r"'w': Full replaces the weight, .* Give the base weights: params="):
            call(full(0))
    with pytest.raises(ParamsError, match=r"params lack 'w'.*Near names: weight"):
        algebra.negate({"w": full(0)["w"]}, params={"weight": PARAMS["w"]})
    with pytest.raises(ParamsError, match="meta device"):
        algebra.negate(full(0), params={name: value.to("meta") for name, value in PARAMS.items()})
    with pytest.raises(ParamsError, match=r"value has shape \[6, 9\], expected \[3\]"):
        algebra.negate(full(0), params={"w": torch.zeros(3)})
    alone = algebra.add([full(0), {"other": lora("linear", 1, 0)}])  # nothing to weigh
    assert torch.equal(alone["w"].dense(PARAMS["w"]), full(0)["w"].dense(PARAMS["w"]))


@pytest.mark.parametrize(
    "name", [n for n, (layout, _) in WEIGHTS.items() if not isinstance(layout, (Attention, Recurrent))]
)
def test_dora_is_combined_by_its_change(name: str) -> None:
    layout, _ = WEIGHTS[name]
    weight = weight_of(name)
    x, y = ({"w": make_rule(kind, layout, weight, gen(i), r=2)} for i, kind in enumerate(("dora", "lora")))
    rank = min(layout.to_matrix(weight).shape[-2:])
    want, size = total([x["w"], y["w"]], [0.5, -2], name)
    one = algebra.combine([x, y], [0.5, -2], svd_rank=rank, params={"w": weight})["w"]
    other = algebra.combine([y, x], [-2, 0.5], svd_rank=rank, params={"w": weight})["w"]
    for found in (one, other):
        assert type(found) is fl.LoRA
        close(change(found, name), want, scale=size)


def test_dora_is_refused_elsewhere() -> None:
    x: dict[str, Rule] = {"w": make_rule("dora", Linear(), PARAMS["w"], gen(0))}
    y: dict[str, Rule] = {"w": lora("linear", 2, 1)}
    assert algebra.scale(x, 1)["w"] is algebra.add([x])["w"] is x["w"]
    calls: list[Any] = [
        lambda: algebra.scale(x, 2.0),
        lambda: algebra.negate(x),
        lambda: algebra.add([x, y]),
        lambda: algebra.add([y, x]),
        lambda: algebra.add([x, x]),
        lambda: algebra.interpolate(x, y, 0.5),
        lambda: algebra.combine([x, y], None, "cat"),
        lambda: algebra.combine([x, y], None, "linear"),
        lambda: algebra.combine([x], None, "ties", density=0.5),
    ]
    for call in calls:
        with pytest.raises(UnsupportedError, match="'w': DoRA normalises the weight"):
            call()
    with pytest.raises(ParamsError, match="'w': The change by a DoRA rule depends on the base"):
        algebra.combine([x, y])


# --- what is refused -------------------------------------------------------------------------------------------

X: dict[str, Any] = {"w": lora("linear", 2, 0)}


def test_stacks_are_refused() -> None:
    several = fl.stack([X, X])
    with pytest.raises(ArgumentError, match=r"got a Stack\. Give the members of a stack: list\(stack\)"):
        algebra.combine(several)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"got a Stack\. Take one member, stack\[i\]"):
        algebra.scale(several, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"adapters\[1\]: expected one adapter.* got a Stack"):
        algebra.add([X, several])  # type: ignore[list-item]
    assert algebra.combine(list(several), None, "cat")["w"].r == 4


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"combination_type": "tie"}, "combination_type: expected one of svd, .* got 'tie'. Near names: ties"),
    ({"weights": [1.0, math.inf]}, r"weights\[1\]: expected a finite number, got inf"),
    ({"weights": [1.0, True]}, r"weights\[1\]: expected a finite number, got True"),
    ({"weights": [1.0, 2.0, 3.0]}, "weights: expected 2, one for each adapter, got 3"),
    ({"weights": [0.0, 0.0]}, "all of them are 0"),
    ({"svd_rank": 0}, "svd_rank: expected a positive integer, got 0"),
    ({"svd_clamp": 0.2}, "svd_clamp: expected a quantile above 0.5 and at most 1, got 0.2"),
    ({"combination_type": "cat", "svd_rank": 3}, "svd_rank: combination_type='cat' does not use it"),
    ({"combination_type": "linear", "svd_clamp": 0.9}, "svd_clamp: .*not use"),
    ({"density": 0.5}, "density: combination_type='svd' does not use it"),
    ({"majority_sign_method": "frequency"}, "majority_sign_method: combination_type='svd' does not use it"),
    ({"generator": gen(0)}, "generator: combination_type='svd' does not use it"),
    ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, "expected 'total' or 'frequency'"),
    ({"combination_type": "ties", "density": 0.0}, "density: expected a number above 0 and at most 1, got 0.0"),
    ({"combination_type": "dare_linear", "density": 1.5}, "density: expected a number above 0 and at most 1, got 1.5"),
    ({"combination_type": "magnitude_prune", "density": 0.01}, "density: 0.01 of the 18 entries of 'w': a is no"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BROKEN, ids=lambda it: it if isinstance(it, str) else "")
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        algebra.combine([X, X], **options)


def test_adapters_that_do_not_fit_each_other() -> None:
    layout, shape = Linear(), (6, 9)
    other: Mapping[str, Any] = {
        "layouts": lora("conv", 2, 0),
        "shapes of a, except for the rank": fl.LoRA(torch.ones(2, 8), torch.ones(6, 2)),
        "shapes of b, except for the rank": fl.LoRA(torch.ones(2, 9), torch.ones(7, 2)),
        "devices": fl.LoRA(*(torch.empty(s, device="meta") for s in factor_shapes(layout, shape, 2))),
    }
    for what, rule in other.items():
        with pytest.raises(ParamsError, match=f"'w': the adapters have different {what}"):
            algebra.add([X, {"w": rule}])
    with pytest.raises(ParamsError, match="'w': the adapters have different shapes"):
        algebra.add([{"w": fl.Full(torch.ones(2))}, {"w": fl.Full(torch.ones(3))}])


def test_things_that_are_no_adapters() -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: algebra.combine([]), ConfigError, "expected at least one adapter"),
        (lambda: algebra.combine(X), ArgumentError, "expected a list of adapters, got a dict of LoRA."),  # type: ignore[arg-type]
        (lambda: algebra.add([X, {}]), ParamsError, r"adapters\[1\]: the adapter has no rules"),
        (lambda: algebra.add([X, 3]), ArgumentError, "expected one adapter, a dict .* got 3"),  # type: ignore[list-item]
        (lambda: algebra.add([fl.route(fl.stack([X, X]), [0, 1])]), UnsupportedError, "got Rout"),
        (lambda: algebra.scale(X, math.nan), ConfigError, "factor: expected a finite number"),
        (lambda: algebra.interpolate(X, X, "a"), ConfigError, "t: expected a finite number"),  # type: ignore[arg-type]
        (lambda: algebra.recompress(X, 0), ConfigError, "rank: expected a positive integer"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_values_that_leave_the_range() -> None:
    rule = lora("linear", 2, 0, torch.float16)
    with pytest.raises(NonFiniteError, match=r"'w': a of the result contains NaN or infinity in torch.float16"):
        algebra.task_arithmetic([{"w": rule}, {"w": rule}], [1e6, 1.0])
    broken = replace(rule, a=torch.full_like(rule.a, math.nan).float(), b=rule.b.float())
    with pytest.raises(NonFiniteError, match="'w' has no singular value decomposition"):
        algebra.recompress({"w": broken}, 1)


def test_scalings_that_differ_under_vmap() -> None:
    several = fl.stack([X, {"w": replace(X["w"], scaling=2.0)}])
    with pytest.raises(UnsupportedError, match="the scaling is a tensor"):
        fl.vmap(lambda adapters: algebra.scale(adapters, 2.0)["w"].dense(PARAMS["w"]))(several)


def test_places_among_siblings() -> None:
    """An adapter that knows of both parameters of a module says where they are."""
    one = replace(lora("experts", 2, 0), layout=Parameter())
    two = replace(lora("experts", 2, 1), layout=Parameter(position=1, siblings=2))
    for order in ([one, two], [two, one]):
        found: Any = algebra.add([{"w": rule} for rule in order])["w"]
        assert found.layout == two.layout


def test_nothing_is_written_to() -> None:
    x: dict[str, Any] = {"w": lora("linear", 2, 0), "b": fl.Full(PARAMS["b"])}
    y: dict[str, Any] = {"w": lora("linear", 2, 1)}
    leaves: list[Tensor] = [x["w"].a, x["w"].b, y["w"].a, y["w"].b, *PARAMS.values()]
    before = [leaf.clone() for leaf in leaves]
    for kind in algebra.COMBINATION_TYPES:
        options: dict[str, Any] = {} if kind in ("cat", "svd", "linear") else {"density": 0.5}
        algebra.combine([x, y], [0.3, 2], kind, params=PARAMS, **options)
    algebra.recompress(x, 1)
    assert all(torch.equal(leaf, old) and leaf._version == 0 for leaf, old in zip(leaves, before, strict=True))

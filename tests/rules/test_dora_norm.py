"""DoRA's norm against float64: at every scale of float32, where the update cancels the weight, on every path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import gen
from hypothesis import given
from hypothesis import strategies as st
from oracle import delta, factor_shapes, oracle, to_outputs, weight_norm
from torch import Tensor, nn

from funclora import DoRA, apply, base_params, bind, merge, optim, population_step, route, stack, vmap
from funclora.errors import NonFiniteError
from funclora.rules import dora
from funclora.rules.base import Adapters
from funclora.rules.dora import factored_norms, output_norms_of_many, weight_norms
from funclora.rules.layouts import Conv, Conv1D, ConvTranspose, Embedding, Layout, Linear, Parameter

F64 = torch.float64
# layout -> the shape of a weight
LAYOUTS: dict[Layout, tuple[int, ...]] = {
    Linear(): (7, 12),
    Conv1D(): (12, 7),
    Embedding(): (20, 6),
    Parameter(): (3, 5, 8),
    Parameter(stored_transposed=True): (3, 8, 5),
    Conv(): (6, 4, 3),
    Conv(groups=2): (6, 2, 3, 2),
    ConvTranspose(): (4, 6, 3),
    ConvTranspose(groups=2): (4, 3, 3),
}
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def norms(layout: Layout, v: Tensor) -> Tensor:
    return to_outputs(layout, weight_norm(layout, v))


def drawn(layout: Layout, kind: str, scales: tuple[float, float, float], r: int, seed: int) -> tuple[Tensor, ...]:
    """A weight and factors of an update, in float64: of given scales, or cancelling each other."""
    g, shape = gen(seed), LAYOUTS[layout]
    a_shape, b_shape = factor_shapes(layout, shape, r)
    a, b = (torch.randn(some, generator=g, dtype=F64) / r**0.5 for some in (a_shape, b_shape))
    weight = torch.randn(shape, generator=g, dtype=F64)
    if kind == "cancelling":
        left = 10.0 ** torch.randint(-8, 0, (1,), generator=g).item()
        weight = left * weight - delta(layout, shape, a, b)
    each, a_scale, b_scale = scales
    return weight * each, a * a_scale, b * b_scale


@by_layout
@given(
    kind=st.sampled_from(["random", "cancelling"]), exponent=st.integers(-30, 30), shift=st.integers(-30, 30),
    r=st.integers(1, 64), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_norms_equal_those_of_float64(
    layout: Layout, kind: str, exponent: int, shift: int, r: int, seed: int, dtype: torch.dtype
) -> None:
    if dtype == torch.float16:
        exponent, shift = exponent // 15, shift // 15
    shift = min(shift, exponent + 30) if exponent < 0 else max(shift, exponent - 30)  # both factors in range
    wide = drawn(layout, kind, (10.0**exponent, 10.0**shift, 10.0 ** (exponent - shift)), r, seed)
    weight, a, b = (x.to(dtype) for x in wide)
    weight64, a64, b64 = weight.double(), a.double(), b.double()
    update = delta(layout, LAYOUTS[layout], a64, b64)
    expected, largest = norms(layout, weight64 + update), norms(layout, weight64) + norms(layout, update)
    found = weight_norms(layout, weight, a, b, 1.0).double()
    assert found.isfinite().all()
    assert ((found - expected).abs() <= 4e-7 * r**0.5 * largest).all()
    if isinstance(layout, (Linear, Conv1D, Conv)):  # what `route` computes for many members at once
        a_matrix, b_matrix = layout.factors(a, b)
        several = (layout.to_matrix(weight), torch.stack([a_matrix, -a_matrix]), torch.stack([b_matrix, -b_matrix]))
        for of_many, tolerance in ((output_norms_of_many, 4e-7), (factored_norms, 1e-6)):
            for each in of_many(*several, torch.ones(2)).double():
                assert ((each - expected).abs() <= tolerance * largest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["random", "rows cancel", "parts of B·A cancel", "zeros"])
@pytest.mark.parametrize("r", [1, 16, 512])
def test_factored_norms_have_the_digits_of_float32(r: int, kind: str, transposed: bool, dtype: torch.dtype) -> None:
    """Relative to the norm itself, except where rounding of the weight or of B·A to float32 is all that is left."""
    g = gen(r)
    weight, a, b = (torch.randn(*shape, generator=g, dtype=F64) for shape in ((40, 96), (r, 96), (40, r)))
    b /= r**0.5
    if kind == "parts of B·A cancel" and r > 1:
        a[1:] = a[:1] + 1e-4 * a[1:]
        b[:, 0] = -b[:, 1:].sum(1)
    if kind == "zeros":
        weight[::3], b[::2], a[-1] = 0, 0, 0
    a, b = a.to(dtype), b.to(dtype)
    if kind == "rows cancel":
        weight[::5] = -2 * b[::5].double() @ a.double()
    weight = weight.to(dtype)
    update = 2 * b.double() @ a.double()
    expected = torch.linalg.vector_norm(weight.double() + update, dim=-1)
    matrix = weight.mT.contiguous().mT if transposed else weight
    found = factored_norms(matrix, a[None], b[None], torch.tensor([2.0]))[0]
    rounding = torch.linalg.vector_norm(update, dim=-1) * 5e-7
    assert ((found - expected).abs() <= 2e-6 * expected + rounding).all()


@pytest.mark.parametrize("how", ["plain", "grad", "vmap", "high rank", "float64"])
def test_where_norms_are_factored(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def noted(*args: Any) -> Tensor:
        used.append(how)
        return factored_norms(*args)

    monkeypatch.setattr(dora, "factored_norms", noted)
    r = 3 if how == "high rank" else 1
    dtype = F64 if how == "float64" else torch.float32
    weight, a, b, m = (torch.randn(*s, generator=gen(1), dtype=dtype) for s in ((5, 32), (r, 32), (5, r), (5,)))
    rule, expected = DoRA(a, b, m, scaling=2.0), (m / torch.linalg.vector_norm(weight + 2 * b @ a, dim=-1))

    def scale(a: Tensor) -> Tensor:
        return replace(rule, a=a).output_scale(weight)

    if how == "grad":
        found = torch.func.grad_and_value(lambda a: scale(a).sum(), has_aux=False)(a)[1]
        expected = expected.sum()
    elif how == "vmap":
        found = torch.func.vmap(scale)(a[None])[0]
    else:
        found = scale(a)
    torch.testing.assert_close(found, expected)
    assert bool(used) == (how == "plain")


class Layer(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


Run = Callable[[nn.Module, Any, list[dict[str, Any]], Tensor], Tensor]


def compiled(model: nn.Module, params: Any, members: list[dict[str, Any]], x: Tensor) -> Tensor:
    torch._dynamo.reset()
    run = torch.compile(apply, backend="aot_eager", fullgraph=True)
    return torch.stack([run(model, params, member, x) for member in members])


def routed(ids: Any) -> Run:
    def run(model: nn.Module, params: Any, members: list[dict[str, Any]], x: Tensor) -> Tensor:
        return torch.cat([apply(model, params, route(stack(members), ids([k, k])), x[None].expand(2, -1, -1))[:1]
                          for k in range(len(members))])  # fmt: skip

    return run


def weighted(model: nn.Module, params: Any, members: list[dict[str, Any]], x: Tensor) -> Tensor:
    adapters = route(stack(members), weights=torch.eye(len(members)))
    return apply(model, params, adapters, x[None].expand(len(members), -1, -1))


PATHS: dict[str, Run] = {
    "apply": lambda model, params, members, x: torch.stack([apply(model, params, m, x) for m in members]),
    "bind": lambda model, params, members, x: torch.stack([bind(model, params, m)(x) for m in members]),
    "merge": lambda model, params, members, x: torch.stack([x @ merge(params, m)["weight"].T for m in members]),
    "vmap": lambda model, params, members, x: vmap(lambda m: apply(model, params, m, x))(stack(members)),
    "route by list": routed(list),
    "route by tensor": routed(torch.tensor),
    "route by weights": weighted,
    "compiled": compiled,
}
# of the weight, of A and of B
SCALES = [(1e-30, 1e-30, 1.0), (1e-30, 1.0, 1e-30), (1e30, 1.0, 1e30), (1e30, 1e30, 1.0), (1.0, 1e-30, 1e30),
          (1.0, 1e30, 1e-30), (1e20, 1e-10, 1e30), (1e-20, 1e10, 1e-30)]  # fmt: skip

# Compiling takes seconds: there the smallest, the largest and the most uneven.
EVERY_PATH = [(path, s) for path in PATHS for s in (SCALES[1::3] if path == "compiled" else SCALES)]


def of_scales(scales: tuple[float, float, float], dtype: torch.dtype) -> tuple[nn.Module, Any, list[dict[str, Any]]]:
    (weight, *factors), (_, *others) = (
        [x.to(dtype) for x in drawn(Linear(), "random", scales, 4, seed)] for seed in range(2)
    )
    members = []
    for seed, (a, b) in enumerate((factors, others)):
        magnitude = norms(Linear(), weight.double()) * (0.5 + torch.rand(len(weight), generator=gen(seed)))
        members.append({"weight": DoRA(a, b, magnitude.to(dtype), scaling=0.5 + seed)})
    model = Layer(weight)
    return model, base_params(model), members


def widened(rule: DoRA) -> DoRA:
    return replace(rule, a=rule.a.double(), b=rule.b.double(), magnitude=rule.magnitude.double())


def in_float64(weight: Tensor, rule: DoRA) -> Tensor:
    return oracle(weight.double(), widened(rule))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("path", "scales"), EVERY_PATH, ids=str)
def test_every_path_is_right_at_extreme_scales(
    path: str, scales: tuple[float, float, float], dtype: torch.dtype
) -> None:
    model, params, members = of_scales(scales, dtype)
    x = torch.randn(3, 12, generator=gen(7)).to(dtype)
    with torch.no_grad():
        found = PATHS[path](model, params, members, x)
    for got, member in zip(found.double(), members, strict=True):
        expected = x.double() @ in_float64(params["weight"], member["weight"]).T
        tolerance = 2e-6 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("exact", [False, True], ids=["constant norm", "exact gradient"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradients_are_right_at_extreme_scales(scale: float, exact: bool) -> None:
    model, params, members = of_scales((scale, 1.0, scale), torch.float32)
    x = torch.randn(3, 12, generator=gen(7))
    rule = replace(members[0]["weight"], exact_norm_grad=exact)

    def loss(adapters: Adapters, params: Any, x: Tensor) -> Tensor:
        y: Tensor = apply(model, params, adapters, x)
        return (y / scale).square().sum()

    found: Any = torch.func.grad(loss)({"weight": rule}, params, x)["weight"]

    def dense(rule: Any) -> Tensor:
        return (x.double() @ oracle(params["weight"].double(), rule).T / scale).square().sum()

    expected: Any = torch.func.grad(dense)(widened(rule))
    for name in rule.leaf_names:
        want = getattr(expected, name)
        torch.testing.assert_close(
            getattr(found, name).double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_losses_of_a_population_are_right_at_extreme_scales(scale: float) -> None:
    model, params, members = of_scales((scale, 1.0, scale), torch.float32)
    x = torch.randn(3, 12, generator=gen(7))
    optimizer = optim.per_member(optim.sgd, lr=[0.0] * len(members))
    step = population_step(model, lambda bound, x: (bound(x) / scale).square().sum(), optimizer, shared=True)
    _, _, metrics = step(params, stack(members), optimizer.init(stack(members)), x)
    for found, member in zip(metrics["loss"], members, strict=True):
        expected = (x.double() @ in_float64(params["weight"], member["weight"]).T / scale).square().sum()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_norms_beyond_float32_are_no_zeros() -> None:
    weight = torch.full((1, 16), 2e38)
    rule = DoRA(torch.zeros(1, 16), torch.zeros(1, 1), torch.full((1,), 3e38))
    expected = 3e38 / 4
    torch.testing.assert_close(rule.dense(weight), torch.full((1, 16), expected))
    with pytest.raises(NonFiniteError, match="'weight'"):
        merge({"weight": weight}, {"weight": DoRA(torch.full((1, 16), 1e30), torch.full((1, 1), 1e30), torch.ones(1))})


def test_weights_of_members_keep_a_small_magnitude() -> None:
    """What is left for the base is 1 minus the sum of the weights, not the sum of many small differences from 1."""
    model, params, members = of_scales((1.0, 1.0, 1.0), torch.float32)
    small = [{"weight": replace(member["weight"], magnitude=member["weight"].magnitude * 1e-12)} for member in members]
    x = torch.randn(3, 12, generator=gen(7))
    torch.testing.assert_close(
        weighted(model, params, small, x), weighted(model, params, members, x) * 1e-12, rtol=1e-5, atol=1e-17
    )

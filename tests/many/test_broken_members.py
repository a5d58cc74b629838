"""A member that holds NaN or infinity reaches no row that does not use it, forward or backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import gen
from oracle import close
from torch import Tensor, nn

from funclora import Full, LoraConfig, apply, base_params, init, optim, population_step, route, stack, vmap

X = torch.randn(4, 3, 6, generator=gen(0))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def members(model: nn.Module, kind: str) -> list[dict[str, Any]]:
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=kind == "dora", init_lora_weights=False)
    several: list[dict[str, Any]] = [dict(init(model, config, generator=gen(i))) for i in range(3)]
    if kind == "full":
        for each, member in enumerate(several):
            member["2.weight"] = Full(torch.randn(5, 8, generator=gen(each)))
            member["0.bias"] = Full(torch.randn(8, generator=gen(each)))
    return several


def broken(member: dict[str, Any], name: str, leaf: str, value: float) -> dict[str, Any]:
    new = getattr(member[name], leaf).clone()
    new.view(-1)[-1] = value
    return {**member, name: replace(member[name], **{leaf: new})}


BROKEN = [("lora", "0.weight", "a"), ("lora", "2.weight", "b"), ("dora", "0.weight", "b"),
          ("dora", "2.weight", "magnitude"), ("full", "2.weight", "value"), ("full", "0.bias", "value")]  # fmt: skip
every_place = pytest.mark.parametrize(("kind", "name", "leaf"), BROKEN, ids=str)
every_value = pytest.mark.parametrize("value", [float("nan"), float("inf")])


@every_value
@every_place
def test_a_weight_of_zero_shuts_a_member_out(kind: str, name: str, leaf: str, value: float) -> None:
    model = mlp()
    params, alone = base_params(model), members(model, kind)
    weights = torch.rand(4, 3, generator=gen(1))
    weights[:3, 1] = 0
    weights[0, 2] = 0  # a member of weight 0 that is sound has a gradient
    several = stack([alone[0], broken(alone[1], name, leaf, value), alone[2]])

    def loss(stack: Any, weights: Tensor, x: Tensor) -> Tensor:
        return apply(model, params, route(stack, weights=weights), x).square().sum()

    y = apply(model, params, route(several, weights=weights), X)
    kept = [0, 2]
    close(y[:3], apply(model, params, route(stack([alone[0], alone[2]]), weights=weights[:3, kept]), X[:3]), 1e-6)
    assert y[3].isnan().any()

    grads, by_weight = torch.func.grad(loss, (0, 1))(several, weights[:3], X[:3])
    expected, expected_by_weight = torch.func.grad(loss, (0, 1))(
        stack([alone[0], alone[2]]), weights[:3][:, kept], X[:3]
    )
    close(by_weight[:, kept], expected_by_weight, 1e-5)
    assert by_weight[0, 2]
    assert by_weight.isfinite().all()
    for found, want in ((grads[0], expected[0]), (grads[2], expected[1])):
        for target in alone[0]:
            for each in found[target].leaf_names:
                close(getattr(found[target], each), getattr(want[target], each), 1e-5)


@every_place
def test_weights_that_are_mapped_shut_a_member_out(kind: str, name: str, leaf: str) -> None:
    model = mlp()
    params, alone = base_params(model), members(model, kind)
    several = stack([alone[0], broken(alone[1], name, leaf, float("nan")), alone[2]])
    weights = torch.tensor([[0.5, 0.0, 0.25], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])

    def output(weights: Tensor) -> Tensor:
        y: Tensor = apply(model, params, route(several, weights=weights.expand(4, -1)), X)
        return y

    found = torch.func.vmap(output)(weights)
    close(found[:2], torch.stack([output(weights[0]), output(weights[1])]), 1e-6)
    assert found[:2].isfinite().all()
    assert found[2].isnan().any()


@pytest.mark.parametrize(
    ("path", "kind", "name", "leaf"),
    [  # a weight that is replaced as a whole needs its ids as a list
        (path, *place)
        for path in ("list", "tensor", "vmap")
        for place in BROKEN
        if (path, place[0]) != ("tensor", "full")
    ],
)
def test_rows_of_other_members_do_not_see_it(path: str, kind: str, name: str, leaf: str) -> None:
    model = mlp()
    params, alone = base_params(model), members(model, kind)
    several = stack([alone[0], broken(alone[1], name, leaf, float("nan")), alone[2]])
    sound = stack(alone)
    ids: Any = [2, 1, 0, 2]
    others = torch.tensor([0, 2, 3])
    if path == "tensor":
        ids = torch.tensor(ids)

    def outputs(stack: Any) -> Tensor:
        if path == "vmap":
            y: Tensor = vmap(lambda member: apply(model, params, member, X))(stack)
            return y[torch.tensor([0, 2])]
        y = apply(model, params, route(stack, ids), X)
        return y[others]

    close(outputs(several), outputs(sound), 1e-6)
    found: Any = torch.func.grad(lambda stack: outputs(stack).square().sum())(several)
    expected: Any = torch.func.grad(lambda stack: outputs(stack).square().sum())(sound)
    for j in (0, 2):
        for target in alone[0]:
            for each in found[j][target].leaf_names:
                close(getattr(found[j][target], each), getattr(expected[j][target], each), 1e-5)


@every_place
def test_a_population_goes_on_without_it(kind: str, name: str, leaf: str) -> None:
    model = mlp()
    params, alone = base_params(model), members(model, kind)
    optimizer = optim.per_member(optim.adamw, lr=[1e-2] * 3)
    step = population_step(model, lambda bound, x: bound(x).square().mean(), optimizer, shared=True)

    def trained(several: Any) -> tuple[Any, Tensor]:
        state = optimizer.init(several)
        several, state, _ = step(params, several, state, X)
        several, _, metrics = step(params, several, state, X)
        return several, metrics["finite"]

    found, finite = trained(stack([alone[0], broken(alone[1], name, leaf, float("nan")), alone[2]]))
    expected, _ = trained(stack(alone))
    assert finite.tolist() == [True, False, True]
    for j in (0, 2):
        for target in alone[0]:
            for each in found[j][target].leaf_names:
                close(getattr(found[j][target], each), getattr(expected[j][target], each), 1e-5)


@every_value
@every_place
def test_a_member_without_rows_reaches_none(kind: str, name: str, leaf: str, value: float) -> None:
    model = mlp()
    params, alone = base_params(model), members(model, kind)
    several = stack([alone[0], broken(alone[1], name, leaf, value), alone[2]])
    x = X.clone().requires_grad_()
    y = apply(model, params, route(several, [2, 0, -1, 2]), x)
    expected = torch.cat([apply(model, params, each, X[i : i + 1]) for i, each in enumerate(alone[k] for k in (2, 0))])
    close(y[:2], expected, 1e-5)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert y.isfinite().all()
    assert grad.isfinite().all()

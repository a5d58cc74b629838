"""`linear_in_groups` against the separate operations: values, first and second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import gen
from torch import Tensor, nn

from funclora import LoRA, apply, base_params, route, stack
from funclora.rules import linear_ops
from funclora.rules.grouped import linear_in_groups

F64 = torch.float64


def normal(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    return torch.randn(*shape, generator=gen(seed), dtype=F64).requires_grad_(grad)


def inputs(scaled: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Two groups: three members of rank 2 with one row each, one member of rank 1 with two rows."""
    s = (torch.tensor([0.5, 2.0, -1.0], dtype=F64), torch.tensor([3.0], dtype=F64)) if scaled else (None, None)
    factors = [normal(3, 2, 4, seed=1), normal(3, 2, 5, seed=2), s[0], normal(1, 1, 4, seed=3),
               normal(1, 1, 5, seed=4), s[1]]  # fmt: skip
    return normal(5, 3, 4), normal(5, 4, seed=5, grad=False), normal(5, seed=6, grad=False), factors


def joint(x: Tensor, m: Tensor, bias: Tensor, *flat: Any) -> Tensor:
    return linear_in_groups(x, m, bias, [3, 2], [flat[:3], flat[3:]])


def separate(x: Tensor, m: Tensor, bias: Tensor, *flat: Any) -> Tensor:
    rows = []
    for i in range(5):
        first, second, s = flat[:3] if i < 3 else flat[3:]
        k = i if i < 3 else 0
        update = x[i] @ first[k].mT @ second[k]
        rows.append(F.linear(x[i], m, bias) + (update if s is None else s[k] * update))
    return torch.stack(rows)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_equals_the_separate_operations(scaled: bool, turned: bool) -> None:
    x, m, bias, flat = inputs(scaled)
    if turned:  # in memory
        flat = [t if t is None or t.dim() < 3 else t.detach().mT.contiguous().mT.requires_grad_() for t in flat]
    leaves = [t for t in (x, *flat) if t is not None and t.requires_grad]
    weight = normal(5, 3, 5, seed=7, grad=False)
    direction = [torch.randn_like(leaf) for leaf in leaves]
    found = []
    for function in (joint, separate):
        y = function(x, m, bias, *flat)
        first = torch.autograd.grad((y * weight).square().sum(), leaves, create_graph=True)
        slope = torch.stack([(g * d).sum() for g, d in zip(first, direction, strict=True)]).sum()
        second = torch.autograd.grad(slope, leaves)
        found.append((y, first, second))
    torch.testing.assert_close(*found)


def test_inputs_that_need_no_gradient_get_none() -> None:
    x, m, bias, flat = inputs(scaled=True)
    y = joint(x.detach(), m, bias, *flat)
    leaf = flat[0]
    assert leaf is not None
    (found,) = torch.autograd.grad(y.sum(), leaf)
    (expected,) = torch.autograd.grad(separate(x, m, bias, *flat).sum(), leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("how", ["plain", "no_grad", "autocast", "grad", "vmap", "jvp"])
def test_transforms_compute_the_operations_separately(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def noted(*args: Any) -> Tensor:
        used.append(how)
        return linear_in_groups(*args)

    monkeypatch.setattr(linear_ops, "linear_in_groups", noted)
    model = nn.Linear(4, 5).double()
    params = base_params(model)
    members = [LoRA(normal(2, 4, seed=i), normal(5, 2, seed=i + 9)) for i in range(3)]
    x = normal(3, 2, 4)

    def loss(x: Tensor) -> Tensor:
        y: Tensor = apply(model, params, route(stack([{"weight": rule} for rule in members]), [0, 1, 2]), x)
        return y.square().sum()

    expected = loss(x).detach()
    used.clear()
    if how == "no_grad":
        with torch.no_grad():
            got = loss(x)
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = loss(x)
        torch.testing.assert_close(got.detach(), expected, rtol=0.1, atol=0.1, check_dtype=False)
        assert not used
        return
    elif how == "grad":
        got = torch.func.grad_and_value(loss)(x)[1]
    elif how == "vmap":
        got = torch.func.vmap(loss)(x.expand(2, *x.shape))[0]
    elif how == "jvp":
        got = torch.func.jvp(loss, (x,), (x,))[0]
    else:
        got = loss(x)
    torch.testing.assert_close(got.detach(), expected)
    assert bool(used) == (how == "plain")

"""What a weight keeps from one read to the next changes no number, and nothing that a caller holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import gen, make_rule
from oracle import close
from torch import Tensor, nn
from transformers import pytorch_utils

from funclora import base_params, bind, merge, route, stack
from funclora._lazy.weight import LazyWeight
from funclora._tracking.repeated import Plan
from funclora._tracking.routed import PreparedRouted
from funclora.rules.layouts import Conv1D, Linear
from funclora.rules.linear_ops import EXACT

F32 = torch.float32
DTYPES = [torch.float64, F32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, F32: 2e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}
INPUT, OUTPUT = 6, 5
# The rows follow the members, are mixed, have several rows, some or all have no member, or fill other places.
IDS = {
    "in order": [0, 1, 2, 3], "mixed": [2, 0, 3, 1], "several": [0, 0, 1, 1, 2, 2, 3, 3], "uneven": [1, 0, 0, 3, 1, 0],
    "base": [-1, 2, -1, 0], "of both kinds": [3, 3, 0, 1, 2], "one kind": [1, 0],
}  # fmt: skip


def layer(bias: bool, stored: str) -> tuple[nn.Module, Any]:
    if stored == "in, out":
        module: Any = pytorch_utils.Conv1D(OUTPUT, INPUT)
        module.bias.data.normal_(generator=gen(5))
        return module, Conv1D()
    return nn.Linear(INPUT, OUTPUT, bias=bias), Linear()


def members(weight: Tensor, kinds: tuple[str, str], layout: Any) -> list[dict[str, Any]]:
    """Four members: of two kinds, two ranks and two scalings."""
    return [{"weight": make_rule(kinds[i % 2], layout, weight, gen(i))} for i in range(4)]


def plans_of(bound: Any) -> list[Plan]:
    weight = bound.weight
    assert isinstance(weight, LazyWeight)
    assert isinstance(weight.rule, PreparedRouted)
    return list(weight.rule.repeated.plans.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", [("lora", "lora"), ("dora", "dora"), ("lora", "dora")], ids="-".join)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize(("bias", "stored"), [(True, "out, in"), (False, "out, in"), (True, "in, out")])
def test_reads_after_the_first_give_the_same(
    bias: bool, stored: str, ids: list[int], kinds: tuple[str, str], dtype: torch.dtype
) -> None:
    module, layout = layer(bias, stored)
    module = module.to(dtype)
    params = base_params(module)
    some = members(params["weight"], kinds, layout)
    bound: Any = bind(module, params, route(stack(some), ids))
    weights = [merge(params, some[j]) if j >= 0 else params for j in ids]
    with torch.no_grad():
        for lead in [(3,), (), (1,), (2, 3), *([] if stored == "in, out" else [(0,)])]:
            x = torch.randn(len(ids), *lead, INPUT, generator=gen(9), dtype=F32).to(dtype)
            before = x.clone()
            want = torch.stack([torch.func.functional_call(module, w, x[i]) for i, w in enumerate(weights)])
            reads = [bound(x) for _ in range(3)]
            for got in reads:
                close(got, want, TOLERANCE[dtype])
            assert torch.equal(x, before)
            assert len({y.data_ptr() for y in reads}) == 3 or not x.numel()
    if dtype in EXACT or kinds == ("lora", "lora"):  # the scale of the others is in a wider dtype
        assert len(plans_of(bound)) == 1, "the quick form was never taken"


@pytest.mark.parametrize("ids", [[0, 3], [3, 0, -1], [3, 0, 3]], ids=str)
def test_a_member_between_others_that_no_row_uses_is_never_read(ids: list[int]) -> None:
    module, layout = layer(True, "out, in")
    params = base_params(module)
    some = members(params["weight"], ("lora", "lora"), layout)
    weights = [merge(params, some[j]) if j >= 0 else params for j in ids]
    for j in (1, 2):
        some[j]["weight"].a.fill_(float("nan"))
        some[j]["weight"].b.fill_(float("inf"))
    bound: Any = bind(module, params, route(stack(some), ids))
    x = torch.randn(len(ids), 2, INPUT, generator=gen(9))
    want = torch.stack([torch.func.functional_call(module, w, x[i]) for i, w in enumerate(weights)])
    with torch.no_grad():
        for _ in range(3):
            close(bound(x), want, 2e-6)
    assert len(plans_of(bound)) == 1


def test_rows_that_share_a_factor_with_a_gradient_are_not_overwritten() -> None:
    module, layout = layer(True, "out, in")
    params = base_params(module)
    some = members(params["weight"], ("lora", "lora"), layout)
    bound: Any = bind(module, params, route(stack(some), [0, 1, 2, 3]))
    x = torch.randn(4, INPUT, generator=gen(9))
    with torch.no_grad():
        bound(x)
        want = bound(x)
        close(bound(x), want, 2e-6)
    learned = x.clone().requires_grad_()
    got = bound(learned)
    close(got, want, 2e-6)
    assert torch.autograd.grad(got.sum(), learned)[0].abs().sum() > 0
    with torch.inference_mode():
        close([bound(x) for _ in range(3)], [want] * 3, 2e-6)
    close(bound(x), want, 2e-6)
    close(torch.func.vmap(bound)(torch.stack([x, 2 * x])), torch.stack([want, bound(2 * x)]), 2e-6)
    tangent = torch.ones_like(x)
    close(torch.func.jvp(bound, (x,), (tangent,))[1], bound(tangent) - bound(torch.zeros_like(x)), 2e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert bound(x).dtype is torch.bfloat16
        close(bound(x).float(), want, 4e-2)


def test_factors_that_learn_keep_their_gradients() -> None:
    module, layout = layer(False, "out, in")
    params = base_params(module)
    some = stack(members(params["weight"], ("lora", "lora"), layout))
    leaves = [x.requires_grad_() for group in some.groups for x in group.values]
    bound: Any = bind(module, params, route(some, [0, 1, 2, 3]))
    x = torch.randn(4, 2, INPUT, generator=gen(9))
    grads = []
    for _ in range(3):
        with torch.no_grad():
            bound(x)
        grads.append(torch.autograd.grad(bound(x).square().sum(), leaves))
    assert all(g.abs().sum() > 0 for g in grads[0])
    for again in grads[1:]:
        close(again, grads[0], 2e-6)

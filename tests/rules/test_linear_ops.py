"""A linear layer gives the same for an input of any shape: the leading dimensions only count its rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import gen, make_rule
from oracle import close, oracle
from torch import Tensor, nn

from funclora import apply
from funclora.rules.layouts import Embedding, Layout, Linear

KINDS = ("lora", "dora", "dora-exact")
LAYOUTS: list[Layout] = [Linear(), Embedding()]  # a tied embedding stores [in, out] of the layer backwards


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: draw(6),
    "rows": lambda: draw(5, 6),
    "one token": lambda: draw(1, 1, 6),
    "3d": lambda: draw(2, 3, 6),
    "4d": lambda: draw(2, 1, 3, 6),
    "no rows": lambda: draw(0, 3, 6),
    "transposed": lambda: draw(3, 2, 6).transpose(0, 1),
    "features first": lambda: draw(6, 2, 3).permute(1, 2, 0),
    "expanded": lambda: draw(1, 3, 6).expand(2, 3, 6),
}


def setup(kind: str, layout: Layout) -> tuple[nn.Linear, dict[str, Tensor], Any]:
    model = nn.Linear(6, 4, dtype=torch.float64)
    params = {"weight": draw(4, 6, seed=1), "bias": draw(4, seed=2)}
    return model, params, make_rule(kind, layout, params["weight"], gen(3))


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_of_any_shape(kind: str, layout: Layout, x: Callable[[], Tensor]) -> None:
    model, params, rule = setup(kind, layout)
    given = x()
    expected = F.linear(given, oracle(params["weight"], rule), params["bias"])
    for mode in (nullcontext, torch.no_grad, torch.inference_mode):  # the last two may write to what they made
        with mode():
            out = apply(model, params, {"weight": rule}, given)
        assert out.shape == expected.shape
        close(out, expected, 1e-12)
    assert torch.equal(given, x())


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_for_an_input_of_any_shape(kind: str, x: Callable[[], Tensor]) -> None:
    model, params, rule = setup(kind, Linear())

    def gradients(output: Callable[[Any, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = {name: getattr(rule, name).clone().requires_grad_() for name in rule.leaf_names}
        given = x().requires_grad_()
        loss = output(replace(rule, **leaves), given).sin().sum()
        return torch.autograd.grad(loss, [given, *leaves.values()])

    got = gradients(lambda rule, x: apply(model, params, {"weight": rule}, x))
    expected = gradients(lambda rule, x: F.linear(x, oracle(params["weight"], rule), params["bias"]))
    close(got, expected, 1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_is_mapped_along_any_dimension(kind: str, dim: int) -> None:
    model, params, rule = setup(kind, Linear())
    x = draw(2, 3, 5, 6).transpose(0, dim)
    out = torch.func.vmap(lambda x: apply(model, params, {"weight": rule}, x), in_dims=dim, out_dims=dim)(x)
    close(out, F.linear(x, oracle(params["weight"], rule), params["bias"]), 1e-12)


@pytest.mark.parametrize("mapped", [False, True])
def test_dropout_draws_the_same_for_the_same_numbers(mapped: bool) -> None:
    model, params, rule = setup("lora", Linear())
    rule = replace(rule, dropout=0.5)
    x = draw(2, 3, 6)

    def outputs(x: Tensor) -> Tensor:
        torch.manual_seed(0)

        def call(x: Tensor) -> Tensor:
            return apply(model, params, {"weight": rule}, x)

        return torch.func.vmap(call, randomness="same")(x[None])[0] if mapped else call(x)

    close(outputs(x), outputs(x.flatten(0, 1)).unflatten(0, (2, 3)), 0)
    assert not torch.equal(outputs(x), F.linear(x, oracle(params["weight"], rule), params["bias"]))

"""The rule of a part of a weight, or of its transpose, gives that part of the rewritten weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import gen, make_rule
from torch import Tensor

from funclora import Delta, Full, TrainableTokens
from funclora.rules.base import Rule
from funclora.rules.layouts import Conv, Conv1D, ConvTranspose, Embedding, Layout, Linear, Parameter

WEIGHTS: list[tuple[Layout, tuple[int, ...]]] = [
    (Linear(), (4, 6)),
    (Conv1D(), (6, 4)),
    (Embedding(), (5, 4)),
    (Parameter(), (3, 2, 4, 5)),
    (Parameter(stored_transposed=True), (3, 5, 4)),
    (Conv(), (4, 3, 2, 2)),
    (Conv(groups=2), (4, 3, 2)),
    (ConvTranspose(), (3, 4, 2)),
    (ConvTranspose(groups=3), (3, 2, 2)),
]
KINDS = ("lora", "dora", "prepared", "full", "delta", "tokens")


def weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=gen(0), dtype=torch.float64)


def rule_of(kind: str, layout: Layout, w: Tensor) -> Rule:
    if kind == "tokens":
        rows = torch.randn(2, 4, generator=gen(1), dtype=torch.float64)
        return TrainableTokens(rows, token_indices=(3, 0), layout=layout)  # type: ignore[arg-type]
    if kind in ("full", "delta"):
        value = torch.randn(w.shape, generator=gen(1), dtype=torch.float64)
        return Full(value) if kind == "full" else Delta(value, scaling=0.7)
    rule: Any = make_rule("dora" if kind == "prepared" else kind, layout, w, gen(1))
    prepared: Rule = rule.prepared(w) if kind == "prepared" else rule
    return prepared


def known(kind: str, layout: Layout, dim: int, shape: tuple[int, ...]) -> bool:
    """Whether the mathematics has a rule of the kind for a slice along that dimension."""
    if kind in ("full", "delta"):
        return True
    of_outputs = {Conv: 0, ConvTranspose: 1}.get(type(layout), len(shape) - (1 if layout.transposed else 2))
    if dim == of_outputs:
        return not (isinstance(layout, ConvTranspose) and layout.groups > 1)
    if isinstance(layout, (Conv, ConvTranspose)):
        return False
    return kind != "dora" or dim < len(shape) - 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layout", "shape"), WEIGHTS, ids=str)
def test_a_slice_of_the_weight_has_the_rule_of_that_slice(kind: str, layout: Layout, shape: tuple[int, ...]) -> None:
    if kind == "tokens" and type(layout) is not Embedding:
        pytest.skip("rows of a table")
    w = weight(shape)
    rule = rule_of(kind, layout, w)
    for dim in range(len(shape)):
        assert rule.narrow(shape, dim, 0, shape[dim]) is not None  # the whole
        part = rule.narrow(shape, dim, 1, shape[dim] - 1)
        assert (part is not None) == known(kind, layout, dim, shape), f"dimension {dim}"
        if part is not None:
            own = w.narrow(dim, 1, shape[dim] - 1)
            part.check("w", own)
            torch.testing.assert_close(part.dense(own), rule.dense(w).narrow(dim, 1, shape[dim] - 1))


@pytest.mark.parametrize("kind", ["lora", "dora", "prepared", "tokens"])
@pytest.mark.parametrize(("layout", "shape"), WEIGHTS, ids=str)
def test_the_transpose_of_the_weight_has_a_rule(kind: str, layout: Layout, shape: tuple[int, ...]) -> None:
    if kind == "tokens" and type(layout) is not Embedding:
        pytest.skip("rows of a table")
    w = weight(shape)
    rule = rule_of(kind, layout, w)
    turned = rule.transposed()
    if isinstance(layout, (Conv, ConvTranspose)):
        assert turned is None
    else:
        assert turned is not None
        torch.testing.assert_close(turned.dense(w.mT), rule.dense(w).mT)


@pytest.mark.parametrize("kind", ["lora", "dora", "prepared"])
@pytest.mark.parametrize("index", [1, slice(1, 3), torch.tensor([2, 0, 0])], ids=str)
def test_experts_have_rules_of_their_own(kind: str, index: Any) -> None:
    w = weight((3, 2, 4, 5))
    rule = rule_of(kind, Parameter(), w)
    chosen = rule.select_experts(index)
    assert chosen is not None
    torch.testing.assert_close(chosen.dense(w[index]), rule.dense(w)[index])


def test_a_rule_that_says_nothing_has_no_parts() -> None:
    class Negative(Rule):
        leaf_names = ()

        def dense(self, weight: Tensor) -> Tensor:
            return -weight

        def check(self, name: str, weight: Tensor) -> None: ...

    rule = Negative()
    assert (rule.layout, rule.transposed(), rule.select_experts(0)) == (None, None, None)
    assert rule.narrow_outputs(0, 1) is rule.narrow_inputs(0, 1) is rule.narrow((2, 3), 0, 0, 1) is None

"""Stacks: what goes in comes out, whatever is done in between."""

from __future__ import annotations

from typing import Any

import optree as _optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from funclora import DoRA, Full, LoRA, stack, unstack
from funclora.errors import ArgumentError, ConfigError

optree: Any = _optree


@st.composite
def adapters(draw: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in draw(st.sets(st.sampled_from(["a", "b", "c"]), min_size=1)):
        r, dtype = draw(st.integers(1, 3)), draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
        options = {"scaling": draw(st.floats(0.1, 4)), "dropout": draw(st.sampled_from([0.0, 0.1]))}
        a, b = torch.randn(r, 3).to(dtype), torch.randn(2, r).to(dtype)
        kind = draw(st.integers(0, 2))
        found[name] = (
            LoRA(a, b, **options) if kind == 0 else DoRA(a, b, torch.randn(2).to(dtype), **options) if kind == 1
            else Full(torch.randn(2, 3).to(dtype))
        )  # fmt: skip
    return found


def same(one: Any, other: Any) -> None:
    first, second = optree.tree_flatten(one), optree.tree_flatten(other)
    assert first[1] == second[1]
    for x, y in zip(first[0], second[0], strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@settings(max_examples=40)
@given(members=st.lists(adapters(), min_size=1, max_size=6), data=st.data())
def test_members_come_out_as_they_went_in(members: list[Any], data: Any) -> None:
    several = stack(members)
    assert len(several) == len(members)
    order = data.draw(st.lists(st.integers(-len(members), len(members) - 1), min_size=1, max_size=8))
    cut = data.draw(st.slices(len(members)))
    pairs = [
        (list(several), members), (unstack(several), members), (list(several[order]), [members[i] for i in order]),
        (list(several[torch.tensor(order)]), [members[i] for i in order]), (list(several[cut]), members[cut]),
        (list(stack([*several, *several[order]])), [*members, *(members[i] for i in order)]),
        (list(optree.tree_unflatten(*reversed(optree.tree_flatten(several)))), members),
        (list(pytree.tree_map(lambda x: x, several)), members),
    ]  # fmt: skip
    for got, want in pairs:
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            same(one, other)


def test_what_is_no_stack_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        stack([])
    with pytest.raises(ArgumentError, match=r"members\[0\]: x: expected a tensor, got 1\.0"):
        stack([{"x": 1.0}])
    several = stack([{"x": torch.ones(1)}])
    for index in (1, -2):
        with pytest.raises(IndexError, match="1 members"):
            several[index]
    with pytest.raises(TypeError, match="int"):
        several["x"]  # type: ignore[index]

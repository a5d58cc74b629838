"""`route` over members whose rules differ in what others take for granted: scalings, leaves, layouts, none at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from cases import gen
from oracle import close
from torch import Tensor, nn

import funclora as fl
from funclora.errors import UnsupportedError
from funclora.rules import Conv1D, Linear, LoRA, Rule, pytree_node

F64 = torch.float64


class Update(Rule):
    """W + scaling·B·A, and nothing that it could do without."""

    a: Tensor
    b: Tensor
    layout = Linear()

    def as_lora(self) -> LoRA:
        assert self.scaling is not None
        return LoRA(self.a, self.b, scaling=self.scaling)

    def dense(self, weight: Tensor) -> Tensor:
        assert self.scaling is not None
        return weight + self.scaling * (self.b @ self.a)

    def check(self, name: str, weight: Tensor) -> None: ...


@pytree_node
@dataclass(frozen=True, eq=False)
class Learned(Update):
    """The scaling is trained."""

    a: Tensor
    b: Tensor
    scaling: Tensor
    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b", "scaling")


@pytree_node
@dataclass(frozen=True, eq=False)
class Constant(Update):
    """The scaling is the method's."""

    a: Tensor
    b: Tensor
    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b")
    scaling = 3.0


@pytree_node
@dataclass(frozen=True, eq=False)
class ByRank(Update):
    """The scaling is α/r."""

    a: Tensor
    b: Tensor
    alpha: float = field(default=4.0, kw_only=True)
    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b")

    @property
    def scaling(self) -> float:  # type: ignore[override]
        return self.alpha / self.a.shape[0]


@pytree_node
@dataclass(frozen=True, eq=False)
class Gain(Rule):
    """One number, for all of the weight."""

    value: Tensor
    leaf_names: ClassVar[tuple[str, ...]] = ("value",)
    layout = Linear()

    def dense(self, weight: Tensor) -> Tensor:
        return weight * self.value

    def check(self, name: str, weight: Tensor) -> None: ...


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=gen(seed), dtype=F64)


def factors(seed: int) -> tuple[Tensor, Tensor]:
    return drawn(3, 5, seed=seed), drawn(4, 3, seed=seed + 1)


RULES: dict[str, Callable[[int], Rule]] = {
    "learned": lambda seed: Learned(*factors(seed), drawn(seed=seed + 2)),
    "constant": lambda seed: Constant(*factors(seed)),
    "by rank": lambda seed: ByRank(*factors(seed)),
    "gain": lambda seed: Gain(drawn(seed=seed)),
}
IDS = [2, 0, 3, -1, 1]


@pytest.mark.parametrize("how", ["list", "tensor", "weights", "vmap"])
@pytest.mark.parametrize("kind", RULES)
def test_rows_equal_members_alone(kind: str, how: str) -> None:
    """Among others, with a member that adapts nothing."""
    if (kind, how) == ("gain", "tensor"):
        pytest.skip("needs low-rank updates")
    model, x = nn.Linear(5, 4).double(), drawn(5, 5, seed=0)
    params = fl.base_params(model)
    lora = LoRA(*factors(40), scaling=0.5)
    members: list[dict[str, Rule]] = [{"weight": rule} for rule in (RULES[kind](10), lora, RULES[kind](30))]
    members.append({})
    weight, bias = params["weight"], params["bias"]

    def outputs(members: list[dict[str, Rule]]) -> Tensor:
        weights = [one["weight"].dense(weight) if one else weight for one in members]
        return torch.stack([x @ each.mT + bias for each in [*weights, weight]])

    def got(members: list[dict[str, Rule]]) -> Tensor:
        several = fl.stack(members)
        if how == "vmap":
            return fl.vmap(lambda one: fl.apply(model, params, one, x), in_dims=(0,))(several)
        chosen: dict[str, Any] = {"list": {"ids": IDS}, "tensor": {"ids": torch.tensor(IDS)}}
        weights = torch.cat([torch.eye(4, dtype=F64), torch.zeros(1, 4, dtype=F64)])[IDS]
        return fl.apply(model, params, fl.route(several, **chosen.get(how, {"weights": weights})), x)

    def expected(members: list[dict[str, Rule]]) -> Tensor:
        y = outputs(members)
        return y[:-1] if how == "vmap" else torch.stack([y[j, i] for i, j in enumerate(IDS)])

    close(got(members), expected(members), 1e-12)
    of_got, of_expected = (torch.func.grad(lambda m, f=f: f(m).square().sum())(members) for f in (got, expected))
    close(leaves(of_got), leaves(of_expected), 1e-11)


def leaves(members: list[dict[str, Rule]]) -> list[Tensor]:
    return [getattr(rule, leaf) for one in members for rule in one.values() for leaf in rule.leaf_names]


@pytest.mark.parametrize("chosen", [{"ids": [1, 0]}, {"ids": torch.tensor([1, 0])}, {"weights": torch.eye(2)}], ids=str)
def test_members_of_other_layouts_are_no_rows_of_one_batch(chosen: dict[str, Any]) -> None:
    """A square weight fits both ways."""
    model = nn.Linear(4, 4)
    a, b = torch.ones(1, 4), torch.ones(4, 1)
    members: list[dict[str, Rule]] = [{"weight": LoRA(a, b, layout=layout)} for layout in (Linear(), Conv1D())]
    several = fl.stack(members)
    with pytest.raises(UnsupportedError, match=r"'weight': .* different matrices.*: Conv1D, Linear"):
        fl.apply(model, fl.base_params(model), fl.route(several, **chosen), torch.ones(2, 4))

"""LoHa (FedPara, arXiv 2108.06098) as a rule of your own: the elementwise product of two low-rank updates."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

import funclora as fl
from funclora.rules import Layout, Linear, LoRA, Rule, compute_dtype, pytree_node


# --8<-- [start:rule]
@pytree_node
@dataclass(frozen=True, eq=False)
class LoHa(Rule):
    """W + s·(B₁A₁)∘(B₂A₂): with two pairs of rank r, an update of rank up to r²."""

    a1: Tensor  # [r, in]
    b1: Tensor  # [out, r]
    a2: Tensor
    b2: Tensor
    scaling: float | Tensor = field(default=1.0, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)
    layout: Layout = field(default=Linear(), kw_only=True)

    leaf_names: ClassVar[tuple[str, ...]] = ("a1", "b1", "a2", "b2")
    up_leaf_names: ClassVar[tuple[str, ...]] = ("b1", "b2")

    def dense(self, weight: Tensor) -> Tensor:
        dtype = compute_dtype(weight.dtype, self.a1.dtype)
        pairs = (self.layout.factors(self.a1, self.b1), self.layout.factors(self.a2, self.b2))
        first, second = (b.to(dtype) @ a.to(dtype) for a, b in pairs)
        matrix = self.layout.to_matrix(weight).to(dtype) + self.scaling * first * second
        return self.layout.from_matrix(matrix, weight.shape)

    def check(self, name: str, weight: Tensor) -> None:
        for a, b in ((self.a1, self.b1), (self.a2, self.b2)):
            LoRA(a, b, layout=self.layout).check(name, weight)

    # --8<-- [end:rule]

    # --8<-- [start:lora]
    def as_lora(self) -> LoRA:
        """Row (i, j) of A is A₁[i]∘A₂[j], column (i, j) of B is B₁[:, i]∘B₂[:, j]."""
        of_a, of_b = self.layout.rank_dims
        a, b = _paired(self.a1, self.a2, of_a), _paired(self.b1, self.b2, of_b)
        return LoRA(a, b, scaling=self.scaling, dropout=self.dropout, layout=self.layout)

    # --8<-- [end:lora]

    # --8<-- [start:more]
    @property
    def rank_dims(self) -> dict[str, int]:
        of_a, of_b = self.layout.rank_dims
        return {"a1": of_a, "b1": of_b, "a2": of_a, "b2": of_b}

    @property
    def r(self) -> int:  # type: ignore[override]
        return self.a1.shape[self.layout.rank_dims[0]]

    @property
    def dropout_p(self) -> float:
        return self.dropout

    def scaled(self, factor: float) -> LoHa:
        return self.with_scaling(factor * self.scaling)

    # --8<-- [end:more]


def _paired(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """The products of every slice of x with every slice of y along a dimension."""
    dim %= x.dim()
    return (x.unsqueeze(dim + 1) * y.unsqueeze(dim)).flatten(dim, dim + 1)


def init_loha(
    params: Mapping[str, Tensor], targets: Iterable[str], r: int, alpha: float, seed: int = 0
) -> dict[str, Rule]:
    """A fresh adapter for linear layers. B₂ is zero, so that it changes nothing yet."""
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, Rule] = {}
    for name in targets:
        n_out, n_in = params[name].shape
        a1, b1, a2 = (torch.randn(shape, generator=generator) for shape in ((r, n_in), (n_out, r), (r, n_in)))
        leaves = (x.to(params[name]) for x in (a1, 0.1 * b1, a2, torch.zeros(n_out, r)))
        adapters[name] = LoHa(*leaves, scaling=alpha / r)
    return adapters


class Losses(NamedTuple):
    first: float
    last: float


def main(argv: list[str] | None = None) -> Losses:
    parser = argparse.ArgumentParser(description="Trains a LoHa adapter on a small task.")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
    params = fl.base_params(model)
    adapters = init_loha(params, ["0.weight", "2.weight"], r=4, alpha=4)
    print(fl.summary(params, adapters))
    x = torch.randn(256, 16)
    y = fl.apply(model, params, {}, x) * torch.linspace(0.5, 2, 16)
    optimizer = fl.optim.lora_plus(5e-3, ratio=2.0)
    state = optimizer.init(adapters)

    def loss(adapters: dict[str, Rule], x: Tensor, y: Tensor) -> Tensor:
        return (fl.apply(model, params, adapters, x) - y).square().mean()

    first = loss(adapters, x, y).item()
    for _ in range(options.steps):
        grads = torch.func.grad(loss)(adapters, x, y)
        updates, state = optimizer.update(grads, state, adapters)
        adapters = fl.optim.apply_updates(adapters, updates)
    last = loss(adapters, x, y).item()
    print(f"loss {first:.4f} -> {last:.4f}")
    return Losses(first, last)


if __name__ == "__main__":
    main()

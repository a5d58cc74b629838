"""VeRA (arXiv 2310.11454) as a rule of your own: one frozen pair A, B for all layers, two trained vectors for each."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import optree
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import funclora as fl
from funclora.rules import FROZEN, Layout, Linear, LoRA, Rule, pytree_node


# --8<-- [start:rule]
@pytree_node
@dataclass(frozen=True, eq=False)
class VeRA(Rule):
    """W + diag(b)·B·diag(d)·A: the vectors b and d are trained, the random matrices A and B are frozen."""

    d: Tensor  # [r]
    b: Tensor  # [out]
    shared_a: Tensor = field(kw_only=True, metadata=FROZEN)  # [r, in]
    shared_b: Tensor = field(kw_only=True, metadata=FROZEN)  # [out, r]
    dropout: float = field(default=0.0, kw_only=True)
    layout: Layout = field(default=Linear(), kw_only=True)

    leaf_names: ClassVar[tuple[str, ...]] = ("d", "b")
    up_leaf_names: ClassVar[tuple[str, ...]] = ("b",)

    def as_lora(self) -> LoRA:
        a, b = _rows_scaled(self.shared_a, self.d), _rows_scaled(self.shared_b, self.b)
        return LoRA(a, b, dropout=self.dropout, layout=self.layout)

    def dense(self, weight: Tensor) -> Tensor:
        return self.as_lora().dense(weight)

    def check(self, name: str, weight: Tensor) -> None:
        lead = self.d.dim()
        if self.shared_a.shape[:lead] != self.d.shape or self.shared_b.shape[:lead] != self.b.shape:
            raise fl.errors.ParamsError(f"adapter of {name!r}: d or b does not have a number for each row of A or B.")
        self.as_lora().check(name, weight)

    @property
    def r(self) -> int:  # type: ignore[override]
        return self.d.shape[-1]

    @property
    def dropout_p(self) -> float:
        return self.dropout


def _rows_scaled(matrix: Tensor, factors: Tensor) -> Tensor:
    return matrix * factors.reshape(*factors.shape, *[1] * (matrix.dim() - factors.dim()))


# --8<-- [end:rule]


# --8<-- [start:init]
def init_vera(params: Mapping[str, Tensor], targets: Iterable[str], r: int, seed: int = 0) -> dict[str, Rule]:
    """A fresh adapter for linear layers: d = 0.1 and b = 0, so that it changes nothing yet.

    A and B depend on the seed and on the shape alone. Layers of one shape share them, and a saved adapter needs only
    its vectors: `init_vera` with the same seed brings the rest back.
    """
    pairs: dict[torch.Size, tuple[Tensor, Tensor]] = {}
    adapters: dict[str, Rule] = {}
    for name in targets:
        weight = params[name]
        n_out, n_in = weight.shape
        if weight.shape not in pairs:
            generator = torch.Generator().manual_seed(seed)
            a, b = (torch.randn(*shape, generator=generator) for shape in ((r, n_in), (n_out, r)))
            pairs[weight.shape] = (a / n_in**0.5).to(weight), (b / r**0.5).to(weight)
        shared_a, shared_b = pairs[weight.shape]
        d, zero = weight.new_full((r,), 0.1), weight.new_zeros(n_out)
        adapters[name] = VeRA(d, zero, shared_a=shared_a, shared_b=shared_b)
    return adapters


# --8<-- [end:init]


# --8<-- [start:save]
def save_vera(file: Path, adapters: dict[str, Rule]) -> None:
    names = ["/".join(path) for path in optree.tree_paths(adapters)]  # type: ignore[arg-type]
    save_file(dict(zip(names, optree.tree_leaves(adapters), strict=True)), file)  # type: ignore[arg-type]


def load_vera(file: Path, fresh: dict[str, Rule]) -> dict[str, Rule]:
    """The vectors of a file in place of those of an adapter that `init_vera` made with the same seed."""
    stored = load_file(file)
    paths, _, structure = optree.tree_flatten_with_path(fresh)  # type: ignore[arg-type]
    loaded: Any = optree.tree_unflatten(structure, [stored["/".join(path)] for path in paths])
    return loaded


# --8<-- [end:save]


class Losses(NamedTuple):
    first: float
    last: float
    loaded: float  # of the adapter that was saved and loaded


def main(argv: list[str] | None = None) -> Losses:
    parser = argparse.ArgumentParser(description="Trains a VeRA adapter on a small task.")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
    params = fl.base_params(model)
    adapters: dict[str, Rule] = init_vera(params, ["0.weight", "2.weight"], r=64)
    print(fl.summary(params, adapters))
    x = torch.randn(256, 16)
    y = fl.apply(model, params, {}, x) * torch.linspace(0.5, 2, 16)
    optimizer = fl.optim.adamw(5e-2)
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
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vera.safetensors"
        save_vera(file, adapters)
        adapters = load_vera(file, init_vera(params, ["0.weight", "2.weight"], r=64))
    return Losses(first, last, loss(adapters, x, y).item())


if __name__ == "__main__":
    main()

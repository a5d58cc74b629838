"""The ways in which a module can refer to a layer or to its weight without registering it.

Each class computes `out(lin(x))` or the like; how it gets at `lin` is what the class is about.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


class Net(nn.Module):
    """Two layers; a subclass says how `forward` gets at the first."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)
        self.build()

    def build(self) -> None:
        pass

    def first(self, x: Tensor) -> Tensor:
        return self.lin(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x))


class Listed(Net):
    def build(self) -> None:
        self.layers = [self.lin]

    def first(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class Nested(Net):
    def build(self) -> None:
        self.table = {"a": ({"b": [self.lin]},), "n": 1}

    def first(self, x: Tensor) -> Tensor:
        return self.table["a"][0]["b"][0](x)  # type: ignore[index]


class Keyed(Net):
    def build(self) -> None:
        self.order = dict.fromkeys([self.lin], "first")

    def first(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x


class InSet(Net):
    def build(self) -> None:
        self.layers = frozenset({self.lin})

    def first(self, x: Tensor) -> Tensor:
        return next(iter(self.layers))(x)


class Pair(NamedTuple):
    name: str
    layer: nn.Module


class NamedPair(Net):
    def build(self) -> None:
        self.pair = Pair("lin", self.lin)

    def first(self, x: Tensor) -> Tensor:
        return self.pair.layer(x)


class Bank(dict[str, nn.Module]):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = layer(x)
        return x


class DictSubclass(Net):
    def build(self) -> None:
        self.bank = Bank(lin=self.lin)

    def first(self, x: Tensor) -> Tensor:
        return self.bank.run(x)


class Chain(list[nn.Module]):
    """A list whose constructor takes something else than its items."""

    def __init__(self, name: str, *layers: nn.Module) -> None:
        super().__init__(layers)
        self.name = name


class ListSubclass(Net):
    def build(self) -> None:
        self.chain = Chain("layers", self.lin)

    def first(self, x: Tensor) -> Tensor:
        assert self.chain.name == "layers"
        return self.chain[0](x)


class BoundMethod(Net):
    def build(self) -> None:
        self.function = self.affine

    def affine(self, x: Tensor) -> Tensor:
        return self.lin(x)

    def first(self, x: Tensor) -> Tensor:
        return self.function(x)


class Partial(Net):
    def build(self) -> None:
        self.function = functools.partial(self.scaled, scale=2.0)

    def scaled(self, x: Tensor, scale: float) -> Tensor:
        return scale * self.lin(x)

    def first(self, x: Tensor) -> Tensor:
        return self.function(x)


class PartialOfWeight(Net):
    def build(self) -> None:
        self.function = functools.partial(F.linear, weight=self.lin.weight, bias=self.lin.bias)

    def first(self, x: Tensor) -> Tensor:
        return self.function(x)


class Closure(Net):
    def build(self) -> None:
        self.function = lambda x: self.lin(x) + 0

    def first(self, x: Tensor) -> Tensor:
        return self.function(x)


class ClosureOfClosure(Net):
    def build(self) -> None:
        def inner(x: Tensor) -> Tensor:
            return self.lin(x)

        def outer(x: Tensor) -> Tensor:
            return inner(x)

        self.functions = [outer]

    def first(self, x: Tensor) -> Tensor:
        return self.functions[0](x)


class Recursive(Net):
    """A closure that refers to itself."""

    def build(self) -> None:
        def repeat(x: Tensor, n: int = 2) -> Tensor:
            return repeat(self.lin(x), n - 1) if n else x

        self.function = repeat

    def first(self, x: Tensor) -> Tensor:
        return self.function(x)


class DefaultArgument(Net):
    """The usual way to make closures in a loop."""

    def build(self) -> None:
        self.functions = [lambda x, layer=layer: layer(x) for layer in [self.lin]]

    def first(self, x: Tensor) -> Tensor:
        return self.functions[0](x)


class KeywordDefault(Net):
    def build(self) -> None:
        def function(x: Tensor, *, layer: nn.Module = self.lin) -> Tensor:
            return layer(x)

        self.function = function

    def first(self, x: Tensor) -> Tensor:
        return self.function(x)


class Helper:
    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def run(self, x: Tensor) -> Tensor:
        return self.layer(x)


class PlainObject(Net):
    def build(self) -> None:
        self.helper = Helper(self.lin)

    def first(self, x: Tensor) -> Tensor:
        return self.helper.run(x)


class DeepObject(Net):
    def build(self) -> None:
        helper: Any = self.lin
        for _ in range(4):
            helper = Helper(helper)
            helper.layer = helper.layer if isinstance(helper.layer, nn.Module) else helper.layer.run
        self.helper = helper

    def first(self, x: Tensor) -> Tensor:
        return self.helper.run(x)


class CyclicObject(Net):
    """A helper that knows itself, as things with callbacks do."""

    def build(self) -> None:
        self.helper = Helper(self.lin)
        self.helper.callbacks = [self.helper.run]  # type: ignore[attr-defined]

    def first(self, x: Tensor) -> Tensor:
        return self.helper.callbacks[0](x)  # type: ignore[attr-defined]


class CyclicList(Net):
    def build(self) -> None:
        self.ring: list[Any] = [self.lin]
        self.ring.append(self.ring)

    def first(self, x: Tensor) -> Tensor:
        return self.ring[1][1][0](x)


class SharedObject(Net):
    """Two names of one helper stay one helper."""

    def build(self) -> None:
        self.one = Helper(self.lin)
        self.other = [self.one]

    def first(self, x: Tensor) -> Tensor:
        assert self.other[0] is self.one
        return self.other[0].run(x)


@dataclass(frozen=True, slots=True)
class Slotted:
    layer: nn.Module


class SlottedObject(Net):
    def build(self) -> None:
        self.helper = Slotted(self.lin)

    def first(self, x: Tensor) -> Tensor:
        return self.helper.layer(x)


class WeakReference(Net):
    """A child that knows its parent without keeping it alive."""

    def build(self) -> None:
        self.child = Child(weakref.ref(self))

    def first(self, x: Tensor) -> Tensor:
        return self.child(x)


class WeakProxy(Net):
    def build(self) -> None:
        self.child = Child(functools.partial(getattr, weakref.proxy(self), "lin"))

    def first(self, x: Tensor) -> Tensor:
        return self.child.parent()(x)


class Child(nn.Module):
    def __init__(self, parent: Callable[[], Any]) -> None:
        super().__init__()
        self.parent = parent

    def forward(self, x: Tensor) -> Tensor:
        return self.parent().lin(x)


class ParentInList(Net):
    def build(self) -> None:
        self.child = Child(lambda: self.child.parents[0])  # type: ignore[index]
        self.child.parents = [self]  # type: ignore[assignment]

    def first(self, x: Tensor) -> Tensor:
        return self.child(x)


class ForwardOverride(Net):
    """What accelerate's hooks do to a layer."""

    def build(self) -> None:
        old = self.lin.forward

        def new_forward(module: nn.Module, x: Tensor) -> Tensor:
            return 2 * module._old_forward(x)  # type: ignore[operator]

        self.lin._old_forward = old  # type: ignore[assignment]
        self.lin.forward = functools.update_wrapper(  # type: ignore[method-assign]
            functools.partial(new_forward, self.lin), old
        )


class ForwardMethod(Net):
    def build(self) -> None:
        self.lin.forward = (lambda module, x: F.linear(x, module.weight)).__get__(self.lin)  # type: ignore[method-assign]


class WeightInDict(Net):
    def build(self) -> None:
        self.weights = {"w": self.lin.weight, "b": self.lin.bias}

    def first(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights["w"], self.weights["b"])


class Cached(Net):
    def build(self) -> None:
        self.function = functools.lru_cache(maxsize=None)(self.layer_for)

    def layer_for(self, name: str) -> nn.Module:
        return getattr(self, name)

    def first(self, x: Tensor) -> Tensor:
        return self.function("lin")(x)


class Hooks(Net):
    def build(self) -> None:
        self.lin.register_forward_pre_hook(self.before)
        self.lin.register_forward_hook(lambda module, args, output: output + module.weight.sum() * 0 + 1)
        self.out.register_forward_hook(self.after)

    def before(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] + self.lin(args[0]) if getattr(self, "inside", False) else args[0],)

    def after(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output + self.lin(args[0]).sum(-1, keepdim=True)


class Unregistered(Net):
    """A module that is in no registry: its weights are the model's own."""

    def build(self) -> None:
        self.extra = [nn.Linear(4, 4), nn.BatchNorm1d(4)]

    def first(self, x: Tensor) -> Tensor:
        return self.extra[1](self.extra[0](self.lin(x)))


class Parametrized(Net):
    def build(self) -> None:
        class Symmetric(nn.Module):
            def forward(self, w: Tensor) -> Tensor:
                return w + w.T

        parametrize.register_parametrization(self.lin, "weight", Symmetric())


class WeightNorm(Net):
    def build(self) -> None:
        parametrizations.weight_norm(self.lin)


class SpectralNorm(Net):
    def build(self) -> None:
        parametrizations.spectral_norm(self.lin)


class OldSpectralNorm(Net):
    def build(self) -> None:
        nn.utils.spectral_norm(self.lin)


class OldWeightNorm(Net):
    def build(self) -> None:
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(self.lin)


REFERENCES = [
    Net, Listed, Nested, Keyed, InSet, NamedPair, DictSubclass, ListSubclass, BoundMethod, Partial, PartialOfWeight,
    Closure, ClosureOfClosure, Recursive, DefaultArgument, KeywordDefault, PlainObject, DeepObject, CyclicObject,
    CyclicList, SharedObject, SlottedObject, WeakReference, WeakProxy, ParentInList, ForwardOverride, ForwardMethod,
    WeightInDict, Cached, Hooks, Unregistered, Parametrized, WeightNorm, SpectralNorm, OldSpectralNorm, OldWeightNorm,
]  # fmt: skip
TARGETS = {
    Parametrized: "lin.parametrizations.weight.original",
    WeightNorm: "lin.parametrizations.weight.original1",
    SpectralNorm: "lin.parametrizations.weight.original",
    OldSpectralNorm: "lin.weight_orig",
    OldWeightNorm: "lin.weight_v",
}

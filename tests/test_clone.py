"""`bind`'s copy of the module tree: whatever refers to a weight sees the rewritten one, and the model sees nothing."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import gen, make_rule
from oracle import close, distance, oracle, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from funclora import apply, base_params, bind, merge
from funclora._layout import Embedding, Linear

pytestmark = pytest.mark.filterwarnings("ignore::funclora._errors.DenseFallbackWarning")

# --- who refers to the weights ---------------------------------------------------------------------------------


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


def make(cls: type[Any]) -> Any:
    torch.manual_seed(0)
    return cls()


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("cls", REFERENCES, ids=lambda cls: cls.__name__)
def test_every_reference_sees_the_rewritten_weight(cls: type[Any], kind: str) -> None:
    model, x = make(cls), torch.randn(5, 4)
    params, target = base_params(model), TARGETS.get(cls, "lin.weight")
    adapters = {target: make_rule(kind, Linear(), params[target], gen(1))}
    check = snapshot(model, params, adapters, x)
    output = apply(model, params, adapters, x)
    check()
    other = make(cls)
    other.load_state_dict(merge(params, adapters))
    close(output, other(x), 1e-5)
    assert distance(make(cls)(x), output) > 1e-2


# --- what a forward pass may write to --------------------------------------------------------------------------


class Writer(nn.Module):
    """Keeps state in every place that is no buffer, and writes to all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.frozen = torch.zeros(3)  # not registered
        self.count = 0
        self.history: list[Tensor] = []
        self.seen: set[int] = set()
        self.recent: deque[int] = deque([0], maxlen=2)
        self.caches: dict[str, Any] = {"k": [torch.zeros(3)], "v": {"inner": [torch.zeros(3)]}}
        self.pair = ([0], torch.zeros(3))
        self.norms = [nn.BatchNorm1d(3)]  # not registered either

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.lin(x))
        self.count += 1
        self.last = y
        self.history.append(y)
        self.seen.add(self.count)
        self.recent.append(self.count)
        with torch.no_grad():
            self.frozen += y.sum(0)
            self.caches["k"][0].add_(1)
            self.caches["v"]["inner"].append(y)
            self.caches["v"]["inner"][0][0] = 7
            self.pair[0].append(1)
            self.pair[1].add_(1)
        return y


STATE: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda m: m.count,
    "new attribute": lambda m: hasattr(m, "last"),
    "list": lambda m: len(m.history),
    "set": lambda m: m.seen,
    "deque": lambda m: list(m.recent),
    "tensor": lambda m: m.frozen.any().item(),
    "tensor in a dict": lambda m: m.caches["k"][0].any().item(),
    "list in a dict": lambda m: len(m.caches["v"]["inner"]),
    "tensor in a list in a dict": lambda m: m.caches["v"]["inner"][0].any().item(),
    "list in a tuple": lambda m: len(m.pair[0]),
    "tensor in a tuple": lambda m: m.pair[1].any().item(),
    "buffer of an unregistered module": lambda m: m.norms[0].num_batches_tracked.item(),
}


@pytest.mark.parametrize("place", STATE)
def test_state_is_the_bound_modules_own(place: str) -> None:
    state, model = STATE[place], Writer()
    before = state(model)
    params = base_params(model)
    adapters = {"lin.weight": make_rule("lora", Linear(), params["lin.weight"], gen(1))}
    apply(model, params, adapters, torch.randn(4, 3))
    assert state(model) == before

    bound = bind(model, params, adapters)
    bound(torch.randn(4, 3))
    once = state(bound)
    assert once != before
    bound(torch.randn(4, 3))
    if isinstance(once, int) and not isinstance(once, bool):
        assert state(bound) == once + (once - before)  # state of the bound module lasts from call to call
    assert state(model) == before


class Recorder(nn.Module):
    """Adds what it sees to a list that it did not make."""

    def __init__(self, log: list[Tensor], table: dict[str, Any]) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.log = log
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        self.log.append(y)
        self.table["k"]["last"] = y
        return y


class Recorded(nn.Module):
    """Layers and their parent share one list and one nested dict."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Tensor] = []
        self.table: dict[str, Any] = {"k": {}}
        self.layers = nn.ModuleList([Recorder(self.log, self.table) for _ in range(2)])
        self.read_log = lambda: list(self.log)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.stack([*self.read_log(), self.table["k"]["last"]]).sum(0)


def test_what_modules_share_they_share_in_the_copy() -> None:
    model, x = Recorded(), torch.randn(4, 3)
    params = base_params(model)
    adapters = {"layers.0.lin.weight": make_rule("lora", Linear(), params["layers.0.lin.weight"], gen(1))}
    weight = oracle(params["layers.0.lin.weight"], adapters["layers.0.lin.weight"])
    first = F.linear(x, weight, params["layers.0.lin.bias"])
    second = F.linear(first, params["layers.1.lin.weight"], params["layers.1.lin.bias"])
    close(apply(model, params, adapters, x), first + 2 * second, 1e-6)
    assert model.log == []
    assert model.table == {"k": {}}
    assert model.layers[0].log is model.log


def test_flags_and_attributes_of_the_bound_module_are_its_own() -> None:
    model = Writer()
    bound: Any = bind(model, base_params(model), {})
    bound.eval()
    bound.lin.extra = 1
    bound.register_buffer("new", torch.zeros(1))
    bound.add_module("sub", nn.Linear(1, 1))
    bound.register_forward_hook(lambda *_: None)
    assert model.training
    assert model.lin.training
    assert not hasattr(model.lin, "extra")
    assert not hasattr(model, "new")
    assert not hasattr(model, "sub")
    assert not model._forward_hooks


# --- two names for one thing -----------------------------------------------------------------------------------


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = self.one
        self.list = nn.ModuleList([self.one])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.one(x), self.two(x), self.list[0](x)


@pytest.mark.parametrize("adapted", [("one",), ("two",), ("list.0",), ("one", "two"), ("one", "two", "list.0")])
def test_each_name_of_a_shared_module_has_its_own_weight(adapted: tuple[str, ...]) -> None:
    model, x = Shared(), torch.randn(4, 3)
    params = base_params(model)
    adapters = {
        f"{n}.weight": make_rule("lora", Linear(), params[f"{n}.weight"], gen(i)) for i, n in enumerate(adapted)
    }
    outputs = apply(model, params, adapters, x)
    for name, output in zip(("one", "two", "list.0"), outputs, strict=True):
        weight = params[f"{name}.weight"]
        if f"{name}.weight" in adapters:
            weight = oracle(weight, adapters[f"{name}.weight"])
        close(output, F.linear(x, weight, params[f"{name}.bias"]), 1e-6)


def test_each_name_of_a_shared_recurrent_module_has_its_own_flat_weights() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.GRU(3, 3)
            self.two = self.one

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x)[0], self.two(x)[0]

    model, x = Twice(), torch.randn(2, 4, 3)
    params = base_params(model)
    rules = [make_rule("lora", Linear(), params["one.weight_ih_l0"], gen(i)) for i in range(2)]
    adapters = {f"{name}.weight_ih_l0": rule for name, rule in zip(("one", "two"), rules, strict=True)}
    for output, rule in zip(apply(model, params, adapters, x), rules, strict=True):
        alone = nn.GRU(3, 3)
        alone.load_state_dict({n: params[f"one.{n}"] for n in alone.state_dict()})
        alone.weight_ih_l0.data = oracle(params["one.weight_ih_l0"], rule)
        close(output, alone(x)[0], 1e-6)


class TiedNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.BatchNorm1d(3)
        self.two = self.one
        self.three = nn.BatchNorm1d(3)
        self.three.running_mean = self.one.running_mean

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_tied_buffers_stay_tied() -> None:
    model = TiedNorms()
    bound: Any = bind(model, base_params(model), {})
    bound(torch.randn(4, 3))
    assert bound.one.running_mean is bound.two.running_mean is bound.three.running_mean
    assert bound.one.num_batches_tracked.item() == 2
    assert not model.one.running_mean.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("target", ["embed.weight", "head.weight"])
def test_an_adapter_on_one_of_two_tied_parameters_leaves_the_other(target: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    model, ids = Tied(), torch.tensor([0, 2, 5, 2])
    params = base_params(model)
    rule = make_rule("lora", Embedding() if target == "embed.weight" else Linear(), params[target], gen(1))
    weights = params | {target: oracle(params[target], rule)}
    close(apply(model, params, {target: rule}, ids), weights["embed.weight"][ids] @ weights["head.weight"].T, 1e-6)

"""`bind`'s copy of the module tree: whatever refers to a weight sees the rewritten one, and the model sees nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import gen, make_rule
from oracle import close, distance, oracle, snapshot
from references import REFERENCES, TARGETS
from torch import Tensor, nn

from funclora import apply, base_params, bind, merge
from funclora.rules.layouts import Embedding, Linear

pytestmark = pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning")

# --- who refers to the weights ---------------------------------------------------------------------------------


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
    model: Any = Recorded()
    x = torch.randn(4, 3)
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


class OwnWeights(nn.Module):
    """Reads its weight through a plain list, as `nn.LSTM` does."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))
        self.weights = [self.w]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[0])


@pytest.mark.parametrize("tied", ["module", "parameter"])
def test_what_refers_to_tied_weights_sees_those_of_its_own_module(tied: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = OwnWeights()
            if tied == "parameter":
                self.two = OwnWeights()
                self.two.w = self.one.w
                self.two.weights = [self.one.w]

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.two(x)

    model, x = Twice(), torch.randn(4, 3)
    params = base_params(model)
    adapters = {f"{n}.w": make_rule("lora", Linear(), params["one.w"], gen(i)) for i, n in enumerate(("one", "two"))}
    expected = [F.linear(x, oracle(params["one.w"], rule)) for rule in adapters.values()]
    close(apply(model, params, adapters, x), expected, 1e-6)
    one_only = {"one.w": adapters["one.w"]}
    close(apply(model, params, one_only, x), [expected[0], F.linear(x, params["one.w"])], 1e-6)


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


def test_recurrent_layers_after_a_functional_call_inside_a_transform() -> None:
    """It leaves tensors of the transform in a list of the layer's, which nothing can read any more."""
    model, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    params = base_params(model)
    adapters = {"weight_ih_l0": make_rule("lora", Linear(), params["weight_ih_l0"], gen(1))}

    def curvature(output: Callable[[dict[str, Tensor]], Any]) -> Tensor:
        def loss(t: Tensor) -> Tensor:
            weights = {name: value.clone() for name, value in params.items()}
            return output(weights | {"weight_ih_l0": t * params["weight_ih_l0"]})[0].square().sum()

        return torch.func.grad(torch.func.grad(loss))(torch.ones(()))

    def through_apply() -> tuple[Tensor, Tensor]:
        return apply(model, params, adapters, x)[0], curvature(lambda params: apply(model, params, adapters, x))

    expected = through_apply()
    curvature(lambda params: torch.func.functional_call(model, params, x))
    close(through_apply(), expected, 0)

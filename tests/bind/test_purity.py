"""What a forward pass may write to, by kind: a copy of the bound module's own, refused, or shared as the page says."""

from __future__ import annotations

import array
import itertools
import random
import threading
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import gen, llama, make_rule
from oracle import close, distance
from torch import Tensor, nn

from funclora import LoRA, LoraConfig, apply, base_params, bind, init, merge, trace_targets
from funclora.errors import PurityError, UnsupportedError
from funclora.rules.layouts import Linear


class ListOfOwn(list[float]):
    pass


class DictOfOwn(dict[str, float]):
    """Counts what is written, by an attribute."""

    def __init__(self) -> None:
        self.writes = 0

    def __setitem__(self, key: str, value: float) -> None:
        self.writes += 1
        super().__setitem__(key, value)


class SetOfOwn(set[int]):
    pass


class DequeOfOwn(deque[float]):
    pass


class OrderedOfOwn(OrderedDict[str, list[float]]):
    pass


@dataclass
class Statistics:
    count: float = 0
    history: list[float] = field(default_factory=list)


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0.0


class Numbers:
    """An iterator that is an object of Python's."""

    def __init__(self) -> None:
        self.next = 0.0

    def __iter__(self) -> Numbers:
        return self

    def __next__(self) -> float:
        self.next += 1
        return self.next


class Pair(NamedTuple):
    history: list[float]
    name: str


class Nested:
    def __init__(self) -> None:
        self.inner = SimpleNamespace(statistics=Statistics(), cache={"k": [torch.zeros(1)]})


def appended(state: Any) -> float:
    state.append(1.0)
    return float(len(state))


def counted(state: Any) -> float:
    state.count += 1
    return float(state.count)


def put(state: Any) -> float:
    state[f"k{len(state)}"] = 1.0
    return float(len(state))


def added(state: Any) -> float:
    state.add(len(state))
    return float(len(state))


def listed(state: Any) -> float:
    state["k"].append(1.0)
    return float(len(state["k"]))


def first(state: Any) -> float:
    state[0] += 1
    return float(state[0])


def wrote_own(state: DictOfOwn) -> float:
    return put(state) + state.writes


def dataclass_list(state: Statistics) -> float:
    return appended(state.history) + counted(state)


def nested(state: Nested) -> float:
    state.inner.cache["k"][0].add_(1)
    return counted(state.inner.statistics) + state.inner.cache["k"][0].item()


# kind -> the state of a model, and what its forward does with it
COPIED: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "list": (list, appended),
    "dict": (dict, put),
    "set": (set, added),
    "deque": (deque, appended),
    "defaultdict": (lambda: defaultdict(list), listed),
    "OrderedDict": (lambda: OrderedDict(k=[0.0]), listed),
    "subclass of list": (ListOfOwn, appended),
    "subclass of dict": (DictOfOwn, wrote_own),
    "subclass of set": (SetOfOwn, added),
    "subclass of deque": (DequeOfOwn, appended),
    "subclass of OrderedDict": (lambda: OrderedOfOwn(k=[0.0]), listed),
    "Counter": (lambda: Counter(a=1), put),
    "UserDict": (UserDict, put),
    "UserList": (UserList, appended),
    "ChainMap": (lambda: ChainMap({}, {"a": 1}), put),
    "named tuple with a list": (lambda: Pair([], ""), lambda state: appended(state.history)),
    "SimpleNamespace": (lambda: SimpleNamespace(count=0), counted),
    "dataclass": (Statistics, dataclass_list),
    "object with slots": (Slotted, counted),
    "objects in objects": (Nested, nested),
    "iterator of Python": (Numbers, next),
    "itertools.count": (lambda: itertools.count(3, 2), next),
    "bytearray": (lambda: bytearray(2), first),
    "array.array": (lambda: array.array("d", [0.0]), first),
    "numpy array": (lambda: np.zeros(2), first),
    "numpy generator": (lambda: np.random.default_rng(0), lambda state: float(state.random())),
    "random.Random": (lambda: random.Random(0), lambda state: state.random()),
    "torch.Generator": (lambda: gen(0), lambda state: torch.rand((), generator=state).item()),
    "tensor": (lambda: torch.zeros(1), lambda state: state.add_(1).item()),
}


def generator() -> Iterator[float]:
    yield from itertools.repeat(1.0)


REFUSED: dict[str, Callable[[], Any]] = {
    "generator": generator,
    "list_iterator": lambda: iter([1.0, 2.0]),
    "map": lambda: map(float, [1, 2]),
    "zip": lambda: zip([1], [2], strict=True),
    "cycle": lambda: itertools.cycle([1.0, 2.0]),
}


class Model(nn.Module):
    """Two layers with one state."""

    def __init__(self, state: Any, write: Callable[[Any], float]) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.state = state
        self.second.state = state
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        assert self.second.state is self.state
        return self.second(self.lin(x)) + self.write(self.state)


def made(state: Any, write: Callable[[Any], float] = float) -> tuple[Model, dict[str, Tensor], dict[str, LoRA], Tensor]:
    torch.manual_seed(0)
    model = Model(state, write)
    adapters = {"lin.weight": LoRA(torch.ones(1, 3), torch.ones(3, 1))}
    return model, base_params(model), adapters, torch.ones(2, 3)


@pytest.mark.parametrize("kind", COPIED)
def test_what_is_copied_gives_equal_calls_equal_results(kind: str) -> None:
    make, write = COPIED[kind]
    model, params, adapters, x = made(make(), write)
    results = [apply(model, params, adapters, x) for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    bound = bind(model, params, adapters)
    assert type(bound.state) is type(model.state)
    assert torch.equal(bound(x), results[0])
    assert not torch.equal(bound(x), results[0])  # its state is its own, and lasts
    # The model's is what it was: its own next step is the first.
    assert write(model.state) == write(make())


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_be_read_once_is_refused(kind: str) -> None:
    model, params, adapters, _ = made(REFUSED[kind]())
    with pytest.raises(UnsupportedError, match=f"^the attribute 'state' of Model is a {kind}, .* cannot be copied"):
        bind(model, params, adapters)


class Owner:
    """Ends something when it ends."""

    def __init__(self) -> None:
        self.count = 0

    def __del__(self) -> None:
        self.count = -1


def counting() -> Callable[[], float]:
    count = 0

    def call() -> float:
        nonlocal count
        count += 1
        return count

    return call


SHARED: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "variables of a function": (counting, lambda state: state()),
    "object with __del__": (Owner, counted),
    "objects in objects in objects ...": (
        lambda: SimpleNamespace(a=SimpleNamespace(a=SimpleNamespace(a=SimpleNamespace(a=Slotted())))),
        lambda state: counted(state.a.a.a.a),
    ),
}


@pytest.mark.parametrize("kind", SHARED)
def test_what_is_shared_is_what_the_page_says(kind: str) -> None:
    make, write = SHARED[kind]
    model, params, adapters, x = made(make(), write)
    assert not torch.equal(apply(model, params, adapters, x), apply(model, params, adapters, x))


class Colour(Enum):
    RED = "red"


def test_what_is_known_by_its_identity_stays_itself(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        for state in (Colour.RED, threading.Lock(), threading.Event(), object(), torch.ops.aten.add, file):
            model, params, adapters, _ = made(state)
            assert bind(model, params, adapters).state is state


def test_the_configuration_of_a_transformers_model_is_the_bound_models_own() -> None:
    model = llama()
    bound = bind(model, base_params(model), {})
    assert type(bound.config) is type(model.config)
    assert bound.config.to_dict() == model.config.to_dict()
    assert bound.model.layers[0].self_attn.config is bound.model.config is bound.config
    bound.config.use_cache = not model.config.use_cache
    bound.generation_config.max_length = 3
    assert model.config.use_cache is not bound.config.use_cache
    assert model.generation_config.max_length != 3


# --- writes to weights -----------------------------------------------------------------------------------------


class WritesLater(nn.Module):
    """Writes to a weight without an adapter: in forward, or when a hook runs in backward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin(x) * self.scale.detach()
        with torch.no_grad():
            if self.how == "in place":
                self.scale.add_(1)
            elif self.how == "numpy":
                self.scale.detach().numpy()[:] += 1
            elif self.how == "data":
                self.scale.data.add_(1)
        return y


@pytest.mark.parametrize("how", ["in place", "data", "numpy"])
def test_writes_to_a_weight_are_found_where_torch_counts_them(how: str) -> None:
    model = WritesLater(how)
    params = base_params(model)
    adapters = {"lin.weight": LoRA(torch.ones(1, 3), torch.ones(3, 1))}
    if how == "in place":
        with pytest.raises(PurityError, match=r"^params\['scale'\] was written to in place"):
            apply(model, params, adapters, torch.ones(2, 3))
        return
    apply(model, params, adapters, torch.ones(2, 3))  # as the page says
    assert params["scale"].tolist() == [2.0, 2.0, 2.0]


# --- writes that change nothing --------------------------------------------------------------------------------


class CastsItself(nn.Module):
    """Casts a layer to the dtype of its input in every call, as the routers of Switch Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.lin = self.lin.to(x.dtype)
        y: Tensor = self.lin(x)
        return y


@pytest.mark.parametrize("kind", ["lora", "full", "none"])
def test_a_cast_that_changes_nothing_passes(kind: str) -> None:
    model, x = CastsItself(), torch.randn(2, 3, generator=gen(1))
    params = base_params(model)
    adapters = {} if kind == "none" else {"lin.weight": make_rule(kind, Linear(), params["lin.weight"], gen(0))}
    close(
        apply(model, params, adapters, x),
        torch.func.functional_call(model.lin, lin_of(merge(params, adapters)), x),
        1e-6,
    )
    assert trace_targets(model, params, adapters, x) == dict.fromkeys(adapters, "fast")
    wide = {name: value.double() for name, value in params.items()}
    with pytest.raises(PurityError, match=r"^'lin.weight': the model calls data, which would write"):
        apply(model, wide, {"lin.weight": make_rule("lora", Linear(), wide["lin.weight"], gen(0))}, x)


def lin_of(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("lin."): value for name, value in params.items()}


@pytest.mark.parametrize("targets", [["q", "v"], ["classifier"]], ids=["attention", "router"])
def test_switch_transformers_cast_their_routers(targets: list[str]) -> None:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=4,
        expert_capacity=8, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, merged = (SwitchTransformersForConditionalGeneration(config).eval() for _ in range(2))
    params = base_params(model)
    adapters = init(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False), generator=gen(0))
    ids = torch.randint(0, 50, (2, 6), generator=gen(1))
    output = apply(model, params, adapters, input_ids=ids, decoder_input_ids=ids).logits
    merged.load_state_dict(merge(params, adapters))
    close(output, merged(input_ids=ids, decoder_input_ids=ids).logits, 1e-4)
    assert distance(model(input_ids=ids, decoder_input_ids=ids).logits, output) > 1e-3

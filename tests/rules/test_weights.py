"""Weights that can carry no rule are refused by name, with what to do; weights that have no values give shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optree as _optree
import pytest
import torch
import torch.distributed as dist
from cases import gen, llama
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from funclora import DoRA, Full, LoRA, LoraConfig, algebra, apply, base_params, bind, init, load_peft, merge, save_peft
from funclora.errors import ParamsError
from funclora.rules.base import Rule

optree: Any = _optree
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support is in beta state",
    "ignore:The PyTorch API of nested tensors is in prototype stage",
)

X = torch.ones(3, 6)
LORA = LoRA(torch.ones(2, 6), torch.ones(4, 2))
RULES: dict[str, Rule] = {"LoRA": LORA, "DoRA": DoRA(LORA.a, LORA.b, torch.ones(4)), "Full": Full(torch.ones(4, 6))}
by_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "torch.sparse_coo": lambda: torch.ones(4, 6).to_sparse(),
    "torch.sparse_csr": lambda: torch.ones(4, 6).to_sparse_csr(),
    "torch.float8_e4m3fn": lambda: torch.ones(4, 6).to(torch.float8_e4m3fn),
    "torch.float8_e5m2": lambda: torch.ones(4, 6).to(torch.float8_e5m2),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(4, 6), torch.ones(2, 6)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(4, 6), torch.ones(2, 6)], layout=torch.jagged),
    "torch.complex64": lambda: torch.ones(4, 6, dtype=torch.complex64),
    "torch.int8": lambda: torch.ones(4, 6, dtype=torch.int8),
}
by_weight = pytest.mark.parametrize("kind", WEIGHTS)


def message(kind: str) -> str:
    return "^'weight' is a nested tensor" if kind in ("nested", "jagged") else f"^'weight' has (dtype|layout) {kind}"


class Layer(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@by_rule
@by_weight
def test_weights_that_can_carry_no_rule_are_refused(kind: str, rule: Rule) -> None:
    model = Layer(torch.ones(4, 6))
    params, adapters = {"weight": WEIGHTS[kind]()}, {"weight": rule}
    for call in (
        lambda: apply(model, params, adapters, X),
        lambda: bind(model, params, adapters),
        lambda: merge(params, adapters),
        lambda: algebra.interpolate(adapters, {"weight": Full(torch.zeros(4, 6))}, 0.5, params=params),
    ):
        with pytest.raises(ParamsError, match=message(kind)):
            call()


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if kind not in ("torch.complex64", "torch.int8")])
def test_no_adapter_is_made_or_read_for_them(kind: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    save_peft(tmp_path, init(model, config), config)
    params = {"0.weight": WEIGHTS[kind]()}
    with pytest.raises(ParamsError, match=message(kind).replace("weight", "0.weight")):
        init(model, config, params=params)
    if "nested" in message(kind):
        return  # no layer can hold them
    model[0].weight = nn.Parameter(params["0.weight"], requires_grad=False)
    with pytest.raises(ParamsError, match=message(kind).replace("weight", "0.weight")):
        load_peft(tmp_path, model)


@by_rule
def test_weights_without_values_are_refused(rule: Rule) -> None:
    with torch.device("meta"):
        model = Layer(torch.ones(4, 6))
    params, adapters = base_params(model), {"weight": rule}
    for call in (
        lambda: apply(model, params, adapters, X),
        lambda: bind(model, params, adapters),
        lambda: merge(params, adapters),
    ):
        with pytest.raises(ParamsError, match=r"^'weight' is on the meta device: .* Load the model's weights first"):
            call()


@by_rule
def test_where_all_is_on_the_meta_device_shapes_come_out(rule: Rule) -> None:
    model = Layer(torch.ones(4, 6)).to("meta")
    adapters: Any = optree.tree_map(lambda x: x.to("meta"), {"weight": rule})
    y = apply(model, base_params(model), adapters, X.to("meta"))
    assert y.is_meta
    assert y.shape == (3, 4)
    merged = merge(base_params(model), adapters)["weight"]
    assert merged.is_meta
    assert merged.shape == (4, 6)


# --- fake tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_give_shapes(dtype: torch.dtype, dora: bool) -> None:
    model = llama().to(dtype)
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=dora, init_lora_weights=False)
    adapters, params = init(model, config, generator=gen(0)), base_params(model)
    ids = torch.zeros(2, 5, dtype=torch.long)
    wanted = apply(model, params, adapters, ids).logits
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake: Any = optree.tree_map(mode.from_tensor, (params, adapters, ids))
        params, adapters, ids = fake
        for y in (apply(model, params, adapters, ids).logits, bind(model, params, adapters)(input_ids=ids).logits):
            assert isinstance(y, FakeTensor)
            assert (y.shape, y.dtype, y.device) == (wanted.shape, wanted.dtype, wanted.device)
        merged = merge(params, adapters)
        grads: Any = torch.func.grad(lambda a: apply(model, params, a, ids).logits.sum())(adapters)
    for name, weight in params.items():
        assert isinstance(merged[name], FakeTensor)
        assert (merged[name].shape, merged[name].dtype) == (weight.shape, weight.dtype)
    for name, rule in adapters.items():
        for leaf in rule.leaf_names:
            assert getattr(grads[name], leaf).shape == getattr(rule, leaf).shape


# --- distributed tensors ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@by_rule
def test_adapters_on_the_mesh_are_refused(mesh: Any, rule: Rule) -> None:
    params = {"weight": distribute_tensor(torch.ones(4, 6), mesh, [Replicate()])}
    adapters: Any = optree.tree_map(lambda x: distribute_tensor(x, mesh, [Replicate()]), {"weight": rule})
    for call in (lambda: bind(Layer(torch.ones(4, 6)), params, adapters), lambda: merge(params, adapters)):
        with pytest.raises(ParamsError, match=r"^adapters\['weight'\] holds DTensors.*full_tensor\(\)"):
            call()


@by_rule
def test_a_weight_on_the_mesh_stays_there(mesh: Any, rule: Rule) -> None:
    weight = torch.arange(24.0).view(4, 6) / 24
    params: Any = {"weight": distribute_tensor(weight, mesh, [Shard(0)])}
    merged = merge(params, {"weight": rule})["weight"]
    assert isinstance(merged, DTensor)
    assert merged.placements == params["weight"].placements
    torch.testing.assert_close(merged.full_tensor(), merge({"weight": weight}, {"weight": rule})["weight"])


def test_a_mesh_of_two_dimensions_is_refused(mesh: Any) -> None:
    squares = init_device_mesh("cpu", (1, 1))
    params: Any = {"weight": distribute_tensor(torch.ones(4, 6), squares, [Shard(0), Replicate()])}
    with pytest.raises(ParamsError, match=r"^'weight' is a DTensor with the placements .* a mesh of one dimension"):
        bind(Layer(torch.ones(4, 6)), params, {"weight": LoRA(torch.ones(1, 6), torch.ones(4, 1))})


@by_rule
def test_weights_that_are_still_being_gathered_are_waited_for(rule: Rule) -> None:
    model, plain, adapters = Layer(torch.ones(4, 6)), torch.randn(4, 6, generator=gen(0)), {"weight": rule}
    params = {"weight": AsyncCollectiveTensor(plain)}
    torch.testing.assert_close(merge(params, adapters)["weight"], merge({"weight": plain}, adapters)["weight"])
    torch.testing.assert_close(apply(model, params, adapters, X), apply(model, {"weight": plain}, adapters, X))


# --- scalings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [1e39, -1e39, float("inf"), float("nan")])
@pytest.mark.parametrize(
    "make", [LoRA, lambda a, b, **options: DoRA(a, b, torch.ones(4), **options)], ids=["LoRA", "DoRA"]
)
def test_scalings_that_the_dtype_cannot_hold_are_refused(make: Any, scaling: float) -> None:
    with pytest.raises(ParamsError, match=r"RA.scaling: expected a number up to 3e\+38, got"):
        make(LORA.a, LORA.b, scaling=scaling)
    wide = make(LORA.a.double(), LORA.b.double(), scaling=1e39)
    assert wide.dense(torch.ones(4, 6, dtype=torch.float64)).isfinite().all()

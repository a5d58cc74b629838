"""The invariants of the library, for every rule on every layer of the table in `cases`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, SCALING, Case, Setup, dense_call, gen, make_adapters, make_rule, plain_attention
from hypothesis import given
from hypothesis import strategies as st
from oracle import close, distance, rewritten, snapshot, tensors
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils import _pytree as pytree

from funclora import DoRA, Full, LoRA, apply, base_params, bind, merge
from funclora._bind.apply import trace_targets
from funclora.rules.base import Rule
from funclora.rules.dora import output_norms
from funclora.rules.layouts import Conv, Conv1D, ConvTranspose, Linear

pytestmark = [
    pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1.5e-2}
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def same(actual: Any, expected: Any) -> None:
    for got, want in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- 1: apply is functional_call on the merged weights ---------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", ["lora", "dora", "full", "mixed"])
@every_case
def test_apply_equals_the_merged_model(case: Case, kind: str, dtype: torch.dtype) -> None:
    s = case.setup(dtype)
    adapters = make_adapters(case, s.params, kind, gen(1), adapter_dtype(dtype))
    tolerance = TOLERANCE[dtype] * (3 if case.name in ("gpt2", "llama") else 1)
    with torch.no_grad():
        merged, expected = merge(s.params, adapters), rewritten(s.params, adapters)
        for name in adapters:
            close(merged[name], expected[name], TOLERANCE[dtype])
        output = apply(s.model, s.params, adapters, *s.args, **s.kwargs)
        close(output, dense_call(s, merged), tolerance)
        close(output, dense_call(s, expected), tolerance)
        assert distance(dense_call(s, s.params), output) > 2 * tolerance


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d-groups", "gpt2-conv1d", "experts-loop"])
def test_apply_equals_the_merged_model_under_autocast(name: str, kind: str) -> None:
    case = next(case for case in CASES if case.name == name)
    s = case.setup()
    adapters = make_adapters(case, s.params, kind, gen(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = dense_call(s, rewritten(s.params, adapters))
        close(apply(s.model, s.params, adapters, *s.args, **s.kwargs), expected, TOLERANCE[torch.bfloat16])


sizes = st.integers(1, 5)


class Product(nn.Module):
    """`x·Mᵀ + bias` in the two ways in which weights are stored."""

    def __init__(self, n_in: int, n_out: int, *, transposed: bool, bias: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.randn((n_in, n_out) if transposed else (n_out, n_in)))
        self.bias = nn.Parameter(torch.randn(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.transposed:
            return F.linear(x, self.weight, self.bias)
        if self.bias is not None and x.dim() == 2:
            return torch.addmm(self.bias, x, self.weight)
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


@given(
    n_in=sizes, n_out=sizes, r=st.integers(1, 7), batch=st.lists(st.integers(0, 3), max_size=3),
    scaling=st.floats(-8, 8), transposed=st.booleans(), bias=st.booleans(),
    kind=st.sampled_from(["lora", "dora"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_products_of_any_size_rank_and_scaling(
    n_in: int, n_out: int, r: int, batch: list[int], scaling: float, transposed: bool, bias: bool, kind: str,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    model = Product(n_in, n_out, transposed=transposed, bias=bias).double()
    s = Setup(model, base_params(model), (torch.randn(*batch, n_in, dtype=torch.float64),), {})
    rule = make_rule(kind, Conv1D() if transposed else Linear(), s.params["weight"], gen(seed), r=r)
    adapters = {"weight": replace(rule, scaling=scaling)}
    close(apply(model, s.params, adapters, *s.args), dense_call(s, rewritten(s.params, adapters)), 1e-9)


@given(
    spatial=st.integers(1, 3), groups=st.integers(1, 3), n_in=st.integers(1, 2), n_out=st.integers(1, 2),
    kernel=st.integers(1, 3), stride=st.integers(1, 2), padding=st.integers(0, 2), dilation=st.integers(1, 2),
    transposed=st.booleans(), kind=st.sampled_from(["lora", "dora"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_convolutions_of_any_geometry(
    spatial: int, groups: int, n_in: int, n_out: int, kernel: int, stride: int, padding: int, dilation: int,
    transposed: bool, kind: str, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    cls = getattr(nn, f"Conv{'Transpose' if transposed else ''}{spatial}d")
    model = cls(n_in * groups, n_out * groups, kernel, stride, padding, groups=groups, dilation=dilation).double()
    x = torch.randn(1, n_in * groups, *(5 + i for i in range(spatial)), dtype=torch.float64)
    s = Setup(model, base_params(model), (x,), {})
    layout = ConvTranspose(groups) if transposed else Conv(groups, dilation != 1)
    adapters = {"weight": make_rule(kind, layout, s.params["weight"], gen(seed))}
    close(apply(model, s.params, adapters, x), dense_call(s, rewritten(s.params, adapters)), 1e-9)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("leaf", DTYPES, ids=str)
@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_any_base_dtype_with_any_adapter_dtype(base: torch.dtype, leaf: torch.dtype, kind: str) -> None:
    case = next(case for case in CASES if case.name == "linear")
    s = case.setup(base)
    adapters = make_adapters(case, s.params, kind, gen(1), leaf)
    # A half-precision adapter computes in half precision: its products round too.
    tolerance = 4 * max(torch.finfo(base).eps, torch.finfo(leaf).eps)
    output = apply(s.model, s.params, adapters, *s.args)
    assert output.dtype == base
    close(output, dense_call(s, merge(s.params, adapters)), tolerance)
    close(output, dense_call(s, rewritten(s.params, adapters)), tolerance)


# --- 2: the leaves are the trainable tensors, everything else is static ----------------------------------------


def one_of_each() -> list[Any]:
    a, b, m = torch.randn(2, 5), torch.randn(3, 2), torch.rand(3)
    return [
        LoRA(a, b, scaling=2.0, dropout=0.1),
        DoRA(a, b, m, scaling=2.0, dropout=0.1, exact_norm_grad=True),
        Full(torch.randn(3, 5)),
    ]


every_rule = pytest.mark.parametrize("rule", one_of_each(), ids=lambda rule: type(rule).__name__)
TREES = [
    pytest.param(optree.tree_flatten, optree.tree_unflatten, id="optree"),
    pytest.param(pytree.tree_flatten, lambda spec, leaves: pytree.tree_unflatten(leaves, spec), id="torch"),
]


@pytest.mark.parametrize(("flatten", "unflatten"), TREES)
@every_rule
def test_leaves_are_the_trainable_tensors(rule: Any, flatten: Any, unflatten: Any) -> None:
    leaves, spec = flatten({"w": rule})
    expected = [getattr(rule, f.name) for f in fields(rule) if isinstance(getattr(rule, f.name), Tensor)]
    assert len(leaves) == len(expected) == len(rule.leaf_names)
    assert all(got is want for got, want in zip(leaves, expected, strict=True))

    again = unflatten(spec, [leaf + 1 for leaf in leaves])["w"]
    assert type(again) is type(rule)
    for f in fields(rule):
        old, new = getattr(rule, f.name), getattr(again, f.name)
        assert torch.equal(new, old + 1) if isinstance(old, Tensor) else new == old
    # Transforms put markers where tensors were.
    assert getattr(unflatten(spec, [None] * len(leaves))["w"], rule.leaf_names[0]) is None


@pytest.mark.parametrize(("flatten", "unflatten"), TREES)
@pytest.mark.parametrize(
    "change", [{"scaling": 3.0}, {"dropout": 0.2}, {"layout": Conv1D()}, {"exact_norm_grad": False}], ids=str
)
def test_static_data_is_part_of_the_structure(change: dict[str, Any], flatten: Any, unflatten: Any) -> None:
    rule = one_of_each()[1]
    same_spec, other_spec = flatten(replace(rule, a=rule.a + 1))[1], flatten(replace(rule, **change))[1]
    assert flatten(rule)[1] == same_spec
    assert hash(flatten(rule)[1]) == hash(same_spec)
    assert flatten(rule)[1] != other_spec


def test_paths_name_the_fields() -> None:
    adapters: Any = {"w": one_of_each()[1]}
    assert [p[-1] for p in optree.tree_paths(adapters)] == ["a", "b", "magnitude"]
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(adapters)[0]]
    assert keys == ["['w'].a", "['w'].b", "['w'].magnitude"]


@every_rule
def test_rules_cannot_be_assigned_to(rule: Any) -> None:
    with pytest.raises(FrozenInstanceError, match="cannot assign"):
        setattr(rule, rule.leaf_names[0], torch.zeros(1))


# --- 3: nothing that is passed in is written to ----------------------------------------------------------------


class StopError(Exception):
    pass


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "none"])
@every_case
def test_nothing_is_written(case: Case, kind: str) -> None:
    s = case.setup()
    fail = [False]

    def maybe_stop(*_: Any) -> None:
        if fail[0]:
            raise StopError("after the model ran")

    s.model.register_forward_hook(maybe_stop)
    adapters = {} if kind == "none" else make_adapters(case, s.params, kind, gen(1))
    check = snapshot(s.model, s.params, adapters, s.args, s.kwargs)
    apply(s.model, s.params, adapters, *s.args, **s.kwargs)
    check()
    bind(s.model, s.params, adapters)(*s.args, **s.kwargs)
    check()
    merge(s.params, adapters)
    check()
    trace_targets(s.model, s.params, adapters, *s.args, **s.kwargs)
    check()
    fail[0] = True
    with pytest.raises(StopError, match="after the model ran"):
        apply(s.model, s.params, adapters, *s.args, **s.kwargs)
    check()


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "batch-norm": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
    "spectral-norm": lambda: nn.Sequential(spectral_norm(nn.Linear(4, 3)), nn.Linear(3, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)),
    "instance-norm": lambda: nn.Sequential(
        nn.Linear(4, 3), nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True)
    ),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_buffers_are_not_written_in_training_mode(name: str) -> None:
    model = STATEFUL[name]().train()
    params = base_params(model)
    target = next(n for n in params if n.startswith("0.") and params[n].dim() == 2)
    s = Setup(model, params, (torch.randn(6, 4),), {})
    adapters = {target: make_rule("lora", Linear(), params[target], gen(1))}
    check = snapshot(s.model, s.params, adapters, s.args, s.kwargs)
    bound = bind(model, params, adapters)
    bound(*s.args)
    apply(model, params, adapters, *s.args)
    check()
    if buffers := dict(bound.named_buffers()):  # the update is the bound module's own
        assert any(not torch.equal(value, params[n]) for n, value in buffers.items())
    bound.eval()
    assert model.training
    check()


# --- 4: threads ------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Lets threads take turns as often as the interpreter can, so that a race would show."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_switching")
@every_case
def test_threads_do_not_see_each_others_adapters(case: Case) -> None:
    s = case.setup()
    adapters = [make_adapters(case, s.params, ("lora", "dora", "full")[i % 3], gen(i)) for i in range(8)]
    expected = [apply(s.model, s.params, each, *s.args, **s.kwargs) for each in adapters]
    results: list[Any] = [None] * len(adapters)
    barrier = threading.Barrier(len(adapters))

    def work(i: int) -> None:
        barrier.wait()
        results[i] = [apply(s.model, s.params, adapters[i], *s.args, **s.kwargs) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(adapters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, outputs in enumerate(results):
        for output in outputs:
            close(output, expected[i], 1e-6)
        assert distance(expected[i], expected[i - 1]) > 1e-3


# --- 5: a fresh adapter is the base model ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@every_case
def test_a_fresh_adapter_is_the_base_model(case: Case, kind: str, dtype: torch.dtype) -> None:
    s = case.setup(dtype)
    adapters: dict[str, Rule] = {}
    for name, layout in case.targets.items():
        rule = make_rule("lora", layout, s.params[name], gen(1), torch.float32)
        zero = torch.zeros_like(rule.b)
        adapters[name] = replace(rule, b=zero)
        if kind == "dora":
            a, b = layout.factors(torch.zeros_like(rule.a), zero)
            norms = output_norms(layout.to_matrix(s.params[name]), a, b, 0.0)
            adapters[name] = DoRA(rule.a, zero, norms, scaling=SCALING, layout=layout)
    with torch.no_grad(), plain_attention():
        output, base = apply(s.model, s.params, adapters, *s.args, **s.kwargs), dense_call(s, s.params)
    if kind == "lora" and "max-norm" not in case.name and case.name != "embedding-all":
        same(output, base)
    else:
        close(output, base, TOLERANCE[dtype])
    merged = merge(s.params, adapters)
    for name in case.targets:
        (same if kind == "lora" else close)(merged[name], s.params[name], *(() if kind == "lora" else (1e-6,)))

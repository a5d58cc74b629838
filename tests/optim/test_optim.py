"""Optimizers against torch's and TorchOpt's, and the laws that hold for all of them.

The laws: inputs stay as they were, a stack steps as its members do, one graph serves all steps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import optree as _optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

import funclora as fl
from funclora import optim
from funclora import stack as members_of
from funclora.errors import ConfigError
from funclora.optim import (
    GradientTransformation,
    adamw,
    apply_updates,
    chain,
    clip_by_global_norm,
    constant,
    global_norm,
    lora_plus,
    per_member,
    sgd,
    warmup_cosine,
    warmup_linear,
)
from funclora.optim._members import step_of

Tree = Any
optree: Any = _optree  # its annotations know neither our nodes nor tuples of trees


@dataclass(frozen=True, eq=False)
class Pair:
    """A stand-in for the rules: two leaves, and static data that no optimizer may touch."""

    a: Tensor
    b: Tensor
    scaling: float = 2.0


optree.register_pytree_node(
    Pair,
    lambda pair: ((pair.a, pair.b), pair.scaling, ("a", "b")),
    lambda scaling, leaves: Pair(*leaves, scaling),  # type: ignore[call-arg]
    path_entry_type=optree.GetAttrEntry,
    namespace=GLOBAL_NAMESPACE,
)
torch_pytree.register_pytree_node(
    Pair,
    lambda pair: ([pair.a, pair.b], pair.scaling),
    lambda leaves, scaling: Pair(*leaves, scaling=scaling),  # type: ignore[misc]
)


def adapters(seed: int, lead: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> Tree:
    """Two pairs and a plain leaf, `[*lead, ...]`, of every rank that rules have."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "0.weight": Pair(normal(2, 3), normal(4, 2)),
        "1.weight": Pair(normal(1, 4, 2), normal(3, 1, 1), 0.5),
        "2.magnitude": normal(5),
    }


def run(optimizer: GradientTransformation, params: Tree, grads: Sequence[Tree]) -> Tree:
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = apply_updates(params, updates)
    return params


def run_torch(
    make: Callable[[list[Any]], torch.optim.Optimizer],
    params: Tree,
    grads: Sequence[Tree],
    groups: Callable[[list[Tensor]], list[Any]] = list,
) -> Tree:
    leaves, spec = optree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    optimizer = make(groups(leaves))
    for g in grads:
        for leaf, grad in zip(leaves, optree.tree_leaves(g), strict=True):
            leaf.grad = grad.clone()
        optimizer.step()
    return optree.tree_unflatten(spec, [leaf.detach() for leaf in leaves])


def assert_trees_close(actual: Tree, expected: Tree, rtol: float = 0.0, atol: float = 0.0) -> None:
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    by_path = [
        dict(zip(map(str, optree.tree_paths(t)), optree.tree_leaves(t), strict=True)) for t in (actual, expected)
    ]
    torch.testing.assert_close(*by_path, rtol=rtol, atol=atol)


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Schedules compute in torch's default dtype, and float32 is coarse."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


TORCH: dict[str, tuple[GradientTransformation, Callable[[Any], torch.optim.Optimizer]]] = {
    "adamw": (adamw(0.1), lambda p: torch.optim.AdamW(p, 0.1)),
    "adamw-betas": (
        adamw(0.03, 0.8, 0.95, 1e-3, 0.3),
        lambda p: torch.optim.AdamW(p, 0.03, (0.8, 0.95), 1e-3, 0.3),
    ),
    "adamw-no-decay": (
        adamw(0.1, weight_decay=0.0),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.0),
    ),
    "adamw-no-memory": (adamw(0.1, 0.0, 0.0), lambda p: torch.optim.AdamW(p, 0.1, (0.0, 0.0))),
    "adamw-tensor-lr": (
        adamw(torch.tensor(0.1, dtype=torch.float64)),
        lambda p: torch.optim.AdamW(p, torch.tensor(0.1, dtype=torch.float64)),
    ),
    "sgd": (sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "sgd-decay": (sgd(0.1, weight_decay=0.2), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.2)),
    "sgd-momentum": (
        sgd(0.1, 0.9, weight_decay=0.2),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.2),
    ),
    "sgd-nesterov": (
        sgd(0.1, 0.9, nesterov=True, weight_decay=0.2),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True, weight_decay=0.2),
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("name", TORCH)
def test_twenty_steps_are_those_of_torch(name: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = TORCH[name]
    params, grads = adapters(0, dtype=dtype), [adapters(1 + i, dtype=dtype) for i in range(20)]
    grads[0] = optree.tree_map(torch.zeros_like, grads[0])  # as `a` has it while `b` is 0
    expected = run_torch(theirs, params, grads)
    assert_trees_close(run(ours, params, grads), expected, rtol=tolerance, atol=tolerance)


def test_bias_correction_is_exact_in_float32() -> None:
    # g/(|g| + eps) is 1 on the first step, if both corrections are right to rounding.
    params = {"w": torch.zeros(1)}
    optimizer = adamw(1.0, b1=0.9, b2=0.9999, eps=0.0)
    updates, _ = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)
    torch.testing.assert_close(updates["w"], -torch.ones(1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_twenty_steps_are_those_of_torchopt(name: str) -> None:
    torchopt = pytest.importorskip("torchopt")
    ours, theirs = {
        "adamw": (adamw(0.1, weight_decay=0.1), torchopt.adamw(0.1, weight_decay=0.1)),
        "sgd": (sgd(0.1, 0.9, weight_decay=0.1), torchopt.sgd(0.1, 0.9, weight_decay=0.1)),
    }[name]
    pure = GradientTransformation(theirs.init, lambda g, s, params: theirs.update(g, s, params=params, inplace=False))
    params, grads = adapters(0), [adapters(1 + i) for i in range(20)]
    # TorchOpt corrects the bias in float32, whatever the leaves are: 1 - 0.999 is off by 1e-5 there.
    tolerance = 1e-4 if name == "adamw" else 1e-12
    assert_trees_close(run(ours, params, grads), run(pure, params, grads), rtol=tolerance, atol=tolerance)


def test_torchopt_keyword_only_params_fit_into_chain() -> None:
    def update(grads: Tree, state: Tree, *, params: Tree = None) -> tuple[Tree, Tree]:
        return optree.tree_map(torch.sub, grads, params), state

    optimizer = chain(GradientTransformation(lambda params: (), update), sgd(0.5))
    params, grads = adapters(0), adapters(1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert_trees_close(updates, optree.tree_map(lambda g, p: -0.5 * (g - p), grads, params))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "sgd-nesterov"])
def test_half_precision_computes_in_float32_and_rounds_once(name: str, dtype: torch.dtype) -> None:
    optimizer = TORCH[name][0]
    params, grads = adapters(0, dtype=dtype), [adapters(1 + i, dtype=dtype) for i in range(3)]
    wide = optree.tree_map(lambda x: x.float(), (params, grads))
    state, wide_state = optimizer.init(params), optimizer.init(wide[0])
    for g, wide_g in zip(grads, wide[1], strict=True):
        updates, state = optimizer.update(g, state, params)
        expected, wide_state = optimizer.update(wide_g, wide_state, wide[0])
        assert_trees_close(updates, optree.tree_map(lambda x: x.to(dtype), expected))
        assert_trees_close(state, wide_state)


def test_apply_updates_keeps_the_dtype_and_rounds_the_sum() -> None:
    # The update is a hair more than half of what bfloat16 resolves at 1. Rounded by itself it is just half.
    params, updates = {"w": torch.ones(1, dtype=torch.bfloat16)}, {"w": torch.tensor([2**-8 + 2**-17])}
    expected = torch.tensor([1 + 2**-7], dtype=torch.bfloat16)
    assert_trees_close(apply_updates(params, updates), {"w": expected})


# LoRA+ -----------------------------------------------------------------------------------------------------


def is_b(tree: Tree) -> list[bool]:
    return [path[-1] == "b" for path in optree.tree_paths(tree)]


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_lora_plus_is_torch_with_parameter_groups(base: str) -> None:
    ours, theirs = {
        "adamw": (lora_plus(0.02, 8.0, weight_decay=0.1), torch.optim.AdamW),
        "sgd": (lora_plus(0.02, 8.0, sgd, momentum=0.9, weight_decay=0.1), torch.optim.SGD),
    }[base]
    extra = {"momentum": 0.9} if base == "sgd" else {}
    params, grads = adapters(0), [adapters(1 + i) for i in range(20)]

    def groups(leaves: list[Tensor]) -> list[Any]:
        split = list(zip(leaves, is_b(params), strict=True))
        return [
            {"params": [x for x, b in split if b], "lr": 0.16},
            {"params": [x for x, b in split if not b]},
        ]

    def make(groups: list[Any]) -> torch.optim.Optimizer:
        return theirs(groups, lr=0.02, weight_decay=0.1, **extra)

    expected = run_torch(make, params, grads, groups)
    assert_trees_close(run(ours, params, grads), expected, rtol=1e-12, atol=1e-12)


@given(ratio=st.floats(0.1, 100), seed=st.integers(0, 2**31), base=st.sampled_from([adamw, sgd]))
def test_lora_plus_changes_b_alone(ratio: float, seed: int, base: Any) -> None:
    params, grads = adapters(seed), adapters(seed + 1)
    plain, plus = base(0.1), lora_plus(0.1, ratio, base)
    expected, _ = plain.update(grads, plain.init(params), params)
    updates, _ = plus.update(grads, plus.init(params), params)
    rows = zip(is_b(params), optree.tree_leaves(updates), optree.tree_leaves(expected), strict=True)
    for b, x, y in rows:
        torch.testing.assert_close(x, y * ratio if b else y, rtol=1e-14 if b else 0, atol=0)


@pytest.mark.parametrize("tree", [{"b.weight": torch.ones(2)}, {"b": {"value": torch.ones(2)}}, torch.ones(2), {}])
def test_lora_plus_without_b_is_an_error(tree: Tree) -> None:
    with pytest.raises(ConfigError, match=r"expected a tree with `b` factors, got \d leaves and no `b`"):
        lora_plus(0.1).init(tree)


# Clipping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.5, 1e3, math.inf, torch.tensor(0.5)])
def test_clipping_is_that_of_torch(max_norm: float | Tensor, dtype: torch.dtype) -> None:
    grads = adapters(0, dtype=dtype)
    leaves, spec = optree.tree_flatten(grads)
    parameters = [torch.zeros_like(g).requires_grad_() for g in leaves]
    for p, g in zip(parameters, leaves, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(parameters, float(max_norm))
    expected = optree.tree_unflatten(spec, [p.grad for p in parameters])
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    updates, _ = clip_by_global_norm(max_norm).update(grads, ())
    assert_trees_close(updates, expected, rtol=tolerance, atol=tolerance)


def test_global_norm_is_that_of_all_entries() -> None:
    tree = adapters(0)
    everything = torch.cat([x.flatten() for x in optree.tree_leaves(tree)])
    torch.testing.assert_close(global_norm(tree), everything.norm())
    # 300² and 200 such terms overflow float16; a sum in bfloat16 would stop growing at 256.
    for dtype, x, n in [(torch.float16, 300.0, 200), (torch.bfloat16, 1.0, 4096)]:
        torch.testing.assert_close(global_norm([torch.full((n,), x, dtype=dtype)]), torch.tensor(x * math.sqrt(n)))
    assert global_norm({}) == 0
    mixed = global_norm([torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)])
    torch.testing.assert_close(mixed, torch.tensor(5.0, dtype=torch.float64))


def test_global_norm_has_a_gradient_at_zero() -> None:
    zeros = {"w": torch.zeros(3)}
    assert_trees_close(torch.func.grad(global_norm)(zeros), zeros)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_gives_nan_and_only_to_its_adapter(bad: float) -> None:
    grads = {"v": torch.ones(2, 3), "w": torch.ones(2, 2)}
    grads["v"][1, 0] = bad
    updates, _ = clip_by_global_norm(torch.tensor([1.0, 1.0])).update(grads, ())
    assert all(u[0].isfinite().all() and u[1].isnan().all() for u in updates.values())
    updates, _ = clip_by_global_norm(1.0).update(grads, ())
    assert all(u.isnan().all() for u in updates.values())


def test_a_norm_that_overflows_does_not_become_a_zero_gradient() -> None:
    updates, _ = clip_by_global_norm(1.0).update({"w": torch.full((2,), 1e30)}, ())
    assert updates["w"].isnan().all()


# Schedules -------------------------------------------------------------------------------------------------


def closed_form(step: int, shape: Callable[[float], float], lr: float, warmup: int, total: int, end: float) -> float:
    if step < warmup:
        return lr * step / warmup
    return end + (lr - end) * shape(min(1.0, (step - warmup) / (total - warmup)))


@given(
    lr=st.floats(0, 10),
    end=st.floats(0, 10),
    warmup=st.integers(0, 20),
    length=st.integers(1, 50),
    name=st.sampled_from(["cosine", "linear"]),
)
def test_schedules_are_their_closed_form(lr: float, end: float, warmup: int, length: int, name: str) -> None:
    make, shape = {
        "cosine": (warmup_cosine, lambda x: (1 + math.cos(math.pi * x)) / 2),
        "linear": (warmup_linear, lambda x: 1 - x),
    }[name]
    schedule = make(lr, warmup, warmup + length, end)
    steps = torch.arange(warmup + length + 3)
    expected = torch.tensor(
        [closed_form(i, shape, lr, warmup, warmup + length, end) for i in range(len(steps))],
        dtype=torch.float32,
    )
    torch.testing.assert_close(schedule(steps), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.vmap(schedule)(steps), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(schedule(steps[-1]), expected[-1], rtol=1e-5, atol=1e-5)


def test_training_with_a_schedule_is_training_with_torch_and_its_scheduler() -> None:
    params, grads = adapters(0), [adapters(1 + i) for i in range(12)]
    leaves, spec = optree.tree_flatten(params)
    leaves = [x.clone().requires_grad_() for x in leaves]
    theirs = torch.optim.AdamW(leaves, 0.1)
    after = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 8, eta_min=0.01)
    before = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: step / 3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(theirs, [before, after], [3])
    for g in grads:
        for leaf, grad in zip(leaves, optree.tree_leaves(g), strict=True):
            leaf.grad = grad.clone()
        theirs.step()
        if scheduler.last_epoch < 11:  # torch's cosine goes up again after its last step
            scheduler.step()
    expected = optree.tree_unflatten(spec, [x.detach() for x in leaves])
    ours = run(adamw(warmup_cosine(0.1, 3, 11, 0.01)), params, grads)
    assert_trees_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_one_schedule_for_many_peaks() -> None:
    lr = torch.tensor([0.1, 0.2])
    schedule = warmup_linear(lr, 2, 6, end=torch.tensor([0.0, 0.1]))
    torch.testing.assert_close(schedule(torch.tensor(1)), lr / 2)
    torch.testing.assert_close(schedule(torch.tensor([4, 9])), torch.tensor([0.05, 0.1]))
    torch.testing.assert_close(constant(lr)(torch.tensor(3)), lr)
    assert constant(0.5)(torch.arange(6).reshape(2, 3)).shape == (2, 3)


# Laws of every optimizer -----------------------------------------------------------------------------------

# name -> f(lr, weight_decay, scale); each argument a number, or a tensor with one value per adapter
OPTIMIZERS: dict[str, Callable[[Any, Any, Any], GradientTransformation]] = {
    "adamw": lambda lr, wd, c: adamw(lr, weight_decay=wd),
    "adamw-scheduled": lambda lr, wd, c: adamw(warmup_cosine(lr, 1, 3, c), weight_decay=wd),
    "sgd": lambda lr, wd, c: sgd(lr, weight_decay=wd),
    "sgd-nesterov": lambda lr, wd, c: sgd(warmup_linear(lr, 1, 3), 0.9, nesterov=True, weight_decay=wd),
    "lora_plus": lambda lr, wd, c: lora_plus(lr, c, weight_decay=wd),
    "clip": lambda lr, wd, c: chain(clip_by_global_norm(c), sgd(constant(lr), weight_decay=wd)),
    "clip-lora_plus": lambda lr, wd, c: chain(
        clip_by_global_norm(c), lora_plus(lr, c, sgd, momentum=0.5, weight_decay=wd)
    ),
}

members = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.floats(low, high), min_size=n, max_size=n) for low, high in [(0.0, 1.0), (0.0, 0.5), (0.1, 20.0)])
    )
)


def stack(trees: Sequence[Tree]) -> Tree:
    return optree.tree_map(lambda *x: torch.stack(x), *trees)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(settings=members, seed=st.integers(0, 2**31))
def test_a_stack_steps_as_its_members_do(name: str, settings: tuple[list[float], ...], seed: int) -> None:
    make, n = OPTIMIZERS[name], len(settings[0])
    params, grads = adapters(seed, (n,)), [adapters(seed + i, (n,)) for i in (1, 2, 3)]
    each = [
        run(make(*values), *optree.tree_map(lambda x, i=i: x[i], (params, grads)))
        for i, values in enumerate(zip(*settings, strict=True))
    ]
    tensors = [torch.tensor(values, dtype=torch.float64) for values in settings]
    stacked = run(make(*tensors), params, grads)
    assert_trees_close(stacked, stack(each), rtol=1e-11, atol=1e-11)

    def alone(values: Sequence[Tensor], params: Tree, grads: Sequence[Tree]) -> Tree:
        return run(make(*values), params, grads)

    mapped = torch.vmap(alone)(tensors, params, grads)
    assert_trees_close(mapped, stack(each), rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_single_adapters_stack(name: str) -> None:
    # The members have taken different numbers of steps: the count is [n_adapters].
    values = [0.1, 0.2, 1.5]
    optimizer, params = OPTIMIZERS[name](*values), [adapters(i) for i in range(3)]
    states = [optimizer.init(p) for p in params]
    for i, p in enumerate(params):
        for step in range(i):
            _, states[i] = optimizer.update(adapters(10 * i + step), states[i], p)
    grads = [adapters(50 + i) for i in range(3)]
    expected = [optimizer.update(g, s, p) for g, s, p in zip(grads, states, params, strict=True)]
    per_member = [torch.full((3,), v, dtype=torch.float64) for v in values]
    together = OPTIMIZERS[name](*per_member).update(stack(grads), stack(states), stack(params))
    assert_trees_close(together, stack(expected), rtol=1e-12, atol=1e-12)
    mapped = torch.vmap(optimizer.update)(stack(grads), stack(states), stack(params))
    assert_trees_close(mapped, stack(expected), rtol=1e-12, atol=1e-12)
    assert_trees_close(torch.vmap(optimizer.init)(stack(params)), stack([optimizer.init(p) for p in params]))


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_inputs_stay_as_they_were(name: str, grad_mode: bool, seed: int, dtype: torch.dtype) -> None:
    optimizer = OPTIMIZERS[name](0.1, 0.2, 0.3)
    params, grads = adapters(seed, dtype=dtype), adapters(seed + 1, dtype=dtype)
    state = optimizer.init(params)
    for _ in range(2):
        inputs = (grads, state, params)
        before = optree.tree_map(torch.clone, inputs)
        versions = [x._version for x in optree.tree_leaves(inputs)]
        with torch.set_grad_enabled(grad_mode):
            updates, state = optimizer.update(*inputs)
            after = apply_updates(params, updates)
        for x, y in zip(optree.tree_leaves(inputs), optree.tree_leaves(before), strict=True):
            assert torch.equal(x, y)
        assert [x._version for x in optree.tree_leaves(inputs)] == versions
        old = {x.data_ptr() for x in optree.tree_leaves(inputs)}
        new = [x.data_ptr() for x in optree.tree_leaves((updates, state, after))]
        assert not old.intersection(new)
        assert len(set(new)) == len(new)
        assert optree.tree_structure(updates) == optree.tree_structure(params)
        assert [x.dtype for x in optree.tree_leaves(updates)] == [dtype] * 5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_padding_stays_zero(name: str) -> None:
    params, grads = adapters(0, (2,)), [adapters(i, (2,)) for i in (1, 2, 3)]
    for tree in (params, *grads):
        tree["0.weight"].a[0, 1:] = 0
        tree["0.weight"].b[0, :, 1:] = 0
    pair = run(OPTIMIZERS[name](*torch.tensor([[0.1, 0.2]] * 3)), params, grads)["0.weight"]
    assert not pair.a[0, 1:].any()
    assert not pair.b[0, :, 1:].any()
    assert pair.a[1].all()


@pytest.mark.parametrize(  # together every transformation and schedule; a compilation takes seconds
    ("name", "per_member"),
    [("adamw-scheduled", False), ("sgd-nesterov", False), ("clip-lora_plus", True)],
)
def test_one_graph_serves_every_step(name: str, per_member: bool) -> None:
    torch._dynamo.reset()
    values: list[Any] = [0.1, 0.2, 1.5]
    optimizer = OPTIMIZERS[name](*([torch.tensor([v, v / 2]) for v in values] if per_member else values))
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(params: Tree, grads: Tree, state: Tree) -> tuple[Tree, Tree]:
        updates, state = optimizer.update(grads, state, params)
        return apply_updates(params, updates), state

    params, grads = adapters(0, (2,)), [adapters(i, (2,)) for i in range(1, 6)]
    compiled, state = params, optimizer.init(params)
    for g in grads:
        compiled, state = step(compiled, g, state)
    assert counter.frame_count == 1
    assert_trees_close(compiled, run(optimizer, params, grads), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_has_right_derivatives(name: str) -> None:
    make = OPTIMIZERS[name]
    leaves, spec = optree.tree_flatten(({"w": Pair(*torch.randn(2, 2, 2).double())},) * 3)
    values = torch.tensor([0.1, 0.2, 1.5], dtype=torch.float64)

    def two_steps(values: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        params, *grads = optree.tree_unflatten(spec, leaves)
        return tuple(optree.tree_leaves(run(make(*values), params, grads)))

    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in (values, *(torch.randn_like(x) for x in leaves))]
    assert torch.autograd.gradcheck(two_steps, inputs)


def test_meta_gradient_of_one_sgd_step_is_the_finite_difference() -> None:
    x, y = torch.randn(5, 3).double(), torch.randn(5).double()

    def loss(w: dict[str, Tensor]) -> Tensor:
        return (torch.tanh(x @ w["w"]) - y).square().mean()

    def after_step(lr: Tensor, w: dict[str, Tensor]) -> Tensor:
        optimizer = sgd(lr, weight_decay=0.1)
        updates, _ = optimizer.update(torch.func.grad(loss)(w), optimizer.init(w), w)
        return loss(apply_updates(w, updates))

    lr, w, h = torch.tensor(0.3, dtype=torch.float64), {"w": torch.randn(3).double()}, 1e-6
    by_lr, by_w = torch.func.grad(after_step, argnums=(0, 1))(lr, w)
    torch.testing.assert_close(by_lr, (after_step(lr + h, w) - after_step(lr - h, w)) / (2 * h), rtol=1e-7, atol=1e-9)
    for i, e in enumerate(h * torch.eye(3, dtype=torch.float64)):
        difference = (after_step(lr, {"w": w["w"] + e}) - after_step(lr, {"w": w["w"] - e})) / (2 * h)
        torch.testing.assert_close(by_w["w"][i], difference, rtol=1e-7, atol=1e-9)


def test_adamw_has_a_derivative_where_the_gradient_is_zero() -> None:
    # One step is -lr·g/(|g| + eps), whose slope at 0 is -lr/eps; the naive root gives NaN.
    optimizer = adamw(0.1, eps=0.5, weight_decay=0.0)
    w = torch.zeros((), dtype=torch.float64)
    slope = torch.func.grad(lambda g: optimizer.update({"w": g}, optimizer.init({"w": w}))[0]["w"])(w)
    torch.testing.assert_close(slope, torch.tensor(-0.2, dtype=torch.float64))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("batched", range(3), ids=["grads", "state", "params"])
def test_without_autograd_transforms_work_all_the_same(name: str, batched: int) -> None:
    # Nothing keeps the values in between then, but a tensor that is not batched cannot hold what is.
    optimizer = OPTIMIZERS[name](0.1, 0.2, 0.3)
    params, grads = adapters(0), adapters(1)
    inputs = [grads, optimizer.update(grads, optimizer.init(params), params)[1], params]
    expected = optimizer.update(*inputs)
    in_dims = [None, None, None]
    in_dims[batched] = 0  # type: ignore[call-overload]
    inputs[batched] = optree.tree_map(lambda x: torch.stack([x, x]), inputs[batched])
    with torch.no_grad():
        updates, state = torch.vmap(optimizer.update, in_dims=tuple(in_dims))(*inputs)
        assert_trees_close((updates, state), stack([expected, expected]), rtol=1e-12, atol=1e-12)


def test_without_autograd_forward_mode_works_all_the_same() -> None:
    optimizer, params, grads = adamw(0.1), adapters(0), adapters(1)
    state = optimizer.update(grads, optimizer.init(params), params)[1]

    def update(grads: Tree) -> Tree:
        return optimizer.update(grads, state, params)[0]

    expected = torch.func.jvp(update, (grads,), (params,))[1]
    with torch.no_grad(), forward_ad.dual_level():
        updates = update(optree.tree_map(forward_ad.make_dual, grads, params))
        tangents = optree.tree_map(lambda x: forward_ad.unpack_dual(x).tangent, updates)
    assert_trees_close(tangents, expected, rtol=1e-12, atol=1e-12)


def test_none_is_an_absent_subtree() -> None:
    params = {"v": None, "w": torch.ones(2)}
    for make in OPTIMIZERS.values():
        optimizer = make(0.1, 0.2, 0.3)
        tree = {"x": {"b": params["w"]}, "y": None}
        updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
        assert updates["y"] is None


def test_public_names_are_sorted() -> None:
    assert optim.__all__ == sorted(optim.__all__)


# Errors ----------------------------------------------------------------------------------------------------

W = {"w": torch.ones(2, 3)}


def wrong(value: object) -> Any:
    """A value that mypy would refuse as well."""
    return value


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: adamw(-0.1), r"lr: expected a schedule, a finite number >= 0.*got -0\.1"),
        (lambda: adamw(math.nan), "lr: .*got nan"),
        (lambda: sgd(math.inf), "lr: .*got inf"),
        (lambda: sgd(wrong("fast")), "lr: .*got 'fast'"),
        (lambda: sgd(True), "lr: .*got True"),
        (lambda: sgd(torch.ones(2, 2)), r"lr: .*\[\] or \[n_adapters\], got a torch.float32 tensor \[2, 2\]"),
        (lambda: sgd(torch.tensor(1)), "lr: .*got a torch.int64 tensor"),
        (lambda: adamw(0.1, b1=1.0), r"b1: expected a number in \[0, 1\), got 1\.0"),
        (lambda: adamw(0.1, b2=-0.1), r"b2: .*got -0\.1"),
        (lambda: adamw(0.1, b2=wrong(torch.tensor(0.9))), "b2: .*got a torch.float32 tensor"),
        (lambda: adamw(0.1, eps=-1e-8), "eps: expected a finite number >= 0, got -1e-08"),
        (lambda: adamw(0.1, weight_decay=-1), "weight_decay: .*got -1"),
        (lambda: sgd(0.1, momentum=1.5), r"momentum: .*got 1\.5"),
        (lambda: sgd(0.1, nesterov=True), "nesterov: expected momentum > 0 with it, got momentum=0"),
        (lambda: lora_plus(0.1, ratio=0), "ratio: expected a finite number > 0.*got 0"),
        (lambda: lora_plus(-1.0), "lr: "),
        (lambda: clip_by_global_norm(0.0), r"max_norm: expected a number > 0.*got 0\.0"),
        (lambda: clip_by_global_norm(math.nan), "max_norm: .*got nan"),
        (chain, r"transforms: expected one or more pairs of init and update, got \(\)"),
        (lambda: chain(sgd(0.1), wrong(adamw)), "transforms: .*<function adamw.*call the factories"),
        (lambda: constant(-1.0), "lr: "),
        (lambda: constant(wrong(constant(1.0))), "lr: .*pass the rate itself"),
        (lambda: warmup_cosine(-1.0, 1, 2), "lr: "),
        (lambda: warmup_cosine(1.0, -1, 2), "warmup_steps: expected an integer >= 0, got -1"),
        (lambda: warmup_linear(1.0, wrong(0.5), 2), r"warmup_steps: .*got 0\.5"),
        (lambda: warmup_linear(1.0, 5, 5), "total_steps: expected an integer > warmup_steps=5, got 5"),
        (lambda: warmup_linear(1.0, 1, 2, end=-1.0), r"end: .*got -1\.0"),
        (lambda: adamw(0.1).update(W, adamw(0.1).init(W)), "params: .*weight_decay=0.01 decays, got None"),
        (lambda: sgd(0.1, weight_decay=0.1).update(W, sgd(0.1).init(W)), "params: .*weight_decay=0.1"),
        (
            lambda: sgd(torch.ones(3)).update(W, sgd(0.1).init(W)),
            r"leaves \[3, ...\] .*got a leaf of shape \[2, 3\]",
        ),
        (lambda: clip_by_global_norm(torch.ones(3)).update(W, ()), r"leaves \[3, ...\]"),
        (
            lambda: clip_by_global_norm(torch.ones(3)).update(torch.tensor(1.0), ()),
            r"got a leaf of shape \[\]",
        ),
        (
            lambda: adamw(0.1).init({"w": torch.ones(2, dtype=torch.int64)}),
            "floating-point tensors, got torch.int64",
        ),
        (lambda: apply_updates(W, {}), "updates: expected the tree structure of params, got another one"),
        (
            lambda: apply_updates(W, {"w": torch.ones(3)}),
            r"updates at \('w',\): .*\[2, 3\] as in params, got \[3\]",
        ),
        (lambda: apply_updates(W, {"w": None}), r"updates at \('w',\): .*got NoneType"),
        (
            lambda: adamw(0.1).update({"w": torch.ones(3)}, adamw(0.1).init(W), W),
            r"grads at \('w',\): expected a tensor \[2, 3\] as in mu, got \[3\]",
        ),
        (lambda: sgd(0.1, 0.9).update(W, sgd(0.1).init(W), W), "grads: expected the tree structure of trace"),
    ],
)
def test_errors_say_what_is_wrong(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        call()


@pytest.mark.parametrize("value", [[optim.warmup_cosine(1e-3, 2, 8)], "1e-3", [[1.0], [1.0, 2.0]], [None]])
def test_a_value_for_each_member_is_a_number(value: Any) -> None:
    optimizer = optim.per_member(optim.sgd, lr=value)
    with pytest.raises(ConfigError, match=r"per_member: lr: expected one number for each member, got .* Put every"):
        optimizer.init(fl.stack([{"x": torch.zeros(1)}]))


# Steps in one -----------------------------------------------------------------------------------------------

STEPPING = {**OPTIMIZERS, "clip-adamw": lambda lr, wd, c: chain(clip_by_global_norm(c), adamw(lr, weight_decay=wd))}


def step_by_step(optimizer: Any, params: Tree, grads: Sequence[Tree]) -> Tree:
    state = optimizer.init(params)
    for g in grads:
        params, state = step_of(optimizer)(params, g, state)
    return params, state


def test_which_optimizers_make_the_step_themselves() -> None:
    own = {name for name, make in STEPPING.items() if hasattr(make(0.1, 0.2, 0.3), "step")}
    assert own == {"adamw", "adamw-scheduled", "clip-adamw"}


@pytest.mark.parametrize("way", ["alone", "compiled formula", "vmap", "values", "per_member"])
@pytest.mark.parametrize("name", STEPPING)
@pytest.mark.usefixtures("in_float64")
def test_a_step_is_an_update_and_its_sum(name: str, way: str) -> None:
    values = [[0.1, 0.1, 0.3], [0.2, 0.2, 0.2], [0.3, 0.3, 0.5]]  # two members step alike
    make: Any = STEPPING[name]
    params, grads = adapters(0, (3,)), [adapters(i, (3,)) for i in (1, 2, 3)]
    expected = stack([
        run(make(*numbers), *optree.tree_map(lambda x, i=i: x[i], (params, grads)))
        for i, numbers in enumerate(zip(*values, strict=True))
    ])  # fmt: skip
    tensors = [torch.tensor(each, dtype=torch.float64) for each in values]
    before = optree.tree_map(torch.clone, (params, grads))
    with torch.set_grad_enabled(way == "compiled formula"):
        if way in ("alone", "compiled formula"):
            got = stack([
                step_by_step(make(*numbers), *optree.tree_map(lambda x, i=i: x[i], (params, grads)))[0]
                for i, numbers in enumerate(zip(*values, strict=True))
            ])  # fmt: skip
        elif way == "vmap":
            got = torch.vmap(lambda v, *trees: step_by_step(make(*v), *trees)[0])(tensors, params, grads)
        elif way == "values":
            got = step_by_step(make(*tensors), params, grads)[0]
        else:
            optimizer = per_member(make, lr=values[0], wd=values[1], c=values[2])
            several = [
                members_of([optree.tree_map(lambda x, i=i: x[i], t) for i in range(3)]) for t in (params, *grads)
            ]
            state = optimizer.init(several[0])
            trained = several[0]
            for g in several[1:]:
                trained, state = optimizer.step(trained, g, state)
            got = stack(list(trained))
    assert_trees_close(got, expected, rtol=1e-11, atol=1e-12)
    assert_trees_close((params, grads), before)


def test_members_that_took_other_numbers_of_steps_step_together() -> None:
    optimizer, params, grads = adamw(0.1), [adapters(i) for i in range(3)], [adapters(50 + i) for i in range(3)]
    states = [optimizer.init(p) for p in params]
    for i, p in enumerate(params):
        for k in range(i):
            _, states[i] = optimizer.update(adapters(10 * i + k), states[i], p)
    with torch.no_grad():
        expected = [optimizer.step(*each) for each in zip(params, grads, states, strict=True)]
        for together in (torch.vmap(optimizer.step), adamw(torch.full((3,), 0.1)).step):
            got = together(stack(params), stack(grads), stack(states))
            assert_trees_close(got, stack(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("turned", [("params",), ("grads",), ("params", "grads"), ("params", "grads", "state")])
def test_a_step_keeps_the_order_in_memory(turned: tuple[str, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    trees: dict[str, Any] = {"params": {"x": torch.randn(3, 5, 2, generator=g)}}
    trees["grads"] = {"x": torch.randn(3, 5, 2, generator=g)}
    optimizer = adamw(torch.tensor([0.1, 0.1, 0.3]))
    with torch.no_grad():
        _, trees["state"] = optimizer.step(trees["params"], trees["grads"], optimizer.init(trees["params"]))
        expected = optimizer.step(trees["params"], trees["grads"], trees["state"])
        for name in turned:
            trees[name] = optree.tree_map(lambda x: x.mT.contiguous().mT if x.dim() > 2 else x, trees[name])
        got = optimizer.step(trees["params"], trees["grads"], trees["state"])
    assert_trees_close(got, expected, rtol=1e-6, atol=1e-7)  # the kernel rounds the last elements in another way
    leaves = [x for x in optree.tree_leaves(got) if x.dim() > 2]
    assert len(leaves) == 3
    assert all((x.mT if "params" in turned else x).is_contiguous() for x in leaves)


def test_an_optimizer_of_members_returns_trees_of_tensors() -> None:
    one = GradientTransformation(lambda params: params, lambda grads, state, params=None: (grads, 1))
    optimizer = per_member(lambda lr: one, lr=[0.1, 0.2])
    several = members_of([{"x": torch.ones(1)}, {"x": torch.ones(1)}])
    with pytest.raises(ConfigError, match="the optimizer returned a int, expected trees of tensors"):
        optimizer.update(several, optimizer.init(several), several)


def test_a_step_without_kernel_is_the_formula() -> None:
    optimizer, params, grads = adamw(0.1), adapters(0, dtype=torch.bfloat16), adapters(1, dtype=torch.bfloat16)
    with torch.no_grad():
        after, state = optimizer.step(params, grads, optimizer.init(params))
        updates, expected = optimizer.update(grads, optimizer.init(params), params)
    assert_trees_close(after, apply_updates(params, updates))
    assert_trees_close(state, expected)

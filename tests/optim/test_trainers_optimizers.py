"""Optimizers and schedules that people know from trainers, against transformers' and bitsandbytes' own."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import optree as _optree
import pytest
import torch
import transformers
from torch import Tensor

import funclora as fl
from funclora import optim
from funclora.errors import ArgumentError, ConfigError, UnsupportedError

Tree = Any
optree: Any = _optree


def tree(seed: int, dtype: torch.dtype = torch.float32) -> Tree:
    """A matrix of more than 4096 values, an expert's, a small one and a vector."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"large": (80, 64), "experts": (2, 5, 3), "small": (3, 4), "bias": (5,)}
    return {name: torch.randn(*shape, generator=g).to(dtype) for name, shape in shapes.items()}


def run(optimizer: optim.GradientTransformation, params: Tree, grads: Sequence[Tree]) -> Tree:
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optim.apply_updates(params, updates)
    return params


def run_torch(make: Callable[[list[Tensor]], torch.optim.Optimizer], params: Tree, grads: Sequence[Tree]) -> Tree:
    leaves, spec = optree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    optimizer = make(leaves)
    for g in grads:
        for leaf, grad in zip(leaves, optree.tree_leaves(g), strict=True):
            leaf.grad = grad.clone()
        optimizer.step()
    return optree.tree_unflatten(spec, [leaf.detach() for leaf in leaves])


def theirs(leaves: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return transformers.Adafactor(leaves, relative_step=False, scale_parameter=False, **options)


@pytest.mark.parametrize(
    ("ours", "make"),
    [
        (optim.adafactor(0.02), lambda p: theirs(p, lr=0.02)),
        (
            optim.adafactor(0.1, decay=0.6, clip=0.7, eps=1e-3, weight_decay=0.2),
            lambda p: theirs(p, lr=0.1, decay_rate=-0.6, clip_threshold=0.7, eps=(1e-3, 1e-3), weight_decay=0.2),
        ),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_adafactor_is_transformers(ours: Any, make: Any, dtype: torch.dtype, tolerance: float) -> None:
    params, grads = tree(0, dtype), [tree(1 + i, dtype) for i in range(12)]
    grads[0] = optree.tree_map(torch.zeros_like, grads[0])  # as `a` has it while `b` is 0
    expected = run_torch(make, params, grads)
    torch.testing.assert_close(run(ours, params, grads), expected, rtol=tolerance, atol=tolerance)


def test_adafactor_trains_each_member_as_if_alone() -> None:
    params, grads = [tree(i) for i in range(2)], [tree(10 + i) for i in range(2)]
    optimizer = optim.per_member(optim.adafactor, lr=[0.1, 0.01])
    members, state = fl.stack(params), None
    state = optimizer.init(members)
    for _ in range(2):
        updates, state = optimizer.update(fl.stack(grads), state, members)
        members = optim.apply_updates(members, updates)
    for i, lr in enumerate([0.1, 0.01]):
        alone = run(optim.adafactor(lr), params[i], [grads[i]] * 2)
        torch.testing.assert_close(dict(members[i]), alone, rtol=1e-5, atol=1e-6)


def test_adafactor_is_pure_differentiable_and_one_graph() -> None:
    torch._dynamo.reset()
    optimizer = optim.adafactor(optim.warmup_cosine(0.1, 1, 5), weight_decay=0.1)
    params, grads = {"w": torch.randn(3, 2).double(), "b": torch.randn(2).double()}, {}
    grads = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    inputs = (grads, optimizer.update(grads, optimizer.init(params), params)[1], params)
    before = optree.tree_map(torch.clone, inputs)
    expected = optimizer.update(*inputs)
    for x, y in zip(optree.tree_leaves(inputs), optree.tree_leaves(before), strict=True):
        assert torch.equal(x, y)
    compiled = torch.compile(optimizer.update, fullgraph=True, backend="eager")(*inputs)
    torch.testing.assert_close(optree.tree_leaves(compiled), optree.tree_leaves(expected))

    def update(w: Tensor) -> Tensor:
        return optimizer.update(grads | {"w": w}, inputs[1], params)[0]["w"]

    assert torch.autograd.gradcheck(update, [grads["w"].requires_grad_()])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_8bit_is_bitsandbytes(decay: float) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params, grads = tree(0), [tree(1 + i) for i in range(10)]
    expected = run_torch(lambda p: bitsandbytes.optim.AdamW8bit(p, lr=0.05, weight_decay=decay), params, grads)
    ours = run(optim.adamw_8bit(0.05, weight_decay=decay), params, grads)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    dense = run(optim.adamw(0.05, weight_decay=decay), params, grads)
    torch.testing.assert_close(ours["small"], dense["small"])
    assert not torch.allclose(ours["large"], dense["large"], atol=1e-5)


def test_adamw_8bit_is_pure_and_keeps_a_quarter() -> None:
    pytest.importorskip("bitsandbytes")
    optimizer = optim.adamw_8bit(0.1)
    params = {"w": torch.randn(64, 128), "b": torch.randn(3)}
    grads = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    state = optimizer.update(grads, optimizer.init(params), params)[1]
    before = optree.tree_map(torch.clone, (grads, state, params))
    optimizer.update(grads, state, params)
    for x, y in zip(optree.tree_leaves((grads, state, params)), optree.tree_leaves(before), strict=True):
        assert torch.equal(x, y)
    assert sum(x.nbytes for x in state.quantized[0]) < 64 * 128 * 2.1
    with pytest.raises(UnsupportedError, match=r"adamw_8bit: .* Use adamw there"):
        torch.func.vmap(optimizer.update)(*(optree.tree_map(lambda x: x[None], t) for t in (grads, state, params)))
    with pytest.raises(ArgumentError, match=r"state: .*other adapters"):
        optimizer.update({"w": grads["b"]}, state, {"w": params["b"]})


HF = transformers.optimization


def multipliers(make: Callable[..., Any], steps: int, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = make(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("warmup", "total"), [(0, 12), (3, 27), (5, 6)])
@pytest.mark.parametrize("kind", ["restarts", "polynomial", "wsd"])
def test_schedules_are_those_of_transformers(kind: str, warmup: int, total: int) -> None:
    common = {"num_warmup_steps": warmup, "num_training_steps": total}
    cycles, decay = min(3, total - warmup), max(1, (total - warmup) // 4)
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "restarts": (
            optim.warmup_cosine_restarts(0.3, warmup, total, cycles),
            HF.get_cosine_with_hard_restarts_schedule_with_warmup,
            {"num_cycles": cycles},
        ),
        "polynomial": (
            optim.warmup_polynomial(0.3, warmup, total, power=1.7, end=0.01),
            HF.get_polynomial_decay_schedule_with_warmup,
            {"power": 1.7, "lr_end": 0.01},
        ),
        "wsd": (
            optim.warmup_stable_decay(0.3, warmup, total, decay),
            HF.get_wsd_schedule,
            {"num_decay_steps": decay},
        ),
    }
    ours, make, options = cases[kind]
    steps = torch.arange(total + 3)
    expected = torch.tensor(multipliers(make, len(steps), **common, **options))
    torch.testing.assert_close(ours(steps), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.vmap(ours)(steps), expected, rtol=1e-5, atol=1e-6)


def test_special_cases_of_the_schedules_are_the_others() -> None:
    steps = torch.arange(50)
    cosine, linear = optim.warmup_cosine(0.3, 4, 40, 0.1)(steps), optim.warmup_linear(0.3, 4, 40, 0.1)(steps)
    torch.testing.assert_close(optim.warmup_cosine_restarts(0.3, 4, 40, 1, 0.1)(steps), cosine, rtol=0, atol=0)
    torch.testing.assert_close(optim.warmup_stable_decay(0.3, 4, 40, 36, 0.1)(steps), cosine, rtol=0, atol=0)
    torch.testing.assert_close(optim.warmup_polynomial(0.3, 4, 40, 1.0, 0.1)(steps), linear, rtol=0, atol=0)


@pytest.mark.parametrize("cycles", range(1, 30))
def test_no_restart_is_lost_to_rounding(cycles: int) -> None:
    rates = optim.warmup_cosine_restarts(1.0, 0, 7 * cycles, cycles)(torch.arange(7 * cycles))
    assert torch.equal((rates == 1).nonzero().flatten(), torch.arange(0, 7 * cycles, 7))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: optim.warmup_cosine_restarts(0.1, 2, 6, 5), "cycles: expected at most one for each of the 4 steps"),
        (lambda: optim.warmup_cosine_restarts(0.1, 2, 6, 0), "cycles: expected an integer >= 1, got 0"),
        (lambda: optim.warmup_polynomial(0.1, 2, 6, 0.0), r"power: expected a finite number > 0, got 0\.0"),
        (lambda: optim.warmup_stable_decay(0.1, 2, 6, 5), r"decay_steps: expected an integer from 1 to .* = 4, got 5"),
        (lambda: optim.warmup_stable_decay(0.1, 6, 6, 1), "total_steps: expected an integer > warmup_steps=6"),
        (lambda: optim.adafactor(-1.0), "lr: "),
        (lambda: optim.adafactor(0.1, decay=0.0), r"decay: .*got 0\.0"),
        (lambda: optim.adafactor(0.1, clip=math.nan), "clip: .*got nan"),
        (lambda: optim.adafactor(0.1, eps=0.0), r"eps: .*got 0\.0"),
        (lambda: optim.adafactor(torch.ones(2)), r"lr: expected one number, got 2, .*per_member\(adafactor, lr="),
        (lambda: optim.adamw_8bit(0.1, b1=1.0), r"b1: .*got 1\.0"),
    ],
)
def test_errors_say_what_is_wrong(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        call()

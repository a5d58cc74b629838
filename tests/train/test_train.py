"""`value_and_grad` and `train_step`: gradients of the dense formula, purity, and the optimizers of others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optree as _optree
import peft
import pytest
import torch
import torchopt
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from funclora import DoRA, Full, LoraConfig, apply, base_params, init, optim, train_step, value_and_grad
from funclora.errors import ConfigError, UnusedAdapterWarning

optree: Any = _optree  # its annotations know neither our nodes nor tuples of trees
Batch = Any


class Net(nn.Module):
    def __init__(self, *, dropout: float = 0.0, recompute: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 3)
        self.dropout = nn.Dropout(dropout)
        self.recompute = recompute

    def hidden(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.fc1(x)))

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.hidden, x, use_reentrant=False) if self.recompute else self.hidden(x)
        return self.fc2(h)


class Problem(NamedTuple):
    model: Net
    params: dict[str, Tensor]
    adapters: dict[str, Any]
    batch: tuple[Tensor, Tensor]


def problem(kind: str = "lora", dtype: torch.dtype = torch.float64, *, rate: float = 0.0, **options: Any) -> Problem:
    """A regression; B and the difference of DoRA's magnitudes from the norms are not zero."""
    model = Net(**options).to(dtype)
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules="all-linear", init_lora_weights=False, lora_dropout=rate,
        use_dora=kind == "dora", bias="all" if kind == "full" else "none",
    )  # fmt: skip
    adapters = optree.tree_map(lambda leaf: leaf + 0.1 * torch.randn_like(leaf), init(model, config))
    return Problem(model, base_params(model), adapters, (torch.randn(8, 6).to(dtype), torch.randn(8, 3).to(dtype)))


KINDS = ["lora", "dora", "full"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def mse(bound: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    return (bound(batch[0]) - batch[1]).square().mean()


def dense(params: Mapping[str, Tensor], adapters: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """The network as formulas over the rewritten weights; shares nothing with the library."""

    def value(name: str) -> Tensor:
        rule = adapters.get(name)
        if rule is None:
            return params[name]
        if isinstance(rule, Full):
            return rule.value
        v = params[name] + rule.scaling * (rule.b @ rule.a)
        return (rule.magnitude / v.detach().norm(dim=1))[:, None] * v if isinstance(rule, DoRA) else v

    return lambda x: (
        torch.tanh(x @ value("fc1.weight").T + value("fc1.bias")) @ value("fc2.weight").T + value("fc2.bias")
    )


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def close(one: Any, other: Any, tolerance: float = 1e-12) -> None:
    first, second = leaves(one), leaves(other)
    assert len(first) == len(second) > 0
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def same(one: Any, other: Any) -> None:
    close(one, other, 0)


def dense_grads(p: Problem, batch: Batch | None = None) -> tuple[Tensor, Any]:
    values, spec = optree.tree_flatten(p.adapters)
    values = [value.clone().requires_grad_() for value in values]
    loss = mse(dense(p.params, optree.tree_unflatten(spec, values)), batch or p.batch)
    return loss.detach(), optree.tree_unflatten(spec, torch.autograd.grad(loss, values))


def train(
    p: Problem, optimizer: Any, steps: int, loss_fn: Any = mse, **options: Any
) -> tuple[dict[str, Any], Any, list[float]]:
    """The adapters, the optimizer's state and the losses after some steps on the one batch."""
    step = train_step(p.model, loss_fn, optimizer, **options)
    adapters, state, losses = p.adapters, optimizer.init(p.adapters), []
    for _ in range(steps):
        adapters, state, metrics = step(p.params, adapters, state, p.batch)
        losses.append(metrics["loss"].item())
    return adapters, state, losses


def torch_train(
    p: Problem, make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int, max_norm: float | None = None
) -> tuple[Any, list[float]]:
    """The same by the dense formula, autograd and torch's own optimizer."""
    values, spec = optree.tree_flatten(p.adapters)
    values = [value.clone().requires_grad_() for value in values]
    optimizer, losses = make(values), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = mse(dense(p.params, optree.tree_unflatten(spec, values)), p.batch)
        loss.backward()
        if max_norm:
            nn.utils.clip_grad_norm_(values, max_norm)
        optimizer.step()
        losses.append(loss.item())
    return optree.tree_unflatten(spec, [value.detach() for value in values]), losses


# --- value_and_grad --------------------------------------------------------------------------------------------


@every_kind
def test_gradients_are_those_of_the_dense_formula(kind: str) -> None:
    p = problem(kind)
    loss, grads = value_and_grad(mse)(p.model, p.params, p.adapters, p.batch)
    expected, expected_grads = dense_grads(p)
    close((loss, grads), (expected, expected_grads))
    assert optree.tree_structure(grads) == optree.tree_structure(p.adapters)
    assert not any(leaf.requires_grad for leaf in [loss, *leaves(grads)])
    assert all(leaf.abs().max() > 1e-3 for leaf in leaves(grads)), "every leaf takes part"


def test_arguments_after_the_adapters_go_to_the_loss() -> None:
    p = problem()

    def weighted(bound: Any, x: Tensor, y: Tensor, *, weight: float) -> Tensor:
        return weight * mse(bound, (x, y))

    loss, grads = value_and_grad(weighted)(p.model, p.params, p.adapters, *p.batch, weight=3.0)
    expected, expected_grads = dense_grads(p)
    close((loss / 3, optree.tree_map(lambda g: g / 3, grads)), (expected, expected_grads))


def test_a_loss_that_is_a_trained_value_itself() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

    model = Gain()
    adapters = {"gain": Full(torch.tensor(3.0))}
    loss, grads = value_and_grad(lambda bound: bound.gain)(model, base_params(model), adapters)
    close((loss, *leaves(grads)), (torch.tensor(3.0), torch.tensor(1.0)))


def test_aux_is_returned_detached_beside_the_loss() -> None:
    p = problem()

    def with_aux(bound: Any, batch: Batch) -> tuple[Tensor, Any]:
        out = bound(batch[0])
        return mse(bound, batch), {"out": out, "parts": [out.sum(), "text"], "n": 8}

    (loss, aux), grads = value_and_grad(with_aux, has_aux=True)(p.model, p.params, p.adapters, p.batch)
    same((loss, grads), value_and_grad(mse)(p.model, p.params, p.adapters, p.batch))
    close(aux["out"], dense(p.params, p.adapters)(p.batch[0]))
    close(aux["parts"][0], aux["out"].sum())
    assert (aux["parts"][1], aux["n"]) == ("text", 8)
    assert not any(leaf.requires_grad for leaf in leaves(aux))


@pytest.mark.parametrize(("loss_fn", "has_aux", "message"), [
    (lambda bound, batch: bound(batch[0]), False, r"expected a scalar tensor .* a tensor of shape \[8, 3\]; reduce it"),
    (lambda bound, batch: 1.5, False, r"expected a scalar tensor as the loss, got a float"),
    (lambda bound, batch: None, False, r"expected a scalar tensor as the loss, got a NoneType"),
    (lambda bound, batch: (mse(bound, batch), {}), False, r"got a tuple; has_aux=True takes \(loss, aux\)"),
    (lambda bound, batch: (bound(batch[0]), {}), True, r"got a tensor of shape \[8, 3\]"),
    (mse, True, r"expected a pair \(loss, aux\) with has_aux=True, got a tensor of shape \[\]"),
    (lambda bound, batch: torch.ones(()), False, r"the loss does not depend on the adapters"),
    (lambda bound, batch: mse(bound, batch).detach(), False, r"the loss does not depend on the adapters"),
])  # fmt: skip
def test_losses_that_cannot_be_trained_are_refused(loss_fn: Any, has_aux: bool, message: str) -> None:
    p = problem()
    with pytest.raises(ConfigError, match=message):
        value_and_grad(loss_fn, has_aux=has_aux)(p.model, p.params, p.adapters, p.batch)
    sgd = optim.sgd(0.1)
    with pytest.raises(ConfigError, match=message):
        train_step(p.model, loss_fn, sgd, has_aux=has_aux)(p.params, p.adapters, sgd.init(p.adapters), p.batch)


def test_a_loss_of_another_model_is_refused() -> None:
    p = problem()
    with pytest.raises(ConfigError, match=r"Compute it with the bound model"):
        value_and_grad(lambda bound, batch: mse(p.model, batch).detach())(p.model, p.params, p.adapters, p.batch)


def test_no_adapters_are_refused() -> None:
    p = problem()
    with pytest.raises(ConfigError, match="adapters: there is nothing to train"):
        value_and_grad(mse)(p.model, p.params, {}, p.batch)


def test_unused_adapters_are_named_and_get_zeros() -> None:
    p = problem()

    def hidden(bound: Net, batch: Batch) -> Tensor:
        return bound.hidden(batch[0]).square().mean()

    with pytest.warns(UnusedAdapterWarning, match=r"does not depend on 1 of 2 adapters .* fc2.weight") as caught:
        _, grads = value_and_grad(hidden)(p.model, p.params, p.adapters, p.batch)
    assert [warning.filename for warning in caught] == [__file__], "it points at the call"
    assert not any(leaf.any() for leaf in leaves(grads["fc2.weight"]))
    assert all(leaf.any() for leaf in leaves(grads["fc1.weight"]))
    assert optree.tree_structure(grads) == optree.tree_structure(p.adapters)


def test_gradients_under_no_grad() -> None:
    p = problem()
    with torch.no_grad():
        inside = value_and_grad(mse)(p.model, p.params, p.adapters, p.batch)
    same(inside, value_and_grad(mse)(p.model, p.params, p.adapters, p.batch))


@every_kind
def test_nothing_but_the_result_carries_a_gradient(kind: str) -> None:
    p = problem(kind)
    params = dict(p.model.named_parameters())
    adapters = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), p.adapters)
    same(value_and_grad(mse)(p.model, params, adapters, p.batch), value_and_grad(mse)(*p[:3], p.batch))
    for leaf in [*params.values(), *leaves(adapters), *p.model.parameters()]:
        assert leaf.requires_grad
        assert leaf.grad is None


# --- under torch.func ------------------------------------------------------------------------------------------


@every_kind
def test_vmap_over_stacked_adapters_is_a_loop(kind: str) -> None:
    p = problem(kind)
    members = [optree.tree_map(lambda leaf, i=i: leaf * (1 + i), p.adapters) for i in range(3)]
    stacked = optree.tree_map(lambda *same_leaf: torch.stack(same_leaf), *members)

    def with_aux(bound: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return mse(bound, batch), bound(batch[0])

    one = value_and_grad(with_aux, has_aux=True)
    (loss, aux), grads = torch.func.vmap(lambda adapters: one(p.model, p.params, adapters, p.batch))(stacked)
    for i, member in enumerate(members):
        expected = one(p.model, p.params, member, p.batch)
        close(((loss[i], aux[i]), optree.tree_map(lambda g, i=i: g[i], grads)), expected)


def test_vmap_over_the_batch_gives_the_gradient_of_each_example() -> None:
    p = problem()
    one = value_and_grad(mse)
    losses, grads = torch.func.vmap(lambda x, y: one(p.model, p.params, p.adapters, (x, y)))(*p.batch)
    for i, example in enumerate(zip(*p.batch, strict=True)):
        close((losses[i], optree.tree_map(lambda g, i=i: g[i], grads)), dense_grads(p, example))


@every_kind
def test_gradients_of_gradients(kind: str) -> None:
    """The gradient of the squared norm of the gradient, as meta-learning has it; also by a batch."""
    p = problem(kind)

    def norm(adapters: Any, x: Tensor) -> Tensor:
        grads = value_and_grad(mse)(p.model, p.params, adapters, (x, p.batch[1]))[1]
        return torch.stack([leaf.square().sum() for leaf in leaves(grads)]).sum()

    found = torch.func.grad(norm, argnums=(0, 1))(p.adapters, p.batch[0])
    values, spec = optree.tree_flatten(p.adapters)
    values = [value.clone().requires_grad_() for value in values]
    x = p.batch[0].clone().requires_grad_()
    loss = mse(dense(p.params, optree.tree_unflatten(spec, values)), (x, p.batch[1]))
    grads = torch.autograd.grad(loss, values, create_graph=True)
    second = torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), [*values, x])
    close(found, second)
    assert all(leaf.abs().max() > 1e-4 for leaf in leaves(found))


# --- train_step: purity ----------------------------------------------------------------------------------------

ADAMW = optim.adamw(1e-2)


@every_kind
def test_a_step_writes_to_nothing(kind: str) -> None:
    p = problem(kind, rate=0.3, dropout=0.3)
    for optimizer in (ADAMW, optim.sgd(0.1, momentum=0.9), torchopt.adam(1e-2), torchopt.sgd(0.1, momentum=0.9)):
        step, state = train_step(p.model, mse, optimizer, accumulate=2), optimizer.init(p.adapters)
        _, state, _ = step(p.params, p.adapters, state, p.batch)  # a state with something in it
        given = (p.params, p.adapters, state, p.batch, dict(p.model.state_dict()))
        before = [(leaf, leaf.clone(), leaf._version, leaf.requires_grad) for leaf in leaves(given)]
        adapters, state, metrics = step(*given[:4], seed=1)
        for leaf, (old, value, version, needed_grad) in zip(leaves(given), before, strict=True):
            assert leaf is old
            assert torch.equal(leaf, value)
            assert (leaf._version, leaf.requires_grad, leaf.grad) == (version, needed_grad, None)
        pointers = {leaf.data_ptr() for leaf in leaves(given)}
        assert not any(leaf.data_ptr() in pointers for leaf in leaves((adapters, metrics)))
        assert not any(leaf.requires_grad for leaf in leaves((adapters, state, metrics)))
        assert all(module.training for module in p.model.modules())


def test_the_same_inputs_give_the_same_bits() -> None:
    p = problem(rate=0.4, dropout=0.4)
    step, state = train_step(p.model, mse, ADAMW), ADAMW.init(p.adapters)
    first = step(p.params, p.adapters, state, p.batch, seed=7)
    torch.rand(3)
    generator = torch.get_rng_state()
    same(first, step(p.params, p.adapters, state, p.batch, seed=7))
    assert torch.equal(torch.get_rng_state(), generator), "a seeded step leaves the global generator alone"
    other = step(p.params, p.adapters, state, p.batch, seed=8)
    assert other[2]["loss"] != first[2]["loss"]
    step(p.params, p.adapters, state, p.batch)
    assert not torch.equal(torch.get_rng_state(), generator), "without a seed it is used, as by PyTorch"
    torch.manual_seed(7)
    same(first, step(p.params, p.adapters, state, p.batch))


def test_the_generator_is_put_back_after_an_error() -> None:
    p = problem(rate=0.4)
    generator = torch.get_rng_state()

    def fail(bound: Any, batch: Batch) -> Tensor:
        raise KeyError(bound(batch[0]).sum().item())

    with pytest.raises(KeyError, match=r"-?[0-9]"):
        train_step(p.model, fail, ADAMW)(p.params, p.adapters, ADAMW.init(p.adapters), p.batch, seed=3)
    assert torch.equal(torch.get_rng_state(), generator)


def test_ten_steps_are_five_and_five() -> None:
    p = problem("dora", rate=0.2)
    step = train_step(p.model, mse, ADAMW)

    def run(adapters: Any, state: Any, seeds: range) -> tuple[Any, Any]:
        for seed in seeds:
            adapters, state, _ = step(p.params, adapters, state, p.batch, seed=seed)
        return adapters, state

    whole = run(p.adapters, ADAMW.init(p.adapters), range(10))
    half = run(p.adapters, ADAMW.init(p.adapters), range(5))
    same(whole, run(*copy.deepcopy(half), range(5, 10)))
    assert whole[1].step == 10


def test_steps_under_vmap_train_each_adapter_as_alone() -> None:
    p = problem()
    members = [optree.tree_map(lambda leaf, i=i: leaf * (1 + i), p.adapters) for i in range(3)]
    for optimizer in (optim.chain(optim.clip_by_global_norm(0.05), ADAMW), torchopt.sgd(0.1, momentum=0.9)):
        step = train_step(p.model, mse, optimizer)
        stacked = optree.tree_map(lambda *same_leaf: torch.stack(same_leaf), *members)
        state = torch.func.vmap(optimizer.init)(stacked)
        losses = torch.empty(0)
        for _ in range(3):
            stacked, state, metrics = torch.func.vmap(step, in_dims=(None, 0, 0, None))(
                p.params, stacked, state, p.batch
            )
            losses = metrics["loss"]
        for i, member in enumerate(members):
            adapters, _, alone = train(p._replace(adapters=member), optimizer, 3)
            close(optree.tree_map(lambda leaf, i=i: leaf[i], stacked), adapters)
            assert losses[i].item() == pytest.approx(alone[-1], rel=1e-12)


# --- accumulation, clipping, precision -------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("n", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(kind: str, n: int) -> None:
    p = problem(kind)
    sgd = optim.sgd(1.0)
    whole = train_step(p.model, mse, sgd)(p.params, p.adapters, sgd.init(p.adapters), p.batch)
    parts = train_step(p.model, mse, sgd, accumulate=n)(p.params, p.adapters, sgd.init(p.adapters), p.batch)
    close(parts, whole)


def test_accumulation_cuts_tensors_wherever_they_stand_and_keeps_the_rest() -> None:
    p = problem()
    sgd, seen = optim.sgd(1.0), []

    def loss_fn(bound: Any, batch: Batch) -> tuple[Tensor, int]:
        seen.append((batch["io"]["x"].shape, batch["weights"][0].shape, batch["scale"], batch["none"]))
        return batch["scale"] * mse(bound, (batch["io"]["x"], batch["weights"][0])), len(seen)

    batch = {"io": {"x": p.batch[0]}, "weights": [p.batch[1]], "scale": 1.0, "none": None}
    step = train_step(p.model, loss_fn, sgd, accumulate=4, has_aux=True)
    adapters, _, metrics = step(p.params, p.adapters, sgd.init(p.adapters), batch)
    assert seen == [((2, 6), (2, 3), 1.0, None)] * 4
    assert metrics["aux"] == [1, 2, 3, 4]
    whole = train_step(p.model, mse, sgd)(p.params, p.adapters, sgd.init(p.adapters), p.batch)
    close(adapters, whole[0])


def test_what_accumulation_refuses() -> None:
    p = problem()
    state = ADAMW.init(p.adapters)
    for n in (0, -1, 1.0, True, "2"):
        with pytest.raises(ConfigError, match=rf"accumulate: expected a positive integer, got {n!r}"):
            train_step(p.model, mse, ADAMW, accumulate=n)  # type: ignore[arg-type]
    step = train_step(p.model, mse, ADAMW, accumulate=3)
    with pytest.raises(ConfigError, match=r"accumulate=3 does not divide .* shape \[8, 6\]"):
        step(p.params, p.adapters, state, p.batch)
    with pytest.raises(ConfigError, match=r"accumulate=3 does not divide .* shape \[\]"):
        step(p.params, p.adapters, state, (torch.ones(6, 6), torch.ones(())))
    with pytest.raises(ConfigError, match="accumulate=3: the batch, a object, has no tensor to split"):
        step(p.params, p.adapters, state, object())


@pytest.mark.parametrize("max_norm", [0.05, 1e3])
def test_clipping_is_torch_s(max_norm: float) -> None:
    p = problem()
    clipped = optim.chain(optim.clip_by_global_norm(max_norm), optim.sgd(0.1, momentum=0.9))
    adapters, _, losses = train(p, clipped, 5)
    expected, expected_losses = torch_train(p, lambda v: torch.optim.SGD(v, 0.1, momentum=0.9), 5, max_norm)
    close(adapters, expected)
    assert losses == pytest.approx(expected_losses, rel=1e-12)


def test_the_metric_is_the_norm_before_clipping() -> None:
    p = problem("dora")
    clipped = optim.chain(optim.clip_by_global_norm(1e-3), optim.sgd(0.1))
    metrics = train_step(p.model, mse, clipped)(p.params, p.adapters, clipped.init(p.adapters), p.batch)[2]
    assert metrics.keys() == {"loss", "grad_norm"}
    loss, grads = dense_grads(p)
    close(metrics["loss"], loss)
    close(metrics["grad_norm"], torch.cat([g.flatten() for g in leaves(grads)]).norm())


def test_autocast_in_the_loss() -> None:
    p = problem(dtype=torch.float32)

    def narrow(bound: Any, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = bound(batch[0])
            assert out.dtype is torch.bfloat16
        return (out.float() - batch[1]).square().mean()

    loss, grads = value_and_grad(narrow)(p.model, p.params, p.adapters, p.batch)
    assert {leaf.dtype for leaf in leaves((loss, grads))} == {torch.float32}
    expected, expected_grads = dense_grads(p)
    assert 0 < (loss - expected).abs() < 0.02 * expected
    for g, e in zip(leaves(grads), leaves(expected_grads), strict=True):
        assert (g - e).norm() < 0.03 * e.norm()
    adapters, _, losses = train(p, ADAMW, 20, narrow)
    assert {leaf.dtype for leaf in leaves(adapters)} == {torch.float32}
    assert losses[-1] < 0.9 * losses[0]


@every_kind
def test_a_bfloat16_base_with_float32_adapters(kind: str) -> None:
    p = problem(kind, torch.bfloat16)
    grads = value_and_grad(mse)(p.model, p.params, p.adapters, p.batch)[1]
    wide = optree.tree_map(lambda leaf: leaf.float(), (p.params, p.adapters, p.batch))
    expected = dense_grads(Problem(p.model, *wide))[1]
    for name, rule in p.adapters.items():
        dtype = torch.bfloat16 if isinstance(rule, Full) else torch.float32
        for leaf in rule.leaf_names:
            g, e = getattr(grads[name], leaf), getattr(expected[name], leaf)
            assert g.dtype is getattr(rule, leaf).dtype is dtype
            assert (g - e).norm() < 0.03 * e.norm()
    adapters, _, losses = train(p, ADAMW, 20)
    assert [leaf.dtype for leaf in leaves(adapters)] == [leaf.dtype for leaf in leaves(p.adapters)]
    assert losses[-1] < 0.9 * losses[0]


# --- the optimizers of others ----------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[Callable[[], Any], Callable[[list[Tensor]], torch.optim.Optimizer], float]] = {
    "adamw": (lambda: optim.adamw(0.01), lambda v: torch.optim.AdamW(v, 0.01), 1e-12),
    "sgd": (lambda: optim.sgd(0.05, momentum=0.9), lambda v: torch.optim.SGD(v, 0.05, momentum=0.9), 1e-12),
    # TorchOpt computes the bias correction of its Adam in float32.
    "torchopt-adam": (lambda: torchopt.adam(0.01), lambda v: torch.optim.Adam(v, 0.01), 2e-5),
    "torchopt-adamw": (lambda: torchopt.adamw(0.01), lambda v: torch.optim.AdamW(v, 0.01), 2e-5),
    "torchopt-sgd": (
        lambda: torchopt.sgd(0.05, momentum=0.9), lambda v: torch.optim.SGD(v, 0.05, momentum=0.9), 1e-12
    ),
    "torchopt-nesterov": (
        lambda: torchopt.sgd(0.02, momentum=0.9, nesterov=True),
        lambda v: torch.optim.SGD(v, 0.02, momentum=0.9, nesterov=True), 1e-12,
    ),
    "torchopt-rmsprop": (lambda: torchopt.rmsprop(0.01), lambda v: torch.optim.RMSprop(v, 0.01), 1e-12),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_are_those_of_torch(name: str, kind: str) -> None:
    p = problem(kind)
    ours, theirs, tolerance = OPTIMIZERS[name]
    adapters, _, losses = train(p, ours(), 20)
    expected, expected_losses = torch_train(p, theirs, 20)
    close(adapters, expected, tolerance)
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    assert losses[-1] < 0.9 * losses[0]


def test_a_chain_of_torchopt_clips_as_torch_does() -> None:
    p = problem()
    chained = torchopt.chain(torchopt.clip.clip_grad_norm(0.05), torchopt.sgd(0.1, momentum=0.9))
    adapters, _, _ = train(p, chained, 10)
    close(adapters, torch_train(p, lambda v: torch.optim.SGD(v, 0.1, momentum=0.9), 10, 0.05)[0], 1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_twenty_steps_are_those_of_peft(kind: str) -> None:
    p = problem(kind)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc1", "fc2"], use_dora=kind == "dora")
    wrapped: Any = peft.get_peft_model(copy.deepcopy(p.model), config)
    layers = {n.rpartition(".")[2]: m for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)}

    def factors(name: str) -> list[nn.Parameter]:
        layer = layers[name]
        magnitude = [layer.lora_magnitude_vector["default"].weight] if kind == "dora" else []
        return [layer.lora_A["default"].weight, layer.lora_B["default"].weight, *magnitude]

    for name in ("fc1", "fc2"):
        for theirs, ours in zip(factors(name), leaves(p.adapters[f"{name}.weight"]), strict=True):
            theirs.data = ours.clone()
    trainable = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert len(trainable) == len(leaves(p.adapters))
    optimizer, expected = torch.optim.AdamW(trainable, 0.02), []
    for _ in range(20):
        loss = mse(wrapped, p.batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    adapters, _, losses = train(p, optim.adamw(0.02), 20)
    assert losses == pytest.approx(expected, rel=1e-10)
    for name in ("fc1", "fc2"):
        close(adapters[f"{name}.weight"], [leaf.detach() for leaf in factors(name)], 1e-9)
    assert losses[-1] < 0.7 * losses[0]


# --- what is trained, and how ----------------------------------------------------------------------------------


def test_modules_to_save_and_biases_are_trained() -> None:
    model = Net().double()
    config = LoraConfig(r=2, target_modules=("fc1",), modules_to_save=("fc2",), bias="all")
    p = Problem(model, base_params(model), dict(init(model, config)), problem().batch)
    assert {n for n, rule in p.adapters.items() if isinstance(rule, Full)} == {"fc1.bias", "fc2.weight", "fc2.bias"}
    adapters, _, losses = train(p, optim.adamw(0.02), 20)
    expected, expected_losses = torch_train(p, lambda v: torch.optim.AdamW(v, 0.02), 20)
    close(adapters, expected)
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    assert all(not torch.equal(new, old) for new, old in zip(leaves(adapters), leaves(p.adapters), strict=True))


@every_kind
def test_training_through_activation_checkpoints(kind: str) -> None:
    p = problem(kind)
    recomputing = Net(recompute=True).double()
    same(train(p, ADAMW, 5), train(p._replace(model=recomputing), ADAMW, 5))


def test_dropout_through_activation_checkpoints() -> None:
    p = problem(rate=0.4, dropout=0.4)
    state, results = ADAMW.init(p.adapters), []
    for recompute in (False, True):
        model = Net(dropout=0.4, recompute=recompute).double()
        results.append(train_step(model, mse, ADAMW)(p.params, p.adapters, state, p.batch, seed=3))
    same(*results)


@pytest.mark.parametrize(("kind", "accumulate"), [("lora", 1), ("dora", 2)])
def test_compiled_steps_are_the_same_and_one_graph_serves_all(kind: str, accumulate: int) -> None:
    p = problem(kind)
    optimizer = optim.chain(optim.clip_by_global_norm(0.05), ADAMW)
    torch._dynamo.reset()
    counter = CompileCounter()
    step = train_step(p.model, mse, optimizer, accumulate=accumulate)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    adapters, state = p.adapters, optimizer.init(p.adapters)
    for _ in range(2):
        expected = step(p.params, adapters, state, p.batch)
        actual = compiled(p.params, adapters, state, p.batch)
        close(actual, expected)
        assert not any(leaf.requires_grad for leaf in leaves(actual))
        adapters, state, _ = actual
    other = Problem(p.model, *optree.tree_map(lambda leaf: 0.5 * leaf, p[1:]))
    close(compiled(*other[1:3], state, other.batch), step(*other[1:3], state, other.batch))
    assert counter.frame_count == 1


def test_trained_adapters_are_what_apply_takes() -> None:
    p = problem("dora")
    adapters, _, losses = train(p, ADAMW, 20)
    output = apply(p.model, p.params, adapters, p.batch[0])
    close(output, dense(p.params, adapters)(p.batch[0]))
    assert mse(lambda _: output, p.batch) < losses[-1] < losses[0]

"""Populations: every member goes its own way, as `train_step` would take it, and nobody else's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optree as _optree
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from funclora import (
    LoraConfig,
    Stack,
    base_params,
    init,
    optim,
    per_example_value_and_grad,
    population_step,
    stack,
    train_step,
    unstack,
    value_and_grad,
)
from funclora.errors import ArgumentError, ConfigError, UnsupportedError

optree: Any = _optree
F64 = torch.float64


class Net(nn.Module):
    def __init__(self, *, dropout: float = 0.0, recompute: str = "") -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 4)
        self.dropout = nn.Dropout(dropout)
        self.recompute = recompute

    def hidden(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.fc1(x)))

    def forward(self, x: Tensor) -> Tensor:
        h = (
            checkpoint(self.hidden, x, use_reentrant=self.recompute == "reentrant")
            if self.recompute
            else self.hidden(x)
        )
        return self.fc2(h)


def mse(bound: Any, batch: Any) -> Tensor:
    return (bound(batch[0]) - batch[1]).square().mean()


def member(model: nn.Module, seed: int, r: int, alpha: float, *, dora: bool = False, dropout: float = 0.0) -> Any:
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", use_dora=dora, lora_dropout=dropout,
                        init_lora_weights=False)  # fmt: skip
    torch.manual_seed(seed)
    return optree.tree_map(lambda x: (x + 0.1 * torch.randn_like(x)).to(F64), init(model, config))


def members_of(model: nn.Module, *, dropout: float = 0.0) -> list[Any]:
    return [
        member(model, 1, 1, 2, dropout=dropout), member(model, 2, 3, 1, dora=True, dropout=dropout),
        member(model, 3, 1, 5, dropout=dropout), member(model, 4, 2, 3, dropout=dropout),
        member(model, 5, 3, 2, dora=True, dropout=dropout),
    ]  # fmt: skip


def batches(n: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(9)
    return torch.randn(n, rows, 4, dtype=F64), torch.randn(n, rows, 4, dtype=F64)


def close(one: Any, other: Any, tolerance: float = 1e-11) -> None:
    first, second = optree.tree_leaves(one), optree.tree_leaves(other)
    assert len(first) == len(second) > 0
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def same(one: Any, other: Any) -> None:
    for x, y in zip(optree.tree_leaves(one), optree.tree_leaves(other), strict=True):
        assert torch.equal(x, y)


def in_order(members: Any, turned: bool) -> Any:
    """The members with B in memory as `[n_members, out, r]`, or as `[n_members, r, out]`."""

    def ordered(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT if turned else x.contiguous()

    groups = [
        {name: replace(rule, b=ordered(rule.b)) for name, rule in group.tree().items()} for group in members.groups
    ]
    return Stack(tuple(group.with_tree(tree) for group, tree in zip(members.groups, groups, strict=True)))


OPTIMIZERS: dict[str, Any] = {
    "adamw": (lambda lr, wd: optim.adamw(lr, weight_decay=wd), {"lr": [0.1, 0.02, 0.3, 0.05, 0.01],
                                                                "wd": [0.0, 0.1, 0.2, 0.3, 0.4]}),
    "sgd": (lambda lr: optim.sgd(lr, momentum=0.9), {"lr": [0.1, 0.02, 0.3, 0.05, 0.01]}),
    "clipped": (lambda norm: optim.chain(optim.clip_by_global_norm(norm), optim.sgd(0.5)),
                {"norm": [0.01, 0.1, 1.0, 10.0, 0.03]}),
    "warmup": (lambda lr: optim.adamw(optim.warmup_cosine(lr, 2, 5)), {"lr": [0.1, 0.02, 0.3, 0.05, 0.01]}),
}  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_member_goes_as_it_would_alone(name: str, shared: bool, accumulate: int) -> None:
    build, values = OPTIMIZERS[name]
    model = Net().to(F64)
    params, alone = base_params(model), members_of(model)
    everyone = batches(5)
    batch = tuple(x[0] for x in everyone) if shared else everyone
    optimizer = optim.per_member(build, **values)
    step = population_step(model, mse, optimizer, shared=shared, accumulate=accumulate)
    members = stack(alone)
    state = optimizer.init(members)
    history = []
    for _ in range(3):
        members, state, metrics = step(params, members, state, batch)
        history.append(metrics)
    for i, adapters in enumerate(alone):
        own = build(**{key: torch.tensor(value[i]) for key, value in values.items()})
        single, solo = train_step(model, mse, own, accumulate=accumulate), own.init(adapters)
        mine = tuple(x[0 if shared else i] for x in everyone)
        for metrics in history:
            adapters, solo, expected = single(params, adapters, solo, mine)  # noqa: PLW2901
            close(metrics["loss"][i], expected["loss"])
            close(metrics["grad_norm"][i], expected["grad_norm"])
            assert metrics["finite"][i]
        close(members[i], adapters, 1e-8 if name in ("adamw", "warmup") else 1e-11)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_order_in_memory_changes_no_bit(name: str) -> None:
    build, values = OPTIMIZERS[name]
    model = Net()
    params, batch = base_params(model), tuple(x.float() for x in batches(4))
    some = [*(member(model, i, 3, 2 + i) for i in range(3)), member(model, 4, 2, 3, dora=True)]
    alone = optree.tree_map(Tensor.float, some)
    optimizer = optim.per_member(build, **{key: value[:4] for key, value in values.items()})
    step = population_step(model, mse, optimizer)
    results = []
    for turned in (False, True):
        members = in_order(stack(alone), turned)
        state = optimizer.init(members)
        for _ in range(2):
            members, state, _ = step(params, members, state, batch)
            for group in members.groups:
                rules: Any = group.tree().values()
                for rule in rules:
                    assert rule.b.mT.is_contiguous() if len(group.members) > 1 else rule.b.is_contiguous()
        results.append((members, state))
    same(*results)


@pytest.mark.parametrize("model_dropout", [0.0, 0.4])
def test_dropout_of_a_seed_is_that_of_a_run_alone(model_dropout: float) -> None:
    model = Net(dropout=model_dropout).to(F64).train()
    params, alone, batch = base_params(model), members_of(model, dropout=0.3), batches(5)
    sgd = optim.sgd(0.1)
    seeds = [11, 5, 11, 3, 7]
    members, _, metrics = population_step(model, mse, sgd)(
        params, stack(alone), optim.per_member(lambda: sgd).init(stack(alone)), batch, seeds=seeds
    )
    for i, adapters in enumerate(alone):
        mine = tuple(x[i] for x in batch)
        after, _, expected = train_step(model, mse, sgd)(params, adapters, sgd.init(adapters), mine, seed=seeds[i])
        close(metrics["loss"][i], expected["loss"])
        close(members[i], after)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["data", "adapter"])
def test_a_broken_member_changes_no_other_by_a_bit(where: str, bad: float) -> None:
    model = Net().to(F64)
    params, alone = base_params(model), members_of(model)
    optimizer = optim.per_member(optim.adamw, lr=[0.1] * 5)

    def run(broken: bool) -> Any:
        batch, adapters = batches(5), list(alone)
        if broken and where == "data":
            batch[0][2, 1, 0] = bad
        elif broken:
            adapters[2] = optree.tree_map(lambda x: torch.full_like(x, bad), adapters[2])
        members = stack(adapters)
        state, step = optimizer.init(members), population_step(model, mse, optimizer)
        metrics: dict[str, Any] = {}
        for _ in range(2):
            members, state, metrics = step(params, members, state, batch)
        return members, state, metrics

    (healthy, state, metrics), (broken, other_state, other) = run(False), run(True)
    assert metrics["finite"].tolist() == [True] * 5
    assert other["finite"].tolist() == [True, True, False, True, True]
    for i in (0, 1, 3, 4):
        same(healthy[i], broken[i])
        same(state[i], other_state[i])
        assert torch.equal(metrics["loss"][i], other["loss"][i])


def test_members_come_and_go_between_steps() -> None:
    model = Net().to(F64)
    params, alone, batch = base_params(model), members_of(model), batches(5)
    optimizer = optim.per_member(optim.adamw, lr=[0.1, 0.2, 0.03, 0.04, 0.05])
    step = population_step(model, mse, optimizer)
    members = stack(alone)
    members, state, _ = step(params, members, optimizer.init(members), batch)
    full = step(params, members, state, batch)
    kept = [3, 0, 4, 1]
    some, part, _ = step(params, members[kept], state[kept], tuple(x[kept] for x in batch))
    for k, i in enumerate(kept):
        close(some[k], full[0][i], 1e-9)
        close(part[k], full[1][i], 1e-9)
    fresh = member(model, 8, 2, 3)
    late = optim.per_member(optim.adamw, lr=[0.5])
    more, more_state = stack([fresh, *members]), stack([*late.init(stack([fresh])), *state])
    grown = step(params, more, more_state, tuple(x[[0, 0, 1, 2, 3, 4]] for x in batch))
    for i in range(5):
        close(grown[0][i + 1], full[0][i], 1e-9)
    with pytest.raises(ConfigError, match="state"):
        step(params, members[:4], state, tuple(x[:4] for x in batch))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("recompute", ["plain"])
def test_checkpointing_gives_the_same(recompute: str) -> None:
    plain, model = Net().to(F64), Net(recompute=recompute).to(F64)
    model.load_state_dict(plain.state_dict())

    alone, batch = members_of(plain), batches(5)
    sgd = optim.per_member(lambda: optim.sgd(0.1))
    results = [
        population_step(each, mse, sgd)(base_params(plain), stack(alone), sgd.init(stack(alone)), batch)[0]
        for each in (plain, model)
    ]
    close(results[0], results[1])


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.conv(x.unflatten(1, (2, 2)).repeat_interleave(2, -1))).flatten(1))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", [Net, Conv])
def test_per_example_gradients_are_those_of_a_loop(kind: Any, dora: bool) -> None:
    model = kind().to(F64)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[n for n, m in model.named_children() if n != "dropout"],
                        use_dora=dora, init_lora_weights=False)  # fmt: skip
    adapters = optree.tree_map(lambda x: x + 0.1 * torch.randn_like(x), init(model, config))
    params, (x, y) = base_params(model), (part[0] for part in batches(1, 5))
    losses, grads = per_example_value_and_grad(mse)(model, params, adapters, (x, y))
    for i in range(5):
        loss, expected = value_and_grad(mse)(model, params, adapters, (x[i : i + 1], y[i : i + 1]))
        close(losses[i], loss)
        close(optree.tree_map(lambda g: g[i], grads), expected)  # noqa: B023
    if kind is Net:
        mapped, _ = torch.func.vmap(
            lambda a, b: torch.func.grad(lambda t: value_free(model, params, t, a, b), has_aux=True)(adapters)
        )(x, y)
        close(grads, mapped)


def value_free(model: nn.Module, params: Any, adapters: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    from funclora import apply

    loss = (apply(model, params, adapters, x[None]) - y[None]).square().mean()
    return loss, loss


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_per_example_gradients_of_a_checkpointed_transformer() -> None:
    from cases import llama

    model = llama().to(F64).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapters = optree.tree_map(lambda x: x.to(F64) + 0.1, init(model, config))
    ids = torch.arange(12).reshape(3, 4)  # as many positions as there are rows, and one more

    def loss(bound: Any, ids: Tensor) -> Tensor:
        return bound(input_ids=ids, use_cache=False).logits.square().mean()

    for batch in (ids, ids[:, :3]):
        losses, grads = per_example_value_and_grad(loss)(model, base_params(model), adapters, batch)
        for i in range(3):
            one, expected = value_and_grad(loss)(model, base_params(model), adapters, batch[i : i + 1])
            close(losses[i], one)
            close(optree.tree_map(lambda g: g[i], grads), expected, 1e-9)  # noqa: B023


class Bad(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm = nn.BatchNorm1d(4)
        self.table = nn.Parameter(torch.ones(20, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.how == "loss":
            return y.mean()
        if self.how == "flip":
            return y.flip(0)
        if self.how == "norm":
            return self.norm(y)
        if self.how == "table":
            return self.table  # as many rows as the population has, none of which is anybody's
        return y - y.mean(0)

    def method(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).flip(0))


@pytest.mark.parametrize("how", ["loss", "flip", "norm", "table", "mean"])
def test_models_that_join_members_raise(how: str) -> None:
    model = Bad(how).to(F64).train()
    alone = [member(model, i, 1, 2) for i in range(5)]
    sgd = optim.per_member(lambda: optim.sgd(0.1))
    with pytest.raises(UnsupportedError, match="rows"):
        population_step(model, mse, sgd)(base_params(model), stack(alone), sgd.init(stack(alone)), batches(5))


def test_methods_that_join_members_raise() -> None:
    model = Bad("").to(F64)
    alone = [member(model, i, 1, 2) for i in range(5)]
    sgd = optim.per_member(lambda: optim.sgd(0.1))
    with pytest.raises(UnsupportedError, match="does not hold the rows of each member in order"):
        population_step(model, lambda bound, batch: bound.method(batch[0]).mean(), sgd)(
            base_params(model), stack(alone), sgd.init(stack(alone)), batches(5)
        )


def test_what_does_not_fit_the_population_raises() -> None:
    model = Net().to(F64)
    params, members = base_params(model), stack(members_of(model))
    sgd = optim.per_member(lambda: optim.sgd(0.1))
    state, step, batch = sgd.init(members), population_step(model, mse, sgd), batches(5)
    with pytest.raises(ConfigError, match="for 4 members"):
        step(params, members, state, tuple(x[:4] for x in batch))
    with pytest.raises(ConfigError, match="agree"):
        step(params, members, state, (batch[0], batch[1][:4]))
    with pytest.raises(ConfigError, match="seeds"):
        step(params, members, state, batch, seeds=[1, 2])
    with pytest.raises(ArgumentError, match="stack"):
        step(params, members[0], state, batch)
    with pytest.raises(ConfigError, match="scalar"):
        population_step(model, lambda bound, b: bound(b[0]), sgd)(params, members, state, batch)
    with pytest.raises(ConfigError, match="does not divide"):
        population_step(model, mse, sgd, accumulate=3)(params, members, state, batch)
    with pytest.raises(ConfigError, match="without dimensions"):
        population_step(model, lambda bound, b: bound(b[0][0, 0]).mean(), sgd)(params, members, state, batch)
    with pytest.raises(ConfigError, match="lr"):
        optim.per_member(optim.sgd, lr=[0.1]).init(members)
    assert isinstance(members, Stack)
    assert len(unstack(members)) == 5

"""Populations whose members have different numbers of rows or tokens, and outputs that are not rows first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree as _optree
import pytest
import torch
import torch.nn.functional as F
from oracle import close
from torch import Tensor, nn

import funclora as fl
from funclora.errors import ConfigError, UnsupportedError

optree: Any = _optree
IDS = [2, 0, 1, 0]
TOKENS = [[0, 0, 2, 2, 2, 1], [1, 1, 1, 0, 0, -1]]


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(4, 6), nn.Linear(6, 3), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.dropout(self.fc1(x).tanh()))
        return out


def setup(dropout: float = 0.0, own: float = 0.0) -> tuple[Net, Any, list[Any]]:
    torch.manual_seed(0)
    model = Net(dropout).double().train()
    members = []
    for seed, r in enumerate((2, 1, 3)):
        config = fl.LoraConfig(r=r, target_modules="all-linear", use_dora=seed == 1, lora_dropout=own,
                               init_lora_weights=False)  # fmt: skip
        adapters: Any = fl.init(model, config)
        members.append(optree.tree_map(Tensor.double, adapters))
    return model, fl.base_params(model), members


def masked(bound: Any, x: Tensor, mine: Tensor) -> Tensor:
    y = bound(x).square().sum(-1)
    return torch.where(mine.view(*mine.shape, *[1] * (y.dim() - mine.dim())), y, 0.0).sum()


def own_rows(ids: list[Any], member: int) -> Callable[[Tensor], Tensor]:
    """The rows or tokens of a member as rows of their own."""
    return lambda x: x[torch.tensor(ids) == member]


def step_of_each(
    members: list[Any], seeds: Any = None, dropout: float = 0.0, own: float = 0.0, ids: list[Any] = IDS, **options: Any
) -> tuple[Any, list[Any]]:
    """What a population makes of the rows of all members, and what each member makes of its own."""
    model, params, _ = setup(dropout, own)
    x = torch.randn(len(ids), 6, 4, dtype=torch.float64)
    sgd = fl.optim.sgd(0.1)
    stack = fl.stack(members)
    step = fl.population_step(model, masked, sgd, **options)
    together = step(params, stack, fl.optim.per_member(lambda: sgd).init(stack), x, ids=ids, seeds=seeds)
    alone = []
    for i, member in enumerate(members):
        single = fl.train_step(model, lambda bound, x: bound(x).square().sum(), sgd)
        mine = own_rows(ids, i)(x)
        alone.append(single(params, member, sgd.init(member), mine, seed=None if seeds is None else seeds[i]))
    return together, alone


@pytest.mark.parametrize("ids", [IDS, TOKENS], ids=["rows", "tokens"])
def test_each_member_trains_on_its_own_rows_or_tokens(ids: list[Any]) -> None:
    (after, _, metrics), alone = step_of_each(setup()[2], ids=ids)
    for i, (wanted, _, expected) in enumerate(alone):
        close(after[i], wanted, 1e-10)
        close(metrics["loss"][i], expected["loss"], 1e-10)
        close(metrics["grad_norm"][i], expected["grad_norm"], 1e-10)


@pytest.mark.parametrize("ids", [IDS, TOKENS], ids=["rows", "tokens"])
def test_micro_batches_have_their_own_ids(ids: list[Any]) -> None:
    (_, _, metrics), alone = step_of_each(setup()[2], ids=ids, accumulate=2)
    for i, (_, _, expected) in enumerate(alone):  # the mean over micro-batches of sums: half of the sum
        close(metrics["loss"][i], expected["loss"] / 2, 1e-10)
        close(metrics["grad_norm"][i], expected["grad_norm"] / 2, 1e-10)
    with pytest.raises(ConfigError, match="does not divide"):
        step_of_each(setup()[2], ids=ids, accumulate=3)


def test_the_mean_over_micro_batches_counts_the_tokens_of_each_member() -> None:
    model, params, members = setup()
    x, ids, sgd = torch.randn(2, 6, 4, dtype=torch.float64), torch.tensor(TOKENS), fl.optim.sgd(0.1)

    def loss(bound: Any, batch: Any, mine: Tensor) -> Tensor:
        return masked(bound, batch[0], mine) / mine.sum()  # NaN for a member without tokens in the micro-batch

    def count(batch: Any) -> Tensor:
        return (batch[1] == torch.arange(3)[:, None, None]).sum((1, 2))

    stack = fl.stack(members)
    state = fl.optim.per_member(lambda: sgd).init(stack)
    step = fl.population_step(model, loss, sgd, accumulate=2, reduce=fl.distributed.mean(count))
    after, _, metrics = step(params, stack, state, (x, ids), ids=ids)
    for i, member in enumerate(members):
        single = fl.train_step(model, lambda bound, x: bound(x).square().sum(-1).mean(), sgd)
        wanted, _, expected = single(params, member, sgd.init(member), own_rows(TOKENS, i)(x))
        close(metrics["loss"][i], expected["loss"], 1e-10)
        close(after[i], wanted, 1e-10)


@pytest.mark.parametrize(("dropout", "own"), [(0.5, 0.0), (0.0, 0.4)])
def test_seeds_of_packed_tokens_are_those_of_runs_alone(dropout: float, own: float) -> None:
    tokens = [[0, 0, 2, 2, 2, 1], [1, 1, 1, -1, -1, -1]]  # one sequence each
    members = setup(own=own)[2]
    (after, _, metrics), alone = step_of_each(members, [5, 3, 8], dropout, own, tokens)
    for i, (wanted, _, expected) in enumerate(alone):
        close(metrics["loss"][i], expected["loss"], 1e-10)
        close(after[i], wanted, 1e-10)
    other = step_of_each(members, [5, 4, 8], dropout, own, tokens)[0][2]["loss"]
    assert (other == metrics["loss"]).tolist() == [True, False, True]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_single_member_has_its_seed_too(dropout: float) -> None:
    model, params, members = setup(dropout, 0.4)
    sgd, x = fl.optim.sgd(0.1), torch.randn(2, 6, 4, dtype=torch.float64)
    stack = fl.stack(members[:1])
    state = fl.optim.per_member(lambda: sgd).init(stack)
    before = torch.get_rng_state()
    after, _, _ = fl.population_step(model, lambda bound, x: bound(x).square().sum(), sgd)(
        params, stack, state, x[None], seeds=[7]
    )
    single = fl.train_step(model, lambda bound, x: bound(x).square().sum(), sgd)
    close(after[0], single(params, members[0], sgd.init(members[0]), x, seed=7)[0], 1e-10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("ids", [IDS, TOKENS], ids=["rows", "tokens"])
@pytest.mark.parametrize(("dropout", "own"), [(0.5, 0.0), (0.0, 0.5)])
def test_dropout_without_seeds_keeps_the_mean_and_draws_for_each_position(
    dropout: float, own: float, ids: list[Any]
) -> None:
    model, params, members = setup(dropout, own)
    members = [{"fc2.weight": member["fc2.weight"]} for member in members]  # after the tanh the mean would be another
    x = torch.ones(len(ids), 6, 4, dtype=torch.float64)
    torch.manual_seed(1)
    bound = fl.bind(model, params, fl.route(fl.stack(members), ids))
    draws = torch.stack([bound(x) for _ in range(800)])
    mean, spread = draws.mean(0), draws.std(0) / 800**0.5
    model.eval()
    wanted = fl.apply(model, params, fl.route(fl.stack(members), ids), x)
    used = torch.tensor(ids) >= 0
    where = used.view(*used.shape, *[1] * (x.dim() - used.dim())).expand(wanted.shape)
    assert ((mean - wanted).abs() <= 5 * spread + 1e-9)[where].all()
    first = (draws - mean)[:, 0]  # positions of one row are independent
    together = first[:, 0, 0] * first[:, 1, 0]
    assert together.mean().abs() < 5 * together.std() / 800**0.5 + 1e-12
    assert (first[:, 0] != first[:, 1]).any()


def test_gradients_of_weights_by_token_are_those_of_each_token_alone() -> None:
    model, params, members = setup()
    stack, x = fl.stack(members), torch.randn(2, 3, 4, dtype=torch.float64)
    weights = torch.rand(2, 3, 3, dtype=torch.float64).requires_grad_()
    found = fl.apply(model, params, fl.route(stack, weights=weights), x)
    (gradient,) = torch.autograd.grad(found.square().sum(), weights)
    for row in range(2):
        for token in range(3):
            own = weights[row, token].detach().requires_grad_()
            alone = fl.apply(model, params, fl.route(stack, weights=own[None]), x[row : row + 1, token : token + 1])
            close(found[row, token], alone[0, 0], 1e-10)
            close(gradient[row, token], torch.autograd.grad(alone.square().sum(), own)[0], 1e-9)


def test_value_and_grad_of_packed_tokens_are_those_of_each_sequence_alone() -> None:
    model, params, members = setup()
    members = [members[0], fl.algebra.scale(members[0], 0.5), fl.algebra.scale(members[0], -1.0)]
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    gradient = fl.value_and_grad(lambda bound, x, used: (bound(x).square().sum(-1) * used).sum())
    used = torch.tensor(TOKENS) >= 0
    loss, grads = gradient(model, params, fl.route(fl.stack(members), TOKENS), x, used)
    alone = [gradient(model, params, m, own_rows(TOKENS, i)(x), 1.0) for i, m in enumerate(members)]
    close(loss, sum(each for each, _ in alone), 1e-10)
    for name, routed in grads.items():
        for leaf in ("a", "b"):
            found = torch.cat([getattr(rule, leaf) for rule in routed.rules])  # type: ignore[attr-defined]
            close(found, torch.stack([getattr(own[name], leaf) for _, own in alone]), 1e-10)


# --- outputs ----------------------------------------------------------------------------------------------------


class Several(Net):
    """Outputs with rows first, with rows second, with several positions for each row, and that compare rows."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"rows": y, "second": y.transpose(0, 1), "patches": y.flatten(0, 1), "compared": y[:, 0] @ y[:, 0].T,
                "last": (y[:, 0].T, 3)}  # fmt: skip


@pytest.mark.parametrize("name", ["rows", "second", "patches", "last"])
def test_outputs_hold_the_rows_of_each_member_in_any_dimension(name: str) -> None:
    _, _, members = setup()
    model = Several().double()
    params, x = fl.base_params(model), torch.randn(3, 2, 5, 4, dtype=torch.float64)

    def loss(bound: Any, x: Tensor) -> Tensor:
        y = bound(x)[name]
        y = y[0] if name == "last" else y
        return (y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum()

    sgd, stack = fl.optim.sgd(0.1), fl.stack(members)
    state = fl.optim.per_member(lambda: sgd).init(stack)
    after, _, metrics = fl.population_step(model, loss, sgd)(params, stack, state, x)
    for i, member in enumerate(members):
        wanted, _, alone = fl.train_step(model, loss, sgd)(params, member, sgd.init(member), x[i])
        close(metrics["loss"][i], alone["loss"], 1e-10)
        close(after[i], wanted, 1e-10)


@pytest.mark.parametrize("use", [torch.sum, lambda y: y.mean(), lambda y: (y + 1).sum(), lambda y: y[0].sum()])
def test_an_output_that_compares_the_rows_of_members_is_refused_where_it_is_used(use: Any) -> None:
    _, _, members = setup()
    model = Several().double()
    sgd, stack, x = fl.optim.sgd(0.1), fl.stack(members), torch.ones(3, 2, 5, 4).double()
    step = fl.population_step(model, lambda bound, x: use(bound(x)["compared"]), sgd)
    with pytest.raises(UnsupportedError, match=r"whose rows matmul|does not hold the rows"):
        step(fl.base_params(model), stack, fl.optim.per_member(lambda: sgd).init(stack), x)


class Pictures(Net):
    """Two inputs with different first dimensions: texts, and the patches of pictures, with the sizes of these."""

    def forward(self, x: Tensor, patches: Tensor, sizes: Tensor) -> Tensor:  # type: ignore[override]
        y = super().forward(x)
        seen = F.linear(patches, self.fc1.weight).tanh()
        starts = sizes.flatten().cumsum(0) - sizes.flatten()
        return y + torch.stack([seen[s] for s in starts.tolist()])[:, None, :3]


def test_inputs_may_count_something_else_than_rows() -> None:
    _, _, members = setup()
    model = Pictures().double()
    params = fl.base_params(model)
    x, patches = torch.randn(3, 2, 5, 4).double(), torch.randn(3, 7, 4).double()
    sizes = torch.tensor([[[3], [4]], [[5], [2]], [[1], [6]]])
    sgd, stack = fl.optim.sgd(0.1), fl.stack(members)
    state = fl.optim.per_member(lambda: sgd).init(stack)

    def loss(bound: Any, batch: Any) -> Tensor:
        out: Tensor = bound(*batch).square().mean()
        return out

    step = fl.population_step(model, loss, sgd, rows_of={"sizes": None})
    after, _, _ = step(params, stack, state, (x, patches, sizes))
    for i, member in enumerate(members):
        mine = (x[i], patches[i], sizes[i])
        close(after[i], fl.train_step(model, loss, sgd)(params, member, sgd.init(member), mine)[0], 1e-10)
    wrong: Any = {"sizes": 0}
    with pytest.raises(ConfigError, match="expected None for each name"):
        fl.population_step(model, loss, sgd, rows_of=wrong)(params, stack, state, (x, patches, sizes))
    shared = fl.population_step(model, loss, sgd, shared=True)
    with pytest.raises(ConfigError, match="which all members share"):
        shared(params, stack, state, (x[0], patches[0], sizes[0]))


class Packed(Net):
    """Attention over the tokens of all rows in one sequence, as in towers for pictures of different sizes."""

    def forward(self, x: Tensor, blocks: Tensor | None = None) -> Tensor:
        y = self.fc1(x).flatten(0, 1)[None]
        out: Tensor = self.fc2(F.scaled_dot_product_attention(y, y, y, attn_mask=blocks)).view(*x.shape[:2], 3)
        return out


@pytest.mark.parametrize("additive", [False, True])
def test_attention_over_all_rows_needs_a_mask_that_keeps_members_apart(additive: bool) -> None:
    _, _, members = setup()
    model = Packed().double()
    params, x = fl.base_params(model), torch.randn(3, 2, 5, 4, dtype=torch.float64)
    sgd, stack = fl.optim.sgd(0.1), fl.stack(members)
    state = fl.optim.per_member(lambda: sgd).init(stack)

    def step(blocks: Tensor | None) -> Any:
        if additive and blocks is not None:
            blocks = torch.where(blocks, 0.0, float("-inf"))
        run = fl.population_step(model, lambda bound, x: bound(x, blocks).square().sum(), sgd)
        return run(params, stack, state, x)

    rows = torch.arange(3 * 2).repeat_interleave(5)
    of_members = torch.arange(3).repeat_interleave(10)
    after, _, _ = step(of_members == of_members[:, None])
    for i, member in enumerate(members):
        single = fl.train_step(model, lambda bound, x: bound(x).square().sum(), sgd)
        close(after[i], single(params, member, sgd.init(member), x[i])[0], 1e-9)
    step(rows == rows[:, None])
    leaking = of_members == of_members[:, None]
    leaking[29, 0] = True
    for blocks in (None, leaking):
        with pytest.raises(UnsupportedError, match="scaled_dot_product_attention"):
            step(blocks)

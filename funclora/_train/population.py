"""Training many adapters at once: one forward and one backward pass for a whole stack.

A loss is written for one adapter. It runs under `torch.func.vmap` over the members. In every call of the model, the
inputs of all members become the rows of one ordinary batch, routed to their adapters. So the base weights are used
once for all members, attention kernels and activation checkpointing work as usual, and the loss needs no change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import optree
import torch
from torch import Tensor, nn

from funclora._api.arguments import check_integer, check_model, check_numbers, check_params
from funclora._bind.checks import unwritten
from funclora._many.stack import Group, Stack, TreeSpecs, check_stack
from funclora._tracking.tensor import streams
from funclora._train.members import BatchedModel, MemberModel, MixedModel, Population
from funclora._train.step import LossFn, autograd, averaged, check_bindable, checked_loss, micro_batches, micro_seeds
from funclora.distributed._mean import Mean
from funclora.errors import ConfigError
from funclora.optim import per_member
from funclora.optim._members import MemberTransformation, Optimizer, check_optimizer, step_of
from funclora.rules.base import Adapters, Params, Rule


def population_step(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    has_aux: bool = False,
    accumulate: int = 1,
    shared: bool = False,
    reduce: Mean | None = None,
    rows_of: Mapping[str, None] | None = None,
) -> Callable[..., tuple[Population, Any, dict[str, Any]]]:
    """One step of training for every member of a stack, as a pure function: `train_step` for populations.

    Each member trains exactly as if alone, up to rounding: its loss, gradient norm, clipping and optimizer do not
    depend on the others. A loss that is NaN or infinite changes no other member.

    Args:
        model: the module that defines the computation; never changed.
        loss_fn: `loss_fn(bound, batch)` for one member, as for `train_step`. It runs under `torch.func.vmap`; calls of
            the bound model inside run on the rows of all members together. What the first dimension of their tensors
            counts, examples or patches of pictures, is the same number for each member, and the loss must be computed
            outside of the model.
        optimizer: a pair of functions `init(params)` and `update(grads, state, params=...)`, used for each member
            separately; `optim.per_member` gives each member its own hyperparameters.
        has_aux: whether `loss_fn` returns anything besides the loss.
        accumulate: number of micro-batches, as for `train_step`.
        shared: all members see the same batch, of tensors `[n_rows, *]`.
        reduce: `distributed.mean()`: the mean over the micro-batches of all processes, as for `train_step`.
        rows_of: names of inputs of the model that no adapted layer reads by row, such as the sizes of pictures, each
            with None, as for `route`.

    Returns:
        `step(params, stack, state, batch, *, seeds=None, ids=None) -> (stack, state, metrics)`, where `state` starts
        as `per_member(...).init(stack)`, and the tensors of the batch are `[n_members, n_rows, *]` unless `shared`.
        With `seeds`, one int for each member, its dropout is that of `train_step` with that seed. With ids `[n_rows]`
        or `[n_rows, n_tokens]`, as for `route`, members have different numbers of rows, or of tokens in packed rows.
        The batch is then one for all, of tensors `[n_rows, *]`. Every row or token is read by the adapter of its
        member, the model runs once for each micro-batch, and the loss is `loss_fn(bound, batch, mine)`, where `mine` is
        true for the member's rows or tokens, in the shape of ids; it must depend on the outputs at no others. With
        `seeds`, each member then draws dropout for its own positions. Metrics: "loss",
        "grad_norm" and "finite" (whether both are), `[n_members]` each, and "aux" with `has_aux`. The state is a
        stack: use `stack[kept], state[kept]` to continue with some of the members, in this order.

    Raises:
        ConfigError: the batch or the seeds do not match the stack, or the loss is not a scalar.
        UnsupportedError: the model mixes rows, so members cannot be separated.

    Examples:
        >>> import funclora as fl
        >>> model, params = nn.Linear(2, 1, bias=False), {"weight": torch.zeros(1, 2)}
        >>> members = fl.stack([{"weight": fl.LoRA(torch.ones(r, 2), torch.zeros(1, r))} for r in (1, 2)])
        >>> sgd = fl.optim.per_member(lambda lr: fl.optim.sgd(lr), lr=[0.1, 0.2])
        >>> step = population_step(model, lambda bound, x: ((bound(x) - 1) ** 2).mean(), sgd)
        >>> members, state, metrics = step(params, members, sgd.init(members), torch.ones(2, 3, 2))
        >>> metrics["loss"].tolist(), [round(m["weight"].b[0, 0].item(), 3) for m in members]
        ([1.0, 1.0], [0.4, 0.8])
    """
    check_model(model)
    check_optimizer(optimizer)
    by_member = optimizer if isinstance(optimizer, MemberTransformation) else per_member(lambda: optimizer)
    optimized = step_of(by_member)
    loss_fn = checked_loss(loss_fn, has_aux)

    def step(
        params: Params,
        members: Population,
        state: Any,
        batch: Any,
        *,
        seeds: Sequence[int] | None = None,
        ids: Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    ) -> tuple[Population, Any, dict[str, Any]]:
        check_params(params)
        if seeds is not None and torch.compiler.is_compiling():
            raise ConfigError(
                "population_step: seeds: torch.compile cannot trace generators. Compile the step without seeds, or set "
                "torch.manual_seed before it."
            )
        dim = None if shared or ids is not None else 0
        check_members("population_step", members, batch, None if batch is None and reduce else dim)
        every = micro_generators(seeds, members, accumulate, reduce)
        members = members.with_leaves([leaf.detach() for leaf in members.leaves()])
        if not torch.compiler.is_compiling():  # which would compile again for the order of the second step
            members = Stack(tuple(group.in_product_order() for group in members.groups))
        batches = micro_batches(batch, accumulate, dim=1 if dim == 0 else 0, reduce=reduce)
        packed = micro_ids(ids, accumulate)
        parts = [
            _value_and_grad(loss_fn, model, params, members, part, dim, generators, own, rows_of)
            for part, generators, own in zip(batches, every, packed, strict=False)
        ]
        aux = [aux for _, aux, _ in parts]
        loss, grads = averaged([(loss, grads) for loss, _, grads in parts], batches, members, reduce)
        del parts
        with torch.no_grad():
            norm = grads.in_order(torch.cat([_norms(group.values) for group in grads.groups]))
            members, state = optimized(members, grads, state)
        metrics = {"loss": loss, "grad_norm": norm, "finite": loss.isfinite() & norm.isfinite()}
        if has_aux:
            metrics["aux"] = aux[0] if len(aux) == accumulate == 1 else aux
        return members, state, metrics

    return step


def per_example_value_and_grad(loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., tuple[Any, dict[str, Rule]]]:
    """The loss and the gradient of every example of a batch.

    Each example gets a copy of the adapters, and one ordinary backward pass gives all gradients. This also works with
    activation checkpointing and attention kernels, where `vmap(grad)` does not.

    Args:
        loss_fn: `loss_fn(bound, batch)`, given the bound model and one example as a batch of one, `[1, *]`. The
            restrictions are the same as in `population_step`.
        has_aux: whether `loss_fn` returns anything besides the loss.

    Returns:
        A function `(model, params, adapters, batch) -> (losses, grads)`, or `((losses, aux), grads)` with `has_aux`.
        The batch's tensors are `[n_examples, *]`, losses `[n_examples]`, and grads have the structure of the adapters
        with leaves `[n_examples, *]`.

    Raises:
        ConfigError: when called, if the loss is not a scalar tensor or the batch contains no tensors.
        UnsupportedError: the model mixes rows.

    Examples:
        >>> from funclora import LoRA
        >>> adapters = {"weight": LoRA(torch.ones(1, 2), torch.zeros(1, 1))}
        >>> model, params = nn.Linear(2, 1, bias=False), {"weight": torch.zeros(1, 2)}
        >>> grad = per_example_value_and_grad(lambda bound, x: bound(x).sum())
        >>> losses, grads = grad(model, params, adapters, torch.tensor([[1.0, 0.0], [2.0, 2.0]]))
        >>> grads["weight"].b.flatten().tolist()
        [1.0, 4.0]
    """
    loss_fn = checked_loss(loss_fn, has_aux)

    def run(model: nn.Module, params: Params, adapters: Adapters, batch: Any) -> tuple[Any, dict[str, Rule]]:
        check_bindable(model, params, adapters)
        tree: Any = dict(adapters)
        leaves, spec = optree.tree_flatten(tree)
        n = batch_size(batch, 0, "per_example_value_and_grad")
        copies = tuple(leaf.detach().expand(n, *leaf.shape) for leaf in leaves)
        members: Population = Stack((Group(copies, TreeSpecs((spec,) * n), tuple(range(n))),))
        examples = optree.tree_map(lambda x: x.unsqueeze(1) if isinstance(x, Tensor) else x, batch)
        losses, aux, grads = _value_and_grad(loss_fn, model, params, members, examples, 0, None)
        by_example: dict[str, Rule] = grads.groups[0].tree()
        return ((losses, aux) if has_aux else losses), by_example

    return run


def _value_and_grad(
    loss_fn: LossFn,
    model: nn.Module,
    params: Params,
    members: Population,
    batch: Any,
    dim: int | None,
    generators: list[torch.Generator] | None,
    ids: Any = None,
    rows_of: Mapping[str, None] | None = None,
) -> tuple[Tensor, Any, Population]:
    """Losses `[n_members]`, aux, and the gradients of all members."""
    params = {name: tensor.detach() for name, tensor in params.items()}

    def losses_and_aux(members: Population) -> tuple[Tensor, Any]:
        if ids is None:
            rows = BatchedModel(model, params, members, rows_of)
        else:
            rows = MixedModel(model, params, members, rows_of, ids)
        mine = (rows.mine(),) if isinstance(rows, MixedModel) else ()

        def one(member: Tensor, batch: Any, *mine: Tensor) -> tuple[Tensor, Any]:
            return loss_fn(MemberModel(rows, member), batch, *mine)  # type: ignore[no-any-return]

        dims = (0, batch_dims(batch, dim), *[0] * len(mine))
        by_member = torch.func.vmap(one, in_dims=dims, randomness="different")
        if torch.compiler.is_compiling():  # a graph has no versions to compare
            losses, aux = by_member(torch.arange(len(members)), batch, *mine)
        else:
            with drawing(generators, rows.owners), unwritten(params, {}):
                losses, aux = by_member(torch.arange(len(members)), batch, *mine)
        return losses.sum(), (losses.detach(), aux)

    if torch.compiler.is_compiling():

        def of_leaves(leaves: list[Tensor]) -> tuple[Tensor, Any]:
            return losses_and_aux(members.with_leaves(leaves))

        found, (_, (losses, aux)) = torch.func.grad_and_value(of_leaves, has_aux=True)(members.leaves())
        return losses, aux, members.with_leaves(found)
    _, (losses, aux), grads = autograd(losses_and_aux, members, whole=ids is None)
    return losses, aux, grads


@contextlib.contextmanager
def drawing(generators: list[torch.Generator] | None, owners: Sequence[int]) -> Iterator[None]:
    """Draw the randomness of the model from one generator for each member.

    Args:
        generators: those of the members; None for the global ones.
        owners: the member of each owner; -1 for the base model.
    """
    if generators is None or len(owners) > 1:
        with streams(generators and [generators[i] if i >= 0 else None for i in owners]):
            yield
        return
    if owners[0] < 0:
        yield
        return
    own = generators[owners[0]]  # the rows of a single member are not tracked
    device = own.device
    common = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        common.set_state(own.get_state())
        try:
            yield
        finally:
            own.set_state(common.get_state())


def _norms(leaves: Sequence[Tensor]) -> Tensor:
    """The norms of members whose leaves are `[m, *]`, in float32 at least: `[m]`."""
    dtypes = [torch.promote_types(x.dtype, torch.float32) for x in leaves]
    norms = [
        torch.linalg.vector_norm(x.unsqueeze(-1), dim=tuple(range(1, x.dim() + 1)), dtype=dtype).to(leaves[0].device)
        for x, dtype in zip(leaves, dtypes, strict=True)
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return norm


def batch_dims(batch: Any, dim: int | None) -> Any:
    return optree.tree_map(lambda x: dim if isinstance(x, Tensor) else None, batch)


def batch_size(batch: Any, dim: int, where: str) -> int:
    sizes = {x.shape[dim] if x.dim() > dim else None for x in optree.tree_leaves(batch) if isinstance(x, Tensor)}
    if len(sizes) != 1 or None in sizes:
        found = sorted(str(s) for s in sizes) or "none"
        raise ConfigError(f"{where}: the batch's tensors must agree in their dimension {dim}; found {found}.")
    return sizes.pop()  # type: ignore[return-value]


def check_members(where: str, members: Any, batch: Any, dim: int | None) -> None:
    check_stack(members)
    n = len(members) if dim is None else batch_size(batch, dim, where)
    if n != len(members):
        raise ConfigError(
            f"{where}: the batch is for {n} members, but the stack has {len(members)}. Tensors of the batch must be "
            "[n_members, n_rows, *]; with shared=True, [n_rows, *]."
        )


def micro_generators(
    seeds: Sequence[int] | None, members: Stack[Any], n: int, reduce: Mean | None
) -> list[list[torch.Generator] | None]:
    """The members' generators for each micro-batch: the same ones for all, unless processes share the step."""
    generators = _generators(seeds, members)
    if generators is None or seeds is None or reduce is None:
        return [generators] * n
    every = zip(*(micro_seeds(seed, n, reduce) for seed in seeds), strict=True)
    return [_generators(cast("Sequence[int]", own), members) for own in every]


def micro_ids(ids: Any, n: int) -> list[Any]:
    """The ids for each token of each micro-batch: equal parts of the rows."""
    if ids is None or n == 1:
        return [ids] * n
    if len(ids) % n:
        raise ConfigError(f"accumulate={n} does not divide the {len(ids)} rows of ids.")
    size = len(ids) // n
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def _generators(seeds: Sequence[int] | None, members: Stack[Any]) -> list[torch.Generator] | None:
    if seeds is None:
        return None
    check_numbers(seeds, "seeds")
    for i, seed in enumerate(seeds):
        check_integer(seed, f"seeds[{i}]")
    if len(seeds) != len(members):
        raise ConfigError(f"seeds: expected one int for each of {len(members)} members, got {len(seeds)}.")
    device = next((value.device for group in members.groups for value in group.values), "cpu")
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]

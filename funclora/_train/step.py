"""Training adapters: `value_and_grad` and `train_step`, as pure functions."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import optree
import torch
from torch import Tensor, nn

from funclora._api.arguments import check_function, check_integer, check_model, check_params
from funclora._bind.apply import bind
from funclora._bind.checks import check_rules, unwritten
from funclora._many.stack import Stack
from funclora._torch.functions import in_transform
from funclora.distributed._mean import Mean, tree_sum
from funclora.errors import ConfigError, UnusedAdapterWarning
from funclora.optim import global_norm
from funclora.optim._members import Optimizer, check_optimizer, step_of
from funclora.rules.base import Adapters, Params, Rule

LossFn = Callable[..., Any]
"""A loss: `loss_fn(bound, batch)` -> a scalar tensor, or `(loss, aux)` with `has_aux=True`."""


def value_and_grad(
    loss_fn: LossFn, *, has_aux: bool = False, reduce: Mean | None = None
) -> Callable[..., tuple[Any, dict[str, Rule]]]:
    """The loss and its gradient with respect to the adapters.

    Forward and backward run while the weights are bound, so activation checkpointing recomputes with the rewritten
    weights. Base weights are constants. It works in eager mode, with `torch.compile`, and with `torch.func` transforms
    such as `vmap` over stacked adapters.

    Args:
        loss_fn: `loss_fn(bound, *args, **kwargs)`, given the bound model. Returns a scalar loss, or
            `(loss, aux)` with `has_aux`.
        has_aux: whether `loss_fn` returns anything besides the loss.
        reduce: `distributed.mean()` makes loss and gradients those of all processes.

    Returns:
        A function `(model, params, adapters, *args, **kwargs) -> (loss, grads)`, or `((loss, aux), grads)` with
        `has_aux`. `grads` has the structure of the adapters; loss and aux are detached.

    Raises:
        ConfigError: when called, if the loss is not a scalar tensor, or does not depend on any adapter.

    Examples:
        >>> from funclora import LoRA
        >>> adapters = {"weight": LoRA(torch.ones(1, 2), torch.zeros(1, 1))}
        >>> model, params = nn.Linear(2, 1, bias=False), {"weight": torch.zeros(1, 2)}
        >>> loss, grads = value_and_grad(lambda bound, x: bound(x).sum())(model, params, adapters, torch.ones(3, 2))
        >>> loss.item(), grads["weight"].b.tolist(), grads["weight"].a.tolist()
        (0.0, [[6.0]], [[0.0, 0.0]])
    """
    checked = checked_loss(loss_fn, has_aux)

    def run(
        model: nn.Module, params: Params, adapters: Adapters, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Rule]]:
        check_bindable(model, params, adapters)
        params = {name: tensor.detach() for name, tensor in params.items()}

        def loss_and_aux(adapters: Adapters) -> tuple[Tensor, Any]:
            bound = bind(model, params, adapters)
            if torch.compiler.is_compiling():  # a graph has no versions to compare
                return checked(bound, *args, **kwargs)  # type: ignore[no-any-return]
            with unwritten(params, adapters):
                return checked(bound, *args, **kwargs)  # type: ignore[no-any-return]

        tree: Any = dict(adapters)
        if not any(rule.leaf_names for rule in adapters.values()):
            raise ConfigError("adapters: there is nothing to train: the dict has no rule with tensors.")
        if torch.compiler.is_compiling() or in_transform():
            grads, (loss, aux) = torch.func.grad_and_value(loss_and_aux, has_aux=True)(tree)
        else:
            loss, aux, grads = autograd(loss_and_aux, tree)
        if reduce is not None:
            reduce.check(tree)
            loss, grads = reduce([(loss, grads)], [args], tree)
        return ((loss, aux) if has_aux else loss), grads

    return run


def train_step(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    has_aux: bool = False,
    accumulate: int = 1,
    reduce: Mean | None = None,
) -> Callable[..., tuple[dict[str, Rule], Any, dict[str, Any]]]:
    """One step of training, as a pure function.

    Clipping is part of the optimizer (`optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))`), mixed
    precision part of the loss (`with torch.autocast("cpu", torch.bfloat16): ...`).

    Args:
        model: the module that defines the computation; never changed.
        loss_fn: `loss_fn(bound, batch)`, given the bound model. Returns a scalar loss, or `(loss, aux)`.
        optimizer: a pair of functions `init(params)` and `update(grads, state, params=...)`. If it also has
            `step(params, grads, state) -> (params, state)`, that is used.
        has_aux: whether `loss_fn` returns anything besides the loss.
        accumulate: number of micro-batches. Every tensor of the batch is split into this many equal parts along
            its first dimension; losses and gradients are averaged over them.
        reduce: `distributed.mean()`: the mean over the micro-batches of all processes, each of which calls the step
            with its own rows, or with None as its batch if it has none. Each micro-batch then has its own seed.

    Returns:
        `step(params, adapters, state, batch, *, seed=None) -> (adapters, state, metrics)`, where `state` starts as
        `optimizer.init(adapters)`. With a seed, the randomness of the step (dropout) is a function of this seed only,
        and the global generators are unchanged; without a seed, they are used as in PyTorch. The same inputs give the
        same outputs, bit for bit. Metrics: "loss" and "grad_norm" (scalars), "aux" with `has_aux` (a list of one per
        micro-batch if `accumulate` > 1).

    Raises:
        ConfigError: `accumulate` is not a positive integer, or (when called) does not divide the batch; the loss
            is not a scalar.

    Examples:
        >>> from funclora import LoRA, optim
        >>> model, params = nn.Linear(2, 1, bias=False), {"weight": torch.zeros(1, 2)}
        >>> adapters = {"weight": LoRA(torch.ones(1, 2), torch.zeros(1, 1))}
        >>> sgd = optim.sgd(0.1)
        >>> step = train_step(model, lambda bound, x: ((bound(x) - 1) ** 2).mean(), sgd)
        >>> adapters, state, metrics = step(params, adapters, sgd.init(adapters), torch.ones(3, 2))
        >>> round(metrics["loss"].item(), 3), round(adapters["weight"].b.item(), 3)
        (1.0, 0.4)
    """
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise ConfigError(f"accumulate: expected a positive integer, got {accumulate!r}.")
    check_model(model)
    check_optimizer(optimizer)
    gradient = value_and_grad(checked_loss(loss_fn, has_aux), has_aux=True)
    optimized = step_of(optimizer)

    def step(
        params: Params, adapters: Adapters, state: Any, batch: Any, *, seed: int | None = None
    ) -> tuple[dict[str, Rule], Any, dict[str, Any]]:
        check_bindable(model, params, adapters)
        if seed is not None:
            check_integer(seed, "seed")
        tree: Any = optree.tree_map(torch.Tensor.detach, cast(Any, dict(adapters)))
        batches = micro_batches(batch, accumulate, reduce=reduce)
        with contextlib.nullcontext() if reduce else seeded(seed, tree):
            parts = []
            for part, own in zip(batches, micro_seeds(seed, accumulate, reduce), strict=False):
                with seeded(own, tree):
                    parts.append(gradient(model, params, tree, part))
        found = [(loss, grads) for (loss, _), grads in parts]
        loss, grads = averaged(found, batches, tree, reduce)
        with torch.no_grad():
            tree, state = optimized(tree, grads, state)
        metrics: dict[str, Any] = {"loss": loss, "grad_norm": global_norm(grads)}
        if has_aux:
            every = [aux for (_, aux), _ in parts]
            metrics["aux"] = every[0] if len(every) == accumulate == 1 else every
        return tree, state, metrics

    return step


def check_bindable(model: object, params: object, adapters: object) -> None:
    """Raise `ArgumentError` unless these are a model, weights and one adapter. `bind` checks if they match."""
    check_model(model)
    check_params(params)
    check_rules(adapters)


def autograd(
    loss_and_aux: Callable[[Any], tuple[Tensor, Any]], tree: Any, *, whole: bool = True
) -> tuple[Tensor, Any, Any]:
    """Loss, aux and gradients by ordinary autograd, about a fifth faster than `torch.func` for one adapter.

    With `whole`, warns if the loss does not depend on all of the tree.
    """
    n_rules = len(tree)
    leaves, spec = optree.tree_flatten(tree)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        tree = optree.tree_unflatten(spec, leaves)
        loss, aux = loss_and_aux(tree)
        if not loss.requires_grad:
            raise ConfigError(
                "the loss does not depend on the adapters. Compute it with the bound model that loss_fn gets, "
                "outside of torch.no_grad(), and check that the targets are used."
            )
        found = _gradients(loss, leaves)
    if whole and any(g is None for g in found):
        paths = optree.treespec_paths(spec)
        unused = list(dict.fromkeys(str(path[0]) for path, g in zip(paths, found, strict=True) if g is None))
        warnings.warn(
            f"the loss does not depend on {len(unused)} of {n_rules} adapters (their gradient is taken as "
            f"zero): {', '.join(unused[:5])}{', ...' if len(unused) > 5 else ''}.",
            UnusedAdapterWarning,
            stacklevel=3,
        )
    grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    grads_tree: Any = optree.tree_unflatten(spec, grads)
    return loss.detach(), _detached(aux), grads_tree


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """`torch.autograd.grad`, also through reentrant checkpoints, which support `backward` only."""
    nodes = _graph(loss)
    if not any(kind.__name__ == "CheckpointFunctionBackward" for kind in set(map(type, nodes))):
        return torch.autograd.grad(loss, leaves, allow_unused=True)
    # backward writes to every leaf of the graph. Our leaves are new; the gradients of all others are restored.
    others = [node.variable for node in nodes if hasattr(node, "variable")]
    before = [(leaf, leaf.grad) for leaf in others if not any(leaf is ours for ours in leaves)]
    try:
        loss.backward()
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, grad in before:
            leaf.grad = grad


def _graph(loss: Tensor) -> list[Any]:
    """The nodes of the autograd graph of a loss."""
    nodes: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = {None, *nodes}
    for node in nodes:  # which grows
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                nodes.append(following)
    return nodes


def checked_loss(loss_fn: LossFn, has_aux: bool) -> LossFn:
    """The loss as a function that returns a pair of a scalar and aux, `()` if it has none."""
    check_function(loss_fn, "loss_fn", "loss_fn(bound, batch)")

    def pair(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        out = loss_fn(*args, **kwargs)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise ConfigError(f"loss_fn: expected a pair (loss, aux) with has_aux=True, got {_kind(out)}.")
        loss, aux = out if has_aux else (out, ())
        return _scalar(loss), aux

    return pair


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        hint = "reduce it, e.g. with .mean()" if isinstance(loss, Tensor) else "has_aux=True takes (loss, aux)"
        raise ConfigError(f"loss_fn: expected a scalar tensor as the loss, got {_kind(loss)}; {hint}.")
    return loss


def _kind(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _detached(tree: Any) -> Any:
    return optree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def micro_batches(batch: Any, n: int, dim: int = 0, reduce: Mean | None = None) -> list[Any]:
    """Split every tensor of the batch into n equal parts along a dimension; None are no rows, if others have some."""
    if batch is None and reduce is not None:
        return []
    if n == 1:
        return [batch]
    leaves, spec = optree.tree_flatten(batch)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ConfigError(
            f"accumulate={n}: the batch, {_kind(batch)}, has no tensor to split. Use dicts, lists or tuples of tensors."
        )
    parts: list[Sequence[Any]] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            parts.append([leaf] * n)
        elif leaf.dim() <= dim or leaf.shape[dim] % n:
            raise ConfigError(
                f"accumulate={n} does not divide a tensor of the batch with shape {list(leaf.shape)}. The "
                f"{'first' if dim == 0 else 'second'} dimension of every tensor must be a multiple of it."
            )
        else:
            parts.append(leaf.chunk(n, dim))
    return [optree.tree_unflatten(spec, part) for part in zip(*parts, strict=True)]


def averaged(parts: list[tuple[Tensor, Any]], batches: list[Any], like: Any, reduce: Mean | None) -> tuple[Tensor, Any]:
    """The mean of losses and gradients over micro-batches, with `reduce` those of all processes."""
    if reduce is not None:
        reduce.check(like)
        return reduce(parts, [(batch,) for batch in batches], like)
    if len(parts) == 1:
        return parts[0]

    def mean(leaves: Sequence[Tensor]) -> Tensor:
        return tree_sum(leaves) / len(leaves)

    losses, trees = zip(*parts, strict=True)
    if isinstance(like, Stack):  # whose structure torch 2.10 cannot compare while it compiles
        every = zip(*(tree.leaves() for tree in trees), strict=True)
        return mean(losses), like.with_leaves(map(mean, every))
    return mean(losses), optree.tree_map(lambda *leaves: mean(leaves), *trees)


def micro_seeds(seed: int | None, n: int, reduce: Mean | None) -> list[int | None]:
    """The seed of each micro-batch if processes share a step: those that one process would give to the same ones."""
    if seed is None or reduce is None:
        return [None] * n
    rank, _ = reduce.rank_and_size()
    return [micro_seed(seed, rank * n + i) for i in range(n)]


def micro_seed(seed: int, index: int) -> int:
    """A seed for one of the micro-batches of a step; the first has the step's own."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**63 if index else seed


@contextlib.contextmanager
def seeded(seed: int | None, adapters: Any) -> Iterator[None]:
    """Draw from generators seeded for this block only; with None, from the global ones."""
    if seed is None:
        yield
        return
    leaves: list[Any] = optree.tree_leaves(adapters)
    devices = sorted({leaf.get_device() for leaf in leaves if leaf.is_cuda})
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also seed every other device.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield

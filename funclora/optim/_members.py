"""One optimizer for each member of a stack."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import optree
import torch
from torch import Tensor

from funclora._api.arguments import check_function, refuse
from funclora._many.stack import Group, Stack, TreeSpecs, check_stack, stack
from funclora._torch.levels import vmapped
from funclora.errors import ConfigError
from funclora.optim._transforms import GradientTransformation, SteppingTransformation, apply_updates


class Optimizer(Protocol):
    """The interface of an optimizer for training: the protocol of TorchOpt, optax and `funclora.optim`.

    An optimizer may also have a function `step(params, grads, state) -> (params, state)`, which is then used instead of
    `update`: it need not keep the updates in memory.
    """

    @property
    def init(self) -> Callable[[Any], Any]:
        """`params -> state`."""

    @property
    def update(self) -> Callable[..., tuple[Any, Any]]:
        """`(grads, state, params=...) -> (updates, state)`; the updates are added to the parameters."""


def check_optimizer(optimizer: object, where: str = "optimizer") -> None:
    """Raise `ArgumentError` unless the argument is a pair of functions."""
    if isinstance(optimizer, torch.optim.Optimizer):
        remedy = "Optimizers of torch.optim write to their own parameters: use one of funclora.optim or TorchOpt."
        refuse(where, "a pair of functions init and update", optimizer, remedy)
    if isinstance(optimizer, type) or not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        remedy = "Call the factory, as in adamw(1e-3)." if callable(optimizer) else "For example adamw(1e-3)."
        refuse(where, "a pair of functions init and update", optimizer, remedy)


def is_pure(optimizer: Optimizer) -> dict[str, bool]:
    """The extra arguments with which an optimizer changes no argument: TorchOpt's do by default."""
    if isinstance(optimizer, GradientTransformation):
        return {}
    return {"inplace": False} if "inplace" in inspect.signature(optimizer.update).parameters else {}


Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def step_of(optimizer: Optimizer) -> Step:
    """`(params, grads, state) -> (params, state)`: the optimizer's own `step`, or its `update` and `apply_updates`."""
    own: Step | None = getattr(optimizer, "step", None)
    if own is not None:
        return own
    pure = is_pure(optimizer)

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params=params, **pure)
        return apply_updates(params, updates), state

    return step


class MemberTransformation(SteppingTransformation):
    """Functions over stacks, applied to each member separately."""


def per_member(build: Callable[..., Optimizer], **values: Sequence[float] | Tensor) -> MemberTransformation:
    """One optimizer for every member of a stack, each with its own values.

    Args:
        build: called as `build(**values)` with one value for each name, a tensor `[]`; returns an optimizer, for
            example `lambda lr, wd: adamw(lr, weight_decay=wd)`. Schedules and clipping are part of it.
        **values: for each name, one number for each member, `[n_members]`.

    Returns:
        `init(stack) -> state`, `update(grads, state, params=...) -> (updates, state)` and
        `step(params, grads, state) -> (params, state)`, all of them stacks of the same members. The values are part of
        the state: `state[kept]` keeps the values of the kept members.

    Raises:
        ConfigError: in `init`, if there is not one value for each member; in `update`, if the state belongs to other
            members.

    Examples:
        >>> from funclora import stack
        >>> from funclora.optim import per_member, sgd
        >>> members = stack([{"x": torch.zeros(1)}, {"x": torch.zeros(1)}])
        >>> optimizer = per_member(sgd, lr=[0.5, 2.0])
        >>> updates, state = optimizer.update(stack([{"x": torch.ones(1)}] * 2), optimizer.init(members), members)
        >>> updates[0]["x"].item(), updates[1]["x"].item()
        (-0.5, -2.0)
    """
    check_function(build, "build", "build(**values)")

    def init(members: Stack[Any]) -> Stack[Any]:
        check_stack(members, "members")
        tensors = {name: _numbers(name, value) for name, value in values.items()}
        for name, tensor in tensors.items():
            if tensor.shape != (len(members),):
                raise ConfigError(
                    f"per_member: {name}: expected one number for each of {len(members)} members, got a tensor of "
                    f"shape {list(tensor.shape)}."
                )

        def one(tree: Any, values: dict[str, Tensor]) -> Any:
            return {"values": values, "state": build(**values).init(tree)}

        def group_of(group: Group[Any]) -> Group[Any]:
            device = group.values[0].device
            own = {name: tensor[list(group.members)].to(device) for name, tensor in tensors.items()}
            state = _mapped(one, group.unscaled_tree(), own)
            # In memory as after a step: a compiled step is not compiled again for the second one.
            state = optree.tree_map(lambda x: x.clone(memory_format=torch.contiguous_format), state)
            return _group(state, group.members)

        return Stack(tuple(map(group_of, members.groups)))

    def update(grads: Stack[Any], state: Stack[Any], params: Stack[Any] | None = None) -> tuple[Any, Any]:
        def one(optimizer: Optimizer, before: Any, grads: Any, params: Any) -> tuple[Any, Any]:
            return optimizer.update(grads, before, params=params, **is_pure(optimizer))

        return by_group(one, state, grads, params)

    def step(params: Stack[Any], grads: Stack[Any], state: Stack[Any]) -> tuple[Any, Any]:
        def one(optimizer: Optimizer, before: Any, params: Any, grads: Any) -> tuple[Any, Any]:
            return step_of(optimizer)(params, grads, before)

        return by_group(one, state, params, grads)

    def by_group(
        function: Callable[..., tuple[Any, Any]], state: Stack[Any], *stacks: Stack[Any] | None
    ) -> tuple[Any, Any]:
        """`function(optimizer, state, *trees) -> (tree, state)` of each member, in the groups of the first."""

        def one(before: Any, *trees: Any) -> Any:
            tree, after = function(build(**before["values"]), before["state"], *trees)
            return tree, {"values": before["values"], "state": after}

        groups: list[tuple[Group[Any], ...]] = list(zip(*(s.groups for s in stacks if s is not None), strict=True))
        results, after = [], []
        for some, own in zip(groups, _like(state, cast("Stack[Any]", stacks[0])), strict=True):
            # A group's tree has the scaling of its first member, which may be another one than in `init`.
            trees = [group.unscaled_tree() for group in some]
            tree, inner = _mapped(one, own.tree(), *trees, *[None] * (len(stacks) - len(trees)))
            results.append(replace(some[0], values=tuple(optree.tree_leaves(tree))))
            after.append(replace(own.with_tree(inner), members=some[0].members))
        return Stack(tuple(results)), Stack(tuple(after))

    return MemberTransformation(init, update, step)


def _numbers(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"per_member: {name}: expected one number for each member, got {value!r:.80}. Put everything else into "
            "the function that builds the optimizer, for example a schedule with a peak for each member: "
            "per_member(lambda peak: adamw(warmup_cosine(peak, 10, 100)), peak=[1e-3, 3e-4])."
        ) from error


def _mapped(function: Callable[..., Any], *trees: Any) -> Any:
    """`torch.func.vmap(function)(*trees)`, with trees flattened by optree: with torch this takes half of a step.

    Raises:
        ConfigError: the function returns something that is no tree of tensors.
    """
    given: Any = trees
    leaves, spec = optree.tree_flatten(given)
    spec_out: Any = None

    def flat(*leaves: Tensor) -> tuple[Any, ...]:
        nonlocal spec_out
        out, spec_out = optree.tree_flatten(function(*optree.tree_unflatten(spec, leaves)))
        for x in out:
            if not isinstance(x, Tensor):
                got = type(x).__name__
                raise ConfigError(f"per_member: the optimizer returned a {got}, expected trees of tensors.")
        return tuple(out)

    out = vmapped(flat, leaves)
    return optree.tree_unflatten(spec_out, out)


def _group(tree: Any, members: tuple[int, ...]) -> Group[Any]:
    leaves, spec = optree.tree_flatten(tree)
    return Group(tuple(leaves), TreeSpecs((spec,) * len(members)).ready(), members)


def _like(state: Stack[Any], members: Stack[Any]) -> list[Group[Any]]:
    """The state's groups, in the grouping and order of another stack of the same members."""
    trees: list[Any] = [group.tree() for group in state.groups] if isinstance(state, Stack) else [None]
    if not all(isinstance(tree, dict) and tree.keys() == {"values", "state"} for tree in trees):
        refuse("state", "what per_member(...).init, or update before, returned", state)
    if len(state) != len(members):
        raise ConfigError(f"state: expected a state of {len(members)} members, got one of {len(state)}.")
    if [c.members for c in state.groups] == [c.members for c in members.groups]:
        return list(state.groups)
    grouped = []
    for group in members.groups:
        same = stack([state[i] for i in group.members]).groups
        if len(same) != 1:
            raise ConfigError("per_member: update: the state and the gradients belong to different members.")
        grouped.append(same[0])
    return grouped

"""Optimizers as pairs of pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import optree
import torch
from torch import Tensor

from funclora.errors import ConfigError
from funclora.optim._trees import PyTree, by_member, check_leaves, times, tree_map
from funclora.optim._values import PerMember, check, wide


class GradientTransformation(NamedTuple):
    """A pure pair: `init(params) -> state` and `update(grads, state, params=None) -> (updates, state)`."""

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]


class SteppingTransformation(GradientTransformation):
    """A pair that can also make the step itself, in fewer passes over memory.

    Attributes:
        step: `step(params, grads, state) -> (params, state)`: `update` and `apply_updates`, up to rounding.

    Examples:
        >>> from funclora.optim import adamw
        >>> params, optimizer = {"w": torch.ones(1)}, adamw(lr=0.1, weight_decay=0.0)
        >>> optimizer.step(params, {"w": torch.ones(1)}, optimizer.init(params))[0]
        {'w': tensor([0.9000])}
    """

    step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]

    def __new__(
        cls, init: Callable[[PyTree], PyTree], update: Callable[..., tuple[PyTree, PyTree]],
        step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    ) -> SteppingTransformation:  # fmt: skip
        self = super().__new__(cls, init, update)
        self.step = step
        return self


def chain(*transforms: GradientTransformation) -> GradientTransformation:
    """Transformations in sequence, each applied to the updates of the previous one.

    Args:
        *transforms: At least one pair of `init` and `update`.

    Returns:
        The transformation; its state is the tuple of their states.

    Raises:
        ConfigError: If there is none, or one is not such a pair (for example, a factory that was not called).

    Examples:
        >>> from funclora.optim import sgd
        >>> grads = {"w": torch.tensor([3.0, 4.0])}
        >>> optimizer = chain(clip_by_global_norm(1.0), sgd(lr=0.1))
        >>> optimizer.update(grads, optimizer.init(grads))[0]["w"]
        tensor([-0.0600, -0.0800])
    """
    if not transforms or not all(hasattr(t, "init") and hasattr(t, "update") for t in transforms):
        raise ConfigError(
            f"transforms: expected one or more pairs of init and update, got {transforms!r}; "
            "call the factories, as in chain(clip_by_global_norm(1.0), adamw(1e-4))"
        )

    def init(params: PyTree) -> tuple[PyTree, ...]:
        return tuple(t.init(params) for t in transforms)

    def update(grads: PyTree, state: tuple[PyTree, ...], params: PyTree = None) -> tuple[PyTree, PyTree]:
        after = []
        for t, before in zip(transforms, state, strict=True):
            grads, inner = t.update(grads, before, params=params)
            after.append(inner)
        return grads, tuple(after)

    *first, last = transforms
    last_step = getattr(last, "step", None)
    if last_step is None:
        return GradientTransformation(init, update)

    def step(params: PyTree, grads: PyTree, state: tuple[PyTree, ...]) -> tuple[PyTree, PyTree]:
        grads, before = chain(*first).update(grads, state[:-1], params=params) if first else (grads, ())
        params, after = last_step(params, grads, state[-1])
        return params, (*before, after)

    return SteppingTransformation(init, update, step)


def clip_by_global_norm(max_norm: PerMember) -> GradientTransformation:
    """Gradients scaled down to a global norm of `max_norm`, as by `torch.nn.utils.clip_grad_norm_`.

        update = min(1, max_norm / (‖g‖ + 1e-6))·g

    Where the norm is NaN or inf, everything that it scales becomes NaN. Deviation: for inf, torch turns finite
    gradients into 0, and training would silently stop.

    Args:
        max_norm: A number or a tensor `[]` bounds the norm over all leaves, also of a whole stack. A
            tensor `[n_adapters]` bounds each adapter by its own norm, over all axes but the leading one.

    Returns:
        The transformation; it has no state.

    Raises:
        ConfigError: If `max_norm` is not positive.

    Examples:
        >>> grads = {"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}  # two adapters
        >>> clip = clip_by_global_norm(torch.tensor([1.0, 1.0]))
        >>> clip.update(grads, clip.init(grads))[0]["w"]
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    check("max_norm", max_norm, lambda x: x > 0, "a number > 0", "1.0 is usual", tensor=True)

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        check_leaves("grads", grads)
        leaves = optree.tree_leaves(grads)
        if isinstance(max_norm, Tensor) and max_norm.dim() == 1:
            for leaf in leaves:
                by_member(max_norm, leaf)  # raises its error
            norm = torch.vmap(global_norm)(leaves)
        else:
            norm = global_norm(leaves)
        factor = (by_member(max_norm, norm) / (norm + 1e-6)).clamp(max=1.0)
        factor = torch.where(norm.isfinite(), factor, math.nan)
        return tree_map(lambda g: times(g, factor), grads=grads), state

    return GradientTransformation(lambda params: (), update)


def global_norm(tree: PyTree) -> Tensor:
    """The Euclidean norm over all leaves: `[]`, in at least float32.

    Examples:
        >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
        tensor(5.)
    """
    check_leaves("tree", tree)
    # At 0 a norm of norms has the gradient 0; the root of a sum of squares has none.
    leaves: list[Tensor] = optree.tree_leaves(tree)
    norms = [torch.linalg.vector_norm(x, dtype=wide(x.dtype)).to(leaves[0].device) for x in leaves]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))
    return norm


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """`params + updates`, leaf by leaf, as a new tree in the parameters' dtypes.

    Raises:
        ConfigError: If the trees or the shapes of their leaves differ.

    Examples:
        >>> apply_updates({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.5])})
        {'w': tensor([1.5000])}
    """
    return tree_map(lambda p, u: (p + u).to(p.dtype), params=params, updates=updates)

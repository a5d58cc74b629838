"""AdamW, SGD and LoRA+ as gradient transformations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funclora._api.arguments import check_function, refuse
from funclora._torch.functions import overwriting
from funclora.errors import ConfigError
from funclora.optim._kernels import AdamKernel, fits_kernel
from funclora.optim._transforms import GradientTransformation, SteppingTransformation, apply_updates
from funclora.optim._trees import PyTree, aligned, by_member, check_leaves, times, tree_map, widest
from funclora.optim._values import PerMember, Schedule, check, nonnegative, wide
from funclora.rules.base import next_to_output


class AdamWState(NamedTuple):
    """State of `adamw`: the steps taken, and both moments as trees like the parameters."""

    step: Tensor
    mu: PyTree
    nu: PyTree


class SgdState(NamedTuple):
    """State of `sgd`: the steps taken, and a tree like the parameters, or `()` without momentum."""

    step: Tensor
    trace: PyTree


def adamw(
    lr: PerMember | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: PerMember = 0.01,
) -> SteppingTransformation:
    """Adam with decoupled weight decay: `torch.optim.AdamW` as a pure function.

        m' = b1·m + (1 - b1)·g        v' = b2·v + (1 - b2)·g²        t = steps taken, including this one
        update = -lr·(m'/(1 - b1ᵗ) / (√(v'/(1 - b2ᵗ)) + eps) + weight_decay·p)

    Args:
        lr: A number, a tensor `[]` or `[n_adapters]`, or a schedule.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the denominator.
        weight_decay: A number, or a tensor `[]` or `[n_adapters]`.

    Returns:
        The transformation. A moment has its leaf's shape and dtype. For a half-precision leaf it is float32,
        and the update is rounded once, at the end (torch rounds at every operation).

    Raises:
        ConfigError: If an argument is out of range; in `update`, if trees differ or decay lacks `params`.

    Examples:
        >>> from funclora.optim import apply_updates
        >>> params, grads = {"w": torch.ones(2)}, {"w": torch.tensor([3.0, -3.0])}
        >>> optimizer = adamw(lr=0.1)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> apply_updates(params, updates)["w"]
        tensor([0.8990, 1.0990])

    References:
        Adam: arXiv 1412.6980. Decoupled decay: arXiv 1711.05101. Deviation: the square root has the derivative 0
        at 0, so a derivative through the update is not NaN where a gradient is 0 (`a` as long as `b` is 0).
    """
    check_rates(lr, weight_decay)
    check_betas(b1, b2)
    check("eps", eps, nonnegative, "a finite number >= 0", "1e-8 is usual")

    def init(params: PyTree) -> AdamWState:
        return AdamWState(no_step(params), tree_map(_moment, params=params), tree_map(_moment, params=params))

    def update(grads: PyTree, state: AdamWState, params: PyTree = None) -> tuple[PyTree, AdamWState]:
        check_state(state, AdamWState)
        decays, t = is_decayed(weight_decay, params), state.step + 1
        # One number per adapter is computed first, so that few operations run over whole leaves.
        count = t.to(widest(state.mu))
        rate = rate_at(lr, state.step, count) * torch.ones_like(count)
        shrink = rate * rate_at(weight_decay, state.step, count)
        like = grads if params is None else params
        spec, columns = aligned(mu=state.mu, nu=state.nu, grads=grads, params=like)

        def scaled(direction: Tensor, like: Tensor, rate: Tensor, shrink: Tensor) -> Tensor:
            over = overwriting()
            update = over(torch.mul, direction, by_member(rate, direction))
            if decays:
                update = over(torch.addcmul, update, like.to(update.dtype), by_member(shrink, update), value=-1)
            return update.to(like.dtype)

        if fits_kernel(columns):
            # Of parameters that are 0, with the rate 1 and no decay, only the direction remains.
            zeros = list(map(torch.zeros_like, columns[0]))
            one = torch.ones_like(count)
            directions, mu, nu = AdamKernel(b1, b2, eps)(t, one, 0 * one, spec, [zeros, *columns[:3]])
            updates = tree_map(lambda d, p: scaled(d, p, rate, shrink), directions=directions, params=like)
            return updates, AdamWState(t, mu, nu)
        correction = _one_minus_power(b2, count).sqrt()
        scale, damping = -correction / _one_minus_power(b1, count), eps * correction
        over = overwriting()

        def moved(m: Tensor, v: Tensor, g: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g = g.to(m.dtype)
            m = torch.lerp(m, g, 1 - b1)
            v = over(torch.addcmul, b2 * v, g, g, value=1 - b2)
            # Clamped for the derivative only: the root's derivative at 0 is inf, and inf·0 is NaN.
            root = over(torch.sqrt, v.clamp_min(torch.finfo(v.dtype).tiny))
            direction = over(torch.div, by_member(scale, m) * m, over(torch.add, root, by_member(damping, m)))
            return scaled(direction, like, rate, shrink), m, v

        updates, mu, nu = tree_map(moved, 3, mu=state.mu, nu=state.nu, grads=grads, params=like)
        return updates, AdamWState(t, mu, nu)

    def step(params: PyTree, grads: PyTree, state: AdamWState) -> tuple[PyTree, AdamWState]:
        check_state(state, AdamWState)
        spec, columns = aligned(params=params, mu=state.mu, nu=state.nu, grads=grads)
        if not fits_kernel(columns):
            updates, state = update(grads, state, params)
            return apply_updates(params, updates), state
        t = state.step + 1
        count = t.to(widest(state.mu))
        rate, decay = (rate_at(x, state.step, count) * torch.ones_like(count) for x in (lr, weight_decay))
        params, mu, nu = AdamKernel(b1, b2, eps)(t, rate, decay, spec, columns)
        return params, AdamWState(t, mu, nu)

    return SteppingTransformation(init, update, step)


def sgd(
    lr: PerMember | Schedule, momentum: float = 0.0, nesterov: bool = False, weight_decay: PerMember = 0.0
) -> GradientTransformation:
    """Stochastic gradient descent: `torch.optim.SGD` without dampening, as a pure function.

        g' = g + weight_decay·p        trace' = momentum·trace + g'
        update = -lr·trace', with nesterov -lr·(g' + momentum·trace')

    Args:
        lr: A number, a tensor `[]` or `[n_adapters]`, or a schedule.
        momentum: Decay of the trace, in [0, 1); without momentum there is no trace.
        nesterov: Whether to use Nesterov momentum.
        weight_decay: A number, or a tensor `[]` or `[n_adapters]`.

    Returns:
        The transformation; dtypes as in `adamw`.

    Raises:
        ConfigError: If an argument is out of range; in `update`, if trees differ or decay lacks `params`.

    Examples:
        >>> grads = {"w": torch.ones(2, 3)}  # two adapters
        >>> optimizer = sgd(lr=torch.tensor([0.1, 0.5]))
        >>> optimizer.update(grads, optimizer.init(grads))[0]["w"]
        tensor([[-0.1000, -0.1000, -0.1000],
                [-0.5000, -0.5000, -0.5000]])
    """
    check_rates(lr, weight_decay)
    check("momentum", momentum, lambda x: 0 <= x < 1, "a number in [0, 1)", "0.9 is usual")
    if not isinstance(nesterov, bool):
        refuse("nesterov", "True or False", nesterov)
    if nesterov and not momentum:
        raise ConfigError("nesterov: expected momentum > 0 with it, got momentum=0; for example, pass momentum=0.9")

    def init(params: PyTree) -> SgdState:
        # () and not None, which is a leaf for torch's pytree: vmap would refuse it.
        return SgdState(no_step(params), tree_map(_moment, params=params) if momentum else ())

    def update(grads: PyTree, state: SgdState, params: PyTree = None) -> tuple[PyTree, SgdState]:
        check_state(state, SgdState)
        rate = lr(state.step) if callable(lr) else lr
        decays = is_decayed(weight_decay, params)
        like = grads if params is None else params

        def decay(p: Tensor, g: Tensor) -> Tensor:
            g = g.to(wide(p.dtype))
            return g + by_member(weight_decay, g) * p.to(g.dtype) if decays else g

        def accumulate(t: Tensor, g: Tensor) -> Tensor:
            return momentum * t + g

        decayed = tree_map(decay, params=like, grads=grads)
        trace, direction = state.trace, decayed
        if momentum:
            trace = direction = tree_map(accumulate, trace=state.trace, grads=decayed)
        if nesterov:
            direction = tree_map(accumulate, trace=trace, grads=decayed)
        updates = tree_map(lambda p, d: (-by_member(rate, d) * d).to(p.dtype), params=like, direction=direction)
        return updates, SgdState(state.step + 1, trace)

    return GradientTransformation(init, update)


def lora_plus(
    lr: PerMember | Schedule,
    ratio: PerMember = 16.0,
    base: Callable[..., GradientTransformation] = adamw,
    **kwargs: Any,
) -> GradientTransformation:
    """LoRA+: the factors next to the output (`b` of LoRA and DoRA) learn at `ratio·lr`, all other leaves at `lr`.

    Args:
        lr: A number, a tensor `[]` or `[n_adapters]`, or a schedule.
        ratio: A number, or a tensor `[]` or `[n_adapters]`.
        base: Optimizer, called as `base(lr, **kwargs)`. Its updates, including decay, must be proportional to `lr`, as
            in `adamw` and `sgd`: then scaling them is the same as another learning rate.
        **kwargs: Further arguments of `base`.

    Returns:
        The transformation, with the state of `base`. The `up_leaf_names` of a rule are its leaves next to the output;
        in trees without rules, they are the leaves whose path ends with `b`.

    Raises:
        ConfigError: If `ratio` is not positive; in `init` and `update`, if no leaf is such a factor.

    Examples:
        >>> grads = {"w": {"a": torch.ones(1), "b": torch.ones(1)}}
        >>> optimizer = lora_plus(lr=0.1, ratio=4.0, base=sgd)
        >>> optimizer.update(grads, optimizer.init(grads))[0]
        {'w': {'a': tensor([-0.1000]), 'b': tensor([-0.4000])}}

    References:
        LoRA+: arXiv 2402.12354. Deviation from PEFT: embeddings have no separate learning rate.
    """
    check("ratio", ratio, lambda x: 0 < x < math.inf, "a finite number > 0", "16 is usual", tensor=True)
    check_function(base, "base", "base(lr, **kwargs)")
    inner = base(lr, **kwargs)

    def init(params: PyTree) -> PyTree:
        _scale_b(params, ratio)  # raises its error before anything is trained
        return inner.init(params)

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        updates, state = inner.update(grads, state, params=params)
        return _scale_b(updates, ratio), state

    return GradientTransformation(init, update)


def _scale_b(tree: PyTree, ratio: PerMember) -> PyTree:
    leaves, spec = optree.tree_flatten(tree)
    ups = next_to_output(tree)
    if not any(ups):
        raise ConfigError(
            f"lora_plus: expected a tree with `b` factors, got {len(leaves)} leaves and no `b` among them, "
            f"the first {spec.paths()[:3]}; pass adapters with LoRA or DoRA rules, or rules that name such leaves in "
            "up_leaf_names, or use only the base optimizer"
        )
    return optree.tree_unflatten(spec, [times(x, ratio) if up else x for x, up in zip(leaves, ups, strict=True)])


def check_state(state: object, kind: type) -> None:
    """Raise `ArgumentError` unless `state` is a state of this optimizer."""
    if not isinstance(state, kind):
        refuse("state", "what init, or update before, returned", state, f"It is of type {kind.__name__}.")


def _one_minus_power(decay: float, count: Tensor) -> Tensor:
    # By expm1: in float32, 1 - 0.999 has an error of 1e-5.
    return -torch.expm1(count * (math.log(decay) if decay else -math.inf))


def rate_at(value: PerMember | Schedule, step: Tensor, like: Tensor) -> PerMember:
    """A rate at a step, in the dtype and on the device of `like`."""
    now = value(step) if callable(value) else value
    return now.to(like.device, like.dtype) if isinstance(now, Tensor) else now


def is_decayed(weight_decay: PerMember, params: PyTree) -> bool:
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    if decays and params is None:
        raise ConfigError(
            f"params: expected the parameters that weight_decay={weight_decay} decays, got None; "
            "call update(grads, state, params), or set weight_decay=0.0"
        )
    return decays


def _moment(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, dtype=wide(leaf.dtype))


def no_step(params: PyTree) -> Tensor:
    # A tensor, because torch.compile would make a new graph at every step for an int.
    check_leaves("params", params)
    leaves = optree.tree_leaves(params)
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None)


def check_betas(b1: object, b2: object) -> None:
    for name, beta in (("b1", b1), ("b2", b2)):
        check(name, beta, lambda x: 0 <= x < 1, "a number in [0, 1)", "usual are 0.9 and 0.999")


def check_rates(lr: object, weight_decay: object) -> None:
    if not callable(lr):
        check("lr", lr, nonnegative, "a schedule, a finite number >= 0", "1e-4 is usual", tensor=True)
    check("weight_decay", weight_decay, nonnegative, "a finite number >= 0", "0.0 is none", tensor=True)

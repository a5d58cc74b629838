"""Optimizers as pairs of pure functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from funclora._torch.functions import in_transform, is_differentiated
from funclora.errors import ConfigError
from funclora.optim._kernels import AdamKernel, fits_kernel
from funclora.optim._values import PerMember, Schedule, check, nonnegative, wide

PyTree: TypeAlias = Any


class GradientTransformation(NamedTuple):
    """A pure pair: `init(params) -> state` and `update(grads, state, params=None) -> (updates, state)`."""

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]


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
) -> GradientTransformation:
    """Adam with decoupled weight decay: `torch.optim.AdamW` as a pure function.

        m' = b1·m + (1 - b1)·g        v' = b2·v + (1 - b2)·g²        t = steps taken, this one included
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
        >>> params, grads = {"w": torch.ones(2)}, {"w": torch.tensor([3.0, -3.0])}
        >>> optimizer = adamw(lr=0.1)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> apply_updates(params, updates)["w"]
        tensor([0.8990, 1.0990])

    References:
        Adam: arXiv 1412.6980. Decoupled decay: arXiv 1711.05101. Deviation: the root has the derivative 0 at
        0, so that a derivative through the update is no NaN where a gradient is 0 (`a` as long as `b` is 0).
    """
    _check_rates(lr, weight_decay)
    for name, beta in (("b1", b1), ("b2", b2)):
        check(name, beta, lambda x: 0 <= x < 1, "a number in [0, 1)", "usual are 0.9 and 0.999")
    check("eps", eps, nonnegative, "a finite number >= 0", "1e-8 is usual")

    def init(params: PyTree) -> AdamWState:
        return AdamWState(_no_step(params), _map(_moment, params=params), _map(_moment, params=params))

    def update(grads: PyTree, state: AdamWState, params: PyTree = None) -> tuple[PyTree, AdamWState]:
        decays, t = _decays(weight_decay, params), state.step + 1
        # What is one number per adapter comes first: few operations are left that run over whole leaves.
        count = t.to(_widest(state.mu))
        rate = _at(lr, state.step, count) * torch.ones_like(count)
        shrink = rate * _at(weight_decay, state.step, count)
        like = grads if params is None else params
        trees = {"mu": state.mu, "nu": state.nu, "grads": grads, "params": like}

        def scaled(direction: Tensor, like: Tensor, rate: Tensor, shrink: Tensor) -> Tensor:
            over = _overwriting()
            update = over(torch.mul, direction, _per_member(rate, direction))
            if decays:
                update = over(torch.addcmul, update, like.to(update.dtype), _per_member(shrink, update), value=-1)
            return update.to(like.dtype)

        if fits_kernel(*trees.values()):
            kernel = AdamKernel(b1, b2, eps, scaled)
            _map(lambda *leaves: None, **trees)  # for its errors
            updates, mu, nu = kernel(state.mu, state.nu, grads, like, t, rate, shrink)
            return updates, AdamWState(t, mu, nu)
        correction = _one_minus_power(b2, count).sqrt()
        scale, damping = -correction / _one_minus_power(b1, count), eps * correction
        over = _overwriting()

        def step(m: Tensor, v: Tensor, g: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g = g.to(m.dtype)
            m = torch.lerp(m, g, 1 - b1)
            v = over(torch.addcmul, b2 * v, g, g, value=1 - b2)
            # Clamped for the derivative alone: that of the root at 0 is inf, and inf·0 is NaN.
            root = over(torch.sqrt, v.clamp_min(torch.finfo(v.dtype).tiny))
            direction = over(torch.div, _per_member(scale, m) * m, over(torch.add, root, _per_member(damping, m)))
            return scaled(direction, like, rate, shrink), m, v

        updates, mu, nu = _map(step, 3, **trees)
        return updates, AdamWState(t, mu, nu)

    return GradientTransformation(init, update)


def sgd(
    lr: PerMember | Schedule, momentum: float = 0.0, nesterov: bool = False, weight_decay: PerMember = 0.0
) -> GradientTransformation:
    """Stochastic gradient descent: `torch.optim.SGD` without dampening, as a pure function.

        g' = g + weight_decay·p        trace' = momentum·trace + g'
        update = -lr·trace', with nesterov -lr·(g' + momentum·trace')

    Args:
        lr: A number, a tensor `[]` or `[n_adapters]`, or a schedule.
        momentum: Decay of the trace, in [0, 1); without momentum there is no trace.
        nesterov: Whether to look one step of momentum ahead.
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
    _check_rates(lr, weight_decay)
    check("momentum", momentum, lambda x: 0 <= x < 1, "a number in [0, 1)", "0.9 is usual")
    if nesterov and not momentum:
        raise ConfigError("nesterov: expected momentum > 0 with it, got momentum=0; pass momentum=0.9, say")

    def init(params: PyTree) -> SgdState:
        # () and not None, which is a leaf to torch's pytree: vmap would refuse it.
        return SgdState(_no_step(params), _map(_moment, params=params) if momentum else ())

    def update(grads: PyTree, state: SgdState, params: PyTree = None) -> tuple[PyTree, SgdState]:
        rate = lr(state.step) if callable(lr) else lr
        decays = _decays(weight_decay, params)
        like = grads if params is None else params

        def decay(p: Tensor, g: Tensor) -> Tensor:
            g = g.to(wide(p.dtype))
            return g + _per_member(weight_decay, g) * p.to(g.dtype) if decays else g

        def accumulate(t: Tensor, g: Tensor) -> Tensor:
            return momentum * t + g

        decayed = _map(decay, params=like, grads=grads)
        trace, direction = state.trace, decayed
        if momentum:
            trace = direction = _map(accumulate, trace=state.trace, grads=decayed)
        if nesterov:
            direction = _map(accumulate, trace=trace, grads=decayed)
        updates = _map(lambda p, d: (-_per_member(rate, d) * d).to(p.dtype), params=like, direction=direction)
        return updates, SgdState(state.step + 1, trace)

    return GradientTransformation(init, update)


def lora_plus(
    lr: PerMember | Schedule,
    ratio: PerMember = 16.0,
    base: Callable[..., GradientTransformation] = adamw,
    **kwargs: Any,
) -> GradientTransformation:
    """LoRA+: every `b` factor learns at `ratio·lr`, all other leaves at `lr`.

    Args:
        lr: A number, a tensor `[]` or `[n_adapters]`, or a schedule.
        ratio: A number, or a tensor `[]` or `[n_adapters]`.
        base: Optimizer, called as `base(lr, **kwargs)`. Its updates must be proportional to `lr`, as those of
            `adamw` and `sgd` are, decay included: scaling them is then the same as another learning rate.
        **kwargs: Further arguments of `base`.

    Returns:
        The transformation, with the state of `base`. It takes leaves for `b` whose path ends in that name.

    Raises:
        ConfigError: If `ratio` is not positive; in `init` and `update`, if no leaf is a `b` factor.

    Examples:
        >>> grads = {"w": {"a": torch.ones(1), "b": torch.ones(1)}}
        >>> optimizer = lora_plus(lr=0.1, ratio=4.0, base=sgd)
        >>> optimizer.update(grads, optimizer.init(grads))[0]
        {'w': {'a': tensor([-0.1000]), 'b': tensor([-0.4000])}}

    References:
        LoRA+: arXiv 2402.12354. Deviation from PEFT: embeddings have no learning rate of their own.
    """
    check("ratio", ratio, lambda x: 0 < x < math.inf, "a finite number > 0", "16 is usual", tensor=True)
    inner = base(lr, **kwargs)

    def init(params: PyTree) -> PyTree:
        _scale_b(params, ratio)  # for its error, before anything was trained
        return inner.init(params)

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        updates, state = inner.update(grads, state, params=params)
        return _scale_b(updates, ratio), state

    return GradientTransformation(init, update)


def chain(*transforms: GradientTransformation) -> GradientTransformation:
    """Transformations one after the other, each on the updates of the one before.

    Args:
        *transforms: At least one pair of `init` and `update`.

    Returns:
        The transformation; its state is the tuple of theirs.

    Raises:
        ConfigError: If there is none, or one is no such pair (a factory that was not called, for example).

    Examples:
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

    return GradientTransformation(init, update)


def clip_by_global_norm(max_norm: PerMember) -> GradientTransformation:
    """Gradients scaled down to a global norm of `max_norm`, as by `torch.nn.utils.clip_grad_norm_`.

        update = min(1, max_norm / (‖g‖ + 1e-6))·g

    Where the norm is NaN or inf, all that it scales becomes NaN. Deviation: for inf, torch turns finite
    gradients into 0, with which training would stand still in silence.

    Args:
        max_norm: A number or a tensor `[]` bounds the norm over all leaves, that of a whole stack too. A
            tensor `[n_adapters]` bounds each adapter by its own norm, over all but the leading axis.

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
        leaves = optree.tree_leaves(grads)
        if isinstance(max_norm, Tensor) and max_norm.dim() == 1:
            for leaf in leaves:
                _per_member(max_norm, leaf)  # for its error
            norm = torch.vmap(global_norm)(leaves)
        else:
            norm = global_norm(leaves)
        factor = (_per_member(max_norm, norm) / (norm + 1e-6)).clamp(max=1.0)
        factor = torch.where(norm.isfinite(), factor, math.nan)
        return _map(lambda g: _scale(g, factor), grads=grads), state

    return GradientTransformation(lambda params: (), update)


def global_norm(tree: PyTree) -> Tensor:
    """The Euclidean norm over all leaves: `[]`, in float32 at least.

    Examples:
        >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
        tensor(5.)
    """
    # A norm of norms has the gradient 0 where all is 0; the root of a sum of squares has none.
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
    return _map(lambda p, u: (p + u).to(p.dtype), params=params, updates=updates)


def _per_member(value: PerMember, leaf: Tensor) -> PerMember:
    """`value` so that it broadcasts over `leaf`: a number or `[]` to all, `[n]` along the leading axis."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 1:
        if value.shape != leaf.shape[:1]:
            raise ConfigError(
                f"n_adapters: expected leaves [{len(value)}, ...] for {len(value)} values, one per adapter, "
                f"got a leaf of shape {list(leaf.shape)}; stack the adapters, or pass one number for all"
            )
        value = value.reshape(-1, *[1] * (leaf.dim() - 1))
    return value.to(leaf.device, leaf.dtype)


def _scale(leaf: Tensor, factor: PerMember) -> Tensor:
    x = leaf.to(wide(leaf.dtype))
    return (x * _per_member(factor, x)).to(leaf.dtype)


def _scale_b(tree: PyTree, ratio: PerMember) -> PyTree:
    paths, leaves, spec = optree.tree_flatten_with_path(tree)
    is_b = [path[-1:] == ("b",) for path in paths]
    if not any(is_b):
        raise ConfigError(
            f"lora_plus: expected a tree with `b` factors, got {len(paths)} leaves and no `b` among them, "
            f"beginning {paths[:3]}; pass adapters with LoRA or DoRA rules, or use the base optimizer alone"
        )
    scaled = [_scale(x, ratio) if b else x for x, b in zip(leaves, is_b, strict=True)]
    return optree.tree_unflatten(spec, scaled)


def _overwriting() -> Callable[..., Tensor]:
    """`op(x, ...)`, written over x, a temporary of the caller's own, unless autograd, a transform or a tracer looks on.

    Fresh memory for every result would be a good part of the cost of a step.
    """
    watched = is_differentiated() or torch.compiler.is_compiling() or in_transform()

    def over(op: Callable[..., Tensor], x: Tensor, *rest: Tensor, **options: float) -> Tensor:
        return op(x, *rest, **options) if watched or type(x) is not Tensor else op(x, *rest, **options, out=x)

    return over


def _one_minus_power(decay: float, count: Tensor) -> Tensor:
    # Through expm1: in float32, 1 - 0.999 is wrong by 1e-5 already.
    return -torch.expm1(count * (math.log(decay) if decay else -math.inf))


def _at(value: PerMember | Schedule, step: Tensor, like: Tensor) -> PerMember:
    """A rate at a step, in the dtype and on the device of `like`."""
    now = value(step) if callable(value) else value
    return now.to(like.device, like.dtype) if isinstance(now, Tensor) else now


def _decays(weight_decay: PerMember, params: PyTree) -> bool:
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    if decays and params is None:
        raise ConfigError(
            f"params: expected the parameters that weight_decay={weight_decay} decays, got None; "
            "call update(grads, state, params), or set weight_decay=0.0"
        )
    return decays


def _widest(tree: PyTree) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in optree.tree_leaves(tree)), torch.float32)


def _moment(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, dtype=wide(leaf.dtype))


def _no_step(params: PyTree) -> Tensor:
    # A tensor and not an int, for which torch.compile would make a new graph at every step.
    leaves = optree.tree_leaves(params)
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None)


def _map(fn: Callable[..., Any], outputs: int = 1, /, **trees: PyTree) -> Any:
    """`optree.tree_map` over trees with names; refuses other structures, and shapes that would broadcast.

    With `outputs` other than 1, `fn` returns a tuple of that length and there are as many trees.
    """
    (first, tree), *others = trees.items()
    leaves, spec = optree.tree_flatten(tree)
    columns = [leaves]
    for name, other in others:
        try:
            column: list[Any] = spec.flatten_up_to(other)
        except ValueError as error:
            raise ConfigError(f"{name}: expected the tree of {first}, got another one: {error}") from error
        for i, (x, y) in enumerate(zip(leaves, column, strict=True)):
            if not isinstance(y, Tensor) or x.shape != y.shape:
                got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise ConfigError(
                    f"{name} at {spec.paths()[i]}: expected a tensor {list(x.shape)} as in {first}, "
                    f"got {got}; gradients, parameters and state must belong to the same adapters"
                )
        columns.append(column)
    if outputs == 1:
        return optree.tree_unflatten(spec, map(fn, *columns))
    rows = list(map(fn, *columns))
    return tuple(optree.tree_unflatten(spec, [row[i] for row in rows]) for i in range(outputs))


def _check_rates(lr: object, weight_decay: object) -> None:
    if not callable(lr):
        check("lr", lr, nonnegative, "a schedule, a finite number >= 0", "1e-4 is usual", tensor=True)
    check("weight_decay", weight_decay, nonnegative, "a finite number >= 0", "0.0 is none", tensor=True)

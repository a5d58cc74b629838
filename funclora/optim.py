"""Optimizers and schedules as pure functions over any pytree of tensors.

An optimizer is a pair `init(params) -> state` and `update(grads, state, params=None) -> (updates, state)`, as
in TorchOpt and optax. `update` writes to nothing that it gets; its updates are to be added to the parameters.
All of it runs under `torch.func.grad`, `torch.func.vmap` and `torch.compile(fullgraph=True)`.

One optimizer can train a stack of adapters, with leaves `[n_adapters, ...]`: `lr`, `weight_decay`, `ratio`
and `max_norm` then take one value per adapter too, a tensor `[n_adapters]` on their device. Inside `vmap` an
adapter is alone, and its values are `[]`. The state counts the steps taken in an int64 tensor: `[]`, or
`[n_adapters]` where the states of single adapters were stacked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor
from torch.autograd import forward_ad

from funclora.errors import ConfigError

__all__ = [
    "GradientTransformation",
    "adamw",
    "apply_updates",
    "chain",
    "clip_by_global_norm",
    "constant",
    "global_norm",
    "lora_plus",
    "sgd",
    "warmup_cosine",
    "warmup_linear",
]

PyTree: TypeAlias = Any
PerMember: TypeAlias = float | Tensor  # a tensor is [] or [n_adapters]
Schedule: TypeAlias = Callable[[Tensor], Tensor]


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
        _check(name, beta, lambda x: 0 <= x < 1, "a number in [0, 1)", "usual are 0.9 and 0.999")
    _check("eps", eps, _nonnegative, "a finite number >= 0", "1e-8 is usual")

    def init(params: PyTree) -> AdamWState:
        return AdamWState(_no_step(params), _map(_moment, params=params), _map(_moment, params=params))

    def update(grads: PyTree, state: AdamWState, params: PyTree = None) -> tuple[PyTree, AdamWState]:
        decays, t = _decays(weight_decay, params), state.step + 1
        # What is one number per adapter comes first: few operations are left that run over whole leaves.
        count = t.to(_widest(state.mu))
        correction = _one_minus_power(b2, count).sqrt()
        rate = _at(lr, state.step, count)
        scale, damping = -rate * correction / _one_minus_power(b1, count), eps * correction
        shrink = rate * _at(weight_decay, state.step, count) * torch.ones_like(count)
        over = _overwriting()

        def step(m: Tensor, v: Tensor, g: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g = g.to(m.dtype)
            m = torch.lerp(m, g, 1 - b1)
            v = over(torch.addcmul, b2 * v, g, g, value=1 - b2)
            # Clamped for the derivative alone: that of the root at 0 is inf, and inf·0 is NaN.
            root = over(torch.sqrt, v.clamp_min(torch.finfo(v.dtype).tiny))
            update = over(torch.div, _per_member(scale, m) * m, over(torch.add, root, _per_member(damping, m)))
            if decays:
                update = over(torch.addcmul, update, like.to(m.dtype), _per_member(shrink, m), value=-1)
            return update.to(like.dtype), m, v

        like = grads if params is None else params
        updates, mu, nu = _map(step, 3, mu=state.mu, nu=state.nu, grads=grads, params=like)
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
    _check("momentum", momentum, lambda x: 0 <= x < 1, "a number in [0, 1)", "0.9 is usual")
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
            g = g.to(_wide(p.dtype))
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
    _check("ratio", ratio, lambda x: 0 < x < math.inf, "a finite number > 0", "16 is usual", tensor=True)
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
    _check("max_norm", max_norm, lambda x: x > 0, "a number > 0", "1.0 is usual", tensor=True)

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
    norms = [torch.linalg.vector_norm(x, dtype=_wide(x.dtype)).to(leaves[0].device) for x in leaves]
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


def constant(lr: PerMember) -> Schedule:
    """The schedule that is `lr` (a number, or a tensor `[]` or `[n_adapters]`) at every step.

    Examples:
        >>> constant(0.1)(torch.arange(3))
        tensor([0.1000, 0.1000, 0.1000])
    """
    _check("lr", lr, _nonnegative, "a finite number >= 0", "pass the rate itself", tensor=True)
    return lambda step: lr * torch.ones_like(step, dtype=_wide(torch.get_default_dtype()))


def warmup_cosine(lr: PerMember, warmup_steps: int, total_steps: int, end: PerMember = 0.0) -> Schedule:
    """A linear warmup from 0 to `lr`, then half a cosine down to `end`.

        step < warmup_steps:   lr·step/warmup_steps
        else:                  end + (lr - end)·(1 + cos πx)/2
                               x = min(1, (step - warmup_steps)/(total_steps - warmup_steps))

    The first update has step 0: with a warmup its rate is 0, as in optax and transformers.

    Args:
        lr: The highest rate: a number, or a tensor `[]` or `[n_adapters]`.
        warmup_steps: Length of the warmup; may be 0.
        total_steps: The step from which on the rate is `end`; counts the warmup too.
        end: The last rate: a number, or a tensor `[]` or `[n_adapters]`.

    Returns:
        A function of int64 steps, `[]` or of any shape that broadcasts with `lr`, that returns learning rates
        of that shape, in torch's default dtype, float32 at least.

    Raises:
        ConfigError: If an argument is out of range, or the warmup leaves no step.

    Examples:
        >>> warmup_cosine(1.0, warmup_steps=2, total_steps=6)(torch.arange(7))
        tensor([0.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 0.0000])

    References:
        Cosine annealing: arXiv 1608.03983.
    """
    return _warmup(lr, warmup_steps, total_steps, end, lambda x: (1 + torch.cos(math.pi * x)) / 2)


def warmup_linear(lr: PerMember, warmup_steps: int, total_steps: int, end: PerMember = 0.0) -> Schedule:
    """A linear warmup from 0 to `lr`, then a straight line down to `end`; all else is as in `warmup_cosine`.

        step < warmup_steps:   lr·step/warmup_steps
        else:                  end + (lr - end)·(1 - x)

    Examples:
        >>> warmup_linear(1.0, warmup_steps=2, total_steps=6)(torch.arange(7))
        tensor([0.0000, 0.5000, 1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
    """
    return _warmup(lr, warmup_steps, total_steps, end, lambda x: 1 - x)


def _warmup(lr: PerMember, warmup: int, total: int, end: PerMember, decay: Callable[[Tensor], Tensor]) -> Schedule:
    for name, rate in (("lr", lr), ("end", end)):
        _check(name, rate, _nonnegative, "a finite number >= 0", "pass the rate itself", tensor=True)
    _check("warmup_steps", warmup, lambda n: n >= 0 and n == int(n), "an integer >= 0", "0 means no warmup")
    need = f"an integer > warmup_steps={warmup}"
    _check("total_steps", total, lambda n: n > warmup and n == int(n), need, "it counts the warmup too")

    def schedule(step: Tensor) -> Tensor:
        x = step.to(_wide(torch.get_default_dtype()))
        after = end + (lr - end) * decay(((x - warmup) / (total - warmup)).clamp(0, 1))
        return torch.where(step < warmup, lr * (x / max(warmup, 1)), after)

    return schedule


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
    wide = leaf.to(_wide(leaf.dtype))
    return (wide * _per_member(factor, wide)).to(leaf.dtype)


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
    watched = (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )

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


def _wide(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        raise ConfigError(f"leaves: expected floating-point tensors, got {dtype}; leave it out of the tree")
    return torch.promote_types(dtype, torch.float32)


def _widest(tree: PyTree) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in optree.tree_leaves(tree)), torch.float32)


def _moment(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, dtype=_wide(leaf.dtype))


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


def _nonnegative(x: float) -> bool:
    return 0 <= x < math.inf


def _check(
    name: str, value: object, holds: Callable[[float], bool], need: str, hint: str, tensor: bool = False
) -> None:
    # A tensor's values stay unread: they may be traced, and to read them would wait for the device.
    if tensor and isinstance(value, Tensor) and value.dim() <= 1 and value.is_floating_point():
        return
    if isinstance(value, int | float) and not isinstance(value, bool) and holds(value):
        return
    need += ", or a floating-point tensor [] or [n_adapters]" if tensor else ""
    got = f"a {value.dtype} tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ConfigError(f"{name}: expected {need}, got {got}; {hint}")


def _check_rates(lr: object, weight_decay: object) -> None:
    if not callable(lr):
        _check("lr", lr, _nonnegative, "a schedule, a finite number >= 0", "1e-4 is usual", tensor=True)
    _check("weight_decay", weight_decay, _nonnegative, "a finite number >= 0", "0.0 is none", tensor=True)


def __getattr__(name: str) -> Any:
    if name == "per_member":  # it is written for stacks, which are built on this module
        from funclora._population import per_member

        return per_member
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

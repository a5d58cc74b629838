"""The lazy weight: a placeholder for a rewritten weight, which is computed only if an operation has no fast form.

`LazyWeight` replaces a module's parameter. It holds the base weight and a rule. An operation that is linear in the
weight (`F.linear`, convolutions, embedding lookups, matrix products) is passed to the rule as a `LinearOp`; any other
operation gets the dense rewritten weight, so that every module stays correct.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funclora._lazy.by_member import by_member
from funclora._lazy.dispatch import linear_ops
from funclora._lazy.parallel import apply_on_mesh
from funclora._lazy.parameters import differs_by_row, operate_by_row
from funclora._lazy.views import inlined, views
from funclora._quant.tensor import held
from funclora._torch.contractions import contractions
from funclora._torch.functions import QUESTIONS, NoFormError, is_sharded, placeholder, plain_tensors, written
from funclora._torch.mesh import placed_as, whole
from funclora._tracking.routed import LostRowsError
from funclora.errors import DenseFallbackError, DenseFallbackWarning, PurityError, UnsupportedError, is_strict
from funclora.rules.base import Rule, dense_of
from funclora.rules.dense import Full
from funclora.rules.layouts import Matrices
from funclora.rules.linear_ops import LinearOp

Placeholders = dict[tuple[torch.Size, torch.dtype, torch.device], Tensor]


class LazyWeight(torch.Tensor):
    """A tensor of the weight's shape, dtype and device that represents `rule.dense(base)`.

    Its own storage is one expanded NaN: an operation that bypasses `__torch_function__` gives NaN, never the
    base weight.

    Attributes:
        base: the base weight.
        rule: the rule that rewrites it.
        target: the full name of the parameter, for messages.
        owner: the module that holds it; its training mode switches the rule's dropout.
        uses: where to record how the weight is used, if this is traced.
        copied: for torch these values are a copy, which the model may write to.
        part: of a divided weight, the rule of this process's slice, once that is known.
        of_parallel_module: the module that holds a divided weight has a forward of its own, which may pass slices.
    """

    base: Tensor
    rule: Rule
    target: str
    owner: nn.Module
    uses: dict[str, str] | None
    copied: bool
    part: Rule | None
    of_parallel_module: bool
    _training: bool

    @staticmethod
    def of(
        name: str, base: Tensor, rule: Rule, owner: nn.Module, uses: dict[str, str] | None, placeholders: Placeholders
    ) -> LazyWeight:
        """A lazy weight for the parameter `name` of the model, a direct parameter of `owner`.

        Lazy weights of one call with the same shape, dtype and device share one placeholder, in `placeholders`.
        """
        kind = (base.shape, base.dtype, base.device)
        shared = placeholders.get(kind)
        if shared is None:
            shared = placeholders[kind] = placeholder(*kind)
        lazy = shared.as_subclass(LazyWeight)
        lazy.base = base
        lazy.rule = rule
        lazy.target = name
        lazy.owner = owner
        lazy.uses = uses
        lazy.copied = False
        lazy.part = None
        lazy.of_parallel_module = type(base) is not Tensor and is_sharded(base) and "forward" in owner.__dict__
        return lazy

    def like(self, base: Tensor, rule: Rule, *, copied: bool = False) -> LazyWeight:
        """A lazy weight for a view or a copy of this one."""
        lazy = LazyWeight.of(self.target, base, rule, self.owner, self.uses, {})
        lazy.copied = copied
        return lazy

    def used(self, how: str) -> None:
        """Record a use; one dense use counts more than any fast ones."""
        if self.uses is not None and self.uses[self.target] != "dense":
            self.uses[self.target] = how

    def dense(self) -> Tensor:
        """The rewritten weight in the base's dtype, as a tensor that shares no memory."""
        if self.rule.dropout_p and self.training():
            raise UnsupportedError(f"{self.target!r}: dropout {self.rule.dropout_p} cannot act on the dense weight.")
        dense = dense_of(self.target, self.rule, whole(self.base)).to(self.base.dtype, copy=self.rule.bind_dense)
        return placed_as(dense, self.base)

    def training(self) -> bool:
        """Whether the owner is in training mode; if the owner no longer exists, its last known mode."""
        try:
            self._training = training = self.owner.training
        except ReferenceError:
            return self._training
        return training

    def apply_op(self, op: LinearOp) -> Tensor:
        """The result of an operation that is linear in this weight."""
        rule, base = self.rule, self.base
        if self.uses is not None:
            self.used("fast")
        dropout = rule.dropout_p
        if dropout and not self.training():
            dropout = 0.0
        try:
            if type(base) is not Tensor:
                if is_sharded(base):
                    return apply_on_mesh(self, op, dropout)
                base = held(base)
            return op.finish(rule.apply_op(op, base, dropout))
        except LostRowsError as error:
            raise error.of(self.target) from None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({self.target!r}, {type(self.rule).__name__}, {list(self.base.shape)}, {self.base.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_linear = func in linear_ops
        if not is_linear:
            if func in QUESTIONS:
                with plain_tensors():
                    return func(*args, **kwargs)
            if func == _REQUIRES_GRAD:
                return requires_grad(args[0].base) or requires_grad(args[0].rule)
        mapped = None
        try:
            if is_linear:
                mapped = linear_ops[func](*args, **kwargs)
            elif func in views:
                return views[func](func, *args, **kwargs)
        except (NoFormError, TypeError):  # no fast form, or unknown arguments: torch raises the error
            mapped = None
        if mapped is not None:
            lazy, op = mapped
            return lazy.apply_op(op)
        if func in contractions and _are_matrices(args, kwargs):
            try:
                return contractions[func](LazyWeight, *args, **kwargs)
            except NoFormError:
                pass
        if not torch.compiler.is_compiling():
            # `module.to(dtype)` in forward first asks whether the new value may replace the old one.
            if func is torch._has_compatible_shallow_copy_type:
                return all(isinstance(x, LazyWeight) for x in args)
            if func == _SET_DATA and _is_itself(*args):
                return None
        by_row = operate_by_row(func, args, kwargs)
        if by_row is not NotImplemented:
            return by_row
        if func is Tensor.data_ptr:
            return 0  # no memory, as a meta tensor: with torch 2.10 transformers asks if experts are aligned
        given = _with_own_values(func, args, kwargs)
        if given is not None:
            args, kwargs = given
        if torch.compiler.is_compiling():  # the tracer supports neither the copies in `inlined` nor function names
            return func(*_dense(args), **_dense(kwargs))
        if func in inlined:
            return inlined[func](*args, **kwargs)
        return _dense_fallback(func, args, kwargs)


def requires_grad(x: Tensor | Rule | tuple[Rule, ...] | None) -> bool:
    """Whether autograd tracks a weight, or a tensor of a rule. Called at each bind, so it walks no pytree."""
    if isinstance(x, Tensor):
        return x.requires_grad
    if isinstance(x, Rule):
        return any(requires_grad(getattr(x, leaf)) for leaf in x.leaf_names)
    return x is not None and any(map(requires_grad, x))


def _is_itself(x: Any, value: Any) -> bool:
    """Whether a lazy weight is assigned its own value."""
    both = isinstance(x, LazyWeight) and isinstance(value, LazyWeight)
    return both and value.base is x.base and value.rule is x.rule


def _with_own_values(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments, with values in place of the copies that an operation writes to; the copies keep these values.

    Returns:
        `(args, kwargs)`, or None if it writes to no lazy weight.
    """
    values: dict[int, Tensor] = {}
    for x in pytree.tree_leaves(written(func, args, kwargs)):
        if not isinstance(x, LazyWeight):
            continue
        if not x.copied:
            raise PurityError(
                f"{x.target!r}: the model calls {_operation(func)}, which would write to a rewritten weight. "
                "Compute the new value out of place, or leave this parameter out of the adapter's targets."
            )
        if differs_by_row(x):
            _refuse_by_row(x, _operation(func))
        _note_dense(x, _operation(func))
        values[id(x)] = x.dense()
        x.rule = Full(values[id(x)])
    return pytree.tree_map(lambda x: values.get(id(x), x), (args, kwargs)) if values else None


def _operation(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def _dense_fallback(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the dense weights, with one warning per parameter and operation."""
    lazy = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, LazyWeight)]
    out = by_member(func, args, kwargs) if any(map(differs_by_row, lazy)) else NotImplemented
    for x in lazy:
        if out is NotImplemented and differs_by_row(x):
            _refuse_by_row(x, _operation(func))
        _note_dense(x, _operation(func))
    return func(*_dense(args), **_dense(kwargs)) if out is NotImplemented else out


def _refuse_by_row(x: LazyWeight, operation: str) -> NoReturn:
    raise UnsupportedError(
        f"{x.target!r} is a different weight for every row of the batch, and {operation} cannot use a weight per row. "
        "Leave the target out, use funclora.vmap over the stack, or call the model once for each member."
    )


def _note_dense(x: LazyWeight, operation: str) -> None:
    """Warn that an operation computes the dense weight, or refuse that."""
    x.used("fast" if x.rule.bind_dense else "dense")
    if x.rule.dropout_p and x.training():
        raise UnsupportedError(
            f"{x.target!r}: dropout {x.rule.dropout_p} cannot act, because {operation} needs the dense weight and "
            "dropout acts on the input of the low-rank path. Set lora_dropout=0 for this target or exclude it."
        )
    if not x.rule.bind_dense:
        message = f"{x.target!r}: {operation} has no fast form and computes the dense adapted weight."
        if is_strict():
            raise DenseFallbackError(message)
        warnings.warn(message, DenseFallbackWarning, stacklevel=4)


def _dense(tree: Any) -> Any:
    """The tree with dense weights in place of lazy ones."""
    return pytree.tree_map(lambda x: x.dense() if isinstance(x, LazyWeight) else x, tree)


def _are_matrices(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all lazy weights among the arguments are matrices, or stacks of them."""
    lazy = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, LazyWeight)]
    return all(isinstance(x.rule.layout, Matrices) or differs_by_row(x) for x in lazy)


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]

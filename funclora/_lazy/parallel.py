"""Operations on a rewritten weight that is divided over a mesh (tensor parallelism).

The tensors of the rule are whole in every process. Where the weight is used, each process computes its part of the
result, with its slice of the weight and the slice of the rule for it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import optree
import torch
from torch import Tensor

from funclora._torch.functions import is_sharded
from funclora._torch.mesh import Cut, shared, whole
from funclora._tracking.crossing import entered_again
from funclora._tracking.tensor import rows_of
from funclora.errors import UnsupportedError
from funclora.rules.base import Rule
from funclora.rules.linear_ops import EmbeddingOp, LinearLayerOp, LinearOp, MatmulOp


def apply_on_mesh(lazy: Any, op: LinearOp, dropout: float) -> Tensor:
    """The result of an operation on a rewritten weight that is divided, divided as that on the base weight.

    Args:
        lazy: the lazy weight.
        op: the operation. Its input is a tensor of the mesh; without gradients, in a module of transformers, it may be
            a plain one: what this process reads. Then the result is plain too.
        dropout: the probability that applies in this call.
    """
    plain = not is_sharded(op.x)
    if isinstance(op, EmbeddingOp) and not plain:
        return _embedding(lazy, op, dropout)
    if type(op) not in (LinearLayerOp, MatmulOp) or op.transposed:
        _refuse(lazy, f"{type(op).__name__.removesuffix('Op')} on it has no form with an adapter")
    if plain and (torch.is_grad_enabled() or not lazy.of_parallel_module):
        _refuse(lazy, "its input is not a tensor of the mesh: the module that holds it was not parallelised")
    cut = Cut(lazy.base)
    rows, columns = (1, 0) if lazy.rule.layout.transposed else (0, 1)
    if cut.dim == columns:
        return _of_inputs(lazy, op, cut, dropout, plain)
    local = op.with_input(cut.all_of(op.x, in_parts=True))
    _check_features(lazy, local.x, lazy.base.shape[columns])
    if op.bias is not None:
        local.bias = cut.all_of(op.bias) if cut.dim is None else cut.part_of(op.bias, 0)
    y = _computed(lazy, local, cut, dropout)
    if plain:
        return y
    return cut.replicated(y) if cut.dim is None else cut.joined(y, lazy.base.shape[rows])


def _of_inputs(lazy: Any, op: LinearOp, cut: Cut, dropout: float, plain: bool) -> Tensor:
    """The operation on a weight of which each process holds some inputs: the results add up to the whole one."""
    if plain and op.bias is not None:
        _refuse(lazy, "the bias would be added by every process")
    local = op.with_input(cut.part_of(op.x, op.x.dim() - 1))
    _check_features(lazy, local.x, cut.length)
    local.bias = None
    y = _computed(lazy, local, cut, dropout)
    if plain:
        return y
    return cut.summed(y) if op.bias is None else cut.summed(y) + op.bias


def _computed(lazy: Any, op: LinearOp, cut: Cut, dropout: float) -> Tensor:
    return rows_of(_part_of_rule(lazy, cut).apply_op(op.with_input(entered_again(op.x)), cut.local, dropout))[0]


def _embedding(lazy: Any, op: EmbeddingOp, dropout: float) -> Tensor:
    """Rows of a table. The base's are added up first, as they are after it anyway; the update is the same for all."""
    cut = Cut(lazy.base)
    given: Any = op.with_input(cut.all_of(op.x))
    of_base = cut.all_of(op.dense(lazy.base, bias=True))
    rule = lazy.rule if lazy.rule.as_lora() is not None else lazy.rule.prepared(whole(lazy.base))
    reads: Any = given.with_input(entered_again(given.x))
    reads.dense = lambda weight, *, bias: of_base
    return cut.replicated(given.finish(rows_of(rule.apply_op(reads, lazy.base, dropout))[0]))


def _part_of_rule(lazy: Any, cut: Cut) -> Rule:
    """The rule of this process's slice of the weight. It is kept if nothing of it is trained."""
    if lazy.part is not None:
        return lazy.part  # type: ignore[no-any-return]
    leaves: Any = optree.tree_leaves(lazy.rule)
    is_trained = any(leaf.requires_grad for leaf in leaves)
    rule = lazy.rule
    if cut.dim is not None:
        if is_trained:
            rule = optree.tree_map(lambda leaf: shared(leaf, cut.mesh), rule)
        found = _narrowed(rule, lazy.base, cut) or _narrowed(rule.prepared(whole(lazy.base)), lazy.base, cut)
        rule = found if found is not None else _refuse(lazy, f"{type(rule).__name__} has no form for a slice of it")
    if not is_trained:
        rule = lazy.part = rule.prepared(cut.local)
    return rule  # type: ignore[no-any-return]


def _narrowed(rule: Rule, base: Tensor, cut: Cut) -> Rule | None:
    assert cut.dim is not None
    return rule.narrow(tuple(base.shape), cut.dim, cut.start, cut.length)


def _check_features(lazy: Any, x: Tensor, n: int) -> None:
    if x.shape[-1] != n:
        _refuse(lazy, f"its input has {x.shape[-1]} features in this process instead of {n}")


def _refuse(lazy: Any, reason: str) -> NoReturn:
    raise UnsupportedError(
        f"{lazy.target!r} is divided over a mesh of devices, and {reason}. Leave it out of the targets, or run the "
        "model as transformers (tp_plan) or torch (parallelize_module) has parallelised it."
    )

"""Rules of embedding matrices: some rows trained fully, and weights that are tied to another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from funclora._torch.pytree import pytree_node
from funclora.errors import ParamsError, near
from funclora.rules.base import Rule, kinds_of
from funclora.rules.layouts import Embedding, Matrices, Parameter
from funclora.rules.linear_ops import LinearOp


@pytree_node
@dataclass(frozen=True, eq=False)
class TrainableTokens(Rule):
    """Replaces rows of an embedding matrix: W[token_indices] = value (PEFT's `trainable_token_indices`).

    A lookup never copies the matrix, nor does its use as an output layer.

    Attributes:
        value: the new rows, `[n, dim]`, cast to the matrix's dtype where they are used.
        token_indices: the n different rows to replace.
        layout: how the matrix is stored: `[tokens, dim]`, or transposed.

    Examples:
        >>> import torch
        >>> TrainableTokens(torch.ones(1, 2), token_indices=(1,)).dense(torch.zeros(3, 2))
        tensor([[0., 0.],
                [1., 1.],
                [0., 0.]])
    """

    value: Tensor
    token_indices: tuple[int, ...] = field(kw_only=True)
    layout: Matrices = field(default=Embedding(), kw_only=True)

    leaf_names: ClassVar[tuple[str, ...]] = ("value",)

    def __post_init__(self) -> None:
        if not isinstance(self.value, Tensor):
            raise ParamsError(f"TrainableTokens.value: expected a tensor, got {type(self.value).__name__}.")
        ids = self.token_indices
        if not isinstance(ids, tuple) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise ParamsError(f"TrainableTokens.token_indices: expected a tuple of ids from 0 up, got {ids!r:.200}.")
        if len(set(ids)) < len(ids):
            raise ParamsError(f"TrainableTokens.token_indices: expected different ids, got {ids!r:.200}.")

    def dense(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0 if self.layout.transposed else 1, self._index(weight), self._stored(weight))

    def apply_op(self, op: LinearOp, weight: Tensor, dropout: float) -> Tensor:
        return op.replaced(weight, self._index(weight), self._stored(weight))

    def check(self, name: str, weight: Tensor) -> None:
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ParamsError(
                f"{name!r} has shape {list(weight.shape)} and dtype {weight.dtype}; TrainableTokens needs a matrix "
                "[tokens, dim] of floating-point numbers."
            )
        n_tokens, dim = weight.shape if self.layout.transposed else weight.mT.shape
        if max(self.token_indices) >= n_tokens:
            raise ParamsError(
                f"adapter of {name!r}: token {max(self.token_indices)} is not in the matrix, which has {n_tokens} rows."
            )
        wanted = (len(self.token_indices), dim)
        if tuple(self.value.shape) != wanted:
            raise ParamsError(
                f"adapter of {name!r}: value has shape {list(self.value.shape)}, expected {list(wanted)}: one row of "
                "the matrix for each token."
            )

    def transposed(self) -> TrainableTokens:
        return replace(self, layout=Parameter(not self.layout.transposed))

    def narrow_outputs(self, start: int, length: int) -> TrainableTokens:
        return replace(self, value=self.value.narrow(-1, start, length), layout=Parameter(self.layout.transposed))

    def narrow_inputs(self, start: int, length: int) -> TrainableTokens | None:
        kept = [i for i, token in enumerate(self.token_indices) if start <= token < start + length]
        if not kept:
            return None
        tokens = tuple(self.token_indices[i] - start for i in kept)
        return replace(
            self, value=self.value[..., kept, :], token_indices=tokens, layout=Parameter(self.layout.transposed)
        )

    def _index(self, weight: Tensor) -> Tensor:
        return torch.tensor(self.token_indices, device=weight.device)

    def _stored(self, weight: Tensor) -> Tensor:
        value = self.value.to(weight.dtype)
        return value if self.layout.transposed else value.mT


@pytree_node
@dataclass(frozen=True, eq=False)
class Tied(Rule):
    """Rewrites a parameter as the rule of another one does: the model ties the two.

    It has no tensors. The one rule gets the gradients of both uses.

    Attributes:
        to: the full name of the parameter whose rule it follows.

    Examples:
        >>> import torch
        >>> from funclora import Full, merge
        >>> table = torch.zeros(1)
        >>> merge({"embed": table, "head": table}, {"embed": Full(torch.ones(1)), "head": Tied("embed")})["head"]
        tensor([1.])
    """

    to: str

    leaf_names: ClassVar[tuple[str, ...]] = ()

    def dense(self, weight: Tensor) -> Tensor:
        self._alone()

    def check(self, name: str, weight: Tensor) -> None:
        self._alone()

    def _alone(self) -> NoReturn:
        raise ParamsError(f"Tied({self.to!r}) has no meaning without the adapters that it is part of.")


def untied(adapters: Mapping[str, Rule]) -> Mapping[str, Rule]:
    """The adapters, with each `Tied` rule replaced by the rule that it follows.

    Raises:
        ParamsError: a parameter is tied to one that has no rule, or is tied itself.
    """
    if not any(issubclass(kind, Tied) for kind in kinds_of(adapters)):
        return adapters
    return {name: _followed(name, rule, adapters) for name, rule in adapters.items()}


def _followed(name: str, rule: Rule, adapters: Mapping[str, Rule]) -> Rule:
    if not isinstance(rule, Tied):
        return rule
    followed = adapters.get(rule.to)
    if followed is None or isinstance(followed, Tied):
        raise ParamsError(
            f"adapters[{name!r}] is tied to {rule.to!r}, which has no rule of its own. Give it one, or tie {name!r} to "
            f"a parameter that has.{near(rule.to, adapters)}"
        )
    return followed

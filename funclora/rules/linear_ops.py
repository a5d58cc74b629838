"""Operations that are linear in a weight, and how each is computed from the factors of an update."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora._torch.functions import CONVS, is_watched, overwriting
from funclora.rules.grouped import fits, linear_in_groups, projected


class LinearOp(ABC):
    """A torch operation as a linear function of one of its weights: `y = op(W) + bias`.

    M is the weight's matrix `[*lead, out, in]`. The operation maps inputs to output units (`x·Mᵀ`, the usual case)
    or, if `transposed`, output units to inputs (`x·M`, as a tied embedding does as output layer).

    Attributes:
        x: the input.
        bias: the tensor that is added to the result, or None.
        transposed: the operation computes `x·M`.
        takes_dropout: dropout acts on its input.
        feature_dim: the dimension of its input and of its result that the matrix acts on.

    Examples:
        A rule that multiplies the weight by one number, in every operation that the model calls:

        >>> from dataclasses import dataclass
        >>> import funclora as fl
        >>> @fl.rules.pytree_node
        ... @dataclass(frozen=True, eq=False)
        ... class Gain(fl.Rule):
        ...     gain: Tensor
        ...     leaf_names = ("gain",)
        ...     layout = fl.rules.Linear()
        ...
        ...     def dense(self, weight):
        ...         return weight * self.gain
        ...
        ...     def apply_op(self, op, weight, dropout):
        ...         return op.scaled_input(self.gain).dense(weight, bias=True)
        ...
        ...     def check(self, name, weight): ...
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> rule = Gain(torch.tensor(10.0))
        >>> fl.apply(model, {"weight": torch.ones(1, 2)}, {"weight": rule}, torch.ones(1, 2))
        tensor([[20.]])
    """

    x: Tensor
    bias: Tensor | None = None
    transposed: bool = False
    takes_dropout: bool = True
    feature_dim: int = -1
    _attributes: ClassVar[tuple[str, ...]]  # as its __init__ names them

    def __init_subclass__(cls) -> None:
        cls._attributes = tuple(inspect.signature(cls).parameters)

    @abstractmethod
    def dense(self, weight: Tensor, *, bias: bool) -> Tensor:
        """The operation on a plain weight, with or without its bias."""

    @abstractmethod
    def low_rank(self, a: Tensor, b: Tensor, dropout: float) -> Tensor:
        """The operation on the weight B·A, through its two factors; dropout acts on the input of the first."""

    @abstractmethod
    def per_output(self, vector: Tensor) -> Tensor:
        """A vector `[*lead, out]`, shaped to broadcast over the result (over the input, if `transposed`)."""

    def add_low_rank(
        self, y: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, dropout: float, *, temporary: bool = False
    ) -> Tensor:
        """`y + s·low_rank(a, b, dropout)`, in the wider dtype of the two.

        Args:
            y: a result of this operation.
            a: as in `low_rank`, like b and dropout.
            b: the second factor.
            scaling: s.
            dropout: the probability.
            temporary: y may be overwritten.
        """
        return added(y, self.low_rank(a, b, dropout), scaling)

    def grouped(self, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor | None, dropout: float) -> Tensor:
        """`s·low_rank` of several updates, each on its own inputs.

        Args:
            x: `[groups, rows, *]`: for each group an input of this operation; `rows` is its first dimension.
            a: `[groups, *]`.
            b: `[groups, *]`.
            scalings: `[groups]`, or None for 1.
            dropout: as in `low_rank`.

        Returns:
            `[groups, rows, *]`.
        """
        randomness = "different" if dropout else "error"
        b = scaled(b, scalings)
        by_group = torch.func.vmap(lambda x, a, b: self.with_input(x).low_rank(a, b, dropout), randomness=randomness)
        out: Tensor = by_group(x, a, b)
        return out

    def add_grouped(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor | None) -> Tensor:
        """`y + grouped(x, a, b, scalings)`, in the wider dtype of the two.

        Args:
            y: `[groups, rows, *]`, a temporary, which may be overwritten.
            x: as in `grouped`, like the other arguments.
            a: `[groups, *]`.
            b: `[groups, *]`.
            scalings: `[groups]`, or None for 1.
        """
        return y + self.grouped(x, a, b, scalings, 0.0)

    def in_groups(
        self,
        weight: Tensor,
        x: Tensor,
        sizes: Sequence[int],
        groups: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        bias: bool,
    ) -> Tensor | None:
        """The operation on all rows of all groups, with the update of each, if it has such a form.

        Args:
            weight: the base weight.
            x: `[n, *]`, the input of this operation with the rows first.
            sizes: the number of rows of each group. The groups follow each other.
            groups: for each the factors and scalings of `grouped`.
            bias: with the operation's bias.

        Returns:
            `[n, *]`, or None: compute `dense` and `add_grouped`.
        """
        return None

    def by_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """The operation without bias on an input `[rows, *]` of this one."""
        return self.with_input(x).dense(weight, bias=False)

    def with_input(self, x: Tensor) -> LinearOp:
        """The same operation on another input."""
        new = object.__new__(type(self))
        if torch.compiler.is_compiling():  # torch 2.10 cannot trace __dict__
            for name in self._attributes:
                setattr(new, name, getattr(self, name))
        else:
            new.__dict__.update(self.__dict__)
        new.x = x
        return new

    def flat(self) -> LinearOp:
        """The same operation on a matrix of inputs, which is faster, if it has one; otherwise the operation itself."""
        return self

    def shaped(self, y: Tensor) -> Tensor:
        """The result of this operation from that of `flat`, if that is another one."""
        return y

    def scaled_input(self, factor: Tensor) -> LinearOp:
        """The same operation on `input · factor`."""
        return self.with_input((self.x * factor).to(self.x.dtype))

    def replaced(self, weight: Tensor, index: Tensor, value: Tensor) -> Tensor:
        """The operation, with its bias, on the weight with some columns of M replaced.

        Args:
            weight: the base weight.
            index: `[n]`, the columns (inputs) of M.
            value: these columns as the weight stores them: `[n, out]` if it is `[in, out]`, otherwise `[out, n]`.
        """
        if self.transposed:  # the inputs of M are the operation's outputs
            y, part = self.dense(weight, bias=True), self.dense(value, bias=False)
            part = part if self.bias is None else part + self.bias[index]
            return y.index_copy(self.feature_dim, index, part.to(y.dtype))
        kept, others = self.x.index_fill(self.feature_dim, index, 0), self.x.index_select(self.feature_dim, index)
        return self.with_input(kept).dense(weight, bias=True) + self.with_input(others).dense(value, bias=False)

    def finish(self, y: Tensor) -> Tensor:
        """The part of the operation that follows its linear part."""
        return y


def scaled(x: Tensor, scalings: Tensor | None) -> Tensor:
    """x `[groups, *]` times a number for each group, in the dtype of x."""
    return x if scalings is None else (x * scalings.reshape(-1, *[1] * (x.dim() - 1))).to(x.dtype)


def added(y: Tensor, u: Tensor, scaling: float | Tensor) -> Tensor:
    """y + s·u, in the wider dtype of the two."""
    return y + u * scaling if isinstance(scaling, Tensor) else torch.add(y, u, alpha=scaling)


def _input(x: Tensor, a: Tensor, dropout: float) -> Tensor:
    """The input of the low-rank path: in the adapter's dtype, with dropout."""
    x = x if x.dtype is a.dtype else x.to(a.dtype)
    return F.dropout(x, dropout) if dropout else x


# Dtypes in which a sum may be rounded at a different step than in PEFT.
EXACT = (torch.float32, torch.float64)


def add_products(y: Tensor, x: Tensor, first: Tensor, second: Tensor, scalings: Tensor | None) -> None:
    """Add the low-rank updates of several groups to y in place, where nothing sees that; all in one dtype.

    Args:
        y: `[groups, rows, out]`.
        x: `[groups, rows, in]`.
        first: `[groups, r, in]`.
        second: `[groups, r, out]`.
        scalings: `[groups]`, or None for 1.
    """
    h = projected(x, first, scalings).mT
    if y.dtype in EXACT:
        y.baddbmm_(h, second)
    else:
        y += torch.bmm(h, second)


class LinearLayerOp(LinearOp):
    """`F.linear(x, W, bias)`, x: `[*, in]`, W: `[out, in]`, or stored transposed and then transposed."""

    def __init__(self, x: Tensor, bias: Tensor | None, *, transposed: bool) -> None:
        self.x = x
        self.bias = bias
        self.transposed = transposed

    def dense(self, weight: Tensor, *, bias: bool) -> Tensor:
        return F.linear(self.x, weight, self.bias if bias else None)

    def low_rank(self, a: Tensor, b: Tensor, dropout: float) -> Tensor:
        h, second = self._project_down(a, b, dropout)
        return F.linear(h, second)

    def _project_down(self, a: Tensor, b: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        first, second = (b.mT, a.mT) if self.transposed else (a, b)
        return F.linear(_input(self.x, a, dropout), first), second

    def add_low_rank(
        self, y: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, dropout: float, *, temporary: bool = False
    ) -> Tensor:
        h, second = self._project_down(a, b, dropout)
        dtype = y.dtype
        if isinstance(scaling, Tensor) or y.dim() < 2 or not (dtype == h.dtype == b.dtype) or dtype not in EXACT:
            return added(y, F.linear(h, second), scaling)
        rows = y
        if y.dim() > 2:
            rows, h = y.flatten(0, -2), h.flatten(0, -2)
        # The product is added in place: this saves one pass over the outputs, forward and backward.
        if temporary and type(y) is Tensor and y.is_contiguous() and not torch.is_grad_enabled() and not is_watched():
            rows.addmm_(h, second.mT, alpha=scaling)
            return y
        added_up = torch.addmm(rows, h, second.mT, alpha=scaling)
        return added_up if rows is y else added_up.view_as(y)

    def grouped(self, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor | None, dropout: float) -> Tensor:
        h, second = self._grouped_down(_input(x, a, dropout), a, b, scalings)
        return (h @ second).view(*x.shape[:-1], second.shape[-1])

    def add_grouped(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor | None) -> Tensor:
        h, second = self._grouped_down(x.to(a.dtype), a, b, scalings)
        if not (y.dtype == h.dtype == second.dtype) or y.dtype not in EXACT:
            return y + (h @ second).view_as(y)
        return overwriting()(torch.baddbmm, y.flatten(1, -2), h, second).view_as(y)

    def in_groups(
        self,
        weight: Tensor,
        x: Tensor,
        sizes: Sequence[int],
        groups: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        bias: bool,
    ) -> Tensor | None:
        matrix, added = self._matrix(weight), self.bias if bias else None
        factors = [(b.mT, a, s) if self.transposed else (a, b.mT, s) for a, b, s in groups]
        if weight.dim() != 2 or not fits(x, matrix, added, factors):
            return None
        return linear_in_groups(x, matrix, added, sizes, factors)

    def _matrix(self, weight: Tensor) -> Tensor:
        """The matrix with which `F.linear` computes this operation."""
        return weight

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices `[groups, r, *]` of the two products of `grouped`."""
        return (b.mT, a) if self.transposed else (a, b.mT)

    def _grouped_down(self, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor | None) -> tuple[Tensor, Tensor]:
        """The inputs `[groups, rows, r]` and the matrices `[groups, r, *]` of the second product of `grouped`."""
        first, second = self.factors(a, b)
        return projected(x.flatten(1, -2), first, scalings).mT, second

    def per_output(self, vector: Tensor) -> Tensor:
        return vector

    def flat(self) -> LinearOp:
        x = self.x
        # A tensor that tracks its rows needs all dimensions; other products than those of the base round otherwise.
        if type(x) is not Tensor or x.dim() < 3 or not x.is_contiguous():
            return self
        return LinearLayerOp(x.flatten(0, -2), self.bias, transposed=self.transposed)

    def shaped(self, y: Tensor) -> Tensor:
        return y.view(*self.x.shape[:-1], y.shape[-1])


class MatmulOp(LinearLayerOp):
    """`x @ W (+ bias)`, x: `[*lead, tokens, in]`, W: `[*lead, in, out]`, or stored as M and then transposed."""

    def dense(self, weight: Tensor, *, bias: bool) -> Tensor:
        if bias and self.bias is not None:
            return torch.addmm(self.bias, self.x, weight)
        return self.x @ weight

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def flat(self) -> LinearOp:
        return self  # its leading dimensions may be those of the weight

    def low_rank(self, a: Tensor, b: Tensor, dropout: float) -> Tensor:
        first, second = (b, a) if self.transposed else (a.mT, b.mT)
        return _input(self.x, a, dropout) @ first @ second

    def add_low_rank(
        self, y: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, dropout: float, *, temporary: bool = False
    ) -> Tensor:
        plain = LinearOp if a.dim() > 2 else LinearLayerOp
        return plain.add_low_rank(self, y, a, b, scaling, dropout, temporary=temporary)

    def grouped(self, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor | None, dropout: float) -> Tensor:
        lead = (
            a.dim() - 3
        )  # of experts: `[groups, rows, *lead, *, in]`, and the kernel needs `[groups, *lead, rows, in]`
        if not lead:
            return super().grouped(x, a, b, scalings, dropout)
        x = x.movedim(1, 1 + lead)
        y = LinearOp.grouped(self, x.flatten(1 + lead, -2), a, b, scalings, dropout)
        tokens: Tensor = y.unflatten(1 + lead, x.shape[1 + lead : -1])
        return tokens.movedim(1 + lead, 1)

    def add_grouped(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor | None) -> Tensor:
        plain = LinearOp if a.dim() > 3 else LinearLayerOp
        return plain.add_grouped(self, y, x, a, b, scalings)

    def per_output(self, vector: Tensor) -> Tensor:
        return vector.unsqueeze(-2) if vector.dim() > 1 else vector


class LeftMatmulOp(LinearOp):
    """`W @ x`, x: `[*lead, in, columns]`, W: `[*lead, out, in]`, or stored transposed and then transposed."""

    feature_dim = -2

    def __init__(self, x: Tensor, *, transposed: bool) -> None:
        self.x = x
        self.transposed = transposed

    def dense(self, weight: Tensor, *, bias: bool) -> Tensor:
        return weight @ self.x

    def low_rank(self, a: Tensor, b: Tensor, dropout: float) -> Tensor:
        first, second = (b.mT, a.mT) if self.transposed else (a, b)
        return second @ (first @ _input(self.x, a, dropout))

    def per_output(self, vector: Tensor) -> Tensor:
        return vector.unsqueeze(-1)


class GroupedMatmulOp(LinearOp):
    """`F.grouped_mm(x, W, offs=offs)`: rows of x sorted by expert, W: `[experts, in, out]`, or transposed."""

    def __init__(self, op: Callable[..., Tensor], x: Tensor, offs: Tensor, *, transposed: bool) -> None:
        self.op = op
        self.x = x
        self.offs = offs
        self.transposed = transposed

    def dense(self, weight: Tensor, *, bias: bool) -> Tensor:
        return self.op(self.x, weight, offs=self.offs)

    def low_rank(self, a: Tensor, b: Tensor, dropout: float) -> Tensor:
        # The kernel needs rows of a multiple of 16 bytes: ranks are padded with zeros, which add nothing.
        missing = -a.shape[-2] % (16 // a.element_size())
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        first, second = (b, a) if self.transposed else (a.mT, b.mT)
        x = _input(self.x, a, dropout)
        return self.op(self.op(x, first, offs=self.offs), second, offs=self.offs)

    def per_output(self, vector: Tensor) -> Tensor:
        rows = torch.arange(self.x.shape[0], device=self.offs.device, dtype=self.offs.dtype)
        return vector[torch.searchsorted(self.offs, rows, right=True)]


class EmbeddingOp(LinearOp):
    """Rows of an embedding matrix, `[*ids, dim]`."""

    takes_dropout = False  # the input is a one-hot vector: dropout would drop complete tokens. PEFT has none either

    def __init__(
        self,
        x: Tensor,
        n_rows: int,
        padding_idx: int | None,
        max_norm: float | None,
        norm_type: float,
        scale_grad_by_freq: bool,
    ) -> None:
        self.x = x
        self.n_rows = n_rows
        self.padding_idx = padding_idx
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq

    def dense(self, weight: Tensor, *, bias: bool) -> Tensor:
        return F.embedding(self.x, weight)

    def low_rank(self, a: Tensor, b: Tensor, dropout: float) -> Tensor:
        return F.linear(F.embedding(self.x, a.mT), b)

    def per_output(self, vector: Tensor) -> Tensor:
        return vector

    def replaced(self, weight: Tensor, index: Tensor, value: Tensor) -> Tensor:
        n = len(index)
        places = torch.full((self.n_rows,), n, device=index.device)  # n: not among them
        place = places.index_copy(0, index, torch.arange(n, device=index.device))[self.x]
        y = self.dense(weight, bias=True)
        return torch.where((place < n).unsqueeze(-1), F.embedding(place.clamp(max=n - 1), value).to(y.dtype), y)

    def finish(self, y: Tensor) -> Tensor:
        """Renormalisation and the gradient rules of `F.embedding`, on the rows instead of the embedding matrix."""
        if self.max_norm is not None:
            # torch renormalises the matrix outside of autograd: the value changes, the gradient ignores it.
            norm = torch.linalg.vector_norm(y.detach(), self.norm_type, dim=-1, keepdim=True)
            scale = torch.where(norm > self.max_norm, self.max_norm / (norm + 1e-7), 1.0)
            y = y + (y * scale - y).detach()
        if self.scale_grad_by_freq:
            flat = self.x.flatten()
            counts = torch.zeros(self.n_rows, device=y.device)  # float32: bfloat16 counts only to 256
            counts = counts.scatter_add(0, flat, torch.ones_like(flat, dtype=counts.dtype))
            y = y.detach() + (y - y.detach()) / counts[self.x].unsqueeze(-1).to(y.dtype)
        if self.padding_idx is not None:
            padding = self.padding_idx % self.n_rows
            y = torch.where((self.x == padding).unsqueeze(-1), y.detach(), y)
        return y


class ConvOp(LinearOp):
    """A convolution; `[batch, out, *space]`, the batch dimension may be absent."""

    def __init__(self, conv: Callable[..., Tensor], x: Tensor, bias: Tensor | None, spatial: int,
                 options: dict[str, Any]) -> None:  # fmt: skip
        self.conv = conv
        self.x = x
        self.bias = bias
        self.spatial = spatial
        self.options = options

    @property
    def groups(self) -> int:
        groups: int = self.options["groups"]
        return groups

    def dense(self, weight: Tensor, *, bias: bool) -> Tensor:
        return self.conv(self.x, weight, self.bias if bias else None, **self.options)

    def low_rank(self, a: Tensor, b: Tensor, dropout: float) -> Tensor:
        h = self.conv(_input(self.x, a, dropout), self.down(a), None, **self.options)
        return CONVS[self.spatial](h, b, groups=self.groups)

    def grouped(self, x: Tensor, a: Tensor, b: Tensor, scalings: Tensor | None, dropout: float) -> Tensor:
        several = x.shape[1 : -self.spatial - 1]
        y: Tensor = super().grouped(x.flatten(1, len(several)), a, b, scalings, dropout).unflatten(1, several)
        return y

    def by_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        several = x.shape[: -self.spatial - 1]
        y: Tensor = super().by_rows(x.flatten(0, len(several) - 1), weight).unflatten(0, several)
        return y

    def down(self, a: Tensor) -> Tensor:
        """The kernel of the first convolution: every group applies the same `a` to its channels."""
        return a.repeat(self.groups, *(1 for _ in range(a.dim() - 1))) if self.groups > 1 else a

    def per_output(self, vector: Tensor) -> Tensor:
        return vector.reshape(*vector.shape, *(1 for _ in range(self.spatial)))


class ConvTransposeOp(ConvOp):
    """A transposed convolution."""

    def down(self, a: Tensor) -> Tensor:
        return super().down(a.transpose(0, 1))

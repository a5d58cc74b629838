"""Where a weight tensor holds the matrix that a low-rank update changes.

Every rule treats a weight as a matrix M of shape `[*lead, out, in]`, one row per output unit. A layout says
how the module's tensor stores M, and which shapes the factors of an update B·A have:

    layout                  weight                    a                  b                  lead
    Linear, Recurrent, ...  [out, in]                 [r, in]            [out, r]
    Conv1D, Embedding       [in, out]                 [r, in]            [out, r]
    Conv                    [out, in/g, *k]           [r, in/g, *k]      [out, r, 1, ..]
    ConvTranspose           [in, out/g, *k]           [r, in/g, *k]      [out, r, 1, ..]
    Parameter               [*lead, out, in]          [*lead, r, in]     [*lead, out, r]    experts

Layouts are static: they are compared and hashed, never differentiated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout(ABC):
    """The place of the matrix `[*lead, out, in]` in a weight. One subclass per kind of owner.

    Examples:
        >>> from funclora.rules import Conv, Conv1D
        >>> import torch
        >>> Conv1D().to_matrix(torch.zeros(5, 3)).shape, Conv().to_matrix(torch.zeros(4, 2, 3, 3)).shape
        (torch.Size([3, 5]), torch.Size([4, 18]))
        >>> Conv().factor_shapes((4, 2, 3, 3), r=8)
        ((8, 2, 3, 3), (4, 8, 1, 1))
    """

    @abstractmethod
    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix.

        Args:
            weight: the tensor as its module stores it.

        Returns:
            `[*lead, out, in]`, a view where that is possible.
        """

    @abstractmethod
    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `to_matrix`: the tensor of the given shape that holds `matrix: [*lead, out, in]`."""

    @abstractmethod
    def factor_shapes(self, shape: tuple[int, ...], r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `a` and `b` of a rank-r update of a weight of that shape."""

    def magnitude_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a DoRA magnitude, one value per output unit: `[*lead, out]`."""
        return self.factor_shapes(shape, 1)[1][: self.expert_dims(shape) + 1]

    @property
    def transposed(self) -> bool:
        """True if the weight stores `[*lead, in, out]`."""
        return False

    def expert_dims(self, shape: tuple[int, ...]) -> int:
        """The number of leading dimensions of the weight that count matrices (experts) instead of belonging to one."""
        return 0

    def counts(self, shape: tuple[int, ...], dim: int) -> Literal["experts", "outputs", "inputs"] | None:
        """What a dimension of the weight, counted from the front, counts; None if it is not exactly one of these."""
        return None

    def of_outputs(self) -> Layout | None:
        """The layout of a weight with some of the output units; None if they are not slices of the weight."""
        return self

    @property
    def rank_dims(self) -> tuple[int, int]:
        """The rank dimensions of `a` and `b`."""
        return 0, 1

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factors as matrices `[*lead, r, in]` and `[*lead, out, r]`."""
        return a, b

    def split_inputs(self, weight: Tensor, a: Tensor, n: int) -> Iterable[tuple[Tensor, Tensor]]:
        """The weight and `a`, cut along the inputs into about n pieces where `to_matrix` would copy."""
        return [(weight, a)]


def padded(factor: Tensor, dim: int, size: int) -> Tensor:
    """A factor with zeros after the last rank along `dim`: the zeros add nothing, and get no gradient."""
    if factor.shape[dim] == size:
        return factor
    behind = factor.dim() - 1 - dim % factor.dim()
    return F.pad(factor, (0, 0) * behind + (0, size - factor.shape[dim]))


def stacked(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The factors of a weight that is several ones with the same inputs, one after the other along the outputs.

    Args:
        parts: `a: [*lead, r, in]` and `b: [*lead, out, r]` of each.

    Returns:
        Factors of the same rank if all parts have the same `a`, otherwise of the sum of their ranks.
    """
    a, _ = parts[0]
    if all(torch.equal(a, other) for other, _ in parts):
        return a, torch.cat([part for _, part in parts], dim=-2)
    ranks = [part.shape[-1] for _, part in parts]
    rows = [
        F.pad(part, (sum(ranks[:i]), sum(ranks[i + 1 :]))) for i, (_, part) in enumerate(parts)
    ]  # a block-diagonal matrix
    return torch.cat([part for part, _ in parts], dim=-2), torch.cat(rows, dim=-2)


@dataclass(frozen=True)
class Matrices(Layout):
    """M (or a stack of such matrices) is the last two dimensions of the weight, possibly transposed.

    Examples:
        >>> Parameter().counts((8, 3, 5), 0), Parameter().counts((8, 3, 5), 1), Conv1D().counts((5, 3), 1)
        ('experts', 'outputs', 'outputs')
    """

    @property
    def rank_dims(self) -> tuple[int, int]:
        return -2, -1

    def expert_dims(self, shape: tuple[int, ...]) -> int:
        return len(shape) - 2

    def counts(self, shape: tuple[int, ...], dim: int) -> Literal["experts", "outputs", "inputs"] | None:
        if dim < len(shape) - 2:
            return "experts"
        return "inputs" if (dim == len(shape) - 1) != self.transposed else "outputs"

    def of_outputs(self) -> Layout:
        return Parameter(self.transposed)  # no longer a module's own weight

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def factor_shapes(self, shape: tuple[int, ...], r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *lead, n_out, n_in = shape
        if self.transposed:
            n_in, n_out = n_out, n_in
        return (*lead, r, n_in), (*lead, n_out, r)


@dataclass(frozen=True)
class Linear(Matrices):
    """`nn.Linear`: weight `[out, in]`.

    Examples:
        >>> Linear().factor_shapes((3, 5), r=2)
        ((2, 5), (3, 2))
    """


@dataclass(frozen=True)
class Conv1D(Matrices):
    """transformers' `Conv1D` (GPT-2), a linear layer whose weight is stored as `[in, out]`.

    Examples:
        >>> Conv1D().factor_shapes((5, 3), r=2)
        ((2, 5), (3, 2))
    """

    @property
    def transposed(self) -> bool:
        return True


@dataclass(frozen=True)
class Embedding(Matrices):
    """`nn.Embedding`: weight `[in, out]` with in = number of ids and out = embedding dimension.

    Attributes:
        max_norm: the module renormalises the rows that it reads. Kept so that writers of formats whose
            readers apply it elsewhere can refuse.

    Examples:
        >>> Embedding().factor_shapes((7, 4), r=2)
        ((2, 7), (4, 2))
    """

    max_norm: bool = False

    @property
    def transposed(self) -> bool:
        return True


@dataclass(frozen=True)
class Attention(Matrices):
    """An input or output projection of `nn.MultiheadAttention`: weight `[out, in]`.

    Examples:
        >>> Attention().factor_shapes((24, 8), r=2)
        ((2, 8), (24, 2))
    """


@dataclass(frozen=True)
class Recurrent(Matrices):
    """A weight of `nn.RNN`, `nn.LSTM` or `nn.GRU`: `[gates·hidden, in]`.

    Examples:
        >>> Recurrent().factor_shapes((16, 3), r=2)
        ((2, 3), (16, 2))
    """


@dataclass(frozen=True)
class Parameter(Matrices):
    """Any other parameter, named in `target_parameters`: `[*lead, out, in]`, one update per leading index.

    Attributes:
        stored_transposed: the weight is `[*lead, in, out]` (the owner says so with `is_transposed`).
        position: the number of adapted parameters that the same module registered before this one. PEFT's files
            identify the parameters of one module only by this order.
        siblings: the total number of adapted parameters of the module.

    Examples:
        >>> Parameter(stored_transposed=True).factor_shapes((8, 5, 3), r=2)
        ((8, 2, 5), (8, 3, 2))
    """

    stored_transposed: bool = False
    position: int = 0
    siblings: int = 1

    @property
    def transposed(self) -> bool:
        return self.stored_transposed


@dataclass(frozen=True)
class Conv(Layout):
    """`nn.Conv1d/2d/3d`: weight `[out, in/groups, *kernel]`, M is `[out, in/groups·kernel]`.

    With groups, every group of output channels applies the same `a` to its own input channels. The update
    is therefore one kernel of the weight's shape.

    Attributes:
        groups: the module's groups.
        dilated: the module's dilation is not 1 everywhere.
        padding_mode: the module's padding mode. Neither changes the update; both are kept so that writers of
            formats whose readers drop them can refuse.

    Examples:
        >>> Conv(groups=2).factor_shapes((6, 2, 3), r=4)
        ((4, 2, 3), (6, 4, 1))
    """

    groups: int = 1
    dilated: bool = False
    padding_mode: str = "zeros"

    def counts(self, shape: tuple[int, ...], dim: int) -> Literal["experts", "outputs", "inputs"] | None:
        return "outputs" if dim == 0 else None

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.reshape(shape)

    def factor_shapes(self, shape: tuple[int, ...], r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        n_out, n_in, *kernel = shape
        return (r, n_in, *kernel), (n_out, r, *(1 for _ in kernel))

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.flatten(1), b.flatten(1)


@dataclass(frozen=True)
class ConvTranspose(Layout):
    """`nn.ConvTranspose1d/2d/3d`: weight `[in, out/groups, *kernel]`, M is `[out, in/groups·kernel]`.

    Attributes:
        groups: the module's groups. They share `a`, as in `Conv`.

    Examples:
        >>> ConvTranspose(groups=2).factor_shapes((4, 3, 3), r=5)
        ((5, 2, 3), (6, 5, 1))
    """

    groups: int = 1

    def counts(self, shape: tuple[int, ...], dim: int) -> Literal["experts", "outputs", "inputs"] | None:
        return "outputs" if dim == 1 and self.groups == 1 else None

    def of_outputs(self) -> Layout | None:
        return self if self.groups == 1 else None

    def to_matrix(self, weight: Tensor) -> Tensor:
        grouped: Tensor = weight.unflatten(0, (self.groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        n_in, n_out, *kernel = shape
        grouped = matrix.reshape(self.groups, n_out, n_in // self.groups, *kernel)
        return grouped.transpose(1, 2).reshape(shape)

    def factor_shapes(self, shape: tuple[int, ...], r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        n_in, n_out, *kernel = shape
        return (r, n_in // self.groups, *kernel), (n_out * self.groups, r, *(1 for _ in kernel))

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.flatten(1), b.flatten(1)

    def split_inputs(self, weight: Tensor, a: Tensor, n: int) -> Iterable[tuple[Tensor, Tensor]]:
        grouped: Tensor = weight.unflatten(0, (self.groups, -1))
        size = -(-grouped.shape[1] // n)
        for piece, a_piece in zip(grouped.split(size, 1), a.split(size, 1), strict=True):
            yield piece.flatten(0, 1), a_piece

"""Rules: what an adapter does to one weight. The mathematics of a method is written here, once.

    LoRA(a, b)             W  ->  W + s·B·A
    DoRA(a, b, magnitude)  W  ->  m · (W + s·B·A) / ‖W + s·B·A‖      (norm per output unit)
    Full(value)            W  ->  value
    Delta(value)           W  ->  W + s·value

A rule is a pytree node: its children are exactly its trainable tensors, everything else is static. It knows two
things: its dense form (`dense`), and how an operation that is linear in the weight is computed without that
dense form (`read`). A new method is a new subclass of `Rule`, made a tree node by `pytree_node`; those of tables of
tokens are in `_tokens`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from funclora._quant.tensor import Quantized, plain_weight
from funclora._torch.pytree import pytree_node
from funclora.errors import ParamsError
from funclora.rules.layouts import Layout, Linear, Parameter

# A block of the adapted weight that the DoRA norm looks at holds at most this many elements ...
NORM_BLOCK = 2**20
# ... and at most this share of the weight, so that the weight as a whole never exists.
NORM_SHARE = 8
# What is left of the squares of two vectors where their difference is no more than float32's rounding of them.
CANCELLED = 2.0**-46


class LinearMap(Protocol):
    """A torch operation seen as a linear function of one of its weights: `y = map(W) + bias`.

    With M the weight's matrix `[*lead, out, in]`, the operation either takes inputs to output units (`x·Mᵀ`, the
    usual case) or, `backwards`, output units to inputs (`x·M`, as a tied embedding does as output layer).
    """

    bias: Tensor | None
    backwards: bool

    def dense(self, weight: Tensor, *, bias: bool) -> Tensor:
        """The operation on a plain weight, with or without its bias."""

    def low_rank(self, a: Tensor, b: Tensor, dropout: float) -> Tensor:
        """The operation on the weight B·A, through its two factors; dropout acts on the input of the first."""

    def per_output(self, vector: Tensor) -> Tensor:
        """A vector `[*lead, out]`, shaped to broadcast over the result (over the input, if `backwards`)."""

    def add_low_rank(self, y: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, dropout: float) -> Tensor:
        """`y + s·low_rank(a, b, dropout)`, in the wider dtype of the two."""

    def scaled_input(self, factor: Tensor) -> LinearMap:
        """The same operation on `input · factor`."""

    def replaced(self, weight: Tensor, index: Tensor, value: Tensor) -> Tensor:
        """The operation, with its bias, on the weight in which some columns of M are others.

        Args:
            weight: the base weight.
            index: `[n]`, which columns: the inputs of M.
            value: these columns as the weight stores them: `[n, out]` if it is `[in, out]`, else `[out, n]`.
        """


class Rule(ABC):
    """Rewrites one weight. Subclasses are frozen dataclasses whose tensors come first."""

    leaves: ClassVar[tuple[str, ...]]
    # The dense form costs nothing: it is used as it is, no lazy weight stands for it.
    dense_is_free: ClassVar[bool] = False

    @abstractmethod
    def dense(self, weight: Tensor) -> Tensor:
        """The rewritten weight, not yet rounded: in float32 at least, in the adapter's dtype if that is wider.

        Args:
            weight: the base weight, as its module stores it.

        Returns:
            A tensor of the weight's shape.
        """

    def read(self, op: LinearMap, weight: Tensor, dropout: float) -> Tensor:
        """The result of `op` on the rewritten weight, in the dtype that `op` gives on the base weight.

        Args:
            op: the operation.
            weight: the base weight.
            dropout: the probability that applies in this call (0 in evaluation mode).
        """
        return op.dense(self.dense(weight).to(weight.dtype), bias=True)

    @abstractmethod
    def check(self, name: str, weight: Tensor) -> None:
        """Raise `ParamsError` if this rule does not fit the weight of that name."""

    def prepared(self, weight: Tensor) -> Rule:
        """A rule with the same results that has computed what depends on nothing but itself and the weight."""
        return self

    @property
    def dropout_p(self) -> float:
        """The dropout probability on the rule's own input in training mode."""
        return 0.0


@dataclass(frozen=True, eq=False)
class LowRank(Rule):
    """What the rules of a low-rank update s·B·A share: the factors and their fit to the weight.

    Attributes:
        a: the factor that reads the input, `[r, in]` (see `funclora.rules.layouts` for convolutions and experts).
        b: the factor that writes the output, `[out, r]`, of the dtype of `a`.
        scaling: s, usually α/r, or α/√r for rsLoRA (arXiv 2312.03732). A number; a tensor `[]` where members of a
            stack that differ in it are mapped.
        dropout: the probability with which inputs of `a` are dropped while the weight's module trains.
        layout: where the matrix lies in the weight.
    """

    a: Tensor
    b: Tensor
    scaling: float | Tensor = field(default=1.0, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)
    layout: Layout = field(default=Linear(), kw_only=True)

    leaves: ClassVar[tuple[str, ...]] = ("a", "b")

    def __post_init__(self) -> None:
        for name in self.leaves:
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise ParamsError(f"{type(self).__name__}.{name}: expected a tensor, got {type(value).__name__}.")
        if not 0 <= self.dropout < 1:
            raise ParamsError(f"{type(self).__name__}.dropout: expected a number in [0, 1), got {self.dropout!r}.")

    @property
    def r(self) -> int:
        """The rank of the update."""
        return self.layout.factors(self.a, self.b)[0].shape[-2]

    @property
    def dropout_p(self) -> float:
        return self.dropout

    def leaf_shapes(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        """The shapes that the leaves must have for that weight, by field name."""
        return dict(zip(("a", "b"), self.layout.factor_shapes(weight.shape, self.r), strict=True))

    def check(self, name: str, weight: Tensor) -> None:
        refuse_low_rank(name, weight)
        for leaf, shape in self.leaf_shapes(weight).items():
            got = tuple(getattr(self, leaf).shape)
            if got != shape:
                raise ParamsError(
                    f"adapter of {name!r}: {leaf} has shape {list(got)}, expected {list(shape)} for a weight of "
                    f"shape {list(weight.shape)} with layout {type(self.layout).__name__} and rank {self.r}."
                )

    def select(self, index: Any) -> LowRank:
        """The rule of `weight[index]`, where the index selects among leading dimensions (experts)."""
        leaves = {name: getattr(self, name)[index] for name in self.leaves}
        return replace(self, **leaves, layout=Parameter(self.layout.transposed))

    def rows(self, start: int, length: int) -> LowRank:
        """The rule of the output units from `start` on."""
        vectors = {name: getattr(self, name).narrow(-1, start, length) for name in self.leaves[2:]}
        return replace(self, b=self.b.narrow(-2, start, length), **vectors, layout=Parameter(self.layout.transposed))

    def flipped(self) -> LowRank:
        """The rule of the transposed weight."""
        return replace(self, layout=Parameter(not self.layout.transposed))

    def add_update(self, op: LinearMap, y: Tensor, dropout: float) -> Tensor:
        """`y + s·op(B·A)`, in the wider dtype of the two."""
        return op.add_low_rank(y, self.a, self.b, self.scaling, dropout)

    def delta(self) -> Tensor:
        """s·B·A as a matrix `[*lead, out, in]`, in float32 at least."""
        a, b = self.layout.factors(self.a, self.b)
        nothing = a.new_zeros(()).expand(*a.shape[:-2], b.shape[-2], a.shape[-1])
        return _updated(nothing, a, b, self.scaling)

    def update(self, weight: Tensor) -> Tensor:
        """M + s·B·A as a matrix `[*lead, out, in]`, in the dtype of `dense`."""
        a, b = self.layout.factors(self.a, self.b)
        return _updated(self.layout.matrix(plain_weight(weight)), a, b, self.scaling)


@pytree_node
@dataclass(frozen=True, eq=False)
class LoRA(LowRank):
    """The low-rank update W + s·B·A (Hu et al., arXiv 2106.09685, equation 3).

    Attributes:
        a: the factor that reads the input, `[r, in]`.
        b: the factor that writes the output, `[out, r]`.
        scaling: s.
        dropout: the probability with which inputs of `a` are dropped while the weight's module trains.
        layout: where the matrix lies in the weight.

    Examples:
        >>> import torch
        >>> rule = LoRA(torch.ones(1, 3), torch.ones(2, 1), scaling=0.5)
        >>> rule.dense(torch.zeros(2, 3))
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """

    leaves: ClassVar[tuple[str, ...]] = ("a", "b")

    def dense(self, weight: Tensor) -> Tensor:
        return self.layout.weight(self.update(weight), weight.shape)

    def read(self, op: LinearMap, weight: Tensor, dropout: float) -> Tensor:
        y = op.dense(weight, bias=True)
        return self.add_update(op, y, dropout).to(y.dtype)


@pytree_node
@dataclass(frozen=True, eq=False)
class DoRA(LowRank):
    """The weight-decomposed update m·V/‖V‖ with V = W + s·B·A (Liu et al., arXiv 2402.09353, equation 5).

    ‖V‖ is the norm of each row of V, one per output unit. Unless `exact_norm_grad` it is a constant of the
    gradient (section 4.3 of the paper). A row of V that is zero stays zero. The bias is not scaled. Dropout
    acts on the input of `a` only, not on that of W (PEFT drops both).

    Attributes:
        a: the factor that reads the input, `[r, in]`.
        b: the factor that writes the output, `[out, r]`.
        magnitude: m, `[*lead, out]`.
        scaling: s.
        dropout: the probability with which inputs of `a` are dropped while the weight's module trains.
        layout: where the matrix lies in the weight.
        exact_norm_grad: differentiate through the norm too.

    Examples:
        >>> import torch
        >>> rule = DoRA(torch.zeros(1, 2), torch.zeros(1, 1), torch.tensor([10.0]))
        >>> rule.dense(torch.tensor([[3.0, 4.0]]))
        tensor([[6., 8.]])
    """

    magnitude: Tensor
    exact_norm_grad: bool = field(default=False, kw_only=True)

    leaves: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")

    def leaf_shapes(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        return super().leaf_shapes(weight) | {"magnitude": self.layout.magnitude_shape(weight.shape)}

    def prepared(self, weight: Tensor) -> Gained:
        if self.exact_norm_grad:
            norm = weight_norms(self.layout, weight, self.a, self.b, self.scaling)
        else:
            with constant():
                norm = weight_norms(self.layout, weight, self.a, self.b, self.scaling).detach()
        return self.gained(norm)

    def gained(self, norm: Tensor) -> Gained:
        """This rule with the norms of its rows worked out, of a magnitude's shape."""
        zero = norm == 0
        gain = torch.where(zero, 0.0, self.magnitude / torch.where(zero, 1.0, norm))
        return Gained(self.a, self.b, gain, scaling=self.scaling, dropout=self.dropout, layout=self.layout)

    def dense(self, weight: Tensor) -> Tensor:
        return self.prepared(weight).dense(weight)

    def read(self, op: LinearMap, weight: Tensor, dropout: float) -> Tensor:
        return self.prepared(weight).read(op, weight, dropout)


@pytree_node
@dataclass(frozen=True, eq=False)
class Gained(LowRank):
    """gain·(W + s·B·A), one gain per output unit: DoRA with its norm worked out.

    Attributes:
        gain: m/‖W + s·B·A‖, `[*lead, out]`; 0 where the norm is zero.
    """

    gain: Tensor

    leaves: ClassVar[tuple[str, ...]] = ("a", "b", "gain")

    def leaf_shapes(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        return super().leaf_shapes(weight) | {"gain": self.layout.magnitude_shape(weight.shape)}

    def dense(self, weight: Tensor) -> Tensor:
        return self.layout.weight(self.gain.unsqueeze(-1) * self.update(weight), weight.shape)

    def read(self, op: LinearMap, weight: Tensor, dropout: float) -> Tensor:
        gain = op.per_output(self.gain)
        if op.backwards:
            op = op.scaled_input(gain)
            y = op.dense(weight, bias=True)
            return self.add_update(op, y, dropout).to(y.dtype)
        y = op.dense(weight, bias=False)
        out = self.add_update(op, y, dropout)
        if op.bias is None:
            return (out * gain).to(y.dtype)
        return torch.addcmul(op.per_output(op.bias).to(out.dtype), out, gain.to(out.dtype)).to(y.dtype)


@pytree_node
@dataclass(frozen=True, eq=False)
class Full(Rule):
    """Replaces the parameter (`modules_to_save`, trained biases).

    Attributes:
        value: the new value, of the parameter's shape. It is cast to the parameter's dtype where it is used.

    Examples:
        >>> import torch
        >>> Full(torch.ones(2)).dense(torch.zeros(2))
        tensor([1., 1.])
    """

    value: Tensor

    leaves: ClassVar[tuple[str, ...]] = ("value",)
    dense_is_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.value, Tensor):
            raise ParamsError(f"Full.value: expected a tensor, got {type(self.value).__name__}.")

    def dense(self, weight: Tensor) -> Tensor:
        return self.value

    def check(self, name: str, weight: Tensor) -> None:
        refuse_full(name, weight)
        check_value(name, self.value, weight)


@pytree_node
@dataclass(frozen=True, eq=False)
class Delta(Rule):
    """Adds to the parameter: W + s·value (the bias of B, `lora_bias`).

    Attributes:
        value: what is added, of the parameter's shape.
        scaling: s.

    Examples:
        >>> import torch
        >>> Delta(torch.ones(2), scaling=0.5).dense(torch.zeros(2))
        tensor([0.5000, 0.5000])
    """

    value: Tensor
    scaling: float = field(default=1.0, kw_only=True)

    leaves: ClassVar[tuple[str, ...]] = ("value",)
    dense_is_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.value, Tensor):
            raise ParamsError(f"Delta.value: expected a tensor, got {type(self.value).__name__}.")

    def dense(self, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(weight.dtype, self.value.dtype), torch.float32)
        return torch.add(weight.to(dtype), self.value.to(dtype), alpha=self.scaling)

    def check(self, name: str, weight: Tensor) -> None:
        refuse_full(name, weight)
        check_value(name, self.value, weight)


def check_value(name: str, value: Tensor, weight: Tensor) -> None:
    """Raise `ParamsError` unless a value has the shape of the parameter, and that can be trained."""
    if value.shape != weight.shape:
        raise ParamsError(f"adapter of {name!r}: value has shape {list(value.shape)}, expected {list(weight.shape)}.")
    if not weight.is_floating_point():
        raise ParamsError(f"{name!r} has dtype {weight.dtype} and cannot be trained.")


def refuse_full(name: str, weight: Tensor) -> None:
    """Raise `ParamsError` if a weight is quantised: training it in full would replace it, not adapt it."""
    if isinstance(weight, Quantized):
        raise ParamsError(
            f"{name!r} is quantised and cannot be trained in full (modules_to_save, Full). Leave it out of the targets "
            "of quantize, or put its dense value, weight.dequantize(), into params."
        )


def refuse_low_rank(name: str, weight: Tensor) -> None:
    """Raise `ParamsError` if a weight cannot carry a low-rank update, naming it and saying why."""
    if not weight.is_floating_point():
        raise ParamsError(f"{name!r} has dtype {weight.dtype}; a low-rank update needs a floating-point weight.")
    if weight.dim() < 2:
        raise ParamsError(
            f"{name!r} has shape {list(weight.shape)}; a low-rank update needs two or more dimensions. "
            "Train it with Full (bias=..., modules_to_save=...) instead."
        )
    if weight.shape.numel() == 0:
        raise ParamsError(f"{name!r} has shape {list(weight.shape)}: it is empty and cannot carry an update.")


@contextlib.contextmanager
def constant() -> Iterator[None]:
    """What is computed here is a constant of reverse mode and of forward mode."""
    with torch.no_grad(), _set_fwd_grad_enabled(False):
        yield


def weight_norms(layout: Layout, weight: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """The norms of the output units of the updated weight, ‖M + s·B·A‖ by rows: `[*lead, out]`."""
    weight = plain_weight(weight)
    norms = []
    for piece, a_piece in layout.pieces(weight, a, NORM_SHARE):
        a_matrix, b_matrix = layout.factors(a_piece, b)
        norms.append(row_norms(layout.matrix(piece), a_matrix, b_matrix, scaling))
    combined: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return combined


def row_norms(matrix: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """The norms of the rows of M + s·B·A, without ever holding that matrix as a whole.

    ‖M‖² + 2s·rowsum((M·Aᵀ)∘B) + s²·rowsum((B·A·Aᵀ)∘B) (arXiv 2603.22276) costs the same number of operations,
    but loses all digits where s·B·A nearly cancels M. Blocks of the sum itself are exact everywhere.

    Args:
        matrix: M, `[*lead, out, in]`.
        a: `[*lead, r, in]`.
        b: `[*lead, out, r]`.
        scaling: s.

    Returns:
        `[*lead, out]`, in the dtype of `dense`.
    """
    norm: Callable[..., Tensor] = torch.linalg.vector_norm
    n_out, n_in = matrix.shape[-2:]
    if matrix.stride(-1) == 1:  # rows lie in memory one after the other: take some rows at a time
        n = _block(n_out, matrix.numel())
        blocks = zip(matrix.split(n, -2), b.split(n, -2), strict=True)
        return torch.cat([norm(_updated(m, a, b_, scaling), dim=-1) for m, b_ in blocks], dim=-1)
    n = _block(n_in, matrix.numel())
    blocks = zip(matrix.split(n, -1), a.split(n, -1), strict=True)
    return norm(torch.stack([norm(_updated(m, a_, b, scaling), dim=-1) for m, a_ in blocks]), dim=0)


def row_norms_of_many(matrix: Tensor, a: Tensor, b: Tensor, scalings: Tensor) -> Tensor:
    """`row_norms` for m updates of one matrix: the products of M with all their factors are one.

    ‖M‖² + 2s·rowsum((M·Aᵀ)∘B) + s²·rowsum((B·A·Aᵀ)∘B) (arXiv 2603.22276) in float64, which has digits to spare where
    s·B·A cancels M up to the rounding of float32. Rows that it cancels further are zero.

    Args:
        matrix: M, `[out, in]`, in float32 or less, as are
        a: `[m, r, in]`,
        b: `[m, out, r]`.
        scalings: s, `[m]`.

    Returns:
        `[m, out]`, in float32.
    """
    a, b, s = a.double(), b.double(), scalings.double()[:, None]
    own, inner = b.new_zeros(matrix.shape[0]), torch.zeros_like(b.mT).flatten(0, 1)
    with torch.autocast(matrix.device.type, enabled=False):
        n = max(1, NORM_BLOCK // len(matrix))
        for columns, a_ in zip(matrix.split(n, -1), a.split(n, -1), strict=True):
            block = columns.double()
            own = own + block.square().sum(-1)
            inner = torch.addmm(inner, a_.flatten(0, 1), block.mT)
        update = ((b @ (a @ a.mT)) * b).sum(-1) * s**2
        squares = own + 2 * s * (inner.view_as(b.mT) * b.mT).sum(1) + update
    squares = torch.where(squares > CANCELLED * (own + update), squares, 0.0)
    return squares.sqrt().float()


def _is_mapped(*tensors: Tensor) -> bool:
    """True inside of a transform of `torch.func` over one of the tensors."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def _block(length: int, numel: int) -> int:
    """How many of `length` slices of a tensor with `numel` elements to look at together."""
    return max(1, min(NORM_BLOCK * length // numel, -(-length // NORM_SHARE)))


def _updated(matrix: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """M + s·B·A in the compute dtype; shapes `[*lead, out, in]`, `[*lead, r, in]`, `[*lead, out, r]`."""
    dtype = torch.promote_types(torch.promote_types(matrix.dtype, a.dtype), torch.float32)
    given, matrix, a, b = matrix, matrix.to(dtype), a.to(dtype), b.to(dtype)
    if isinstance(scaling, Tensor):
        b, scaling = b * scaling, 1.0
    if matrix is not given and torch.is_inference_mode_enabled() and matrix.dim() == 2 and not _is_mapped(matrix, a, b):
        return matrix.addmm_(b, a, alpha=scaling)  # into the copy, which saves a pass over memory
    with torch.autocast(matrix.device.type, enabled=False):  # a weight is never computed in half precision
        if matrix.dim() == 2:
            return torch.addmm(matrix, b, a, alpha=scaling)
        return torch.add(matrix, b @ a, alpha=scaling)

"""The mean of losses and gradients over micro-batches and processes: the same bits for every number of processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import optree
import torch
import torch.distributed as dist
from torch import Tensor

from funclora._api.arguments import check_function
from funclora._many.stack import Stack
from funclora.errors import ConfigError

T = TypeVar("T")
Part = tuple[Tensor, Any]  # the loss and the gradients of a micro-batch


class Mean:
    """The mean over the micro-batches of all processes, for `reduce=` of a training step. Made by `mean`."""

    def __init__(self, weight: Callable[..., Any] | None, group: Any) -> None:
        self.weight = weight
        self.group = group
        self._is_checked = False

    def rank_and_size(self) -> tuple[int, int]:
        """The rank of this process, and the number of processes; (0, 1) without a process group."""
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(self.group), dist.get_world_size(self.group)
        started = os.environ.get("WORLD_SIZE", "1")
        if started != "1":
            raise ConfigError(
                f"reduce: WORLD_SIZE says that {started} processes were started, but they are not connected: each "
                "would train an adapter of its own. Call torch.distributed.init_process_group() first."
            )
        return 0, 1

    def check(self, adapters: Any) -> None:
        """Raise `ConfigError` in every process unless all have the same adapters. Only the first call compares them."""
        if self._is_checked:
            return
        _, size = self.rank_and_size()
        if size > 1:
            digests: list[Any] = [None] * size
            dist.all_gather_object(digests, _digest(adapters), group=self.group)
            different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            if different:
                raise ConfigError(
                    f"reduce: the adapters of rank {different[0]} differ from those of rank 0. Every process must make "
                    "them with the same generator, or load them from the same folder."
                )
        self._is_checked = True

    def __call__(self, parts: Sequence[Part], batches: Sequence[tuple[Any, ...]], like: Any) -> Part:
        """The mean of losses and gradients, the same bits in every process.

        Args:
            parts: the loss and the gradients of each micro-batch of this process; none if it has no rows.
            batches: the arguments from which each was computed.
            like: a tree with the structure of the gradients.
        """
        shape = torch.Size((len(like),) if isinstance(like, Stack) else ())
        leaves, spec = optree.tree_flatten(like)
        wide = torch.float32
        for leaf in leaves:
            wide = torch.promote_types(wide, leaf.dtype)
        weights = [self._weight(batch, shape, leaves[0]) for batch in batches]
        like_flat = [*leaves, leaves[0].new_zeros(shape), leaves[0].new_zeros(shape)]
        flat = [
            _flat((*optree.tree_leaves(_by_member(_counted, grads, weight)), _counted(loss, weight), weight), wide)
            for (loss, grads), weight in zip(parts, weights, strict=True)
        ]
        total = tree_sum(flat) if flat else _flat([torch.zeros_like(leaf) for leaf in like_flat], wide)
        _, size = self.rank_and_size()
        if size > 1:
            total = _ordered_sum(total, size, self.group)
        pieces = total.split([leaf.numel() for leaf in like_flat])
        *sums, loss, weight = (piece.view(leaf.shape) for piece, leaf in zip(pieces, like_flat, strict=True))
        grads = _by_member(_divided, optree.tree_unflatten(spec, sums), weight)
        return loss / weight, optree.tree_map(lambda leaf, grad: grad.to(leaf.dtype), like, grads)

    def _weight(self, batch: tuple[Any, ...], shape: torch.Size, like: Tensor) -> Tensor:
        """How much a batch counts, for each member."""
        weight = torch.as_tensor(1.0 if self.weight is None else self.weight(*batch), device=like.device)
        if weight.shape not in ((), shape):
            each = f" or one for each of {shape[0]} members" if shape else ""
            raise ConfigError(
                f"mean: weight: expected a number for a batch{each}, got a tensor of shape {list(weight.shape)}."
            )
        return weight.detach().expand(shape)


def mean(weight: Callable[..., Any] | None = None, *, group: Any = None) -> Mean:
    """Data parallel training: the mean of losses and gradients over the micro-batches of all processes.

    Every process calls the step with its own rows. All get the same adapters, bit for bit, and the same metrics. If the
    numbers of micro-batches and of processes are powers of two, the results are also the same bits for every number of
    processes: `accumulate=4` in one process is `accumulate=2` in two.

    Args:
        weight: `weight(batch)`, how much a micro-batch counts: the number of its rows, or of the labels over which its
            loss is a mean. A number, or one for each member of a population. By default all count the same.
        group: a process group; by default all processes.

    Returns:
        What `train_step`, `population_step` and `value_and_grad` take as `reduce`. Without a process group, it is the
        mean over the micro-batches of this process.

    Raises:
        ConfigError: when called, if torchrun started several processes that are not connected, if their adapters
            differ, or if `weight` returns anything but a number for each loss.

    Examples:
        >>> import funclora as fl
        >>> model, params = torch.nn.Linear(2, 1, bias=False), {"weight": torch.zeros(1, 2)}
        >>> adapters = {"weight": fl.LoRA(torch.ones(1, 2), torch.ones(1, 1))}
        >>> sgd = fl.optim.sgd(0.1)
        >>> loss_fn = lambda bound, x: bound(x).mean()
        >>> step = fl.train_step(model, loss_fn, sgd, accumulate=2, reduce=mean(weight=len))
        >>> _, _, metrics = step(params, adapters, sgd.init(adapters), torch.ones(4, 2))
        >>> metrics["loss"]
        tensor(2.)
    """
    if weight is not None:
        check_function(weight, "weight", "weight(batch)")
    return Mean(weight, group)


def tree_sum(parts: Sequence[T]) -> T:
    """The sum of neighbours, then of their sums, and so on: an order that processes can share."""
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]  # type: ignore[operator]
    return parts[0]


class TreeSum:
    """`tree_sum` of lists of tensors that come one after the other: of n, it keeps about log2(n) sums.

    The lists that are added belong to it, and are written to.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[int, list[Tensor]]] = []  # of how many, and the sum

    def add(self, tensors: list[Tensor]) -> None:
        """Add a list, of as many tensors as the others."""
        n = 1
        while self._sums and self._sums[-1][0] == n:
            tensors = self._joined(tensors)
            n *= 2
        self._sums.append((n, tensors))

    def total(self) -> list[Tensor]:
        """The sum of one list at least."""
        _, tensors = self._sums.pop()
        while self._sums:
            tensors = self._joined(tensors)
        return tensors

    def _joined(self, tensors: list[Tensor]) -> list[Tensor]:
        _, before = self._sums.pop()
        for first, second in zip(before, tensors, strict=True):
            first.add_(second)
        return before


def ordered_sums(tensors: Sequence[Tensor], size: int, group: Any = None) -> list[Tensor]:
    """The sums of tensors over processes, each in the order of their ranks; one exchange for each dtype."""
    sums: list[Tensor] = [*tensors]
    if size == 1:
        return sums
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        own = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        total = _ordered_sum(_flat([tensors[i] for i in own], dtype), size, group)
        for i, piece in zip(own, total.split([tensors[i].numel() for i in own]), strict=True):
            sums[i] = piece.view(tensors[i].shape)
    return sums


def rows_of_all(own: Tensor, first: int, n: int) -> Tensor:
    """The rows of all processes, of which each has a stretch.

    Each computes the same loss of them. Its gradient goes to its own rows, times the number of processes, so that the
    mean over the processes is the gradient of the loss.

    Args:
        own: the rows of this process, `[rows, *]`.
        first: the number of the first one.
        n: how many there are in all.
    """
    found: Tensor = _RowsOfAll.apply(own, first, n)  # type: ignore[no-untyped-call]
    return found


class _RowsOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, first: int, n: int) -> Tensor:
        ctx.own = slice(first, first + len(own))
        whole = own.new_zeros(n, *own.shape[1:])
        whole[ctx.own] = own
        dist.all_reduce(whole)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.own] * dist.get_world_size(), None, None


def _ordered_sum(flat: Tensor, size: int, group: Any) -> Tensor:
    """The sum over the processes in the order of their ranks; a ring's all-reduce adds in an order of its own.

    Each process sums a slice of the vector over all, and gets the other slices from the others: the traffic of a ring.
    """
    width = -(-flat.numel() // size)
    padded = torch.cat([flat, flat.new_zeros(width * size - flat.numel())])
    slices = torch.empty_like(padded)
    dist.all_to_all_single(slices, padded, group=group)
    whole = padded.new_empty(size, width)
    dist.all_gather(list(whole), tree_sum(list(slices.view(size, width))), group=group)
    return whole.view(-1)[: flat.numel()]


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])


def _by_member(function: Callable[[Tensor, Tensor], Tensor], tree: Any, weight: Tensor) -> Any:
    """The function of each leaf and the weight; in a stack, of each member's leaves and its own weight."""
    if isinstance(tree, Stack):
        return Stack(tuple(_by_member(function, group, weight[list(group.members)]) for group in tree.groups))
    return optree.tree_map(lambda x: function(x, weight), tree)


def _counted(x: Tensor, weight: Tensor) -> Tensor:
    """What a micro-batch adds to the sum. What counts nothing is 0, even if it is NaN."""
    weight = _before(weight, x)
    return torch.where(weight == 0, 0, x * weight)


def _divided(x: Tensor, weight: Tensor) -> Tensor:
    return x / _before(weight, x)


def _before(weight: Tensor, x: Tensor) -> Tensor:
    return weight.view([*weight.shape, *(1 for _ in range(x.dim() - weight.dim()))])


def _digest(adapters: Any) -> str:
    digest = hashlib.sha256()
    for leaf in optree.tree_leaves(adapters):
        digest.update(f"{tuple(leaf.shape)} {leaf.dtype}\n".encode())
        digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

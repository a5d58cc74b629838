"""Many adapters, one pass over the data: `evaluate`, and `by_row` without the mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor, nn

from funclora._api.arguments import check_batches, check_function, check_model, check_params
from funclora._train.members import Population
from funclora._train.passes import Metric as Metric
from funclora._train.passes import Passes
from funclora._train.population import check_members
from funclora.errors import ConfigError
from funclora.rules.base import Params


def evaluate(
    model: nn.Module,
    params: Params,
    stack: Population,
    data: Iterable[Any],
    metric: Metric,
    *,
    memory: int | None = None,
) -> Any:
    """Evaluate every member of a stack, in one pass over the data.

    The result equals, up to rounding, a loop over the members, each with all of the data. Nothing is
    differentiated. The mode of the model is not changed: call `model.eval()` first if it has dropout.

    The mean is over rows with equal weights. For other weights, such as numbers of tokens, let the metric return both
    the sum and the weight of each row, and divide the two results.

    Args:
        model: the module that defines the computation; never changed.
        params: full name -> tensor, as from `base_params`.
        stack: the adapters, `stack([...])`. A member `{}` means the base model.
        data: batches, trees of tensors `[n_rows, *]`; every member is evaluated on all of them. Iterated once.
        metric: `metric(bound, batch)` for one member, given the bound model and a batch, or some rows of it. Returns
            a value for each row, `[n_rows]`, or one value for the batch, `[]`, which counts as the mean of its rows;
            or a tree of such tensors. It runs under `torch.func.vmap`, like the loss of `population_step`.
        memory: bytes that a pass may use in addition to the model and the adapters. As many members as fit are
            computed together, and as many rows if the metric gives a value for each row. The use of a pass is measured
            by the tensors it makes; on a CPU the process may grow by up to three times as much, because the C library
            keeps freed memory. By default 70 percent of the free memory on a GPU, and 256 MiB elsewhere. The smallest
            pass is one member with one row, or with one batch if the metric gives one value for it; it is always tried.

    Returns:
        The structure that the metric returns; each tensor has the members' means over all rows, `[n_members]`.

    Raises:
        ConfigError: there is no data, the tensors of a batch differ in their numbers of rows, or the metric returns
            a value of another form.
        ParamsError: a member does not match the model.
        UnsupportedError: the model mixes rows, so members cannot be separated.
        torch.OutOfMemoryError: the smallest pass does not fit; larger passes are made smaller and tried again.

    Examples:
        >>> import funclora as fl
        >>> model, params = nn.Linear(2, 1, bias=False), {"weight": torch.zeros(1, 2)}
        >>> members = fl.stack([{}, {"weight": fl.LoRA(torch.ones(1, 2), torch.ones(1, 1))}])
        >>> data = [torch.ones(3, 2), torch.zeros(1, 2)]
        >>> evaluate(model, params, members, data, lambda bound, x: bound(x)[:, 0]).tolist()
        [0.0, 1.5]
    """
    check_model(model)
    check_params(params)
    check_batches(data, "data")
    check_function(metric, "metric", "metric(bound, batch)")
    check_members("evaluate", stack, None, None)
    if memory is not None and (not isinstance(memory, int) or isinstance(memory, bool) or memory < 1):
        raise ConfigError(f"evaluate: memory: expected a positive number of bytes, got {memory!r}.")
    with torch.no_grad():
        passes = _Means(model, params, stack, metric, memory)
        for batch in data:
            passes.add(batch)
        return passes.means()


@torch.no_grad()
def by_row(
    model: nn.Module,
    params: Params,
    stack: Population,
    data: Iterable[Any],
    function: Metric,
    *,
    memory: int | None = None,
    alone: bool = False,
) -> Iterator[Any]:
    """What a function gives for each member and each row: as `evaluate`, but without the mean.

    Args:
        model: as for `evaluate`.
        params: as for `evaluate`.
        stack: as for `evaluate`.
        data: as for `evaluate`.
        function: as the metric of `evaluate`, but its tensors are `[n_rows, *]`.
        memory: as for `evaluate`.
        alone: compute one member after the other, as is needed for models whose rows cannot be told apart. In training
            mode such a model may mix rows, so that the values depend on the memory.

    Yields:
        For each batch, the structure that the function returns, with tensors `[n_members, n_rows, *]`.

    Examples:
        >>> import funclora as fl
        >>> model, params = nn.Linear(2, 1, bias=False), {"weight": torch.zeros(1, 2)}
        >>> members = fl.stack([{}, {"weight": fl.LoRA(torch.ones(1, 2), torch.ones(1, 1))}])
        >>> [found.tolist() for found in by_row(model, params, members, [torch.ones(2, 2)], lambda bound, x: bound(x))]
        [[[[0.0], [0.0]], [[2.0], [2.0]]]]
    """
    passes = _ByRow(model, params, stack, function, memory, alone=alone)
    for batch in data:
        passes.add(batch)
        yield passes.found()


class _Means(Passes):
    """The members' sums over the rows so far."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sums: list[Tensor] = []
        self.dtypes: list[torch.dtype] = []

    def expected(self, leaf: Any, r: int) -> str:
        if isinstance(leaf, Tensor) and tuple(leaf.shape) in ((), (r,)) and not leaf.is_complex():
            return ""
        return f"tensors with one real value for each of {r} rows, or a scalar for the batch"

    def take(self, members: slice, rows: slice, n: int, values: list[Tensor]) -> None:
        if not self.sums:
            for x in values:
                floating = x.dtype if x.is_floating_point() else torch.float32
                exact = torch.float32 if x.device.type == "mps" else torch.float64
                self.dtypes.append(torch.promote_types(floating, torch.float32))
                self.sums.append(torch.zeros(len(self.members), dtype=exact, device=x.device))
        for sums, x in zip(self.sums, values, strict=True):
            exactly = x.to(sums.dtype)
            sums[members] += exactly.sum(1) if x.dim() == 2 else exactly * (rows.stop - rows.start)

    def means(self) -> Any:
        """The structure that the metric returns, with one value for each member."""
        if not self.rows:
            raise ConfigError("evaluate: data has no rows.")
        means = [self.members.in_order(sums / self.rows) for sums in self.sums]
        return optree.tree_unflatten(
            self.spec, [mean.to(dtype) for mean, dtype in zip(means, self.dtypes, strict=True)]
        )


class _ByRow(Passes):
    """The values of all members and rows of a batch."""

    values: list[Tensor] | None = None

    def expected(self, leaf: Any, r: int) -> str:
        return "" if isinstance(leaf, Tensor) and leaf.shape[:1] == (r,) else f"tensors with {r} rows"

    def take(self, members: slice, rows: slice, n: int, values: list[Tensor]) -> None:
        if self.values is None:
            self.values = [x.new_zeros(len(self.members), n, *x.shape[2:]) for x in values]
        for found, x in zip(self.values, values, strict=True):
            found[members, rows] = x

    def found(self) -> Any:
        """The structure that the function returns, and nothing is kept."""
        if self.values is None:
            raise ConfigError("evaluate: a batch has no rows.")
        values, self.values = self.values, None
        return optree.tree_unflatten(self.spec, [self.members.in_order(x) for x in values])

"""Many adapters, one pass over the data: `evaluate`.

A pass computes some members on some rows of a batch. Its size is found by measurement: each pass counts the bytes of
the tensors it makes, and the next pass is as large as this count and the budget allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import optree
import torch
from torch import Tensor, nn

from funclora._api.arguments import check_batches, check_function, check_model, check_params
from funclora._many.stack import Group, Stack, TreeSpecs
from funclora._torch.memory import Peak, budget, is_out_of_memory
from funclora._train.members import BatchedModel, MemberModel, Population
from funclora._train.population import batch_dims, batch_size, check_members
from funclora.errors import ConfigError
from funclora.rules.base import Params

Metric = Callable[[Any, Any], Any]
"""A metric: `metric(bound, batch)` -> a value for each row `[n_rows]`, or one for the batch `[]`, or a tree of them."""


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
        params = {name: tensor.detach() for name, tensor in params.items()}
        device = next((tensor.device for tensor in params.values()), torch.device("cpu"))
        members = cast(Population, optree.tree_map(Tensor.detach, cast(Any, stack)))
        plan = _Plan(budget(device) if memory is None else memory)
        passes = _Passes(model, params, members, metric, plan)
        for batch in data:
            passes.add(batch)
        return passes.means()


class _Taken(NamedTuple):
    """The memory that a pass used."""

    members: int
    rows: int
    bytes: float


class _Plan:
    """The allowed size of a pass, computed from the memory that earlier passes used.

    A pass uses f + m·(a + r·c) bytes for m members with r rows. So the use of one pass, divided by its size, is an
    upper bound for the use of a larger pass, divided by its size.
    """

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self.taken: dict[tuple[int, ...], _Taken] = {}  # by the number of elements of a row, in each tensor

    def size(self, row: tuple[int, ...], n: int, left: int, whole: bool) -> tuple[int, int] | None:
        """The numbers of members and rows of a pass, from the remaining ones and n; None before any measurement."""
        costs = [self._scaled(row, known) * max(1.0, n / taken.rows) for known, taken in self.taken.items()]
        if row in self.taken:
            costs = [self._scaled(row, row) * max(1.0, n / self.taken[row].rows)]
        if not costs:
            return None
        by_member = max(1.0, min(costs))
        if by_member <= self.memory or whole:
            return max(1, min(left, int(self.memory / by_member))), n
        return 1, max(1, int(n * self.memory / by_member))

    def _scaled(self, row: tuple[int, ...], known: tuple[int, ...]) -> float:
        """An estimate for rows of this size from a pass over rows of another size. Attention is quadratic."""
        taken = self.taken[known]
        return taken.bytes / taken.members * max(1.0, sum(row) / max(1, sum(known))) ** 2

    def took(self, row: tuple[int, ...], taken: _Taken, *, complete: bool) -> None:
        """Remember the larger of two passes; one with reused tensors only if it used more."""
        old = self.taken.get(row)
        larger = old is None or taken.members * taken.rows >= old.members * old.rows
        if old is None or taken.bytes >= old.bytes or (larger and complete):
            self.taken[row] = taken

    def failed(self, row: tuple[int, ...], members: int, rows: int) -> None:
        """Use half of this size from now on."""
        self.taken[row] = _Taken(members, rows, 2 * self.memory)


class _Passes:
    """The members' sums over the rows so far. Members are in the order of their groups."""

    def __init__(self, model: nn.Module, params: Params, members: Population, metric: Metric, plan: _Plan) -> None:
        self.model = model
        self.params = params
        self.members = members
        self.metric = metric
        self.plan = plan
        self.whole = False  # the metric gives one value for a batch: its rows must not be split
        self.rows = 0
        self.sums: list[Tensor] = []
        self.dtypes: list[torch.dtype] = []
        self.spec: Any = None
        self.latest: tuple[tuple[int, int, int], BatchedModel] | None = None

    def add(self, batch: Any) -> None:
        """Evaluate all members on a batch."""
        n = batch_size(batch, 0, "evaluate")
        if not n:
            return
        row = tuple(math.prod(x.shape[1:]) for x in optree.tree_leaves(batch) if isinstance(x, Tensor))
        member = start = 0
        while member < len(self.members):
            size = self.plan.size(row, n, len(self.members) - member, self.whole)
            if size is None:
                # Only for the measurement. Two rows, because a single row needs no routing and so uses less memory.
                self._run(0, min(2, len(self.members)), _rows(batch, 0, 2), min(2, n), row)
                continue
            m, r = (1, min(size[1], n - start)) if start else size
            values = self._run(member, m, _rows(batch, start, start + r), r, row)
            if values is None:
                continue
            if r < n and any(x.dim() == 1 for x in values):
                self.whole = True
                continue
            for sums, x in zip(self.sums, values, strict=True):
                exact = x.to(sums.dtype)
                sums[member : member + m] += exact.sum(1) if x.dim() == 2 else exact * r
            start += r
            if start >= n:
                member, start = member + m, 0
        self.rows += n

    def means(self) -> Any:
        """The structure that the metric returns, with one value for each member."""
        if not self.rows:
            raise ConfigError("evaluate: data has no rows.")
        means = [self.members.in_order(sums / self.rows) for sums in self.sums]
        return optree.tree_unflatten(
            self.spec, [mean.to(dtype) for mean, dtype in zip(means, self.dtypes, strict=True)]
        )

    def _run(self, member: int, m: int, batch: Any, r: int, row: tuple[int, ...]) -> list[Tensor] | None:
        """The metric for m members from a first one on: leaves `[m]` or `[m, r]`. None if memory is too small."""
        key = (member, m, r)
        known = self.latest is not None and self.latest[0] == key
        if not known:
            self.latest = None  # before the new one is made
            self.latest = key, BatchedModel(self.model, self.params, _some(self.members, member, member + m))
        assert self.latest is not None
        rows = self.latest[1]
        try:
            with Peak() as memory:
                by_member = torch.func.vmap(
                    lambda i, batch: self._checked(self.metric(MemberModel(rows, i), batch), r),
                    in_dims=(0, batch_dims(batch, None)),
                    randomness="different",
                )
                values: list[Tensor] = by_member(torch.arange(m), batch)
        except (RuntimeError, MemoryError) as error:
            smallest = m == 1 and (r == 1 or self.whole)
            if smallest or not is_out_of_memory(error):
                raise
            # The error refers to the tensors of the pass: the next pass must start after it is freed.
        else:
            self.plan.took(row, _Taken(m, r, memory.peak), complete=not known)
            return values
        self.latest = None
        self.plan.failed(row, m, r)
        return None

    def _checked(self, out: Any, r: int) -> list[Tensor]:
        """The leaves of the metric's result for one member."""
        leaves, spec = optree.tree_flatten(out)
        for x in leaves:
            if not isinstance(x, Tensor) or tuple(x.shape) not in ((), (r,)) or x.is_complex():
                got = f"one of shape {list(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise ConfigError(
                    f"evaluate: metric: expected tensors with one real value for each of {r} rows, or a scalar for the "
                    f"batch, got {got}."
                )
        if not leaves or self.spec not in (None, spec):
            before = "at least one tensor" if self.spec is None else f"{self.spec}, as before"
            raise ConfigError(f"evaluate: metric: expected {before}, got {spec}.")
        if self.spec is None:
            self.spec = spec
            for x in leaves:
                floating = x.dtype if x.is_floating_point() else torch.float32
                exact = torch.float32 if x.device.type == "mps" else torch.float64
                self.dtypes.append(torch.promote_types(floating, torch.float32))
                self.sums.append(torch.zeros(len(self.members), dtype=exact, device=x.device))
        return cast(list[Tensor], leaves)


def _rows(batch: Any, start: int, stop: int) -> Any:
    """Some rows of a batch, as views."""
    return optree.tree_map(lambda x: x[start:stop] if isinstance(x, Tensor) else x, batch)


def _some(members: Population, start: int, stop: int) -> Population:
    """Members in the order of their groups, as views."""
    groups: list[Group[Any]] = []
    before = taken = 0
    for group in members.groups:
        part = slice(max(0, start - before), max(0, stop - before))
        each = group.specs.each[part]
        if each:
            places = tuple(range(taken, taken + len(each)))
            groups.append(Group(tuple(value[part] for value in group.values), TreeSpecs(each), places))
        before += len(group.members)
        taken += len(each)
    return Stack(tuple(groups))

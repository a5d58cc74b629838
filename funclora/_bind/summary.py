"""`summary`: a printable table of what an adapter trains."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils import _pytree as pytree

from funclora._bind.checks import check_adapters
from funclora.rules.base import Adapters, Params


@dataclass(frozen=True)
class SummaryRow:
    """One target: its name, rule, weight shape, rank (None for fully trained parameters) and trainable count."""

    name: str
    rule: str
    shape: tuple[int, ...]
    r: int | None
    trainable: int


@dataclass(frozen=True)
class Summary:
    """The result of `summary`. `str()` gives the table.

    Attributes:
        rows: one per target.
        trainable: number of trainable values.
        total: number of floating-point values of the base; tied parameters are counted once.
    """

    rows: tuple[SummaryRow, ...]
    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trainable values in percent of the base's values."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        header = ("target", "rule", "shape", "r", "trainable")
        cells = [header] + [
            (row.name, row.rule, "×".join(map(str, row.shape)), "" if row.r is None else str(row.r),
             f"{row.trainable:,}")
            for row in self.rows
        ]  # fmt: skip
        widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
        lines = [
            "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(f"{self.trainable:,} of {self.total:,} = {self.percent:.2f} % trainable")
        return "\n".join(lines)


def summary(params: Params, adapters: Adapters) -> Summary:
    """Count what the adapters train.

    Args:
        params: full name -> tensor, as from `base_params`.
        adapters: full name of a parameter -> rule.

    Returns:
        Rows per target and totals; print it for a table.

    Raises:
        ParamsError: an adapter's parameter is missing, or a rule does not fit its weight.

    Examples:
        >>> import torch
        >>> from funclora import LoRA
        >>> params = {"q.weight": torch.zeros(4096, 4096)}
        >>> adapters = {"q.weight": LoRA(torch.zeros(8, 4096), torch.zeros(4096, 8))}
        >>> print(summary(params, adapters))
        target    rule  shape      r  trainable
        --------  ----  ---------  -  ---------
        q.weight  LoRA  4096×4096  8     65,536
        65,536 of 16,777,216 = 0.39 % trainable
    """
    check_adapters(params, adapters)
    rows = tuple(
        SummaryRow(
            name,
            type(rule).__name__,
            tuple(params[name].shape),
            rule.r,
            sum(leaf.numel() for leaf in pytree.tree_leaves(rule)),
        )
        for name, rule in adapters.items()
    )
    return Summary(rows, sum(row.trainable for row in rows), _count(params))


def _count(params: Params) -> int:
    seen = set()
    total = 0
    for tensor in params.values():
        # The storage, not its address: tensors on the meta device and tensor subclasses have no address.
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.is_floating_point() and key not in seen:
            seen.add(key)
            total += tensor.numel()
    return total

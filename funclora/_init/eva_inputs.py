"""The statistics that EVA collects about the inputs of linear layers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from funclora._init.fresh import generator_of
from funclora._torch.linalg import IncrementalPca
from funclora._torch.pytree import pytree_node
from funclora.errors import NonFiniteError, ParamsError, UnsupportedError
from funclora.rules import linear_ops as _maps
from funclora.rules.base import Rule
from funclora.rules.layouts import Conv1D, Layout, Linear
from funclora.rules.linear_ops import LinearOp
from funclora.rules.low_rank import LowRank

Mask = Callable[[Any], Tensor | None]


class Inputs:
    """The statistics of the inputs of all targets.

    Attributes:
        leaders: target -> the first target that has the same inputs, whose components it shares.
        pcas: leader -> the principal components of its inputs.
        still: leader -> which of its components have converged, `[n]`.
        ranks: target -> the rank that it would get with the present components.
    """

    def __init__(self, rules: Mapping[str, LowRank], rho: float, tau: float, mask: Mask, root: int) -> None:
        for name, rule in rules.items():
            if not isinstance(rule.layout, (Linear, Conv1D)):
                raise UnsupportedError(
                    f"{name!r} is a weight of {type(rule.layout).__name__}; EVA supports linear layers only. "
                    "Exclude it, or use another initialisation."
                )
        self.rules = rules
        self.tau = tau
        self.mask = mask
        self.root = root
        self.budget = sum(rule.r for rule in rules.values())
        self.ranks = {name: min(round(rule.r * rho), rule.a.shape[-1]) for name, rule in rules.items()}
        self.limits = self.ranks
        self.leaders: dict[str, str] = {}
        self.pcas: dict[str, IncrementalPca] = {}
        self.still: dict[str, Tensor] = {}
        self.see: Callable[[str, Tensor], None]
        self.positions: Tensor | None

    def watched(self) -> dict[str, Rule]:
        """Rules that change nothing and pass the inputs to `see`."""
        return {
            name: _Watched(name, lambda name, x: self.see(name, self._rows(name, x)), layout=rule.layout)
            for name, rule in self.rules.items()
        }

    def compare(self, batch: Any, run: Callable[[Any], Any]) -> None:
        """Determine which targets have the same inputs, by comparing their bytes in one batch."""
        digests = {name: hashlib.blake2b() for name in self.rules}
        fewest: dict[str, int] = {}

        def see(name: str, rows: Tensor) -> None:
            digests[name].update(rows.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            fewest[name] = min(fewest.get(name, len(rows)), len(rows))

        self._run(batch, see, run)
        first: dict[bytes, str] = {}
        for name in self.rules:
            if name not in fewest:
                raise ParamsError(f"{name!r} is not used on the first batch, so EVA has no inputs for it. Exclude it.")
            self.leaders[name] = first.setdefault(digests[name].digest(), name)
        for leader in first.values():
            group = [name for name, of in self.leaders.items() if of == leader]
            n = max(self.limits[name] for name in group)
            if fewest[leader] < n:
                raise ParamsError(
                    f"{leader!r} has {fewest[leader]} inputs in the first batch, too few for {n} components (r times "
                    "rho). Give larger batches."
                )
            self.limits |= dict.fromkeys(group, n)
            self.pcas[leader] = IncrementalPca(leader, n, generator_of(self.root, leader))
            self.still[leader] = torch.zeros(n, dtype=torch.bool)
        self.ranks = dict(self.limits)

    def take_in(self, batch: Any, moving: Iterable[str], run: Callable[[Any], Any]) -> None:
        """Update the components of the targets that have not converged, and the ranks."""

        def see(name: str, rows: Tensor) -> None:
            pca = self.pcas.get(name)
            if pca is None or name not in moving or len(rows) < pca.n:  # as in PEFT, small batches are ignored
                return
            before = pca.components
            pca.update(rows)
            assert pca.components is not None
            if before is not None:
                self.still[name] = ((pca.components * before).sum(-1) >= self.tau).cpu()

        self._run(batch, see, run)
        self.ranks = self._distributed()

    def moving(self) -> list[str]:
        """The leaders with a needed component that has not converged yet."""
        wanted: dict[str, int] = {}
        for name, leader in self.leaders.items():
            wanted[leader] = max(wanted.get(leader, 0), self.ranks[name])
        return [leader for leader, n in wanted.items() if not self.still[leader][:n].all()]

    def _distributed(self) -> dict[str, int]:
        """Spend the budget on the components that explain most of the variance."""
        for leader, pca in self.pcas.items():
            if not pca.variation:
                raise ParamsError(f"{leader!r} always has the same input, which has no components. Exclude it.")
        order = [*self.pcas, *(name for name in self.leaders if name not in self.pcas)]
        shares = {name: self.pcas[self.leaders[name]].explained.cpu() for name in order}
        owners = [name for name in order for _ in shares[name]]
        best = torch.cat([*shares.values()]).argsort(descending=True, stable=True)[: self.budget]
        counts = Counter(owners[i] for i in best.tolist())
        return {name: counts[name] for name in self.rules}

    def _run(self, batch: Any, see: Callable[[str, Tensor], None], run: Callable[[Any], Any]) -> None:
        self.see, self.positions = see, self.mask(batch)
        run(batch)

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """The inputs that count, `[rows, in]`."""
        mask, rows = self.positions, x.detach().reshape(-1, x.shape[-1])
        if mask is not None:
            flat = x.dim() == 2 and len(x) == mask.numel()  # transformers' Conv1D flattens its input
            if not flat and x.shape[:-1] != mask.shape:
                raise ParamsError(
                    f"mask: {name!r} has inputs of shape {list(x.shape)}, which a mask of shape {list(mask.shape)} "
                    "does not match. Give a function mask=, or lambda batch: None to count all positions."
                )
            rows = rows[mask.flatten().to(x.device)]
        if not torch.isfinite(rows).all():
            raise NonFiniteError(f"{name!r} has inputs that are NaN or infinity.")
        return rows


@pytree_node
@dataclass(frozen=True, eq=False)
class _Watched(Rule):
    """The unchanged base weight, which passes on the inputs that it is multiplied by."""

    name: str
    see: Callable[[str, Tensor], None]
    layout: Layout = field(kw_only=True)

    leaf_names: ClassVar[tuple[str, ...]] = ()

    def dense(self, weight: Tensor) -> Tensor:
        raise UnsupportedError(f"{self.name!r} is not only used as a linear layer, so EVA cannot read its inputs.")

    def apply_op(self, op: LinearOp, weight: Tensor, dropout: float) -> Tensor:
        if not isinstance(op, _maps.LinearLayerOp) or op.transposed:
            return self.dense(weight)
        self.see(self.name, op.x)
        return op.dense(weight, bias=True)

    def check(self, name: str, weight: Tensor) -> None:
        pass

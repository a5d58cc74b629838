"""How the inputs of a model hold the rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from funclora._tracking.calls import Owner
from funclora._tracking.owners import Lost, Owners, Place, in_order, settled
from funclora.errors import UnsupportedError

RowsOf = Mapping[str, "int | Sequence[int] | Tensor | None"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Who the positions of a model's inputs belong to.

    Attributes:
        n: the number of owners: of rows, or with `tokens` of the members that they name.
        repeats: the model may also get each row this many times in succession.
        tokens: `[rows, tokens]`, the owner of each token; None if each row is an owner.
        rows_of: for inputs by name the dimension that counts rows, the row of each position of the first dimension, or
            None for an input that holds no rows.
        known: owners of inputs, found before.
        apart: results that combine rows, as attention between packed sequences does, are lost.
    """

    apart: ClassVar[bool] = False

    n: int
    repeats: int = 1
    tokens: Tensor | None = None
    rows_of: RowsOf = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)

    def owner_of(self, name: str | None, x: Tensor) -> Owner | Lost | None:
        """The owners of an input; None if it has none.

        Masks have none: they are aligned with the rows by position, and models compute with them in ways that cannot
        be tracked.
        """
        if name is not None and name in self.rows_of:
            return self._told(name, x, self.rows_of[name])
        if (name is not None and "mask" in name) or x.dtype == torch.bool or not x.dim():
            return None
        if self.tokens is None:
            return Place(0, x.shape[0] // self.n) if x.shape[0] in (self.n, self.n * self.repeats) else None
        n_rows, n_tokens = self.tokens.shape
        if x.shape[:2] == (n_rows, n_tokens):
            return self._index(x.dim(), self.tokens)
        if x.shape[0] != n_rows or n_rows == 1:
            return None
        first = self.tokens[:, :1]
        if bool((self.tokens == first).all()):
            return self._index(x.dim(), first[:, 0])
        return Lost.at(f"an input of shape {list(x.shape)} for ids of shape {list(self.tokens.shape)}", "")

    def _told(self, name: str, x: Tensor, told: Any) -> Owner | None:
        if told is None:
            return None
        if isinstance(told, int):
            size = x.shape[told] if -x.dim() <= told < x.dim() else 0
            if size not in (self.n, self.n * self.repeats):
                raise UnsupportedError(
                    f"rows_of[{name!r}] is {told}, but that dimension of {name}, of shape {list(x.shape)}, does not "
                    f"count the {self.n} rows."
                )
            return Place(told % x.dim(), size // self.n)
        if x.shape[:1] != (len(told),):
            raise UnsupportedError(
                f"rows_of[{name!r}] names the rows of {len(told)} positions, but {name} has the shape {list(x.shape)}."
            )
        return self._index(x.dim(), torch.as_tensor(told))

    def _index(self, dims: int, owners: Tensor) -> Owner:
        key = (dims, tuple(owners.shape), tuple(owners.flatten().tolist()) if owners is not self.tokens else None)
        if key not in self.known:
            index = owners.to(torch.int32).reshape(*owners.shape, *[1] * (dims - owners.dim()))
            self.known[key] = settled(index, self.n, True)
        return self.known[key]  # type: ignore[no-any-return]

    def _other_owner(self, x: Tensor, owners: Owners) -> tuple[int, int] | None:
        """A row of an output whose first dimension counts the rows, and another row to which a part of it belongs."""
        if self.tokens is not None or x.shape[0] not in (self.n, self.n * self.repeats):
            return None
        index = owners.index.expand(x.shape[0], *owners.index.shape[1:])
        rows = in_order(self.n, x.shape[0] // self.n, index.device).view(-1, *[1] * (index.dim() - 1))
        wrong = ((index != rows) & (index >= 0)).nonzero()
        return (int(wrong[0, 0]), int(index[tuple(wrong[0])])) if len(wrong) else None

    def refusal(self, x: Tensor, owner: Owner | str) -> str:
        """Why an output with those owners cannot be given to the caller; "" if it can."""
        if isinstance(owner, str) and owner and x.dim() and x.is_floating_point():
            where = f" ({owner.where})" if isinstance(owner, Lost) and owner.where else ""
            return (
                f"the model returns a tensor of shape {list(x.shape)} whose rows {owner}{where} may have mixed or "
                "reordered. Call the model once for each member, or use funclora.vmap over the stack."
            )
        if isinstance(owner, Owners) and (other := self._other_owner(x, owner)) is not None:
            return (
                f"the model returns a tensor of shape {list(x.shape)} whose row {other[0]} holds values of row "
                f"{other[1]}: the model takes the rows of some inputs in another order than those of others. Call the "
                "model once for each member, or use funclora.vmap over the stack."
            )
        return ""

    def describe(self) -> str:
        """What the inputs must look like, for messages."""
        if self.tokens is not None:
            return f"{list(self.tokens.shape)} rows and tokens, and no input tensor begins with these dimensions"
        sizes = f"{self.n}" if self.repeats == 1 else f"{self.n} or {self.n * self.repeats}"
        return f"{self.n} rows, and no input tensor has {sizes} as its first dimension"


@dataclass(frozen=True, eq=False)
class Members(Batch):
    """The inputs of all members of a population: their parts follow each other, as many positions for each member.

    Attributes:
        tables: inputs that hold no parts, since all members share them.
    """

    apart: ClassVar[bool] = True

    tables: Sequence[Tensor] = ()

    def owner_of(self, name: str | None, x: Tensor) -> Owner | Lost | None:
        if (name is not None and ("mask" in name or name in self.rows_of)) or x.dtype == torch.bool or not x.dim():
            return None
        return None if any(x is table for table in self.tables) else Place(0, x.shape[0] // self.n)

    def refusal(self, x: Tensor, owner: Owner | str) -> str:
        if isinstance(owner, Place):
            return ""
        return super().refusal(x, owner) or (
            f"the model returns a tensor of shape {list(x.shape)} for {self.n} members, which does not hold the rows "
            "of each member in order: the model reorders them, joins the members' results, or gives the same for all "
            "of them. Compute the loss outside of the model, from outputs that hold each member's rows."
        )

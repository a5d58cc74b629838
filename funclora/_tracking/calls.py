"""One operation on tracked tensors, as the functions see it that say who its results belong to."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from funclora._torch.functions import is_mapped, without_gradient
from funclora._tracking.owners import LostError, Owners, Place, index_of, settled

Owner = Place | Owners


class OpCall:
    """A completed operation on at least one tracked tensor.

    Attributes:
        args: its arguments.
        kwargs: its keyword arguments.
        out: what it returned.
        tensors: the arguments that are tensors, also in lists.
        scope: the call of the model.
        by_value: its owners depend on values of an argument, so they are computed anew for each call.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.out = out
        self.by_value = False
        self.tensors: list[Tensor] = []
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                self.tensors.append(value)
            elif isinstance(value, (list, tuple)):
                self.tensors += [x for x in value if isinstance(x, Tensor)]
        self.scope = next((scope for x in self.tensors if (scope := getattr(x, "scope", None)) and scope.active), None)

    def arg(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by its position or one of its names."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    @property
    def x(self) -> Tensor:
        """The first argument."""
        first: Tensor = self.arg(0, "input", "self")
        return first

    @property
    def n(self) -> int:
        """The number of owners."""
        return cast(int, self.scope.n)  # type: ignore[union-attr]

    def is_tracked(self, x: Any) -> bool:
        """Whether the tensor belongs to this call of the model; its owners may be lost."""
        return getattr(x, "scope", None) is self.scope

    def is_owned(self, x: Any) -> bool:
        return self.is_tracked(x) and not isinstance(x.place, str)

    def owner_of(self, x: Any) -> Owner:
        """Who the positions of a tensor belong to.

        Raises:
            LostError: it has no owners, or they are lost.
        """
        if not self.is_tracked(x):
            raise LostError
        if isinstance(x.place, str):
            raise LostError(x.place)
        return x.place  # type: ignore[no-any-return]

    def owned(self) -> list[tuple[Tensor, Owner]]:
        """The arguments that have owners; masks that have lost theirs do not matter.

        Raises:
            LostError: another argument has lost its owners, or no argument has any.
        """
        found: list[tuple[Tensor, Owner]] = []
        cause = None
        for x in self.tensors:
            if not self.is_tracked(x):
                continue
            place: Any = cast(Any, x).place
            if not isinstance(place, str):
                found.append((x, place))
            elif x.dtype == torch.bool:
                cause = place
            else:
                raise LostError(place)
        if not found:
            raise LostError(cause)
        return found

    def only(self) -> Owner:
        """The owners of the first argument, the only one that has any."""
        if any(x is not self.x for x, _ in self.owned()):
            raise LostError
        return self.owner_of(self.x)

    def index(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        """The owners of a tensor position by position, of size 1 where they do not vary, on the device of `like`."""
        return index_of(self.owner_of(x), self.n, x.dim(), None if like is None else like.device)

    def values(self, x: Any) -> Any:
        """An argument whose values say where positions come from.

        Raises:
            LostError: its values cannot be read in a transform or by the compiler.
        """
        if not isinstance(x, Tensor):
            return x
        x = without_gradient(x.as_subclass(Tensor))
        if torch.compiler.is_compiling() or is_mapped(x) or x.is_meta:
            raise LostError
        self.by_value = True
        return x

    def settled(self, index: Tensor) -> Owner:
        """The owners that an index says."""
        places = [cast(Any, x).place for x in self.tensors if self.is_owned(x)]
        lasting = not self.by_value and all(not isinstance(place, Owners) or place.lasting for place in places)
        return settled(index, self.n, lasting, next((place for place in places if isinstance(place, Owners)), None))


# A propagation returns the owners of a result, None for a result that belongs to nobody, or one for each part.
Places = Owner | tuple[Owner | str | None, ...] | str | None

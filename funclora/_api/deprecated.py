"""Deprecated names and calls: they work for one more version, with a warning that contains the new form."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

REMOVED_IN = "0.2"

F = TypeVar("F", bound=Callable[..., Any])


def warn_old(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that a form is deprecated.

    Args:
        old: what the caller wrote.
        new: what to write instead.
        stacklevel: as in `warnings.warn`; 3 is the caller of the function that calls this one.
    """
    message = f"{old} is deprecated and will not work from funclora {REMOVED_IN} on. Write {new}."
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def old_positions(*names: str) -> Callable[[F], F]:
    """A function that also takes the positional arguments of the previous version, under these names, with a warning.

    Examples:
        >>> @old_positions("base", "tuned")
        ... def change(tuned, *, base):
        ...     return tuned - base
        >>> change(3, base=1)
        2
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     change(1, 3)
        2
        >>> print(caught[0].message)
        change(base, tuned) is deprecated and will not work from funclora 0.2 on. Write change(tuned, base=base).
    """

    def decorator(function: F) -> F:
        parameters = inspect.signature(function).parameters.values()
        now = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            is_old = len(now) < len(args) <= len(names) or any(name in kwargs for name in now[: len(args)])
            given = dict(zip(names, args, strict=False))
            if not is_old or given.keys() & kwargs.keys():
                return function(*args, **kwargs)
            keywords = [f"{name}={name}" for name in given if name not in now]
            new = ", ".join([*(name for name in now if name in {**given, **kwargs}), *keywords])
            warn_old(f"{function.__name__}({', '.join(given)})", f"{function.__name__}({new})")
            return function(**given, **kwargs)

        return cast(F, call)

    return decorator

"""Public names that are loaded on first use.

So the command line starts without torch, and `apply` without the readers and writers of files. Each lazy package has a
stub, `__init__.pyi`, with the same names for type checkers, editors and the documentation.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping

from funclora._api.deprecated import warn_old

Places = Mapping[str, Iterable[str]]


def attach(
    package: str, places: Places, moved: Places | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: its full name.
        places: full name of a module -> its public names. Under the key `package`: the public modules of the package.
        moved: the same for names that have moved to another public place. They give a `DeprecationWarning`, and are in
            neither `__dir__` nor `__all__`.
    """
    found = {name: place for place, names in places.items() for name in names}
    old = {name: place for place, names in (moved or {}).items() for name in names}

    def get(name: str) -> object:
        place = old.get(name) or found.get(name)
        if place is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name in old:
            warn_old(f"{package}.{name}", f"{place}.{name}")
            return getattr(importlib.import_module(place), name)
        value = (
            importlib.import_module(f"{place}.{name}")
            if place == package
            else getattr(importlib.import_module(place), name)
        )
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *found})

    return get, listed, sorted(found)

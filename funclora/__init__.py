"""Functional, stateless LoRA and DoRA for PyTorch.

An adapter is a value: a dict from parameter names to rewriting rules. `apply` runs a model under the rewritten
weights, `merge` returns them, `train_step` improves them; no module is ever changed.
"""

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from funclora._api import *  # noqa: F403 -- the list of names stands there, once
    from funclora._api import __all__ as __all__
else:

    def _names() -> ModuleType:
        from importlib import import_module

        return import_module("funclora._api")

    def __getattr__(name: str) -> object:
        # Import machinery asks for names like __path__, which no public name looks like.
        if name == "__all__" or (not name.startswith("_") and name in _names().__all__):
            return globals().setdefault(name, getattr(_names(), name))
        raise AttributeError(f"module 'funclora' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted([*globals(), *_names().__all__])


__version__ = "0.1.0"

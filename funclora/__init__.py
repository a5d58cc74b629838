"""Functional, stateless LoRA and DoRA for PyTorch.

An adapter is a value: a dict from parameter names to rewriting rules. `apply` runs a model under the rewritten
weights, `merge` returns them, `train_step` improves them; no module is ever changed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from funclora._api import *  # noqa: F403 -- the list of names stands there, once
    from funclora._api import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        from funclora import _api

        # Import machinery asks for names like __path__, which no public name looks like.
        if name == "__all__" or name in _api.__all__:
            return globals().setdefault(name, getattr(_api, name))
        raise AttributeError(f"module 'funclora' has no attribute {name!r}")

    def __dir__() -> list[str]:
        from funclora import _api

        return sorted([*globals(), *_api.__all__])


__version__ = "0.1.0"

"""Functional, stateless LoRA and DoRA for PyTorch.

An adapter is a value: a dict from parameter names to rewriting rules. `apply` runs a model under the rewritten
weights, `merge` returns them, `train_step` improves them; no module is ever changed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from funclora._api import *  # noqa: F403 -- the list of names stands there, once
    from funclora._api import __all__ as __all__
else:
    from functools import cache

    @cache
    def _places() -> dict[str, str]:
        """Public name -> module that has it, read off the imports of `_api`: to run them would load everything."""
        import ast
        from importlib.util import find_spec

        spec = find_spec("funclora._api")
        imports = [node for node in ast.parse(spec.loader.get_source(spec.name)).body if hasattr(node, "module")]
        return {alias.name: node.module for node in imports for alias in node.names}

    def __getattr__(name: str) -> object:
        # Import machinery asks for names like __path__, which no public name looks like.
        if name == "__all__":
            return sorted(_places())
        if name.startswith("_") or name not in _places():
            raise AttributeError(f"module 'funclora' has no attribute {name!r}")
        from importlib import import_module

        place = _places()[name]
        value = import_module(f"funclora.{name}") if place == "funclora" else getattr(import_module(place), name)
        return globals().setdefault(name, value)

    def __dir__() -> list[str]:
        return sorted([*globals(), *_places()])


__version__ = "0.1.0"

"""Layers whose weight another module reads, in place of calling the layer: an adapter of PEFT has no effect there.

PEFT wraps the call of a layer. Which modules read the weight is in the source of their classes.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from funclora._config.outlined import asked

# Reading these of a weight does not use its values, and neither do these functions.
_FACTS = frozenset(("dtype", "device", "shape", "size", "dim", "ndim", "data_ptr", "is_cuda", "requires_grad", "numel"))
_ASK = ("isinstance", "hasattr", "getattr", "type", "id")


class RawUse(NamedTuple):
    """A use of a layer's weight by another module.

    Attributes:
        by: the class of the other module.
        always: it never calls the layer.
    """

    by: str
    always: bool


def raw_uses(model: nn.Module, modules: Iterable[str]) -> dict[str, RawUse]:
    """Who reads the values of the weights of modules, by the source of the classes that contain them.

    Args:
        model: the model.
        modules: the full names of some modules.

    Returns:
        Full name -> who reads its weight, for those whose weight another module reads.
    """
    names = [*modules]
    found = asked(model, ["raw uses", names], lambda model: {name: _raw_use(model, name) for name in names})
    return {name: RawUse(*use) for name, use in found.items() if use is not None}


def _raw_use(model: nn.Module, module: str) -> RawUse | None:
    parts = module.split(".")
    for i in range(len(parts) - 1, -1, -1):
        owner: Any = type(model.get_submodule(".".join(parts[:i])))
        path, uses = ".".join(parts[i:]), _uses(owner)
        if path in uses:
            return RawUse(owner.__name__, f"{path}()" not in uses)
    return None


@functools.cache
def _uses(kind: Any) -> frozenset[str]:
    """`a.b` for each `self.a.b.weight` whose values a class reads in forward, `a.b()` for each call."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for node in ast.walk(_source(base)):
            if isinstance(node, ast.FunctionDef):
                methods.setdefault(node.name, []).append(node)
    found: set[str] = set()
    waiting = ["forward"]  # and what it refers to
    while waiting:
        for method in methods.pop(waiting.pop(), ()):
            found.update(_in_method(method))
            waiting += [node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)]
    return frozenset(found)


def _in_method(method: ast.FunctionDef) -> Iterator[str]:
    known: set[int] = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            known.add(id(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASK:
            known.update(map(id, node.args))
        elif isinstance(node, ast.Call) and (path := _path(node.func)):
            yield f"{path}()"
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "weight"
            and isinstance(node.ctx, ast.Load)
            and id(node) not in known
            and (path := _path(node.value))
        ):
            yield path


def _path(node: ast.expr) -> str:
    """`a.b` of `self.a.b`; "" for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else ""


def _source(kind: type) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module(body=[], type_ignores=[])  # made without a file: nothing is known

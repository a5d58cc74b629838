"""The public names, as a new process finds them."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import funclora as fl

SPACES = (fl, fl.io, fl.optim, fl.rules, fl.algebra, fl.analysis, fl.distributed, fl.serving, fl.errors)
LAZY = (fl, fl.distributed, fl.io, fl.serving)
# Their arguments are what the function puts together.
MADE_BY = {
    fl.AdapterModule: "as_module", fl.Quantized: "quantize", fl.Stack: "stack", fl.distributed.Mean: "mean",
    fl.io.LoadedAdapter: "load", fl.serving.Stream: "submit",
}  # fmt: skip


def python(code: str) -> str:
    """What a fresh interpreter prints for that code."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_names_load_on_first_use() -> None:
    code = (
        "import sys, funclora as fl, funclora.io; before = 'torch' in sys.modules; fl.apply; "
        "print(before, 'torch' in sys.modules)"
    )
    assert python(code) == "False True"


def test_a_name_loads_what_it_needs() -> None:
    code = (
        "import sys, funclora as fl; fl.apply; "
        "print(*(name in sys.modules for name in ('funclora._bind.apply', 'funclora.io.merge.merge', 'torch._dynamo')))"
    )
    assert python(code) == "True False False"  # torch's compiler alone takes a second


@pytest.mark.parametrize("space", SPACES[:-1], ids=lambda space: str(space.__name__))
def test_every_public_name_is_there(space: types.ModuleType) -> None:
    assert len(set(space.__all__)) == len(space.__all__)
    assert set(space.__all__) <= set(dir(space))
    for name in space.__all__:
        assert getattr(space, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        space.aply  # noqa: B018


@pytest.mark.parametrize("space", LAZY, ids=lambda space: str(space.__name__))
def test_the_stub_says_what_is_loaded(space: types.ModuleType) -> None:
    tree = ast.parse(Path(str(space.__file__)).with_suffix(".pyi").read_text(encoding="utf-8"))
    listed = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    assert sorted(ast.literal_eval(listed)) == space.__all__
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            home = importlib.import_module(str(node.module))
            # `X as X` is how a stub names what is not in `__all__`: the old places of names
            assert all((alias.name in space.__all__) == (alias.asname is None) for alias in node.names)
            found |= {alias.name: getattr(home, alias.name) for alias in node.names if alias.asname is None}
    assert found == {name: getattr(space, name) for name in space.__all__}


def test_names_of_before_are_deprecated() -> None:
    newer = {name for name in fl.io.__all__ if name[0].islower()} | {"LoadedAdapter"}
    for name in sorted(set(fl.io.__all__) - newer):
        with pytest.warns(DeprecationWarning, match=rf"funclora\.{name} is deprecated.* Write funclora\.io\.{name}"):
            old = getattr(fl, name)
        assert old is getattr(fl.io, name)
        assert name not in dir(fl)


def public() -> Iterator[tuple[str, Any]]:
    """Every public function and method, and the constructor of every public class."""
    for space in SPACES:
        for name in getattr(space, "__all__", [name for name in vars(space) if not name.startswith("_")]):
            value = getattr(space, name)
            if inspect.isclass(value):
                yield from methods(f"{space.__name__}.{name}", value)
            elif inspect.isfunction(value) and inspect.unwrap(value).__module__.startswith("funclora"):
                yield f"{space.__name__}.{name}", value


def methods(path: str, cls: type) -> Iterator[tuple[str, Any]]:
    for base in cls.__mro__:
        for name, value in vars(base).items() if base.__module__.startswith("funclora") else ():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            constructs = name == "__init__" or isinstance(value, (classmethod, staticmethod))
            is_public = cls not in MADE_BY if constructs else not name.startswith("_")
            if inspect.isfunction(function) and is_public:
                yield f"{path}.{name}", function


def annotated(function: Any) -> Iterator[tuple[str, Any]]:
    """The names in the annotations of a function, and what they stand for there."""
    function = inspect.unwrap(function)
    for text in function.__annotations__.values():
        for node in ast.walk(ast.parse(text if isinstance(text, str) else "None")):
            if isinstance(node, ast.Name) and node.id in function.__globals__:
                yield node.id, function.__globals__[node.id]


@pytest.mark.parametrize(("path", "function"), list(public()))
def test_types_of_signatures_can_be_imported(path: str, function: Any) -> None:
    elsewhere = [vars(module) for module in (typing, types, torch, importlib.import_module("collections.abc"))]
    for name, value in annotated(function):
        if isinstance(value, (types.ModuleType, typing.TypeVar)):
            continue
        ours = [getattr(space, name) for space in SPACES if name in getattr(space, "__all__", vars(space))]
        found = [*ours, *(space.get(name) for space in elsewhere)]
        assert any(it is value for it in found), f"{path}: {name} has no public name"


def test_the_version_stands_in_one_place() -> None:
    code = "import sys, funclora; print(funclora.__version__, 'torch' in sys.modules)"
    assert python(code) == f"{fl.__version__} False"
    assert fl.__version__.count(".") == 2


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys; from funclora.cli._app import app; print('torch' in sys.modules)"
    assert python(code) == "False"


@pytest.mark.parametrize(("path", "function"), [row for row in public() if row[0].split(".")[-2].islower()])
def test_arguments_have_one_order(path: str, function: Any) -> None:
    """What is computed with: model, params, adapters. Files are named first; base weights that may be left out, and
    flags, by keyword only."""
    parameters = list(inspect.signature(function).parameters.values())
    given = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if "path" in given:
        assert given[0] == "path"
    else:
        order = ["model", "params", "adapters", "config"]
        assert [name for name in given if name in order] == [name for name in order if name in given]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty]
    flags = [p.name for p in parameters if isinstance(p.default, bool)]
    assert "params" not in positional
    assert path == "funclora.optim.sgd" or not set(flags) & set(positional)  # its arguments are torch.optim.SGD's

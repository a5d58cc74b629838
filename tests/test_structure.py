"""The packages import each other one way: no circle, and no arrow against their order."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import funclora

ROOT = Path(funclora.__file__).parent
# From the bottom up: a package may import those before it, and itself.
ORDER = (
    "errors",
    "_api",
    "_torch",
    "_files",
    "_quant",
    "rules",
    "_tracking",
    "_lazy",
    "_many",
    "distributed",
    "_bind",
    "_config",
    "optim",
    "losses",
    "algebra",
    "analysis",
    "_init",
    "io/peft",
    "io/hf",
    "io/merge",
    "io/gguf",
    "io/foreign",
    "_train",
    "serving",
    "__init__",  # the public names, which what is above uses as everybody does
    "demo",
    "_apps/train",
    "_apps/serve",
    "_apps/sweep",
    "cli",
)
# They hold names, and no code of their own.
INDEXES = ("io/__init__", "_apps/__init__", "__main__")


def module_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").as_posix()


def package_of(module: str) -> str:
    return next(name for name in ORDER if module == name or module.startswith(f"{name}/"))


def existing(parts: list[str]) -> str:
    """The module of that dotted name, which may be a package; "" if there is none."""
    path = ROOT.joinpath(*parts)
    if path.is_dir():
        return module_of(path / "__init__.py")
    return module_of(path.with_suffix(".py")) if path.with_suffix(".py").is_file() else ""


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever it does, for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name == "funclora" or name.startswith("funclora."):
                parts = name.split(".")[1:]
                found.add(next(filter(None, (existing(parts[:n]) for n in range(len(parts), -1, -1)))))
    return found


ARROWS = {module_of(file): imported(file) for file in sorted(ROOT.rglob("*.py"))}
MODULES = [module for module in ARROWS if module not in INDEXES]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    own = ORDER.index(package_of(module))
    wrong = sorted(other for other in ARROWS[module] if other in INDEXES or ORDER.index(package_of(other)) > own)
    assert not wrong, f"{module}: the order of the packages puts {wrong} above {package_of(module)}"


def test_there_is_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle of imports: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for other in sorted(ARROWS[module] - {module}):
                if other not in INDEXES:
                    visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_order_names_every_package() -> None:
    assert {package_of(module) for module in MODULES} == set(ORDER)

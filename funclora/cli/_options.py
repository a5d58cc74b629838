"""How options look and are given, alike in all commands.

- The type of a value is INT, FLOAT, PATH or TEXT, or the choices.
- A list, `Sequence[float]`, is given with commas (`--weights 0.7,0.3`), by repeating the option, or both.
  `Sequence[Whole]` is for texts that may contain commas: their option is repeated.
- A flag has two forms, `--verify` and `--no-verify`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

# Type -> how the help writes a value of it; a flag takes none.
VALUES: dict[type, str] = {bool: "", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


class Whole(str):
    """A text that may contain commas."""


def prepared(parameter: inspect.Parameter) -> tuple[inspect.Parameter, Callable[[Any], Any] | None]:
    """A parameter of a command as Typer must see it, and a function from Typer's value to the command's, if needed."""
    kinds = [parameter.annotation]
    for kind in kinds:  # Annotated[Sequence[Path] | None, Option()] and the like, taken apart as it goes
        kinds += get_args(kind)
    types = [kind for kind in kinds if isinstance(kind, type)]
    for info in kinds:
        if isinstance(info, typer.models.ArgumentInfo) and info.metavar is None:
            info.metavar = parameter.name.upper()
        elif isinstance(info, typer.models.OptionInfo):
            element = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is Sequence), None)
            if element is not None:
                info.metavar = "TEXT" if element is Whole else f"{VALUES[element]},..."
                default = parameter.default
                listed = parameter.replace(
                    annotation=Annotated[list[str] if default is parameter.empty else list[str] | None, info],
                    default=default if default in (None, parameter.empty) else [str(each) for each in default],
                )
                return listed, _Reader(_name(info, parameter.name), element)
            if bool in types:
                name = _name(info, parameter.name)
                info.default, info.param_decls = ..., (f"{name}/--no-{name[2:]}",)
                info.show_default = bool(parameter.default)
            for kind in types:
                if info.metavar is None and issubclass(kind, Enum):
                    info.metavar, words = choices([str(each.value) for each in kind])
                    info.help = f"{info.help}{words}"
                elif info.metavar is None and kind in VALUES:
                    info.metavar = VALUES[kind]
    return parameter, None


def choices(values: Sequence[str]) -> tuple[str, str]:
    """How the help names the values that an option takes: in place of the type, and at the end of the text."""
    joined = "|".join(values)
    return (joined, "") if len(joined) <= 30 else ("TEXT", f" One of {', '.join(values)}.")


def _name(info: Any, parameter: str) -> str:
    """The option's long name, without its negative form. Typer keeps the first of the given names as the default."""
    given = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    return next((name.partition("/")[0] for name in given if name.startswith("--")), f"--{parameter.replace('_', '-')}")


class _Reader:
    """Makes the values of a list of the texts that were given."""

    def __init__(self, option: str, element: type) -> None:
        self._option, self._element = option, element

    def __call__(self, texts: list[str] | None) -> list[Any] | None:
        if texts is None:
            return None
        return [self._made(part, text) for text in texts for part in self._parts(text)]

    def _parts(self, text: str) -> list[str]:
        whole = self._element is Whole or (self._element is Path and Path(text).exists())
        return [text] if whole else [part.strip() for part in text.split(",")]

    def _made(self, part: str, text: str) -> Any:
        from funclora.errors import ConfigError

        if not part:
            raise ConfigError(f"{self._option}: expected values with commas between them, got {text!r}.")
        try:
            return self._element(part)
        except ValueError as error:
            words = {int: "whole numbers", float: "numbers"}[self._element]
            raise ConfigError(f"{self._option}: expected {words} with commas between them, got {text!r}.") from error

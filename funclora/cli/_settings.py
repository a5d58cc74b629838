"""Options for the settings of a run: one for each key, in every command that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Annotated, Any

import typer

from funclora._apps.train.reading import element_of, kind_of, option
from funclora._apps.train.settings import Settings
from funclora.cli._options import VALUES, Whole, choices


def with_options(command: Callable[..., Any], without: Collection[str] = ()) -> inspect.Signature:
    """A command's signature with an option for each key of the settings, after its first argument.

    Args:
        command: has a parameter `**options`.
        without: keys that get no option here.
    """
    own = inspect.signature(command, eval_str=True)
    config, *rest = (p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD)
    keys = [_option(f.name, f.default, f.metadata) for f in fields(Settings) if f.name not in without]
    rest = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in rest]
    return own.replace(parameters=[config, *keys, *rest])


def setting(key: str) -> Any:
    """The option of one key, for a command that has few of them.

    The parameter has the key's name and is None if it is not given.
    """
    (common,) = (_help(f.name, f.default, f.metadata) for f in fields(Settings) if f.name == key)
    return typer.Option(**common)


def _help(key: str, default: Any, metadata: Any) -> dict[str, Any]:
    """What the help says of a key, as arguments of `typer.Option`."""
    metavar, words = choices(metadata["choices"]) if "choices" in metadata else (None, "")
    if metavar is None and kind_of(key)[0] is not tuple:
        metavar = VALUES.get(kind_of(key)[0])
    # Typer would put parentheses around a default that is a text, and all options are read as texts.
    shown = rf"\[default: {_words(default)}]" if default is not None and default != () else ""
    return {"help": f"{metadata['help']}{words} {shown}".rstrip(), "metavar": metavar, "show_default": False}


def _option(key: str, default: Any, metadata: Any) -> inspect.Parameter:
    """The option of a key. Its text is read by `reading.read`, for messages like those about a file."""
    kind, _ = kind_of(key)
    name = option(key)
    common = _help(key, default, metadata) | {"rich_help_panel": metadata["group"]}
    annotation: Any
    if kind is bool:
        annotation = Annotated[bool | None, typer.Option(name, **common)]
    elif kind is tuple:
        element = Whole if metadata.get("whole") else element_of(key)
        annotation = Annotated[Sequence[element] | None, typer.Option(name, **common)]  # type: ignore[valid-type]
    else:
        annotation = Annotated[str | None, typer.Option(name, **common)]
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)

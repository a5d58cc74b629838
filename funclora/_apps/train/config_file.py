"""Files of settings, TOML or YAML, as plain values."""

from __future__ import annotations

import functools
import re
import reprlib
from pathlib import Path
from typing import Any

from funclora.errors import FormatError, UnsupportedError

# A file of settings is short. A larger file is something else, and the readers of both formats are slow.
LARGEST = 1 << 16
DIGITS = 100  # of a number
# Keys inside of keys: tomllib takes the square of their number.
_DEEP = re.compile(r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){50}""")


def table(file: Path) -> dict[str, Any]:
    """The keys of a file of settings, TOML or YAML by its suffix, with whatever values.

    Args:
        file: the file.

    Raises:
        FormatError: it cannot be read, has another format, or contains something other than keys.
        UnsupportedError: a YAML file, and PyYAML is not installed.
    """
    parse = {".toml": _parse_toml, ".yaml": _parse_yaml, ".yml": _parse_yaml}.get(file.suffix.lower())
    if parse is None:
        raise FormatError(f"{file}: expected a .toml or .yaml file of settings.")
    if not file.is_file():
        raise FormatError(f"{file}: there is no such file. Give a file with the settings of a run.")
    if file.stat().st_size > LARGEST:
        raise FormatError(f"{file}: is larger than {LARGEST:,} bytes, which is too large for settings.")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: is not UTF-8, from byte {error.start} on.") from error
    keys = parse(file, text)
    if keys is None:
        return {}
    if not isinstance(keys, dict):
        raise FormatError(f"{file}: expected keys with values, got {reprlib.repr(keys)}.")
    for key in keys:
        if not isinstance(key, str):
            raise FormatError(f"{file}: expected names as keys, got {reprlib.repr(key)}.")
    return keys


def _check_numbers(value: Any) -> None:
    """Raise `ValueError` for a number that Python would not write."""
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if isinstance(item, dict | list) and id(item) not in seen:  # YAML's can hold themselves
            seen.add(id(item))
            todo += [*item, *item.values()] if isinstance(item, dict) else item
        elif isinstance(item, int) and abs(item) > 10**DIGITS:
            raise ValueError(f"a number of more than {DIGITS} digits")


def _parse_toml(file: Path, text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        if _DEEP.search(text):
            raise RecursionError
        keys = tomllib.loads(text)
        _check_numbers(keys)
        return keys
    except RecursionError as error:
        raise FormatError(f"{file}: is not valid TOML: nested too deeply") from error
    except ValueError as error:
        raise FormatError(f"{file}: is not valid TOML: {error}") from error


def _parse_yaml(file: Path, text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{file}: YAML needs PyYAML. Type: pip install 'funclora[train]'") from error
    try:
        keys = yaml.load(text, Loader=_yaml_loader(yaml))
        _check_numbers(keys)
        return keys
    except RecursionError as error:
        raise FormatError(f"{file}: is not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise FormatError(f"{file}: is not valid YAML: {' '.join(str(error).split())}") from error
    except Exception as error:  # PyYAML does not check whether a value fits its tag
        kind = type(error).__name__
        raise FormatError(f"{file}: is not valid YAML: a value does not fit its tag ({kind}: {error})") from error


@functools.cache
def _yaml_loader(yaml: Any) -> Any:
    """The safe loader, which knows 2e-4 as a number, as YAML 1.2 does, and refuses a key that comes twice.

    It takes a time in proportion to the text: long numbers in base 60 and maps that are merged again and again do not.
    """

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_object(self, node: Any, deep: bool = False) -> Any:
            if isinstance(node, yaml.ScalarNode) and node.tag != self.DEFAULT_SCALAR_TAG and len(node.value) > DIGITS:
                raise self._error(f"a value of {len(node.value)} characters is no text", node)
            return super().construct_object(node, deep)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise self._error(f"{reprlib.repr(key.value)} appears twice", key)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

        def flatten_mapping(self, node: Any) -> None:
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    raise self._error("maps are not merged here: write the keys of << out", key)
            super().flatten_mapping(node)

        @staticmethod
        def _error(message: str, node: Any) -> Exception:
            line = node.start_mark.line + 1
            return yaml.constructor.ConstructorError(None, None, f"line {line}: {message}")  # type: ignore[no-any-return]

    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader

"""Files of settings, TOML or YAML, as plain values."""

from __future__ import annotations

import functools
import re
import reprlib
from pathlib import Path
from typing import Any

from funclora.errors import FormatError, UnsupportedError

# A file of settings is a page; a larger one is something else.
LARGEST = 1 << 20


def table(file: Path) -> dict[str, Any]:
    """The keys of a file of settings, TOML or YAML by its suffix, with whatever values.

    Args:
        file: the file.

    Raises:
        FormatError: it cannot be read, is neither, or holds something else than keys.
        UnsupportedError: a YAML file, and PyYAML is not installed.
    """
    parse = {".toml": _parse_toml, ".yaml": _parse_yaml, ".yml": _parse_yaml}.get(file.suffix.lower())
    if parse is None:
        raise FormatError(f"{file}: expected a .toml or .yaml file of settings.")
    if not file.is_file():
        raise FormatError(f"{file}: there is no such file. It should hold the settings of a run.")
    if file.stat().st_size > LARGEST:
        raise FormatError(f"{file}: is larger than {LARGEST:,} bytes, which no file of settings is.")
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


def _parse_toml(file: Path, text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: is no TOML: {str(error) or 'nested too deeply'}") from error


def _parse_yaml(file: Path, text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{file}: YAML needs PyYAML. Type: pip install 'funclora[train]'") from error
    try:
        return yaml.load(text, Loader=_yaml_loader(yaml))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{file}: is no YAML: {' '.join(str(error).split()) or 'nested too deeply'}") from error


@functools.cache
def _yaml_loader(yaml: Any) -> Any:
    """The safe loader, which knows 2e-4 as a number, as YAML 1.2 does, and refuses a key that comes twice."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader

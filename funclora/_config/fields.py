"""Check the values of a configuration's fields and convert them to one form."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate

from funclora._config.regex import is_name
from funclora.errors import ConfigError

_DEEPEST = 50  # nested parentheses


def checked_pattern(where: str, pattern: object, around: str = "{}") -> str:
    """The pattern, if it can be compiled, also inside a larger expression."""
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{where}: expected a non-empty string, got {reprlib.repr(pattern)}.")
    if is_name(pattern):
        return pattern
    try:
        if _depth(pattern) > _DEEPEST:  # how many can be compiled depends on the depth of the stack
            raise re.error("too many nested parentheses")
        re.compile(pattern)
        re.compile(around.format(pattern))
    except (re.error, OverflowError) as error:
        raise ConfigError(f"{where}: {reprlib.repr(pattern)} is not a regular expression: {error}.") from error
    return pattern


def _depth(pattern: str) -> int:
    """The largest number of open parentheses, including escaped ones."""
    return max(accumulate({"(": 1, ")": -1}.get(letter, 0) for letter in pattern))


def checked_names(where: str, names: object) -> tuple[str, ...] | None:
    """Names as a tuple; a set is sorted alphabetically."""
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ConfigError(f"{where}: expected a list of names, got {names!r}.")
    result = tuple(sorted(names) if isinstance(names, (set, frozenset)) else names)
    for name in result:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{where}: expected non-empty strings, got {name!r}.")
    return result


def checked_indices(indices: object) -> tuple[int, ...] | None:
    """Indices of layers as a tuple; None if there are none."""
    if indices is None:
        return None
    listed = (indices,) if isinstance(indices, int) else indices
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise ConfigError(f"layers_to_transform: expected an index or a list of them, got {indices!r}.")
    result = tuple(sorted(listed) if isinstance(listed, (set, frozenset)) else listed)
    for index in result:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ConfigError(f"layers_to_transform: expected indices from 0 up, got {index!r}.")
    return result or None


def checked_tokens(tokens: object) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """Token ids as a tuple, or one tuple for each module; None if there are none."""
    where = "trainable_token_indices"
    if isinstance(tokens, Mapping):
        for name in tokens:
            if not isinstance(name, str) or not name:
                raise ConfigError(f"{where}: expected names of modules, got {name!r}.")
        return {name: _ids(f"{where}[{name!r}]", ids) for name, ids in tokens.items()} or None
    return None if tokens is None or tokens in ([], ()) else _ids(where, tokens)


def _ids(where: str, ids: object) -> tuple[int, ...]:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise ConfigError(f"{where}: expected a list of token ids, got {ids!r}.")
    result = tuple(sorted(ids) if isinstance(ids, (set, frozenset)) else ids)
    for i in result:
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise ConfigError(f"{where}: expected token ids from 0 up, got {i!r}.")
    if not result:
        raise ConfigError(f"{where}: expected at least one token id, got none.")
    if len(set(result)) < len(result):
        twice = next(i for i, times in Counter(result).items() if times > 1)
        raise ConfigError(f"{where}: {twice} appears twice. Name every token once.")
    return result

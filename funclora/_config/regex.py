"""Regular expressions from untrusted files, matched in bounded time.

Python's matcher tries every way to split a name: for `(.*)*x` the time is exponential, and it cannot be interrupted.
Such an expression is matched here by the sets of positions where each of its parts can end; a set has at most one more
position than the name has letters. This tells whether a name matches, but not how, and nothing else is needed here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from funclora._config.names import endings
from funclora.errors import ConfigError

try:  # Python's own parser, under its name from 3.11 on
    from re import _parser as _sre  # type: ignore[attr-defined]
except ImportError:
    import sre_parse as _sre

# How PEFT matches a key of rank_pattern and alpha_pattern with the end of a name.
ENDS = r"(.*\.)?({})"
Ends = frozenset[int]
_NAME = re.compile(r"[\w.]+")
# Consecutive quantifiers that Python's matcher is given: the time grows with this power of the length of a name.
_FEW = 4
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": lambda letter: letter.isalnum() or letter == "_",
}  # fmt: skip


def matches(pattern: str, name: str) -> bool:
    r"""Whether the expression matches the whole name.

    Raises:
        ConfigError: the time of the match has no known bound.

    Examples:
        >>> matches(r"model(\.\w+)*\.q_proj", "model.layers.0.self_attn.q_proj"), matches("(.*)*x", "a" * 80)
        (True, False)
    """
    texts = _alternatives(pattern)
    if texts is not None:
        return name in texts
    if _combinations(pattern) <= _FEW:
        return re.fullmatch(pattern, name) is not None
    tree = _parsed(pattern)
    if tree.state.flags & ~re.UNICODE.value:
        raise _slow(pattern)
    try:
        return len(name) in _Matcher(name).after(tree, 0)
    except NotImplementedError as error:
        raise _slow(pattern) from error


def is_name(pattern: str) -> bool:
    """Whether an expression is a dotted name: then it is valid inside any expression and is matched quickly."""
    return _NAME.fullmatch(pattern) is not None


class Endings:
    """Which of many expressions match the end of a name, from its start or after a dot.

    Nearly all expressions are dotted names. Such a name matches a text that is equal to it, or that has other letters
    at some of its dots and so fewer dots. So names are looked up, and only other expressions are tried one by one.

    Examples:
        >>> Endings(["q_proj", "layers.[01].*", "0.q_proj", "v_proj"]).matching("layers.0.q_proj")
        ['q_proj', 'layers.[01].*', '0.q_proj']
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = list(patterns)
        self._places: dict[str, int] = {}  # of the expressions that are names
        self._names: dict[tuple[int, int], list[int]] = {}  # by length and number of dots
        self._others: list[int] = []
        for i, pattern in enumerate(self._patterns):
            if is_name(pattern):
                self._places[pattern] = i
                self._names.setdefault((len(pattern), pattern.count(".")), []).append(i)
            else:
                self._others.append(i)

    def matching(self, name: str) -> list[str]:
        """The expressions that match, in their given order."""
        tried = list(self._others)
        for (length, dots), places in self._names.items():
            ending = name[-length:]
            if len(ending) == length and ending.count(".") < dots:
                tried += places
        found = {i for i in tried if matches(ENDS.format(self._patterns[i]), name)}
        found |= {self._places[ending] for ending in endings(name) if ending in self._places}
        return [self._patterns[i] for i in sorted(found)]


def refuse_slow(pattern: str) -> None:
    """Raise `ConfigError` if Python's own matcher may not terminate in reasonable time with an expression."""
    if _combinations(pattern) > _FEW:
        raise _slow(pattern)


def _slow(pattern: str) -> ConfigError:
    return ConfigError(
        f"the regular expression {pattern[:200]!r} may not terminate: it has nested or many consecutive quantifiers, "
        "together with back references, flags or other special syntax. Write a simpler one."
    )


@functools.lru_cache(maxsize=4096)
def _parsed(pattern: str) -> Any:
    return _sre.parse(pattern)


@functools.lru_cache(maxsize=4096)
def _combinations(pattern: str) -> float:
    return _quantifiers(_parsed(pattern))


@functools.lru_cache(maxsize=256)
def _alternatives(pattern: str) -> frozenset[str] | None:
    """The texts that match, if the expression only lists them: `save_peft` may list thousands of modules so."""
    parts = pattern.split("|")
    texts = [part.replace("\\", "") for part in parts]
    return frozenset(texts) if [*map(re.escape, texts)] == parts else None


def _quantifiers(parts: Iterable[Any]) -> float:
    """How many quantifiers Python's matcher may have to try in combination; infinite if some are nested."""
    count = 0.0
    for kind, value in parts:
        name = str(kind)
        if name.endswith("_REPEAT"):
            low, high, body = value
            inner = _quantifiers(body)
            if high - low > 8:
                count += 1 if inner == 0 and not _branches(body) else float("inf")
            else:
                count += inner * int(high) + (low != high)
        elif name == "BRANCH":
            count += max(map(_quantifiers, value[1]))
        else:
            count += sum(map(_quantifiers, _inside(name, value)))
    return count


def _inside(name: str, value: Any) -> list[Any]:
    """The expressions in an operation."""
    if name == "SUBPATTERN":
        return [value[-1]]
    if name in ("ASSERT", "ASSERT_NOT"):
        return [value[1]]
    if name == "ATOMIC_GROUP":
        return [value]
    if name == "GROUPREF_EXISTS":
        return [each for each in value[1:] if each is not None]
    return []


def _branches(parts: Iterable[Any]) -> bool:
    return any(
        str(kind) == "BRANCH" or any(map(_branches, _inside(str(kind), value)))
        or (str(kind).endswith("_REPEAT") and _branches(value[2]))
        for kind, value in parts
    )  # fmt: skip


class _Matcher:
    """The positions in a name where parts of an expression can end."""

    def __init__(self, name: str) -> None:
        self._name, self._known = name, dict[tuple[int, int], Ends]()

    def after(self, parts: Iterable[Any], start: int) -> Ends:
        ends: Ends = frozenset({start})
        for part in parts:
            ends = frozenset().union(*(self._part(part, place) for place in ends))
        return ends

    def _part(self, part: Any, start: int) -> Ends:
        key = id(part), start  # the tree is held as long as this object
        if key not in self._known:
            self._known[key] = self._new(str(part[0]), part[1], start)
        return self._known[key]

    def _new(self, kind: str, value: Any, start: int) -> Ends:
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, body = value
            return self._repeated(low, high, body, start)
        if kind == "BRANCH":
            return frozenset().union(*(self.after(each, start) for each in value[1]))
        if kind == "SUBPATTERN" and not value[1] and not value[2]:
            return self.after(value[3], start)
        if kind in ("ASSERT", "ASSERT_NOT") and value[0] == 1:
            found = bool(self.after(value[1], start))
            return frozenset({start} if found == (kind == "ASSERT") else ())
        if kind == "AT":
            return frozenset({start} if self._at(str(value), start) else ())
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            letter = self._name[start : start + 1]
            return frozenset({start + 1} if letter and _is(letter, kind, value) else ())
        raise NotImplementedError(kind)

    def _repeated(self, low: int, high: int, body: Any, start: int) -> Ends:
        def once(ends: Ends) -> Ends:
            return frozenset().union(*(self.after(body, place) for place in ends))

        enough = len(self._name) + 1  # after so many repetitions, no further one consumes a letter
        ends: Ends = frozenset({start})
        for _ in range(min(low, enough)):
            ends = once(ends)
        found = new = ends
        for _ in range(min(high - low, enough)):
            new = once(new) - found
            found |= new
        return found

    def _at(self, where: str, place: int) -> bool:
        n, name = len(self._name), self._name
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return place == 0
        if where in ("AT_END", "AT_END_STRING"):
            return place == n or (where == "AT_END" and place == n - 1 and name[place] == "\n")
        word = _CATEGORIES["WORD"]
        edge = (place > 0 and word(name[place - 1])) != (place < n and word(name[place]))
        return edge == (where == "AT_BOUNDARY")


def _is(letter: str, kind: str, value: Any) -> bool:
    if kind == "ANY":
        return letter != "\n"
    if kind != "IN":
        same: bool = ord(letter) == value
        return same == (kind == "LITERAL")
    items = [(str(kind), of) for kind, of in value]
    found: bool = any(
        ord(letter) == of if kind == "LITERAL"
        else of[0] <= ord(letter) <= of[1] if kind == "RANGE"
        else kind == "CATEGORY" and _in_category(letter, str(of))
        for kind, of in items
    )  # fmt: skip
    negated: bool = items[0][0] == "NEGATE"
    return found != negated


def _in_category(letter: str, name: str) -> bool:
    name = name.removeprefix("CATEGORY_")
    known: bool = _CATEGORIES[name.removeprefix("NOT_")](letter)
    return known != name.startswith("NOT_")

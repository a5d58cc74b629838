"""What the labels of texts mean: one class, several classes, or numbers."""

from __future__ import annotations

import functools
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from funclora._apps.train.records import Record
from funclora._apps.train.settings import AUTO, MULTI, REGRESSION, SINGLE
from funclora.errors import FormatError, near

NAMED = 20  # classes in a message


@dataclass(frozen=True)
class Labels:
    """What the labels of a run mean.

    Attributes:
        problem: one of `settings.PROBLEMS`.
        names: of the classes, or of the numbers, in the order of the head's outputs.
        placed: whether a list of several classes has a 0 or a 1 for each class, instead of the names of some.
    """

    problem: str = SINGLE
    names: tuple[str, ...] = ()
    placed: bool = False

    def targets(self, record: Record, field: str) -> tuple[float, ...]:
        """What each output of the head shall be; empty if the label is one class.

        Raises:
            FormatError: the label is something else, or a class that is not known.

        Examples:
            >>> record = Record({"label": ["b"]}, "x:1", "x:1")
            >>> Labels("multi-label", ("a", "b")).targets(record, "label")
            (0.0, 1.0)
        """
        value = record.fields[field]
        if self.problem == SINGLE:
            return ()
        if self.problem == REGRESSION:
            return _numbers(value, record, field, len(self.names))
        if not isinstance(value, list):
            raise FormatError(f"{record.where}: {field}: expected a list of classes, got {reprlib.repr(value)}.")
        if self.placed:
            made = _numbers(value, record, field, len(self.names))
            if not {*made} <= {0.0, 1.0}:
                raise FormatError(f"{record.where}: {field}: expected a 0 or a 1 for each class, got {made}.")
            return made
        there = {self.number(class_name(each, record, field), record, field) for each in value}
        return tuple(float(i in there) for i in range(len(self.names)))

    def number(self, name: str, record: Record, field: str) -> int:
        """The number of a class.

        Raises:
            FormatError: it is not known.
        """
        if name not in self._places:
            raise FormatError(
                f"{record.where}: {field}: {reprlib.repr(name)} is none of the classes {listed(self.names)}."
                f"{near(name, self.names, 1)}"
            )
        return self._places[name]

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}


class Seen:
    """What the labels of some records look like.

    Attributes:
        names: of the classes that they would be, in the order in which they were seen.

    Examples:
        >>> seen = Seen()
        >>> for label in (0.5, 2):
        ...     seen.add(label, Record({}, "x:1", "x:1"), "label")
        >>> seen.problem()
        'regression'
    """

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        self._kinds: dict[str, tuple[str, str]] = {}  # kind of value -> its type's name, and where it is
        self._sizes: dict[int | None, str] = {}  # numbers of values, None for a single one that is no list
        self._all_numbers = self._all_bits = True
        self._fractions = False

    def add(self, label: Any, record: Record, field: str) -> None:
        """Take note of a label.

        Raises:
            FormatError: it is none, or of another kind than those before it.
        """
        self._count(None if not isinstance(label, list) else len(label), record, field)
        for value in label if isinstance(label, list) else [label]:
            kind = "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
            if not isinstance(value, str | int | float) or value == "":
                raise _no_class(value, record, field)
            self._kinds.setdefault(kind, (type(value).__name__, record.where))
            if len(self._kinds) > 1:
                (one, first), (other, _) = list(self._kinds.values())[:2]
                del self._kinds[kind]
                raise FormatError(
                    f"{record.where}: {field}: classes are of type {other} here, but {one} in {first}. Give all as "
                    "texts, or all as whole numbers."
                )
            number = _number(value)
            self._all_numbers &= number is not None
            self._all_bits &= number in (0.0, 1.0)
            self._fractions |= isinstance(value, float) or (number is not None and not _is_whole(value))
            if not isinstance(value, float):
                self.names.setdefault(str(value))

    def _count(self, n: int | None, record: Record, field: str) -> None:
        self._sizes.setdefault(n, record.where)
        if None in self._sizes and len(self._sizes) > 1:
            other = next(where for size, where in self._sizes.items() if (size is None) != (n is None))
            del self._sizes[n]
            kind, before = ("a list", "a single value") if n is not None else ("a single value", "a list")
            raise FormatError(f"{record.where}: {field}: is {kind} here, but {before} in {other}. Give all as lists.")

    def problem(self) -> str:
        """What the labels are if nobody says it.

        Lists of zeros and ones, all of one size above 1, have a place for each class; other lists of texts or whole
        numbers name classes. Numbers with a decimal point, in lists or alone, are numbers. Everything else is a class.
        """
        if self.is_placed():
            return MULTI
        if self._all_numbers and self._fractions:
            return REGRESSION
        return SINGLE if None in self._sizes else MULTI

    def is_placed(self) -> bool:
        """Whether the labels are lists that have a place for each class."""
        return self._all_bits and len(self._sizes) == 1 and (self.size or 0) > 1

    def are_whole(self) -> bool:
        """Whether the labels are whole numbers, so that they could be classes or numbers."""
        return self._all_numbers and not self._fractions

    @property
    def size(self) -> int | None:
        """Number of values of the first label; None if it is no list."""
        return next(iter(self._sizes), None)


def decided(seen: Seen, problem: str, known: Sequence[str], where: str) -> tuple[Labels, list[str]]:
    """What the labels of some data mean, and what is to be said of that.

    Args:
        seen: the labels.
        problem: what the user says, or the head; `settings.AUTO` for what they look like.
        known: classes of the model's head, in its order. Data without other classes use the same numbers, so that the
            head names them correctly.
        where: the data and the field, for messages.

    Raises:
        FormatError: there are too few classes.
    """
    kind = seen.problem() if problem == AUTO else problem
    if kind == REGRESSION:
        n = seen.size or 1
        many = f"{n} numbers each" if n > 1 else "numbers"
        return Labels(kind, tuple(map(str, range(n)))), [
            f"Labels are {many}: regression, the loss is the squared error."
        ]
    said = ["Labels are several classes for each text (multi-label)."] if kind == MULTI else []
    if kind == MULTI and seen.is_placed():
        n = seen.size or 0
        names = tuple(known) if len(known) == n else tuple(map(str, range(n)))
        return Labels(kind, names, placed=True), [*said, f"Their lists have a 0 or a 1 for each of {n} classes."]
    least, words = (2, "two classes") if kind == SINGLE else (1, "one class")
    if len(seen.names) < least:
        raise FormatError(f"{where}: expected at least {words}, got {', '.join(seen.names) or 'none'}.")
    if {*seen.names} <= {*known}:
        names = tuple(known)
    else:
        if known:
            said.append(f"The model's head has other classes: {listed(known)}.")
        try:
            names = tuple(sorted(seen.names, key=int))
        except ValueError:
            names = tuple(sorted(seen.names))
    said.append(f"{len(names)} classes: {listed(names)}.")
    if kind == SINGLE and problem == AUTO and seen.are_whole():
        said.append(f"Whole numbers are names of classes. With problem {REGRESSION} they are learned as numbers.")
    return Labels(kind, names), said


def class_name(label: Any, record: Record, field: str) -> str:
    """A class's name: texts as they are; whole numbers and truth values by their digits.

    Raises:
        FormatError: it is something else.
    """
    if isinstance(label, str | int) and label != "":
        return str(label)
    raise _no_class(label, record, field)


def listed(names: Sequence[str]) -> str:
    """The first names.

    Examples:
        >>> listed(["a", "b"])
        'a, b'
    """
    return f"{', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"


def _no_class(label: Any, record: Record, field: str) -> FormatError:
    hints = {
        float: f" Numbers are learned with problem {REGRESSION}.",
        list: f" Lists are learned with problem {MULTI}.",
    }
    return FormatError(
        f"{record.where}: {field}: expected a class as a text or a whole number, got {reprlib.repr(label)}."
        f"{hints.get(type(label), '')}"
    )


def _numbers(value: Any, record: Record, field: str, n: int) -> tuple[float, ...]:
    made = [_number(each) for each in (value if isinstance(value, list) else [value])]
    if None in made or len(made) != n:
        expected = "a number" if n == 1 else f"{n} numbers"
        raise FormatError(f"{record.where}: {field}: expected {expected}, got {reprlib.repr(value)}.")
    return tuple(each for each in made if each is not None)


def _number(value: Any) -> float | None:
    """A number, or the text of one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_whole(value: Any) -> bool:
    """Whether a number has no decimal point."""
    try:
        return isinstance(value, int) or str(int(value)) != ""
    except ValueError:
        return False

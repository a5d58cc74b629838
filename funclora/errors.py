"""The one family of errors and warnings of the package.

Every message says where (parameter, file or key), what was expected, what came, and what to do.
Errors also derive from the built-in class that a caller would expect (`ValueError`, `TypeError`, ...).
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

# Control characters except tab and line feed, characters that change the writing direction, and lone surrogates.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 200  # characters that are shown of a name
_MOST = 10_000  # names that are compared


def printable(text: str) -> str:
    """A text without characters that control a terminal: they are replaced by Python's escapes.

    Examples:
        >>> printable("name" + chr(27) + "[2J").count("x1b")
        1
    """
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shortened(name: object) -> str:
    """A name, or any value given instead of one, for a message."""
    text = repr(name[: _LONGEST + 1] if isinstance(name, str) else name)
    return text if len(text) <= _LONGEST + 2 else f"{text[:_LONGEST]}..."


class FuncloraError(Exception):
    """Base class of every error that funclora raises."""

    def __str__(self) -> str:  # what is raised inside of a compiled function must have no constructor of its own
        return printable(super().__str__())


class ArgumentError(FuncloraError, TypeError):
    """An argument has the wrong type, for example because arguments were swapped or one was left out.

    An argument of the right type with a wrong value raises another error of this module, often a `ValueError`.
    """


class ConfigError(FuncloraError, ValueError):
    """A configuration value is invalid, or two values contradict each other."""


class UnknownAdapterError(ConfigError, LookupError):
    """An adapter is named by an id that nothing is known of."""


class TooLongError(ConfigError):
    """A text and what should be generated after it are longer than the model can read."""


class QueueFullError(FuncloraError, RuntimeError):
    """More requests wait than may wait. Try again later."""


class ClosedError(FuncloraError, RuntimeError):
    """A request came after the engine was closed, or could not be answered before."""


class TargetError(FuncloraError, ValueError):
    """A target, exclusion or pattern matches nothing, or names something that cannot carry a rule."""


class ParamsError(FuncloraError, ValueError):
    """A parameter dict does not match the model, or an adapter does not match its parameter."""


class NonFiniteError(FuncloraError, ValueError):
    """A computation gave NaN or infinity where a finite result is required."""


class PurityError(FuncloraError, RuntimeError):
    """Code tried to write to a value that must not change, or a model cannot be bound without mutation."""


class UnsupportedError(FuncloraError, NotImplementedError):
    """A valid combination that is not supported, or that another format cannot express."""


class DenseFallbackError(FuncloraError, RuntimeError):
    """Under `strict()`: an operation without a fast form would compute the dense adapted weight."""


class FormatError(FuncloraError, ValueError):
    """A file is damaged, incomplete or in another format."""


class FuncloraWarning(UserWarning):
    """Base class of every warning that funclora gives."""

    def __str__(self) -> str:  # what is made inside of a compiled function must have no constructor of its own
        return printable(super().__str__())


class DenseFallbackWarning(FuncloraWarning):
    """An operation without a fast form computed the dense adapted weight: correct, but slow."""


class TiedWeightsWarning(FuncloraWarning):
    """A rewritten parameter shares its storage with another parameter, which is not rewritten."""


class UnusedAdapterWarning(FuncloraWarning):
    """An adapter received no gradient, because its parameter was not used by the loss."""


class FormatWarning(FuncloraWarning):
    """A file of another program is read by the plain formula, and that program computes something else from it."""


class PeftFormatWarning(FuncloraWarning):
    """A PEFT folder depends on PEFT behaviour that differs from the plain formula, or could not hold an adapter."""


class OtherBaseWarning(FuncloraWarning):
    """An adapter was made for a base model other than the one it is used with."""


def near(name: str, names: Iterable[str], n: int = 5) -> str:
    """The names most similar to `name`, as the end of an error message.

    Examples:
        >>> near("q_prj", ["q_proj", "v_proj", "bias"], n=1)
        ' Near names: q_proj.'
        >>> near("x", [])
        ''
    """
    candidates = list(dict.fromkeys(names))
    short = [candidate for candidate in candidates[:_MOST] if len(candidate) <= _LONGEST]  # long ones are slow
    close = difflib.get_close_matches(name[:_LONGEST], short, n=n, cutoff=0.3) or candidates[:n]
    shown = (each if len(each) <= _LONGEST else f"{each[:_LONGEST]}..." for each in close)
    return f" Near names: {', '.join(shown)}." if close else ""


_strict: ContextVar[bool] = ContextVar("funclora.errors.strict", default=False)


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Turn every dense fallback inside the block into a `DenseFallbackError` instead of a warning.

    Examples:
        >>> import torch
        >>> import funclora as fl
        >>> lstm = torch.nn.LSTM(2, 2)
        >>> adapters = {"weight_ih_l0": fl.LoRA(torch.ones(1, 2), torch.ones(8, 1))}
        >>> with strict():
        ...     fl.apply(lstm, fl.base_params(lstm), adapters, torch.ones(1, 2))
        Traceback (most recent call last):
        funclora.errors.DenseFallbackError: 'weight_ih_l0': lstm has no fast form ...
    """
    token = _strict.set(True)
    try:
        yield
    finally:
        _strict.reset(token)


def is_strict() -> bool:
    """True inside `strict()`."""
    return _strict.get()

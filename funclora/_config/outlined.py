"""Models that stand for others: their modules and shapes were remembered, and they know their original's answers.

`funclora.io.hf.outline` makes them, so that a command need not import transformers for what an earlier one has seen.
What the modules, their classes and tensors do not say must be asked of a model by `asked`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

Plain = Any  # what JSON has: None, numbers, texts, and lists and dicts of these


class Original(ABC):
    """The model that an outline stands for."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The model itself, on the meta device; it is made at the first call."""

    @abstractmethod
    def answer(self, question: Plain, ask: Callable[[nn.Module], Plain]) -> Plain:
        """What `ask` returns for the model, remembered from an earlier process if possible."""


class Outlined:
    """What the classes of the modules of an outline have in common, except those that are torch's own.

    Attributes:
        original: the model that the outline stands for.
        path: the module's full name in it.
        absent: attributes that the original module is known not to have.
    """

    original: Original
    path: str
    absent: Sequence[str]

    def __getattr__(self, name: str) -> Any:
        """An attribute that is not in the outline: the original's, if it means the same there and here.

        Raises:
            AttributeError: the original does not have it.
            RuntimeError: it does, and it is no plain value.
        """
        try:
            return nn.Module.__getattr__(self, name)  # type: ignore[arg-type]
        except AttributeError:
            if name.startswith("__") or name in self.absent:
                raise
        value = getattr(self.original.model().get_submodule(self.path), name)
        if isinstance(value, bool | int | float | str | None):
            return value
        raise RuntimeError(f"{name!r} of {self.path or 'the model'!r} must be asked of the original model")


def original_of(model: nn.Module) -> nn.Module:
    """The model that an outline stands for; any other model itself."""
    return model.original.model() if isinstance(model, Outlined) else model


def asked(model: nn.Module, question: Plain, ask: Callable[[nn.Module], Plain]) -> Plain:
    """What `ask` returns for a model, or for the original of an outline.

    Args:
        model: the model.
        question: tells apart what can be asked, with everything that the answer depends on besides the model.
        ask: finds the answer.

    Examples:
        >>> asked(nn.Linear(2, 3), "outputs", lambda model: model.out_features)
        3
    """
    return model.original.answer(question, ask) if isinstance(model, Outlined) else ask(model)

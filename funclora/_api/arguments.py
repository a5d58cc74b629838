"""Argument checks shared by all public functions. Each error names the argument, the expected and actual value, a fix.

The type of an argument is checked here (`ArgumentError`, a `TypeError`); its content is checked where it is used
(`ParamsError`, `ConfigError`, ..., which are `ValueError`s).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import NoReturn

import torch
from torch import Generator, Tensor, nn

from funclora.errors import ArgumentError, ConfigError

ORDER = "The order of the arguments is model, params, adapters."


def refuse(where: str, expected: str, value: object, remedy: str = "") -> NoReturn:
    """Raise `ArgumentError`.

    Args:
        where: the argument, or the part of it.
        expected: what it should be.
        value: the actual value.
        remedy: how to fix it, one or more sentences.
    """
    raise ArgumentError(f"{where}: expected {expected}, got {kind_of(value)}.{remedy and ' '}{remedy}")


def kind_of(value: object) -> str:
    """A short description of a value.

    Examples:
        >>> kind_of(torch.ones(2, 3)), kind_of({"weight": torch.ones(2)}), kind_of([]), kind_of(nn.Linear), kind_of("x")
        ('a tensor [2, 3]', 'a dict of tensors', 'an empty list', 'the class Linear', "'x'")
    """
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return f"{value!r:.80}"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    if type(value) not in (dict, list, tuple):  # others may read their items from a file
        return f"{article} {name}"
    assert isinstance(value, (dict, list, tuple))
    if not value:
        return f"an empty {name}"
    first = next(iter(value.values() if isinstance(value, dict) else value))
    return f"{article} {name} of {'tensors' if isinstance(first, Tensor) else type(first).__name__}"


def check_model(model: object, where: str = "model", *, optional: bool = False) -> None:
    """Raise `ArgumentError` unless the argument is a module, or None where it is optional."""
    if isinstance(model, nn.Module) or (optional and model is None):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        refuse(where, "a model (an nn.Module)", model, "Make one: call the class.")
    is_weights = isinstance(model, Mapping) and any(isinstance(value, Tensor) for value in model.values())
    refuse(where, "a model (an nn.Module)", model, f"Was the model left out? {ORDER}" if is_weights else "")


def check_params(params: object, where: str = "params", *, optional: bool = False) -> None:
    """Raise `ArgumentError` unless `params` is a mapping from names to tensors, or None if optional.

    The items of a mapping that is not a dict are not checked: it may read its tensors from a file.
    """
    if optional and params is None:
        return
    expected = "a model's weights, a dict from full names to tensors"
    if isinstance(params, nn.Module):
        refuse(where, expected, params, f"Take base_params(model). {ORDER}")
    if not isinstance(params, Mapping):
        refuse(where, expected, params, "Take base_params(model).")
    for name, value in params.items() if isinstance(params, dict) else ():
        if not isinstance(value, Tensor):
            refuse(f"{where}[{name!r}]", "a tensor", value, f"Are params and adapters swapped? {ORDER}")


def check_path(path: object, where: str = "path", order: str = "") -> None:
    """Raise `ArgumentError` unless the argument is a path.

    Args:
        path: the argument.
        where: its name.
        order: the order of the arguments, such as "path, model", for the remedy.
    """
    if not isinstance(path, (str, os.PathLike)):
        refuse(where, "a path (a str or a Path)", path, order and f"The order of the arguments is {order}.")


def check_paths(paths: object, where: str = "paths") -> None:
    """Raise `ArgumentError` unless the argument is a list of paths."""
    if not isinstance(paths, (list, tuple)):
        refuse(where, "a list of paths", paths, "Put a single path into a list.")
    for i, path in enumerate(paths):
        check_path(path, f"{where}[{i}]")


def check_function(function: object, where: str, form: str) -> None:
    """Raise `ArgumentError` unless the argument can be called.

    Args:
        function: the argument.
        where: its name.
        form: how it is called, such as "loss_fn(bound, batch)".
    """
    if not callable(function):
        refuse(where, f"a function, called as {form}", function)


def check_generator(generator: object, where: str = "generator") -> None:
    """Raise `ArgumentError` unless the argument is a generator, or None."""
    if generator is not None and not isinstance(generator, Generator):
        refuse(where, "a torch.Generator or None", generator, "From a seed: torch.Generator().manual_seed(seed).")


def check_dtype(dtype: object, where: str = "dtype") -> None:
    """Raise an error unless the argument is a floating-point dtype, or None."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        refuse(where, "a torch.dtype or None", dtype, "For example torch.bfloat16.")
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"{where}: expected a floating-point dtype, got {dtype}. For example torch.bfloat16.")


def check_tensor(value: object, where: str, shape: str) -> None:
    """Raise `ArgumentError` unless the argument is a floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        refuse(where, f"a floating-point tensor {shape}", value)


def check_integer(value: object, where: str) -> None:
    """Raise `ArgumentError` unless the argument is an int."""
    if not isinstance(value, int) or isinstance(value, bool):
        refuse(where, "an int", value)


def check_numbers(values: object, where: str) -> None:
    """Raise `ArgumentError` unless the argument is a list. Its numbers are checked where they are used."""
    if not isinstance(values, (list, tuple)):
        refuse(where, "a list of numbers", values)


def check_batches(batches: object, where: str) -> None:
    """Raise `ArgumentError` unless the argument is iterable."""
    if not isinstance(batches, Iterable) or isinstance(batches, (str, Tensor, Mapping, nn.Module)):
        refuse(where, "batches (a list, or a data loader)", batches, "Put a single batch into a list.")

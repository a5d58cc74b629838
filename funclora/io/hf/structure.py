"""The model of a checkpoint without its weights, and the position of each parameter in the checkpoint.

transformers renames the keys of a checkpoint when it loads it, and joins or splits tensors: Mixtral has one matrix for
each expert on disk, but one parameter for all of them in memory. Its own table of these conversions is used, so that
parameters are found where `from_pretrained` finds them.
"""

from __future__ import annotations

import contextlib
import inspect
import reprlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from funclora._config.outlined import asked, original_of
from funclora.errors import FormatError, UnsupportedError
from funclora.io.hf.library import check_config, transformers
from funclora.io.hf.outline import outlined
from funclora.io.peft.conversions import Conversion, Conversions

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A part of a parameter that is contained in one tensor of a checkpoint.

    Attributes:
        parameter: full name in the model.
        key: key of the tensor.
        first: where the part begins in the tensor, along its first dimension.
        shape: the shape of the part in the tensor.
        cuts: `(dim, start, length)` of each narrowing that leads from the parameter to the part. Remaining leading
            dimensions of length 1 are dropped in the tensor.
    """

    parameter: str
    key: str
    first: int
    shape: Shape
    cuts: tuple[tuple[int, int, int], ...] = ()


class Structure:
    """A model on the meta device.

    Args:
        folder: the folder of the configuration.
        config: the contents of `config.json`.
        tensors: key -> shape, for the tensors of the checkpoint. A configuration with very many more parameters is
            refused before all of them are made.
        model: the model, if it is there already.

    Attributes:
        model: the model, or an outline of it: an earlier process may have made the model itself.
        shapes: full name -> shape, for every parameter and saved buffer.
        ties: groups of names that are one parameter.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Shape], model: Any = None
    ) -> None:
        self._folder, self._tensors = folder, tensors

        def make() -> nn.Module:
            # In float32, so that fully fine-tuned parameters keep it until they are rounded once.
            return build(folder, config, len(tensors), nothing_stored(torch.float32))

        self.model: Any = model or outlined({"config": config, "tensors": sorted(tensors.items())}, make)
        self.shapes: dict[str, Shape] = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        self.ties = [tuple(names) for names in groups.values() if len(names) > 1]

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    def untied(self, config: Mapping[str, Any]) -> Structure:
        """The same model under a configuration that unties its embeddings.

        Raises:
            UnsupportedError: this changes more than the ties, or the class ties regardless of its configuration.
        """
        other = Structure(self._folder, config, self._tensors)
        why = asked(self.model, ["untied", config], lambda model: _beyond_ties(model, original_of(other.model)))
        if why:
            raise UnsupportedError(f"{self.name} {why}")
        return other

    def places(self, tensors: Mapping[str, Shape]) -> tuple[dict[str, list[Part]], dict[str, str]]:
        """The parameters that the tensors of a checkpoint belong to.

        Args:
            tensors: key -> shape.

        Returns:
            Full name of a parameter -> its parts; and full name -> why it cannot be rewritten, for parameters with an
            unknown conversion.

        Raises:
            FormatError: a tensor has another shape than its parameter.
        """
        placed = _Placing(self.model, self.shapes, tensors)
        return placed.parts, placed.opaque


def named_class(folder: Path, architectures: object) -> Any:
    """The model class that a configuration names.

    Args:
        folder: the folder of the configuration, for messages.
        architectures: the value of this field.

    Raises:
        UnsupportedError: it names no class, or one that the installed transformers does not have, or transformers is
            not installed.
    """
    library = transformers()
    if not isinstance(architectures, list) or not architectures:
        raise UnsupportedError(f"{folder}: config.json names no model class (architectures).")
    name = architectures[0]
    cls = None
    with contextlib.suppress(AttributeError, ImportError, RuntimeError):  # transformers imports it now
        cls = getattr(library, name) if isinstance(name, str) else None
    if not inspect.isclass(cls) or not issubclass(cls, library.PreTrainedModel):
        raise UnsupportedError(
            f"{folder}: transformers {library.__version__} has no model class {reprlib.repr(name)}, which "
            "config.json names (architectures)."
        )
    return cls


@contextlib.contextmanager
def nothing_stored(dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, models are made in this dtype and on the meta device."""
    with _default_dtype(dtype), torch.device("meta"):
        yield


@contextlib.contextmanager
def only_buffers_stored(dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, this thread makes models in this dtype, with parameters on the meta device and real buffers."""
    thread = threading.get_ident()

    def hook(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]
    try:
        with _default_dtype(dtype), torch.random.fork_rng(devices=[]):
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def build(
    folder: Path, config: Mapping[str, Any], n_tensors: int, place: contextlib.AbstractContextManager[None]
) -> nn.Module:
    """The model of a configuration that may be broken.

    Args:
        folder: the folder of the configuration.
        config: the contents of `config.json`.
        n_tensors: number of tensors in the checkpoint, which limits the number of parameters.
        place: the context in which the model is made, `nothing_stored` or `only_buffers_stored`.

    Raises:
        UnsupportedError: it names no known class.
        FormatError: it describes no model.
    """
    check_config(folder, config)
    cls = named_class(folder, config.get("architectures"))
    if not isinstance(config.get("model_type", ""), str):
        raise FormatError(f"{folder}: config.json: model_type: expected a string, got {config['model_type']!r}.")
    try:
        with at_most(1000 + 10 * n_tensors), place:
            return cast(nn.Module, cls(cls.config_class.from_dict(dict(config))))
    except Exception as error:  # each of transformers' classes fails in its own way
        said = " ".join(str(error).split())
        raise FormatError(f"{folder}: {cls.__name__} cannot be made from config.json: {said}") from error


@contextlib.contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Inside the block, this thread can make at most this number of parameters."""
    made, thread = count(1), threading.get_ident()

    def hook(_module: nn.Module, name: str, _parameter: nn.Parameter) -> None:
        if threading.get_ident() == thread and next(made) > limit:
            raise FormatError(f"it has more than {limit} parameters, many times more than the checkpoint.")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _beyond_ties(model: Any, untied: Any) -> str:
    """What else changes in a model without tied embeddings; "" if nothing does."""
    before, after = model.config.to_dict(), untied.config.to_dict()
    if after.get("tie_word_embeddings") is not False or _besides_ties(before) != _besides_ties(after):
        return "changes more than its ties if tie_word_embeddings becomes False."
    if "tie_word_embeddings" in inspect.unwrap(type(model).forward).__code__.co_names:
        return "computes something else if tie_word_embeddings is False."
    return ""


def _besides_ties(config: dict[str, Any]) -> dict[str, Any]:
    skipped = ("tie_word_embeddings", "dtype", "torch_dtype", "transformers_version")
    kept = {key: value for key, value in config.items() if key not in skipped}
    return {key: _besides_ties(value) if isinstance(value, dict) else value for key, value in kept.items()}


class _Placing:
    """transformers' table of conversions, applied to the keys of one checkpoint."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, Shape], tensors: Mapping[str, Shape]) -> None:
        self.parts: dict[str, list[Part]] = {}
        self.opaque: dict[str, str] = {}
        self._model, self._shapes, self._tensors = model, shapes, tensors
        found = Conversions(model, shapes, tensors)
        for key, name in found.plain.items():
            self._whole(name, key)
        for name, (converter, sources) in found.joined.items():
            self._converted(name, converter, sources)

    def _whole(self, name: str, key: str) -> None:
        shape = self._tensors[key]
        if shape != self._shapes[name]:
            raise FormatError(
                f"{key!r} has shape {list(shape)} in the checkpoint, but {name!r} of {type(self._model).__name__} has "
                f"{list(self._shapes[name])}."
            )
        self.parts.setdefault(name, []).append(Part(name, key, 0, shape))

    def _converted(self, name: str, converter: Conversion, sources: Mapping[str, list[str]]) -> None:
        """Tensors that are joined or split, by conversions that only move slices."""
        ways, dims = [way for way, _ in converter.operations], [dim for _, dim in converter.operations]
        stacks = [sources[pattern] for pattern in converter.sources if pattern in sources]
        keys = [key for stack in stacks for key in stack]
        targets = self._targets(name, converter)
        if ways == ["MergeModulelist"] and dims == [0]:
            self._stacked(name, stacks, None)
        elif ways == ["MergeModulelist", "Concatenate"] and dims[0] == 0 and dims[1] in (1, 2):
            self._stacked(name, stacks, dims[1])
        elif ways == ["Concatenate"] and dims == [0] and len(targets) == 1:
            self._joined(name, keys)
        elif ways in (["Chunk"], ["Split"]) and dims == [0] and len(keys) == 1 and all(targets):
            self._cut(targets, keys[0], self._tensors[keys[0]])
        else:
            how = ", ".join(ways)
            for target in targets or [name]:
                self.opaque[target] = f"transformers makes it from {', '.join(map(repr, keys[:3]))} by {how}"

    def _targets(self, name: str, converter: Conversion) -> list[str]:
        patterns = converter.targets
        before, found, after = name.partition(patterns[0])
        names = [before + pattern + after for pattern in patterns] if found else [name]
        return names if all(target in self._shapes for target in names) else [name]

    def _stacked(self, name: str, stacks: list[list[str]], dim: int | None) -> None:
        """One tensor per expert; tensors of several kinds are joined along `dim`."""
        parts, start = [], 0
        for keys in stacks:
            shape = self._tensors[keys[0]]
            along = () if dim is None else ((dim, start, shape[dim - 1]),)
            parts += [Part(name, key, 0, self._tensors[key], ((0, i, 1), *along)) for i, key in enumerate(keys)]
            start += 0 if dim is None else shape[dim - 1]
        self._complete(name, parts)

    def _joined(self, name: str, keys: Iterable[str]) -> None:
        parts, start = [], 0
        for key in keys:
            shape = self._tensors[key]
            parts.append(Part(name, key, 0, shape, ((0, start, shape[0]),)))
            start += shape[0]
        self._complete(name, parts)

    def _cut(self, names: list[str], key: str, shape: Shape) -> None:
        first = 0
        for name in names:
            part = self._shapes[name]
            self._complete(name, [Part(name, key, first, part)])
            first += part[0]
        if first != shape[0]:
            raise FormatError(f"{key!r} has shape {list(shape)} in the checkpoint, but {names} need {first} rows.")

    def _complete(self, name: str, parts: list[Part]) -> None:
        """Set the parts of a parameter, which must cover all of it."""
        whole = self._shapes[name]
        count = 0
        for part in parts:
            expected = list(whole)
            for dim, _, length in part.cuts:
                expected[dim] = length
            count += torch.Size(expected).numel()
            if part.shape not in (tuple(expected), tuple(expected[1:])):
                count = -1
                break
        if count != torch.Size(whole).numel():
            raise FormatError(
                f"{name!r} has shape {list(whole)}, but the {len(parts)} tensors of the checkpoint for it "
                f"({parts[0].key!r} {list(parts[0].shape)}, ...) have another total shape."
            )
        self.parts[name] = [*self.parts.get(name, ()), *parts]

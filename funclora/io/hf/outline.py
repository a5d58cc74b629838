"""Models on the meta device without their classes: what targets, layouts and file formats depend on, as a JSON value.

An outline has the modules, parameters and buffers of a model, under the same names and shared in the same places. The
classes of its modules have the names of the original ones and their base class of torch, and no code. What else is
asked of it, its original answers (`funclora._config.outlined`), which is made only then.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from funclora._bind.params import named_tensors
from funclora._config.embeddings import input_embeddings, output_embeddings, setting_of
from funclora._config.experts import converted_like
from funclora._config.layers import weights_of
from funclora._config.outlined import Original, Outlined, Plain
from funclora._files.cache import digest_of
from funclora.io.hf.remembered import Entry
from funclora.io.peft.limits import own_forward

_FORMAT = 1
# Attributes of modules of transformers that the library reads, where they exist. A layer of torch has all of its own.
_READ = ("embed_scale", "is_transposed")


def outlined(question: Plain, make: Callable[[], nn.Module]) -> nn.Module:
    """An outline of the model that `make` returns, remembered from an earlier process if possible.

    Args:
        question: everything that the model depends on, besides what is installed.
        make: makes the model, on the meta device. Its errors are raised, and not remembered.

    Returns:
        The outline; the model itself where nothing can be remembered, or an outline would not be the same.
    """
    entry = Entry(["model", question])
    if not entry.is_usable:
        return make()
    remembered = _Remembered(entry, make)
    found = remembered.outline()
    if found is not None:
        return found
    model = remembered.model()
    remembered.content = {"format": _FORMAT, "outline": _described(model), "answers": {}}
    outline = remembered.outline()
    if outline is None or not _is_same(outline, model):
        return model
    for ask in (input_embeddings, output_embeddings, converted_like):
        ask(outline)
    for name in ("model_type", "tie_word_embeddings"):
        setting_of(outline, name)
    remembered.keep()
    return outline


class _Remembered(Original):
    """A model in the cache: `{"format": .., "outline": .., "answers": {digest of a question: answer}}`."""

    def __init__(self, entry: Entry, make: Callable[[], nn.Module]) -> None:
        self._entry, self._make = entry, make
        self._model: nn.Module | None = None
        self.content = entry.get()
        self._is_kept = self.content is not None

    def model(self) -> nn.Module:
        if self._model is None:
            self._model = self._make()
        return self._model

    def answer(self, question: Plain, ask: Callable[[nn.Module], Plain]) -> Plain:
        answers, key = self.content["answers"], digest_of(question)
        if key not in answers:
            answer = ask(self.model())
            try:
                # What the first process gets is what later ones read.
                answers[key] = json.loads(json.dumps(answer))
            except TypeError:
                return answer
            if self._is_kept:
                self.keep()
        return answers[key]

    def keep(self) -> None:
        self._entry.put(self.content)
        self._is_kept = True

    def outline(self) -> nn.Module | None:
        """The outline; None if the content is none, or of another version."""
        try:
            if self.content["format"] != _FORMAT or not isinstance(self.content["answers"], dict):
                return None
            return _rebuilt(self.content["outline"], self)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError):
            return None


# From a model to JSON.


def _described(model: nn.Module) -> Plain:
    modules = {id(module): i for i, module in enumerate(model.modules())}
    tensors: dict[int, int] = {}
    facts: list[Plain] = []
    kinds: dict[str, int] = {}

    def place(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            tensors[id(tensor)] = len(facts)
            trained = tensor.requires_grad if isinstance(tensor, nn.Parameter) else None
            facts.append([[*tensor.shape], str(tensor.dtype).removeprefix("torch."), trained])
        return tensors[id(tensor)]

    found = []
    for module in model.modules():
        kind = json.dumps(_kind(module))
        found.append({
            "kind": kinds.setdefault(kind, len(kinds)),
            "children": {name: modules.get(id(child)) for name, child in module._modules.items()},
            "parameters": {name: place(tensor) for name, tensor in module._parameters.items()},
            "buffers": {name: place(tensor) for name, tensor in module._buffers.items()},
            "unsaved": sorted(module._non_persistent_buffers_set),
        })  # fmt: skip
    return {"kinds": [*map(json.loads, kinds)], "modules": found, "tensors": facts}


def _kind(module: nn.Module) -> Plain:
    """What several modules may have in common: the names of their classes, and their attributes."""
    cls = type(module)
    base = next(each for each in cls.__mro__ if _of_torch(each.__module__, each.__qualname__) is each)
    own = [[each.__name__, each.__module__] for each in cls.__mro__ if each not in base.__mro__]
    given = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
    if base is nn.Module:
        given = {name: getattr(module, name) for name in _READ if hasattr(module, name)}
    attributes = {name: value for name, value in given.items() if _is_plain(value)}
    return {
        "torch": [base.__module__, base.__qualname__],
        "own": own,
        "is_outlined": bool(own) or len(attributes) < len(given),
        "has_forward": cls.forward is not base.forward,
        "attributes": attributes,
        "absent": [name for name in _READ if not hasattr(module, name)],
    }


_OF_MODULES = frozenset(vars(nn.Module()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return type(value) in (bool, int, float, str, type(None))


def _of_torch(module: str, name: str) -> Any:
    """A class of modules in torch.nn; None for other classes."""
    found = getattr(sys.modules.get(module), name, None) if module.startswith("torch.nn.") else None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


# And back.


def _rebuilt(outline: Plain, original: Original) -> nn.Module:
    classes = [*map(_class, outline["kinds"])]
    tensors = [_tensor(*facts) for facts in outline["tensors"]]
    modules: list[nn.Module] = []
    absent: dict[int, list[str]] = {}
    for each in outline["modules"]:
        cls, kind = classes[each["kind"]], outline["kinds"][each["kind"]]
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.__dict__.update({name: _with_tuples(value) for name, value in kind["attributes"].items()})
        modules.append(module)
        absent[id(module)] = kind["absent"]
    for module, each in zip(modules, outline["modules"], strict=True):
        module._non_persistent_buffers_set = {*each["unsaved"]}
        for held, places, values in (
            (module._parameters, each["parameters"], tensors),
            (module._buffers, each["buffers"], tensors),
            (module._modules, each["children"], modules),
        ):
            held.update({name: None if place is None else values[place] for name, place in places.items()})
    for path, module in modules[0].named_modules():
        if isinstance(module, Outlined):
            module.__dict__.update(original=original, path=path, absent=absent[id(module)])
    return modules[0]


def _class(kind: Plain) -> type[nn.Module]:
    base = _of_torch(*kind["torch"])
    if base is None:
        raise LookupError(kind["torch"])
    if not kind["is_outlined"]:
        return base  # type: ignore[no-any-return]
    cls: Any = type(base.__name__, (Outlined, base), {"__module__": base.__module__})
    for name, where in reversed(kind["own"]):
        cls = type(name, (cls,), {"__module__": where})
    if kind["has_forward"]:
        cls.forward = _forward
    return cls  # type: ignore[no-any-return]


def _forward(self: nn.Module, *_: Any, **__: Any) -> Any:
    raise RuntimeError(f"an outline of a {type(self).__name__} has no code")


def _tensor(shape: list[int], dtype: str, trained: bool | None) -> Tensor:
    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    return tensor if trained is None else nn.Parameter(tensor, trained)


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


# Whether both say the same.


def _is_same(outline: nn.Module, model: nn.Module) -> bool:
    try:
        return [*_facts(outline)] == [*_facts(model)]
    except RuntimeError:  # it has no plain value for an attribute
        return False


def _facts(model: nn.Module) -> Iterator[Any]:
    """What the library looks at in the modules and tensors of a model."""
    first: dict[int, int] = {}  # what is shared is shared in both
    for name, module in model.named_modules(remove_duplicate=False):
        names = {(cls.__name__, cls.__module__) for cls in type(module).__mro__ if cls is not Outlined}
        yield name, first.setdefault(id(module), len(first)), type(module).__name__, names
        yield weights_of(module), own_forward(module), [*module._parameters], [*module._buffers]
        for attribute in _READ:
            value = getattr(module, attribute, None)
            yield value if _is_plain(value) else type(value)
    for name, tensor, _, unsaved in named_tensors(model):
        is_parameter = isinstance(tensor, nn.Parameter)
        yield name, first.setdefault(id(tensor), len(first)), tensor.shape, tensor.dtype, tensor.requires_grad, unsaved
        yield is_parameter, is_parameter and tensor.is_meta
    yield {name: tensor.shape for name, tensor in model.state_dict().items()}

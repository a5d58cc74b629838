"""Adapters from the time of transformers 4, whose models have other names in version 5.

Version 5 holds the experts of a layer in one parameter, where version 4 had a module for each of their matrices, and it
moved some models under another prefix. Adapters follow by the table that transformers has for checkpoints.

Where a parameter joins several matrices along its outputs, its A has theirs one above the other, and its B is
block-diagonal. Rank and α grow together, so that the scaling stays what it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funclora._config.config import LoraConfig
from funclora._config.covers import covers
from funclora._config.layers import is_of_transformers, weights_of
from funclora._config.names import named
from funclora._files.safetensors import Stored
from funclora.errors import ConfigError, FormatError, UnsupportedError
from funclora.io.peft.conversions import Conversion, Conversions
from funclora.io.peft.keys import PREFIX, Keys, PeftTarget
from funclora.io.peft.tensors import StoredTensors

_KEY = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+?)(?P<wrapper>\.base_layer)?\.(?P<suffix>lora_[AB]\.weight|lora_embedding_[AB]"
    r"|lora_magnitude_vector|lora_B\.bias|token_adapter\.trainable_tokens_delta|[^.]+)$"
)
_FACTORS = {"a": "lora_A.weight", "b": "lora_B.weight"}


class _Place(NamedTuple):
    """Where a tensor of the file belongs, in the words of its key."""

    module: str
    wrapper: str
    suffix: str

    @property
    def low_rank(self) -> bool:
        return "." in self.suffix or "lora_" in self.suffix

    @property
    def weight(self) -> str:
        """The name of the parameter that it changes or replaces."""
        return f"{self.module}.{'weight' if self.low_rank else self.suffix}"


@dataclass(frozen=True)
class _Experts:
    """The adapters of the matrices that one parameter holds.

    Attributes:
        parameter: its full name.
        shape: its shape, `[experts, out, in]`.
        kinds: the old names of the modules by expert, for each kind of matrix in the order of the outputs; empty for a
            kind without adapters.
        r: the rank of each adapter.
        scaling: the scaling of each adapter.
    """

    parameter: str
    shape: tuple[int, ...]
    kinds: tuple[tuple[str, ...], ...]
    r: int
    scaling: float

    @property
    def modules(self) -> list[str]:
        return [module for kind in self.kinds for module in kind]

    @property
    def rank(self) -> int:
        return self.r * sum(bool(kind) for kind in self.kinds)


@dataclass(frozen=True)
class _Packed(Stored):
    """A tensor that is made of several of the file."""

    make: Callable[[int], Tensor] = field(kw_only=True)

    def read(self, descriptor: int, first: int = 0, length: int | None = None) -> Tensor:
        return self.make(descriptor)[first : None if length is None else first + length]


class OlderNames:
    """What an adapter means under the names of the model that it is loaded for.

    Args:
        model: the model.
        weights: full name -> parameter or buffer.
        stored: the tensors of the adapter. Those that only have other names get the new ones.
        config: its configuration.

    Attributes:
        config: the configuration under the new names.
        notes: what PEFT would not have accepted.

    Raises:
        FormatError: the experts of a layer do not have the same adapter.
        UnsupportedError: a conversion is not known.
    """

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], stored: StoredTensors, config: LoraConfig
    ) -> None:
        self.config, self.notes = config, list[str]()
        self._stored, self._given, self._experts = stored, config, list[_Experts]()
        if not is_of_transformers(model):
            return
        self._model, self._weights = model, weights
        self._modules = dict(model.named_modules(remove_duplicate=False))
        places = {key: _Place(**match.groupdict("")) for key in stored.shapes() if (match := _KEY.match(key))}
        moved = self._move({key: place for key, place in places.items() if self._is_unknown(place)})
        low_rank = dict.fromkeys(place.module for place in places.values() if place.low_rank)
        whole = {m: moved.get(m, m) for m in low_rank if covers(config, m, linear=True)}
        whole = {old: new for old, new in whole.items() if new in self._modules}
        routers = {old: new for old, new in whole.items() if self._is_matrix_alone(new)}
        if moved or routers or self._experts:
            try:
                self.config = self._translated({o: n for o, n in whole.items() if o not in routers}, routers)
            except ConfigError as error:
                raise UnsupportedError(
                    f"{stored.file}: the adapter has names of transformers 4, but {error}"
                ) from error

    def join(self, keys: Keys, wrapped: Mapping[str, PeftTarget]) -> None:
        """Give the file the tensors of the joined parameters, in place of those of their experts."""
        for experts in self._experts:
            target = wrapped.get(experts.parameter)
            if target is not None:
                self._join(experts, keys, target)

    def _is_unknown(self, place: _Place) -> bool:
        return place.module not in self._modules if place.low_rank else place.weight not in self._weights

    def _is_matrix_alone(self, module: str) -> bool:
        """Whether the module is no layer that has an adapter, but holds a matrix, as the routers of version 5 do."""
        weight = self._weights.get(f"{module}.weight")
        return weights_of(self._modules[module]) is None and weight is not None and weight.dim() == 2

    def _move(self, unknown: Mapping[str, _Place]) -> dict[str, str]:
        """Give tensors their new names. Returns old -> new, of modules that are still modules."""
        if not unknown:
            return {}
        found = Conversions(self._model, self._weights, dict.fromkeys(place.weight for place in unknown.values()))
        moved = {_owner(old): _owner(new) for old, new in found.plain.items()}
        for key, place in unknown.items():
            if place.weight in found.plain:
                new, leaf = found.plain[place.weight].rpartition(".")[::2]
                suffix = place.suffix if place.low_rank else leaf
                self._stored.rename(key, f"{PREFIX}{new}{place.wrapper}.{suffix}")
        for parameter, (converter, sources) in found.joined.items():
            modules = {pattern: tuple(map(_owner, keys)) for pattern, keys in sources.items()}
            if any(covers(self._given, module, linear=True) for some in modules.values() for module in some):
                self._experts.append(self._collected(parameter, converter, modules))
        return moved

    def _collected(self, parameter: str, converter: Conversion, modules: Mapping[str, tuple[str, ...]]) -> _Experts:
        kinds = tuple(modules.get(pattern, ()) for pattern in converter.sources)
        first, *others = [module for kind in kinds for module in kind]
        shape, file = tuple(self._weights[parameter].shape), self._stored.file
        if not converter.joins_experts or len(shape) != 3 or kinds.count(()) > 1:
            ways = ", ".join(operation for operation, _ in converter.operations)
            raise UnsupportedError(
                f"{file}: {first!r} is a name of an older transformers, whose models had a module where this one "
                f"has a part of {parameter!r} (made by {ways}). This conversion of an adapter is not known. "
                f"transformers may know it: load the adapter with {type(self._model).__name__}.from_pretrained(...)"
                ".load_adapter(folder), and save it again with model.save_pretrained(new_folder)."
            )
        for kind in kinds:
            if kind and len(kind) != shape[0]:
                raise FormatError(
                    f"{file}: {parameter!r} holds {shape[0]} experts, but the adapter has {len(kind)} of them "
                    f"({kind[0]!r}, ...). Give an adapter of all experts of the layer."
                )
        config = self._given
        r, alpha = config.rank_of(first), config.alpha_of(first)
        for other in others:
            if (config.rank_of(other), config.alpha_of(other)) != (r, alpha):
                raise UnsupportedError(
                    f"{file}: {first!r} has rank {r} and α {alpha:g}, {other!r} rank {config.rank_of(other)} and α "
                    f"{config.alpha_of(other):g}. Both are in {parameter!r} now, which has one rank and one α. Merge "
                    "the adapter with the transformers that it was trained with."
                )
        return _Experts(parameter, shape, kinds, r, config.scaling(r, alpha))

    # The configuration.

    def _translated(self, plain: Mapping[str, str], routers: Mapping[str, str]) -> LoraConfig:
        config = self._given
        joined = {module: experts.parameter for experts in self._experts for module in experts.modules}
        joined |= {old: f"{new}.weight" for old, new in routers.items()}
        changes: dict[str, Any] = {
            "target_modules": self._targets(plain, joined),
            "target_parameters": tuple(dict.fromkeys([*(config.target_parameters or ()), *self._parameters(joined)])),
        }
        for name in ("exclude_modules", "modules_to_save"):
            if isinstance(getattr(config, name), tuple):
                changes[name] = tuple(map(self._renamed, getattr(config, name)))
        if self._experts and config.lora_dropout:
            changes["lora_dropout"] = 0.0
            self.notes.append(
                f"lora_dropout={config.lora_dropout:g} is read as 0, because experts that are one parameter have no "
                "dropout in PEFT. It matters only if the adapter is trained further."
            )
        ranks: dict[str, float] = {new: config.rank_of(old) for old, new in plain.items()}
        alphas = {new: config.alpha_of(old) for old, new in plain.items()}
        for old, new in routers.items():
            ranks[f"{new}.weight"], alphas[f"{new}.weight"] = config.rank_of(old), config.alpha_of(old)
        for experts in self._experts:
            old = experts.modules[0]
            grown = experts.rank / experts.r
            ranks[experts.parameter] = experts.rank
            alphas[experts.parameter] = config.alpha_of(old) * (grown**0.5 if config.use_rslora else grown)
        olds = [*plain, *joined]
        changes["rank_pattern"] = _patterns("rank_pattern", config.r, ranks, config, olds)
        changes["alpha_pattern"] = _patterns("alpha_pattern", config.lora_alpha, alphas, config, olds)
        return config.replace(**changes)

    def _targets(self, plain: Mapping[str, str], joined: Collection[str]) -> tuple[str, ...] | str | None:
        """`target_modules` under the new names, without what is a parameter now."""
        given, new = self._given.target_modules, tuple(plain.values())
        if isinstance(given, str):
            matched = {name for name in self._modules if name and self._given.names("target_modules", name)}
            return given if matched == {*new} else new
        entries: list[str] = []
        for entry in given or ():
            old = [module for module in plain if named(module, entry)]
            matched = {name for name in self._modules if named(name, entry)}
            if old and (not matched or any(self._is_matrix_alone(name) for name in matched)):
                entries += [plain[module] for module in old]
            elif old or not any(named(module, entry) for module in joined):
                entries.append(entry)
        return tuple(dict.fromkeys(entries))

    def _parameters(self, joined: Mapping[str, str]) -> list[str]:
        """Entries of `target_parameters`: suffixes if suffixes named the modules, so that every layer must be there."""
        given = self._given.target_modules
        in_all = not isinstance(given, str) and self._given.layers is None
        return [
            ".".join(new.split(".")[-2:]) if in_all and not self._given.names_fully("target_modules", old) else new
            for old, new in joined.items()
        ]

    def _renamed(self, entry: str) -> str:
        """An entry of a list that may be the full name of a module."""
        if any(named(name, entry) for name in self._modules):
            return entry
        found = Conversions(self._model, self._weights, [f"{entry}.weight"]).plain
        return _owner(found.get(f"{entry}.weight", f"{entry}."))

    # The tensors.

    def _join(self, experts: _Experts, keys: Keys, target: PeftTarget) -> None:
        e, out, columns = experts.shape
        why = f"{experts.parameter!r} (rank {experts.r})"
        taken: dict[str, list[list[Stored]]] = {}
        for leaf, suffix in _FACTORS.items():
            taken[leaf] = [[self._stored.pop(f"{PREFIX}{m}.{suffix}", why) for m in kind] for kind in experts.kinds]
        heights = [{tensor.shape[0] for tensor in kind} for kind in taken["b"]]
        rest = out - sum(next(iter(height)) for height in heights if height)
        starts, start = [], 0
        for height in heights:
            starts.append(start)
            start += next(iter(height)) if height else rest
        for leaf, suffix in _FACTORS.items():
            for kind, modules, height in zip(taken[leaf], experts.kinds, heights, strict=True):
                rows = next(iter(height), 0)
                wanted = (experts.r, columns) if leaf == "a" else (rows, experts.r)
                for tensor, module in zip(kind, modules, strict=True):
                    if tensor.shape != wanted or start != out:
                        raise FormatError(
                            f"{self._stored.file}: '{PREFIX}{module}.{suffix}' has shape {list(tensor.shape)}, which "
                            f"does not fit its part of {experts.parameter!r} {list(experts.shape)} with rank "
                            f"{experts.r}. Load the adapter on the model that it was trained on."
                        )

        def packed(leaf: str, descriptor: int) -> Tensor:
            parts = {
                name: [torch.stack([tensor.read(descriptor) for tensor in kind]) for kind in kinds if kind]
                for name, kinds in taken.items()
            }
            b = torch.zeros((e, out, experts.rank), dtype=parts["b"][0].dtype)
            used = [first for first, kind in zip(starts, experts.kinds, strict=True) if kind]
            for i, (first, part) in enumerate(zip(used, parts["b"], strict=True)):
                b[:, first : first + part.shape[1], i * experts.r : (i + 1) * experts.r] = part
            return target.form.pack({"a": torch.cat(parts["a"], 1), "b": b}, target)[leaf]

        for leaf, shape in (("a", (e * experts.rank, columns)), ("b", (out, experts.rank * e))):
            one = next(kind for kind in taken[leaf] if kind)[0]
            key = keys.leaf(target, leaf)
            self._stored.put(_Packed(one.file, key, one.dtype, shape, 0, 0, make=partial(packed, leaf)))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _patterns(
    field: str, common: float, wanted: Mapping[str, float], config: LoraConfig, old: Iterable[str]
) -> dict[str, float]:
    """A field of patterns that gives each new name its value."""
    given: Mapping[str, float] = getattr(config, field)
    of_old = {pattern for name in old for pattern in config.patterns_of(field, name)}  # type: ignore[arg-type]
    of_new = {pattern for name in wanted for pattern in config.patterns_of(field, name)}  # type: ignore[arg-type]
    kept = {pattern: value for pattern, value in given.items() if pattern in of_new or pattern not in of_old}

    def now(name: str) -> float:
        return next((kept[pattern] for pattern in config.patterns_of(field, name) if pattern in kept), common)  # type: ignore[arg-type]

    other = {name: value for name, value in wanted.items() if now(name) != value}
    found: dict[str, float] = {}
    for leaf in dict.fromkeys(name.rpartition(".")[2] for name in other):
        alike = {name: value for name, value in wanted.items() if name.rpartition(".")[2] == leaf}
        if len({*alike.values()}) == 1:
            found[rf".*\.{re.escape(leaf)}"] = next(iter(alike.values()))  # as PEFT writes it
        else:
            found |= {f"^{re.escape(name)}": value for name, value in other.items() if name in alike}
    return found | kept

"""Selecting targets: from a model and a `LoraConfig` to full parameter names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from funclora._bind.params import named_tensors
from funclora._config.config import LoraConfig
from funclora._config.covers import layer_of
from funclora._config.embeddings import TiedEmbeddings, output_embeddings, tied_targets, token_targets
from funclora._config.layers import SUPPORTED, is_hf_conv1d, is_of_transformers, weights_of
from funclora._config.names import inside, named, suffixes, unnamed
from funclora._config.peft_fields import HEADS
from funclora._config.regex import matches
from funclora._config.target import Target
from funclora.errors import ParamsError, TargetError, near
from funclora.rules import layouts as _layout
from funclora.rules.dense import Delta
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Layout
from funclora.rules.low_rank import LoRA, refuse_low_rank
from funclora.rules.tokens import Tied


class Unmatched(NamedTuple):
    """An entry of a configuration that matches nothing.

    Attributes:
        field: the field that contains it.
        entry: the entry: an item of a list, a key, or the whole value.
        message: what is wrong.
    """

    field: str
    entry: str | int
    message: str


def select(model: nn.Module, config: LoraConfig, *, unmatched: list[Unmatched] | None = None) -> dict[str, Target]:
    """The parameters that the configuration names, in the order of the model.

    Args:
        model: any module; only its structure is read.
        config: what to adapt.
        unmatched: collects the entries that match nothing; if None, the first of them raises an error.

    Returns:
        Full parameter name -> target.

    Raises:
        TargetError: an entry of the configuration matches nothing, or names something that cannot carry a rule.
    """
    return _Selection(model, config, unmatched).targets()


def all_linear(model: nn.Module, config: LoraConfig) -> list[str]:
    """The full names of the modules that "all-linear" stands for in a configuration."""
    return [*_Selection(model, config, [])._target_modules()]


def without(config: LoraConfig, unmatched: Sequence[Unmatched]) -> LoraConfig:
    """The configuration without entries that match nothing."""
    changes: dict[str, Any] = {}
    for field, entry, _ in unmatched:
        value = changes.get(field, getattr(config, field))
        if isinstance(value, Mapping):
            changes[field] = {key: item for key, item in value.items() if key != entry}
        elif isinstance(value, tuple):
            changes[field] = tuple(item for item in value if item != entry) or None
        else:
            changes[field] = "none" if field == "bias" else None
    if "layers_to_transform" in changes and not changes["layers_to_transform"]:
        changes["layers_pattern"] = None
    return config.replace(**changes)


class _Selection:
    def __init__(self, model: nn.Module, config: LoraConfig, unmatched: list[Unmatched] | None) -> None:
        self.config = config
        self.unmatched = unmatched
        self.model = model
        # As in PEFT, a module that the model holds under several names has the first one.
        self.modules = dict(model.named_modules())
        first = {id(module): name for name, module in self.modules.items()}
        self.aliases = {
            name: first[id(module)]
            for name, module in model.named_modules(remove_duplicate=False)
            if first[id(module)] != name
        }
        self.tensors = {name: tensor for name, tensor, _, _ in named_tensors(model)}
        self.parameters = {name for name in self.tensors if self._is_parameter(name)}
        self.tables = TiedEmbeddings.of(model)
        if config.ensure_weight_tying and not self.tables.tied:
            raise TargetError(
                f"ensure_weight_tying: {type(model).__name__} ties no weight to its input embeddings, or its "
                "config.tie_word_embeddings is not set. Leave the field at False."
            )
        self.saved = self._saved_modules()

    def _matches_nothing(self, field: str, entry: str | int, message: str) -> None:
        if self.unmatched is None:
            raise TargetError(message)
        self.unmatched.append(Unmatched(field, entry, message))

    def _is_parameter(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return path in self.modules and leaf in self.modules[path]._parameters

    def targets(self) -> dict[str, Target]:
        config = self.config
        matched = self._target_modules() if config.target_modules else {}
        tables = self.tables
        tied = config.ensure_weight_tying and (tables.input in self.saved or tables.input in matched)
        of_modules, of_parameters = self._low_rank(matched), self._target_parameters()
        for name in of_parameters:
            if name in of_modules:
                raise TargetError(
                    f"target_parameters: {name!r} is also a target of target_modules, through the module "
                    f"{of_modules[name].module!r}. Name it in one of the two."
                )
        found = of_modules | of_parameters
        if not found:
            raise TargetError(
                f"nothing is left to adapt: target_modules={config.target_modules!r} and exclude_modules="
                f"{config.exclude_modules!r} leave no parameter of {type(self.model).__name__}."
                + "".join(f" {each.message}" for each in self.unmatched or ())
            )
        keys = [*matched, *of_parameters, *(tables.tied if tied else ())]
        for where in ("rank_pattern", "alpha_pattern"):
            used = {pattern for key in keys for pattern in config.patterns_of(where, key)}
            for pattern in getattr(config, where):
                if pattern not in used:
                    message = f"{where}: {pattern!r} matches none of the targets.{near(pattern, keys)}"
                    self._matches_nothing(where, pattern, message)
        for name in self.saved:
            for parameter in self._parameters_under(name):
                if parameter in of_parameters:
                    raise TargetError(
                        f"target_parameters: {parameter!r} is in {name!r}, which modules_to_save fully fine-tunes. "
                        "Name it in one of the two."
                    )
                found[parameter] = Target(name, None)
        if tied:
            others = {module: [*self._parameters_under(module)] for module in tables.tied}
            found |= tied_targets(config, tables, found, others)
        for name in self._biases(found, matched):
            found.setdefault(name, Target(name.rpartition(".")[0], None))
        found |= self._lora_biases(of_modules) if config.lora_bias else {}
        found |= token_targets(config, tables, self.modules, found)
        if config.ensure_weight_tying and not any(target.rule is Tied for target in found.values()):
            raise TargetError(
                f"ensure_weight_tying: the adapter has nothing to tie. Name {tables.input!r} in target_modules, "
                "modules_to_save or trainable_token_indices, or leave the field at False."
            )
        found |= self._further_names(found)
        return {name: found[name] for name in self.tensors if name in found}

    def _further_names(self, found: Mapping[str, Target]) -> dict[str, Target]:
        """The further names of the parameters that were found: they have no rules of their own."""
        targets: dict[str, Target] = {}
        for alias, module in self.aliases.items():
            for leaf in self.model.get_submodule(module)._parameters:
                name = f"{module}.{leaf}" if module else leaf
                if (target := found.get(name)) is not None:
                    to = target.tied_to or name
                    targets[f"{alias}.{leaf}"] = Target(alias, None, rule=Tied, tied_to=to)
        return targets

    # Matching as in PEFT, but an entry that matches nothing raises.

    def _target_modules(self) -> dict[str, nn.Module]:
        """The modules that `target_modules` names, without the excluded ones."""
        config = self.config
        if config.all_linear:
            matched = {n: m for n, m in self.modules.items() if self._is_linear(n, m)}
            for head in self._heads():
                matched = {n: m for n, m in matched.items() if m is not head}
            if not matched:
                raise TargetError(f"target_modules='all-linear': {type(self.model).__name__} has no linear layer.")
        else:
            matched = self._matching("target_modules", config.target_modules or ())
            matched = self._in_layers(matched)
        if config.exclude_modules:
            excluded = self._matching("exclude_modules", config.exclude_modules)
            matched = {n: m for n, m in matched.items() if n not in excluded}
            self._check_tie(matched, excluded)
        if config.ensure_weight_tying and self.tables.named(matched):
            of = {*matched, self.tables.input} - {*self.tables.tied}
            matched = {n: m for n, m in self.modules.items() if n in of}
        return {n: m for n, m in matched.items() if not any(inside(n, saved) for saved in self.saved)}

    def _is_linear(self, name: str, module: nn.Module) -> bool:
        """Whether "all-linear" includes the module. One without a plain weight, as in MobileBERT, cannot be adapted."""
        weight = self.tensors.get(f"{name}.weight" if name else "weight")
        return (isinstance(module, nn.Linear) or is_hf_conv1d(module)) and (weight is None or weight.numel() > 0)

    def _check_tie(self, matched: Collection[str], excluded: Collection[str]) -> None:
        if self.config.ensure_weight_tying and self.tables.named(matched) and self.tables.named(excluded):
            raise TargetError(
                "ensure_weight_tying: exclude_modules excludes one of the tied modules, and target_modules "
                f"names another one ({', '.join(map(repr, (self.tables.input, *self.tables.tied)))}). Name all of "
                "them, or exclude all of them."
            )

    def _matching(self, where: str, wanted: Collection[str]) -> dict[str, nn.Module]:
        if isinstance(wanted, str):
            matched = {n: m for n, m in self.modules.items() if matches(wanted, n)}
            if "" in matched and weights_of(self.model) is None:
                del matched[""]  # as in PEFT, an expression like ".*" does not match the model itself
            if not matched:
                hint = near(wanted, suffixes(self.modules))
                message = f"{where}: the regular expression {wanted!r} matches no full name of a module.{hint}"
                self._matches_nothing(where, wanted, message)
            return matched
        for entry in unnamed(wanted, self.modules):
            hint = near(entry, suffixes(self.modules))
            for name, first in self.aliases.items():
                if named(name, entry):
                    hint = f" {name!r} is a further name of {first!r}: give that one."
            message = f"{where}: {entry!r} matches no module.{hint}"
            self._matches_nothing(where, entry, message)
        return {n: m for n, m in self.modules.items() if self.config.names(where, n)}

    def _in_layers(self, matched: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Restrict modules matched by suffix to `layers_to_transform`; full names are exempt, as in PEFT."""
        config = self.config
        if config.layers is None:
            return matched
        index = {name: i for name in matched if (i := layer_of(config, name)) is not None}
        for wanted in config.layers:
            if wanted not in index.values():
                have = ", ".join(map(str, sorted(set(index.values())))) or "none"
                by = f" (layers_pattern={list(config.layers_pattern)})" if config.layers_pattern else ""
                message = f"layers_to_transform: no target is in layer {wanted}. Layers with targets: {have}{by}."
                self._matches_nothing("layers_to_transform", wanted, message)
        full = {n for n in matched if config.names_fully("target_modules", n)}
        return {n: m for n, m in matched.items() if n in full or index.get(n) in config.layers}

    def _heads(self) -> list[nn.Module]:
        """The output layers of a transformers model, which "all-linear" leaves out."""
        if not is_of_transformers(self.model):
            return []
        name = output_embeddings(self.model)
        if not name and self.config.task_type == "SEQ_CLS":
            name = next((name for name in HEADS["SEQ_CLS"] if name in self.modules), "")
        return [self.modules[name]] if name else []

    def _saved_modules(self) -> list[str]:
        """The full names of the modules that `modules_to_save` names, and of the heads that the task type implies."""
        saved: list[str] = []
        implied = HEADS.get(self.config.task_type or "", ())
        entries = list(dict.fromkeys([*(self.config.modules_to_save or ()), *implied]))
        by_name = {n for n in self.modules if any(named(n, entry) for entry in entries)}
        for entry in entries:
            matched = [n for n in self.modules if named(n, entry)]
            if not matched and entry not in implied:
                message = f"modules_to_save: {entry!r} matches no module.{near(entry, suffixes(self.modules))}"
                self._matches_nothing("modules_to_save", entry, message)
            loose = [n for n in self.modules if n.endswith(entry) and n not in by_name]
            if loose:
                found = repr(matched[0]) if matched else "no module"
                raise TargetError(
                    f"modules_to_save: {entry!r} names {found}, but PEFT would also save {loose[0]!r}, whose name has "
                    "the same end. Give the full name of the module."
                )
            saved += [n for n in matched if n not in saved]
        if self.config.ensure_weight_tying and self.tables.named(saved):
            saved = [self.tables.input, *(n for n in saved if n not in (self.tables.input, *self.tables.tied))]
        for name in saved:
            if not any(True for _ in self._parameters_under(name)):
                raise TargetError(f"modules_to_save: {name!r} has no parameters.")
            buffers = [n for n in self.tensors if inside(n, name) and n not in self.parameters]
            if any(n in self.model.state_dict() for n in buffers):
                raise TargetError(
                    f"modules_to_save: {name!r} has the buffer {buffers[0]!r}, which training by gradients cannot "
                    "update. Name its submodules without buffers instead."
                )
        return saved

    def _parameters_under(self, module: str) -> Iterable[str]:
        return (name for name in self.tensors if name in self.parameters and inside(name, module))

    # From modules to parameters.

    def _low_rank(self, matched: dict[str, nn.Module]) -> dict[str, Target]:
        found: dict[str, Target] = {}
        for name, module in matched.items():
            weights = weights_of(module)
            if weights is None:
                path = f"{name}." if name else ""
                names = [path + leaf for leaf, weight in module.named_parameters(recurse=False) if weight.dim() > 1]
                raise TargetError(
                    f"target_modules matches {name!r}, a {type(module).__name__}, which is not supported. Supported "
                    f"modules: {SUPPORTED}. Exclude it"
                    + (f", or name its parameter: target_parameters={names}." if names else ".")
                )
            for weight, layout in weights.items():
                found[f"{name}.{weight}" if name else weight] = self._target(name, name, layout)
        for name, target in found.items():
            if name not in self.tensors:
                raise TargetError(
                    f"{name!r} is not a parameter but is computed from others in each call (weight_norm, spectral_norm,"
                    " orthogonal, prune). Remove that first (torch.nn.utils.parametrize.remove_parametrizations, "
                    f"remove_weight_norm, prune.remove), or exclude it: exclude_modules=[{target.module!r}]."
                )
            self._check_low_rank(name)
        return found

    def _target(self, key: str, module: str, layout: Layout) -> Target:
        r = self.config.rank_of(key)
        rule = DoRA if self.config.use_dora else LoRA
        return Target(module, layout, r, self.config.scaling(r, self.config.alpha_of(key)), rule)

    def _target_parameters(self) -> dict[str, Target]:
        for entry in unnamed(self.config.target_parameters or (), self.parameters):
            hint = near(entry, suffixes(self.parameters))
            message = f"target_parameters: {entry!r} matches no parameter.{hint}"
            self._matches_nothing("target_parameters", entry, message)
        names = [n for n in self.tensors if n in self.parameters and self.config.names("target_parameters", n)]
        found: dict[str, Target] = {}
        for name in names:
            self._check_low_rank(name)
            path, _, leaf = name.rpartition(".")
            owner = self.modules[path]
            layout = (weights_of(owner) or {}).get(leaf)
            if layout is None:
                siblings = [p for p in owner._parameters if f"{path}.{p}".lstrip(".") in names]
                layout = _layout.Parameter(
                    bool(getattr(owner, "is_transposed", False)), siblings.index(leaf), len(siblings)
                )
            found[name] = self._target(name, path, layout)
        return found

    def _check_low_rank(self, name: str) -> None:
        try:
            refuse_low_rank(name, self.tensors[name])
        except ParamsError as error:
            raise TargetError(f"cannot adapt {error}") from error

    def _biases(self, found: dict[str, Target], matched: dict[str, nn.Module]) -> list[str]:
        """The parameters that `bias` trains. As in PEFT, a bias has the name "bias"; "in_proj_bias" is not one."""
        if self.config.bias == "none":
            return []
        if self.config.bias == "all":
            owners = set(self.modules)
        else:
            owners = {*matched, *(name.rpartition(".")[0] for name in found)}
        split = ((name, *name.rpartition(".")) for name in self.parameters)
        biases = [name for name, owner, _, leaf in split if leaf == "bias" and owner in owners]
        if not biases:
            message = f"bias={self.config.bias!r}: there is no bias to train. Use bias='none'."
            self._matches_nothing("bias", self.config.bias, message)
        return biases

    def _lora_biases(self, low_rank: dict[str, Target]) -> dict[str, Target]:
        """The biases of the targets of `lora_bias`: the bias of B is an update of them."""
        found = {}
        for name, target in low_rank.items():
            owner = name.rpartition(".")[0]
            bias = f"{owner}.bias" if owner else "bias"
            if not isinstance(target.layout, (_layout.Linear, _layout.Conv1D, _layout.Conv, _layout.ConvTranspose)):
                kind = type(self.modules[target.module]).__name__
                raise TargetError(f"lora_bias: {name!r} is a weight of {kind}, whose update has no bias. Exclude it.")
            if bias not in self.parameters:
                raise TargetError(
                    f"lora_bias: {owner!r} has no bias to which the bias of B could be merged. "
                    "Exclude it, or give the layer a bias of zeros."
                )
            found[bias] = Target(owner, None, target.r, target.scaling, Delta)
        return found

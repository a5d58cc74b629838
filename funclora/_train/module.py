"""A model under an adapter as an `nn.Module` that trainers can train: `as_module`.

The module owns one bound copy of the model. Its lazy weights refer to the module's own parameters, so they use the
values that an optimizer writes; a trainer sets training flags, checkpointing and hooks on the copy, never on the model.
Whenever the copy may differ from what `bind` would return now, it is bound again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, cast

import optree
import torch
from torch import Tensor, nn

from funclora._api.arguments import check_model
from funclora._bind.apply import bind
from funclora._bind.checks import check_adapters, unwritten, versions
from funclora._bind.clone import clone_module
from funclora._bind.params import named_tensors
from funclora._config.checks import check_config
from funclora._config.config import LoraConfig
from funclora._torch.memory import place_of
from funclora._torch.processes import alone_among, fsdp_divides
from funclora._torch.pytree import map_frozen
from funclora._tracking.routed import Routed
from funclora._train.module_hf import overrides, own_configs
from funclora.errors import ConfigError, FuncloraWarning, ParamsError, UnsupportedError, near
from funclora.io.peft.consistency import check_against_config
from funclora.io.peft.folder import save_peft
from funclora.io.peft.in_model import in_model, refuse_in_model
from funclora.rules.base import Adapters, Params, Rule

# The names of the leaves of these rules among the parameters are PEFT's. A value that replaces a parameter has the name
# of the parameter. The leaves of other rules keep their own names.
_LEAVES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("a", "b"): ("lora_A", "lora_B"),
    ("a", "b", "magnitude"): ("lora_A", "lora_B", "lora_magnitude_vector"),
    ("value",): ("",),
}


def as_module(model: nn.Module, params: Params, adapters: Adapters, config: LoraConfig | None = None) -> AdapterModule:
    """A module that computes the model under an adapter; its only parameters are the adapter's leaves.

    For code that trains modules: PyTorch loops, transformers' `Trainer`, TRL's `SFTTrainer`, accelerate,
    `DistributedDataParallel`, Lightning. Its forward is `apply`. All other attributes (`config`, `generate`,
    `get_input_embeddings`, `gradient_checkpointing_enable`) come from its own bound copy of the model: the model,
    `params` and `adapters` are never changed, and later changes of them have no effect on the module.

    Args:
        model: the module that defines the computation.
        params: full name -> tensor for every parameter and persistent buffer, as from `base_params`. The tensors are
            shared; moving the module to another device or dtype makes copies.
        adapters: full name of a parameter -> rule: the start of the training. The leaves are copied.
        config: the configuration that the adapters were made with. `save_pretrained` needs it.

    Returns:
        The module; see `AdapterModule`.

    Raises:
        ParamsError: names of `params` or `adapters` do not match the model, or a rule does not match its weight.
        ConfigError: there is nothing to train, or adapters and configuration do not agree.
        UnsupportedError: the model cannot be bound, a configuration is given and PEFT cannot represent the adapters,
            or the adapters were routed.

    Examples:
        >>> import funclora as fl
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> config = fl.LoraConfig(r=2, target_modules=["2"])
        >>> module = fl.as_module(model, fl.base_params(model), fl.init(model, config), config)
        >>> [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
        [('adapter.2.weight.lora_A', (2, 3)), ('adapter.2.weight.lora_B', (2, 2))]
        >>> optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        >>> module(torch.ones(5, 4)).sum().backward()
        >>> optimizer.step()
        >>> trained = module.adapters  # {"2.weight": LoRA(...)}, as apply, merge and save_peft take it
    """
    check_model(model)
    check_adapters(params, adapters)
    if any(isinstance(rule, Routed) for rule in adapters.values()):
        raise UnsupportedError(
            "as_module takes one adapter, got routed adapters. Pass one member of the stack, stack[i]; population_step "
            "trains all members."
        )
    if isinstance(model, AdapterModule):
        raise UnsupportedError("as_module: the model was itself made by as_module. Pass the original model.")
    if not adapters:
        raise ConfigError("as_module: there is nothing to train: adapters has no rule.")
    if config is not None:
        check_config(config)
        saved, config = in_model(model, adapters, config)
        # An adapter that cannot be saved is refused before training.
        refuse_in_model(model, check_against_config(saved, config), ())
    kind: Any = type(model)
    return _class_for(kind)(model, params, adapters, config)


class _Live(NamedTuple):
    """A bound copy, and the values it was bound to."""

    bound: nn.Module
    leaves: list[Tensor] | None  # None: bind again before use
    buffers: list[tuple[dict[str, Tensor | None], str, Tensor]]  # their places and original values
    versions: list[int | None]


class AdapterModule(nn.Module):
    """The result of `as_module`: for each class of models a subclass with this class's signature of `forward`.

    Its parameters are under `adapter`, by the full name of the parameter that they rewrite:
    `adapter.layers.0.q_proj.weight.lora_A`; the parameter of a `Full` rule has only the full name. `parameters()`,
    `state_dict()` and optimizers see no other tensors. All other attributes and methods come from its bound copy of
    the model, so every computation runs under the adapter.

    As in `apply`, every call starts from the buffers in `params`: running statistics of BatchNorm do not change.

    `copy.deepcopy` copies the parameters and shares the frozen weights. A pickle contains both.

    Examples:
        >>> import funclora as fl
        >>> model = nn.Linear(2, 1)
        >>> params = fl.base_params(model)
        >>> module = fl.as_module(model, params, {"weight": fl.LoRA(torch.ones(1, 2), torch.ones(1, 1))})
        >>> x = torch.ones(3, 2)
        >>> torch.equal(module(x), fl.apply(model, params, module.adapters, x))
        True
        >>> module.out_features, module.weight.shape, [name for name, _ in module.named_parameters()]
        (1, torch.Size([1, 2]), ['adapter.weight.lora_A', 'adapter.weight.lora_B'])
    """

    # Trainer reads it when a checkpoint has missing keys.
    _keys_to_ignore_on_save: ClassVar[None] = None
    _kind: ClassVar[type[nn.Module]] = nn.Module

    adapter: nn.Module

    def __init__(self, model: nn.Module, params: Params, adapters: Adapters, config: LoraConfig | None) -> None:
        super().__init__()
        self.adapter = nn.Module()
        blank = torch.empty(0, device="meta")
        self._rules: dict[str, Rule] = {  # without their tensors
            name: replace(cast(Any, rule), **dict.fromkeys(rule.leaf_names, blank)) for name, rule in adapters.items()
        }
        self._slots: list[tuple[str, str, nn.Module, str]] = []  # of leaves: rule, name in it, owner, name in it
        for name, rule in sorted(adapters.items()):  # optimizers identify parameters by their order
            for leaf, here in zip(rule.leaf_names, _LEAVES.get(rule.leaf_names, rule.leaf_names), strict=True):
                path = ".".join(filter(None, (name, here)))
                self._slots.append((name, leaf, *_register(self.adapter, path, getattr(rule, leaf))))
        self._adapter_config = config
        self._names = list(params)
        self._params = {name: tensor.detach() for name, tensor in params.items()}
        bound = bind(model, params, adapters)
        own_configs(bound)
        # Non-persistent buffers are also frozen weights.
        self._params |= {
            name: tensor for name, tensor, _, transient in named_tensors(bound) if transient and name not in params
        }
        self.training = model.training
        self._live = _Live(bound, None, [], [])
        self._current()

    @property
    def adapters(self) -> dict[str, Rule]:
        """The current adapters. Their leaves are the module's parameters: later steps change them."""
        leaves: dict[str, dict[str, Tensor]] = {name: {} for name in self._rules}
        for name, leaf, owner, key in self._slots:
            leaves[name][leaf] = getattr(owner, key)
        return {name: replace(cast(Any, rule), **leaves[name]) for name, rule in self._rules.items()}

    @property
    def params(self) -> dict[str, Tensor]:
        """The frozen weights: the given ones, or their copies if the module was moved."""
        return {name: self._params[name] for name in self._names}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`apply(model, params, adapters, *args, **kwargs)`.

        Raises:
            UnsupportedError: FSDP divides the parameters of this module.

        Warns:
            FuncloraWarning: several processes train without a DistributedDataParallel around this module.
        """
        if torch.compiler.is_compiling():
            # The tracer cannot follow weights that are already lazy.
            return torch.compiler.disable(_uncompiled)(self, *args, **kwargs)
        if fsdp_divides(self):
            raise UnsupportedError(
                "FSDP was applied to the result of as_module, whose only parameters are the adapter's: the base would "
                "stay whole in every process. Apply fully_shard to the model, take base_params of it, and give the "
                "result of as_module to DistributedDataParallel."
            )
        if torch.is_grad_enabled() and (processes := alone_among()) > 1:
            warnings.warn(
                f"{processes} processes train the result of as_module outside of DistributedDataParallel. Unless your "
                "code averages the gradients, each trains an adapter of its own. Wrap the module: "
                "DistributedDataParallel(module).",
                FuncloraWarning,
                stacklevel=3,
            )
        with unwritten(self._params, self.adapters):
            return self._current()(*args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
    ) -> None:
        """Write the adapter as a PEFT folder, by `save_peft`.

        `as_module(model, params, *load_peft(save_directory, model))` loads it again.

        Args:
            save_directory: the folder; created if it does not exist.
            is_main_process: nothing is written if False.
            state_dict: a state dict of this module, which is written instead of its parameters.
            save_function: not used; code for accelerate passes one.
            safe_serialization: must be True; nothing is ever pickled.
            push_to_hub: must be False; nothing is ever uploaded.

        Raises:
            ConfigError: the module was made without a configuration, or the adapters do not agree with it.
            ParamsError: the state dict is not one of this module.
            UnsupportedError: PEFT cannot represent the adapters, or an option has a value that is not supported.
            NonFiniteError: an adapter contains NaN or infinity.
            OSError: the folder cannot be written.
        """
        if push_to_hub:
            self.push_to_hub()
        if not safe_serialization:
            raise UnsupportedError("save_pretrained: safe_serialization=False would write a pickle. Leave it at True.")
        config = self._adapter_config
        if config is None:
            raise ConfigError(
                "save_pretrained needs the configuration of the adapters, which as_module was not given. Pass it: "
                "as_module(model, params, adapters, config)."
            )
        if not is_main_process:
            return
        adapters: Any = self.adapters
        if state_dict is not None:
            names = [name for name, _ in self.named_parameters()]
            missing = [name for name in names if name not in state_dict]
            if missing:
                raise ParamsError(f"save_pretrained: state_dict lacks {missing[0]!r}.{near(missing[0], state_dict)}")
            places = {id(parameter): name for name, parameter in self.named_parameters()}
            adapters = optree.tree_map(lambda leaf: state_dict[places[id(leaf)]], adapters)
        base = getattr(self._live.bound, "name_or_path", None)
        if isinstance(base, str) and base and config.base_model_name_or_path is None:
            config = config.replace(base_model_name_or_path=base)
        save_peft(save_directory, adapters, config)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Always raises: nothing is ever uploaded."""
        raise UnsupportedError(
            "push_to_hub: uploading is not supported. Write a folder with save_pretrained(folder) and upload it: "
            "huggingface_hub.upload_folder(repo_id=..., folder_path=folder)."
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in `nn.Module`, but a state dict without any key of this adapter is an error even if not `strict`."""
        own = self.state_dict()
        if not any(name in own for name in state_dict):
            name = next(iter(own))
            raise ParamsError(
                f"load_state_dict: the state dict has {len(state_dict)} entries, none of which belongs to this "
                f"adapter. Its first key is {name!r}.{near(name, state_dict)} For a PEFT folder use load_peft."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_live" not in self.__dict__ or (name.startswith("__") and name.endswith("__")):
                raise
        return getattr(self._current(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        live = self.__dict__.get("_live")
        if live is not None and not hasattr(type(self), name):
            if name == "training":  # not in train(): Lightning sets the attribute
                live.bound.train(value)
            elif name in vars(live.bound) and name not in vars(self):
                setattr(live.bound, name, value)
                return
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"as_module({self._get_name()}, {len(self.adapters)} rules, {sum(p.numel() for p in self.parameters())})"

    def _get_name(self) -> str:
        # Trainer calls it to find out which loss shifts the labels.
        return self._kind.__name__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        places = {name: place_of(tensor) or id(tensor) for name, tensor in self._params.items()}  # tied ones stay tied
        tensors = {place: self._params[name] for name, place in places.items()}
        with torch.no_grad():
            moved = {place: fn(tensor) for place, tensor in tensors.items()}
            self._rules = map_frozen(fn, self._rules)
        self._params = {name: moved[place] for name, place in places.items()}
        self._live = self._live._replace(leaves=None)
        return self

    def _replicate_for_data_parallel(self) -> AdapterModule:
        raise UnsupportedError(
            "nn.DataParallel cannot replicate the result of as_module: its frozen weights are on one device. Use "
            "DistributedDataParallel, one process for each device (torchrun, accelerate launch)."
        )

    def _current(self) -> nn.Module:
        """The bound copy: the previous one if no change can have made it outdated, otherwise a new one."""
        live = self._live
        leaves = [getattr(owner, key) for _, _, owner, key in self._slots]
        if (
            live.leaves is not None
            and all(now is then for now, then in zip(leaves, live.leaves, strict=True))
            and all(owner.get(name) is buffer for owner, name, buffer in live.buffers)
            and versions([buffer for _, _, buffer in live.buffers]) == live.versions
        ):
            return live.bound
        adapters = self.adapters
        # A copy made in inference mode could not be trained later.
        outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
        with outside:
            bound = bind(live.bound, self._params, adapters)
        owners = [module._buffers for module in bound.modules()]
        buffers = [(owner, name, buffer) for owner in owners for name, buffer in owner.items() if buffer is not None]
        # bind may have computed with the values of frozen tensors (DoRA's norm), and it does so in a cast.
        sees = all(leaf.requires_grad for leaf in leaves) and not any(
            rule.bind_dense and rule.dense(self._params[name]).dtype != self._params[name].dtype
            for name, rule in adapters.items()
        )
        self._live = _Live(bound, leaves if sees else None, buffers, versions([buffer for _, _, buffer in buffers]))
        return bound

    # --- copies and pickles ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        def tensor(name: str, original: Tensor, owner: nn.Module, is_buffer: bool) -> Tensor:
            return self._params[name]

        plain = clone_module(self._live.bound, tensor)  # no lazy weight in it
        return self.__dict__ | {"_live": _Live(plain, None, [], [])}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self._kind,), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterModule:
        new = memo[id(self)] = _blank(self._kind)
        frozen = [getattr(rule, name) for rule in self._rules.values() for name in rule.frozen_names]
        memo.update({id(tensor): tensor for tensor in (*self._params.values(), *frozen)})  # they are never written to
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return new


def _uncompiled(module: AdapterModule, *args: Any, **kwargs: Any) -> Any:
    warnings.warn(
        "torch.compile has no effect on the result of as_module: it is not compiled. Compile apply or a train_step.",
        FuncloraWarning,
        stacklevel=2,
    )
    return AdapterModule.forward(module, *args, **kwargs)


def _register(root: nn.Module, path: str, value: Tensor) -> tuple[nn.Module, str]:
    """Register a copy of the value as a parameter with the dotted name. Returns its owner and its last name.

    `add_module` is not used, because it refuses names that the modules of a model may have.
    """
    *parents, last = path.split(".")
    owner = root
    for name in parents:
        owner = cast(nn.Module, owner._modules.setdefault(name, nn.Module()))
    owner._parameters[last] = nn.Parameter(value.detach().clone())
    return owner, last


@functools.cache
def _class_for(kind: type[nn.Module]) -> type[AdapterModule]:
    """The subclass for a class of models, with its signature of forward, which trainers read from the class."""

    def forward(self: AdapterModule, *args: Any, **kwargs: Any) -> Any:
        return AdapterModule.forward(self, *args, **kwargs)

    # Without functools.wraps: accelerate calls the function that a forward wraps.
    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    forward.__doc__ = kind.forward.__doc__
    members = {"forward": forward, "_kind": kind, "__module__": __name__, "__doc__": AdapterModule.__doc__}
    return type(f"Adapted{kind.__name__}", (AdapterModule,), members | overrides(kind))


def _blank(kind: type[nn.Module]) -> AdapterModule:
    """A module without state, for `copy` and `pickle`."""
    hashable: Any = kind
    made = _class_for(hashable)
    return made.__new__(made)

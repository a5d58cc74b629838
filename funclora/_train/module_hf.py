"""Attributes and methods of models for transformers and TRL that would be wrong if they came from the bound copy.

Nothing here imports transformers: each function is for models whose class has a method with its name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from funclora._bind.clone import clone_module
from funclora._bind.params import named_tensors
from funclora._lazy.weight import LazyWeight
from funclora.errors import UnsupportedError
from funclora.rules.dense import Full

_GIVEN = "The adapter is the argument of as_module"
_FIRST = "Do it with the model, and then call as_module"
# Methods that put other tensors, or adapters of another library, into the model.
_REFUSED = {
    "from_pretrained": "It would load a model. For a PEFT folder: as_module(model, params, *load_peft(folder, model))",
    "load_adapter": f"{_GIVEN}. For a PEFT folder: as_module(model, params, *load_peft(folder, model))",
    "add_adapter": _GIVEN,
    "set_adapter": _GIVEN,
    "enable_adapters": _GIVEN,
    "disable_adapters": "Call the original model, which is unchanged",
    "delete_adapter": "Call the original model, which is unchanged",
    "resize_token_embeddings": _FIRST,
    "set_input_embeddings": _FIRST,
    "set_output_embeddings": _FIRST,
    "dequantize": _FIRST,
}


def own_configs(bound: nn.Module) -> None:
    """Give a bound model its own copies of the configurations, because trainers write to them.

    These are the attributes `config` and `generation_config` of its modules, and all references to them.
    """
    modules = list(bound.modules())
    found = [
        vars(module)[name] for module in modules for name in ("config", "generation_config") if name in vars(module)
    ]
    wanted = {id(value) for value in found if value is not None and not isinstance(value, nn.Module)}
    memo: dict[int, Any] = {}  # shared parts of configurations remain shared
    for module in modules:
        for name, value in vars(module).items():
            if id(value) in wanted:
                module.__dict__[name] = copy.deepcopy(value, memo)


def overrides(kind: type[nn.Module]) -> dict[str, Any]:
    """The attributes that a subclass of `AdapterModule` for models of a class needs."""
    own: dict[str, Any] = {
        "get_output_embeddings": get_output_embeddings,
        "num_parameters": num_parameters,
        "tie_weights": tie_weights,
        "_hf_peft_config_loaded": True,  # a quantised model may be trained: it has an adapter
    }
    own |= {name: _refusing(name, advice) for name, advice in _REFUSED.items()}
    return {name: member for name, member in own.items() if hasattr(kind, name)}


def get_output_embeddings(self: Any) -> nn.Module | None:
    """The model's head. If the adapter rewrites it, one with the dense weight: TRL computes with `weight` directly."""
    head: nn.Module | None = self._current().get_output_embeddings()
    if head is None or not any(isinstance(tensor, LazyWeight) for _, tensor, _, _ in named_tensors(head)):
        return head
    return clone_module(
        head, lambda name, tensor, owner, is_buffer: tensor.dense() if isinstance(tensor, LazyWeight) else tensor
    )


def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """The number of parameters of the model and its adapter, or of the adapter only."""
    added = 0
    for parameter in self.parameters():
        added += parameter.numel() if parameter.requires_grad or not only_trainable else 0
    if only_trainable:
        return added
    replaced = sum(rule.value.numel() for rule in self.adapters.values() if isinstance(rule, Full))
    total: int = self._current().num_parameters(exclude_embeddings=exclude_embeddings) + added - replaced
    return total


def tie_weights(self: Any, *args: Any, **kwargs: Any) -> None:
    """Does nothing: frozen weights remain tied, and a rewritten weight is rewritten without the tied one."""


def _refusing(name: str, advice: str) -> Callable[..., None]:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(f"{name} is not supported on the result of as_module. {advice}.")

    refused.__name__ = name
    return refused

"""The embeddings that PEFT saves beside an adapter, when the vocabulary has grown before the training.

PEFT cannot know whether they are the base's, and puts those of the file into the model that it loads an adapter for.
Here they are values of the adapter where the model has others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from funclora._config.config import LoraConfig
from funclora._config.embeddings import input_embeddings, output_embeddings
from funclora.io.peft.keys import PREFIX
from funclora.io.peft.tensors import StoredTensors


def of_embeddings(model: nn.Module) -> list[str]:
    """The full names of the parameters of a model's input embeddings and of its output layer."""
    owners = [model.get_submodule(name) for name in (input_embeddings(model), output_embeddings(model)) if name]
    return [
        f"{name}.{leaf}"
        for name, module in model.named_modules(remove_duplicate=False)
        if name and any(module is owner for owner in owners)
        for leaf in module._parameters
        if module._parameters[leaf] is not None
    ]


def with_stored_embeddings(
    model: nn.Module, weights: Mapping[str, Tensor], stored: StoredTensors, config: LoraConfig
) -> tuple[LoraConfig, list[str]]:
    """The configuration in which the embeddings of a file are fully fine-tuned, if the model has others.

    Args:
        model: the model.
        weights: full name -> its weights. Those on the meta device count as others.
        stored: the tensors of the adapter.
        config: its configuration.

    Returns:
        The configuration, and what to tell the user.
    """
    shapes = stored.shapes()
    other: list[str] = []
    embeddings = of_embeddings(model)
    if config.ensure_weight_tying:
        modules = {name.rpartition(".")[0] for name in embeddings}
        if any(config.names("modules_to_save", module) for module in modules):
            return config, []  # the file holds the same new values under each name
    for name in embeddings:
        module, key, weight = name.rpartition(".")[0], f"{PREFIX}{name}", weights[name]
        if f"{PREFIX}{module}.weight" not in shapes:
            continue  # a bias that was trained
        if shapes.get(key) != tuple(weight.shape) or module in other or config.names("modules_to_save", module):
            continue
        if weight.is_meta or not torch.equal(stored.peek(key).to(weight.device, weight.dtype), weight):
            other.append(module)
    if not other:
        return config, []
    names = " and ".join(map(repr, other))
    return config.replace(modules_to_save=(*(config.modules_to_save or ()), *other)), [
        f"the file contains other values of {names} than the model has. They are read as fully fine-tuned, as in PEFT."
    ]

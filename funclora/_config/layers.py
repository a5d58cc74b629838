"""Which modules can carry a low-rank update, and where their weights are."""

from __future__ import annotations

from torch import nn

from funclora.rules import layouts as _layout
from funclora.rules.layouts import Layout

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SUPPORTED = (
    "nn.Linear, nn.Embedding, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, nn.MultiheadAttention, "
    "nn.RNN/LSTM/GRU, transformers' Conv1D"
)


def weights_of(module: nn.Module) -> dict[str, Layout] | None:
    """The weights of a module that can carry a low-rank update, name -> layout; None for unsupported modules."""
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights: dict[str, Layout] = {
            name: _layout.Attention() for name in names if module._parameters.get(name) is not None
        }
        return weights | {"out_proj.weight": _layout.Attention()}
    if isinstance(module, nn.RNNBase):
        return {name: _layout.Recurrent() for name in module._parameters if name.startswith("weight")}
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return {"weight": _layout.Attention()}  # the output projection of nn.MultiheadAttention
    if isinstance(module, nn.Linear):
        return {"weight": _layout.Linear()}
    if isinstance(module, nn.Embedding):
        return {"weight": _layout.Embedding(max_norm=module.max_norm is not None)}
    if isinstance(module, _CONVS):
        dilated = any(d != 1 for d in module.dilation)
        return {"weight": _layout.Conv(module.groups, dilated, module.padding_mode)}
    if isinstance(module, _CONV_TRANSPOSES):
        return {"weight": _layout.ConvTranspose(module.groups)}
    if is_hf_conv1d(module):
        return {"weight": _layout.Conv1D()}
    return None


def is_hf_conv1d(module: nn.Module) -> bool:
    """True for transformers' `Conv1D`."""
    return is_of(module, "transformers.pytorch_utils", "Conv1D")


def is_of_transformers(model: nn.Module) -> bool:
    """True for a model of transformers, not for its parts."""
    return is_of(model, "transformers.modeling_utils", "PreTrainedModel")


def is_of(module: nn.Module, where: str, name: str) -> bool:
    """Whether a module is of a class with this name, which is not imported: outlines have the name alone."""
    return any(cls.__name__ == name and cls.__module__ == where for cls in type(module).__mro__)

"""A model's weights as a value."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funclora._api.arguments import check_model
from funclora._quant.quantize import of_bitsandbytes, refuse_repacked
from funclora.distributed._live import Live, managed, manager_of, of_fsdp
from funclora.errors import ParamsError


def base_params(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers as a value: detached, not copied.

    Tied parameters appear under each of their names, as in `state_dict`. Weights that bitsandbytes packed (in a
    transformers model loaded with `load_in_4bit` or `load_in_8bit`) appear as quantised weights, as from `quantize`.
    Weights that `torch.distributed.fsdp.fully_shard` divided are read from the model when they are used: bound models
    run its hooks, which gather the weights of one layer at a time.

    Args:
        model: any module.

    Returns:
        Full name -> tensor, sharing storage with the model.

    Raises:
        ParamsError: a parameter of a lazy module has not been initialised yet.
        UnsupportedError: bitsandbytes has repacked a weight, with a loss of precision, when the model itself was run,
            or a part of the model is a `FullyShardedDataParallel`.

    Examples:
        >>> sorted(base_params(nn.Linear(2, 3)))
        ['bias', 'weight']
    """
    check_model(model)
    params: dict[str, Tensor] = {}
    managers = managed(model)
    for name, tensor, owner, transient in named_tensors(model):
        leaf, manager = name.rpartition(".")[2], manager_of(name, managers)
        if manager is not None and leaf in owner._parameters:
            params[name] = of_fsdp(tensor, Live(owner, leaf, manager))
            continue
        if is_lazy(tensor):
            raise ParamsError(f"{name!r} is not initialised yet. Run the model once before asking for its params.")
        refuse_repacked(tensor)
        if not transient:
            params[name] = tensor.detach()
    return params


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module, bool]]:
    """`(name, tensor, owner, is a buffer that is not saved)` for each registered name, tied ones included."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, of_bitsandbytes(dot + name, parameter, module, model), module, False
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield dot + name, buffer, module, name in module._non_persistent_buffers_set

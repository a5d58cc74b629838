"""Who else acts on a module's parameters: FSDP divides them, DistributedDataParallel averages their gradients."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def fsdp_divides(module: nn.Module) -> bool:
    """Whether FSDP, of either version, divides the parameters of a module, by itself or in a module around it."""
    # Both versions mark all modules of a wrapped tree, for dynamo; the wrapper itself is not to be seen from below.
    return "_is_fsdp_managed_module" in vars(module)


def alone_among() -> int:
    """How many processes run this code, if no DistributedDataParallel around it averages their gradients; otherwise 1.

    Examples:
        >>> alone_among()
        1
    """
    if not dist.is_available() or not dist.is_initialized():
        return 1
    # It has no public name, and the parameters do not show who has hooks on them.
    return 1 if DistributedDataParallel._active_ddp_module is not None else dist.get_world_size()

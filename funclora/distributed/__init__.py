"""Several processes, on PyTorch's own engine: `torch.distributed`, FSDP2 and torchrun.

Adapters are the same values in every process; only the batch, or the base model, is divided. `mean` averages losses and
gradients over the processes, `shard` divides the base weights among them, `load_sharded` reads a base in pieces. A
model that `fully_shard` has divided needs neither: `funclora.base_params` takes it as it is.
"""

from funclora._api.names import attach as _attach

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "funclora.distributed._mean": ("Mean", "mean"),
        "funclora.distributed._shards": ("shard",),
        "funclora.io.hf.sharded": ("load_sharded",),
    },
)

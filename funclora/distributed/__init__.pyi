from funclora.distributed._mean import Mean, mean
from funclora.distributed._shards import shard

__all__ = ["Mean", "mean", "shard"]

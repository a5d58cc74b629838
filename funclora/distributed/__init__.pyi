from funclora.distributed._mean import Mean as Mean
from funclora.distributed._mean import mean as mean
from funclora.distributed._shards import shard as shard

__all__ = ["Mean", "mean", "shard"]

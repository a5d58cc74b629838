from funclora.distributed._mean import Mean, mean
from funclora.distributed._shards import shard
from funclora.io.hf.sharded import load_sharded

__all__ = ["Mean", "load_sharded", "mean", "shard"]

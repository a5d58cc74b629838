"""How much memory a computation takes: the peak size of its tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from funclora._torch.functions import is_sharded

# On a CPU, larger passes are not faster.
ON_CPU = 256 << 20
# The usable share of a device's free memory: the allocator rounds up, and kernels need memory too.
FREE_SHARE = 0.7


def nbytes(tree: Any) -> int:
    """Bytes of memory that the tensors of a tree hold, shared memory counted once.

    Examples:
        >>> x = torch.zeros(4, 2)
        >>> nbytes([x, x[0]])
        32
    """
    storages = (x.untyped_storage() for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def place_of(tensor: Tensor) -> tuple[object, ...] | None:
    """A key of a tensor's memory, equal for tied tensors; None if it has no memory, or the memory is unknown.

    The key of a tensor that is divided over a mesh is known in every process: an empty part has a place too.
    """
    if type(tensor) is not Tensor and is_sharded(tensor):
        divided: Any = tensor
        part = divided.to_local()
        return part.untyped_storage()._cdata, part.storage_offset(), part.dtype, tensor.shape, tensor.stride()
    if type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.numel() or tensor.is_meta:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def budget(device: torch.device) -> int:
    """The default number of bytes that one pass may take on a device."""
    if device.type != "cuda":
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(FREE_SHARE * (free + cached))


def free_on_host() -> int | None:
    """Bytes of memory that this process could still get, within the limit of its control group; None if unknown."""
    try:
        info = Path("/proc/meminfo").read_text(encoding="ascii")
        free = 1024 * int(info.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError):
        return None
    groups = ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    left = [_left_in_group(limit, used) for limit, used in groups]
    return max(0, min([free, *(each for each in left if each is not None)]))


def _left_in_group(limit: str, used: str) -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / limit).read_text()) - int((folder / used).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in said for words in ("not enough memory", "can't allocate memory", "out of memory")
    )


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block, and records the largest total.

    The resident set of the process is not suitable: it keeps freed memory, and contains other threads' memory. The
    workspace inside a kernel is not counted.

    Attributes:
        live: bytes of the tensors that still exist.
        peak: the largest value of `live` so far.

    Examples:
        >>> with Peak() as memory:
        ...     for _ in range(3):
        ...         x = torch.zeros(1000) + 1
        >>> memory.peak, memory.live
        (12000, 4000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and not x.is_meta:
                storage = x.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        freed: Callable[..., None] = self._freed
        weakref.finalize(storage, freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

"""The processes of a command that torchrun started: which one this is, and what they tell each other.

Without torchrun there is one process: nothing is imported or connected, and every function answers for this one alone.
All processes must call the functions that exchange something, in the same order.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from funclora.errors import ConfigError, FuncloraError

T = TypeVar("T")

# How long a process waits for one that stands still. One that ends is noticed at once.
TIMEOUT = datetime.timedelta(minutes=10)
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torch's env:// reads them
_NOTHING: Any = object()
_PAUSE = 0.02  # seconds between looks at the store
_PATIENCE = 10.0  # seconds in which the process that reports a failure must have done so


class _Link:
    """What this process knows of the others.

    Attributes:
        rank: its number.
        size: how many there are.
        local: its number on this machine.
        connections: how often they were connected.
        waits: name -> how often they waited for each other in this connection.
        reached: the store of all connections, once it was reached.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.local = 0, 1, 0
        self.connections = 0
        self.waits: dict[str, int] = {}
        self.reached: Any = None

    def store(self) -> Any:
        """What all processes read and write, empty for each connection."""
        import torch.distributed as dist

        if self.reached is None:
            self.reached, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun keeps one store over its restarts, with the addresses of processes that have ended.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"funclora {start} {self.connections}", self.reached)

    def next(self, name: str) -> str:
        """A new key, the same in every process."""
        self.waits[name] = self.waits.get(name, 0) + 1
        return f"{name} {self.waits[name]}"

    def wait_for(self, key: str) -> None:
        """Wait until a process has set a key; an `OtherProcessError` if one failed instead."""
        store = self.store()
        _wait(lambda: store.check([key]) or store.check(["failed"]))
        if not store.check([key]):
            raise OtherProcessError("another process failed.")


_link = _Link()


class OtherProcessError(FuncloraError):
    """Another process failed, and says why."""


class LostProcessError(FuncloraError):
    """Another process does not answer."""


def is_launched() -> bool:
    """Whether torchrun, or what sets the same variables, started several processes."""
    return all(name in os.environ for name in _NEEDED) and os.environ["WORLD_SIZE"] != "1"


def rank() -> int:
    """The number of this process, from 0."""
    return _link.rank


def size() -> int:
    """The number of processes."""
    return _link.size


def local_rank() -> int:
    """The number of this process on its machine."""
    return _link.local


def processes_here() -> int:
    """The number of processes on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if size() > 1 else 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return _link.rank == 0


def is_restarted() -> bool:
    """Whether torchrun started the processes again, after one of them failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect the processes that torchrun started, for this block. Only the first one writes to stdout.

    Raises:
        ConfigError: they cannot be connected.
    """
    if not is_launched():
        yield
        return
    import torch
    import torch.distributed as dist

    own, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    _link.connections += 1
    _link.waits.clear()
    try:
        dist.init_process_group(backend, store=_link.store(), rank=own, world_size=n, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"torchrun: process {own} of {n} cannot reach the others at {os.environ['MASTER_ADDR']}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    _link.rank, _link.size, _link.local = own, n, int(os.environ.get("LOCAL_RANK", own))
    try:
        meet()  # one that fails at once must not break the connections that others still make
        with contextlib.ExitStack() as stack:
            if own:
                nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123 -- no path
                stack.enter_context(contextlib.redirect_stdout(nothing))
            yield
        meet()  # a process that leaves early would take its connections along
    except BaseException as error:
        _claims_failure()  # while the others still wait for this process
        if _is_lost(error):
            raise LostProcessError(
                f"process {own} lost the connection to another one, which ended, or stood still for "
                f"{TIMEOUT.seconds // 60} minutes. With --max-restarts, torchrun starts all of them again, and they go "
                "on from what was saved."
            ) from error
        raise
    finally:
        _link.rank, _link.size, _link.local = 0, 1, 0
        dist.destroy_process_group()


def report(say: Callable[[], None]) -> None:
    """Say that the command failed: in one process, whichever is first. The others wait until it has."""
    if not is_launched():
        say()
        return
    if _claims_failure():
        say()
        sys.stderr.flush()
        with contextlib.suppress(RuntimeError):
            _link.store().set("reported", "")
    else:
        with contextlib.suppress(RuntimeError):
            _wait(lambda: _link.store().check(["reported"]), _PATIENCE)


def _claims_failure() -> bool:
    """Whether this process is the first that failed."""
    own = os.environ["RANK"]
    try:
        return bool(_link.store().compare_set("failed", "", own).decode() == own)
    except RuntimeError:  # the process that keeps the store is gone
        return True


def _is_lost(error: BaseException) -> bool:
    """Whether an error says that the connection to another process is gone."""
    if size() == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    # gloo raises plain RuntimeErrors, which name its source file.
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Run a block in the first process, then in the others: it leaves files that they read."""
    key = _link.next("first")
    if not is_first():
        _link.wait_for(key)
    yield
    if is_first() and size() > 1:
        _link.store().set(key, "done")


def meet() -> None:
    """Wait until every process is here, however long it takes."""
    if size() == 1:
        return
    key = _link.next("meet")
    if _link.store().add(f"{key} count", 1) == size():
        _link.store().set(key, "done")
    _link.wait_for(key)


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of their numbers."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def dealt(values: Sequence[T]) -> list[T]:
    """The values of things that were dealt out one by one, as `things[rank()::size()]`, in the order of the things."""
    rounds = itertools.zip_longest(*gathered([*values]), fillvalue=_NOTHING)
    return [value for values in rounds for value in values if value is not _NOTHING]


def computed(things: Sequence[Any], function: Callable[[Any], T]) -> Iterator[T]:
    """The function's values of all things, in their order; each process computes some of them."""
    if size() == 1:
        yield from map(function, things)
    else:
        yield from dealt([function(thing) for thing in things[rank() :: size()]])


def from_first(value: T) -> T:
    """The value that the first process has."""
    if size() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def tensors_from_first(tree: Any) -> Any:
    """The tensors that the first process has.

    Args:
        tree: tensors by any structure, of the same shapes, dtypes and kind of device everywhere.
    """
    if size() == 1:
        return tree
    import optree
    import torch
    import torch.distributed as dist

    def sent(leaf: Any) -> Any:
        leaf = leaf.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(leaf, src=0)
        return leaf

    return optree.tree_map(sent, tree)


def sums(*numbers: int) -> list[int]:
    """The sums over all processes of some whole numbers."""
    if size() == 1:
        return [*numbers]
    import torch
    import torch.distributed as dist

    total = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(total)
    return total.tolist()


def check_equal(facts: Mapping[str, str]) -> None:
    """Raise `ConfigError` in every process unless all have the same facts.

    Args:
        facts: name -> digest.
    """
    first, *others = gathered(dict(facts))
    for other, theirs in enumerate(others, start=1):
        if differ := [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]:
            raise ConfigError(
                f"process {other} has another {' and another '.join(differ)} than process 0. All need the same files, "
                "the same versions of the packages and processors of one kind."
            )


def part_of(n: int) -> range:
    """The stretch of n things that belongs to this process: all stretches are about equally long."""
    return parts_of(n)[rank()]


def parts_of(n: int) -> list[range]:
    """The stretch of n things that belongs to each process."""
    return [range(n * i // size(), n * (i + 1) // size()) for i in range(size())]


def _wait(is_done: Callable[[], bool], most: float = float("inf")) -> None:
    started = time.monotonic()
    while not is_done() and time.monotonic() < started + most:
        time.sleep(_PAUSE)

"""`AdapterCache`: for more adapters than fit on a device."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import optree
import torch
from torch import nn

from funclora._api.arguments import check_model, check_params, check_path
from funclora._bind.checks import check_adapters
from funclora._files.names import is_file_name
from funclora._many.route import route
from funclora._many.slots import PreparedAdapter, Slots
from funclora._many.stack import stack
from funclora._torch.memory import nbytes
from funclora.errors import ConfigError, UnknownAdapterError, near, shortened
from funclora.io.peft.files import CONFIG_FILE, WEIGHTS_FILE
from funclora.io.peft.folder import load_peft
from funclora.rules.base import Params, Rule

Adapter = dict[str, Rule]


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter as its folder was when it was loaded, from `AdapterCache.load`.

    Attributes:
        name: its id.
        adapters: its rules by the names of their parameters, to be used like those of `load_peft`.
        prepared: the same for batches; None without base weights.
        version: of its folder when it was loaded.
        size: in bytes.
    """

    name: str
    adapters: Adapter
    prepared: PreparedAdapter | None
    version: object
    size: int


@dataclass(frozen=True)
class CacheStats:
    """Statistics and contents of an `AdapterCache`.

    Attributes:
        hits: requested adapters that were loaded already, or being loaded.
        misses: adapters that were loaded.
        evictions: adapters that were dropped to make room.
        adapters: number of adapters in it.
        bytes: their size.
    """

    hits: int
    misses: int
    evictions: int
    adapters: int
    bytes: int


class AdapterCache:
    """Adapters from PEFT folders by their ids, loaded on first use; the most recently used ones stay on the device.

    Safe to use from many threads: an adapter that two threads request is loaded once. An adapter is a value, so a
    running batch is not affected if the cache drops its adapter, or if its folder is written again; the memory is freed
    when the batch is finished. A folder that was written again is loaded again when it is requested the next time.

    With `params`, everything that depends only on an adapter and the base weights (DoRA's norms) is computed when it
    is loaded, and the adapters of running batches are kept in one stack. A batch that differs from the last one by some
    adapters then costs only the copies of these. The stack has room for as many adapters as were in running batches
    at once, in addition to `memory`.

    Args:
        model: the base model that the adapters belong to; only read.
        source: the folder that contains the adapters' folders, whose names are the ids; or a mapping from ids to
            folders.
        memory: maximum bytes of the adapters in the cache, without adapters that only running batches still use.
        device: where to keep them; by default on the devices of their base weights, as in `load_peft`.
        params: the base weights with which batches are computed, as from `base_params`. Adapters that `route` returns
            belong to these weights.

    Raises:
        ConfigError: `memory` is not a positive int, or `source` is no folder.

    Examples:
        >>> import tempfile
        >>> import funclora as fl
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> config = fl.LoraConfig(r=2, target_modules=["0"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fl.save_peft(f"{folder}/customer-17", fl.init(model, config), config)
        ...     cache = AdapterCache(model, folder, memory=2**20)
        ...     adapters = cache.route(["customer-17", None, "customer-17"])
        ...     y = fl.apply(model, fl.base_params(model), adapters, torch.ones(3, 4))
        >>> cache.stats()
        CacheStats(hits=0, misses=1, evictions=0, adapters=1, bytes=56)
    """

    def __init__(
        self,
        model: nn.Module,
        source: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
        memory: int,
        *,
        device: torch.device | str | int | None = None,
        params: Params | None = None,
    ) -> None:
        check_model(model)
        check_params(params, optional=True)
        if not isinstance(source, Mapping):
            check_path(source, "source", "model, source, memory")
        if not isinstance(memory, int) or isinstance(memory, bool) or memory < 1:
            raise ConfigError(f"AdapterCache: memory: expected a positive number of bytes, got {memory!r}.")
        if not isinstance(source, Mapping) and not Path(source).is_dir():
            raise ConfigError(
                f"AdapterCache: source: {os.fspath(source)!r} is no folder. Expected one that holds PEFT folders."
            )
        self._model = model
        self._source = dict(source) if isinstance(source, Mapping) else Path(source)
        self._memory = memory
        self._device = None if device is None else torch.device(device)
        self._lock = threading.Lock()
        self._params = params
        self._slots = Slots()
        self._held: OrderedDict[str, LoadedAdapter] = OrderedDict()  # the one used last comes last
        self._coming: dict[str, Future[LoadedAdapter]] = {}
        self._bytes = self._hits = self._misses = self._evictions = 0

    @property
    def params(self) -> Params | None:
        """The base weights that it was made with."""
        return self._params

    def __getitem__(self, name: str) -> dict[str, Rule]:
        """One adapter, loaded if it is not in the cache."""
        return self.load(name).adapters

    def __contains__(self, name: object) -> bool:
        """Whether the adapter is in the cache."""
        return isinstance(name, str) and name in self._held

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"AdapterCache of {len(self._held)} adapters, {self._bytes:,} of {self._memory:,} bytes"

    def load(self, name: str) -> LoadedAdapter:
        """One adapter in the version that its folder has now, to be named in batches instead of its id.

        It stays this version, and in memory, as long as it is held, whatever happens to the folder or in the cache.

        Raises:
            UnknownAdapterError: the id is unknown.
            ConfigError: the adapter takes more than the cache may hold.
            FormatError: its folder is damaged.
        """
        return self._get([name])[name]

    def ids(self) -> list[str]:
        """The ids that can be named now, sorted."""
        if isinstance(self._source, dict):
            return sorted(self._source)
        return sorted(path.parent.name for path in self._source.glob(f"*/{CONFIG_FILE}"))

    def check(self, name: str) -> None:
        """Raise `UnknownAdapterError` unless the id can be named now; nothing is loaded."""
        self._folder(name)

    def held(self) -> list[str]:
        """The ids of the adapters in the cache; the first is dropped next."""
        with self._lock:
            return list(self._held)

    def drop(self, name: str) -> bool:
        """Remove an adapter; True if it was in the cache."""
        with self._lock:
            return self._drop(name)

    def _drop(self, name: str) -> bool:
        if name not in self:
            return False
        self._bytes -= self._held.pop(name).size
        return True

    def stats(self) -> CacheStats:
        """Hits, misses, evictions, and what is held."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, len(self._held), self._bytes)

    def route(self, ids: Sequence[str | LoadedAdapter | None], *, repeats: int = 1) -> dict[str, Rule]:
        """The adapters for a batch whose rows name theirs.

        Args:
            ids: `[n_rows]`, the id of each row's adapter, or what `load` returned for it; None for the base model.
            repeats: as for `funclora.route`.

        Returns:
            Adapters for a batch of that many rows.

        Raises:
            UnknownAdapterError: an id is unknown.
            ConfigError: an adapter takes more than the cache may hold.
            FormatError: the folder of an adapter is damaged. After this and any other error of `load_peft` the cache
                is unchanged.
        """
        if isinstance(ids, str) or not isinstance(ids, Sequence) or not len(ids):
            raise ConfigError(f"AdapterCache: ids: expected an id or None for each row, got {shortened(ids)}.")
        found = self._get([name for name in ids if name is not None and not isinstance(name, LoadedAdapter)])
        rows = [found[name] if isinstance(name, str) else name for name in ids]
        used = list(dict.fromkeys(row for row in rows if row is not None))
        if not used:
            return {}
        if self._params is not None:
            return self._slots.route([None if row is None else row.prepared for row in rows], repeats)
        place = {row: i for i, row in enumerate(used)}
        members = stack(row.adapters for row in used)
        return route(members, [-1 if row is None else place[row] for row in rows], repeats=repeats)

    def order(self, rows: Sequence[LoadedAdapter | None]) -> list[int]:
        """The order of some rows in which a batch of them is computed fastest.

        Args:
            rows: `[n_rows]`, the adapter of each row as from `load`; None for the base model.

        Returns:
            `[n_rows]`, which of them comes first, second, and so on. Rows of one adapter follow each other.
        """
        if self._params is not None:
            return self._slots.order([None if row is None else row.prepared for row in rows])
        place = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        return sorted(range(len(rows)), key=lambda i: place[rows[i]])

    def _get(self, ids: Sequence[str]) -> dict[str, LoadedAdapter]:
        """The adapters by their ids, each once. The cache changes only if all of them can be loaded."""
        for name in ids:
            if not isinstance(name, str):
                raise ConfigError(f"AdapterCache: ids: expected texts, got {shortened(name)}.")
        wanted = list(dict.fromkeys(ids))
        folders = {name: self._folder(name) for name in wanted}
        found: dict[str, LoadedAdapter] = {}
        loaded: dict[str, LoadedAdapter] = {}
        self._drop_replaced(folders)
        # Another thread may fail on an adapter that this one did not request. Its other adapters are tried again.
        while len(found) < len(wanted):
            others, mine = self._claim([name for name in wanted if name not in found], found)
            try:
                for name in mine:
                    loaded[name] = found[name] = self._load(name, folders[name])
                    self._coming[name].set_result(found[name])
                for name, future in others.items():
                    with contextlib.suppress(CancelledError):
                        found[name] = future.result()
            except BaseException:
                self._give_up(loaded.keys() | set(mine))
                raise
        self._commit(wanted, loaded)
        return found

    def _drop_replaced(self, folders: Mapping[str, Path]) -> None:
        """Drop adapters whose folders were written again since they were loaded."""
        found = {name: _version(folder) for name, folder in folders.items() if name in self}
        with self._lock:
            for name, version in found.items():
                if version is not None and name in self and self._held[name].version != version:
                    self._drop(name)

    def _claim(
        self, ids: list[str], found: dict[str, LoadedAdapter]
    ) -> tuple[dict[str, Future[LoadedAdapter]], list[str]]:
        """Take what is there; of the rest, what other threads are loading, and what this one has to."""
        others: dict[str, Future[LoadedAdapter]] = {}
        mine = []
        with self._lock:
            for name in ids:
                if name in self._held:
                    found[name] = self._held[name]
                elif name in self._coming:
                    others[name] = self._coming[name]
                else:
                    self._coming[name] = Future()
                    mine.append(name)
        return others, mine

    def _give_up(self, ids: set[str]) -> None:
        with self._lock:
            for name in ids:
                self._coming.pop(name).cancel()

    def _commit(self, wanted: list[str], loaded: dict[str, LoadedAdapter]) -> None:
        with self._lock:
            self._misses += len(loaded)
            self._hits += len(wanted) - len(loaded)
            for name in wanted:
                if name in loaded:
                    del self._coming[name]
                    self._held[name] = loaded[name]
                    self._bytes += loaded[name].size
                elif name in self._held:
                    self._held.move_to_end(name)
            while self._bytes > self._memory:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= dropped.size
                self._evictions += 1

    def _load(self, name: str, folder: Path) -> LoadedAdapter:
        version = _version(folder)  # of before: a folder that is replaced now is loaded again
        adapters, _ = load_peft(folder, self._model)
        if self._device is not None:
            tree: Any = adapters
            adapters = cast(Adapter, optree.tree_map(lambda x: x.to(self._device), tree))
        prepared = None
        if self._params is not None:
            check_adapters(self._params, adapters, values=True)
            prepared = PreparedAdapter(adapters, self._params)
        size = nbytes((adapters, prepared and prepared.leaves))
        if size > self._memory:
            raise ConfigError(
                f"AdapterCache: {name!r} takes {size:,} bytes, and memory is {self._memory:,} in all. Allow more, or "
                "load it by load_peft and route it yourself."
            )
        return LoadedAdapter(name, adapters, prepared, version, size)

    def _folder(self, name: str) -> Path:
        if isinstance(self._source, dict):
            if name in self._source:
                return Path(self._source[name])
        # A name, not a path: an id that comes with a request must not lead out of the folder.
        elif is_file_name(name) and (self._source / name).is_dir():
            return self._source / name
        raise UnknownAdapterError(f"AdapterCache: there is no adapter {shortened(name)}.{near(name, self.ids())}")


def _version(folder: Path) -> object:
    """Equal for two states of a folder only if its files are the same; None if they cannot be found."""
    try:
        files = [os.stat(os.path.join(folder, name)) for name in (CONFIG_FILE, WEIGHTS_FILE)]  # noqa: PTH116, PTH118
    except OSError:
        return None
    return [(file.st_ino, file.st_mtime_ns, file.st_size) for file in files]

"""`AdapterCache`: what it holds, what it drops, and what errors and threads do to it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funclora as fl
from funclora.errors import ConfigError, FormatError
from funclora.io.peft import cache as caching
from funclora.io.peft.folder import load_peft

SIZE = (4 * 2 + 2 * 3) * 4  # of one adapter, in bytes


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3))


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    """Adapters a to e of one size, and one that is larger."""
    for i, name in enumerate(["a", "b", "c", "d", "e", "large"]):
        config = fl.LoraConfig(r=20 if name == "large" else 2, target_modules=["0"], init_lora_weights=False)
        adapters = fl.init(model, config, generator=torch.Generator().manual_seed(i))
        fl.save_peft(tmp_path / name, adapters, config)
    return tmp_path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders that are loaded."""
    names: list[str] = []

    def load(path: Path, model: nn.Module) -> Any:
        names.append(path.name)
        return load_peft(path, model)

    monkeypatch.setattr(caching, "load_peft", load)
    return names


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k].a, other[k].a) and torch.equal(one[k].b, other[k].b) and one[k].scaling == other[k].scaling
        for k in one
    )


def test_rows_get_the_adapters_that_they_name(model: nn.Module, folder: Path) -> None:
    cache = fl.AdapterCache(model, folder, 10 * SIZE)
    x, params = torch.randn(5, 4), fl.base_params(model)
    ids = ["b", None, "a", "b", "large"]
    y = fl.apply(model, params, cache.route(ids), x)
    for row, name in enumerate(ids):
        alone = {} if name is None else load_peft(folder / name, model)[0]
        torch.testing.assert_close(y[row], fl.apply(model, params, alone, x[row : row + 1])[0])
    assert same(cache["a"], load_peft(folder / "a", model)[0])
    assert cache.route([None, None]) == {}


def test_the_adapter_used_longest_ago_goes_first(model: nn.Module, folder: Path, loads: list[str]) -> None:
    cache = fl.AdapterCache(model, folder, 3 * SIZE)
    cache.route(["a", "b", "c"])
    assert cache["a"] is cache["a"]
    assert cache.held() == ["b", "c", "a"]
    first = cache["c"]
    cache.route(["d", "b", "d"])
    assert cache.held() == ["c", "d", "b"]
    assert cache["c"] is first
    cache["a"]
    assert cache.held() == ["b", "c", "a"]
    assert loads == ["a", "b", "c", "d", "a"]
    assert cache.stats() == fl.io.CacheStats(hits=5, misses=5, evictions=2, adapters=3, bytes=3 * SIZE)
    assert "b" in cache
    assert "d" not in cache


def test_bytes_never_exceed_the_budget(model: nn.Module, folder: Path) -> None:
    cache = fl.AdapterCache(model, folder, 2 * SIZE + 1)
    found = cache.route(["a", "b", "c", "d"])  # more than fits: the batch has them all, the cache the last
    assert cache.held() == ["c", "d"]
    assert cache.stats().bytes == 2 * SIZE
    y = fl.apply(model, fl.base_params(model), found, torch.ones(4, 4))
    alone = fl.apply(model, fl.base_params(model), load_peft(folder / "a", model)[0], torch.ones(1, 4))
    torch.testing.assert_close(y[:1], alone)


def test_what_is_dropped_is_loaded_again(model: nn.Module, folder: Path, loads: list[str]) -> None:
    cache = fl.AdapterCache(model, folder, 3 * SIZE)
    cache["a"]
    assert cache.drop("a")
    assert not cache.drop("a")
    assert len(cache) == cache.stats().bytes == 0
    cache["a"]
    assert loads == ["a", "a"]


def test_a_mapping_of_ids(model: nn.Module, folder: Path) -> None:
    cache = fl.AdapterCache(model, {"tenant/1": folder / "c"}, SIZE)
    assert same(cache["tenant/1"], load_peft(folder / "c", model)[0])
    with pytest.raises(ConfigError, match=r"there is no adapter 'tenant/2'\. Near names: tenant/1\."):
        cache["tenant/2"]


def test_adapters_lie_on_the_device_asked_for(model: nn.Module, folder: Path) -> None:
    cache = fl.AdapterCache(model, folder, SIZE, device="meta")
    assert cache["a"]["0.weight"].a.device.type == "meta"  # type: ignore[attr-defined]


def _break(folder: Path) -> None:
    (folder / "b" / "adapter_model.safetensors").write_bytes(b"no tensors")


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (["d", "custom"], ConfigError, r"there is no adapter 'custom'\. Near names: "),
        (["d", "../" + "a"], ConfigError, "there is no adapter"),
        (["d", ".."], ConfigError, "there is no adapter"),
        (["d", ""], ConfigError, "there is no adapter"),
        (["d", "large"], ConfigError, "'large' takes 560 bytes, and memory is 168"),
        (["d", "b"], FormatError, r"b.adapter_model\.safetensors"),
        ([], ConfigError, "expected an id or None for each row"),
        ("abc", ConfigError, "expected an id or None for each row"),
    ],
)
def test_errors_leave_the_cache_as_it_was(
    ids: Any, error: type[Exception], message: str, model: nn.Module, folder: Path
) -> None:
    _break(folder)
    cache = fl.AdapterCache(model, folder, 3 * SIZE)
    cache.route(["a", "c", "e"])
    before = cache.stats(), cache.held()
    for _ in range(2):  # also that nobody is waited for in vain
        with pytest.raises(error, match=message):
            cache.route(ids)
        assert (cache.stats(), cache.held()) == before
    assert "d" not in cache


def test_bad_arguments(model: nn.Module, folder: Path) -> None:
    with pytest.raises(ConfigError, match="memory: expected a positive number of bytes, got 0"):
        fl.AdapterCache(model, folder, 0)
    with pytest.raises(ConfigError, match="is no folder"):
        fl.AdapterCache(model, folder / "nothing", 1)


def _together(work: Callable[[int], Any], n: int) -> list[Any]:
    start = threading.Barrier(n)

    def one(i: int) -> Any:
        start.wait()
        return work(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


@contextlib.contextmanager
def after_claiming(then: Callable[[list[str]], Any]) -> Iterator[None]:
    """Calls `then` with the ids that a thread asks for, when it knows which it loads itself and for which it waits."""
    claim = fl.AdapterCache._claim

    def claiming(cache: fl.AdapterCache, ids: list[str], found: Any) -> Any:
        claimed = claim(cache, ids, found)
        then(ids)
        return claimed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fl.AdapterCache, "_claim", claiming)
        yield


def test_threads_that_ask_for_one_adapter_load_it_once(model: nn.Module, folder: Path, loads: list[str]) -> None:
    cache = fl.AdapterCache(model, folder, 4 * SIZE)
    orders = [["a", "b"], ["b", "a"], ["a"], ["b", "c", "a"]]
    all_claimed = threading.Barrier(len(orders))
    with after_claiming(lambda ids: all_claimed.wait()), ThreadPoolExecutor(len(orders)) as pool:
        found = [*pool.map(lambda ids: cache[ids[0]] if len(ids) == 1 else cache.route(ids), orders)]
    assert sorted(loads) == ["a", "b", "c"]
    assert cache.stats().misses == 3
    assert found[2] is cache["a"]


def test_a_thread_is_not_hurt_by_what_another_failed_at(
    model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(folder)
    begun, other_claimed = threading.Event(), threading.Event()

    def load(path: Path, model: nn.Module) -> Any:
        if path.name == "b":
            begun.set()
            other_claimed.wait()
        return load_peft(path, model)

    def claimed(ids: list[str]) -> None:
        if ids == ["c"]:
            other_claimed.set()

    monkeypatch.setattr(caching, "load_peft", load)
    cache = fl.AdapterCache(model, folder, 4 * SIZE)
    with after_claiming(claimed), ThreadPoolExecutor(2) as pool:
        fails = pool.submit(cache.route, ["b", "c"])  # has promised c when it fails at b
        begun.wait()
        waits = pool.submit(cache.__getitem__, "c")
        with pytest.raises(FormatError, match="b"):
            fails.result()
        assert same(waits.result(), load_peft(folder / "c", model)[0])
    assert cache.held() == ["c"]


def test_many_threads_and_little_room(model: nn.Module, folder: Path) -> None:
    expected = {name: load_peft(folder / name, model)[0] for name in "abcde"}
    cache = fl.AdapterCache(model, folder, 2 * SIZE)

    def work(i: int) -> bool:
        good = True
        for k in range(20):
            name = "abcde"[(i + k * k) % 5]
            good &= same(cache[name], expected[name]) and cache.stats().bytes <= 2 * SIZE
        return good

    assert all(_together(work, 6))
    stats = cache.stats()
    assert stats.hits + stats.misses == 6 * 20
    assert stats.misses - stats.evictions == stats.adapters == 2

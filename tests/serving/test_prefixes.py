"""Prompts that begin alike: what was read for one is used for the next, and no answer changes by it."""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import architectures
import pytest
import torch
from customers import WAIT, Asked, Customers, Gate
from torch import Tensor, nn

import funclora as fl
from funclora.errors import ConfigError
from funclora.io import LoadedAdapter
from funclora.serving import Engine, Settings, _engine
from funclora.serving._memory import Cached
from funclora.serving._prefixes import Prefixes

GREEDY = Settings(max_tokens=8, temperature=0.0)
PIECE = 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Customers:
    model, _ = architectures.build("LlamaForCausalLM")
    return Customers(model, tmp_path_factory.mktemp("adapters"), 4)


def started(customers: Customers, memory: int = 2**20, adapters: int = 2**20, **options: Any) -> Engine:
    """An engine with pieces of 4 tokens."""
    cache = fl.AdapterCache(customers.model, customers.folder, adapters, params=customers.params)
    options = {"max_rows": 5, "eos_ids": (), "prefill_tokens": PIECE, **options}
    return Engine(customers.model, customers.params, cache, prefix_memory=memory, **options)


def alike(customers: Customers, n: int) -> list[Asked]:
    """Requests with few beginnings: of whole pieces and not, some of them the beginning of others."""
    chosen = random.Random(0)
    longest = [[chosen.randrange(4, 60) for _ in range(24)] for _ in range(2)]
    return [
        dataclasses.replace(
            request, ids=(longest[i % 2][: chosen.choice([4, 8, 9, 16, 24])] + request.ids)[: chosen.randint(3, 40)]
        )
        for i, request in enumerate(customers.asked(n))
    ]


@pytest.mark.parametrize("memory", [2**20, 6 * 2048], ids=["all", "little"])
def test_every_answer_is_that_of_its_adapter_alone(memory: int, llama: Customers) -> None:
    asked = alike(llama, 60)
    used: list[int] = []
    with started(llama, memory) as engine, ThreadPoolExecutor(8) as clients:

        def answer(request: Asked) -> list[int]:
            found = engine.submit(request.ids, request.adapter, request.settings).result(WAIT)
            used.append(engine.statistics().prefix_bytes)
            return found

        answers = [*clients.map(answer, asked)]
        statistics = engine.statistics()
    assert answers == [llama.alone(request) for request in asked]
    assert statistics.prefix_hits > 10
    assert statistics.prefix_tokens > PIECE * statistics.prefix_hits
    assert statistics.prompt_tokens + statistics.prefix_tokens == sum(len(request.ids) for request in asked)
    assert 0 < max(used) <= memory
    assert (statistics.prefix_evictions > 0) == (memory < 2**20)


def test_what_is_taken_over_changes_no_bit(llama: Customers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is cut at the same places, whether its beginning is known or not, and however much is read at a step."""
    monkeypatch.setattr(_engine, "PIECE", PIECE)
    pieces: list[list[tuple[int, int]]] = []
    read = Cached.read

    def noted(self: Cached, bound: nn.Module, new: Any) -> Tensor:
        pieces[-1].append((sum(self.lengths), len(new[0])))
        return read(self, bound, new)

    every = Settings(max_tokens=3, temperature=0.0, logprobs=64)
    beginning = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    asked = [Asked(beginning + tail, "customer-1", every) for tail in ([20], [21, 22, 23, 24], [25] * 11, [25] * 10)]
    found: dict[bool, list[Any]] = {}
    for shared in (False, True):
        with started(llama, prefill_tokens=10) as engine, monkeypatch.context() as patched:
            patched.setattr(Cached, "read", noted)
            found[shared] = []
            for request in asked:
                if not shared and engine._prefixes is not None:
                    engine._prefixes._of_adapters.clear()
                pieces.append([])
                found[shared].append([*engine.submit(request.ids, request.adapter, request.settings)])
            assert engine.statistics().prefix_hits == (3 if shared else 0)
    assert found[True] == found[False]
    for whole, rest in zip(pieces[: len(asked)], pieces[len(asked) :], strict=True):
        assert whole[-len(rest) :] == rest
    assert [len(calls) for calls in pieces[:4]] == [3 + 2, 4 + 2, 6 + 2, 5 + 2]
    assert [len(calls) for calls in pieces[4:]] == [3 + 2, 2 + 2, 4 + 2, 1 + 2]


def test_an_adapter_uses_its_own_version_only(llama: Customers, tmp_path: Path) -> None:
    customers = Customers(llama.model, tmp_path, 2)
    prompt = [*range(10, 30)]
    asked = [Asked(prompt, name, GREEDY) for name in (None, "customer-0", "customer-1")]
    with started(customers) as engine:

        def answers() -> list[list[int]]:
            return [engine.submit(each.ids, each.adapter, each.settings).result(WAIT) for each in asked]

        assert answers() == [customers.alone(request) for request in asked]
        assert engine.statistics().prefix_hits == 0
        assert answers() == [customers.alone(request) for request in asked]
        assert engine.statistics().prefix_hits == 3
        size = engine.statistics().prefix_bytes
        customers.save("customer-0", 5)
        assert answers() == [customers.alone(request) for request in asked]
        assert engine.statistics().prefix_hits == 3 + 2
        assert settles(engine, size)


def settles(engine: Engine, size: int) -> bool:
    """Whether what is kept has this size, as soon as the engine has let go of the rows that have ended."""
    end = time.monotonic() + WAIT
    while engine.statistics().prefix_bytes != size and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return engine.statistics().prefix_bytes == size


def test_an_old_version_that_is_running_does_not_help_the_new_one(llama: Customers, tmp_path: Path) -> None:
    customers = Customers(llama.model, tmp_path, 1)
    asked = Asked([*range(10, 30)], "customer-0", dataclasses.replace(GREEDY, max_tokens=12))
    old = customers.alone(asked)
    with started(customers) as engine:
        before = engine.submit(asked.ids, asked.adapter, asked.settings)
        gate = Gate(5)
        before.add_callback(gate)
        gate.wait()
        customers.save("customer-0", 5)
        after = engine.submit(asked.ids, asked.adapter, asked.settings)
        gate.open()
        assert before.result(WAIT) == old
        assert after.result(WAIT) == customers.alone(asked) != old
        assert engine.statistics().prefix_hits == 0


def test_what_an_adapter_knew_goes_with_it(llama: Customers) -> None:
    size = fl.AdapterCache(llama.model, llama.folder, 2**20, params=llama.params).load("customer-1").size
    with started(llama, adapters=size + size // 2) as engine:
        known = 0
        for name in ("customer-1", "customer-0", "customer-1"):
            engine.submit([*range(10, 30)], name, GREEDY).result(WAIT)
            engine.submit([5], None, GREEDY).result(WAIT)  # the row before has left
            known = known or engine.statistics().prefix_bytes
            assert settles(engine, known)
        assert known > 0
        assert engine.statistics().cache_evictions == 2
        assert engine.statistics().prefix_hits == engine.statistics().prefix_evictions == 0


def test_the_others_go_on_while_a_known_prompt_is_read(llama: Customers) -> None:
    seen: list[str] = []
    long = Asked([5, 6] * 15, None, GREEDY)
    with started(llama) as engine:
        engine.submit([5, 6] * 5, None, GREEDY).result(WAIT)
        short = engine.submit([5], None, dataclasses.replace(GREEDY, max_tokens=30))
        gate = Gate(1)
        short.add_callback(gate)
        short.add_callback(lambda token: seen.append("short"))
        gate.wait()
        stream = engine.submit(long.ids, None, long.settings)
        stream.add_callback(lambda token: seen.append("long"))
        gate.open()
        assert stream.result(WAIT) == llama.alone(long)
        assert engine.statistics().prefix_tokens == 8
    assert seen.index("long") >= 5  # 22 tokens are read in six steps


@pytest.mark.parametrize("kind", ["MistralForCausalLM", "JambaForCausalLM"])
def test_models_whose_memory_cannot_be_cut_read_every_prompt(kind: str, tmp_path: Path) -> None:
    model, _ = architectures.build(kind)
    customers = Customers(model, tmp_path, 1)
    asked = [Asked([5, 6] * 9 + [i], "customer-0", GREEDY) for i in (7, 8)]
    with started(customers) as engine:
        assert not engine.shares_prefixes
        answers = [engine.submit(each.ids, each.adapter, each.settings).result(WAIT) for each in asked]
        assert engine.statistics().prompt_tokens == 38
        assert engine.statistics().prefix_hits == engine.statistics().prefix_bytes == 0
    assert answers == [customers.alone(request) for request in asked]


def test_nothing_is_kept_without_memory(llama: Customers) -> None:
    with started(llama, memory=0) as engine:
        assert not engine.shares_prefixes
        for _ in range(2):
            engine.submit([5] * 30, None, GREEDY).result(WAIT)
        assert engine.statistics().prompt_tokens == 60
    with pytest.raises(ConfigError, match=r"prefix_memory: expected a number of bytes, or 0, got -1\."):
        started(llama, memory=-1)
    with pytest.raises(ConfigError, match="prefix_memory"):
        started(llama, memory=cast(int, True))


class Text:
    """Stands for the memory of a row: what it knows of a token are the adapter and all tokens up to it."""

    def __init__(self, adapter: int, text: list[int]) -> None:
        self._adapter, self._text = adapter, text
        self.begun: list[Tensor] = []

    def known(self, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        texts = [torch.tensor([[self._adapter, *self._text[:i], *[0] * (20 - i)]]) for i in range(start + 1, stop + 1)]
        return [(torch.cat(texts), torch.zeros(0))]

    def begin(self, parts: list[list[tuple[Tensor, Tensor]]]) -> None:
        self.begun = [keys for ((keys, _),) in parts]


def adapter(name: str) -> LoadedAdapter:
    return LoadedAdapter(name, {}, None, None, 1)


@pytest.mark.parametrize("pieces", [3, 7, 10**6])
def test_what_is_found_is_what_was_put(pieces: int) -> None:
    """Against a set of all beginnings that were put; with little memory only some of them are found."""
    chosen = random.Random(pieces)
    adapters = [None, adapter("a"), adapter("b")]
    size = 2 * 21 * 8  # two tokens
    prefixes = Prefixes(2, pieces * size)
    put: set[tuple[int, ...]] = set()
    found = 0
    for _ in range(1500):
        i, text = chosen.randrange(3), [chosen.randrange(1, 3) for _ in range(chosen.randint(1, 12))]
        memory: Any = Text(i, text)
        if chosen.random() < 0.5:
            prefixes.put(adapters[i], text, memory)
            put |= {(i, *text[:n]) for n in range(2, len(text) + 1, 2)}
        else:
            count = prefixes.take(adapters[i], text, memory)
            longest = max((n for n in range(2, len(text), 2) if (i, *text[:n]) in put), default=0)
            assert count == longest if pieces == 10**6 else count <= longest
            if count:
                assert torch.equal(torch.cat(memory.begun), memory.known(0, count)[0][0])
            found += count > 0
        assert prefixes.bytes <= pieces * size
    assert found > 20
    assert (prefixes.evictions > 0) == (pieces < 10**6)
    del adapters[1:]
    gc.collect()
    assert prefixes.bytes == sum(part.size for part in prefixes._of_base.values())


def test_the_end_of_what_was_used_least_recently_goes_first() -> None:
    prefixes = Prefixes(2, 5 * 2 * 21 * 8)

    def put(text: list[int]) -> None:
        prefixes.put(None, text, cast(Any, Text(0, text)))

    def known(text: list[int]) -> int:
        return prefixes.take(None, [*text, 9], cast(Any, Text(0, text)))

    put([1, 1, 1, 1, 1, 1])  # three pieces
    put([2, 2, 2, 2])
    assert known([1, 1]) == 2  # its first piece is used again
    put([3, 3])
    assert (known([1] * 6), known([2] * 4), known([3] * 2)) == (4, 4, 2)
    put([4] * 12)  # six pieces, and there is room for five
    assert (known([1] * 6), known([2] * 4), known([3] * 2), known([4] * 12)) == (0, 0, 0, 10)
    assert prefixes.evictions == 6

"""`Engine`: every answer is that of its adapter alone, whatever the others do."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from customers import WAIT, Asked, Customers, Gate, counted

import funclora as fl
from funclora.demo.model import ByteLM, ByteLMConfig
from funclora.errors import (
    ClosedError,
    ConfigError,
    FormatError,
    NonFiniteError,
    QueueFullError,
    TooLongError,
    UnknownAdapterError,
)
from funclora.io import LoadedAdapter
from funclora.serving import Engine, Settings, Stream

GREEDY = Settings(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Customers:
    model, _ = architectures.build("LlamaForCausalLM")
    return Customers(model, tmp_path_factory.mktemp("adapters"), 12)


@pytest.fixture
def engine(llama: Customers) -> Iterator[Engine]:
    with started(llama) as made:
        yield made


def started(customers: Customers, **options: Any) -> Engine:
    options = {"max_rows": 5, "eos_ids": (), **options}
    cache = fl.AdapterCache(customers.model, customers.folder, 2**20, params=customers.params)
    return Engine(customers.model, customers.params, cache, **options)


def submit(engine: Engine, asked: Asked) -> Stream:
    return engine.submit(asked.ids, asked.adapter, asked.settings)


def test_every_answer_is_that_of_its_adapter_alone_under_load(llama: Customers) -> None:
    """Twelve mixed adapters, of which a few fit into the cache, asked for by many threads at once."""
    asked = llama.asked(72)
    size = fl.AdapterCache(llama.model, llama.folder, 2**20, params=llama.params).load("customer-1").size
    cache = fl.AdapterCache(llama.model, llama.folder, 4 * size, params=llama.params)
    engine = Engine(llama.model, llama.params, cache, max_rows=7, prefill_tokens=12, eos_ids=())
    rows: list[int] = []

    def answer(request: Asked) -> list[int]:
        stream = submit(engine, request)
        stream.add_callback(lambda token: rows.append(len(engine._decoder.rows())))
        return stream.result(WAIT)

    with engine, ThreadPoolExecutor(12) as clients:
        answers = [*clients.map(answer, asked)]
        statistics = engine.statistics()
    assert max(rows) <= 7
    assert answers == [llama.alone(request) for request in asked]
    assert statistics.cache_evictions >= 12 - 4
    assert statistics.requests == statistics.first_tokens == len(asked)
    assert statistics.finished["stop"] + statistics.finished["length"] == len(asked)
    assert statistics.finished["stop"] > 5
    assert statistics.prompt_tokens == sum(len(request.ids) for request in asked)
    assert statistics.generated_tokens == sum(map(len, answers))
    assert max(statistics.first_token_buckets.values()) <= len(asked)


@pytest.mark.parametrize(
    "kind",
    [
        "MistralForCausalLM",  # a sliding window
        "Gemma3ForCausalLM",  # with and without one
        "MambaForCausalLM",  # states
        "JambaForCausalLM",  # states, keys and values
        "BartForCausalLM",  # positions that cannot be given: rows of equal lengths
    ],
)
def test_models_with_other_caches(kind: str, tmp_path: Path) -> None:
    model, _ = architectures.build(kind)
    customers = Customers(model, tmp_path, 3)
    asked = customers.asked(16)
    with started(customers, prefill_tokens=6) as engine:
        streams = [submit(engine, request) for request in asked]
        answers = [stream.result(WAIT) for stream in streams]
    assert answers == [customers.alone(request) for request in asked]


def test_a_model_that_remembers_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = ByteLM(ByteLMConfig(16, 1, 2, 24, 40))
    config = fl.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    rules: Any = fl.init(model, config)
    moved = {name: dataclasses.replace(rule, b=torch.randn_like(rule.b)) for name, rule in rules.items()}
    fl.save_peft(tmp_path / "one", moved, config)
    asked = [([7] * n, adapter) for n in (1, 5, 9, 20) for adapter in (None, "one")]
    with Engine(model, fl.base_params(model), tmp_path, max_rows=3) as engine:
        streams = [engine.submit(ids, adapter, GREEDY) for ids, adapter in asked]
        answers = [stream.result(WAIT) for stream in streams]
        with pytest.raises(TooLongError, match="40 are possible"):
            engine.submit([7] * 29, None, GREEDY)
    for (ids, adapter), answer in zip(asked, answers, strict=True):
        bound, text = fl.bind(model, fl.base_params(model), moved if adapter else {}), list(ids)
        for _ in range(GREEDY.max_tokens):
            text.append(int(bound(torch.tensor([text]))[0, -1].argmax()))
        assert text[len(ids) :] == answer


def test_a_seed_decides_whoever_else_is_there(llama: Customers, engine: Engine) -> None:
    settings = Settings(max_tokens=20, temperature=1.2, seed=5)
    alone = engine.submit([5, 6, 7], "customer-3", settings).result(WAIT)
    crowd = [submit(engine, request) for request in llama.asked(20)]
    streams = [engine.submit([5, 6, 7], "customer-3", settings) for _ in range(3)]
    assert [stream.result(WAIT) for stream in streams] == [alone] * 3
    other = dataclasses.replace(settings, seed=6)
    assert engine.submit([5, 6, 7], "customer-3", other).result(WAIT) != alone
    free = [engine.submit([5, 6, 7], None, dataclasses.replace(settings, seed=None)) for _ in range(2)]
    assert free[0].result(WAIT) != free[1].result(WAIT)
    assert all(stream.result(WAIT) for stream in crowd)


def test_log_probabilities_are_those_of_the_model(llama: Customers, engine: Engine) -> None:
    asked = Asked([5, 6, 7], "customer-1", Settings(max_tokens=4, temperature=0.7, seed=1, logprobs=3))
    tokens = [*submit(engine, asked)]
    assert [token.id for token in tokens] == llama.alone(asked)
    rules = fl.load_peft(llama.folder / "customer-1", llama.model)[0]
    text = torch.tensor([asked.ids + [token.id for token in tokens]])
    with torch.no_grad():
        expected = fl.apply(llama.model, llama.params, rules, text).logits.log_softmax(-1)[0, 2:]
    for token, row in zip(tokens, expected, strict=False):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        most = row.topk(3)
        assert [i for i, _ in token.top] == most.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(most.values.tolist(), abs=1e-4)
    assert [token.logprob for token in engine.submit([5], None, GREEDY)] == [None] * 12


def test_a_long_prompt_does_not_stop_the_others(llama: Customers) -> None:
    long = Asked([5, 6] * 15, None, GREEDY)
    seen: list[str] = []
    with started(llama, prefill_tokens=4) as engine:
        short = engine.submit([5], None, dataclasses.replace(GREEDY, max_tokens=30))
        gate = Gate(1)
        short.add_callback(gate)
        short.add_callback(lambda token: seen.append("short"))
        gate.wait()
        stream = submit(engine, long)
        stream.add_callback(lambda token: seen.append("long"))
        gate.open()
        assert stream.result(WAIT) == llama.alone(long)
    assert seen.index("long") >= 8  # a token for each of the steps in which the prompt is read


def test_a_cancelled_row_is_free_within_two_steps(llama: Customers) -> None:
    with started(llama, max_rows=1) as engine:
        endless = engine.submit([5, 6], "customer-1", dataclasses.replace(GREEDY, max_tokens=50))
        endless.add_callback(counted(lambda n: endless.cancel() if n == 3 else None))
        asked = Asked([7, 8], "customer-2", GREEDY)
        waiting, gone = submit(engine, asked), engine.submit([5], None, GREEDY)
        gone.cancel()
        assert waiting.result(WAIT) == llama.alone(asked)
        assert 3 <= len(endless.result(WAIT)) <= 4
        assert gone.result(WAIT) == []
        assert endless.finish_reason == gone.finish_reason == "cancelled"
        assert engine.statistics().finished["cancelled"] == 2
        waiting.cancel()  # too late
        assert waiting.finish_reason == "length"


def test_a_cancelled_prompt_is_read_no_further(llama: Customers) -> None:
    with started(llama, prefill_tokens=2) as engine:
        other = engine.submit([5], None, dataclasses.replace(GREEDY, max_tokens=40))
        gate = Gate(3)
        other.add_callback(gate)
        stream = engine.submit([5] * 30, None, GREEDY)
        gate.wait()
        stream.cancel()
        gate.open()
        assert stream.result(WAIT) == []
        assert len(other.result(WAIT)) == 40
        assert engine.statistics().prompt_tokens < 30


def test_a_row_that_is_cancelled_before_it_is_read_harms_no_other(llama: Customers) -> None:
    asked = [Asked(ids, None, GREEDY) for ids in ([5] * 40, [7], [8])]
    with started(llama, prefill_tokens=4) as engine:
        other = engine.submit([5], None, dataclasses.replace(GREEDY, max_tokens=40))
        gates = [Gate(2), Gate(5)]
        for gate in gates:
            other.add_callback(gate)
        gates[0].wait()
        long, gone, stays = (submit(engine, request) for request in asked)
        gates[0].open()
        gates[1].wait()  # all three are rows, and a part of the long one is read
        gone.cancel()
        gates[1].open()
        assert [stream.result(WAIT) for stream in (long, stays)] == [llama.alone(asked[i]) for i in (0, 2)]
        assert gone.result(WAIT) == []


def test_a_broken_adapter_ends_its_own_requests_only(llama: Customers, tmp_path: Path) -> None:
    shutil.copytree(llama.folder, tmp_path, dirs_exist_ok=True)
    broken = tmp_path / "customer-0" / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    asked = llama.asked(20)
    with Engine(llama.model, llama.params, tmp_path, max_rows=5, eos_ids=()) as engine:
        streams = [submit(engine, request) for request in asked]
        for request, stream in zip(asked, streams, strict=True):
            if request.adapter == "customer-0":
                with pytest.raises(FormatError, match="adapter_model"):
                    stream.result(WAIT)
                with pytest.raises(FormatError, match="adapter_model"):
                    next(iter(stream))
                assert stream.finish_reason is None
            else:
                assert stream.result(WAIT) == llama.alone(request)
        shutil.copytree(llama.folder / "customer-0", tmp_path / "customer-0", dirs_exist_ok=True)
        mended = Asked([5, 6, 7], "customer-0", GREEDY)
        assert submit(engine, mended).result(WAIT) == llama.alone(mended)
    assert any(request.adapter == "customer-0" for request in asked)


def test_values_that_are_not_numbers_end_their_own_answers_only(llama: Customers, engine: Engine) -> None:
    prepared: Any = engine.cache.load("customer-1").prepared
    next(iter(prepared.rules.values())).b.fill_(float("nan"))
    asked = [Asked([5, 6], f"customer-{i}", GREEDY) for i in (0, 1, 2)]
    streams = [submit(engine, request) for request in asked]
    with pytest.raises(NonFiniteError, match="NaN"):
        streams[1].result(WAIT)
    for i in (0, 2):
        assert streams[i].result(WAIT) == llama.alone(asked[i])


def test_a_replaced_folder_is_for_new_requests(llama: Customers, tmp_path: Path) -> None:
    customers = Customers(llama.model, tmp_path, 2)
    asked = Asked([5, 6, 7], "customer-1", dataclasses.replace(GREEDY, max_tokens=20))
    old = customers.alone(asked)
    with started(customers) as engine:
        before = submit(engine, asked)
        gate = Gate(5)
        before.add_callback(gate)
        gate.wait()
        customers.save("customer-1", 7)
        after = submit(engine, asked)
        gate.open()
        assert before.result(WAIT) == old
        assert after.result(WAIT) == customers.alone(asked) != old


def test_a_full_queue_refuses_and_goes_on(llama: Customers) -> None:
    engine = started(llama, max_queue=2)
    asked = llama.asked(3)
    streams = [submit(engine, request) for request in asked[:2]]
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        submit(engine, asked[2])
    assert engine.statistics().waiting == 2
    with engine:
        answers = [stream.result(WAIT) for stream in streams] + [submit(engine, asked[2]).result(WAIT)]
    assert answers == [llama.alone(request) for request in asked]
    assert engine.statistics().requests == 3


def test_closing_finishes_what_is_there(llama: Customers) -> None:
    engine = started(llama)
    asked = llama.asked(12)
    streams = [submit(engine, request) for request in asked]
    engine.start()
    engine.close(timeout=WAIT)
    assert [stream.result(0) for stream in streams] == [llama.alone(request) for request in asked]
    with pytest.raises(ClosedError, match="accepts no more requests"):
        submit(engine, asked[0])
    with pytest.raises(ClosedError, match="cannot be started again"):
        engine.start()
    engine.close()


@pytest.mark.parametrize("how", [{"drain": False}, {"timeout": 0.0}])
def test_closing_at_once_ends_every_stream(how: dict[str, Any], llama: Customers) -> None:
    asked = [
        dataclasses.replace(request, settings=dataclasses.replace(request.settings, max_tokens=40))
        for request in llama.asked(12)
    ]
    engine = started(llama, max_rows=2)
    streams = [submit(engine, request) for request in asked]
    gate = Gate(2)
    streams[0].add_callback(gate)
    ended: list[object] = []
    streams[-1].add_callback(ended.append)
    engine.start()
    gate.wait()
    closing = threading.Thread(target=engine.close, kwargs=how)
    closing.start()
    until(lambda: engine._stopping)
    gate.open()
    closing.join(WAIT)
    assert not closing.is_alive()
    for request, stream in zip(asked, streams, strict=True):
        answer = stream.result(0)
        assert answer == llama.alone(request)[: len(answer)]
    assert streams[-1].finish_reason == "cancelled"
    assert ended == [None]


def test_an_engine_that_was_never_started_ends_its_streams(llama: Customers) -> None:
    engine = started(llama)
    stream = engine.submit([5], "customer-1", GREEDY)
    engine.close()
    assert stream.result(0) == []
    assert stream.finish_reason == "cancelled"


def test_an_error_inside_with_does_not_wait(llama: Customers) -> None:
    with pytest.raises(ZeroDivisionError, match="mine"), started(llama) as engine:  # noqa: PT012
        stream = engine.submit([5], None, dataclasses.replace(GREEDY, max_tokens=60))
        raise ZeroDivisionError("mine")
    assert stream.done


@pytest.mark.parametrize(
    ("ids", "adapter", "settings", "error", "message"),
    [
        ([], None, GREEDY, ConfigError, "at least one token"),
        ([64], None, GREEDY, ConfigError, "from 0 to 63, got 64"),
        ([-1], None, GREEDY, ConfigError, "from 0 to 63, got -1"),
        ([True], None, GREEDY, ConfigError, "got True"),
        ("text", None, GREEDY, TypeError, "prompt_ids: expected a list of token ids, got 'text'"),
        ([5], None, {"max_tokens": 3}, TypeError, "settings: expected Settings"),
        ([5] * 53, None, GREEDY, TooLongError, "53 tokens and max_tokens=12 are 65, and 64 are possible"),
        ([5], "customer-99", GREEDY, UnknownAdapterError, "no adapter 'customer-99'. Near names: customer-9"),
        ([5], "../adapters", GREEDY, UnknownAdapterError, "no adapter"),
    ],
)
def test_bad_requests_are_refused_at_once(
    ids: Any, adapter: str | None, settings: Any, error: type[Exception], message: str, llama: Customers
) -> None:
    engine = started(llama)
    with pytest.raises(error, match=message):
        engine.submit(ids, adapter, settings)
    assert engine.statistics().requests == engine.statistics().waiting == 0


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"max_queue": True}, {"max_length": -1}, {"prefill_tokens": 2.5}])
def test_bad_options_are_named(options: dict[str, Any], llama: Customers) -> None:
    with pytest.raises(ConfigError, match=f"Engine: {next(iter(options))}: expected a positive int"):
        started(llama, **options)


def test_a_cache_for_other_weights_is_refused(llama: Customers) -> None:
    cache = fl.AdapterCache(llama.model, llama.folder, 2**20, params=fl.base_params(llama.model))
    with pytest.raises(ConfigError, match="Engine: cache: it was made with other params"):
        Engine(llama.model, llama.params, cache)
    asked = [Asked([5, 6], f"customer-{i}", GREEDY) for i in range(3)]
    plain = fl.AdapterCache(llama.model, llama.folder, 2**20)
    with Engine(llama.model, llama.params, plain, eos_ids=()) as engine:
        streams = [submit(engine, request) for request in asked]
        assert [stream.result(WAIT) for stream in streams] == [llama.alone(request) for request in asked]


def test_end_tokens_of_the_model_end_answers(llama: Customers) -> None:
    asked = Asked([5, 6, 7], "customer-1", GREEDY)
    end = llama.alone(asked)[4]
    ended = dataclasses.replace(asked, settings=dataclasses.replace(GREEDY, stop_ids=(end,)))
    llama.model.generation_config.eos_token_id = [end]
    try:
        with Engine(llama.model, llama.params, llama.folder) as engine:
            stream = submit(engine, asked)
            assert stream.result(WAIT) == llama.alone(ended)
            assert stream.finish_reason == "stop"
            assert engine.eos_ids == {end}
    finally:
        llama.model.generation_config.eos_token_id = None


def test_nothing_stays_of_what_has_ended(llama: Customers) -> None:
    """What days of requests would pile up: adapters, rows, slots and threads, counted after each round."""
    size = fl.AdapterCache(llama.model, llama.folder, 2**20, params=llama.params).load("customer-1").size
    cache = fl.AdapterCache(llama.model, llama.folder, 4 * size, params=llama.params)
    counts, before = [], threads()
    with Engine(llama.model, llama.params, cache, max_rows=4, eos_ids=()) as engine:
        for n in range(3):
            streams = [submit(engine, request) for request in llama.asked(15, seed=n % 2)]
            for i, stream in enumerate(streams):
                if i % 5 == 0:
                    stream.cancel()
            for stream in streams:
                stream.result(WAIT)
            engine.submit([5], None, dataclasses.replace(GREEDY, max_tokens=2)).result(WAIT)
            gc.collect()
            alive = [type(thing) for thing in gc.get_objects()]
            counts.append(alive.count(Stream) - len(streams))
            assert alive.count(LoadedAdapter) <= 4 + 4
            assert threads() <= before + 3
            slots = sum(len(pool.held) for pool in cache._slots._pools.values())
            assert slots <= 4 * 2 * len(cache._slots._pools)
        assert engine.statistics().waiting == 0
    assert len(set(counts[1:])) == 1
    until(lambda: threads() <= before)


def until(right: Callable[[], bool]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + WAIT
    while not right():
        assert time.monotonic() < end
        time.sleep(0.01)


def threads() -> int:
    return sum(thread.name.startswith("funclora") for thread in threading.enumerate())

"""Sixteen clients with an adapter each: funclora's engine, PEFT's mixed batches, and one merged model after the other.

    python examples/benchmark_serving.py              everything; writes docs/benchmarks-serving.json and .md
    python examples/benchmark_serving.py --quick      tiny sizes and two rounds: shows that it runs, measures nothing
    python examples/benchmark_serving.py --page-only  the page again, from the .json

Every client sends a request, reads the answer, and sends the next one. All contenders answer the same requests; before
anything is timed, their answers must agree.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark_many import RANK, Setup
from benchmark_tools import (
    HOW,
    Bench,
    Benchmark,
    Goal,
    Job,
    Peaks,
    Result,
    Row,
    facts,
    head,
    measure,
    mib,
    peak,
    table_of_goals,
    table_row,
)  # fmt: skip
from torch import Tensor

import funclora as fl
from funclora.serving import Engine, Settings

CLIENTS = 16
BASE, PEFT, MERGED = "engine, no adapters", "PEFT, fixed batches", "merged, in turn"
LORA, DORA = f"engine, {CLIENTS} LoRA", f"engine, {CLIENTS} DoRA"


@dataclasses.dataclass(frozen=True)
class Request:
    ids: list[int]
    tokens: int


@dataclasses.dataclass
class Turn:
    """What one contender did with the requests.

    Attributes:
        first: seconds from each request to its first token.
        answers: the tokens of each client's requests.
    """

    first: list[float] = dataclasses.field(default_factory=list)
    answers: list[list[list[int]]] = dataclasses.field(default_factory=lambda: [[] for _ in range(CLIENTS)])


# The requests of each client, one after the other.
Work = list[list[Request]]
Contender = Callable[[Work], Turn]


def work(setup: Setup, requests: int, quick: bool) -> Work:
    chosen = random.Random(0)
    most = 8 if quick else 48
    return [
        [
            Request([chosen.randrange(setup.vocab) for _ in range(chosen.randint(4, most))], chosen.randint(4, most))
            for _ in range(requests)
        ]
        for _ in range(CLIENTS)
    ]


def with_engine(engine: Engine, names: Sequence[str | None]) -> Contender:
    def run(asked: Work) -> Turn:
        turn = Turn()

        def client(i: int) -> None:
            for request in asked[i]:
                start = time.perf_counter()
                stream = engine.submit(request.ids, names[i], Settings(max_tokens=request.tokens, temperature=0.0))
                ids: list[int] = []
                for token in stream:
                    if not ids:
                        turn.first.append(time.perf_counter() - start)
                    ids.append(token.id)
                turn.answers[i].append(ids)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return turn

    return run


class Times(transformers.generation.BaseStreamer):
    """When each step of `generate` gave its tokens."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, rows: list[list[int]], tokens: int, **options: Any) -> tuple[list[list[int]], list[float]]:
    """The new tokens of rows that are filled up on the left, and when each step came."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    times = Times()
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0,
        eos_token_id=None, streamer=times, **options,
    )  # fmt: skip
    return out[:, longest:].tolist(), times.at[1:]  # the first time is that of the prompt


def with_peft(model: Any, names: list[str]) -> Contender:
    """A request of every client in each batch, which ends with its longest answer."""

    def run(asked: Work) -> Turn:
        turn = Turn()
        sent = [time.perf_counter()] * len(asked)
        for batch in zip(*asked, strict=True):
            longest = max(request.tokens for request in batch)
            new, at = generate(model, [request.ids for request in batch], longest, adapter_names=names)
            for i, request in enumerate(batch):
                turn.first.append(at[0] - sent[i])
                turn.answers[i].append(new[i][: request.tokens])
                sent[i] = at[request.tokens - 1]  # the client has its answer, and sends the next request
        return turn

    return run


def in_turn(models: Sequence[Any]) -> Contender:
    """One request after the other, in the order in which they come, each with its customer's merged model."""

    def run(asked: Work) -> Turn:
        turn = Turn()
        sent = [time.perf_counter()] * len(asked)
        for requests in zip(*asked, strict=True):
            for i, request in enumerate(requests):
                (ids,), at = generate(models[i], [request.ids], request.tokens)
                turn.first.append(at[0] - sent[i])
                turn.answers[i].append(ids)
                sent[i] = at[-1]
        return turn

    return run


def contenders(setup: Setup, folder: Path) -> dict[str, Callable[[], Contender]]:
    """By name; each is built when it is wanted. The engine is one for all adapters."""

    @functools.cache
    def engine() -> Engine:
        for method in ("LoRA", "DoRA"):
            for i in range(CLIENTS):
                fl.save_peft(folder / f"{method}-{i}", setup.member(i, method=method), setup.config(method))
        setup.model.generation_config = transformers.GenerationConfig()
        started = Engine(setup.model, setup.params, folder, max_rows=CLIENTS)
        started.start()
        return started

    def merged() -> Contender:
        return in_turn([setup.merged(i) for i in range(CLIENTS)])

    return {
        BASE: lambda: with_engine(engine(), [None] * CLIENTS),
        LORA: lambda: with_engine(engine(), [f"LoRA-{i}" for i in range(CLIENTS)]),
        DORA: lambda: with_engine(engine(), [f"DoRA-{i}" for i in range(CLIENTS)]),
        PEFT: lambda: with_peft(setup.with_peft(CLIENTS), [f"m{i}" for i in range(CLIENTS)]),
        MERGED: merged,
    }


def agree(turns: dict[str, Turn]) -> None:
    """The same adapters must give the same answers. Rounding may decide a token, and then all after it."""
    for name in (PEFT, MERGED):
        pairs = [
            pair
            for one, other in zip(turns[LORA].answers, turns[name].answers, strict=True)
            for pair in zip(one, other, strict=True)
        ]
        same = sum(a == b for a, b in pairs)
        if same < 0.9 * len(pairs):
            raise RuntimeError(f"{name} and {LORA}: only {same} of {len(pairs)} answers are the same")
    if turns[LORA].answers == turns[BASE].answers:
        raise RuntimeError("the adapters do nothing")


def requests(bench: Bench, setup: Setup) -> Work:
    return work(setup, 1 if bench.quick else 4, bench.quick)


def jobs(bench: Bench, result: Result) -> Iterator[Job]:
    def serve() -> None:
        setup = Setup(bench)
        asked = requests(bench, setup)
        given = [request for some in asked for request in some]
        lengths = {"prompts": [len(r.ids) for r in given], "answers": [r.tokens for r in given]}
        result.about |= {what: f"{min(some)} to {max(some)}" for what, some in lengths.items()}
        result.about |= {"rank": RANK, "requests": len(given), "tokens": sum(lengths["answers"]), "first": {}}
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            runs = {name: make() for name, make in contenders(setup, Path(folder)).items()}
            agree({name: run(asked) for name, run in runs.items()})
            first: dict[str, list[float]] = {name: [] for name in runs}
            timed = {name: (lambda n=name, run=run: first[n].extend(run(asked).first)) for name, run in runs.items()}
            gc.collect()
            gc.freeze()  # the models: collections of garbage would look through them again and again
            result.row("serving").seconds = measure(bench, timed, warm=False)
            gc.unfreeze()
        result.about["first"] = {name: [statistics.median(some), late(some)] for name, some in first.items()}

    yield Job("time", serve)


def memory_of(bench: Bench, name: str) -> Peaks:
    setup = Setup(bench)
    asked = requests(bench, setup)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        run = contenders(setup, Path(folder))[name]()
        setup.member.cache_clear()
        return {"serving": {name: peak(lambda: run(asked))}}


def late(seconds: Sequence[float]) -> float:
    """What 95 % do not exceed."""
    return sorted(seconds)[int(0.95 * len(seconds))]


# --- the page --------------------------------------------------------------------------------------------------

ADAPTERS = """two small products in each layer for every row, and the calls through Python that follow rows; the same
as in [mixed batches](benchmarks-many.md), besides the reading of 16 adapters"""
BATCHES = """the floor is the engine without adapters; between them are the costs of adapters, and of prompts that are
read between the steps of other rows"""


def goals(row: Row) -> Iterator[Goal]:
    """Tokens in a second: the contenders generate the same ones, so it is the other's time by the own one."""
    without_adapters = row.ratio(PEFT, BASE)
    for name, to, reach, floor, missed in (
        (LORA, BASE, 0.7, 1 / 1.04, ADAPTERS),  # 1.04 is the floor of a decode step
        (DORA, BASE, 0.7, 1 / 1.04, ADAPTERS),
        (LORA, PEFT, 3.0, without_adapters.median if without_adapters else None, BATCHES),
    ):
        found, peaks = row.ratio(to, name), (row.peaks.get(name), row.peaks.get(to))
        yield Goal(name, to, reach, " ".join(missed.split()), found, floor, peaks, at_least=True)


def page(result: Result) -> Iterator[str]:
    about, row = result.about, result.find("serving")
    yield "# Benchmarks of serving\n"
    yield f"{CLIENTS} clients, each with its own adapter, send one request after the other: prompts of"
    yield f"{about['prompts']} tokens, answers of {about['answers']} tokens, {about['requests']} requests in all. The"
    yield "base is a Llama (6 layers, 512 wide, random weights, float32) with adapters of rank"
    yield f"{about['rank']} on all its linear layers.\n"
    yield '- "engine" is [`funclora.serving.Engine`](api.md#funclora.serving.Engine): rows join and leave at each step.'
    yield '- "PEFT, fixed batches" is `generate` with `adapter_names`: one request of each client in a batch, which'
    yield "  ends with its longest answer."
    yield '- "merged, in turn" has a merged model for each customer in memory, and answers one request at a time.\n'
    yield HOW
    yield "Here they are ratios of generated tokens in a second. The time to the first token counts from the moment at"
    yield "which a client has its last answer.\n"
    yield from facts(result)
    yield "\n## Numbers to reach\n"
    yield from table_of_goals(goals(row))
    yield "\n## All contenders\n"
    yield from head("", "tokens in a second", "first token, median (s)", "95 % (s)", "peak MiB")
    for name in row.seconds:
        first, last = about["first"][name]
        peaks = mib(row.peaks[name]) if name in row.peaks else "–"
        yield table_row(name, f"{about['tokens'] / row.median(name):.0f}", f"{first:.2f}", f"{last:.2f}", peaks)


BENCHMARK = Benchmark(
    "benchmarks-serving", __file__, ("transformers", "peft"), jobs, page,
    apart=lambda bench: (LORA,) if bench.quick else (BASE, LORA, DORA, PEFT, MERGED), memory_of=memory_of,
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    main()

"""Sixteen clients with an adapter each: funclora's engine, PEFT's mixed batches, and one merged model after the other.

    python examples/benchmark_serving.py            everything; writes docs/benchmarks-serving.md and .json
    python examples/benchmark_serving.py --quick    tiny sizes and two rounds: shows that it runs, measures nothing

Every client sends a request, reads the answer, and sends the next one. The contenders take turns as in benchmark.py and
answer the same requests; before anything is timed, their answers must agree.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import random
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from benchmark import Bench, progress
from benchmark_many import RANK, Setup
from benchmark_plot import Ratio, head, machine, replace, table_row
from torch import Tensor

import funclora as fl
from funclora.serving import Engine, Settings

CLIENTS = 16
# What must be reached: (contender, compared with, how many times as many tokens a second).
TARGETS = [
    (f"engine, {CLIENTS} LoRA", "engine, no adapters", 0.7),
    (f"engine, {CLIENTS} DoRA", "engine, no adapters", 0.7),
    (f"engine, {CLIENTS} LoRA", "PEFT, fixed batches", 3.0),
]


@dataclasses.dataclass(frozen=True)
class Request:
    ids: list[int]
    tokens: int


@dataclasses.dataclass
class Turn:
    """What one contender did in one round.

    Attributes:
        tokens: generated tokens that were asked for.
        seconds: from the first request to the last token.
        cpu: seconds of computation in all threads.
        first: seconds from each request to its first token.
        answers: the tokens of each client's requests.
    """

    tokens: int
    seconds: float
    cpu: float
    first: list[float]
    answers: list[list[list[int]]]


class Clock:
    """The time of a turn, from now on."""

    def __init__(self) -> None:
        self.start, self._cpu = time.perf_counter(), time.process_time()

    def turn(self, first: list[float], answers: list[list[list[int]]]) -> Turn:
        seconds, cpu = time.perf_counter() - self.start, time.process_time() - self._cpu
        return Turn(sum(len(ids) for some in answers for ids in some), seconds, cpu, first, answers)


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
        first: list[float] = []
        answers: list[list[list[int]]] = [[] for _ in asked]

        def client(i: int) -> None:
            for request in asked[i]:
                start = time.perf_counter()
                stream = engine.submit(request.ids, names[i], Settings(max_tokens=request.tokens, temperature=0.0))
                ids: list[int] = []
                for token in stream:
                    if not ids:
                        first.append(time.perf_counter() - start)
                    ids.append(token.id)
                answers[i].append(ids)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(len(asked))]
        clock = Clock()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return clock.turn(first, answers)

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
        first: list[float] = []
        answers: list[list[list[int]]] = [[] for _ in asked]
        clock = Clock()
        sent = [clock.start] * len(asked)
        for batch in zip(*asked, strict=True):
            longest = max(request.tokens for request in batch)
            new, at = generate(model, [request.ids for request in batch], longest, adapter_names=names)
            for i, request in enumerate(batch):
                first.append(at[0] - sent[i])
                answers[i].append(new[i][: request.tokens])
                sent[i] = at[request.tokens - 1]  # the client has its answer, and sends the next request
        return clock.turn(first, answers)

    return run


def in_turn(models: Sequence[Any]) -> Contender:
    """One request after the other, in the order in which they come, each with its customer's merged model."""

    def run(asked: Work) -> Turn:
        first: list[float] = []
        answers: list[list[list[int]]] = [[] for _ in asked]
        clock = Clock()
        sent = [clock.start] * len(asked)
        for requests in zip(*asked, strict=True):
            for i, request in enumerate(requests):
                (ids,), at = generate(models[i], [request.ids], request.tokens)
                first.append(at[0] - sent[i])
                answers[i].append(ids)
                sent[i] = at[-1]
        return clock.turn(first, answers)

    return run


def contenders(setup: Setup, folder: Path) -> Iterator[tuple[str, Contender]]:
    for method in ("LoRA", "DoRA"):
        config = fl.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_dora=method == "DoRA")
        for i in range(CLIENTS):
            fl.save_peft(folder / f"{method}-{i}", setup.member(i, method=method), config)
    setup.model.generation_config = transformers.GenerationConfig()
    engine = Engine(setup.model, setup.params, folder, max_rows=CLIENTS)
    engine.start()
    yield "engine, no adapters", with_engine(engine, [None] * CLIENTS)
    for method in ("LoRA", "DoRA"):
        yield f"engine, {CLIENTS} {method}", with_engine(engine, [f"{method}-{i}" for i in range(CLIENTS)])
    yield "PEFT, fixed batches", with_peft(setup.with_peft(CLIENTS), [f"m{i}" for i in range(CLIENTS)])
    merged = []
    for i in range(CLIENTS):
        merged.append(copy.deepcopy(setup.model))
        merged[-1].load_state_dict(fl.merge(setup.params, setup.member(i)))
    yield "merged, in turn", in_turn(merged)


def agree(turns: dict[str, Turn]) -> None:
    """The same adapters must give the same answers. Rounding may decide a token, and then all after it."""
    names = [f"engine, {CLIENTS} LoRA", "PEFT, fixed batches", "merged, in turn"]
    for name in names[1:]:
        pairs = [
            pair
            for one, other in zip(turns[names[0]].answers, turns[name].answers, strict=True)
            for pair in zip(one, other, strict=True)
        ]
        same = sum(a == b for a, b in pairs)
        if same < 0.9 * len(pairs):
            raise RuntimeError(f"{name} and {names[0]}: only {same} of {len(pairs)} answers are the same")
    if turns[names[0]].answers == turns["engine, no adapters"].answers:
        raise RuntimeError("the adapters do nothing")


def ratio(rounds: dict[str, list[Turn]], name: str, to: str, clock: str) -> Ratio:
    """Of the tokens in a second of a clock, round by round."""
    pairs = zip(rounds[name], rounds[to], strict=True)
    ratios = [a.tokens / getattr(a, clock) * getattr(b, clock) / b.tokens for a, b in pairs]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def late(seconds: Sequence[float]) -> float:
    """What 95 % do not exceed."""
    return sorted(seconds)[int(0.95 * len(seconds))]


def page(about: dict[str, Any], rounds: dict[str, list[Turn]]) -> Iterator[str]:
    yield "# Benchmarks of serving\n"
    yield f"{CLIENTS} clients, each with its own adapter, send one request after the other: prompts of"
    yield f"{about['prompts']} tokens, answers of {about['answers']} tokens, {about['requests']} requests in all. The"
    yield "base is a Llama (6 layers, 512 wide, random weights, float32) with adapters of rank"
    yield f"{RANK} on all its linear layers.\n"
    yield '- "engine" is [`funclora.serving.Engine`](api.md#funclora.serving.Engine): rows join and leave at each step.'
    yield '- "PEFT, fixed batches" is `generate` with `adapter_names`: one request of each client in a batch, which'
    yield "  ends with its longest answer."
    yield '- "merged, in turn" has a merged model for each customer in memory, and answers one request at a time.\n'
    yield "A speed is the median over alternating rounds of generated tokens in a second. A ratio is the median of the"
    yield "ratios within each round, with the lowest and the highest in brackets; it is also given for seconds of"
    yield "computation, which other programs on the machine disturb less. The time to the first token counts from the"
    yield "moment at which a client has its last answer.\n"
    yield f"- {about['machine']}, {about['threads']} threads; load when it began: {about['load']:.1f}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    yield f"- {versions}, {about['date']}, {about['minutes']:.0f} minutes"
    yield f"- `{about['command']}`\n"
    yield from head("", "tokens in a second", "in a second of computation", "first token, median (s)", "95 % (s)")
    for name, turns in rounds.items():
        first = [seconds for turn in turns for seconds in turn.first]
        speeds = [
            statistics.median(turn.tokens / getattr(turn, clock) for turn in turns) for clock in ("seconds", "cpu")
        ]
        yield table_row(
            name, *(f"{speed:.0f}" for speed in speeds), f"{statistics.median(first):.2f}", f"{late(first):.2f}"
        )
    yield "\n## Numbers to reach\n"
    yield from head("tokens in a second of", "against", "reach", "measured", "by computation", "reached")
    for name, to, reach in TARGETS:
        found, computed = (ratio(rounds, name, to, clock) for clock in ("seconds", "cpu"))
        yield table_row(name, to, f"≥ {reach}", found, computed, "yes" if found.median >= reach else "**no**")
    yield "\nWhat different adapters cost beyond the base is the cost of [mixed batches](benchmarks-many.md): each"
    yield "position is tracked to its row, and each adapter is read."


def main(argv: Sequence[str] | None = None) -> dict[str, list[Turn]]:
    parser = argparse.ArgumentParser(description="Serving many adapters, against PEFT and merged models.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help='nothing unless "serving" has this in it')
    parser.add_argument("--out", type=Path, help="folder to write to; docs, but a new one in /tmp for a quick run")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4, help="of each client in a round")
    parser.add_argument("--threads", type=int, help="of torch; by default as many as it takes")
    options = parser.parse_args(argv)
    if options.only not in "serving":
        return {}
    import datetime
    import os

    if options.threads:
        torch.set_num_threads(options.threads)

    setup = Setup(Bench(options.device, options.quick, 1, ""))
    asked = work(setup, 1 if options.quick else options.requests, options.quick)
    words = ["python", "examples/benchmark_serving.py", *(sys.argv[1:] if argv is None else argv)]
    prompts, answers = ([f(r) for some in asked for r in some] for f in (lambda r: len(r.ids), lambda r: r.tokens))
    about: dict[str, Any] = {
        "machine": machine(options.device), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}", "command": shlex.join(words),
        "prompts": f"{min(prompts)} to {max(prompts)}", "answers": f"{min(answers)} to {max(answers)}",
        "requests": len(prompts),
    }  # fmt: skip
    start = time.perf_counter()
    n = 2 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder, progress(n + 1) as tick, torch.no_grad():
        runs = dict(contenders(setup, Path(folder)))
        tick("warm")
        agree({name: run(asked) for name, run in runs.items()})
        rounds: dict[str, list[Turn]] = {name: [] for name in runs}
        gc.collect()
        gc.freeze()  # the models: collections of garbage would look through them again and again
        for i in range(n):
            tick(f"round {i + 1}")
            order = [*runs][i % len(runs) :] + [*runs][: i % len(runs)]
            for name in order if i % 2 == 0 else reversed(order):
                rounds[name].append(runs[name](asked))
        gc.unfreeze()
    about["minutes"] = (time.perf_counter() - start) / 60
    out = options.out or (Path(tempfile.mkdtemp(prefix="benchmark-")) if options.quick else Path("docs"))
    out.mkdir(parents=True, exist_ok=True)
    seconds = {
        name: [[turn.tokens, turn.seconds, turn.cpu, turn.first] for turn in turns] for name, turns in rounds.items()
    }
    replace(out / "benchmarks-serving.json", json.dumps({"about": about, "turns": seconds}).encode() + b"\n")
    replace(out / "benchmarks-serving.md", ("\n".join(page(about, rounds)) + "\n").encode())
    print(f"{about['minutes']:.1f} minutes. Written: {out / 'benchmarks-serving.md'}")
    return rounds


if __name__ == "__main__":
    main()

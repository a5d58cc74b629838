"""How time and memory grow with the numbers of targets, members, ranks and tokens.

    python examples/benchmark_growth.py               everything; writes docs/benchmarks-growth.json, .md and .png
    python examples/benchmark_growth.py --quick       small numbers: shows that it runs, measures nothing
    python examples/benchmark_growth.py --only "load" what has that in its name: "load, targets"
    python examples/benchmark_growth.py --page-only   the page again, from the .json

Each function is called with growing numbers of one kind, on small layers, so that its own work is what counts. The
exponent of a growth is the slope of a line through the largest three numbers, in logarithms: 1 is linear. Times are
those of the process, not of the clock, in one thread.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from benchmark_tools import Bench, Benchmark, Job, Result, Row, Run, facts, head, table_row
from torch import Tensor, nn

import funclora as fl
from funclora._torch.memory import Peak

WIDTH, WIDE = 16, 256  # WIDE where the rank grows, which cannot be larger than the width
LIMIT = 1.1  # a larger exponent is a defect
# What a larger exponent comes from, by curve and by what grows.
REASONS = {
    ("plain, targets", "time"): "torch alone; the processor's caches no longer hold all weights",
    ("train, targets", "time"): "the products and gradients are those of `plain`, which grows faster still",
}


class Numbers(NamedTuple):
    """How much of each there is."""

    targets: int = 8
    members: int = 4
    rank: int = 4
    tokens: int = 4


RANGES = {
    "targets": (10, 100, 1000, 4000),
    "members": (1, 16, 128, 1024),
    "rank": (1, 16, 64, 256),
    "tokens": (1, 64, 1024, 4096),
}
QUICK = {"targets": (2, 4, 8), "members": (1, 2, 4), "rank": (1, 2, 4), "tokens": (1, 2, 4)}


def exponent(values: dict[int, float]) -> float:
    """The slope of log(value) over log(number) at the largest three numbers; 0 where there is nothing."""
    points = [(math.log(n), math.log(v)) for n, v in values.items() if v > 0][-3:]
    if len(points) < 2:
        return 0.0
    x, y = zip(*points, strict=True)
    return statistics.linear_regression(x, y).slope


def growths(row: Row) -> dict[str, dict[int, float]]:
    """Seconds and bytes by the number of something."""
    return {
        "time": {int(n): statistics.median(seconds) for n, seconds in row.seconds.items()},
        "memory": {int(n): float(size) for n, size in row.peaks.items()},
    }


# --- what is called --------------------------------------------------------------------------------------------


class Setup:
    """A chain of linear layers, and everything that a function of some numbers needs."""

    def __init__(self, numbers: Numbers, folder: Path, width: int = WIDTH) -> None:
        torch.manual_seed(0)
        self.numbers, self.folder = numbers, folder
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(numbers.targets))).eval()
        self.params = fl.base_params(self.model)
        self.config = fl.LoraConfig(r=numbers.rank, lora_alpha=numbers.rank, target_modules="all-linear")
        self.x = torch.randn(1, numbers.tokens, width)

    def adapters(self) -> dict[str, Any]:
        """Without `init`, whose time is not that of what comes after it."""
        width, r = self.x.shape[-1], self.numbers.rank
        return {name: fl.LoRA(torch.randn(r, width) / width, torch.randn(width, r)) for name in self.params}

    def stack(self) -> fl.Stack[Any]:
        return fl.stack([self.adapters() for _ in range(self.numbers.members)])

    def rows(self) -> Tensor:
        return self.x.expand(self.numbers.members, -1, -1)


def init(s: Setup) -> Run:
    return lambda: fl.init(s.model, s.config, params=s.params)


def bind(s: Setup) -> Run:
    adapters = s.adapters()
    return lambda: fl.bind(s.model, s.params, adapters)


def apply(s: Setup) -> Run:
    adapters = s.adapters()
    return torch.no_grad()(lambda: fl.apply(s.model, s.params, adapters, s.x))


def train(s: Setup) -> Run:
    optimizer, now = fl.optim.adamw(1e-3), s.adapters()  # type: Any, Any
    step = fl.train_step(s.model, loss, optimizer)
    state = optimizer.init(now)
    return lambda: step(s.params, now, state, s.x)


def plain(s: Setup) -> Run:
    """The products and gradients of a training step, without funclora: how torch's own time grows."""
    pairs = [(rule.a.requires_grad_(), rule.b.requires_grad_()) for rule in s.adapters().values()]

    def run() -> None:
        y = s.x
        for weight, (a, b) in zip(s.params.values(), pairs, strict=True):
            y = F.linear(y, weight) + F.linear(F.linear(y, a), b)
        torch.autograd.grad(F.mse_loss(y, s.x), [leaf for pair in pairs for leaf in pair])

    return run


def save(s: Setup) -> Run:
    adapters, config = s.adapters(), s.config
    return lambda: fl.save_peft(s.folder / "saved", adapters, config)


def load(s: Setup) -> Run:
    fl.save_peft(s.folder / "loaded", s.adapters(), s.config)
    return lambda: fl.load_peft(s.folder / "loaded", s.model)


def merge(s: Setup) -> Run:
    adapters = s.adapters()
    return lambda: fl.merge(s.params, adapters)


def stack(s: Setup) -> Run:
    members = [s.adapters() for _ in range(s.numbers.members)]
    return lambda: fl.stack(members)


def route(s: Setup) -> Run:
    members, ids = s.stack(), list(range(s.numbers.members))
    return lambda: fl.bind(s.model, s.params, fl.route(members, ids))


def routed(s: Setup) -> Run:
    bound = fl.bind(s.model, s.params, fl.route(s.stack(), list(range(s.numbers.members))))
    rows = s.rows()
    return torch.no_grad()(lambda: bound(rows))


def cache(s: Setup) -> Run:
    """Loads every adapter, and routes a batch of all of them."""
    names = [f"m{i}" for i in range(s.numbers.members)]
    for name in names:
        fl.save_peft(s.folder / name, s.adapters(), s.config)

    def run() -> None:
        held = fl.AdapterCache(s.model, s.folder, 2**34, params=s.params)
        held.route(names)

    return run


def population(s: Setup) -> Run:
    members = s.stack()
    optimizer = fl.optim.per_member(fl.optim.adamw, lr=[1e-3] * len(members))
    step = fl.population_step(s.model, loss, optimizer)
    state, batch = optimizer.init(members), s.rows()[:, None]
    return lambda: step(s.params, members, state, batch)


def loss(bound: Any, x: Tensor) -> Tensor:
    return F.mse_loss(bound(x), x)


ONE = (init, bind, apply, train, save, load, merge)
MANY = (stack, route, routed, cache, population)
# Which functions depend on which numbers.
GROWTHS: dict[str, tuple[Callable[[Setup], Run], ...]] = {
    "targets": (*ONE, *MANY, plain),
    "members": MANY,
    "rank": (init, apply, train, save, load, merge, stack, routed, cache, population),
    "tokens": (apply, train, routed, population),
}


def measure(work: Callable[[Setup], Run], numbers: Numbers, width: int, seconds: float) -> tuple[float, int]:
    """Seconds of a call, and the bytes of the tensors that it makes."""
    with tempfile.TemporaryDirectory() as folder:
        run = work(Setup(numbers, Path(folder), width))
        with Peak() as memory:
            run()
        peak = memory.peak
        gc.collect()
        gc.disable()  # its pauses depend on all that there is
        try:
            times: list[float] = []
            end = time.process_time() + seconds
            while len(times) < 2 or (time.process_time() < end and len(times) < 50):
                start = time.process_time()
                run()
                times.append(time.process_time() - start)
        finally:
            gc.enable()
        return min(times), peak


def jobs(bench: Bench, result: Result) -> Iterator[Job]:
    result.about["threads"] = 1
    del result.about["rounds"]  # there are none

    def grow(work: Callable[[Setup], Run], axis: str) -> None:
        torch.set_num_threads(1)
        row = result.row(f"{work.__name__}, {axis}")
        for n in (QUICK if bench.quick else RANGES)[axis]:
            numbers, width = Numbers()._replace(**{axis: n}), WIDE if axis == "rank" else WIDTH
            seconds, row.peaks[str(n)] = measure(work, numbers, width, 0.0 if bench.quick else 0.2)
            row.seconds[str(n)] = [seconds]

    for axis, some in GROWTHS.items():
        for work in some:
            yield Job(f"{work.__name__}, {axis}", functools.partial(grow, work, axis))


# --- the page --------------------------------------------------------------------------------------------------


def page(result: Result) -> Iterator[str]:
    yield "# Benchmarks of growth\n"
    others = ", ".join(f"{value} {name}" for name, value in Numbers()._asdict().items())
    yield "How the cost of a function grows with the numbers of targets, members, ranks and tokens. All layers are"
    yield f"linear and {WIDTH} wide ({WIDE} where the rank grows), so that it is the function's own work that counts."
    yield f"The other numbers stay at {others}. The exponent is the slope at the largest three numbers: 1 is linear,"
    yield f"less contains a part that stays the same, and more than {LIMIT} is a defect. A time is that of the process"
    yield "in one thread, the least of several calls. Memory is the peak of the tensors that a call makes. `routed` is"
    yield "a batch of all members, `cache` loads them all from files, and `plain` is what `train` computes, in torch"
    yield "alone.\n"
    yield from facts(result)
    yield "\n## Numbers to reach\n"
    yield f"Exponents of at most {LIMIT}, of time and of memory."
    missed = [
        f"- **missed**: {what} of {name.replace(',', ' over')}: {exponent(values):.2f}. Reason: {reason}"
        for name, row in result.rows.items()
        for what, values in growths(row).items()
        if round(exponent(values), 2) > LIMIT and (reason := REASONS.get((name, what), "not known"))
    ]
    yield from ["", *missed] if missed else ["All are reached."]
    yield "\n![Time by the number of each](benchmarks-growth.png)"
    for axis, rows in by_axis(result).items():
        numbers = next(iter(rows.values())).seconds
        yield f"\n## {axis.capitalize()}\n"
        yield from head("ms at", *numbers, "exponent", "MiB at the most", "exponent")
        for work, row in rows.items():
            of_time, of_memory = (f"{exponent(values):.2f}" for values in growths(row).values())
            times = [f"{1e3 * statistics.median(seconds):.3g}" for seconds in row.seconds.values()]
            yield table_row(f"`{work}`", *times, of_time, f"{max(row.peaks.values()) / 2**20:.1f}", of_memory)


def by_axis(result: Result) -> dict[str, dict[str, Row]]:
    """The rows by what grows, and by function."""
    names = [name.split(", ") for name in result.rows]
    return {
        axis: {work: result.rows[f"{work}, {axis}"] for work, of in names if of == axis}
        for axis in dict.fromkeys(axis for _, axis in names)
    }


def draw(result: Result) -> Any:
    from matplotlib.figure import Figure

    axes = by_axis(result)
    figure = Figure((4 * len(axes), 4), layout="constrained")
    works = list(dict.fromkeys(work for rows in axes.values() for work in rows))
    for (axis, rows), plot in zip(axes.items(), figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
        times = {work: growths(row)["time"] for work, row in rows.items()}
        for work, values in times.items():
            colour, style = f"C{works.index(work) % 10}", "-" if works.index(work) < 10 else "--"
            plot.plot([*values], [*values.values()], style, color=colour, marker="o", markersize=3, label=work)
        ends = [*next(iter(times.values()))][-2:]
        top = 1.3 * max([*values.values()][-1] for values in times.values())
        plot.plot(ends, [top * ends[0] / ends[1], top], color="black", linestyle=":", label="linear")
        plot.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
        plot.grid(alpha=0.3)
        plot.legend(fontsize=6, ncols=2)
    return figure


BENCHMARK = Benchmark("benchmarks-growth", __file__, (), jobs, page, draw)
main = BENCHMARK.main

if __name__ == "__main__":
    main()

"""How time and memory grow with the numbers of targets, members, ranks and tokens.

    python examples/benchmark_growth.py               everything; writes docs/benchmarks-growth.md, .png and .json
    python examples/benchmark_growth.py --quick       small numbers: shows that it runs, measures nothing
    python examples/benchmark_growth.py --only "load" what has that in its name: "load, targets"

Each function is called with growing numbers of one kind, on small layers, so that its own work is what counts. The
exponent of a growth is the slope of a line through the largest three numbers, in logarithms: 1 is linear. Times are
those of the process, not of the clock, in one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from benchmark_plot import head, machine, progress, replace, table_row
from torch import Tensor, nn

import funclora as fl
from funclora._torch.memory import Peak

WIDTH, WIDE = 16, 256  # WIDE where the rank grows, which cannot be larger than the width
LIMIT = 1.1  # a larger exponent is a defect


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


@dataclasses.dataclass
class Curve:
    """What a function costs by the number of something.

    Attributes:
        work: the function.
        axis: what there is more and more of.
        numbers: how many.
        seconds: of each, the least of some calls.
        bytes: the peak of the tensors that a call makes.
    """

    work: str
    axis: str
    numbers: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    bytes: list[int] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.work}, {self.axis}"

    def exponent(self, values: Sequence[float]) -> float:
        """The slope of log(value) over log(number) at the largest three numbers; 0 where there is nothing."""
        points = [(math.log(n), math.log(v)) for n, v in zip(self.numbers, values, strict=True) if v > 0][-3:]
        if len(points) < 2:
            return 0.0
        x, y = zip(*points, strict=True)
        return statistics.linear_regression(x, y).slope


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


Run = Callable[[], object]


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


# --- the page --------------------------------------------------------------------------------------------------


def page(about: dict[str, Any], curves: Sequence[Curve]) -> Iterator[str]:
    yield "# Benchmarks of growth\n"
    others = ", ".join(f"{value} {name}" for name, value in Numbers()._asdict().items())
    yield "How the cost of a function grows with the numbers of targets, members, ranks and tokens. All layers are"
    yield f"linear and {WIDTH} wide ({WIDE} where the rank grows), so that it is the function's own work that counts."
    yield f"The other numbers stay at {others}. The exponent is the slope at the largest three numbers: 1 is linear,"
    yield f"less contains a part that stays the same, and more than {LIMIT} is a defect. Memory is the peak of the"
    yield "tensors that a call makes. `routed` is a batch of all members, `cache` loads them all from files, and"
    yield "`plain` is what `train` computes, in torch alone: where that too grows faster than linear, it is because the"
    yield "processor's caches no longer hold all.\n"
    yield f"- {about['machine']}, one thread; time of the process, the least of several calls"
    yield f"- torch {torch.__version__}, {about['date']}; `{about['command']}`\n"
    yield "![Time by the number of each](benchmarks-growth.png)"
    for axis in dict.fromkeys(curve.axis for curve in curves):
        some = [curve for curve in curves if curve.axis == axis]
        numbers = some[0].numbers
        yield f"\n## {axis.capitalize()}\n"
        yield from head("ms at", *map(str, numbers), "exponent", "MiB at the most", "exponent")
        for curve in some:
            shown = [f"{exponent:.2f}" if exponent <= LIMIT else f"**{exponent:.2f}**"
                     for exponent in (curve.exponent(curve.seconds), curve.exponent(curve.bytes))]  # fmt: skip
            times = [f"{1e3 * seconds:.3g}" for seconds in curve.seconds]
            yield table_row(curve.work, *times, shown[0], f"{max(curve.bytes) / 2**20:.1f}", shown[1])


def draw(path: Path, curves: Sequence[Curve]) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("No plot: matplotlib is not installed")
        return
    axes = list(dict.fromkeys(curve.axis for curve in curves))
    figure = Figure((4 * len(axes), 4), layout="constrained")
    works = list(dict.fromkeys(curve.work for curve in curves))
    for axis, plot in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
        some = [curve for curve in curves if curve.axis == axis]
        for curve in some:
            colour, style = f"C{works.index(curve.work) % 10}", "-" if works.index(curve.work) < 10 else "--"
            plot.plot(curve.numbers, curve.seconds, style, color=colour, marker="o", markersize=3, label=curve.work)
        ends = some[0].numbers[-2:]
        top = 1.3 * max(curve.seconds[-1] for curve in some)
        plot.plot(ends, [top * ends[0] / ends[1], top], color="black", linestyle=":", label="linear")
        plot.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
        plot.grid(alpha=0.3)
        plot.legend(fontsize=6, ncols=2)
    new = path.with_name(f".{path.name}.new")
    figure.savefig(new, format="png", dpi=120)
    new.replace(path)


def main(argv: Sequence[str] | None = None) -> list[Curve]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write to; docs, but a new one in /tmp for part of a run")
    parser.add_argument("--quick", action="store_true", help="small numbers, few calls")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="run what has this in its name")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    words = ["python", "examples/benchmark_growth.py", *(sys.argv[1:] if argv is None else argv)]
    about = {
        "machine": machine("cpu"), "load": os.getloadavg()[0], "command": shlex.join(words),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
    }  # fmt: skip
    ranges = QUICK if args.quick else RANGES
    works = [(work, axis) for axis, some in GROWTHS.items() for work in some]
    curves = [Curve(work.__name__, axis) for work, axis in works]
    chosen = [(work, curve) for (work, _), curve in zip(works, curves, strict=True) if args.only in curve.name]
    with progress(sum(len(ranges[curve.axis]) for _, curve in chosen)) as tick, contextlib.suppress(KeyboardInterrupt):
        for work, curve in chosen:
            for n in ranges[curve.axis]:
                tick(f"{curve.name} {n}")
                numbers, width = Numbers()._replace(**{curve.axis: n}), WIDE if curve.axis == "rank" else WIDTH
                seconds, peak = measure(work, numbers, width, 0.0 if args.quick else 0.2)
                curve.numbers.append(n)
                curve.seconds.append(seconds)
                curve.bytes.append(peak)
                tick("")
    done = [curve for _, curve in chosen]
    partial = args.quick or args.only
    out = args.out or (Path(tempfile.mkdtemp(prefix="benchmark-")) if partial else Path("docs"))
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "benchmarks-growth.png", done)
    raw = {"about": about, "curves": [dataclasses.asdict(curve) for curve in done]}
    replace(out / "benchmarks-growth.json", json.dumps(raw, indent=1).encode() + b"\n")
    replace(out / "benchmarks-growth.md", ("\n".join(page(about, done)) + "\n").encode())
    for curve in done:
        for what, values in (("time", curve.seconds), ("memory", curve.bytes)):
            if (exponent := curve.exponent(values)) > LIMIT:
                print(f"{curve.name}: {what} grows with the exponent {exponent:.2f}")
    print(f"Written: {out / 'benchmarks-growth.md'}")
    return done


if __name__ == "__main__":
    main()

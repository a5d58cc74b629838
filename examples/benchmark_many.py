"""Many adapters at once: rows, vmap, PEFT's mixed batch and loops, side by side in one process.

    python examples/benchmark_many.py                 everything; writes docs/benchmarks-many.md, .png and .json
    python examples/benchmark_many.py --quick         tiny sizes and two rounds: shows that it runs, measures nothing
    python examples/benchmark_many.py --only train    forward, change, train, memory or ranks; or a size: "(16, 1, 1)"
    python examples/benchmark_many.py --compile       training steps with torch.compile too; tracing takes minutes

The contenders take turns as in benchmark.py. Before anything is timed, the routed batch must agree with PEFT's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optree
import peft
import torch
from benchmark import Bench, Run, far, fresh, llama, loss, measure, outputs, peak
from benchmark_plot import Ratio, Tick, head, machine, ms, progress, replace, table_row
from torch import Tensor, nn

import funclora as fl

RANK = 8
LR = 1e-3
FORWARDS = [(n, 1, t) for t in (1, 16, 64) for n in (1, 4, 16, 64, 256) if n * t <= 4096]
TRAINS = [(1, 1, 16), (4, 1, 16), (16, 1, 16), (32, 1, 16), (64, 1, 16), (64, 1, 1), (8, 2, 64)]
CHANGES = [(16, 1, 1), (64, 1, 1)]
MEMORY = (1, 8, 32)
LOOPS = 16  # merged models and vmap are run up to that many members: each merged model is a copy of the weights


@dataclasses.dataclass
class Cell:
    """Seconds by round of contenders that took turns, for members × rows of each × tokens."""

    work: str
    size: tuple[int, int, int]
    seconds: dict[str, list[float]]

    def ratio(self, name: str, to: str) -> Ratio | None:
        if name not in self.seconds or to not in self.seconds:
            return None
        ratios = sorted(a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True))
        return Ratio(ratios[len(ratios) // 2], ratios[0], ratios[-1])

    def median(self, name: str) -> float | None:
        times = sorted(self.seconds.get(name, ()))
        return times[len(times) // 2] if times else None


class Setup:
    """The base model and as many members as are asked for."""

    def __init__(self, bench: Bench, *, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.compiled = compiled
        sizes = (32, 48, 2, 64, 1) if bench.quick else (512, 1376, 8, 4000, 6)
        self.model = llama(*sizes).to(bench.device).eval()
        self.vocab = sizes[3]
        self.device = bench.device
        self.params = fl.base_params(self.model)

    @functools.cache  # noqa: B019
    def member(self, i: int, r: int = RANK, method: str = "LoRA") -> dict[str, Any]:
        g = torch.Generator().manual_seed(i)
        config = fl.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", use_dora=method == "DoRA")
        made: Any = fl.init(self.model, config, generator=g)
        return {
            name: dataclasses.replace(rule, b=torch.randn(rule.b.shape, generator=g).mul(0.02).to(rule.b))
            for name, rule in made.items()
        }

    def members(self, n: int, method: str = "LoRA") -> fl.Stack[Any]:
        return fl.stack([self.member(i, method=method) for i in range(n)])

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(self.vocab, shape, generator=torch.Generator().manual_seed(1)).to(self.device)

    def with_peft(self, n: int) -> Any:
        """PEFT's model with the same members, under the names m0, m1, ..."""
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        base = llama_like(self.model).to(self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            wrapped: Any = peft.get_peft_model(base, config, adapter_name="m0")
            for i in range(1, n):
                wrapped.add_adapter(f"m{i}", config)
        with torch.no_grad():
            for i in range(n):
                for name, rule in self.member(i).items():
                    layer = wrapped.base_model.model.get_submodule(name.removesuffix(".weight"))
                    layer.lora_A[f"m{i}"].weight.copy_(rule.a)
                    layer.lora_B[f"m{i}"].weight.copy_(rule.b)
        return wrapped.eval()


def llama_like(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model)


def forward(setup: Setup, bench: Bench, size: tuple[int, int, int], rounds: int, tick: Tick) -> Cell:
    n, per, tokens = size
    x, ids = setup.ids(n * per, tokens), [i for i in range(n) for _ in range(per)]
    members, dora = setup.members(n), setup.members(n, "DoRA")
    bound, bound_dora = (fl.bind(setup.model, setup.params, fl.route(some, ids)) for some in (members, dora))
    other = setup.with_peft(n)
    names = [f"m{i}" for i in ids]
    runs: dict[str, Run] = {
        "base": lambda: setup.model(x),
        "rows": lambda: bound(x),
        "rows, route and bind too": lambda: fl.apply(setup.model, setup.params, fl.route(members, ids), x),
        "rows, DoRA": lambda: bound_dora(x),
        "PEFT mixed": lambda: other(x, adapter_names=names),
    }
    if n <= LOOPS:
        merged = []
        for i in range(n):
            copy = llama_like(setup.model)
            copy.load_state_dict(fl.merge(setup.params, members[i]))
            merged.append(copy)
        parts = x.chunk(n)
        runs["merged models"] = lambda: [model(part) for model, part in zip(merged, parts, strict=True)]
        mapped = fl.vmap(lambda adapters, x: outputs(lambda y: fl.apply(setup.model, setup.params, adapters, y), x), 0)
        runs["vmap"] = lambda: mapped(members, x.unflatten(0, (n, per)))
    with torch.no_grad():
        difference = far(outputs(bound, x), outputs(lambda y: other(y, adapter_names=names), x))
        if not difference < 1e-4:
            raise RuntimeError(f"{size}: rows and PEFT's mixed batch disagree by {difference:.1e}")
        seconds = measure(bench, runs, rounds, 3 if tokens == 1 else 1, tick)
    return Cell("forward", size, seconds)


def change(setup: Setup, bench: Bench, size: tuple[int, int, int], rounds: int, tick: Tick) -> Cell:
    """A decode batch in which one row gets another adapter: `route` and `bind`, with a cache that knows the weights."""
    n = size[0]
    x, runs = setup.ids(n, 1), {}  # type: tuple[Tensor, dict[str, Run]]
    runs["base"] = lambda: setup.model(x)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for method in ("LoRA", "DoRA"):
            config = fl.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_dora=method == "DoRA")
            for i in range(n + n // 2):
                fl.save_peft(f"{folder}/{method}-{i}", setup.member(i, method=method), config)
            runs[f"change, {method}"] = changing(setup, folder, [f"{method}-{i}" for i in range(n + n // 2)], n)
        return Cell("change", size, measure(bench, runs, rounds, 3, tick))


def changing(setup: Setup, folder: str, names: list[str], n: int) -> Run:
    cache = fl.AdapterCache(setup.model, folder, 2**32, device=setup.device, params=setup.params)
    for name in names:
        cache[name]  # loaded before
    rows, waiting = names[:n], names[n:]
    turns = itertools.cycle(range(n))
    bound: Any = None

    def run() -> None:
        nonlocal bound
        row = next(turns)
        waiting.append(rows[row])
        rows[row] = waiting.pop(0)
        bound = fl.bind(setup.model, setup.params, cache.route(rows))

    return run


def train(setup: Setup, bench: Bench, size: tuple[int, int, int], rounds: int, tick: Tick) -> Cell:
    n, per, tokens = size
    tokens = max(tokens, 2) if tokens == 1 else tokens  # a next token to predict
    x, y = setup.ids(n, per, tokens), setup.ids(n, per, tokens).flip(0)
    setup.model.train()
    runs: dict[str, Run] = {"base, forward and backward": both_passes(setup, x.flatten(0, 1), y.flatten(0, 1))}
    for name, method in (("rows", "LoRA"), ("rows, DoRA", "DoRA")):
        runs[name] = population(setup, setup.members(n, method), (x, y))
    if setup.compiled:
        runs["rows, compiled"] = population(setup, setup.members(n), (x, y), compiled=True)
    single = fl.train_step(setup.model, loss, fl.optim.adamw(LR))
    alone = [setup.member(i) for i in range(n)]
    states = [fl.optim.adamw(LR).init(adapters) for adapters in alone]

    def one_by_one() -> None:
        for i in range(n):
            alone[i], states[i], _ = single(setup.params, alone[i], states[i], (x[i], y[i]))

    other = setup.with_peft(1).train()
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], LR)

    def peft_one_by_one() -> None:
        for i in range(n):
            optimizer.zero_grad()
            loss(other, (x[i], y[i])).backward()
            optimizer.step()

    runs |= {"train_step, one by one": one_by_one, "PEFT, one by one": peft_one_by_one}
    if bench.jax:
        runs["JAX"] = in_jax(setup, n, (x, y))
    if n <= LOOPS:
        grads = fl.vmap(lambda a, b: fl.value_and_grad(loss)(setup.model, setup.params, a, b)[0], 0)
        runs["vmap, without optimizer"] = lambda: grads(setup.members(n), (x, y))
    seconds = measure(bench, runs, rounds, 1, tick)
    setup.model.eval()
    return Cell("train", size, seconds)


def in_jax(setup: Setup, n: int, batch: tuple[Tensor, Tensor]) -> Run:
    """The same population in JAX; its losses must be those of funclora."""
    import benchmark_jax

    run = benchmark_jax.population(setup.model, [setup.member(i) for i in range(n)], *batch, LR)
    members = setup.members(n)
    optimizer = fl.optim.per_member(fl.optim.adamw, lr=[LR] * n)
    step = fl.population_step(setup.model, loss, optimizer)
    _, _, metrics = step(setup.params, members, optimizer.init(members), batch)
    difference = far(torch.tensor(run().tolist()), metrics["loss"].cpu())
    if not difference < 1e-4:
        raise RuntimeError(f"JAX's losses differ by {difference:.1e}")
    return run


def both_passes(setup: Setup, x: Tensor, y: Tensor) -> Run:
    """The base model's own forward pass, and its backward pass to the inputs of the first layer."""
    embedded = setup.model.get_input_embeddings()(x).detach()  # type: ignore[operator]

    def run() -> None:
        given = embedded.requires_grad_()
        torch.autograd.grad(loss(lambda e: setup.model(inputs_embeds=e), (given, y)), given)

    return run


def population(setup: Setup, members: fl.Stack[Any], batch: tuple[Tensor, Tensor], *, compiled: bool = False) -> Run:
    optimizer = fl.optim.per_member(fl.optim.adamw, lr=[LR] * len(members))
    step = fl.population_step(setup.model, loss, optimizer)
    if compiled:
        step = torch.compile(step, fullgraph=True, dynamic=False)
    state = optimizer.init(members)

    def run() -> None:
        nonlocal members, state
        members, state, _ = step(setup.params, members, state, batch)

    return run


def ranks(setup: Setup, bench: Bench, rounds: int, tick: Tick) -> Cell:
    """One large rank among many small ones."""
    n = 4 if bench.quick else 64
    x = setup.ids(n, 16)
    large = 16 if bench.quick else 256
    several = {
        f"{n} × r={RANK}": [setup.member(i) for i in range(n)],
        f"{n - 1} × r={RANK}, 1 × r={large}": [*(setup.member(i) for i in range(n - 1)), setup.member(n, large)],
        "r = 4, 8, 12, 16 in turn": [setup.member(i, 4 * (i % 4 + 1)) for i in range(n)],
        f"{n} × r={large}": [setup.member(i, large) for i in range(n)],
    }
    runs: dict[str, Run] = {"base": lambda: setup.model(x)}
    for name, some in several.items():
        bound = fl.bind(setup.model, setup.params, fl.route(fl.stack(some), list(range(n))))
        runs[name] = functools.partial(bound, x)
    with torch.no_grad():
        return Cell("ranks", (n, 1, 16), measure(bench, runs, rounds, 1, tick))


def memory_of(bench: Bench, n: int) -> int:
    """Peak bytes of a population step in this process."""
    setup = Setup(bench)
    x, y = setup.ids(n, 1, 16), setup.ids(n, 1, 16).flip(0)
    members = setup.members(n)
    setup.member.cache_clear()
    setup.model.train()
    return peak(bench, population(setup, members, (x, y)))


def own_bytes(bench: Bench) -> int:
    """What one member brings with it: its weights, its optimizer state, and what backward needs of its rows."""
    setup = Setup(bench)
    x, y = setup.ids(1, 16), setup.ids(1, 16).flip(0)
    adapters = setup.member(0)
    held: Any = [adapters, fl.optim.adamw(LR).init(adapters)]
    tensors: list[Tensor] = [*setup.params.values(), *optree.tree_leaves(held)]
    frozen = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tree: Any = adapters
    leaves, spec = optree.tree_flatten(tree)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    frozen |= {leaf.untyped_storage().data_ptr() for leaf in leaves}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tree = optree.tree_unflatten(spec, leaves)
        kept = loss(fl.bind(setup.model, setup.params, tree), (x, y))
    assert kept.requires_grad
    return sum(tensor.nbytes for tensor in tensors[len(setup.params) :]) + sum(saved.values())


class Job(NamedTuple):
    name: str
    ticks: int
    run: Callable[[Tick], None]


def jobs(bench: Bench, setup: Setup, cells: list[Cell], peaks: dict[int, int]) -> Iterator[Job]:
    rounds = bench.rounds

    def add(work: Callable[..., Cell], *args: Any) -> Callable[[Tick], None]:
        return lambda tick: cells.append(work(setup, bench, *args, rounds, tick))

    for work, sizes in ((forward, FORWARDS), (change, CHANGES), (train, TRAINS)):
        for size in sizes[: 1 if work is change else 2] if bench.quick else sizes:
            yield Job(f"{work.__name__} {size}", rounds, add(work, size))
    yield Job("ranks", rounds, add(ranks))

    def memory(tick: Tick) -> None:
        for n in MEMORY[:2] if bench.quick else MEMORY:
            command = [sys.executable, __file__, "--memory-of", str(n), "--device", bench.device]
            glibc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            peaks[n] = int(fresh(*command, *["--quick"] * bench.quick, **glibc).splitlines()[-1])
            tick("")
        peaks[0] = own_bytes(bench)

    yield Job("memory", len(MEMORY), memory)


# --- the page --------------------------------------------------------------------------------------------------


def targets(cells: Sequence[Cell], peaks: dict[int, int]) -> Iterator[str]:
    """The numbers to reach, by size."""
    wanted = [
        *((f"forward, {n} adapters × 1 token{dora}", "forward", (n, 1, 1), f"rows{dora}", "base", reach)
          for n in (16, 64) for dora, reach in (("", 1.25), (", DoRA", 1.3))),
        ("forward, 64 adapters × 1 token", "forward", (64, 1, 1), "rows", "PEFT mixed", 0.1),
        *((f"another adapter in a batch of {n}, {method}", "change", (n, 1, 1), f"change, {method}", "base", 0.3)
          for n in (16, 64) for method in ("LoRA", "DoRA")),
        ("train step, 32 adapters × 16 tokens", "train", (32, 1, 16), "rows", "base, forward and backward", 1.25),
        ("train step, 64 adapters × 2 tokens", "train", (64, 1, 1), "rows", "base, forward and backward", 1.5),
    ]  # fmt: skip
    yield from head("work", "against", "reach", "measured", "reached")
    for what, work, size, name, to, reach in wanted:
        found = next((c.ratio(name, to) for c in cells if (c.work, c.size) == (work, size)), None)
        reached = "–" if found is None else "yes" if found.median <= reach else "**no**"
        yield table_row(what, to, f"≤ {reach}", found or "not measured", reached)
    if len(peaks) > 2:
        first, *_, last = sorted(set(peaks) - {0})
        ratio = peaks[last] / (peaks[first] + (last - first) * peaks[0])
        reached = "yes" if ratio <= 1.15 else "**no**"
        yield table_row(f"memory of a train step of {last}", "one and own needs", "≤ 1.15", f"{ratio:.2f}", reached)


def page(about: dict[str, Any], cells: Sequence[Cell], peaks: dict[int, int]) -> Iterator[str]:
    yield "# Benchmarks of many adapters\n"
    yield "One frozen Llama (6 layers, 512 wide, random weights, float32) and many adapters of rank "
    yield f'{RANK} on all its linear layers. Sizes are `members × rows of each × tokens of each row`. "rows" is one'
    yield "batch with `fl.route`; a training step is `fl.population_step` with AdamW. PEFT's mixed batch uses its"
    yield '`adapter_names`. "One by one" trains each member in its own step. Times are medians over alternating rounds.'
    yield "A ratio is the median of the ratios within each round, with the lowest and the highest in brackets.\n"
    yield f"- {about['machine']}, {about['threads']} threads; load when it began: {about['load']:.1f}"
    yield f"- torch {torch.__version__}, peft {peft.__version__}, {about['date']}, {about['minutes']:.0f} minutes"
    yield f"- `{about['command']}`\n"
    yield "## Numbers to reach\n"
    yield from targets(cells, peaks)
    yield "\n![Tokens per second by number of adapters](benchmarks-many.png)\n"
    titles = {
        "forward": "Forward (ms)",
        "change": "Another adapter in one row (ms)",
        "train": "Train step of all members (ms)",
        "ranks": "Ranks in one stack (ms)",
    }
    for work, title in titles.items():
        some = [cell for cell in cells if cell.work == work]
        if not some:
            continue
        yield f"\n## {title}\n"
        names = list(dict.fromkeys(name for cell in some for name in cell.seconds))
        to = "base" if "base" in names else "PEFT, one by one"
        yield from head(
            "size", *names, f"{'change, LoRA' if work == 'change' else 'rows'} / {to}" if work != "ranks" else ""
        )
        for cell in some:
            times = [ms(t) if (t := cell.median(name)) is not None else "" for name in names]
            ratio = cell.ratio("change, LoRA" if work == "change" else "rows", to)
            yield table_row(" × ".join(map(str, cell.size)), *times, f"{ratio.median:.2f}" if ratio else "")
    yield from beside_jax(cells)
    if peaks:
        own = peaks[0]
        first, *others = sorted(set(peaks) - {0})
        yield "\n## Memory of a train step\n"
        yield "Peak memory of the process, with one row of 16 tokens for each member. A member itself needs"
        yield f"{own / 2**20:.1f} MiB: its weights, its optimizer state, and the activations of its row. A step is"
        yield "a pure function: while it computes the new weights and state, the old ones are still in memory.\n"
        yield from head("members", "MiB", "MiB for each further member", "relative to one member plus own needs")
        yield table_row(first, f"{peaks[first] / 2**20:.0f}", "", "")
        for n in others:
            each, needed = (peaks[n] - peaks[first]) / (n - first), peaks[first] + (n - first) * own
            yield table_row(n, f"{peaks[n] / 2**20:.0f}", f"{each / 2**20:.1f}", f"{peaks[n] / needed:.2f}")
    yield "\n## When it is faster\n"
    yield "Each row needs the base model's own arithmetic, whatever its adapter. With few tokens for each adapter, "
    yield "the gain is that the base weights are read once instead of once for each adapter. With many tokens for each"
    yield "adapter, the arithmetic dominates: mixing adapters then saves little more than the overhead of the calls."


def beside_jax(cells: Sequence[Cell]) -> Iterator[str]:
    some = [cell for cell in cells if "JAX" in cell.seconds]
    if some:
        yield "\n## Beside JAX\n"
        yield "The same Llama written in JAX, with the same weights and losses: `jit(vmap(value_and_grad))` and optax's"
        yield "AdamW (`--jax`).\n"
        yield from head("train step", "rows / JAX", "JAX / base, forward and backward")
        for cell in some:
            size = " × ".join(map(str, cell.size))
            yield table_row(size, cell.ratio("rows", "JAX"), cell.ratio("JAX", "base, forward and backward"))


def draw(path: Path, cells: Sequence[Cell]) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("No plot: matplotlib is not installed")
        return
    groups = [("forward", tokens) for tokens in (1, 16, 64)] + [("train", 16)]
    figure, lines = Figure((4 * len(groups), 4.5), layout="constrained"), dict[str, Any]()
    for axis, (work, tokens) in zip(figure.subplots(1, len(groups)), groups, strict=True):
        some = [c for c in cells if c.work == work and c.size[1:] == (1, tokens)]
        for name in dict.fromkeys(name for cell in some for name in cell.seconds):
            points = [(c.size[0], c.size[0] * tokens / (c.median(name) or 1)) for c in some if name in c.seconds]
            colour = lines[name].get_color() if name in lines else f"C{len(lines) % 10}"
            style = "-" if len(lines) < 10 or name in lines else "--"
            (lines[name],) = axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=4)
        axis.set(xscale="log", yscale="log", xlabel="adapters", ylabel="tokens per second")
        axis.set_title(f"{work}, 1 × {tokens} tokens each", fontsize=9)
        axis.grid(alpha=0.3)
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=6, fontsize=8)
    new = path.with_name(f".{path.name}.new")
    figure.savefig(new, format="png", dpi=120)
    new.replace(path)


def main(argv: Sequence[str] | None = None) -> list[Cell]:
    parser = argparse.ArgumentParser(description="Many adapters at once, against PEFT, loops and the base model.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder to write to; docs, but a new one in /tmp for part of a run")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="run what has this in its name")
    parser.add_argument("--jax", action="store_true", help="JAX too: pip install 'funclora[bench]'")
    parser.add_argument("--compile", action="store_true", help="training steps under torch.compile too")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.jax and importlib.util.find_spec("optax") is None:
        parser.error("--jax: JAX and optax are not installed: pip install 'funclora[bench]'")
    bench = Bench(options.device, options.quick, 2 if options.quick else options.rounds, options.only, options.jax)
    if options.memory_of:
        print(memory_of(bench, options.memory_of))
        return []
    import datetime
    import os

    cells: list[Cell] = []
    peaks: dict[int, int] = {}
    words = ["python", "examples/benchmark_many.py", *(sys.argv[1:] if argv is None else argv)]
    about: dict[str, Any] = {
        "machine": machine(bench.device), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}", "command": shlex.join(words),
    }  # fmt: skip
    chosen = [job for job in jobs(bench, Setup(bench, compiled=options.compile), cells, peaks) if bench.wants(job.name)]
    start = time.perf_counter()
    with progress(sum(job.ticks for job in chosen)) as tick:
        for job in chosen:
            tick(job.name)
            job.run(tick)
    about["minutes"] = (time.perf_counter() - start) / 60
    partial = bench.quick or bench.only
    out = options.out or (Path(tempfile.mkdtemp(prefix="benchmark-")) if partial else Path("docs"))
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "benchmarks-many.png", cells)
    raw = {"about": about, "cells": [dataclasses.asdict(cell) for cell in cells], "peak_bytes": peaks}
    replace(out / "benchmarks-many.json", json.dumps(raw, indent=1).encode() + b"\n")
    text = "\n".join(line.rstrip() for line in "\n".join(page(about, cells, peaks)).splitlines()) + "\n"
    replace(out / "benchmarks-many.md", text.encode())
    print(f"{about['minutes']:.1f} minutes. Written: {out / 'benchmarks-many.md'}")
    return cells


if __name__ == "__main__":
    main()

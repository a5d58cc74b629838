"""Many adapters at once: mixed batches and populations, against PEFT, merged models, loops and JAX, in one process.

    python examples/benchmark_many.py                 everything; writes docs/benchmarks-many.json, .md and .png
    python examples/benchmark_many.py --quick         tiny sizes and two rounds: shows that it runs, measures nothing
    python examples/benchmark_many.py --only train    forward, change, train, compiled, ranks, memory; or "16 × 1 × 1"
    python examples/benchmark_many.py --page-only     the page again, from the .json

Before anything is timed, the mixed batch must agree with PEFT's, and the losses with JAX's. JAX takes part where it is
installed: pip install 'funclora[bench]'.
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import functools
import importlib.util
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import optree
import peft
import torch
from benchmark import far, llama, loss
from benchmark_many_page import draw, page
from benchmark_tools import Bench, Benchmark, Job, Peaks, Result, Run, cold_compiler, measure, peak
from torch import Tensor

import funclora as fl

RANK = 8
LR = 1e-3
Size = tuple[int, int, int]  # members × rows of each × tokens of each row
Builds = dict[str, Callable[[], Run]]
FORWARDS: list[Size] = [(n, 1, t) for t in (1, 16) for n in (1, 4, 16, 64)]
CHANGES: list[Size] = [(16, 1, 1), (64, 1, 1)]
TRAINS: list[Size] = [(1, 1, 16), (4, 1, 16), (16, 1, 16), (32, 1, 16), (64, 1, 16), (64, 1, 2), (8, 2, 64)]
COMPILED: Size = (32, 1, 16)
LOOPS = 16  # up to that many members: a loop over them has the same speed for more, and merged models fill the memory


class Setup:
    """The base model and as many members as are asked for."""

    def __init__(self, bench: Bench, layers: int = 6) -> None:
        torch.manual_seed(0)
        sizes = (32, 48, 2, 64, 1) if bench.quick else (512, 1376, 8, 4000, layers)
        self.model = llama(*sizes).eval()
        self.vocab = sizes[3]
        self.params = fl.base_params(self.model)

    @functools.cache  # noqa: B019
    def member(self, i: int, r: int = RANK, method: str = "LoRA") -> dict[str, Any]:
        g = torch.Generator().manual_seed(i)
        made: Any = fl.init(self.model, self.config(method, r), generator=g)
        return {
            name: dataclasses.replace(rule, b=torch.randn(rule.b.shape, generator=g).mul(0.02).to(rule.b))
            for name, rule in made.items()
        }

    def config(self, method: str = "LoRA", r: int = RANK) -> fl.LoraConfig:
        return fl.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", use_dora=method == "DoRA")

    def members(self, n: int, method: str = "LoRA") -> fl.Stack[Any]:
        return fl.stack([self.member(i, method=method) for i in range(n)])

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(self.vocab, shape, generator=torch.Generator().manual_seed(1))

    def batch(self, size: Size) -> tuple[Tensor, Tensor]:
        x = self.ids(*size)
        return x, x.flip(0)

    def merged(self, i: int) -> Any:
        model = copy.deepcopy(self.model)
        model.load_state_dict(fl.merge(self.params, self.member(i)))
        return model

    def with_peft(self, n: int) -> Any:
        """PEFT's model with the same members, under the names m0, m1, ..."""
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            wrapped: Any = peft.get_peft_model(copy.deepcopy(self.model), config, adapter_name="m0")
            for i in range(1, n):
                wrapped.add_adapter(f"m{i}", config)
        with torch.no_grad():
            for i in range(n):
                for name, rule in self.member(i).items():
                    layer = wrapped.base_model.model.get_submodule(name.removesuffix(".weight"))
                    layer.lora_A[f"m{i}"].weight.copy_(rule.a)
                    layer.lora_B[f"m{i}"].weight.copy_(rule.b)
        return wrapped.eval()


# --- contenders: each is built when it is wanted, alone for its memory or beside the others for its time ---------


def forward(setup: Setup, size: Size) -> Builds:
    n, per, _ = size
    x, ids = setup.batch(size)[0].flatten(0, 1), [i for i in range(n) for _ in range(per)]

    def rows(method: str) -> Run:
        bound = fl.bind(setup.model, setup.params, fl.route(setup.members(n, method), ids))
        return lambda: bound(x)

    def unbound() -> Run:
        members = setup.members(n)
        return lambda: fl.apply(setup.model, setup.params, fl.route(members, ids), x)

    def mixed() -> Run:
        other, names = setup.with_peft(n), [f"m{i}" for i in ids]
        return lambda: other(x, adapter_names=names)

    def merged() -> Run:
        pairs = list(zip([setup.merged(i) for i in range(n)], x.chunk(n), strict=True))
        return lambda: [model(part) for model, part in pairs]

    builds: Builds = {
        "base": lambda: lambda: setup.model(x),
        "rows": lambda: rows("LoRA"),
        "rows, route and bind too": unbound,
        "rows, DoRA": lambda: rows("DoRA"),
        "PEFT mixed": mixed,
    }
    return builds | ({"merged models": merged} if n <= LOOPS else {})


def change(setup: Setup, size: Size) -> Builds:
    """A decode batch in which one row gets another adapter: `route` and `bind`, with a cache that knows the weights."""
    n = size[0]
    x = setup.ids(n, 1)

    def changing(method: str) -> Run:
        folder = tempfile.mkdtemp(prefix="benchmark-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        names = [f"m{i}" for i in range(n + n // 2)]
        for i, name in enumerate(names):
            fl.save_peft(f"{folder}/{name}", setup.member(i, method=method), setup.config(method))
        cache = fl.AdapterCache(setup.model, folder, 2**32, params=setup.params)
        for name in names:
            cache[name]  # loaded before
        rows, waiting, turns = names[:n], names[n:], itertools.cycle(range(n))
        bound: Any = None

        def run() -> None:
            nonlocal bound
            row = next(turns)
            waiting.append(rows[row])
            rows[row] = waiting.pop(0)
            bound = fl.bind(setup.model, setup.params, cache.route(rows))

        return run

    return {
        "base": lambda: lambda: setup.model(x),
        "change, LoRA": lambda: changing("LoRA"),
        "change, DoRA": lambda: changing("DoRA"),
    }


def train(setup: Setup, size: Size) -> Builds:
    n = size[0]
    x, y = batch = setup.batch(size)

    def one_by_one() -> Run:
        single = fl.train_step(setup.model, loss, fl.optim.adamw(LR))
        alone = [setup.member(i) for i in range(n)]
        states = [fl.optim.adamw(LR).init(adapters) for adapters in alone]

        def run() -> None:
            for i in range(n):
                alone[i], states[i], _ = single(setup.params, alone[i], states[i], (x[i], y[i]))

        return run

    def peft_one_by_one() -> Run:
        other = setup.with_peft(1).train()
        optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], LR, fused=True)

        def run() -> None:
            for i in range(n):
                optimizer.zero_grad()
                loss(other, (x[i], y[i])).backward()
                optimizer.step()

        return run

    builds: Builds = {
        "base": lambda: both_passes(setup, x.flatten(0, 1), y.flatten(0, 1)),
        "rows": lambda: population(setup, setup.members(n), batch),
        "rows, DoRA": lambda: population(setup, setup.members(n, "DoRA"), batch),
    }
    if importlib.util.find_spec("optax"):
        builds["JAX"] = lambda: in_jax(setup, n, batch)
    if n <= LOOPS:
        builds |= {"train_step, one by one": one_by_one, "PEFT, one by one": peft_one_by_one}
    return builds


def in_jax(setup: Setup, n: int, batch: tuple[Tensor, Tensor]) -> Run:
    import benchmark_jax

    return benchmark_jax.population(setup.model, [setup.member(i) for i in range(n)], *batch, LR)


def both_passes(setup: Setup, x: Tensor, y: Tensor) -> Run:
    """The base model's own forward pass, and its backward pass to the inputs of the first layer."""
    model: Any = setup.model
    embedded = model.get_input_embeddings()(x).detach()

    def run() -> None:
        given = embedded.requires_grad_()
        torch.autograd.grad(loss(lambda e: model(inputs_embeds=e), (given, y)), given)

    return run


def population(setup: Setup, members: fl.Stack[Any], batch: Any, compile: Callable[..., Any] | None = None) -> Run:
    optimizer = fl.optim.per_member(fl.optim.adamw, lr=[LR] * len(members))
    step = fl.population_step(setup.model, loss, optimizer)
    if compile:
        step = compile(step, fullgraph=True, dynamic=False)
    state = optimizer.init(members)

    def run() -> Tensor:
        nonlocal members, state
        members, state, metrics = step(setup.params, members, state, batch)
        return metrics["loss"]

    return run


CONTENDERS = {"forward": forward, "change": change, "train": train}


def build(setup: Setup, work: str, size: Size) -> Builds:
    """The contenders of a row; they run as their work does."""
    setup.model.train(work == "train")
    builds = CONTENDERS[work](setup, size)
    return builds if work == "train" else {name: quiet(make) for name, make in builds.items()}


def quiet(make: Callable[[], Run]) -> Callable[[], Run]:
    return lambda: torch.no_grad()(torch.no_grad()(make)())


def check(work: str, runs: dict[str, Run]) -> None:
    """The contenders must compute the same: the outputs of a batch, the losses of a first training step."""
    name, other = {"forward": ("rows", "PEFT mixed"), "train": ("rows", "JAX")}.get(work, ("", ""))
    if other in runs:
        difference = far(*(numbers(runs[who]()) for who in (name, other)))
        if not difference < 1e-4:
            raise RuntimeError(f"{name} and {other} disagree by {difference:.1e}")


def numbers(result: Any) -> Tensor:
    """Logits, or losses of torch or JAX."""
    return result.logits if hasattr(result, "logits") else torch.as_tensor(result.tolist())


# --- what is measured ------------------------------------------------------------------------------------------


def title(work: str, size: Size) -> str:
    return f"{work} {' × '.join(map(str, size))}"


def compare(bench: Bench, setup: Setup, work: str, size: Size, result: Result) -> None:
    runs = {name: make() for name, make in build(setup, work, size).items()}
    check(work, runs)
    result.row(title(work, size)).seconds = measure(bench, runs, calls=3 if work != "train" and size[2] == 1 else 1)


def compiled(bench: Bench, result: Result) -> None:
    """Eager against compiled, on two layers: tracing takes time for each."""
    setup = Setup(bench, layers=2)
    setup.model.train()
    batch = setup.batch(COMPILED)
    runs = {"rows": population(setup, setup.members(COMPILED[0]), batch)}
    row = result.row(title("compiled", COMPILED))
    with cold_compiler():
        runs["rows, compiled"] = population(setup, setup.members(COMPILED[0]), batch, bench.compile)
        row.first_call["rows, compiled"] = bench.timed(runs["rows, compiled"])
        row.seconds = measure(bench, runs)


def ranks(bench: Bench, setup: Setup, result: Result) -> None:
    """One large rank among many small ones."""
    n, large = (4, 16) if bench.quick else (16, 256)
    x = setup.ids(n, 16)
    setup.model.eval()
    several = {
        f"{n} × r={RANK}": [setup.member(i) for i in range(n)],
        f"{n - 1} × r={RANK}, 1 × r={large}": [*(setup.member(i) for i in range(n - 1)), setup.member(n, large)],
        "r = 4, 8, 12, 16 in turn": [setup.member(i, 4 * (i % 4 + 1)) for i in range(n)],
    }
    runs: dict[str, Run] = {"base": lambda: setup.model(x)}
    for name, some in several.items():
        bound = fl.bind(setup.model, setup.params, fl.route(fl.stack(some), list(range(n))))
        runs[name] = functools.partial(bound, x)
    with torch.no_grad():
        result.row(title("ranks", (n, 1, 16))).seconds = measure(bench, runs)


def own_bytes(setup: Setup) -> int:
    """What one member brings with it: its weights, its optimizer state, and what backward needs of its rows."""
    x, y = setup.ids(1, 16), setup.ids(1, 16).flip(0)
    setup.model.train()
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


def jobs(bench: Bench, result: Result) -> Iterator[Job]:
    setup = Setup(bench)
    result.about["rank"] = RANK
    for work, sizes in (("forward", FORWARDS), ("change", CHANGES), ("train", TRAINS)):
        for size in sizes[: 1 if work == "change" else 2] if bench.quick else sizes:
            yield Job(title(work, size), functools.partial(compare, bench, setup, work, size, result))
    yield Job("compiled", lambda: compiled(bench, result))
    yield Job("ranks", lambda: ranks(bench, setup, result))
    yield Job("memory of a member alone", lambda: result.about.update(own_bytes=own_bytes(setup)))


def apart(bench: Bench) -> Iterator[str]:
    names = ("base", "rows", "rows, DoRA")
    wanted = {
        ("forward", (16, 1, 1)): (*names, "PEFT mixed"), ("forward", (64, 1, 1)): (*names, "PEFT mixed"),
        ("change", (16, 1, 1)): ("base", "change, LoRA", "change, DoRA"),
        ("change", (64, 1, 1)): ("base", "change, LoRA", "change, DoRA"),
        ("train", (1, 1, 16)): ("rows",), ("train", (16, 1, 16)): ("rows",),
        ("train", (32, 1, 16)): names, ("train", (64, 1, 2)): names,
    }  # fmt: skip
    if bench.quick:
        wanted = {("forward", (4, 1, 1)): ("rows",), ("train", (1, 1, 16)): ("rows",), ("train", (4, 1, 16)): ("rows",)}
    for (work, size), contenders in wanted.items():
        yield from (f"{title(work, size)}: {name}" for name in contenders)


def memory_of(bench: Bench, name: str) -> Peaks:
    row, _, contender = name.partition(": ")
    work, _, size = row.partition(" ")
    n, per, tokens = map(int, size.split(" × "))
    setup = Setup(bench)
    run = build(setup, work, (n, per, tokens))[contender]()
    setup.member.cache_clear()
    return {row: {contender: peak(run)}}


BENCHMARK = Benchmark(
    "benchmarks-many", __file__, ("transformers", "peft"), jobs, page, draw, apart=apart, memory_of=memory_of
)
main = BENCHMARK.main

if __name__ == "__main__":
    main()

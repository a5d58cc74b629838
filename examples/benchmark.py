"""funclora, PEFT and the bare base model, side by side in one process: time, memory and start-up.

    python examples/benchmark.py                    everything; writes docs/benchmarks.md, .png and .json
    python examples/benchmark.py --device cuda      the page keeps one section per device
    python examples/benchmark.py --only "gpt2 r=16" what has that in its name (--only ? lists the names)
    python examples/benchmark.py --quick            tiny models and two rounds: shows that it runs, measures nothing

All contenders take turns (A B C, then C A B backwards, ...), so what slows the machine slows them all. Results are
medians over the rounds, and ratios are the median of the ratios within each round. Before anything is timed,
PEFT and funclora get the same numbers in A, B and m, and must agree in outputs and in gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from benchmark_plot import HEADLINE, METHODS, SHORT, Result, Row, Tick, progress, write
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import funclora as fl

Run = Callable[[], object]
Batch = tuple[Tensor, Tensor]
Compile = Callable[..., Any]
RANKS = (HEADLINE, 8, 64, 256)
MEMORY_OF = ("base", *(f"{library} {method}" for method in METHODS for library in ("funclora", "PEFT")))
LR = 1e-4


# --- what is run -----------------------------------------------------------------------------------------------


class Work(NamedTuple):
    name: str
    calls: int  # timed calls in one turn, after one that is not: a turn's time is their median
    turns: int  # rounds of the headline rank, as a multiple of those asked for


WORKS = (Work("forward", 1, 1), Work("single", 3, 2), Work("train", 1, 1))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to adapt, with random weights."""

    name: str
    title: str
    build: Callable[[], nn.Module]
    targets: list[str] | str
    shape: tuple[int, ...]  # of the inputs
    single: tuple[int, ...]  # of one token, one image
    classes: int
    unit: str = "token"
    transposed: bool = False  # its layers store [in, out]; PEFT wants to be told

    def batch(self, work: str, device: str) -> Batch:
        g = torch.Generator().manual_seed(2)
        shape = self.single if work == "single" else self.shape
        tokens = self.unit == "token"
        x = torch.randint(self.classes, shape, generator=g) if tokens else torch.randn(shape, generator=g)
        y = torch.randint(self.classes, shape if tokens else shape[:1], generator=g)
        return x.to(device), y.to(device)

    def about(self, work: str) -> str:
        shape = self.single if work == "single" else self.shape
        n = shape if self.unit == "token" else shape[:1]
        return f"{' × '.join(map(str, n))} {self.unit}{'s' if max(n) > 1 else ''}"


def subjects(quick: bool) -> list[Subject]:
    layers, dim, vocab = (1, 32, 64) if quick else (6, 768, 8000)
    heads, inner = (2, 48) if quick else (12, 2048)
    shape = (2, 16) if quick else (4, 128)
    widths, images = ((8, 16), (2, 3, 8, 8)) if quick else ((64, 128, 256, 512), (16, 3, 32, 32))

    def gpt2() -> nn.Module:
        config = GPT2Config(vocab_size=vocab, n_embd=dim, n_layer=layers, n_head=heads, use_cache=False,
                            bos_token_id=0, eos_token_id=0)  # fmt: skip
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0  # contenders would draw different masks
        return GPT2LMHeadModel(config)

    sizes = f"{layers} layers, {dim} wide, {heads} heads, {vocab} tokens"
    return [
        Subject("llama", f"Llama ({sizes})", lambda: llama(dim, inner, heads, vocab, layers), "all-linear",
                shape, (1, 1), vocab),
        Subject("gpt2", f"GPT-2 ({sizes})", gpt2, ["c_attn", "c_proj", "c_fc"],
                shape, (1, 1), vocab, transposed=True),
        Subject("convnet", f"ResNet ({len(widths)} stages, up to {widths[-1]} channels, {images[-1]} pixels wide)",
                lambda: ResNet(widths), ["stem", "conv1", "conv2", "skip"], images, (1, *images[1:]), 10, "image"),
    ]  # fmt: skip


def llama(dim: int, inner: int, heads: int, vocab: int, layers: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=dim, intermediate_size=inner, num_attention_heads=heads, num_hidden_layers=layers,
                    vocab_size=vocab, use_cache=False)
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        stride = 1 if n_in == n_out else 2
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.skip = None if n_in == n_out else nn.Conv2d(n_in, n_out, 1, stride, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.skip is None else self.skip(x)))


class ResNet(nn.Module):
    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        pairs = itertools.pairwise([widths[0], *widths])
        self.blocks = nn.Sequential(*(block for i, o in pairs for block in (Block(i, o), Block(o, o))))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def outputs(model: Callable[..., Any], x: Tensor) -> Tensor:
    out = model(x)
    return getattr(out, "logits", out)


def loss(model: Callable[..., Any], batch: Batch) -> Tensor:
    x, y = batch
    return F.cross_entropy(outputs(model, x).flatten(0, -2), y.flatten())


# --- who runs it -----------------------------------------------------------------------------------------------


def make_adapters(subject: Subject, model: nn.Module, r: int, method: str) -> dict[str, Any]:
    """Adapters that change the output clearly: B is not zero, magnitudes are not the norms."""
    g = torch.Generator().manual_seed(1)

    def moved(rule: Any) -> Any:
        b = torch.randn(rule.b.shape, generator=g).mul(0.02).to(rule.b)
        if method == "LoRA":
            return dataclasses.replace(rule, b=b)
        noise = torch.randn(rule.magnitude.shape, generator=g).mul(0.1).to(b)
        return dataclasses.replace(rule, b=b, magnitude=rule.magnitude * (1 + noise))

    config = fl.LoraConfig(r=r, lora_alpha=2 * r, target_modules=subject.targets, use_dora=method == "DoRA")
    return {name: moved(rule) for name, rule in fl.init(model, config, generator=g).items()}


def make_peft(subject: Subject, model: nn.Module, r: int, method: str, adapters: dict[str, Any]) -> Any:
    """PEFT's model around (and in) the given one, with the numbers of those adapters."""
    config = peft.LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=subject.targets, use_dora=method == "DoRA",
        fan_in_fan_out=subject.transposed,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        wrapped = peft.get_peft_model(model, config)
    found = {name for name, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A")}
    if found != {name.removesuffix(".weight") for name in adapters}:
        raise RuntimeError(f"{subject.name}: PEFT and funclora adapt different layers")
    with torch.no_grad():
        for name, rule in adapters.items():
            for leaf, parameter in peft_leaves(wrapped, name).items():
                parameter.copy_(getattr(rule, leaf).view_as(parameter))
    return wrapped


def peft_leaves(model: Any, name: str) -> dict[str, nn.Parameter]:
    layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
    leaves = {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
    if "default" in layer.lora_magnitude_vector:
        leaves["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return leaves


def train_funclora(model: nn.Module, adapters: dict[str, Any], batch: Batch, compile: Compile | None = None) -> Run:
    optimizer = fl.optim.adamw(LR)
    step: Any = fl.train_step(model, loss, optimizer)
    if compile:
        step = compile(step, fullgraph=True)
    params, state = fl.base_params(model), optimizer.init(adapters)

    def run() -> None:
        nonlocal adapters, state
        adapters, state, _ = step(params, adapters, state, batch)

    return run


def train_peft(model: Any, batch: Batch, compile: Compile | None = None) -> Run:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR)
    forward = compile(model) if compile else model

    def run() -> None:
        optimizer.zero_grad()
        loss(forward, batch).backward()
        optimizer.step()

    return run


class Rivals:
    """All contenders for one model and rank: base, PEFT and funclora each with a copy of the same weights."""

    def __init__(self, subject: Subject, r: int, device: str) -> None:
        torch.manual_seed(0)
        self.base = subject.build().to(device)
        self.own = copy.deepcopy(self.base)
        self.params = fl.base_params(self.own)
        self.adapters = {method: make_adapters(subject, self.own, r, method) for method in METHODS}
        self.peft = {
            method: make_peft(subject, copy.deepcopy(self.base), r, method, adapters)
            for method, adapters in self.adapters.items()
        }

    def train(self, mode: bool) -> None:
        for model in (self.base, self.own, *self.peft.values()):
            model.train(mode)

    def check(self, batch: Batch) -> tuple[float, float]:
        """The largest difference of outputs and of gradients, PEFT against funclora; an error if one is large."""
        x, _ = batch
        output = gradient = 0.0
        for method, adapters in self.adapters.items():
            other = self.peft[method]
            self.train(False)
            with torch.no_grad():
                expected = outputs(other, x)
                if far(outputs(self.base, x), expected) < 1e-2:
                    raise RuntimeError(f"{method}: the adapter does nothing")
                for got in (self.applied(method), fl.bind(self.own, self.params, adapters)):
                    output = max(output, far(outputs(got, x), expected))
            self.train(True)
            loss(other, batch).backward()
            _, grads = fl.value_and_grad(loss)(self.own, self.params, adapters, batch)
            for leaf in peft_leaves(other, next(iter(grads))):  # a layer alone may have a gradient of just rounding
                theirs = [peft_leaves(other, name)[leaf].grad for name in grads]
                ours = [getattr(rule, leaf) for rule in grads.values()]
                gradient = max(gradient, far(flat(ours), flat(theirs)))
        if not (output < 1e-4 and gradient < 1e-4):
            raise RuntimeError(f"PEFT and funclora disagree: outputs by {output:.1e}, gradients by {gradient:.1e}")
        return output, gradient

    def applied(self, method: str) -> Callable[[Tensor], Any]:
        return lambda x: fl.apply(self.own, self.params, self.adapters[method], x)

    def contenders(self, work: str, batch: Batch) -> dict[str, Run]:
        x, _ = batch
        self.train(work == "train")
        runs: dict[str, Run] = {"base": torch.no_grad()(lambda: self.base(x))}
        for method, adapters in self.adapters.items():
            if work == "train":
                runs[f"PEFT {method}"] = train_peft(self.peft[method], batch)
                runs[f"train_step {method}"] = train_funclora(self.own, adapters, batch)
            else:
                runs |= self._forwards(method, x)
        if work == "single":  # the cache holds from one call to the next within a turn
            runs["PEFT DoRA cached"] = lambda: cached(self.peft["DoRA"], x)
        return runs

    def _forwards(self, method: str, x: Tensor) -> dict[str, Run]:
        bound, applied, other = fl.bind(self.own, self.params, self.adapters[method]), self.applied(method), self.peft
        runs = {f"PEFT {method}": lambda: other[method](x), f"apply {method}": lambda: applied(x)}
        return {name: torch.no_grad()(run) for name, run in (runs | {f"bound {method}": lambda: bound(x)}).items()}


@torch.no_grad()
def cached(model: Any, x: Tensor) -> Any:
    with peft.helpers.DoraCaching():
        return model(x)


def flat(tensors: Sequence[Any]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def far(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value; infinite for NaN."""
    difference = float((got - expected).abs().max() / expected.abs().max())
    return difference if difference == difference else float("inf")


# --- how it is measured ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the command line asked for."""

    device: str
    quick: bool
    rounds: int
    only: str
    jax: bool = False  # whether benchmark_many.py asks JAX too

    def wants(self, name: str) -> bool:
        return self.only in name

    def rounds_of(self, r: int, work: Work) -> int:
        return max(2, self.rounds * work.turns if r == HEADLINE else round(self.rounds * 2 / 5))

    def compile(self, function: Callable[..., Any], **options: Any) -> Any:
        return torch.compile(function, **options, backend="eager" if self.quick else "inductor")

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(bench: Bench, runs: dict[str, Run], rounds: int, calls: int, tick: Tick) -> dict[str, list[float]]:
    """Seconds per contender and round."""
    names, seconds = list(runs), {name: [] for name in runs}  # type: tuple[list[str], dict[str, list[float]]]
    gc.collect()
    for run in runs.values():
        run()
    for i in range(rounds):
        k = i // 2 % len(names)
        order = names[k:] + names[:k]
        for name in order if i % 2 == 0 else reversed(order):  # everyone comes after everyone else
            if calls > 1:
                runs[name]()  # a short run depends on whose weights are in the processor's caches
            seconds[name].append(statistics.median(timed(bench, runs[name]) for _ in range(calls)))
        tick("")
    return seconds


def timed(bench: Bench, run: Run) -> float:
    bench.sync()
    start = time.perf_counter()
    run()
    bench.sync()
    return time.perf_counter() - start


def compare(bench: Bench, subject: Subject, r: int, works: Sequence[Work], result: Result, tick: Tick) -> None:
    """Forward passes and train steps of one model and rank."""
    tick(f"{subject.name} r={r}: do PEFT and funclora agree?")
    rivals = Rivals(subject, r, bench.device)
    x, y = subject.batch("train", bench.device)
    difference = rivals.check((x[:1], y[:1]))
    result.agreement = [max(pair) for pair in zip(result.agreement, difference, strict=True)]
    for work in works:
        tick(f"{subject.name} r={r} {work.name}")
        runs = rivals.contenders(work.name, subject.batch(work.name, bench.device))
        seconds = measure(bench, runs, bench.rounds_of(r, work), work.calls, tick)
        result.rows.append(Row(subject.name, r, work.name, seconds))


def compare_short(bench: Bench, subject: Subject, tokens: int, result: Result, tick: Tick) -> None:
    """Train steps of one short row."""
    rivals = Rivals(subject, HEADLINE, bench.device)
    x, y = subject.batch("train", bench.device)
    runs = rivals.contenders("train", (x[:1, :tokens], y[:1, :tokens]))
    seconds = measure(bench, runs, bench.rounds, 1, tick)
    result.rows.append(Row(subject.name, HEADLINE, f"train on {tokens} tokens", seconds))


def compare_compiled(bench: Bench, work: str, result: Result, tick: Tick) -> None:
    """Eager against compiled, on two layers: compiling takes time for each."""
    full = subjects(bench.quick)[0]
    layers = 1 if bench.quick else 2
    small = (lambda: llama(32, 48, 2, 64, layers)) if bench.quick else (lambda: llama(768, 2048, 12, 8000, layers))
    subject = dataclasses.replace(full, build=small)
    row = Row("llama", HEADLINE, f"compiled {work}", {})
    result.rows.append(row)
    tick("is there a compiler?")
    batch = subject.batch(work, bench.device)
    # Compiled code is kept on disk: with an empty folder, the first call really compiles.
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with folder as cache, unittest.mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
        try:
            bench.compile(lambda x: (x.float() + 1).sin())(batch[0])
        except (RuntimeError, OSError) as error:
            row.skipped = f"torch.compile does not work here ({str(error).strip().splitlines()[0]})"
            return
        rivals = Rivals(subject, HEADLINE, bench.device)
        rivals.train(work == "train")
        runs = compiled_runs(bench, rivals, work, batch)
        for name in [name for name in runs if name.endswith("compiled")]:
            tick(f"compiling {name.removesuffix(' compiled')} {work}")
            row.first_call[name] = timed(bench, runs[name])
            runs[name]()  # PEFT's optimizer makes its state in the first step
        tick(row.key)
        row.seconds = measure(bench, runs, bench.rounds, 3, tick)
    torch.compiler.reset()


def compiled_runs(bench: Bench, rivals: Rivals, work: str, batch: Batch) -> dict[str, Run]:
    x, _ = batch
    own, params, adapters, other = rivals.own, rivals.params, rivals.adapters["LoRA"], rivals.peft["LoRA"]
    if work == "train":
        return {
            "PEFT LoRA": train_peft(other, batch),
            "PEFT LoRA compiled": train_peft(other, batch, bench.compile),
            "train_step LoRA": train_funclora(own, adapters, batch),
            "train_step LoRA compiled": train_funclora(own, adapters, batch, bench.compile),
        }
    base, peft_model = bench.compile(rivals.base), bench.compile(other)
    applied = bench.compile(fl.apply, fullgraph=True)
    runs: dict[str, Run] = {
        "base": lambda: rivals.base(x),
        "base compiled": lambda: base(x),
        "PEFT LoRA": lambda: other(x),
        "PEFT LoRA compiled": lambda: peft_model(x),
        "apply LoRA": lambda: fl.apply(own, params, adapters, x),
        "apply LoRA compiled": lambda: applied(own, params, adapters, x),
    }
    return {name: torch.no_grad()(run) for name, run in runs.items()}


def fresh(*command: str, **variables: str) -> str:
    """What a new process prints that finds the same funclora."""
    path = os.pathsep.join(filter(None, [str(Path(str(fl.__file__)).parents[1]), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path} | variables
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


def compare_memory(bench: Bench, result: Result, tick: Tick) -> None:
    """The peak of each contender, in its own process; glibc is told to give back what is freed."""
    for name in MEMORY_OF:
        tick(f"memory of {name}")
        command = [sys.executable, __file__, "--memory-of", name, "--device", bench.device]
        glibc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        result.memory[name] = json.loads(fresh(*command, *["--quick"] * bench.quick, **glibc).splitlines()[-1])
        tick("")


def memory_of(bench: Bench, name: str) -> dict[str, int]:
    """Peak bytes of each work, in this process."""
    subject = subjects(bench.quick)[0]
    library, _, method = name.partition(" ")
    torch.manual_seed(0)
    model = subject.build().to(bench.device)
    batch, one = (subject.batch(work, bench.device) for work in ("train", "single"))
    forward, train = model, None  # type: tuple[Callable[..., Any], Run | None]
    if method:
        adapters = make_adapters(subject, model, HEADLINE, method)
        if library == "PEFT":
            forward = make_peft(subject, model, HEADLINE, method, adapters)
            del adapters
            train = train_peft(forward, batch)
        else:
            params = fl.base_params(model)
            forward, train = lambda x: fl.apply(model, params, adapters, x), train_funclora(model, adapters, batch)
    with torch.no_grad():
        model.eval()
        peaks = {"single": peak(bench, lambda: forward(one[0])), "forward": peak(bench, lambda: forward(batch[0]))}
    if train:
        model.train()
        peaks["train"] = peak(bench, train)
    return peaks


def peak(bench: Bench, run: Run) -> int:
    """The most bytes held during the second of two runs."""
    run()
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    # A new process starts with its parent's peak in getrusage. Linux has one of its own, which can be reset.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    run()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare_starts(bench: Bench, result: Result, tick: Tick) -> None:
    """Imports and the command line, in new processes."""
    tick("start")
    script = Path(sys.executable).parent / "funclora"
    program = [str(script)] if script.exists() else [sys.executable, "-c", "from funclora.cli import main; main()"]
    clock = "from time import perf_counter as t; a = t(); import torch; b = t(); import funclora; funclora.apply"
    seconds: dict[str, list[float]] = {"import torch": [], "import funclora": [], "funclora --help": []}
    for i in range(bench.rounds + 1):
        both = [float(s) for s in fresh(sys.executable, "-c", f"{clock}; print(b - a, t() - b)").split()]
        start = time.perf_counter()
        fresh(*program, "--help")
        times = [*both, time.perf_counter() - start]
        if i:  # the first one writes .pyc files
            for name, value in zip(seconds, times, strict=True):
                seconds[name].append(value)
            tick("")
    result.rows.append(Row("", 0, "start", seconds))


# --- the command -----------------------------------------------------------------------------------------------


class Job(NamedTuple):
    names: list[str]
    ticks: int
    run: Callable[[Tick], None]


def plan(bench: Bench, result: Result) -> Iterator[Job]:
    """What the command line asked for, in the order of running. The jobs write to the result."""
    if bench.wants("start"):
        yield Job(["start"], bench.rounds, lambda tick: compare_starts(bench, result, tick))
    if bench.wants("memory"):
        yield Job(["memory"], len(MEMORY_OF), lambda tick: compare_memory(bench, result, tick))
    for subject in subjects(bench.quick):
        result.models[subject.name] = {"title": subject.title} | {work.name: subject.about(work.name) for work in WORKS}
        for r in RANKS[:2] if bench.quick else RANKS:
            works = [work for work in WORKS if bench.wants(f"{subject.name} r={r} {work.name}")]
            if works:
                run = functools.partial(compare, bench, subject, r, works, result)
                names = [f"{subject.name} r={r} {work.name}" for work in works]
                yield Job(names, sum(bench.rounds_of(r, work) for work in works), run)
        for tokens in SHORT if subject.unit == "token" else ():
            name = f"{subject.name} r={HEADLINE} train on {tokens} tokens"
            if bench.wants(name):
                yield Job([name], bench.rounds, functools.partial(compare_short, bench, subject, tokens, result))
    for work in ("forward", "train"):
        if bench.wants(f"compiled {work}"):
            run = functools.partial(compare_compiled, bench, work, result)
            yield Job([f"compiled {work}"], bench.rounds, run)


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description="Compares funclora with PEFT and with the bare base model.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder to write to; docs, but a new one in /tmp for part of a run")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds")
    parser.add_argument("--rounds", type=int, default=5, help="of the headline rank; fewer for the others")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="run what has this in its name")
    parser.add_argument("--memory-of", choices=MEMORY_OF, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    bench = Bench(options.device, options.quick, 2 if options.quick else max(2, options.rounds), options.only)
    if options.memory_of:
        print(json.dumps(memory_of(bench, options.memory_of)))
        return Result()

    words = ["python", "examples/benchmark.py", *(sys.argv[1:] if argv is None else argv)]
    result = Result.begin(bench.device, shlex.join(words), bench.quick)
    jobs = list(plan(bench, result))
    if not jobs:
        every = [name for job in plan(dataclasses.replace(bench, only=""), result) for name in job.names]
        parser.error(f"nothing is called {bench.only!r}, only {', '.join(every)}")
    start = time.perf_counter()
    with progress(sum(job.ticks for job in jobs)) as tick:
        for job in jobs:
            job.run(tick)
    result.seconds = time.perf_counter() - start
    partial = bench.quick or bench.only
    out = options.out or (Path(tempfile.mkdtemp(prefix="benchmark-")) if partial else Path("docs"))
    print(f"{result.seconds / 60:.1f} minutes. Written: {write(out, result)}")
    return result


if __name__ == "__main__":
    main()

"""funclora, PEFT and the bare base model, side by side in one process: time, memory and start-up.

    python examples/benchmark.py                    everything; writes docs/benchmarks.json, .md and .png
    python examples/benchmark.py --only "gpt2 r=16" what has that in its name (--only ? lists the names)
    python examples/benchmark.py --quick            tiny models and two rounds: shows that it runs, measures nothing
    python examples/benchmark.py --page-only        the page again, from the .json

Before anything is timed, PEFT and funclora get the same numbers in A, B and m, and must agree in outputs and in
gradients.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_page
import peft
import torch
import torch.nn.functional as F
from benchmark_page import HEADLINE, METHODS, SHORT
from benchmark_tools import Bench, Benchmark, Job, Peaks, Result, Run, cold_compiler, fresh, measure, peak
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import funclora as fl

Batch = tuple[Tensor, Tensor]
Compile = Callable[..., Any]
RANKS = (HEADLINE, 64, 256)
CONTENDERS = ("base", *(f"{library} {method}" for method in METHODS for library in ("funclora", "PEFT")))
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

    def batch(self, work: str) -> Batch:
        g = torch.Generator().manual_seed(2)
        shape = self.single if work == "single" else self.shape
        tokens = self.unit == "token"
        x = torch.randint(self.classes, shape, generator=g) if tokens else torch.randn(shape, generator=g)
        y = torch.randint(self.classes, shape if tokens else shape[:1], generator=g)
        return x, y

    def short(self, tokens: int) -> Batch:
        """One row of so many tokens."""
        x, y = self.batch("train")
        return x[:1, :tokens], y[:1, :tokens]

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
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, fused=True)
    forward = compile(model) if compile else model

    def run() -> None:
        optimizer.zero_grad()
        loss(forward, batch).backward()
        optimizer.step()

    return run


class Rivals:
    """All contenders for one model and rank: base, PEFT and funclora each with a copy of the same weights."""

    def __init__(self, subject: Subject, r: int) -> None:
        torch.manual_seed(0)
        self.base = subject.build()
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


def rounds_of(bench: Bench, r: int, work: Work) -> int:
    return max(2, bench.rounds * work.turns if r == HEADLINE else round(bench.rounds * 2 / 5))


def compare(bench: Bench, subject: Subject, r: int, result: Result) -> None:
    """Forward passes and train steps of one model and rank."""
    rivals = Rivals(subject, r)
    x, y = subject.batch("train")
    difference = rivals.check((x[:1], y[:1]))
    result.about["agreement"] = [max(pair) for pair in zip(result.about["agreement"], difference, strict=True)]
    for work in WORKS:
        runs = rivals.contenders(work.name, subject.batch(work.name))
        row = result.row(f"{subject.name} r={r} {work.name}")
        row.seconds = measure(bench, runs, rounds=rounds_of(bench, r, work), calls=work.calls)


def compare_short(bench: Bench, subject: Subject, tokens: int, result: Result) -> None:
    """Train steps of one short row."""
    runs = Rivals(subject, HEADLINE).contenders("train", subject.short(tokens))
    row = result.row(f"{subject.name} r={HEADLINE} train on {tokens} tokens")
    row.seconds = measure(bench, runs, rounds=3 * bench.rounds, calls=3)


def compare_compiled(bench: Bench, work: str, result: Result) -> None:
    """Eager against compiled, on two layers: compiling takes time for each."""
    layers = 1 if bench.quick else 2
    small = (lambda: llama(32, 48, 2, 64, layers)) if bench.quick else (lambda: llama(768, 2048, 12, 8000, layers))
    subject = dataclasses.replace(subjects(bench.quick)[0], build=small)
    row = result.row(f"compiled {work}")
    batch = subject.batch(work)
    with cold_compiler():
        try:
            bench.compile(lambda x: (x.float() + 1).sin())(batch[0])
        except (RuntimeError, OSError) as error:
            row.note = f"torch.compile does not work here ({str(error).strip().splitlines()[0]})"
            return
        rivals = Rivals(subject, HEADLINE)
        rivals.train(work == "train")
        runs = compiled_runs(bench, rivals, work, batch)
        for name in [name for name in runs if name.endswith("compiled")]:
            row.first_call[name] = bench.timed(runs[name])
            runs[name]()  # PEFT's optimizer makes its state in the first step
        row.seconds = measure(bench, runs, calls=3)


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


def memory_of(bench: Bench, name: str) -> Peaks:
    """The peaks of each work of one contender."""
    model_name, library, method = f"{name} ".split(" ")[:3]
    subject = next(subject for subject in subjects(bench.quick) if subject.name == model_name)
    torch.manual_seed(0)
    model = subject.build().eval()
    adapters = make_adapters(subject, model, HEADLINE, method) if method else {}
    calls: dict[str, Callable[..., Any]] = {"base": model}
    if library == "funclora":
        params = fl.base_params(model)
        bound = fl.bind(model, params, adapters)
        calls = {f"apply {method}": lambda x: fl.apply(model, params, adapters, x), f"bound {method}": bound}
    elif library == "PEFT":
        calls = {f"PEFT {method}": make_peft(subject, model, HEADLINE, method, adapters).eval()}
    found: Peaks = {}
    with torch.no_grad():
        for work in ("single", "forward"):
            x, _ = subject.batch(work)
            found[f"{subject.name} r={HEADLINE} {work}"] = {
                call: peak(functools.partial(run, x)) for call, run in calls.items()
            }
    model.train()
    works = {f"train on {tokens} tokens": subject.short(tokens) for tokens in SHORT} | {"train": subject.batch("train")}
    for work, batch in works.items() if method else ():
        if library == "PEFT":
            call, run = f"PEFT {method}", train_peft(calls[f"PEFT {method}"], batch)
        else:
            call, run = f"train_step {method}", train_funclora(model, adapters, batch)
        found[f"{subject.name} r={HEADLINE} {work}"] = {call: peak(run)}
    return found


def compare_starts(bench: Bench, result: Result) -> None:
    """Imports and the command line, in new processes."""
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
    result.row("start").seconds = seconds


def jobs(bench: Bench, result: Result) -> Iterator[Job]:
    result.about |= {"models": {}, "agreement": [0.0, 0.0]}
    yield Job("start", functools.partial(compare_starts, bench, result))
    for subject in subjects(bench.quick):
        about = {work.name: subject.about(work.name) for work in WORKS}
        result.about["models"][subject.name] = {"title": subject.title} | about
        for r in RANKS[:2] if bench.quick else RANKS:
            yield Job(f"{subject.name} r={r}", functools.partial(compare, bench, subject, r, result))
        for tokens in SHORT if subject.unit == "token" else ():
            run = functools.partial(compare_short, bench, subject, tokens, result)
            yield Job(f"{subject.name} r={HEADLINE} train on {tokens} tokens", run)
    for work in ("forward", "train"):
        yield Job(f"compiled {work}", functools.partial(compare_compiled, bench, work, result))


def apart(bench: Bench) -> Iterator[str]:
    for subject in subjects(bench.quick):
        if subject.unit == "token":
            yield from (f"{subject.name} {contender}" for contender in CONTENDERS)


BENCHMARK = Benchmark(
    "benchmarks",
    __file__,
    ("transformers", "peft", "numpy"),
    jobs,
    benchmark_page.page,
    benchmark_page.draw,
    apart,
    memory_of,
)
main = BENCHMARK.main

if __name__ == "__main__":
    main()

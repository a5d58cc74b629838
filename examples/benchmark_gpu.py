"""Large language models in bfloat16 on a GPU: funclora, PEFT and the base, side by side in one process.

    python examples/benchmark_gpu.py                  everything that fits; writes docs/benchmarks-gpu.md
    python examples/benchmark_gpu.py --sizes 1 3      models of 1 and 3 billion weights
    python examples/benchmark_gpu.py --device cpu     tiny models: shows that it runs, measures nothing

Weights are random. The contenders share the base weights, and take turns as in benchmark.py. liger-kernel and unsloth
are measured too where they are installed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import functools
import gc
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from benchmark import loss, train_funclora, train_peft
from benchmark_tools import Bench, Job, Row, Run, head, machine, measure, mib, ms, replace, run_all, table_row
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import funclora as fl
from funclora._torch.memory import Peak

RANK = 16
LR = 1e-4


class Size(NamedTuple):
    """A model, and the work that is done with it."""

    dim: int
    inner: int
    heads: int
    layers: int
    vocab: int
    train: tuple[int, int]  # rows × tokens
    prompt: int
    new: int  # generated tokens
    adapters: tuple[int, ...]  # in a routed batch
    populations: tuple[tuple[int, int], ...]  # members × tokens


ROUTED, POPULATIONS = (1, 4, 16, 64, 256), ((32, 16), (64, 2))
SIZES = {
    "1": Size(2048, 8192, 32, 16, 32000, (4, 512), 64, 32, ROUTED, POPULATIONS),
    "3": Size(3072, 8192, 24, 28, 32000, (4, 512), 64, 32, ROUTED, POPULATIONS),
    "8": Size(4096, 14336, 32, 32, 32000, (4, 512), 64, 32, ROUTED, POPULATIONS),
}
TINY = Size(64, 128, 4, 2, 96, (2, 16), 4, 3, (1, 4), ((2, 4),))


@dataclasses.dataclass
class Table(Row):
    """Contenders that took turns; peaks are those of a call, besides the weights of the base.

    Attributes:
        model: which.
        work: what they did.
        notes: contenders that did not run, and why.
    """

    model: str = ""
    work: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


def build(size: Size, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model with random weights, made on the device: the CPU never holds it."""
    config = LlamaConfig(
        hidden_size=size.dim, intermediate_size=size.inner, num_attention_heads=size.heads, vocab_size=size.vocab,
        num_key_value_heads=max(1, size.heads // 4), num_hidden_layers=size.layers, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def adapters_of(model: nn.Module, seed: int = 0, **options: Any) -> Any:
    """LoRA on all linear layers, whose B is not zero."""
    config = fl.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", **options)
    made: Any = fl.init(model, config, generator=torch.Generator().manual_seed(seed))
    return {name: dataclasses.replace(rule, b=torch.randn_like(rule.b) * 0.01) for name, rule in made.items()}


def with_peft(model: nn.Module, n: int = 1, **options: Any) -> Any:
    """PEFT's model with n adapters around a copy of the modules; the weights are those of the given model."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped: Any = peft.get_peft_model(copy.deepcopy(model, shared), config, adapter_name="m0")
        for i in range(1, n):
            wrapped.add_adapter(f"m{i}", config)
    return wrapped


def packed_with_peft(model: nn.Module, names: Sequence[str]) -> Any:
    """PEFT's model around bitsandbytes' layers of 4 bits, made of those of the model."""
    import bitsandbytes as bnb

    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    own: Any = copy.deepcopy(model, shared)
    for name in names:
        linear = own.get_submodule(name)
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
        own.set_submodule(name, layer.to(linear.weight.device))
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return peft.get_peft_model(own, config)


# --- what is run -----------------------------------------------------------------------------------------------


class Subject:
    """A model on the device, and the tables of its work."""

    def __init__(self, name: str, size: Size, bench: Bench) -> None:
        self.name, self.size, self.bench = name, size, bench
        self.model = build(size, bench.device).requires_grad_(False)
        self.params = fl.base_params(self.model)

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(self.size.vocab, shape, generator=torch.Generator().manual_seed(1)).to(self.bench.device)

    def table(self, work: str, runs: dict[str, Run], notes: Sequence[str] = ()) -> Table:
        peaks = {name: peak(self.bench, run) for name, run in runs.items()}
        return Table(measure(self.bench, runs), peaks, model=self.name, work=work, notes=[*notes])

    def training(self) -> Table:
        x = self.ids(*self.size.train)
        batch = x, x.roll(-1, 1)
        runs: dict[str, Run] = {"base, forward and backward": self.both_passes(batch)}
        for method, dora in (("LoRA", False), ("DoRA", True)):
            runs[method] = train_funclora(self.model, adapters_of(self.model, use_dora=dora), batch)
            runs[f"PEFT {method}"] = train_peft(with_peft(self.model, use_dora=dora), batch)
        notes: list[str] = []
        try:
            runs["PEFT LoRA, liger-kernel"] = liger(self, batch)
        except (ImportError, RuntimeError) as error:
            notes.append(f"liger-kernel: {error}")
        table = self.table(f"train step, {self.size.train[0]} × {self.size.train[1]} tokens", runs, notes)
        try:
            table.seconds["unsloth LoRA"] = unsloth(self)
        except (ImportError, subprocess.CalledProcessError) as error:
            table.notes.append(f"unsloth: {error}")
        return table

    def both_passes(self, batch: tuple[Tensor, Tensor]) -> Run:
        x, y = batch
        embedded = self.model.get_input_embeddings()(x).detach()

        def run() -> None:
            given = embedded.requires_grad_()
            torch.autograd.grad(loss(lambda e: self.model(inputs_embeds=e), (given, y)), given)

        return run

    def decoding(self) -> Table:
        prompt = self.ids(1, self.size.prompt)
        options = {"max_new_tokens": self.size.new, "min_new_tokens": self.size.new, "do_sample": False}
        models: dict[str, Any] = {"base": self.model}
        for method, dora in (("LoRA", False), ("DoRA", True)):
            models[method] = fl.bind(self.model, self.params, adapters_of(self.model, use_dora=dora))
            models[f"PEFT {method}"] = with_peft(self.model, use_dora=dora).eval()

        def generate(model: Any) -> Run:
            mask = torch.ones_like(prompt)
            return torch.no_grad()(lambda: model.generate(input_ids=prompt, attention_mask=mask, **options))

        runs = {name: generate(model) for name, model in models.items()}
        return self.table(f"{self.size.new} new tokens after {self.size.prompt}", runs)

    def routed(self, n: int) -> Table:
        x = self.ids(n, 1)
        runs: dict[str, Run] = {"base": lambda: self.model(x)}
        for method, dora in (("LoRA", False), ("DoRA", True)):
            stack = fl.stack([adapters_of(self.model, i, use_dora=dora) for i in range(n)])
            runs[method] = calling(fl.bind(self.model, self.params, fl.route(stack, list(range(n)))), x)
        if n <= 64:
            other = with_peft(self.model, n).eval()
            runs["PEFT, adapter_names"] = lambda: other(x, adapter_names=[f"m{i}" for i in range(n)])
        return self.table(f"{n} rows of one token, {n} adapters", {k: torch.no_grad()(v) for k, v in runs.items()})

    def population(self, members: int, tokens: int) -> Table:
        x = self.ids(members, 1, tokens)
        batch = x, x.roll(-1, 2)
        runs: dict[str, Run] = {"base, forward and backward": self.both_passes((x[:, 0], batch[1][:, 0]))}
        for method, dora in (("LoRA", False), ("DoRA", True)):
            runs[method] = self.step_of([adapters_of(self.model, i, use_dora=dora) for i in range(members)], batch)
        single = train_funclora(self.model, adapters_of(self.model), (x[0], batch[1][0]))
        runs["LoRA, one by one"] = lambda: [single() for _ in range(members)]
        return self.table(f"train step of {members} adapters, {tokens} tokens each", runs)

    def step_of(self, members: list[Any], batch: Any) -> Run:
        stack: Any = fl.stack(members)
        optimizer = fl.optim.per_member(fl.optim.adamw, lr=[LR] * len(members))
        step = fl.population_step(self.model, loss, optimizer)
        now = [stack, optimizer.init(stack)]

        def run() -> None:
            *now[:], _ = step(self.params, *now, batch)

        return run

    def few_bits(self) -> Table:
        x = self.ids(*self.size.train)
        batch = x, x.roll(-1, 1)
        names = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        names.remove("lm_head")
        packed = fl.quantize(self.params, names, "nf4")
        optimizer = fl.optim.adamw(LR)
        step: Any = fl.train_step(self.model, loss, optimizer)
        now = [tree := adapters_of(self.model), optimizer.init(tree)]

        def run() -> None:
            *now[:], _ = step(packed, *now, batch)

        runs: dict[str, Run] = {"LoRA, bfloat16": train_funclora(self.model, adapters_of(self.model), batch),
                                "LoRA, 4 bits": run,
                                "PEFT, 4 bits": train_peft(packed_with_peft(self.model, names), batch)}  # fmt: skip
        return self.table("train step on 4 bits (nf4)", runs)


def calling(model: nn.Module, x: Tensor) -> Run:
    return lambda: model(x)


def liger(subject: Subject, batch: Any) -> Run:
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("not installed")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    wrapped = with_peft(subject.model)
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=wrapped.base_model.model)
    return train_peft(wrapped, batch)


def unsloth(subject: Subject) -> list[float]:
    """Seconds of unsloth's training steps, in a process of its own: it changes transformers when it is imported."""
    if importlib.util.find_spec("unsloth") is None:
        raise ImportError("not installed")
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        command = [sys.executable, __file__, "--unsloth", folder, *map(str, subject.size.train)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def run_unsloth(folder: str, rows: int, tokens: int, bench: Bench) -> list[float]:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=tokens, dtype=torch.bfloat16, load_in_4bit=False
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=2 * RANK, target_modules=names)
    x = torch.randint(model.config.vocab_size, (rows, tokens), device=bench.device)
    run = train_peft(model, (x, x.roll(-1, 1)))
    return measure(bench, {"unsloth": run})["unsloth"]


def peak(bench: Bench, run: Run) -> int:
    """The most bytes that a call takes, besides what is there before it."""
    gc.collect()
    if bench.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with Peak() as memory:
        run()
    return memory.peak


def works(size: Size) -> Iterator[tuple[str, Callable[[Subject], Table]]]:
    yield "train", Subject.training
    yield "decode", Subject.decoding
    for n in size.adapters:
        yield f"routed {n}", functools.partial(Subject.routed, n=n)
    for members, tokens in size.populations:
        yield f"population {members} × {tokens}", functools.partial(Subject.population, members=members, tokens=tokens)
    yield "4 bits", Subject.few_bits


# --- the page --------------------------------------------------------------------------------------------------


def page(about: dict[str, Any], tables: Sequence[Table]) -> Iterator[str]:
    yield "# Benchmarks on a GPU\n"
    yield "Llamas in bfloat16 with random weights, and adapters of rank 16 on all their linear layers. The contenders"
    yield "share the base weights and take turns; times are medians of the rounds, and a ratio is that of the medians."
    yield "Memory is what a call takes at its peak besides the weights of the base.\n"
    yield f"- {about['machine']}, {about['memory']}; torch {torch.__version__}, peft {peft.__version__}"
    yield f"- {about['date']}"
    yield f"- `{about['command']}`\n"
    for model in dict.fromkeys(table.model for table in tables):
        yield f"\n## {model}\n"
        for table in tables:
            if table.model == model:
                yield from section(table)


def section(table: Table) -> Iterator[str]:
    yield f"\n### {table.work[0].upper()}{table.work[1:]}\n"
    if table.seconds:
        first = next(iter(table.seconds))
        yield from head("", "ms", f"to {first}", "peak MiB")
        for name in table.seconds:
            ratio = table.median(name) / table.median(first)
            yield table_row(
                name, ms(table.median(name)), f"{ratio:.2f}", mib(table.peaks[name]) if name in table.peaks else "–"
            )
    for note in table.notes:
        yield f"\nNot measured: {note}"


def main(argv: Sequence[str] | None = None) -> list[Table]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=[*SIZES], help="billions of weights")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="train, decode, routed, population, 4 bits")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder to write to; docs, but a new one in /tmp with --device cpu")
    parser.add_argument("--unsloth", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    tiny = args.device == "cpu"
    if not tiny and not torch.cuda.is_available():
        print("There is no GPU that torch can use: nothing was measured or written. To see that it runs: --device cpu")
        return []
    bench = Bench(tiny, 2 if tiny else args.rounds, args.device)
    if args.unsloth:
        folder, rows, tokens = args.unsloth
        print(json.dumps(run_unsloth(folder, int(rows), int(tokens), bench)))
        return []
    sizes = {"tiny": TINY} if tiny else {f"{name} billion weights": SIZES[name] for name in args.sizes}
    words = ["python", "examples/benchmark_gpu.py", *(sys.argv[1:] if argv is None else argv)]
    free = 0 if tiny else torch.cuda.mem_get_info()[1]
    about = {
        "machine": machine(args.device), "memory": "a CPU" if tiny else f"{free / 2**30:.0f} GiB",
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}", "command": shlex.join(words),
    }  # fmt: skip
    tables: list[Table] = []
    for name, size in sizes.items():
        subject = Subject(name, size, bench)
        chosen = [(what, work) for what, work in works(size) if args.only in what]
        run_all(
            [Job(f"{name}: {what}", functools.partial(attempt, subject, what, work, tables)) for what, work in chosen]
        )
        del subject
        gc.collect()
    out = args.out or (Path(tempfile.mkdtemp(prefix="benchmark-")) if tiny or args.only else Path("docs"))
    out.mkdir(parents=True, exist_ok=True)
    replace(
        out / "benchmarks-gpu.json", json.dumps([about, *map(dataclasses.asdict, tables)], indent=1).encode() + b"\n"
    )
    replace(out / "benchmarks-gpu.md", ("\n".join(page(about, tables)) + "\n").encode())
    print(f"Written: {out / 'benchmarks-gpu.md'}")
    return tables


def attempt(subject: Subject, what: str, work: Callable[[Subject], Table], tables: list[Table]) -> None:
    """Adds what is measured, or that it does not fit."""
    try:
        tables.append(work(subject))
    except torch.OutOfMemoryError as error:
        note = f"out of memory ({str(error).splitlines()[0]})"
        tables.append(Table(model=subject.name, work=what, notes=[note]))
    gc.collect()
    if subject.bench.device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

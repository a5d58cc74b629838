"""`funclora train`'s loop against PEFT in transformers' Trainer: the same rows in the same order, from the same start.

    python examples/benchmark_train.py              everything; writes docs/benchmarks-train.json, .md and .png
    python examples/benchmark_train.py --quick      tiny sizes and two rounds: shows that it runs, measures nothing
    python examples/benchmark_train.py --page-only  the page again, from the .json

Whole runs take turns. The time of a step is the median over a run without its first two steps; the losses of all steps
are compared besides.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from benchmark_tools import HOW, Bench, Benchmark, Job, Peaks, Result, facts, head, mib, ms, peak, table_row
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

import funclora as fl
from funclora._apps.train.base import Base, load_base, load_tokenizer
from funclora._apps.train.batches import Batches, collate
from funclora._apps.train.examples import Data, prepare
from funclora._apps.train.journal import Journal
from funclora._apps.train.loop import train
from funclora._apps.train.settings import CAUSAL, Settings

SKIPPED = 2  # steps of a run that are not timed: the first ones allocate
OURS, THEIRS = "funclora train", "PEFT in Trainer"
METHODS = {"LoRA": "lora", "DoRA": "dora"}


class Size(NamedTuple):
    layers: int
    dim: int
    context: int
    batch: int
    steps: int


FULL, QUICK = Size(6, 512, 128, 4, 12), Size(1, 64, 16, 2, 4)


class Run(NamedTuple):
    seconds: list[float]  # of each step
    losses: list[float]


class Clock(Journal):
    """A journal that looks at the clock after each step."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, quiet=True)
        self.times = [time.perf_counter()]

    def tick(self, step: int) -> None:
        self.times.append(time.perf_counter())


class TheirClock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


class InOurOrder(Trainer):
    """A Trainer whose epochs read the rows as ours do."""

    rows: list[int]

    def _get_train_sampler(self, *_: Any) -> Any:
        return Fixed(self.rows)


class Fixed(torch.utils.data.Sampler[int]):
    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)


def folder_of_a_model(folder: Path, dim: int, layers: int, lines: int) -> None:
    """A random Llama with a tokenizer, and texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    random.seed(0)
    words = ["".join(random.choices("aeioustrnmlkd", k=random.randint(2, 7))) for _ in range(500)]
    texts = [
        " ".join(random.choices(words, weights=range(500, 0, -1), k=random.randint(40, 120))) for _ in range(lines)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "<eos>"], show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=1024, hidden_size=dim, intermediate_size=dim * 8 // 3 // 64 * 64 or 64, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))  # fmt: skip
    model.save_pretrained(folder / "model")


def ours(base: Base, data: Data, start: Path, settings: Settings) -> Run:
    adapters = fl.load_peft(start, base.model)[0]
    clock = Clock(settings)
    with clock:
        outcome = train(base, adapters, data, settings, clock)
    return Run(_steps(clock.times), [loss for _, loss in outcome.losses["train"]])


def theirs(base: Base, data: Data, start: Path, settings: Settings) -> Run:
    model = peft.PeftModel.from_pretrained(base.model, str(start), is_trainable=True)
    args = TrainingArguments(
        output_dir=str(settings.out), per_device_train_batch_size=settings.batch, max_steps=settings.steps or -1,
        learning_rate=settings.lr, lr_scheduler_type="cosine", warmup_steps=int(settings.warmup),
        weight_decay=settings.weight_decay, max_grad_norm=settings.clip, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    clock = TheirClock()
    trainer = InOurOrder(
        model=model, args=args, train_dataset=data.train, callbacks=[clock],
        data_collator=lambda rows: collate(rows, pad=base.tokenizer.pad_token_id, task=CAUSAL),
    )  # fmt: skip
    order = {id(row): i for i, row in enumerate(data.train)}
    batches = Batches.of(settings, data.train, base.tokenizer.pad_token_id)
    trainer.rows = [order[id(row)] for k in range(settings.steps or 0) for row in batches.rows(k)]
    with contextlib.redirect_stdout(io.StringIO()):  # a dict for every step
        trainer.train()
    model.unload()  # the base is as it was
    return Run(_steps(clock.times), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def _steps(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


class Prepared(NamedTuple):
    """A base, its data, and the folder of the initial adapter."""

    base: Base
    data: Data
    start: Path
    settings: Settings

    def run(self, name: str, to: str) -> Run:
        run = {OURS: ours, THEIRS: theirs}[name]
        return run(self.base, self.data, self.start, replace(self.settings, out=self.start.parent / to))

    def tokens(self) -> float:
        """Of a step, without padding."""
        batches = Batches.of(self.settings, self.data.train, self.base.tokenizer.pad_token_id)
        steps = range(self.settings.steps or 0)
        return statistics.mean(int(batch["attention_mask"].sum()) for k in steps for batch in batches.step(k))


@contextlib.contextmanager
def prepared(bench: Bench, method: str) -> Iterator[Prepared]:
    size = QUICK if bench.quick else FULL
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        folder_of_a_model(folder, size.dim, size.layers, lines=4 * size.batch * size.steps)
        settings = Settings(
            model=folder / "model", data=(folder / "data.jsonl",), validation_split=0.0, context=size.context,
            method=METHODS[method], rank=16, alpha=32, lr=1e-3, warmup=2, weight_decay=0.01, batch=size.batch,
            steps=size.steps,
        )  # fmt: skip
        tokenizer = load_tokenizer(settings)
        base = load_base(settings, tokenizer)
        data = prepare(settings, tokenizer, base.limit)
        config = fl.LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", use_dora=method == "DoRA", task_type="CAUSAL_LM"
        )
        fl.save_peft(folder / "start", fl.init(base.model, config, params=base.params), config)
        yield Prepared(base, data, folder / "start", settings)


def compare(bench: Bench, method: str, result: Result) -> None:
    seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
    curves: dict[str, list[float]] = {}
    with prepared(bench, method) as made:
        for i in range(bench.rounds):
            for name in [*seconds][:: 1 if i % 2 else -1]:
                run = made.run(name, f"{name[0]}{i}")
                seconds[name].append(statistics.median(run.seconds[SKIPPED:]))
                curves[name] = run.losses
        result.about["tokens"][method] = made.tokens()
    result.about["losses"][method] = curves
    result.row(method).seconds = seconds


def jobs(bench: Bench, result: Result) -> Iterator[Job]:
    result.about |= {"tokens": {}, "losses": {}}
    for method in METHODS:
        yield Job(f"time of {method}", functools.partial(compare, bench, method, result))


def memory_of(bench: Bench, name: str) -> Peaks:
    method, _, who = name.partition(": ")
    numbers = itertools.count()
    with prepared(bench, method) as made:
        return {method: {who: peak(lambda: made.run(who, str(next(numbers))))}}


# --- the page --------------------------------------------------------------------------------------------------


def page(result: Result) -> Iterator[str]:
    size, about = FULL, result.about
    yield "# Benchmarks of training\n"
    yield "The training loop of `funclora train` is compared with PEFT's model in transformers' `Trainer`: the same"
    yield "rows in the same order, the same initial values, AdamW with warm-up and cosine, clipping and weight decay."
    yield "Whole runs take turns. The time of a step is the median over a run without its first two steps. It includes"
    yield "batching, the optimizer and logging. What a step should cost is on [the page of one"
    yield "adapter](benchmarks.md).\n"
    yield HOW
    yield from facts(result)
    yield f"- Llama with {size.layers} layers, {size.dim} wide, 1024 tokens, random weights in float32; rank 16 on all"
    yield f"  linear layers; {size.batch} rows of up to {size.context} tokens a step. Tokens are counted without"
    yield "padding.\n"
    names = (THEIRS, OURS)
    columns = [f"{name}, {what}" for what in ("ms", "tokens in a second") for name in names]
    yield from head("", *columns, "ratio of times", "peak MiB of both", "difference of the losses of a step")
    for method, row in result.rows.items():
        times = [row.median(name) for name in names]
        speeds = [f"{about['tokens'][method] / seconds:.0f}" for seconds in times]
        peaks = " / ".join(mib(row.peaks[name]) if name in row.peaks else "–" for name in names)
        curves = about["losses"][method]
        apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
        yield table_row(method, *map(ms, times), *speeds, row.ratio(OURS, THEIRS), peaks, f"{apart:.0e}")
    yield "\n![The losses of both, step by step](benchmarks-train.png)\n"
    yield "The curves coincide. The gain with LoRA is small because the base model's forward and backward pass takes"
    yield "nearly all of the time of a step, and it is the same arithmetic for both."


def draw(result: Result) -> Any:
    from matplotlib.figure import Figure

    losses = result.about["losses"]
    figure = Figure((5 * len(losses), 3.2), layout="constrained")
    for axis, (method, curves) in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses.items(), strict=True):
        for name, line, alpha in ((THEIRS, 4.0, 0.35), (OURS, 1.2, 1.0)):
            axis.plot(range(1, len(curves[name]) + 1), curves[name], linewidth=line, alpha=alpha, label=name)
        axis.set(title=method, xlabel="step", ylabel="loss, nats per token")
        axis.legend()
    return figure


BENCHMARK = Benchmark(
    "benchmarks-train", __file__, ("transformers", "peft"), jobs, page, draw,
    apart=lambda bench: (f"{method}: {name}" for method in METHODS for name in (OURS, THEIRS)), memory_of=memory_of,
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    main()

"""`funclora train`'s loop against PEFT in transformers' Trainer: the same rows in the same order, from the same start.

Whole runs take turns. The time of a step is the median over all runs, the first two steps of each left out; what is
compared besides are the losses of all steps.

    python examples/benchmark_train.py --plot docs/training-loss.png
    python examples/benchmark_train.py --dim 64 --layers 2 --steps 4 --rounds 1 --context 16
"""

from __future__ import annotations

import argparse
import contextlib
import copy
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


class Run(NamedTuple):
    seconds: list[float]  # of each step
    losses: list[float]


class Result(NamedTuple):
    ours: float  # median seconds of a step
    theirs: float
    tokens: float  # of a step, padding left out
    difference: float  # the largest between the losses of a step
    curves: tuple[list[float], list[float]]

    @property
    def ratio(self) -> float:
        """Our throughput over theirs."""
        return self.theirs / self.ours


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
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), str(start), is_trainable=True)
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
    return Run(_steps(clock.times), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def _steps(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def compare(method: str, options: argparse.Namespace, folder: Path) -> Result:
    settings = Settings(
        model=folder / "model", data=(folder / "data.jsonl",), validation_split=0.0, context=options.context,
        method=method, rank=16, alpha=32, lr=1e-3, warmup=2, weight_decay=0.01, batch=options.batch,
        steps=options.steps,
    )  # fmt: skip
    tokenizer = load_tokenizer(settings)
    base = load_base(settings, tokenizer)
    data = prepare(settings, tokenizer, base.limit)
    config = fl.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    start = folder / f"start-{method}"
    fl.save_peft(start, fl.init(base.model, config, params=base.params), config)
    runs: dict[str, list[Run]] = {"ours": [], "theirs": []}
    for i in range(options.rounds):
        for name, run in (("ours", ours), ("theirs", theirs)):
            runs[name].append(run(base, data, start, replace(settings, out=folder / f"{method}-{name}-{i}")))
    medians = {
        name: statistics.median(second for run in some for second in run.seconds[SKIPPED:])
        for name, some in runs.items()
    }
    batches = Batches.of(settings, data.train, base.tokenizer.pad_token_id)
    tokens = statistics.mean(
        int(batch["attention_mask"].sum()) for k in range(options.steps) for batch in batches.step(k)
    )
    curves = runs["ours"][0].losses, runs["theirs"][0].losses
    difference = max(abs(a - b) for a, b in zip(*curves, strict=True))
    return Result(medians["ours"], medians["theirs"], tokens, difference, curves)


def draw(results: dict[str, Result], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 3.2), squeeze=False, layout="constrained")
    for ax, (method, result) in zip(axes[0], results.items(), strict=True):
        ours, theirs = result.curves
        steps = range(1, len(ours) + 1)
        ax.plot(steps, theirs, linewidth=4, alpha=0.35, label="PEFT + Trainer")
        ax.plot(steps, ours, linewidth=1.2, label="funclora train")
        ax.set(title={"lora": "LoRA", "dora": "DoRA"}[method], xlabel="step", ylabel="loss, nats per token")
        ax.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    results = {}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        folder_of_a_model(folder, options.dim, options.layers, lines=4 * options.batch * options.steps)
        for method in ("lora", "dora"):
            results[method] = compare(method, options, folder)
    print(f"{options.layers} layers of {options.dim}, {options.batch} rows of up to {options.context} tokens, "
          f"{options.steps} steps, {options.rounds} rounds, {options.threads} threads")  # fmt: skip
    print(f"{'':6}{'PEFT+Trainer':>22}{'funclora train':>22}{'throughput':>12}{'losses differ by':>18}")
    for method, result in results.items():
        speeds = [f"{s * 1e3:6.0f} ms {result.tokens / s:6.0f} tok/s" for s in (result.theirs, result.ours)]
        print(f"{method:6}{speeds[0]:>22}{speeds[1]:>22}{result.ratio:>12.2f}{result.difference:>18.1e}")
    if options.plot:
        draw(results, options.plot)
    return results


if __name__ == "__main__":
    main()

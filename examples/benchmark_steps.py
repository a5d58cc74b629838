"""What the benchmarks of preferences and embeddings share: steps of `funclora train` beside another library's."""

from __future__ import annotations

import functools
import gc
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from benchmark_tools import Bench, Job, Peaks, Result, measure, peak
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import funclora as fl
from funclora._apps.train.reading import read
from funclora._apps.train.setup import Ready, ready
from funclora._apps.train.step import Steps

OURS = "funclora train"
RANK = 16
TOLERANCE = 1e-3  # of losses and gradients, float32
Record = dict[str, str]
Step = Callable[[], float]  # takes the next step, and returns its loss


class Case(NamedTuple):
    """What is compared.

    Attributes:
        name: on the page.
        settings: of `funclora train`.
    """

    name: str
    settings: Mapping[str, Any]


class Prepared(NamedTuple):
    """A case in a folder, which has the model and the records.

    Attributes:
        made: what `funclora train` would train.
        steps: its training steps.
        records: of the data file.
        folder: for what a contender writes.
        number: of steps that will be taken.
    """

    made: Ready
    steps: Steps
    records: list[Record]
    folder: Path
    number: int

    def batches(self) -> list[list[Record]]:
        """The records of each step."""
        return [
            [self.records[int(source.rpartition(":")[2]) - 1] for source in self.steps.batches.sources(k)]
            for k in range(self.number)
        ]


def words(n: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each of the words w0, w1, ..., and two for the end and for padding."""
    known = ["<pad>", "<end>", *(f"w{i}" for i in range(n - 2))]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", pad_token="<pad>", model_max_length=512)


def ours(prepared: Prepared) -> Step:
    steps, adapters = prepared.steps, prepared.made.start.adapters
    values = steps.vectors.of(adapters)
    now: list[Any] = [0, values, steps.init(values)]

    def step() -> float:
        done = steps(*now)
        now[:] = [now[0] + 1, done.values, done.state]
        return float(done.numbers[0])

    return step


class Comparison(NamedTuple):
    """Both contenders of a benchmark.

    Attributes:
        model: a model and its tokenizer.
        records: so many, in a list.
        other: the name of the other library.
        theirs: its steps; it may not keep what it is given, whose base is not its own.
        cases: what is compared.
        check: raises if the contenders do not compute the same, and returns the largest difference.
    """

    model: Callable[[Bench], tuple[Any, PreTrainedTokenizerFast]]
    records: Callable[[Bench, int], list[Record]]
    other: str
    theirs: Callable[[Prepared], Step]
    cases: Callable[[Bench], Sequence[Case]]
    check: Callable[[Prepared], float] = lambda prepared: 0.0

    @contextmanager
    def prepared(self, bench: Bench, case: Case) -> Iterator[Prepared]:
        transformers.logging.set_verbosity_error()
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for stream in (redirect_stdout, redirect_stderr):  # bars and notes of both libraries
                stack.enter_context(stream(io.StringIO()))
            yield self._in(folder, bench, case)  # and kept nowhere: a contender may need less memory than it

    def _in(self, folder: Path, bench: Bench, case: Case) -> Prepared:
        for part in self.model(bench):
            part.save_pretrained(folder / "model")
        number = bench.rounds + 2
        records = self.records(bench, number * case.settings["batch"])
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
        common = {
            "model": folder / "model", "data": [folder / "data.jsonl"], "validation_split": 0.0, "rank": RANK,
            "alpha": 2 * RANK, "lr": 1e-4, "schedule": "constant", "warmup": 0.0, "out": folder / "run",
        }  # fmt: skip
        made = ready(read(None, {**common, **case.settings}), folder)
        steps = Steps(made.start.base, made.start.adapters, made.data, made.settings)
        return Prepared(made, steps, records, folder, number)

    def compare(self, bench: Bench, case: Case, result: Result) -> None:
        with self.prepared(bench, case) as prepared:
            gap = self.check(prepared)
            steps = {OURS: ours(prepared), self.other: self.theirs(prepared)}
            losses: dict[str, list[float]] = {name: [] for name in steps}
            runs = {name: (lambda name=name, step=step: losses[name].append(step())) for name, step in steps.items()}
            result.row(case.name).seconds = measure(bench, runs)
        for own, other in zip(*losses.values(), strict=True):
            if not abs(own - other) <= TOLERANCE * abs(other):
                raise RuntimeError(f"{case.name}: the losses go apart: {losses}")
            result.about["apart"] = max(result.about["apart"], abs(own - other))
        result.about["gap"] = max(result.about["gap"], gap)

    def jobs(self, bench: Bench, result: Result) -> Iterator[Job]:
        result.about |= {"apart": 0.0, "gap": 0.0}
        for case in self.cases(bench):
            yield Job(f"time of {case.name}", functools.partial(self.compare, bench, case, result))

    def apart(self, bench: Bench) -> Iterator[str]:
        for case in self.cases(bench):
            yield from (f"{case.name}: {who}" for who in (OURS, self.other))

    def memory_of(self, bench: Bench, name: str) -> Peaks:
        title, _, who = name.partition(": ")
        case = next(case for case in self.cases(bench) if case.name == title)
        with self.prepared(bench, case) as prepared:
            step = (ours if who == OURS else self.theirs)(prepared)
            del prepared
            gc.collect()
            return {title: {who: peak(step)}}


def on_disk(prepared: Prepared) -> Path:
    """The initial adapter as a folder for PEFT."""
    start = prepared.folder / "start"
    fl.save_peft(start, *prepared.made.start.exported(prepared.made.start.adapters))
    return start


def optimizer(model: Any, lr: float) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """What is trainable, and what `funclora train` updates it with."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return trainable, torch.optim.AdamW(trainable, lr, weight_decay=0.0, fused=True)

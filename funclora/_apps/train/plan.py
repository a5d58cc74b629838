"""The plan of a run: its targets, its memory, and its first examples with the loss mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from funclora._apps.train import embedding_rows, preference_rows
from funclora._apps.train.adapters import Start
from funclora._apps.train.base import Base
from funclora._apps.train.examples import Data
from funclora._apps.train.preference_records import PAIR
from funclora._apps.train.rows import IGNORED, Example
from funclora._apps.train.settings import (
    DECODERS,
    EMBEDDING,
    MULTI,
    PREFERENCE,
    REGRESSION,
    SEQ2SEQ,
    SEQUENCE,
    TOKEN,
    Settings,
)
from funclora._apps.train.setup import Ready
from funclora._apps.train.step import Steps
from funclora._apps.train.stored import sizes
from funclora._bind.summary import Summary, summary
from funclora._torch.memory import Peak, nbytes
from funclora.distributed import _ranks as ranks

SHOWN = 2  # examples
CHARACTERS = 1200  # of each
WHOLE = 1024  # tokens of a batch that is run as a whole
PROBE = 256  # tokens of the longest row of a part of a larger batch
_ONE_STEP: dict[str, Any] = {"steps": 1, "warmup": 0.0}  # the warm-up of the run may be longer than this test


@dataclass(frozen=True)
class Memory:
    """Peak memory of a step, in bytes.

    Attributes:
        base: of the frozen weights.
        adapters: of the adapters and the optimizer's state.
        step: of activations, gradients and temporary tensors of the optimizer.
    """

    base: int
    adapters: int
    step: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.base + self.adapters + self.step


@dataclass(frozen=True)
class Shown:
    """An example for display.

    Attributes:
        source: its source.
        parts: its text in pieces, each with whether there is loss on it.
        answer: the expected class or classes, if they are not part of the text.
    """

    source: str
    parts: tuple[tuple[str, bool], ...]
    answer: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        summary: the table of what is trained.
        memory: what a step needs.
        steps: optimizer steps.
        rows: training and validation examples.
        longest: tokens of the longest training example.
        examples: the first ones.
        notes: remarks about the data.
    """

    summary: Summary
    memory: Memory
    steps: int
    rows: tuple[int, int]
    longest: int
    examples: tuple[Shown, ...]
    notes: tuple[str, ...]


def plan(ready: Ready) -> Plan:
    """Plan a run, with three small steps to measure the memory."""
    settings, data, start = ready.settings, ready.data, ready.start
    base = start.base
    return Plan(
        summary(base.params, start.adapters),
        memory(start, data.train, settings),
        Steps(base, start.adapters, data, settings).total,
        (len(data.train), len(data.validation)),
        max(int(n) for n, _ in sizes(data.train)),
        tuple(part for example in data.train[:SHOWN] for part in _alone(base, example)),
        tuple(data.notes),
    )


def memory(start: Start, examples: Sequence[Example], settings: Settings) -> Memory:
    """The memory of the largest step. A small step is run and measured; of a larger one, only parts.

    Besides the weights, a step needs c + rows·(a·n + b·n²) bytes for rows of n tokens: the constant does not depend on
    the batch, and the square comes from attention. Runs with one and two shorter rows give these numbers. Workspaces of
    kernels and the allocator's rounding are not included.

    Args:
        start: the base and new adapters; not changed.
        examples: training examples; the longest one counts.
        settings: the run's.
    """
    base = start.base
    lengths = [int(ids) + int(labels) for ids, labels in sizes(examples)]
    longest = examples[lengths.index(max(lengths))]
    n = len(longest.ids)
    rows = min(settings.batch, len(examples))
    step = _step_of(start, settings)
    if n * rows <= WHOLE:
        used = step(_row(base, longest, n), rows)
    else:
        short = min(n, PROBE) // 2 * 2
        half, one, two = (step(_row(base, longest, k), r) for k, r in ((short // 2, 1), (short, 1), (short, 2)))
        whole = two - one
        constant = max(0, one - whole)
        b = max(0.0, (whole - 2 * (half - constant)) / (short**2 / 2))
        a = whole / short - b * short
        used = round(constant + rows * (a * n + b * n**2))
    steps = Steps(base, start.adapters, Data([longest], []), replace(settings, **_ONE_STEP))
    values = steps.vectors.of(start.adapters)
    # The values twice: their current values, and their initial values.
    return Memory(nbytes(list(base.params.values())), 2 * nbytes(values) + nbytes(steps.init(values)), used)


def _step_of(start: Start, settings: Settings) -> Callable[[Example, int], int]:
    """A function from a row and the number of its copies to the peak bytes of a step on them."""
    micro = min(settings.accumulation, 2 * ranks.size())  # with two in a process there are sums of gradients

    def run(row: Example, rows: int) -> int:
        small = replace(settings, batch=rows, accumulation=micro, compile=False, **_ONE_STEP)
        steps = Steps(start.base, start.adapters, Data([row] * rows * micro, []), small)
        values = steps.vectors.of(start.adapters)
        state = steps.init(values)
        with Peak() as used:
            made = steps(0, values, state)
        del made
        return int(used.peak)

    return run


def _row(base: Base, example: Example, n: int) -> Example:
    """The first n tokens of an example."""
    if base.task == EMBEDDING:
        return embedding_rows.shortened(example, n)
    if base.task == PREFERENCE and len(example.lengths) > 1:
        example = preference_rows.whole(example)
        parts = [_row(base, half, min(len(half.ids), max(2, n // 2))) for half in preference_rows.halves(example)]
        if len(parts) == 1:
            return preference_rows.judged(parts[0], bool(example.lengths[0]))
        return preference_rows.compared(*parts)
    labels = example.labels
    if len(labels) == len(example.ids):
        labels = labels[:n]
    elif len(labels) > 1:
        labels = labels[: max(1, len(labels) * n // len(example.ids))]
    if labels and all(label == IGNORED for label in labels):
        labels = [*labels[:-1], example.ids[n - 1]] if len(labels) == n else labels
    return replace(example, ids=example.ids[:n], labels=labels, lengths=(n,), segments=example.segments[:n])


def _alone(base: Base, example: Example) -> list[Shown]:
    """An example for display; each of two answers by itself, and of a packed row those of its first example."""
    if base.task != PREFERENCE:
        return [shown(base, example)]
    first, *rest = preference_rows.alone(example)
    which = f"{example.source}, the first" if rest else example.source
    names = [name for name, n in zip(PAIR, first.lengths, strict=True) if n]
    parts = zip(names, preference_rows.halves(first), strict=True)
    return [replace(shown(base, half), source=f"{which}, {name}") for name, half in parts]


def shown(base: Base, example: Example) -> Shown:
    """An example as text, with its parts with loss."""
    if base.task == EMBEDDING:
        texts = [_text(base, ids) for ids in embedding_rows.parts_of(example)]
        parts = tuple((f"{text}\n" if i < len(texts) - 1 else text, i == 1) for i, text in enumerate(texts))
        return Shown(example.source, parts, ", ".join(f"{score:g}" for score in example.targets))
    if base.task == SEQUENCE:
        return Shown(example.source, ((_text(base, example.ids), False),), _answer(base, example))
    if base.task == SEQ2SEQ:
        parts = ((_text(base, example.ids), False), (_text(base, example.labels), True))
        return Shown(example.source, parts)
    if base.task == TOKEN:
        words: list[tuple[list[int], int]] = []
        for i, label in zip(example.ids, example.labels, strict=True):
            if label != IGNORED:
                words.append(([i], label))
            elif words:  # the rest of a word
                words[-1][0].append(i)
        answer = " ".join(
            f"{base.tokenizer.decode(ids, skip_special_tokens=True).strip()}/{base.classes[label]}"
            for ids, label in words[:50]
        )
        return Shown(example.source, _runs(base, example), answer)
    return Shown(example.source, _runs(base, example))


def _answer(base: Base, example: Example) -> str:
    """The label of a text."""
    if base.problem == REGRESSION:
        return ", ".join(f"{number:g}" for number in example.targets)
    if base.problem == MULTI:
        return ", ".join(name for name, there in zip(base.classes, example.targets, strict=True) if there)
    return base.classes[example.labels[0]]


def _runs(base: Base, example: Example) -> tuple[tuple[str, bool], ...]:
    """Spans of tokens with loss and without."""
    losses = [label != IGNORED for label in example.labels]
    # The first token has no loss, since nothing comes before it. A part of a character cannot be shown alone.
    if base.task in DECODERS and "\N{REPLACEMENT CHARACTER}" not in _text(base, example.ids[:1]):
        losses[0] = False
    runs: list[tuple[list[int], bool]] = []
    for i, loss in zip(example.ids, losses, strict=True):
        if not runs or runs[-1][1] != loss:
            runs.append(([], loss))
        runs[-1][0].append(i)
    return tuple((_text(base, ids), loss) for ids, loss in runs)


def _text(base: Base, ids: list[int]) -> str:
    kept = [i for i in ids if i != IGNORED]
    text: str = base.tokenizer.decode(kept)
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ..."

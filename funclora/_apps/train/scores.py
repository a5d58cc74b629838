"""Scores of many adapters on the examples of a file, in one pass over the base: losses, and metrics of what is said."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from funclora._apps.train.base import THRESHOLD, Base
from funclora._apps.train.batches import collate
from funclora._apps.train.embedding import EmbeddingBase
from funclora._apps.train.metrics import (
    accuracy,
    are_tags,
    confusion,
    f1_by_class,
    macro,
    pearson,
    several_f1,
    span_scores,
    spearman,
)
from funclora._apps.train.preference_loss import PreferenceBase
from funclora._apps.train.rows import IGNORED, Example
from funclora._apps.train.settings import DECODERS, REGRESSION, SEQ2SEQ, TOKEN
from funclora._apps.train.step import moved
from funclora._many.stack import stack as stack_of
from funclora._train.evaluate import by_row
from funclora.distributed import _ranks as ranks
from funclora.errors import UnsupportedError
from funclora.rules.base import Adapters

# Rows that are read at a time; the number that is computed together is measured.
BATCH = 64


@dataclass(frozen=True)
class Score:
    """How good an adapter is on some examples.

    Attributes:
        labels: number of positions with a label.
        values: "loss" in nats per label, or as a squared error for numbers, or of each pair of answers, with their
            rewards; for texts "perplexity"; for classes "accuracy" and "macro_f1"; for tags that mark spans
            "span_precision", "span_recall" and "span_f1"; for several classes of a text "micro_f1", "macro_f1" and
            "all_right", the share of texts whose classes are all right; for numbers "pearson" and "spearman", the means
            over the outputs, and the same for embeddings of scored pairs; for others "recall_at_1" and "recall_at_10".
        by_class: F1 of each class that occurs.
        by_span: F1 of each kind of span.
        confusion: `[class][predicted class]`; empty where a label is not one class.
    """

    labels: int
    values: dict[str, float]
    by_class: dict[str, float] = field(default_factory=dict)
    by_span: dict[str, float] = field(default_factory=dict)
    confusion: list[list[int]] = field(default_factory=list)


def scores(
    base: Base,
    members: Sequence[Adapters],
    examples: Sequence[Example],
    *,
    memory: int | None = None,
    threshold: float = THRESHOLD,
    divided: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> list[Score]:
    """The scores of every member, with the loss and on the positions that training has.

    All members are computed in one pass over the base. Where the model loses track of which row is whose, each has a
    pass of its own.

    Args:
        base: the frozen model, in evaluation mode.
        members: the adapters; `{}` is the base model.
        examples: of one file, not packed.
        memory: bytes, as for `funclora.evaluate`.
        threshold: the probability from which on a text is of a class, where it has several.
        divided: whether the processes divide the examples; otherwise each computes all that it is given.
        progress: called after each batch of `BATCH` examples.
    """
    if isinstance(base, PreferenceBase):
        return _preferences(base, members, examples, memory, divided, progress)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids) + len(examples[i].labels), reverse=True)
    nats = torch.zeros(len(members), dtype=torch.float64)
    labels = sum(1 for example in examples for label in example.labels[base.task in DECODERS :] if label != IGNORED)
    labels += sum(len(example.targets) for example in examples)
    predicted: list[list[Any]] = [[[] for _ in examples] for _ in range(len(members))]
    n = ranks.size() if divided else 1
    rows = min(BATCH, -(-len(order) // n))
    parts = [order[start : start + rows] for start in range(0, len(order), rows)]
    own = parts[ranks.rank() :: n] if divided else parts

    def batches() -> Iterator[Any]:
        for part in own:
            batch = collate([examples[i] for i in part], pad=base.tokenizer.pad_token_id, task=base.task)
            yield moved(batch, base.device)

    found: list[dict[str, Any]] = []
    for out in _by_row(base, members, batches, memory) if own else ():
        if isinstance(base, EmbeddingBase):
            found.append({name: x.cpu() for name, x in out.items()})
            progress()
            continue
        said = {name: out[name].tolist() for name in ("outputs", "predicted") if name in out}
        found.append({"loss": out["loss"].double().sum(1).cpu(), **said})
        progress()
    found = ranks.dealt(found) if divided else found
    if isinstance(base, EmbeddingBase):
        whole = {name: torch.cat([some[name] for some in found], 1) for name in found[0]}
        judged = [base.judge({name: x[m] for name, x in whole.items()}) for m in range(len(members))]
        return [Score(len(examples), {"loss": loss, **values}) for loss, values in judged]
    for part, out in zip(parts, found, strict=True):
        nats += out["loss"]
        if "outputs" in out:
            for each, by_example in zip(predicted, out["outputs"], strict=True):
                for i, outputs in zip(part, by_example, strict=True):
                    each[i] = outputs
        if "predicted" in out:
            for each, by_example in zip(predicted, out["predicted"], strict=True):
                for i, classes in zip(part, by_example, strict=True):
                    each[i] = classes if base.task == TOKEN else [classes]
    return [
        _score(base, labels, float(loss), examples, own, threshold)
        for loss, own in zip((nats / max(1, labels)).tolist(), predicted, strict=True)
    ]


def _preferences(
    base: PreferenceBase,
    members: Sequence[Adapters],
    examples: Sequence[Example],
    memory: int | None,
    divided: bool,
    progress: Callable[[], None],
) -> list[Score]:
    """The scores of every member on pairs of answers, or on single ones."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids), reverse=True)
    starts = [*range(0, len(order), BATCH)]
    if len(starts) > 1 and len(order) % BATCH == 1:
        starts.pop()  # a single answer would have no other
    parts = [order[start:end] for start, end in itertools.pairwise([*starts, len(order)])]
    own = parts[ranks.rank() :: ranks.size()] if divided else parts

    def batches() -> Iterator[Any]:
        for part in own:
            yield moved(
                collate([examples[i] for i in part], pad=base.tokenizer.pad_token_id, task=base.task), base.device
            )

    found: list[Any] = []
    for out in _by_row(base, members, batches, memory) if own else ():
        found.append({name: x.cpu() for name, x in out.items()})
        progress()
    found = ranks.dealt(found) if divided else found
    rows = {name: torch.cat([out[name] for out in found], 1) for name in found[0]}
    judged = [base.judge({name: x[i] for name, x in rows.items()}) for i in range(len(members))]
    return [Score(len(examples), {"loss": loss, **values}) for loss, values in judged]


def _by_row(
    base: Base, members: Sequence[Adapters], batches: Callable[[], Iterator[Any]], memory: int | None
) -> Iterator[Any]:
    """`base.by_row` of all members, batch by batch."""
    stack = stack_of(dict(adapters) for adapters in members)

    def found(*, alone: bool) -> Iterator[Any]:
        return by_row(base.model, base.params, stack, batches(), base.by_row, memory=memory, alone=alone)

    together = found(alone=len(members) == 1)
    try:
        first = [next(together)]
    except UnsupportedError:
        first, together = [], found(alone=True)
    return itertools.chain(first, together)


def _score(
    base: Base, labels: int, loss: float, examples: Sequence[Example], predicted: list[Any], threshold: float
) -> Score:
    if base.task in (*DECODERS, SEQ2SEQ):
        return Score(labels, {"loss": loss, "perplexity": perplexity(loss)})
    if base.classifies:
        pairs = [
            # The rest is padding.
            [(label, said) for label, said in zip(example.labels, some, strict=False) if label != IGNORED]
            for example, some in zip(examples, predicted, strict=True)
        ]
        found = agreement(base.classes, pairs)
    else:
        found = agreement_of_outputs(
            base.problem, base.classes, [each.targets for each in examples], predicted, threshold
        )
    return replace(found, labels=labels, values={"loss": loss, **found.values})


def agreement_of_outputs(
    problem: str,
    classes: Sequence[str],
    true: Sequence[Sequence[float]],
    outputs: Sequence[Sequence[float]],
    threshold: float = THRESHOLD,
) -> Score:
    """The metrics of numbers, or of several classes of each text, without a loss.

    Args:
        problem: which of both.
        classes: their names.
        true: the right outputs of each text.
        outputs: the numbers, or the probabilities.
        threshold: the probability from which on a text is of a class.
    """
    if problem == REGRESSION:
        columns = [*zip(zip(*true, strict=True), zip(*outputs, strict=True), strict=True)]
        values = {
            name: math.fsum(of(*column) for column in columns) / len(columns)
            for name, of in (("pearson", pearson), ("spearman", spearman))
        }
        return Score(len(true), values)
    right = [[share > 0 for share in some] for some in true]
    said = [[share >= threshold for share in some] for some in outputs]
    micro, by_class = several_f1(right, said)
    whole = sum(a == b for a, b in zip(right, said, strict=True)) / len(right)
    known = {name: value for name, value in zip(classes, by_class, strict=True) if value is not None}
    return Score(len(true), {"micro_f1": micro, "macro_f1": macro(by_class), "all_right": whole}, known)


def agreement(classes: Sequence[str], pairs: Sequence[Sequence[tuple[int, int]]]) -> Score:
    """The metrics of predicted classes, without a loss.

    Args:
        classes: their names.
        pairs: for each text the right and the predicted class: one pair, or one for each word.

    Examples:
        >>> found = agreement(["no", "yes"], [[(0, 0)], [(1, 0)], [(1, 1)]])
        >>> {name: round(value, 3) for name, value in found.values.items()}, found.by_class
        ({'accuracy': 0.667, 'macro_f1': 0.667}, {'no': 0.6666666666666666, 'yes': 0.6666666666666666})
    """
    flat = [pair for text in pairs for pair in text]
    table = confusion([true for true, _ in flat], [said for _, said in flat], len(classes))
    by_class = f1_by_class(table)
    values = {"accuracy": accuracy(table), "macro_f1": macro(by_class)}
    by_span: dict[str, float] = {}
    if are_tags(classes):
        true, said = ([[classes[pair[k]] for pair in text] for text in pairs] for k in (0, 1))
        spans = span_scores(true, said)
        values |= {"span_precision": spans.precision, "span_recall": spans.recall, "span_f1": spans.f1}
        by_span = spans.by_kind
    known = {name: value for name, value in zip(classes, by_class, strict=True) if value is not None}
    return Score(len(flat), values, known, by_span, table)


def perplexity(loss: float) -> float:
    """exp(loss), which may be too large for a float.

    Examples:
        >>> perplexity(0.0), perplexity(1e4)
        (1.0, inf)
    """
    return math.exp(loss) if loss < 700 else math.inf

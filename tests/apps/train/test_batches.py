"""Batches: padded rows, each once in an epoch, as a pure function of seed and step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funclora._apps.train.batches import Batches, collate, evaluation
from funclora._apps.train.rows import IGNORED, Example
from funclora._apps.train.settings import CAUSAL, EMBEDDING, PREFERENCE, SEQ2SEQ, SEQUENCE, TASKS, TOKEN
from funclora.errors import ConfigError

PAD = 99


ALONE = [task for task in TASKS if task not in (PREFERENCE, EMBEDDING)]  # tasks of which an example is one row


def row(i: int, length: int, task: str = CAUSAL) -> Example:
    ids = [i * 10 + k for k in range(length)]
    labels = {SEQUENCE: [i], SEQ2SEQ: ids[: max(1, length // 2)]}.get(task, [IGNORED, *ids[1:]])
    return Example(ids, labels, (length,), f"t.jsonl:{i}")


def make(n: int, task: str = CAUSAL) -> list[Example]:
    return [row(i, 1 + (7 * i) % 5, task) for i in range(n)]


def batches(rows: list[Example], **options: Any) -> Batches:
    return Batches(rows, **{"batch": 2, "accumulation": 3, "seed": 0, "pad": PAD, "task": CAUSAL, **options})


@pytest.mark.parametrize("task", ALONE)
def test_rows_come_back_from_their_batch(task: str) -> None:
    rows = make(6, task)
    batch = collate(rows, pad=PAD, task=task)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    for tensor in batch.values():
        assert (tensor.dtype, tensor.device.type, len(tensor)) == (torch.int64, "cpu", 6)
        assert tensor.is_contiguous()
    for i, example in enumerate(rows):
        mask = batch["attention_mask"][i].bool()
        assert mask.tolist() == [k < len(example.ids) for k in range(len(mask))]
        assert batch["input_ids"][i, mask].tolist() == example.ids
        assert set(batch["input_ids"][i, ~mask].tolist()) <= {PAD}
        labels = batch["labels"][i]
        if task == SEQUENCE:
            assert [labels.item()] == example.labels
        else:
            assert labels[: len(example.labels)].tolist() == example.labels
            assert set(labels[len(example.labels) :].tolist()) <= {IGNORED}
    if task in (CAUSAL, TOKEN):
        assert batch["labels"].shape == batch["input_ids"].shape
    if task == SEQ2SEQ:
        assert batch["labels"].shape[1] == max(len(example.labels) for example in rows)


def test_packed_rows_have_positions_and_no_mask() -> None:
    rows = [Example([1, 2, 3], [1, 2, 3], (1, 2), "a"), row(1, 2)]
    batch = collate(rows, pad=PAD, task=CAUSAL)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 0, 1], [0, 1, 0]]
    # A batch of packed data has the same keys if no row of it happens to be packed.
    keys = [set(b) for k in range(2) for b in batches(rows, batch=1, accumulation=1).step(k)]
    assert keys == [set(batch)] * 2
    assert [set(b) for b in evaluation(rows, batch=1, pad=PAD, task=CAUSAL)] == [set(batch)] * 2


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_has_every_row_once(n: int, batch: int, accumulation: int, seed: int) -> None:
    rows = make(n)
    some = batches(rows, batch=batch, accumulation=accumulation, seed=seed)
    assert some.steps_per_epoch == math.ceil(n / (batch * accumulation))
    for epoch in range(3):
        found, sizes = [], []
        for k in range(epoch * some.steps_per_epoch, (epoch + 1) * some.steps_per_epoch):
            micro = some.step(k)
            assert len(micro) == math.ceil(sum(len(b["input_ids"]) for b in micro) / batch)
            sizes += [len(b["input_ids"]) for b in micro]
            ids = [int(first) // 10 for b in micro for first in b["input_ids"][:, 0]]
            assert some.sources(k) == [f"t.jsonl:{i}" for i in ids]
            found += ids
        assert sorted(found) == list(range(n))
        assert all(size == batch for size in sizes[:-1])


def test_a_step_is_a_pure_function_of_seed_and_step() -> None:
    rows = make(23)
    one, other = batches(rows), batches(rows)
    forwards = [one.step(k) for k in range(12)]
    state = torch.get_rng_state()
    for k in reversed(range(12)):
        for a, b in zip(other.step(k), forwards[k], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(torch.get_rng_state(), state)
    both = [batches(rows, seed=seed) for seed in (0, 1)]
    orders = {tuple(s for k in range(4) for s in some.sources(k + 4 * epoch)) for some in both for epoch in (0, 1)}
    assert len(orders) == 4  # another for each seed and each epoch


def test_an_order_is_not_written_to_by_who_reads_it() -> None:
    some = batches(make(7))
    some.step(0)[0]["input_ids"].zero_()
    some.sources(0).clear()
    assert len(some.sources(0)) == 6
    assert some.step(0)[0]["input_ids"].any()


@pytest.mark.parametrize("task", ALONE)
def test_evaluation_has_every_row_once(task: str) -> None:
    rows = make(11, task)
    found = list(evaluation(rows, batch=4, pad=PAD, task=task))
    assert [len(b["input_ids"]) for b in found] == [4, 4, 3]
    widths = [b["input_ids"].shape[1] for b in found]
    assert widths == sorted(widths, reverse=True)
    assert sorted(int(first) // 10 for b in found for first in b["input_ids"][:, 0]) == list(range(11))
    assert list(evaluation([], batch=4, pad=PAD, task=task)) == []


def test_what_makes_no_batches() -> None:
    with pytest.raises(ConfigError, match="examples: there are no examples"):
        batches([])
    with pytest.raises(ConfigError, match="batch: expected 1 or more, got 0"):
        batches(make(1), batch=0)
    with pytest.raises(ConfigError, match="accumulation: expected 1 or more, got -1"):
        batches(make(1), accumulation=-1)
    with pytest.raises(ConfigError, match="step: expected 0 or more, got -1"):
        batches(make(1)).step(-1)

"""`evaluate` gives what a loop over the members gives, in passes as large as its budget."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funclora as fl
from funclora._torch.memory import Peak, is_out_of_memory, nbytes
from funclora._train import passes as evaluating
from funclora.errors import ArgumentError, ConfigError

VOCAB = 11


class Model(nn.Module):
    """Small, with a sequence dimension. Refuses more rows than `limit` at a time, as a full device does."""

    limit = 10**9
    error: Exception = torch.OutOfMemoryError("full")

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, VOCAB)
        self.rows: list[int] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.rows.append(len(ids))
        if len(ids) > self.limit:
            raise self.error
        x: Tensor = self.head(torch.tanh(self.hidden(self.embed(ids))))
        return x


def members() -> list[Any]:
    """The base, and adapters that differ in rank, method and scaling, in no order."""
    model = Model()
    found: list[Any] = [{}]
    for i, (r, dora) in enumerate([(1, True), (2, False), (1, False), (2, True), (2, False), (4, False)]):
        config = fl.LoraConfig(
            r=r, lora_alpha=i + 1, target_modules="all-linear", use_dora=dora, init_lora_weights=False
        )
        found.append(fl.init(model, config, generator=torch.Generator().manual_seed(i)))
    return found


def by_row(bound: Any, ids: Tensor) -> Tensor:
    logits = bound(ids[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.unflatten(0, (len(ids), -1)).mean(1)


def spread(bound: Any, ids: Tensor) -> Tensor:
    """No mean over rows: right only if a batch is never cut."""
    return by_row(bound, ids).var(correction=0)


def several(bound: Any, ids: Tensor) -> dict[str, Any]:
    logits = bound(ids[:, :-1])
    return {"loss": by_row(bound, ids), "right": [logits.argmax(-1).eq(ids[:, 1:]).all(1)]}


def data() -> list[Tensor]:
    """Batches of different numbers of rows, and rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, shape, generator=generator) for shape in ((5, 7), (1, 7), (8, 3), (0, 3), (3, 20))]


def looped(model: nn.Module, adapters: list[Any], metric: Callable[..., Tensor]) -> Tensor:
    params = fl.base_params(model)
    means = []
    with torch.no_grad():
        for one in adapters:
            bound = fl.bind(model, params, one)
            values = [(metric(bound, ids), len(ids)) for ids in data() if len(ids)]
            total = sum(v.double().sum() if v.dim() else v.double() * n for v, n in values)
            means.append(total / sum(n for _, n in values))
    return torch.stack([torch.as_tensor(mean) for mean in means]).float()


@pytest.mark.parametrize("memory", [None, 1, 5_000, 20_000, 200_000])
@pytest.mark.parametrize("metric", [by_row, spread])
def test_equals_a_loop_over_the_members(metric: Callable[..., Tensor], memory: int | None) -> None:
    model, adapters = Model(), members()
    found = fl.evaluate(model, fl.base_params(model), fl.stack(adapters), iter(data()), metric, memory=memory)
    expected = looped(model, adapters, metric)
    assert len(set(expected.tolist())) == len(adapters)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("memory", [None, 20_000])
def test_trees_of_metrics(memory: int | None) -> None:
    model, adapters = Model(), members()
    found = fl.evaluate(model, fl.base_params(model), fl.stack(adapters), data(), several, memory=memory)
    torch.testing.assert_close(found["loss"], looped(model, adapters, by_row))
    right = looped(model, adapters, lambda bound, ids: several(bound, ids)["right"][0])
    assert found["right"][0].dtype == torch.float32
    torch.testing.assert_close(found["right"][0], right)


def test_passes_keep_to_the_budget_and_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[int] = []

    class Watched(Peak):
        def __exit__(self, *args: Any) -> None:
            peaks.append(self.peak)
            super().__exit__(*args)

    monkeypatch.setattr(evaluating, "Peak", Watched)
    model, stack = Model(), fl.stack([members()[2]] * 60)
    batches = [torch.randint(VOCAB, (16, 9)) for _ in range(3)]
    passes = []
    for memory in (60_000, 300_000, 10**9):
        peaks.clear()
        fl.evaluate(model, fl.base_params(model), stack, batches, by_row, memory=memory)
        assert max(peaks) <= memory
        if memory < 10**9:
            assert max(peaks) > memory / 3
        passes.append(len(peaks))
    assert passes[0] > 3 * passes[1]
    assert passes[2] == 1 + 3  # two rows of two members to see, then each batch at once


GROWTH = """
import re, torch, funclora as fl
from pathlib import Path
from funclora.demo.model import load_base, next_byte_loss

def peak():  # MiB that this program held at most; ru_maxrss would start from what its parent held
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
model = load_base()
config = fl.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
stack = fl.stack(fl.init(model, config, generator=torch.Generator().manual_seed(i)) for i in range(24))
ids = torch.randint(256, (4, 257), generator=torch.Generator().manual_seed(0))
fl.evaluate(model, fl.base_params(model), stack[:1], [ids[:1, :9]], next_byte_loss)  # loads code
for memory in (2**24, 10**9):
    before = peak()
    fl.evaluate(model, fl.base_params(model), stack, [ids], next_byte_loss, memory=memory)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_grows_by_what_the_budget_asks_for() -> None:
    out = subprocess.run([sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True).stdout
    small, large = map(float, out.split())
    assert small < 64 < 128 < large, out


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")]
)
@pytest.mark.parametrize("limit", [1, 3, 20])
def test_a_full_device_makes_passes_smaller(limit: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapters = Model(), members()
    expected = looped(model, adapters, by_row)
    monkeypatch.setattr(Model, "limit", limit)
    monkeypatch.setattr(Model, "error", error)
    found = fl.evaluate(model, fl.base_params(model), fl.stack(adapters), data(), by_row)
    torch.testing.assert_close(found, expected)


def test_the_smallest_pass_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    monkeypatch.setattr(Model, "limit", 0)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        fl.evaluate(model, fl.base_params(model), fl.stack(members()), data(), by_row)
    monkeypatch.setattr(Model, "limit", 2)  # a metric of the batch as a whole needs all of its rows
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        fl.evaluate(model, fl.base_params(model), fl.stack(members()), data(), spread)


def test_other_errors_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    monkeypatch.setattr(Model, "limit", 4)
    monkeypatch.setattr(Model, "error", RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        fl.evaluate(model, fl.base_params(model), fl.stack(members()), data(), by_row)


def test_nothing_is_differentiated_and_nothing_written() -> None:
    model = Model()
    adapters: dict[str, fl.Rule] = {
        name: fl.LoRA(rule.a.requires_grad_(), rule.b.requires_grad_()) for name, rule in members()[2].items()
    }
    before = [tensor.clone() for tensor in model.parameters()]
    found = fl.evaluate(model, dict(model.named_parameters()), fl.stack([adapters]), data(), by_row)
    assert not found.requires_grad
    assert all(map(torch.equal, before, model.parameters()))


def test_sums_and_weights_give_the_mean_over_tokens() -> None:
    def sums(bound: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        return by_row(bound, ids) * (ids.shape[1] - 1), torch.full((len(ids),), ids.shape[1] - 1.0)

    model, adapters = Model(), members()
    params = fl.base_params(model)
    nats, tokens = fl.evaluate(model, params, fl.stack(adapters), data(), sums)
    with torch.no_grad():
        bound = fl.bind(model, params, adapters[3])
        losses = [F.cross_entropy(bound(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
                  for ids in data()]  # fmt: skip
    torch.testing.assert_close((nats / tokens)[3], torch.cat(losses).mean())


def _complaint(metric: Any = by_row, batches: Any = None, stack: Any = None, memory: Any = None) -> None:
    model = Model()
    stack = fl.stack(members()) if stack is None else stack
    fl.evaluate(model, fl.base_params(model), stack, data() if batches is None else batches, metric, memory=memory)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="data has no rows"):
        _complaint(batches=[torch.zeros(0, 3, dtype=torch.long)])
    with pytest.raises(ConfigError, match="agree in their dimension 0"):
        _complaint(batches=[(torch.zeros(2, 3), torch.zeros(3, 3))])
    with pytest.raises(ArgumentError, match="expected a stack of adapters, got a list"):
        _complaint(stack=members())
    for memory in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="memory: expected a positive number of bytes"):
            _complaint(memory=memory)
    with pytest.raises(ConfigError, match=r"one of shape \[2, 6, 11\]"):
        _complaint(lambda bound, ids: bound(ids[:, :-1]))
    with pytest.raises(ConfigError, match="got a float"):
        _complaint(lambda bound, ids: 1.0)
    with pytest.raises(ConfigError, match="at least one tensor"):
        _complaint(lambda bound, ids: ())
    names = iter("ab")
    with pytest.raises(ConfigError, match="as before"):
        _complaint(lambda bound, ids: {next(names): by_row(bound, ids)})


def test_peak_counts_what_is_made_and_not_what_is_given() -> None:
    x = torch.zeros(1000)
    with Peak() as memory:
        kept = x[:10].add_(1), x.view(10, 100)
        assert (memory.live, memory.peak) == (0, 0)
        kept = (x + 1).view(10, 100)[:5], x
        assert (memory.live, memory.peak) == (4000, 4000)
        torch.func.vmap(lambda row: row * 2)(x.view(10, 100))
        assert (memory.live, memory.peak) == (4000, 8000)
    del kept
    assert memory.live == 0


def test_bytes_of_shared_memory_count_once() -> None:
    x = torch.zeros(10, dtype=torch.float64)
    assert nbytes({"a": x, "b": [x[2:], torch.zeros(3)], "c": None}) == 92


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError) as caught:  # noqa: PT011 -- the message is what is tested
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)

"""What a short examination says of models, and that answers are right whatever it says."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers
from customers import WAIT, Asked, Customers
from torch import Tensor, nn

import funclora as fl
from funclora.errors import FuncloraWarning, UnsupportedError
from funclora.serving import Engine, Settings
from funclora.serving._memory import Cached
from funclora.serving._reader import Reader

GREEDY = Settings(max_tokens=8, temperature=0.0)


def reader(kind: str) -> Reader:
    model, _ = architectures.build(kind)
    with torch.no_grad():
        return Reader(fl.bind(model, fl.base_params(model), {}))


@pytest.mark.parametrize(
    ("kind", "decodes", "pads", "pieces", "cuts"),
    [
        ("LlamaForCausalLM", "any", True, True, True),
        ("BloomForCausalLM", "any", True, True, True),
        ("MistralForCausalLM", "any", True, True, False),  # a sliding window
        ("Qwen3NextForCausalLM", "any", True, True, False),  # states
        ("JambaForCausalLM", "any", True, False, False),
        ("BartForCausalLM", "equal", False, True, True),
        ("RwkvForCausalLM", "any", True, True, False),
    ],
)
def test_which_rows_may_be_read_together(kind: str, decodes: str, pads: bool, pieces: bool, cuts: bool) -> None:
    found = reader(kind)
    assert (found.decodes, found.pads, found.pieces, found.cuts) == (decodes, pads, pieces, cuts)


def test_a_window_is_one_however_long_it_is() -> None:
    """Longer than the texts of the examination, it drops nothing of them."""
    config: Any = architectures.build("MistralForCausalLM")[0].config
    config.sliding_window = 48
    model = transformers.MistralForCausalLM(config).eval()
    with torch.no_grad():
        assert not Reader(fl.bind(model, fl.base_params(model), {})).cuts


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("BertLMHeadModel", "BertLMHeadModel gives other logits with its cache"),
        ("T5ForConditionalGeneration", "T5ForConditionalGeneration is an encoder-decoder"),
        ("CpmAntForCausalLM", "CpmAntForCausalLM does not read a text in several calls: RuntimeError"),
    ],
)
def test_models_that_cannot_be_served_are_refused_at_the_start(kind: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        reader(kind)


def test_rows_of_a_cache_that_is_not_known_are_decoded_alone(tmp_path: Path) -> None:
    model, _ = architectures.build("DeepseekV32ForCausalLM")
    customers = Customers(model, tmp_path, 0)
    asked = [Asked([5, 6, 7, 8], None, GREEDY), Asked([9, 10], None, GREEDY)]
    with pytest.warns(FuncloraWarning, match="DeepseekV32ForCausalLM: .* each answer is decoded alone"):
        engine = Engine(model, customers.params, tmp_path, eos_ids=())
    with engine:
        streams = [engine.submit(request.ids, None, request.settings) for request in asked]
        assert [stream.result(WAIT) for stream in streams] == [customers.alone(request) for request in asked]


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "MistralForCausalLM", "JambaForCausalLM"])
def test_a_cache_holds_plain_tensors_no_longer_than_its_rows_need(kind: str, tmp_path: Path) -> None:
    model, _ = architectures.build(kind)
    customers = Customers(model, tmp_path, 2)
    cache = fl.AdapterCache(model, tmp_path, 2**20, params=customers.params)
    read = reader(kind)
    memory: Any = read.memory()
    assert isinstance(memory, Cached)
    base = fl.bind(model, customers.params, {})
    two, three = (
        fl.bind(model, customers.params, cache.route(["customer-0", "customer-1", *others])) for others in ([], [None])
    )
    with torch.no_grad():
        memory.read(two, [[5] * 12, [6] * 12])
        memory.read(two, [[7], [8]])
        other: Any = read.memory()
        other.read(base, [[9, 10]])
        memory.join(other)
        memory.read(three, [[11], [12], [13]])
        assert memory.lengths == [14, 14, 3]
        tensors = [x for layer in memory._cache.layers for x in contents(layer)]
        assert {type(x) for x in tensors} == {Tensor}
        assert {len(x) for x in tensors} == {3}
        memory.keep([2])
        memory.read(base, [[14]])
    for layer in memory._cache.layers:
        assert all(len(x) == 1 for x in contents(layer))
        if getattr(layer, "keys", None) is not None:
            assert layer.keys.shape[-2] == layer.get_seq_length() == 4


def contents(layer: Any) -> list[Tensor]:
    found = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for name in ("conv_states", "recurrent_states"):
        found += getattr(layer, name, {}).values()
    return [x for x in found if x is not None]


class Careless(nn.Module):
    """A model that keeps no track of its rows, so that a batch cannot have several adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).cumsum(1)
        x = torch.tensor(x.tolist())
        return self.head(self.mix(x).tanh())


def test_adapters_that_cannot_share_a_batch_are_read_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Careless().eval()
    config, params = fl.LoraConfig(r=2, target_modules=["mix"]), fl.base_params(model)
    adapters: dict[str | None, Any] = {None: {}}
    for folder in ("one", "two"):
        rule: Any = fl.init(model, config)["mix.weight"]
        adapters[folder] = {"mix.weight": dataclasses.replace(rule, b=torch.randn_like(rule.b))}
        fl.save_peft(tmp_path / folder, adapters[folder], config)
    with pytest.raises(UnsupportedError, match="rows"):
        fl.apply(model, params, fl.route(fl.stack([adapters["one"], adapters["two"]]), [0, 1]), torch.ones(2, 1).long())
    engine = Engine(model, params, tmp_path, max_rows=4)
    names = ["one", "two", None, "two", "one", None]
    streams = [engine.submit([i + 1, 3], name, GREEDY) for i, name in enumerate(names)]
    with engine:
        answers = [stream.result(WAIT) for stream in streams]
    for i, (name, answer) in enumerate(zip(names, answers, strict=True)):
        text = [i + 1, 3]
        for _ in range(GREEDY.max_tokens):
            text.append(int(fl.apply(model, params, adapters[name], torch.tensor([text]))[0, -1].argmax()))
        assert answer == text[2:]


def test_long_answers_are_read_again_in_pieces_after_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    model, _ = architectures.build("LlamaForCausalLM")
    customers = Customers(model, tmp_path, 2)
    read: Callable[..., Tensor] = Cached.read
    failed: list[int] = []

    def once(self: Cached, bound: nn.Module, new: Any) -> Tensor:
        if len(new) == 3 and min(self.lengths, default=0) > 12 and not failed:
            failed.append(len(new))
            raise torch.OutOfMemoryError("too large")
        return read(self, bound, new)

    settings = Settings(max_tokens=24, temperature=0.0)
    asked = [Asked([5, 6, 7, i], f"customer-{i // 2}", settings) for i in range(3)]
    with Engine(model, customers.params, tmp_path, eos_ids=(), prefill_tokens=5) as engine:
        monkeypatch.setattr(Cached, "read", once)
        streams = [engine.submit(request.ids, request.adapter, request.settings) for request in asked]
        assert [stream.result(WAIT) for stream in streams] == [customers.alone(request) for request in asked]
    assert failed == [3]


def test_an_error_that_only_a_full_batch_raises_ends_no_answer(tmp_path: Path, monkeypatch: Any) -> None:
    model, _ = architectures.build("LlamaForCausalLM")
    customers = Customers(model, tmp_path, 2)
    read: Callable[..., Tensor] = Cached.read

    def small(self: Cached, bound: nn.Module, new: Any) -> Tensor:
        if len(new) > 1:
            raise torch.OutOfMemoryError("too large")
        return read(self, bound, new)

    monkeypatch.setattr(Cached, "read", small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FuncloraWarning)
        engine = Engine(model, customers.params, tmp_path, eos_ids=())
    monkeypatch.setattr(engine._decoder._reader, "decodes", "any")
    asked = [Asked([5, 6], "customer-0", GREEDY), Asked([7], "customer-1", GREEDY), Asked([8], None, GREEDY)]
    streams = [engine.submit(request.ids, request.adapter, request.settings) for request in asked]
    with engine:
        assert [stream.result(WAIT) for stream in streams] == [customers.alone(request) for request in asked]

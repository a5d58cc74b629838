"""`summary`: its counts and its table."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from funclora import DoRA, Full, LoRA, LoraConfig, base_params, init, summary
from funclora.errors import ParamsError
from funclora.rules.layouts import Parameter


class Model(nn.Module):
    """A tied head, a buffer of numbers and one of counts, expert weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.q = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.conv = nn.Conv1d(4, 4, 3, groups=2)
        self.experts = nn.ParameterDict({"w": nn.Parameter(torch.zeros(3, 5, 6))})
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


CONFIGS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"rank_pattern": {"q": 1}, "bias": "all"},
    {"use_dora": True, "target_parameters": ["experts.w"], "bias": "lora_only"},
    {"target_parameters": ["experts.w"], "exclude_modules": ["conv"]},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_counts_are_the_numbers_of_elements(fields: dict[str, Any]) -> None:
    model = Model()
    fields = {"r": 2, "target_modules": ["q", "conv", "embed"], **fields}
    adapters = init(model, LoraConfig(**fields))
    result = summary(base_params(model), adapters)
    trainable = {name: sum(getattr(rule, leaf).numel() for leaf in rule.leaf_names) for name, rule in adapters.items()}
    assert {row.name: row.trainable for row in result.rows} == trainable
    assert [row.name for row in result.rows] == list(adapters)
    assert result.trainable == sum(trainable.values())
    # `parameters()` counts the tied weight once; a running mean and variance are part of the base, a count is not.
    assert result.total == sum(p.numel() for p in model.parameters()) + 2 * 4
    assert result.percent == 100 * result.trainable / result.total


def test_the_textbook_case() -> None:
    params = {"q": torch.empty(4096, 4096, device="meta")}
    result = summary(params, {"q": LoRA(torch.empty(8, 4096), torch.empty(4096, 8))})
    assert (result.trainable, result.total) == (65_536, 16_777_216)
    assert result.percent == 0.390625
    assert str(result).endswith("65,536 of 16,777,216 = 0.39 % trainable")


def test_rows_name_the_rule_the_shape_and_the_rank() -> None:
    params = {
        "l": torch.zeros(3, 5), "d": torch.zeros(3, 5), "c": torch.zeros(4, 2, 3), "e": torch.zeros(2, 3, 5),
        "f": torch.zeros(7),
    }  # fmt: skip
    adapters = {
        "l": LoRA(torch.zeros(2, 5), torch.zeros(3, 2)),
        "d": DoRA(torch.zeros(1, 5), torch.zeros(3, 1), torch.zeros(3)),
        "e": LoRA(torch.zeros(2, 4, 5), torch.zeros(2, 3, 4), layout=Parameter()),
        "f": Full(torch.zeros(7)),
    }
    rows = [(row.name, row.rule, row.shape, row.r, row.trainable) for row in summary(params, adapters).rows]
    assert rows == [
        ("l", "LoRA", (3, 5), 2, 16),
        ("d", "DoRA", (3, 5), 1, 11),
        ("e", "LoRA", (2, 3, 5), 4, 64),
        ("f", "Full", (7,), None, 7),
    ]


def test_tied_weights_count_once_and_equal_ones_twice() -> None:
    weight = torch.zeros(3, 5)
    adapter = {"a": LoRA(torch.zeros(1, 5), torch.zeros(3, 1))}
    assert summary({"a": weight, "b": weight}, adapter).total == 15
    assert summary({"a": weight, "b": weight.detach()}, adapter).total == 15
    assert summary({"a": weight, "b": weight.T.clone().T}, adapter).total == 30
    assert summary({"a": weight, "b": weight.clone()}, adapter).total == 30


def test_equal_shapes_of_a_tensor_subclass_are_not_taken_for_tied() -> None:
    params: dict[str, torch.Tensor] = {n: TwoTensor(torch.zeros(3, 5), torch.zeros(3, 5)) for n in "ab"}
    assert summary(params, {}).total == 30
    assert summary(params | {"c": params["a"].detach()}, {}).total == 30


def test_tied_weights_on_the_meta_device_count_once() -> None:
    model = Model().to("meta")
    model.head.weight = model.embed.weight
    adapters = init(model, LoraConfig(target_modules=("q",)))
    assert summary(base_params(model), adapters).total == sum(p.numel() for p in model.parameters()) + 2 * 4


def test_the_table_is_aligned() -> None:
    params = {"layers.0.q_proj.weight": torch.zeros(300, 700), "b": torch.zeros(12)}
    adapters = {
        "layers.0.q_proj.weight": LoRA(torch.zeros(16, 700), torch.zeros(300, 16)),
        "b": Full(torch.zeros(12)),
    }
    assert str(summary(params, adapters)).split("\n") == [
        "target                  rule  shape     r  trainable",
        "----------------------  ----  -------  --  ---------",
        "layers.0.q_proj.weight  LoRA  300×700  16     16,000",
        "b                       Full  12                  12",
        "16,012 of 210,012 = 7.62 % trainable",
    ]


def test_every_line_of_a_large_table_is_as_wide_as_the_rule() -> None:
    model = Model()
    adapters = init(model, LoraConfig(r=2, target_modules=("q", "conv", "embed"), bias="all", use_dora=True))
    header, rule, *rows, _ = str(summary(base_params(model), adapters)).split("\n")
    assert len(rows) == len(adapters)
    assert re.fullmatch(r"-+(  -+){4}", rule)
    edges = [m.start() for m in re.finditer("  ", rule)]
    for line in (header, *rows):
        assert len(line) == len(rule)
        assert all(line[edge : edge + 2] == "  " for edge in edges)


def test_no_adapters() -> None:
    result = summary({"a": torch.zeros(4)}, {})
    assert (result.rows, result.trainable, result.total, result.percent) == ((), 0, 4, 0.0)
    assert str(result) == "\n".join([
        "target  rule  shape  r  trainable", "------  ----  -----  -  ---------", "0 of 4 = 0.00 % trainable",
    ])  # fmt: skip
    assert summary({}, {}).percent == 0.0


def test_adapters_that_do_not_fit_are_refused() -> None:
    rule = LoRA(torch.zeros(1, 5), torch.zeros(3, 1))
    with pytest.raises(ParamsError, match=r"adapters rewrite 'q', which params do not hold. Near names: p"):
        summary({"p": torch.zeros(3, 5)}, {"q": rule})
    with pytest.raises(ParamsError, match=re.escape("adapter of 'p': a has shape [1, 5], expected [1, 4]")):
        summary({"p": torch.zeros(3, 4)}, {"p": rule})

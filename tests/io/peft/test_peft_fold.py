"""`fold_scaling`: a folder that is right for readers which know r, lora_alpha and the targets, and no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import gen, gpt2_conv1d
from peft_oracle import Net, Row, build, close, peft_loads, random_adapters
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funclora import LoRA, LoraConfig, apply, base_params, load_peft, merge, save_peft


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(1) @ self.up.mT).sum(1)


class Mixed(nn.Module):
    """One layer of each kind that a folder can hold, and stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.q_proj = nn.Linear(6, 5)
        self.conv = nn.Conv1d(5, 4, 3, padding=1)
        self.experts = Experts()

    def forward(self, ids: Tensor) -> Tensor:
        return self.experts(self.conv(self.q_proj(self.embed(ids)).mT).mT)


ROWS = [
    Row("rslora", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 3}),
    Row("patterns", {"target_modules": ["q_proj", "v_proj", "embed"], "alpha_pattern": {"q_proj": 9},
                     "rank_pattern": {"layers.0.v_proj": 4, "embed": 1}, "modules_to_save": ["head"]}),
    Row("dora", {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True, "rank_pattern": {"0.q_proj": 5}}),
    Row("lora-bias", {"target_modules": ["q_proj", "head"], "lora_bias": True, "rank_pattern": {"head": 1}}),
    Row("tokens", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [4, 1]}, "lora_alpha": 7}),
    Row("kinds", {"target_modules": ["q_proj", "conv", "embed"], "target_parameters": ["up"], "use_rslora": True,
                  "rank_pattern": {"conv": 3, "up": 2, "embed": 4}}, Mixed),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_peft_gives_the_same_outputs(row: Row, tmp_path: Path) -> None:
    model = build(row)
    adapters, config = random_adapters(row, model)
    before = pytree.tree_map(torch.clone, adapters)

    save_peft(tmp_path, adapters, config, fold_scaling=True)

    expected = apply(model, base_params(model), adapters, row.x)
    close(peft_loads(model, tmp_path, row.ignore or "did not match")(row.x), expected)
    loaded, changed = load_peft(tmp_path, model)
    close(apply(model, base_params(model), loaded, row.x), expected)
    assert (changed.lora_alpha, changed.alpha_pattern, changed.rank_pattern) == (changed.r, {}, {})
    assert not changed.use_rslora
    assert all(rule.scaling == 1 for rule in loaded.values() if rule.scaling is not None)
    assert all(torch.equal(x, y) for x, y in zip(*map(pytree.tree_leaves, (adapters, before)), strict=True))


def simple(folder: Path, alpha_over: Callable[[int, Tensor], float]) -> dict[str, Tensor]:
    """The updates of linear layers as a reader without patterns computes them."""
    raw = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, b in tensors.items():
        if key.endswith(".lora_B.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            assert any(name.endswith(target) for target in raw["target_modules"])
            a = tensors[key.replace("lora_B", "lora_A")]
            found[f"{name}.weight"] = raw["lora_alpha"] / alpha_over(raw["r"], b) * b @ a
    return found


@pytest.mark.parametrize(("reader", "alpha_over"), [
    ("vLLM", lambda r, b: r),  # PEFTHelper: lora_alpha / r
    ("llama.cpp", lambda r, b: b.shape[1]),  # lora_alpha / rank of the tensor
])  # fmt: skip
@pytest.mark.parametrize("fold", [True, False])
def test_a_reader_of_r_and_alpha_alone(
    reader: str, alpha_over: Callable[[int, Tensor], float], fold: bool, tmp_path: Path
) -> None:
    row = Row("patterns", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "alpha_pattern": {"q_proj": 9},
                           "rank_pattern": {"layers.0.v_proj": 4}}, Net)  # fmt: skip
    model = build(row)
    adapters, config = random_adapters(row, model)
    save_peft(tmp_path, adapters, config, fold_scaling=fold)
    params, right = base_params(model), merge(base_params(model), adapters)

    updates = simple(tmp_path, alpha_over)

    assert set(updates) == set(adapters)
    errors = [(params[n] + update - right[n]).abs().max().item() for n, update in updates.items()]
    assert (max(errors) < 1e-12) == fold, "without folding such a reader is wrong"


def test_lower_ranks_are_filled_up_with_zeros(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    config = LoraConfig(r=1, target_modules=["0", "1"], rank_pattern={"1": 4}, lora_alpha=3)
    rules = {"0.weight": LoRA(torch.ones(1, 4), torch.ones(3, 1), scaling=3.0),
             "1.weight": LoRA(torch.ones(4, 3), torch.ones(2, 4), scaling=0.75)}  # fmt: skip
    save_peft(tmp_path, rules, config, fold_scaling=True)
    adapters, changed = load_peft(tmp_path, model)
    loaded: dict[str, Any] = adapters
    assert changed.r == changed.lora_alpha == 4
    assert torch.equal(loaded["0.weight"].a, torch.cat([torch.ones(1, 4), torch.zeros(3, 4)]))
    assert torch.equal(loaded["0.weight"].b, torch.cat([torch.full((3, 1), 3.0), torch.zeros(3, 3)], 1))
    assert torch.equal(loaded["1.weight"].b, torch.full((2, 4), 0.75))


def test_a_power_of_two_costs_no_digit_in_half_precision(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=8)
    drawn = {name: LoRA(torch.randn((2, 6), generator=gen(1)).bfloat16(), torch.randn(6, 2).bfloat16(), scaling=4.0)
             for name in ("layers.0.q_proj.weight", "layers.1.q_proj.weight")}  # fmt: skip
    save_peft(tmp_path, drawn, config, fold_scaling=True)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, rule in drawn.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"
        assert torch.equal(stored[key], 4 * rule.b)


def test_what_does_not_agree_is_not_folded(tmp_path: Path) -> None:
    from funclora.errors import ConfigError

    config = LoraConfig(r=1, target_modules=["0"], lora_alpha=3)
    rule = LoRA(torch.ones(1, 4), torch.ones(3, 1), scaling=3.0)
    with pytest.raises(ConfigError, match="scaling 2, but the configuration gives 3"):
        save_peft(tmp_path, {"0.weight": replace(rule, scaling=2.0)}, config, fold_scaling=True)


def test_hf_conv1d_is_folded_too(tmp_path: Path) -> None:
    row = Row("conv1d", {"target_modules": ["0"], "use_rslora": True}, lambda: nn.Sequential(gpt2_conv1d()),
              torch.randn(2, 5).double())  # fmt: skip
    model = build(row)
    adapters, config = random_adapters(row, model)
    save_peft(tmp_path, adapters, config, fold_scaling=True)
    expected: Any = apply(model, base_params(model), adapters, row.x)
    close(peft_loads(model, tmp_path)(row.x), expected)

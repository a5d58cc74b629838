"""PEFT as the oracle: its models for a configuration, with random adapters, and ours beside them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from cases import gen
from oracle import tensors
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funclora import LoraConfig, init
from funclora.errors import PeftFormatWarning
from funclora.io.peft.folder import load_peft

IDS = torch.tensor([[1, 2, 3, 10], [4, 0, 2, 2]])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 6, bias=False)
        self.mlp = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(torch.tanh(self.q_proj(x)) + self.v_proj(x))


class Net(nn.Module):
    """Embedding, two layers in a list, a normalisation, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Row:
    """One configuration on one model.

    Attributes:
        name: the test's id.
        config: fields of the configuration, with PEFT's names.
        model: makes the model.
        x: the input.
        inputs: keyword arguments of forward.
        tied: PEFT merges into the shared tensor, on both sides.
        ignore: what PEFT warns of without need when it loads our folder.
        note: what we warn of when we load PEFT's folder.
    """

    name: str
    config: dict[str, Any]
    model: Callable[[], nn.Module] = Net
    x: Tensor = IDS
    tied: bool = False
    inputs: dict[str, Any] = field(default_factory=dict, kw_only=True)
    ignore: str = field(default="", kw_only=True)
    note: str = field(default="", kw_only=True)

    def __str__(self) -> str:
        return self.name


def build(row: Row, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model of a row, alike at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return row.model().eval().to(dtype)


def random_peft(row: Row, model: nn.Module) -> Any:
    """PEFT's model with an adapter in which everything that trains is random."""
    config = {"r": 2, "lora_alpha": 3, "init_lora_weights": True} | copy.deepcopy(row.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if value.requires_grad:
                noise = torch.randn(value.shape, generator=gen(len(name)), dtype=torch.float64).to(value.dtype)
                value.copy_(value * (1 + noise / 3) if "magnitude" in name else value + noise / 2)
    return wrapped


def save_quietly(wrapped: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)


def peft_loads(model: nn.Module, folder: Path, ignore: str = "") -> Any:
    """PEFT's model from a folder; every warning but the ignored one is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in (ignore, "`is_gradient_checkpointing` is deprecated"):
            if message:
                warnings.filterwarnings("ignore", message=f".*{message}")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Assert that every element of every tensor agrees."""
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected) > 0
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def logits(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, without a cache."""
    return tensors(output.logits if hasattr(output, "logits") else output)


def reload_with(folder: Path, state: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """Tensors under PEFT's keys, in the shape of our adapters."""
    save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftFormatWarning)
        return load_peft(folder, model)[0]


def random_adapters(row: Row, model: nn.Module) -> tuple[dict[str, Any], LoraConfig]:
    """Our own adapters for the configuration, with random leaves."""
    fields = {"r": 2, "lora_alpha": 3} | row.config
    if row.config.get("task_type") == "SEQ_CLS":  # PEFT adds the heads by itself
        heads = [name for name, _ in model.named_children() if name.endswith("classifier")]
        fields["modules_to_save"] = heads
    config = LoraConfig(**fields)
    noise = gen(5)

    def shake(leaf: Tensor) -> Tensor:
        return leaf * 1.5 + torch.randn(leaf.shape, generator=noise, dtype=torch.float64).to(leaf.dtype) / 2

    return pytree.tree_map(shake, init(model, config, generator=gen(4))), config

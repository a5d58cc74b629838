"""From adapter to plain model: merge, load into a fresh module, save as safetensors, round to half precision.

    python examples/merge_into_plain_model.py
    python examples/merge_into_plain_model.py --dora --out merged.safetensors

The base is a network with random weights, which keeps the script short; nothing here depends on what it knows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import funclora as fl


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 2))


def target(x: Tensor) -> Tensor:  # [n, 4] -> [n, 2]
    return torch.stack([torch.sin(2 * x[:, 0]) + x[:, 1], x[:, 2] * x[:, 3]], dim=1)


class Result(NamedTuple):
    first_loss: float
    last_loss: float
    merged_difference: float  # largest over all outputs, of the plain model from the adapted one
    file_difference: float  # of the model read from the file from the plain one
    once: float  # shares of bfloat16 weights that are not next to the exact ones: rounded once,
    twice: float  # rounded twice,
    lost: float  # and of base weights not brought back by subtraction
    params_unchanged: bool


def differing(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The share of all expected values that the actual ones differ from."""
    unequal = torch.cat([(actual[name] != value).flatten() for name, value in expected.items()])
    return unequal.float().mean().item()


def report(label: str, value: str | bool) -> None:
    print(f"{label:50} {value}")


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description="Merges a trained adapter into a plain model.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--dora", action="store_true", help="DoRA in place of LoRA")
    parser.add_argument("--out", type=Path, help="keep the merged weights in this file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)

    # 1. Train an adapter.
    model = make_model()
    params = fl.base_params(model)
    before = {name: tensor.clone() for name, tensor in params.items()}
    config = fl.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear", use_dora=options.dora)
    adapters = fl.init(model, config)
    optimizer = fl.optim.adamw(options.lr)
    state, losses = optimizer.init(adapters), []
    step = fl.train_step(model, lambda bound, x: F.mse_loss(bound(x), target(x)), optimizer)
    for _ in range(options.steps):
        adapters, state, metrics = step(params, adapters, state, torch.randn(256, 4))
        losses.append(metrics["loss"].item())
    report("loss at the first and the last step", f"{losses[0]:.4f}, {losses[-1]:.4f}")

    # 2. Merge it. A fresh model loads the result as any other state dict and needs funclora no more.
    x = torch.randn(1000, 4)
    merged = fl.merge(params, adapters)
    plain = make_model()
    plain.load_state_dict(merged)
    with torch.no_grad():
        adapted, loaded = fl.apply(model, params, adapters, x), plain(x)
    merged_difference = (loaded - adapted).abs().max().item()
    report("largest difference of merged from adapted outputs", f"{merged_difference:.1e}")

    # 3. The same by way of a file.
    with tempfile.TemporaryDirectory() as folder:
        path = options.out or Path(folder) / "merged.safetensors"
        save_file(merged, path)
        from_file = make_model()
        from_file.load_state_dict(load_file(path))
    with torch.no_grad():
        file_difference = (from_file(x) - loaded).abs().max().item()
    report("largest difference after saving and loading", f"{file_difference:.1e}")

    # 4. Half precision. `merge` computes in float32 and rounds once, at the end: to the bfloat16 number next to the
    #    exact one. `weight += update` in bfloat16 rounds the update and then the sum, and `-=` does not lead back.
    #    Here nothing needs undoing, because the base weights were never overwritten.
    half = {name: params[name].bfloat16() for name in adapters}
    exact = fl.merge({name: tensor.double() for name, tensor in half.items()}, adapters)
    nearest = {name: tensor.bfloat16() for name, tensor in exact.items()}
    update = {name: (exact[name] - half[name]).bfloat16() for name in half}
    added = {name: half[name] + update[name] for name in half}
    undone = {name: added[name] - update[name] for name in half}
    once, twice, lost = differing(fl.merge(half, adapters), nearest), differing(added, nearest), differing(undone, half)
    report("bfloat16 weights not next to exact: merge", f"{once:.2%}")
    report("bfloat16 weights not next to exact: += update", f"{twice:.2%}")
    report("base weights not brought back by -= update", f"{lost:.2%}")

    unchanged = all(torch.equal(params[name], tensor) for name, tensor in before.items())
    report("original params bit for bit as they were", unchanged)
    return Result(losses[0], losses[-1], merged_difference, file_difference, once, twice, lost, unchanged)


if __name__ == "__main__":
    main()

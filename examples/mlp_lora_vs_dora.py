"""LoRA and DoRA side by side: an MLP learns one regression task and is adapted to a shifted one.

    python examples/mlp_lora_vs_dora.py
    python examples/mlp_lora_vs_dora.py --rank 2 --samples 4096 --full-lr 3e-3

Both tasks are a random teacher network; in the shifted one, two planes of its inputs are rotated and its outputs
have other gains. There are few samples of it. Full fine-tuning of a copy, in plain PyTorch, is the reference.
"""

from __future__ import annotations

import argparse
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funclora as fl

INPUTS, HIDDEN, OUTPUTS = 16, 128, 8


class Task(NamedTuple):
    """A random teacher network, behind a linear map of its inputs and before gains of its outputs."""

    teacher: nn.Module
    rotation: Tensor  # [in, in]
    gains: Tensor  # [out]

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, INPUTS)
        with torch.no_grad():
            return x, self.teacher(x @ self.rotation) * self.gains


class Result(NamedTuple):
    trainable: int
    train_loss: float
    heldout_loss: float


def two_tasks(angle: float) -> tuple[Task, Task]:
    first, last = nn.Linear(INPUTS, 32), nn.Linear(32, OUTPUTS)
    for layer in (first, last):  # PyTorch's own smaller weights would make a nearly linear function
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    teacher = nn.Sequential(first, nn.Tanh(), last)
    generator = torch.zeros(INPUTS, INPUTS)
    generator[0, 1] = generator[2, 3] = angle
    rotation = torch.linalg.matrix_exp(generator - generator.T)
    return (
        Task(teacher, torch.eye(INPUTS), torch.ones(OUTPUTS)),
        Task(teacher, rotation, torch.linspace(0.5, 1.5, OUTPUTS)),
    )


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    """Plain PyTorch training of all parameters, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        F.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()


def adapt(
    model: nn.Module, config: fl.LoraConfig, x: Tensor, y: Tensor, steps: int, lr: float
) -> tuple[nn.Module, int]:
    """The same loop over an adapter. `model` stays as it is; returns a view of it and the adapter's size."""
    params, adapters = fl.base_params(model), fl.init(model, config)
    summary = fl.summary(params, adapters)
    print(f"\n{summary}")
    optimizer = fl.optim.adamw(lr, weight_decay=0.0)
    state = optimizer.init(adapters)
    step = fl.train_step(model, lambda bound, batch: F.mse_loss(bound(batch[0]), batch[1]), optimizer)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        adapters, state, _ = step(params, adapters, state, (x[rows], y[rows]))
    return fl.bind(model, params, adapters), summary.trainable


def main(argv: list[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description="Adapts an MLP with LoRA, DoRA and full fine-tuning.")
    parser.add_argument("--pretrain-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=500, help="of adaptation, the same for all methods")
    parser.add_argument("--samples", type=int, default=512, help="of the shifted task to train on")
    parser.add_argument("--angle", type=float, default=0.8, help="of the rotation, in radians")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-3, help="of LoRA and DoRA")
    parser.add_argument("--full-lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)

    base_task, shifted_task = two_tasks(options.angle)
    model = nn.Sequential(
        nn.Linear(INPUTS, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUTPUTS)
    )
    fit(model, *base_task.sample(8192), options.pretrain_steps, lr=2e-3)

    train, heldout = shifted_task.sample(options.samples), shifted_task.sample(4096)
    models: dict[str, tuple[nn.Module, int]] = {"base model": (model, 0)}
    for name, use_dora in (("LoRA", False), ("DoRA", True)):
        config = fl.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear", use_dora=use_dora)
        models[name] = adapt(model, config, *train, options.steps, options.lr)
    tuned = copy.deepcopy(model)
    fit(tuned, *train, options.steps, options.full_lr)
    models["full fine-tuning"] = tuned, sum(p.numel() for p in tuned.parameters())

    print(f"\nShifted task, {options.samples} samples, {options.steps} steps of 128 samples, mean squared error:\n")
    print(f"{'':16}  {'trainable':>9}  {'training':>8}  {'held-out':>8}")
    results = {}
    for name, (net, trainable) in models.items():
        with torch.no_grad():
            results[name] = Result(trainable, *(F.mse_loss(net(x), y).item() for x, y in (train, heldout)))
        print("{:16}  {:9,}  {:8.4f}  {:8.4f}".format(name, *results[name]))
    return results


if __name__ == "__main__":
    main()

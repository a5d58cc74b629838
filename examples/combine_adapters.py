"""Two adapters, trained apart, become one that does both tasks: sums, recompression, TIES, DARE, and PEFT folders.

    python examples/combine_adapters.py
    python examples/combine_adapters.py --rank 8 --density 0.3

The base is a network with random weights. Each task asks for a change of one of its two outputs and none of the other.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funclora as fl
from funclora import algebra
from funclora.algebra import COMBINATION_TYPES

Adapters = dict[str, fl.Rule]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 2))


TASKS = {
    "left": lambda x: torch.stack([0.3 * torch.sin(2 * x[:, 0]), torch.zeros(len(x))], dim=1),
    "right": lambda x: torch.stack([torch.zeros(len(x)), 0.3 * x[:, 0] * x[:, 1]], dim=1),
}


class Result(NamedTuple):
    losses: dict[str, dict[str, float]]  # name of a combination -> task -> error, in parts of the base's
    ranks: dict[str, int]
    undone: float  # largest difference of the outputs from the base's, after adding what was negated
    folder: float  # and of those under the combined folder from those under the combined adapters


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description="Combines two adapters.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)

    # 1. An adapter for each task.
    model = make_model()
    params = fl.base_params(model)
    config = fl.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=["2", "4"])

    def wanted(x: Tensor, *tasks: str) -> Tensor:
        with torch.no_grad():
            return model(x) + sum(TASKS[task](x) for task in tasks)

    def trained(task: str) -> Adapters:
        optimizer = fl.optim.adamw(options.lr)
        step = fl.train_step(model, lambda bound, x: F.mse_loss(bound(x), wanted(x, task)), optimizer)
        adapters = fl.init(model, config)
        state = optimizer.init(adapters)
        for _ in range(options.steps):
            adapters, state, _ = step(params, adapters, state, torch.randn(128, 2))
        return adapters

    left, right = trained("left"), trained("right")

    # 2. Combinations of them.
    def random() -> torch.Generator:
        return torch.Generator().manual_seed(options.seed)

    total = algebra.add([left, right])
    combined: dict[str, Adapters] = {
        "left alone": left,
        "right alone": right,
        "sum": total,
        "sum, recompressed": algebra.recompress(total, options.rank),
        "half of each": algebra.interpolate(left, right, 0.5),
    }
    for kind in COMBINATION_TYPES:
        pruning = {"density": options.density} if kind.startswith(("ties", "dare", "magnitude")) else {}
        generator = random() if kind.startswith("dare") else None
        combined[kind] = algebra.combine([left, right], [1.0, 1.0], kind, generator=generator, **pruning)

    # 3. What they do. 1 is the error of the base, 0 is what was asked for.
    x = torch.randn(2000, 2)

    def error(adapters: Adapters, *tasks: str) -> float:
        target = wanted(x, *tasks)
        with torch.no_grad():
            return (F.mse_loss(fl.apply(model, params, adapters, x), target) / F.mse_loss(model(x), target)).item()

    tasks = {"left": ("left",), "right": ("right",), "both": ("left", "right")}
    losses = {n: {task: error(adapters, *parts) for task, parts in tasks.items()} for n, adapters in combined.items()}
    ranks = {
        name: max(rule.r for rule in each.values() if isinstance(rule, fl.LoRA)) for name, each in combined.items()
    }
    print(f"{'':20} {'rank':>4} {'left':>8} {'right':>8} {'both':>8}")
    for name, row in losses.items():
        print(f"{name:20} {ranks[name]:4} " + " ".join(f"{row[task]:8.3f}" for task in tasks))

    # 4. What was added can be taken away again.
    with torch.no_grad():
        without = fl.apply(model, params, algebra.add([total, algebra.negate(total)]), x)
        undone = (without - model(x)).abs().max().item()
    print(f"\nlargest difference after taking the sum away from itself {undone:.1e}")

    # 5. The same with folders, as PEFT writes and reads them: no model is needed.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        fl.save_peft(path / "left", left, config)
        fl.save_peft(path / "right", right, config)
        fl.combine_peft([path / "left", path / "right"], path / "both", [1.0, 1.0], "cat")
        loaded, _ = fl.load_peft(path / "both", model)
    with torch.no_grad():
        difference = fl.apply(model, params, loaded, x) - fl.apply(model, params, total, x)
    print(f"largest difference of the combined folder from the sum   {difference.abs().max():.1e}")
    return Result(losses, ranks, undone, difference.abs().max().item())


if __name__ == "__main__":
    main()

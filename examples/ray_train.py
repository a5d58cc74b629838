"""Ray Train's TorchTrainer trains an adapter of a frozen model in several workers, each with its own rows.

    pip install "ray[train]"
    python examples/ray_train.py
    python examples/ray_train.py --workers 4 --gpu --out adapter

The workers' adapter is a checkpoint of Ray's: a PEFT folder. Here it is compared with one process that takes all rows.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import optree
import ray
import torch
import torch.nn.functional as F
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch import Tensor, nn

import funclora as fl

ROWS = 32


class Result(NamedTuple):
    losses: list[float]  # of worker 0
    difference: float  # from the adapter that one process trains on all rows


def problem() -> tuple[nn.Module, fl.LoraConfig, Tensor, Tensor]:
    """A base model and data that every worker makes for itself, with the same generator."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3))
    x = torch.randn(ROWS, 8)
    return model, fl.LoraConfig(r=4, target_modules="all-linear", use_dora=True), x, x[:, :3].sin()


def train(settings: dict[str, Any]) -> None:
    """What each worker does, and one process alone."""
    model, config, x, y = problem()
    module: Any = fl.as_module(model, fl.base_params(model), fl.init(model, config), config)
    rank, workers = settings.get("rank"), 1
    if rank is None:
        context = ray.train.get_context()
        rank, workers = context.get_world_rank(), context.get_world_size()
    # A DistributedDataParallel, which averages the gradients: the module's only parameters are the adapter's.
    wrapped = prepare_model(module) if workers > 1 else module
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    x, y = (each[rank::workers].to(get_device() if workers > 1 else "cpu") for each in (x, y))
    losses = []
    for _ in range(settings["steps"]):
        optimizer.zero_grad()
        loss = F.mse_loss(wrapped(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if workers == 1:
        module.save_pretrained(settings["out"])
        return
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder, is_main_process=rank == 0)
        ray.train.report({"losses": losses}, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)
    del wrapped, optimizer
    gc.collect()  # freed after Ray has destroyed the process group, it could wait for ever for gloo's thread


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", help="folder for the adapter (default: a temporary one)")
    args = parser.parse_args(argv)
    if args.workers < 2:
        parser.error("--workers: expected at least 2")

    with tempfile.TemporaryDirectory() as scratch:
        trainer = TorchTrainer(
            train,
            train_loop_config={"steps": args.steps},
            scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
            run_config=RunConfig(storage_path=scratch),
        )
        result = trainer.fit()
        if result.error is not None:
            raise result.error
        train({"steps": args.steps, "rank": 0, "out": f"{scratch}/alone"})
        folder = result.checkpoint.to_directory(args.out or f"{scratch}/adapter")
        model = problem()[0]
        found, alone = (fl.load_peft(each, model)[0] for each in (folder, Path(scratch, "alone")))
    leaves: list[list[Any]] = [optree.tree_leaves(each) for each in (found, alone)]  # type: ignore[arg-type]
    pairs = zip(*leaves, strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    losses = result.metrics["losses"]
    print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {args.workers} workers differ from one process by {difference:.1e}"
    )
    return Result(losses, difference)


if __name__ == "__main__":
    try:
        main()
    finally:
        ray.shutdown()

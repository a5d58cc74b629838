"""How much faster a search is when its members are trained together.

Trains the same members for the same steps on the same data twice: as one population, and one after the other as runs
of their own. Prints both times, their ratio, and the largest difference between the two ways' losses. No way can be
faster than the base's own forward and backward pass over the same rows, which is timed too.

    python examples/sweep_speed.py --batch 1 --context 16
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import funclora as fl
from funclora._apps.sweep.space import Member, Space
from funclora._apps.sweep.task import Task, load_task
from funclora._apps.train.settings import Settings
from funclora._apps.train.setup import demo_data
from funclora._apps.train.step import Steps
from funclora.optim import per_member


@dataclass(frozen=True)
class Result:
    members: int
    together: float
    one_by_one: float
    difference: float
    base: float

    @property
    def ratio(self) -> float:
        return self.one_by_one / self.together


def train_together(task: Task, members: list[Member]) -> tuple[float, list[float]]:
    optimizer = per_member(task.optimizer(), lr=[m.lr for m in members])
    step = fl.population_step(task.model, task.loss, optimizer)
    stack = fl.stack([task.start(member).adapters for member in members])
    state = optimizer.init(stack)
    losses: list[float] = []
    started = time.perf_counter()
    for k in range(task.steps):
        batch = task.batch([m.seed for m in members], k)
        stack, state, metrics = step(task.base.params, stack, state, batch)
        losses = metrics["loss"].tolist()
    return time.perf_counter() - started, losses


def train_one_by_one(task: Task, members: list[Member]) -> tuple[float, list[float]]:
    losses = []
    seconds = 0.0
    for member in members:
        adapters = task.start(member).adapters
        steps = Steps(task.base, adapters, task.data, task.member_settings(member))
        values = steps.vectors.of(adapters)
        state = steps.init(values)
        loss = 0.0
        started = time.perf_counter()
        for k in range(task.steps):
            values, state, numbers, _ = steps(k, values, state)
            loss = numbers[0].item()
        seconds += time.perf_counter() - started
        losses.append(loss)
    return seconds, losses


def train_nothing(task: Task, members: list[Member]) -> float:
    """Seconds of forward and backward passes through the base alone, on the rows of all members."""
    # Down to the first layer's output, as adapters in it would need.
    base = task.base
    nudge = {name: torch.zeros((), requires_grad=True) for name in base.params if "embed" in name}
    started = time.perf_counter()
    for k in range(task.steps):
        batch = task.batch([m.seed for m in members], k)
        rows = {key: batch[key].flatten(0, 1) for key in ("input_ids", "labels")}
        params = {name: x + nudge[name] if name in nudge else x for name, x in base.params.items()}
        torch.autograd.grad(base.loss(fl.bind(task.model, params, {}), rows), [*nudge.values()])
    return time.perf_counter() - started


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=16)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rank", default="8")
    parser.add_argument("--targets", default="q_proj+v_proj")
    options = parser.parse_args(argv)
    space = Space(lr="1e-4:1e-2", rank=options.rank, method=options.method, targets=options.targets, seeds="0,1,2,3")
    members = space.draws(options.members, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            data=(demo_data(Path(folder), "asyncio"),),
            context=options.context,
            batch=options.batch,
            steps=options.steps,
            warmup=float(min(4, options.steps - 1)),
        )
        task = load_task(settings, Path(folder), rows=1)
    warm = replace(task, settings=replace(settings, steps=1, warmup=0.0))  # what is only slow once is not counted
    train_together(warm, members)
    train_one_by_one(warm, members[:1])
    together, losses = train_together(task, members)
    one_by_one, alone = train_one_by_one(task, members)
    difference = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
    result = Result(len(members), together, one_by_one, difference, train_nothing(task, members))
    print(f"{len(members)} members, {options.steps} steps, {options.batch} x {options.context} tokens each")
    print(f"together    {together:8.2f} s")
    print(f"one by one  {one_by_one:8.2f} s")
    print(f"base alone  {result.base:8.2f} s")
    print(f"ratio       {result.ratio:8.1f}, losses differ by at most {difference:.1e}")
    return result


if __name__ == "__main__":
    main()

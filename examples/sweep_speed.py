"""How much faster a search is when its members are trained together.

Trains the same members for the same steps on the same data twice: as one population, and one after the other with
`funclora.train_step`. Prints both times, their ratio, and the largest difference between the two ways' losses. No way
can be faster than the base's own forward and backward pass over the same rows, which is timed too.

    python examples/sweep_speed.py --batch 1 --context 16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import funclora as fl
from funclora._apps.sweep.settings import SearchSettings
from funclora._apps.sweep.space import Member, Space
from funclora._apps.sweep.task import Task, demo_task
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


def fresh(task: Task, member: Member) -> dict[str, fl.Rule]:
    return fl.init(task.model, member.config(), generator=torch.Generator().manual_seed(member.seed))


def train_together(task: Task, members: list[Member], settings: SearchSettings) -> tuple[float, list[float]]:
    optimizer = per_member(settings.optimizer(), lr=[m.lr for m in members])
    step = fl.population_step(task.model, task.loss, optimizer)
    stack = fl.stack([fresh(task, member) for member in members])
    state = optimizer.init(stack)
    losses: list[float] = []
    started = time.perf_counter()
    for k in range(settings.steps):
        batch = torch.stack([task.batch(m.seed, k, settings.batch) for m in members])
        stack, state, metrics = step(task.params, stack, state, batch)
        losses = metrics["loss"].tolist()
    return time.perf_counter() - started, losses


def later(schedule: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The schedule without its first step, whose rate is 0."""
    return lambda step: schedule(step + 1)


def train_one_by_one(task: Task, members: list[Member], settings: SearchSettings) -> tuple[float, list[float]]:
    losses = []
    seconds = 0.0
    for member in members:
        schedule = fl.optim.warmup_cosine(member.lr, settings.warmup, settings.steps + 1)
        adamw = fl.optim.adamw(later(schedule), weight_decay=settings.weight_decay)
        optimizer = fl.optim.chain(fl.optim.clip_by_global_norm(settings.clip), adamw)
        step = fl.train_step(task.model, task.loss, optimizer)
        adapters = fresh(task, member)
        state = optimizer.init(adapters)
        loss = 0.0
        started = time.perf_counter()
        for k in range(settings.steps):
            adapters, state, metrics = step(task.params, adapters, state, task.batch(member.seed, k, settings.batch))
            loss = metrics["loss"].item()
        seconds += time.perf_counter() - started
        losses.append(loss)
    return seconds, losses


def train_nothing(task: Task, members: list[Member], settings: SearchSettings) -> float:
    """Seconds of forward and backward passes through the base alone, on the rows of all members."""
    # Down to the first layer's output, as adapters in it would need.
    nudge = {name: torch.zeros((), requires_grad=True) for name in task.params if "embed" in name}
    started = time.perf_counter()
    for k in range(settings.steps):
        rows = torch.cat([task.batch(m.seed, k, settings.batch) for m in members])
        params = {name: x + nudge[name] if name in nudge else x for name, x in task.params.items()}
        torch.autograd.grad(task.loss(fl.bind(task.model, params, {}), rows), [*nudge.values()])
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
    task = demo_task("asyncio", context=options.context, windows=1)
    space = Space(lr="1e-4:1e-2", rank=options.rank, method=options.method, targets=options.targets, seeds="0,1,2,3")
    members = space.draws(options.members, seed=0)
    settings = SearchSettings(steps=options.steps, warmup=min(4, options.steps), batch=options.batch)
    warm = SearchSettings(steps=1, warmup=0, batch=options.batch)  # what is only slow once is not counted
    train_together(task, members, warm)
    train_one_by_one(task, members[:1], warm)
    together, losses = train_together(task, members, settings)
    one_by_one, lock_folder = train_one_by_one(task, members, settings)
    difference = max(abs(a - b) for a, b in zip(losses, lock_folder, strict=True))
    result = Result(len(members), together, one_by_one, difference, train_nothing(task, members, settings))
    print(f"{len(members)} members, {options.steps} steps, {options.batch} x {options.context} tokens each")
    print(f"together    {together:8.2f} s")
    print(f"one by one  {one_by_one:8.2f} s")
    print(f"base alone  {result.base:8.2f} s")
    print(f"ratio       {result.ratio:8.1f}, losses differ by at most {difference:.1e}")
    return result


if __name__ == "__main__":
    main()

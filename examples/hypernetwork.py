"""A hypernetwork: a network that reads examples of a task and answers with an adapter for it.

    python examples/hypernetwork.py
    python examples/hypernetwork.py --steps 2000 --examples 5

The tasks are sine waves of any height and phase. The base model, frozen, knows one wave. No adapter is ever trained:
the hypernetwork is, through `apply`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funclora as fl


class Result(NamedTuple):
    base: float  # mean squared error on new tasks: of the base model
    answered: float  # with the adapters that the hypernetwork makes
    shuffled: float  # with those that it makes for other tasks
    trained: float  # with an adapter trained on the same examples
    base_unchanged: bool


# --8<-- [start:hypernetwork]
class Hypernetwork(nn.Module):
    """Examples of tasks to adapters, one for each task.

    Attributes:
        like: an adapter of the structure that is wanted.
    """

    def __init__(self, like: Mapping[str, Any], width: int = 128) -> None:
        super().__init__()
        self.like = like
        self.encode = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        sizes = [leaf.numel() for rule in like.values() for leaf in (rule.a, rule.b)]
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, examples: Tensor) -> list[dict[str, fl.Rule]]:  # [n_tasks, n_examples, 2]
        codes = self.encode(examples).mean(1)  # in whatever order the examples come
        factors = iter([head(codes) for head in self.heads])
        pairs = {name: (next(factors), next(factors)) for name in self.like}
        return [
            {
                name: fl.LoRA(a[task].view_as(rule.a), b[task].view_as(rule.b), scaling=rule.scaling)
                for (name, rule), (a, b) in zip(self.like.items(), pairs.values(), strict=True)
            }
            for task in range(len(examples))
        ]


def answers(model: nn.Module, params: Any, adapters: list[dict[str, fl.Rule]], x: Tensor) -> Tensor:
    """Every task's inputs [n_tasks, n, 1] under its own adapter, in one batch."""
    tasks, n, _ = x.shape
    routed = fl.route(fl.stack(adapters), torch.arange(tasks).repeat_interleave(n).tolist())
    return fl.apply(model, params, routed, x.flatten(0, 1)).view(tasks, n, 1)
    # --8<-- [end:hypernetwork]


def draw(tasks: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Waves of random height and phase at random places: x and y, [tasks, n, 1] each."""
    height = 0.5 + 1.5 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    x = 6 * torch.rand(tasks, n, 1, generator=generator) - 3
    return x, height * torch.sin(x + phase)


def tuned(model: nn.Module, params: Any, like: Any, x: Tensor, y: Tensor, steps: int) -> list[Any]:
    """An adapter for each task, trained on its examples: a population."""
    stack = fl.stack([like] * len(x))
    optimizer = fl.optim.per_member(fl.optim.adamw, lr=[1e-2] * len(x))
    step = fl.population_step(model, lambda bound, batch: F.mse_loss(bound(batch[0]), batch[1]), optimizer)
    state = optimizer.init(stack)
    for _ in range(steps):
        stack, state, _ = step(params, stack, state, (x, y))
    return list(stack)


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description="Trains a network that makes adapters from examples.")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--examples", type=int, default=10, help="that it sees of a task")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--tuning-steps", type=int, default=100, help="of the adapters that it is compared with")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    pretraining = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(300):
        x = 6 * torch.rand(64, 1, generator=generator) - 3
        pretraining.zero_grad()
        F.mse_loss(model(x), torch.sin(x)).backward()
        pretraining.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    params = fl.base_params(model)
    like: Any = fl.init(model, fl.LoraConfig(r=options.rank, target_modules=["2", "4"]), generator=generator)
    seen, asked = slice(options.examples), slice(options.examples, None)
    # --8<-- [start:training]
    hypernetwork = Hypernetwork(like)
    optimizer = torch.optim.AdamW(hypernetwork.parameters(), 2e-3)
    for _ in range(options.steps):
        x, y = draw(16, 2 * options.examples, generator)
        adapters = hypernetwork(torch.cat([x, y], -1)[:, seen])
        loss = F.mse_loss(answers(model, params, adapters, x[:, asked]), y[:, asked])
        optimizer.zero_grad()
        loss.backward()  # through apply and the adapters to the hypernetwork
        optimizer.step()
    # --8<-- [end:training]

    x, y = draw(64, options.examples + 50, generator)
    x_seen, y_seen, x, y = x[:, seen], y[:, seen], x[:, asked], y[:, asked]
    with torch.no_grad():
        made = hypernetwork(torch.cat([x_seen, y_seen], -1))

    def error(adapters: list[Any]) -> float:
        with torch.no_grad():
            return F.mse_loss(answers(model, params, adapters, x), y).item()

    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    result = Result(
        F.mse_loss(model(x), y).item(), error(made), error(made[1:] + made[:1]),
        error(tuned(model, params, like, x_seen, y_seen, options.tuning_steps)), unchanged,
    )  # fmt: skip
    print(f"mean squared error on 64 new waves, of which {options.examples} points are known:")
    print(f"  the base model                           {result.base:.4f}")
    print(f"  adapters made by the hypernetwork        {result.answered:.4f}")
    print(f"  adapters that it made for other waves    {result.shuffled:.4f}")
    print(f"  adapters trained for {options.tuning_steps:4} steps          {result.trained:.4f}")
    return result


if __name__ == "__main__":
    main()

"""An ensemble of adapters on one frozen base, trained at once: what it is sure of, it is more often right about.

    python examples/ensemble.py
    python examples/ensemble.py --members 32 --examples 200

The base model tells clusters of points apart. The adapters learn other clusters from few examples, a part of them
labelled wrong, and each from a resampling of its own.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funclora as fl

CLASSES, WIDTH = 4, 10


class Scores(NamedTuple):
    accuracy: float
    loss: float  # negative log-likelihood
    calibration: float  # expected calibration error: how far confidence is from accuracy, on average
    confidence_far: float  # mean highest probability on points that belong to no class


class Result(NamedTuple):
    single: Scores  # the mean of the members' own
    ensemble: Scores
    error_of_sure: float  # of the ensemble, on the half of the points that it is surest of
    error_of_unsure: float  # and on the other half


def draw(n: int, centers: Tensor, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (n,), generator=generator)
    points = centers[labels] + torch.randn(n, WIDTH, generator=generator)
    other = torch.randint(CLASSES, (n,), generator=generator)
    return points, torch.where(torch.rand(n, generator=generator) < noise, other, labels)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error (arXiv 1706.04599) of probabilities [n, classes]."""
    confidence, answer = probabilities.max(-1)
    right = (answer == labels).float()
    where = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [(confidence[where == k] - right[where == k]).sum().abs() for k in range(bins)]
    return (torch.stack(gaps).sum() / len(labels)).item()


def scores(probabilities: Tensor, labels: Tensor, far: Tensor) -> Scores:
    loss = F.nll_loss(probabilities.log(), labels).item()
    accuracy = (probabilities.argmax(-1) == labels).float().mean().item()
    return Scores(accuracy, loss, calibration_error(probabilities, labels), far.max(-1).values.mean().item())


# --8<-- [start:train]
def train(model: nn.Module, params: Any, data: tuple[Tensor, Tensor], members: int, steps: int) -> Any:
    """A population: each member has its own initial values and its own resampling of the data."""
    config = fl.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    seeds = [torch.Generator().manual_seed(seed) for seed in range(members)]
    stack = fl.stack([fl.init(model, config, generator=seed) for seed in seeds])
    points, labels = data
    own = torch.stack([torch.randint(len(points), (len(points),), generator=seed) for seed in seeds])

    def loss(bound: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(bound(batch[0]), batch[1])

    optimizer = fl.optim.per_member(fl.optim.adamw, lr=[1e-2] * members)
    step = fl.population_step(model, loss, optimizer)
    state = optimizer.init(stack)
    for _ in range(steps):
        stack, state, _ = step(params, stack, state, (points[own], labels[own]))  # [members, n, *]
    return stack
    # --8<-- [end:train]


# --8<-- [start:predict]
@torch.no_grad()
def predict(model: nn.Module, params: Any, stack: Any, x: Tensor) -> Tensor:
    """Every member's probabilities: [members, n, classes]."""
    rows = [member for member in range(len(stack)) for _ in range(len(x))]
    logits = fl.apply(model, params, fl.route(stack, rows), x.repeat(len(stack), 1))
    return logits.view(len(stack), len(x), -1).softmax(-1)


def uncertainty(each: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The predictive mean, its entropy, and the part of that on which the members disagree."""
    mean = each.mean(0)
    total = -(mean * mean.log()).sum(-1)
    within = -(each * each.log()).sum(-1).mean(0)
    return mean, total, total - within  # the last one is the mutual information of answer and member
    # --8<-- [end:predict]


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description="Trains an ensemble of adapters, and looks at what it is sure of.")
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--examples", type=int, default=80)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    centers = torch.randn(CLASSES, WIDTH, generator=generator)
    pretraining = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(200):
        pretraining.zero_grad()
        points, labels = draw(64, centers, 0.0, generator)
        F.cross_entropy(model(points), labels).backward()
        pretraining.step()

    centers = torch.randn(CLASSES, WIDTH, generator=generator)
    data = draw(options.examples, centers, 0.15, generator)
    points, labels = draw(2000, centers, 0.0, generator)
    far = 4 * torch.randn(500, WIDTH, generator=generator)

    params = fl.base_params(model)
    stack = train(model, params, data, options.members, options.steps)
    each, each_far = predict(model, params, stack, points), predict(model, params, stack, far)
    mean, _, disagreement = uncertainty(each)

    alone = [scores(one, labels, one_far) for one, one_far in zip(each, each_far, strict=True)]
    single = Scores(*(sum(values) / len(values) for values in zip(*alone, strict=True)))
    together = scores(mean, labels, each_far.mean(0))
    wrong = (mean.argmax(-1) != labels).float()
    order = disagreement.argsort()
    sure, unsure = wrong[order[:1000]].mean().item(), wrong[order[1000:]].mean().item()

    print(f"{options.members} members, {options.examples} examples, 2000 points to test\n")
    print(f"{'':14}  {'accuracy':>8}  {'loss':>6}  {'calibration error':>17}  {'confidence far away':>19}")
    for name, row in {"one member": single, "all of them": together}.items():
        print(f"{name:14}  {row[0]:8.1%}  {row[1]:6.3f}  {row[2]:17.3f}  {row[3]:19.1%}")
    print(f"\nwrong where the members agree most: {sure:.1%}; in the other half: {unsure:.1%}")
    return Result(single, together, sure, unsure)


if __name__ == "__main__":
    main()

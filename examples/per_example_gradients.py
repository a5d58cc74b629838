"""A gradient for every example: which examples of a training set are mislabelled, and training with clipped gradients.

    python examples/per_example_gradients.py
    python examples/per_example_gradients.py --clip 0.5 --noise 2

A small classifier is frozen and its adapter trained on a shifted task, a tenth of whose labels are wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import funclora as fl

CLASSES, WIDTH = 5, 20


class Result(NamedTuple):
    difference: float  # largest between the two ways to the gradients
    found_by_norm: float  # share of the wrong labels among as many examples with the largest gradients
    found_by_influence: float  # and among those that hurt the held-out examples most
    accuracy: dict[str, float]  # on held-out examples


def draw(n: int, centers: Tensor, wrong: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Points around the centers of their classes, labels, and which of the labels are wrong."""
    labels = torch.randint(CLASSES, (n,), generator=generator)
    points = centers[labels] + 0.6 * torch.randn(n, WIDTH, generator=generator)
    is_wrong = torch.rand(n, generator=generator) < wrong
    shift = torch.randint(1, CLASSES, (n,), generator=generator)
    return points, torch.where(is_wrong, (labels + shift) % CLASSES, labels), is_wrong


# --8<-- [start:gradients]
def loss(bound: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(bound(inputs), labels)


def by_rows(model: nn.Module, params: Any, adapters: Any, batch: tuple[Tensor, Tensor]) -> Any:
    """Every example has a copy of the adapter; one ordinary backward gives all gradients."""
    _, grads = fl.per_example_value_and_grad(loss)(model, params, adapters, batch)
    return grads  # the adapter's structure, with leaves [n_examples, *]


def by_vmap(model: nn.Module, params: Any, adapters: Any, batch: tuple[Tensor, Tensor]) -> Any:
    """The same by torch.func, for any function of an adapter."""

    def single(adapters: Any, x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(fl.apply(model, params, adapters, x[None]), label[None])

    return torch.func.vmap(torch.func.grad(single), in_dims=(None, 0, 0))(adapters, *batch)
    # --8<-- [end:gradients]


# --8<-- [start:influence]
def norms(grads: Any) -> Tensor:
    """The length of each example's gradient: [n_examples]."""
    return torch.func.vmap(fl.optim.global_norm)(grads)


def influence(grads: Any, heldout: Any) -> Tensor:
    """How much a small step along each example's gradient lowers the held-out loss: [n_examples]."""
    products = pytree.tree_map(lambda each, mean: (each * mean).flatten(1).sum(1), grads, heldout)
    return torch.stack(pytree.tree_leaves(products)).sum(0)
    # --8<-- [end:influence]


# --8<-- [start:private]
def private_step(model: nn.Module, optimizer: Any, *, clip: float, noise: float, size: float) -> Callable[..., Any]:
    """DP-SGD (arXiv 1607.00133): each example's gradient is cut to length `clip`, the sum gets noise."""

    def step(params: Any, adapters: Any, state: Any, batch: Any, generator: torch.Generator) -> tuple[Any, Any]:
        grads = by_rows(model, params, adapters, batch)
        factors = (clip / norms(grads)).clamp(max=1)

        def noisy(grad: Tensor) -> Tensor:
            total = torch.einsum("n,n...->...", factors, grad)
            return (total + noise * clip * torch.randn(total.shape, generator=generator)) / size

        updates, state = optimizer.update(pytree.tree_map(noisy, grads), state, params=adapters)
        return fl.optim.apply_updates(adapters, updates), state

    return step
    # --8<-- [end:private]


def share(scores: Tensor, wrong: Tensor) -> float:
    """Of the examples with the highest scores, as many as labels are wrong: how many of them have one."""
    return wrong[scores.topk(int(wrong.sum())).indices].float().mean().item()


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description="Finds wrong labels by gradients, and trains with clipped ones.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--clip", type=float, default=1.0, help="length that no example's gradient exceeds")
    parser.add_argument("--noise", type=float, default=1.0, help="its standard deviation, in multiples of --clip")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    centers = torch.randn(CLASSES, WIDTH, generator=generator)
    pretraining = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(100):
        pretraining.zero_grad()
        loss(model, draw(64, centers, 0.0, generator)[:2]).backward()
        pretraining.step()

    centers = centers.roll(1, 0) + 0.3 * torch.randn(CLASSES, WIDTH, generator=generator)  # other places, other names
    points, labels, wrong = draw(512, centers, 0.1, generator)
    train, heldout = (points, labels), draw(512, centers, 0.0, generator)[:2]
    params = fl.base_params(model)
    start = fl.init(model, fl.LoraConfig(r=4, target_modules="all-linear"), generator=generator)

    def accuracy(adapters: Any) -> float:
        with torch.no_grad():
            return (fl.apply(model, params, adapters, heldout[0]).argmax(-1) == heldout[1]).float().mean().item()

    optimizer = fl.optim.adamw(1e-2)
    step, adapters, state = fl.train_step(model, loss, optimizer), start, optimizer.init(start)
    early = adapters
    accuracies = {"not trained": accuracy(start)}
    for done in range(options.steps):
        if done == options.steps // 2:  # it knows the task, and not yet the wrong labels by heart
            early = adapters
        rows = torch.rand(512, generator=generator) < 1 / 8
        adapters, state, _ = step(params, adapters, state, (points[rows], labels[rows]))
    accuracies["plain"] = accuracy(adapters)

    grads = by_rows(model, params, early, train)
    pairs = zip(pytree.tree_leaves(grads), pytree.tree_leaves(by_vmap(model, params, early, train)), strict=True)
    difference = max((one - other).abs().max().item() for one, other in pairs)
    print(f"512 gradients, two ways: largest difference {difference:.0e}")

    _, of_heldout = fl.value_and_grad(loss)(model, params, early, heldout)
    found = share(norms(grads), wrong), share(-influence(grads, of_heldout), wrong)
    print(f"{int(wrong.sum())} labels are wrong. Among as many examples, chosen by")
    print(f"  the length of the gradient   {found[0]:.0%} are")
    print(f"  harm to held-out examples    {found[1]:.0%} are")

    for noise in (0.0, options.noise):
        clipped = private_step(model, optimizer, clip=options.clip, noise=noise, size=512 / 8)
        adapters, state = start, optimizer.init(start)
        for _ in range(options.steps):
            rows = torch.rand(512, generator=generator) < 1 / 8  # each on its own, as accountants assume
            adapters, state = clipped(params, adapters, state, (points[rows], labels[rows]), generator)
        accuracies[f"clipped, noise {noise:g}"] = accuracy(adapters)
    print("accuracy: " + ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items()))
    return Result(difference, *found, accuracies)


if __name__ == "__main__":
    main()

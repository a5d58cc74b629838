"""Adapters on convolutions, a grouped and a dilated one among them: a small CNN that knows white shapes on black
learns to read noisy negatives of such images, with LoRA and with DoRA. Its head stays as it is.

    python examples/cnn_conv_adapters.py
    python examples/cnn_conv_adapters.py --images 64 --rank 2
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funclora as fl

SIZE = 16
SHAPES = ("disc", "ring", "square", "frame", "cross", "bar")


def draw(n: int) -> tuple[Tensor, Tensor]:
    """Shapes of random kind, size and place on black: images [n, 1, SIZE, SIZE] of ±1, kinds [n]."""
    kinds = torch.randint(len(SHAPES), (n,))
    radius = torch.empty(n, 1, 1).uniform_(3, 6)
    center = torch.empty(2, n, 1, 1).uniform_(6, SIZE - 7)
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))
    y, x = (grid[:, None] - center).abs()
    disc, square = torch.hypot(x, y) < radius, torch.maximum(x, y) < radius
    ring, frame = disc & (torch.hypot(x, y) > radius - 2), square & (torch.maximum(x, y) > radius - 2)
    cross, bar = square & (torch.minimum(x, y) < 1.5), square & (y < 1.5)
    masks = torch.stack([disc, ring, square, frame, cross, bar])
    return masks[kinds, torch.arange(n)][:, None].float() * 2 - 1, kinds


def negative(images: Tensor) -> Tensor:
    return 0.3 * torch.randn_like(images) - images


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4)
        self.dilated = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.head = nn.Linear(32, len(SHAPES))

    def forward(self, x: Tensor) -> Tensor:  # [batch, 1, SIZE, SIZE] -> [batch, shapes]
        for conv in (self.stem, self.grouped, self.dilated):
            x = conv(x).relu()
        return self.head(x.amax((-2, -1)))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, kinds = batch
    return F.cross_entropy(model(images), kinds)


class Result(NamedTuple):
    trainable: int
    loss: float  # on negatives that were not trained on
    accuracy: float
    clean_accuracy: float  # on the images behind these negatives


@torch.no_grad()
def evaluate(model: nn.Module, trainable: int, clean: Tensor, negatives: Tensor, kinds: Tensor) -> Result:
    accuracy, clean_accuracy = ((model(x).argmax(-1) == kinds).float().mean().item() for x in (negatives, clean))
    return Result(trainable, loss(model, (negatives, kinds)).item(), accuracy, clean_accuracy)


def main(argv: list[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description="Adapts the convolutions of a small CNN with LoRA and DoRA.")
    parser.add_argument("--pretrain-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=150, help="of adaptation")
    parser.add_argument("--images", type=int, default=512, help="negatives to train on")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)

    model = CNN()
    plain = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(options.pretrain_steps):
        plain.zero_grad()
        loss(model, draw(64)).backward()
        plain.step()

    images, kinds = draw(options.images)
    images = negative(images)
    clean, clean_kinds = draw(1000)
    test = clean, negative(clean), clean_kinds
    results = {"base model": evaluate(model, 0, *test)}

    params = fl.base_params(model)
    optimizer = fl.optim.adamw(fl.optim.warmup_cosine(options.lr, options.steps // 10, options.steps))
    step = fl.train_step(model, loss, optimizer)
    for name, use_dora in (("LoRA", False), ("DoRA", True)):
        targets = ["stem", "grouped", "dilated"]
        config = fl.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets, use_dora=use_dora)
        adapters = fl.init(model, config)
        summary = fl.summary(params, adapters)
        print(f"{summary}\n")
        state = optimizer.init(adapters)
        for _ in range(options.steps):
            rows = torch.randint(options.images, (64,))
            adapters, state, _ = step(params, adapters, state, (images[rows], kinds[rows]))
        results[name] = evaluate(fl.bind(model, params, adapters), summary.trainable, *test)

    print(f"1000 new images, {options.images} negatives and {options.steps} steps of 64 to learn from:\n")
    print(f"{'':10}  {'trainable':>9}  {'loss':>8}  {'accuracy':>8}  {'on positives':>12}")
    for name, result in results.items():
        print("{:10}  {:9,}  {:8.4f}  {:8.1%}  {:12.1%}".format(name, *result))
    return results


if __name__ == "__main__":
    main()

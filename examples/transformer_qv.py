"""A transformer written in plain PyTorch learns to copy words; adapters on its query and value projections
alone turn it into one that spells them backwards, and leave the copying model untouched.

    python examples/transformer_qv.py
    python examples/transformer_qv.py --dora --rank 4
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funclora as fl

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SEPARATOR = len(LETTERS)
LENGTH = 6  # of the words


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.v_proj, self.o_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, dim]
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in projected)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [batch, heads, time, dim / heads]
        return self.o_proj(attended.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(dim), Attention(dim, heads))
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, dim: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(LETTERS) + 1, dim), nn.Embedding(2 * LENGTH, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, len(LETTERS)))

    def forward(self, ids: Tensor) -> Tensor:  # [batch, time] -> [batch, time, letters]
        return self.head(self.blocks(self.tokens(ids) + self.positions.weight[: ids.shape[1]]))

    @torch.no_grad()
    def generate(self, words: Tensor) -> Tensor:
        """What follows `word|`, greedily, one letter at a time: [batch, LENGTH] -> [batch, LENGTH]."""
        ids = F.pad(words, (0, 1), value=SEPARATOR)
        for _ in range(LENGTH):
            ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], dim=1)
        return ids[:, -LENGTH:]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Next-letter loss on the answer in `word|answer`."""
    words, answers = batch
    ids = torch.cat([F.pad(words, (0, 1), value=SEPARATOR), answers[:, :-1]], dim=1)
    return F.cross_entropy(model(ids)[:, -LENGTH:].flatten(0, 1), answers.flatten())


class Result(NamedTuple):
    trained: list[str]  # names of the adapted parameters
    first_loss: float
    last_loss: float
    copied: dict[str, float]  # shares of words without a mistake, by model
    reversed: dict[str, float]
    base_unchanged: bool


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description="Adapts a transformer that copies words to reverse them.")
    parser.add_argument("--pretrain-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300, help="of adaptation")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--dora", action="store_true", help="DoRA in place of LoRA")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)

    model = Transformer()
    plain = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(options.pretrain_steps):
        words = torch.randint(len(LETTERS), (64, LENGTH))
        plain.zero_grad()
        loss(model, (words, words)).backward()
        plain.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    targets = ["q_proj", "v_proj"]
    config = fl.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets, use_dora=options.dora)
    params, adapters = fl.base_params(model), fl.init(model, config)
    print(f"{fl.summary(params, adapters)}\n")
    optimizer = fl.optim.adamw(fl.optim.warmup_cosine(options.lr, options.steps // 10, options.steps))
    state, losses = optimizer.init(adapters), []
    step = fl.train_step(model, loss, optimizer)
    for i in range(options.steps):
        words = torch.randint(len(LETTERS), (64, LENGTH))
        adapters, state, metrics = step(params, adapters, state, (words, words.flip(-1)))
        losses.append(metrics["loss"].item())
        if i % max(1, options.steps // 6) == 0 or i == options.steps - 1:
            print(f"step {i:4}  loss {losses[-1]:8.4f}")

    # Both models work at the same time: the bound one is a view with other weights, and has all methods.
    words, copied, backwards = torch.randint(len(LETTERS), (1000, LENGTH)), {}, {}
    print(f"\n1000 fresh words  {'copied':>8}  {'reversed':>8}  the first, {''.join(LETTERS[i] for i in words[0])}")
    for name, net in {"base model": model, "adapted model": fl.bind(model, params, adapters)}.items():
        answers = net.generate(words)
        copied[name] = (answers == words).all(-1).float().mean().item()
        backwards[name] = (answers == words.flip(-1)).all(-1).float().mean().item()
        print(f"{name:16}  {copied[name]:8.1%}  {backwards[name]:8.1%}  {''.join(LETTERS[i] for i in answers[0]):>17}")
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    print(f"\nAll {len(before)} tensors of the base model are bit for bit what they were: {unchanged}")
    return Result(list(adapters), losses[0], losses[-1], copied, backwards, unchanged)


if __name__ == "__main__":
    main()

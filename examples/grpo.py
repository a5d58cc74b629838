"""GRPO (arXiv 2402.03300): the base learns to write lines that Python can parse, at rank 1 and at rank 8.

Each prompt is continued several times. The reward of an answer is 1 if the line ends in time and parses, otherwise 0,
and its advantage is the reward compared with those of the other answers to the same prompt. One batch has the
log-probabilities of the policy that wrote the answers and of the reference, which is the base.

    python examples/grpo.py
    python examples/grpo.py --rank 2 --steps 20 --seed 1
"""

from __future__ import annotations

import argparse
import ast
import warnings
from functools import partial
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

import funclora as fl
from funclora.demo.model import load_base
from funclora.losses import token_log_probs

PROMPTS = ["x = ", "print(", "import ", "assert "]
HELD_OUT = ["return ", "y += ", "len(", "a, b = "]
GROUP = 8  # answers to each prompt
LENGTH = 20  # bytes of an answer, at most


class Result(NamedTuple):
    rewards: list[float]  # the mean at each step, of the policy before it
    before: float  # the mean on prompts that are not trained on
    after: float


def reward(line: bytes) -> float:
    """1 for a whole line of Python, otherwise 0. The line is parsed, and never run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in strings
        try:
            ast.parse(line)
        except (SyntaxError, ValueError):
            return 0.0
    return float(line.endswith(b"\n"))


@torch.no_grad()
def sample(bound: Any, prompts: list[str], each: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[bytes]]:
    """Answers to each prompt: ids and labels `[prompts * each, seq]`, and the lines, prompts included."""
    width = max(map(len, prompts))
    starts = [list(prompt.rjust(width, "\n").encode()) for prompt in prompts]  # empty lines before shorter ones
    ids = torch.tensor(starts).repeat_interleave(each, 0)
    for _ in range(LENGTH):
        ids = torch.cat([ids, torch.multinomial(bound(ids)[:, -1].softmax(-1), 1, generator=generator)], 1)
    ends = (ids[:, width:] == ord("\n")).int()
    inside = ends.cumsum(1) - ends == 0  # up to the end of the line, which is part of the answer
    labels = torch.cat([torch.full((len(ids), width), -100), ids[:, width:].masked_fill(~inside, -100)], 1)
    lengths = width + inside.sum(1)
    return ids, labels, [bytes(row[:n]).lstrip() for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]


# --8<-- [start:loss]
def advantages(rewards: Tensor) -> Tensor:
    """How much better each answer is than its group `[prompts, each]`, in standard deviations: `[prompts * each]`."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


def grpo_loss(bound: Any, batch: dict[str, Tensor], *, beta: float, clip: float = 0.2) -> tuple[Tensor, Tensor]:
    """Equations 3 and 4 of the paper: the mean over tokens of each answer, then over answers; and the divergence."""
    log_probs = token_log_probs(bound, batch["ids"], batch["labels"])
    ratio = (log_probs - batch["old"]).exp()
    gain = batch["advantages"][:, None]
    gain = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    behind = batch["reference"] - log_probs
    divergence = behind.exp() - behind - 1
    answer = batch["labels"] != -100

    def mean(x: Tensor) -> Tensor:
        return ((x * answer).sum(1) / answer.sum(1)).mean()

    return beta * mean(divergence) - mean(gain), mean(divergence).detach()


@torch.no_grad()
def scored(model: Any, params: fl.Params, policy: fl.Adapters, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the policy and of the base (-1), from one batch."""
    both = fl.route(fl.stack([dict(policy)]), [0] * len(ids) + [-1] * len(ids))
    old, reference = token_log_probs(fl.bind(model, params, both), ids.repeat(2, 1), labels.repeat(2, 1)).chunk(2)
    return old, reference


# --8<-- [end:loss]


def train(model: Any, rank: int, args: argparse.Namespace) -> Result:
    params = fl.base_params(model)
    generator = torch.Generator().manual_seed(args.seed)
    config = fl.LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    policy: Any = fl.init(model, config, generator=generator)
    adamw = fl.optim.adamw(args.lr)
    state = adamw.init(policy)
    step = fl.train_step(model, partial(grpo_loss, beta=args.beta), adamw, has_aux=True)

    def on_others(adapters: fl.Adapters) -> tuple[float, str]:
        lines = sample(fl.bind(model, params, adapters), HELD_OUT, 32, generator)[2]
        some = "  ".join(repr(line.decode(errors="replace")) for line in lines[::32])
        return sum(map(reward, lines)) / len(lines), some

    before, some = on_others({})
    print(f"rank {rank}, {sum(x.numel() for x in optree.tree_leaves(policy)):,} values")
    print(f"  other prompts  reward {before:.2f}  {some}")
    rewards: list[float] = []
    metrics: dict[str, Any] = {}
    for number in range(1, args.steps + 1):
        ids, labels, lines = sample(fl.bind(model, params, policy), PROMPTS, GROUP, generator)
        found = torch.tensor([reward(line) for line in lines]).view(len(PROMPTS), GROUP)
        old, reference = scored(model, params, policy, ids, labels)
        batch = {"ids": ids, "labels": labels, "advantages": advantages(found), "old": old, "reference": reference}
        for _ in range(args.updates):
            policy, state, metrics = step(params, policy, state, batch)
        rewards.append(found.mean().item())
        print(f"  step {number:9}  reward {rewards[-1]:.2f}  divergence {metrics['aux'].item():.2f}", flush=True)
    after, some = on_others(policy)
    print(f"  other prompts  reward {after:.2f}  {some}", flush=True)
    return Result(rewards, before, after)


def main(argv: list[str] | None = None) -> dict[int, Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the divergence from the base")
    parser.add_argument("--updates", type=int, default=2, help="steps of the optimizer with the same answers")
    args = parser.parse_args(argv)
    model = load_base()
    return {rank: train(model, rank, args) for rank in args.rank}


if __name__ == "__main__":
    main()

"""Trains the demo's base model on the standard library's sources outside the demo's domains.

    python examples/train_base.py --out funclora/demo/base.safetensors

Takes about half an hour on one CPU core. The text is that of the Python which runs this (3.11 for the weights
that are shipped); the weights follow from the text, the options and the seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from funclora.demo.corpus import base_text, batches, split_text, windows
from funclora.demo.model import ByteLM, ByteLMConfig, next_byte_loss


def main() -> None:
    """Trains and writes the model."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    config = ByteLMConfig(options.dim, options.layers, options.heads, options.hidden, options.context)
    model = ByteLM(config)
    initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {config}", flush=True)

    text, unseen = split_text(base_text())
    generator = torch.Generator().manual_seed(options.seed)
    stream = batches(text, batch=options.batch, context=config.context, generator=generator)
    probe = windows(unseen, count=64, context=config.context)
    optimizer = torch.optim.AdamW(groups(model, options.weight_decay), lr=options.lr, betas=(0.9, 0.95))

    started, recent = time.monotonic(), torch.tensor(0.0)
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * schedule(step, options.steps, options.warmup)
        loss = next_byte_loss(model, next(stream))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = loss.detach() if step == 1 else torch.lerp(recent, loss.detach(), 0.02)
        if step % options.report == 0:
            seconds = time.monotonic() - started
            heldout = evaluate(model, probe)
            print(f"step {step:6d}  train {recent:.4f}  held-out {heldout:.4f}  {seconds:6.0f} s", flush=True)
            save(model, options.out)
    save(model, options.out)
    train = evaluate(model, windows(text, count=options.probes, context=config.context))
    heldout = evaluate(model, windows(unseen, count=options.probes, context=config.context))
    print(f"final: train {train:.4f}, held-out {heldout:.4f} nats per byte; {options.out}", flush=True)


def parse_options() -> argparse.Namespace:
    """The command line."""
    shape = ByteLMConfig()
    parser = argparse.ArgumentParser(description="Trains the demo's base model.")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=int, default=100, help="steps from one report and write to the next")
    parser.add_argument("--probes", type=int, default=512, help="windows in the final evaluation")
    for name, default in asdict(shape).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def initialise(model: ByteLM) -> None:
    """Normal weights of variance 1 / fan-in, but smaller where they write to the residual stream."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.5 if name == "embed.weight" else parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * model.config.layers)
            nn.init.normal_(parameter, std=std)


def groups(model: ByteLM, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; the norms' gains and the embedding, of which a step touches few rows, do not."""
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and n != "embed.weight"]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or n == "embed.weight"]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to zero: the factor of the learning rate at `step` (from 1)."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


@torch.no_grad()
def evaluate(model: ByteLM, rows: Tensor) -> float:
    """Mean loss over `rows`, [count, context + 1], in nats per byte."""
    losses = [next_byte_loss(model, part) * len(part) for part in rows.split(32)]
    return float(torch.stack(losses).sum()) / len(rows)


def save(model: ByteLM, out: Path) -> None:
    """Writes float16 weights and the config; a reader sees the old file or the new one, never half of one."""
    state = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    part = out.with_name(out.name + ".part")
    # Not save_file, whose files no other user may read.
    part.write_bytes(to_bytes(state, metadata={"format": "pt", "config": json.dumps(asdict(model.config))}))
    part.replace(out)


if __name__ == "__main__":
    main()

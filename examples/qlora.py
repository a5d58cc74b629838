"""QLoRA: a small Llama learns to count, its frozen weights are packed into 4 bits, and adapters on top of them learn
to count backwards. The same training on the unpacked weights runs beside it.

    python examples/qlora.py
    python examples/qlora.py --kind fp4 --dora
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import funclora as fl

NUMBERS, LENGTH = 64, 16


def counted(n: int, step: int) -> Tensor:
    """n rows of numbers that follow each other by `step`, `[n, LENGTH]`."""
    return (torch.randint(NUMBERS, (n, 1)) + step * torch.arange(LENGTH)) % NUMBERS


def loss(model: Any, ids: Tensor) -> Tensor:
    """Next-number loss, where the direction can be known."""
    logits = model(ids).logits[:, 1:-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())


class Result(NamedTuple):
    before: float  # loss on counting backwards
    after: float
    merged: float  # after merging into the dequantised weights
    megabytes: float  # of the base


def train(
    model: nn.Module, params: dict[str, Tensor], config: fl.LoraConfig, steps: int, lr: float
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The adapters, and the loss before and after."""
    adapters: Any = fl.init(model, config, params=params, generator=torch.Generator().manual_seed(0))
    optimizer = fl.optim.adamw(lr)
    step, state = fl.train_step(model, loss, optimizer), optimizer.init(adapters)
    torch.manual_seed(1)
    test = counted(64, -1)

    def tested() -> Tensor:
        with torch.no_grad():
            return loss(fl.bind(model, params, adapters), test)

    before = tested()
    for _ in range(steps):
        adapters, state, _ = step(params, adapters, state, counted(32, -1))
    return adapters, before, tested()


def megabytes(params: dict[str, Tensor]) -> float:
    return sum(tensor.nbytes for tensor in params.values()) / 2**20


def main(argv: list[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description="Trains adapters on 4-bit and on 32-bit weights.")
    parser.add_argument("--kind", choices=["nf4", "fp4", "int8"], default="nf4")
    parser.add_argument("--dora", action="store_true", help="DoRA in place of LoRA")
    parser.add_argument("--pretrain-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=150, help="of adaptation")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-3)
    options = parser.parse_args(argv)
    torch.manual_seed(0)

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=NUMBERS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH,
    ))  # fmt: skip
    plain = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(options.pretrain_steps):
        plain.zero_grad()
        loss(model, counted(32, 1)).backward()
        plain.step()

    config = fl.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear",
                           use_dora=options.dora)  # fmt: skip
    params = fl.base_params(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    packed = fl.quantize(params, linear, options.kind, double_quant=options.kind != "int8")
    results = {}
    print(f"{'base':8}  {'MB':>6}  {'before':>7}  {'after':>7}  {'merged':>7}")
    for name, base in {"float32": params, options.kind: packed}.items():
        adapters, before, after = train(model, base, config, options.steps, options.lr)
        # A merged weight is dense. Into the weights that were trained with, nothing is lost.
        merged = fl.merge(fl.dequantize(base), adapters)
        torch.manual_seed(1)
        with torch.no_grad():
            of_merged = loss(fl.bind(model, merged, {}), counted(64, -1))
        result = Result(before.item(), after.item(), of_merged.item(), megabytes(base))
        results[name] = result
        print(f"{name:8}  {result.megabytes:6.2f}  {result.before:7.3f}  {result.after:7.3f}  {result.merged:7.3f}")
    return results


if __name__ == "__main__":
    main()

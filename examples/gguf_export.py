"""An adapter for llama.cpp: a tiny Llama learns to count in threes, and its adapter goes to a GGUF file and back.

    python examples/gguf_export.py
    python examples/gguf_export.py --rslora --out adapter.gguf

llama.cpp takes the file next to that of the base model: `llama-cli -m base.gguf --lora adapter.gguf`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import funclora as fl

NUMBERS, STRIDE, LENGTH = 32, 3, 12


class Result(NamedTuple):
    first_loss: float
    last_loss: float
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # of the tensors in the file
    difference: float  # of the logits under the adapter that was read back


def tiny_llama() -> Any:
    config = LlamaConfig(
        vocab_size=NUMBERS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2 * LENGTH, initializer_range=0.1, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rslora", action="store_true", help="scale by α/√r")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="the file (default: a temporary one)")
    args = parser.parse_args(argv)

    # 1. Train an adapter whose rank and scaling differ between layers.
    torch.manual_seed(0)
    model = tiny_llama()
    params = fl.base_params(model)
    config = fl.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, use_rslora=args.rslora, target_modules="all-linear",
        rank_pattern={"down_proj": args.rank // 2},
    )  # fmt: skip
    adapters = fl.init(model, config)
    optimizer = fl.optim.adamw(1e-2)

    def loss_fn(bound: Any, ids: Tensor) -> Tensor:
        return F.cross_entropy(bound(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())

    step = fl.train_step(model, loss_fn, optimizer)
    state = optimizer.init(adapters)
    ids = (torch.arange(NUMBERS).unsqueeze(1) + STRIDE * torch.arange(LENGTH)) % NUMBERS
    losses = []
    for _ in range(args.steps):
        adapters, state, metrics = step(params, adapters, state, ids)
        losses.append(float(metrics["loss"]))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    # 2. Write the file, look into it, read it back.
    with tempfile.TemporaryDirectory() as folder:
        file = args.out or Path(folder) / "adapter.gguf"
        fl.save_gguf(file, adapters, model)
        reader = gguf.GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF")}
        shapes = {tensor.name: tuple(tensor.data.shape) for tensor in reader.tensors}
        del reader  # it keeps the file open
        loaded, _ = fl.load_gguf(file, model)
    for key, value in metadata.items():
        print(f"{key:24} {value}")
    for name, shape in shapes.items():
        if name.startswith("blk.0."):
            print(f"{name:32} {list(shape)}")
    with torch.no_grad():
        difference = fl.apply(model, params, loaded, ids).logits - fl.apply(model, params, adapters, ids).logits
    print(f"largest difference of the logits after reading it back {difference.abs().max():.1e}")
    return Result(losses[0], losses[-1], metadata, shapes, difference.abs().max().item())


if __name__ == "__main__":
    main()

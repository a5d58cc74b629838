"""transformers' Trainer trains an adapter of a frozen language model: a tiny random Llama learns to count in threes.

    python examples/trainer.py
    python examples/trainer.py --dora --rank 4 --out adapter

The adapter ends up in a PEFT folder, and the model stays what it was.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import funclora as fl

NUMBERS, STRIDE, LENGTH = 32, 3, 12


class Counting(Dataset[dict[str, Any]]):
    """From each number on, in strides of three: `[5, 8, 11, ...]`."""

    def __len__(self) -> int:
        return NUMBERS

    def __getitem__(self, start: int) -> dict[str, Any]:
        ids = (start + STRIDE * torch.arange(LENGTH)) % NUMBERS
        return {"input_ids": ids, "labels": ids}


class Result(NamedTuple):
    first_loss: float
    last_loss: float
    counted: list[int]  # what the trained adapter says, read back from its folder
    base_unchanged: bool


def tiny_llama() -> Any:
    config = LlamaConfig(
        vocab_size=NUMBERS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2 * LENGTH, initializer_range=0.1, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", help="folder for the adapter (default: a temporary one)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = tiny_llama()
    params = fl.base_params(model)
    before = {name: tensor.clone() for name, tensor in params.items()}
    config = fl.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", use_dora=args.dora)

    module = fl.as_module(model, params, fl.init(model, config), config)
    print(f"{module.num_parameters(only_trainable=True):,} of {module.num_parameters():,} parameters are trained")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=module,
            args=TrainingArguments(
                output_dir=scratch, max_steps=args.steps, per_device_train_batch_size=16, learning_rate=1e-2,
                logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=Counting(),
        )  # fmt: skip
        trainer.train()
        folder = args.out or Path(scratch) / "adapter"
        module.save_pretrained(folder)
        adapters, _ = fl.load_peft(folder, model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    start = torch.tensor([[4, 7, 10]])
    counted = fl.bind(model.eval(), params, adapters).generate(start, max_new_tokens=6, do_sample=False)[0].tolist()
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in params.items())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; after 4, 7, 10: {counted[3:]}; base unchanged: {unchanged}")
    return Result(losses[0], losses[-1], counted, unchanged)


if __name__ == "__main__":
    main()

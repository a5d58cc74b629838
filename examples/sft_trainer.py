"""TRL's SFTTrainer trains an adapter of a frozen language model on texts: a tiny random Llama learns a proverb.

    python examples/sft_trainer.py
    python examples/sft_trainer.py --dora --out adapter

Nothing is downloaded: the tokenizer has a token for each letter. Needs trl (pip install trl).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import funclora as fl

TEXTS = ["many hands make light work", "still waters run deep", "look before you leap"]
LETTERS = "_^$ abcdefghijklmnopqrstuvwxyz"


class Result(NamedTuple):
    first_loss: float
    last_loss: float
    continued: str  # what the trained adapter makes of the first letters of a text
    base_unchanged: bool


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each letter."""
    tokenizer = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="_"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_", bos_token="^", eos_token="$")


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", help="folder for the adapter (default: a temporary one)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    tokenizer = letters()
    model = tiny_llama(tokenizer)
    params = fl.base_params(model)
    before = {name: tensor.clone() for name, tensor in params.items()}
    config = fl.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=args.dora, task_type="CAUSAL_LM")

    module = fl.as_module(model, params, fl.init(model, config), config)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=module,
            args=SFTConfig(
                output_dir=scratch, max_steps=args.steps, per_device_train_batch_size=6, learning_rate=1e-2, bf16=False,
                logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict({"text": TEXTS * 8}),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        folder = args.out or Path(scratch) / "adapter"
        module.save_pretrained(folder)
        adapters, _ = fl.load_peft(folder, model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    start = tokenizer("still w", return_tensors="pt").input_ids
    answer = fl.bind(model.eval(), params, adapters).generate(start, max_new_tokens=30, do_sample=False)[0].tolist()
    continued = "".join(LETTERS[i] for i in answer).split("$")[0]
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in params.items())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; 'still w' becomes {continued!r}; base unchanged: {unchanged}")
    return Result(losses[0], losses[-1], continued, unchanged)


if __name__ == "__main__":
    main()

"""A PEFT adapter in, used, trained further and changed, and out again for PEFT and for readers that know less.

    python examples/peft_in_and_out.py
    python examples/peft_in_and_out.py --out my_adapter

The base is a Llama with random weights, made from a configuration: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import funclora as fl


def make_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, initializer_range=0.1,
            tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


class Result(NamedTuple):
    read_difference: float  # largest over all logits: PEFT's folder, used here
    first_loss: float
    last_loss: float
    written_difference: float  # our folder, used by PEFT
    folded_difference: float  # and with the scaling folded into B
    folded_scalings: set[float]
    model_unchanged: bool


def trained_by_peft(model: LlamaForCausalLM, folder: Path) -> Any:
    """Stands for an adapter that somebody has trained: rsLoRA, other ranks in some layers, two new tokens."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 8},
        trainable_token_indices=[62, 63], init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    wrapped.save_pretrained(folder)
    return wrapped


def used_by_peft(model: LlamaForCausalLM, folder: Path, ids: Tensor) -> Tensor:
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    with torch.no_grad():
        logits: Tensor = wrapped(ids).logits
    return logits


def difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description="Reads, trains, changes and writes a PEFT adapter.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, help="keep the written folders here")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(64, (4, 16))
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch) / "out"

        # 1. In. The adapter is a dict of rules; lm_head is tied to the table, and follows it.
        wrapped = trained_by_peft(model, Path(scratch) / "in")
        adapters, config = fl.load_peft(Path(scratch) / "in", model)
        params = fl.base_params(model)
        print(fl.summary(params, adapters))
        with torch.no_grad():
            read_difference = difference(fl.apply(model, params, adapters, ids).logits, wrapped(ids).logits)
        print(f"\nlargest difference of logits from PEFT's       {read_difference:.1e}")

        # 2. Used and changed: trained further, with the update of one layer left out.
        adapters = {name: rule for name, rule in adapters.items() if "layers.0.self_attn.v_proj" not in name}
        config = config.replace(exclude_modules=["layers.0.self_attn.v_proj"])

        def loss(bound: LlamaForCausalLM, ids: Tensor) -> Tensor:
            logits = bound(ids[:, :-1]).logits
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

        optimizer = fl.optim.adamw(1e-2)
        state, losses = optimizer.init(adapters), []
        step = fl.train_step(model, loss, optimizer)
        for _ in range(options.steps):
            adapters, state, metrics = step(params, adapters, state, ids)
            losses.append(metrics["loss"].item())
        print(f"loss at the first and the last step            {losses[0]:.3f}, {losses[-1]:.3f}")

        # 3. Out, for PEFT; and for vLLM or llama.cpp, which know neither rsLoRA nor patterns.
        fl.save_peft(out / "peft", adapters, config)
        fl.save_peft(out / "folded", adapters, config, fold_scaling=True)
        with torch.no_grad():
            expected = fl.apply(model, params, adapters, ids).logits
        written = difference(used_by_peft(model, out / "peft", ids), expected)
        folded = difference(used_by_peft(model, out / "folded", ids), expected)
        print(f"PEFT's logits from the folder, difference      {written:.1e}")
        print(f"and from the one with folded scaling           {folded:.1e}")
        plain, plain_config = fl.load_peft(out / "folded", model)
    scalings = {float(rule.scaling) for rule in plain.values() if isinstance(rule, fl.LoRA)}
    print(f"there r is {plain_config.r}, lora_alpha {plain_config.lora_alpha}, every scaling {scalings}")
    unchanged = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    print(f"the model is bit for bit as it was             {unchanged}")
    return Result(read_difference, losses[0], losses[-1], written, folded, scalings, unchanged)


if __name__ == "__main__":
    main()

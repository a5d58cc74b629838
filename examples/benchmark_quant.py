"""A training step on a 4-bit Llama: funclora against PEFT with bitsandbytes, and against funclora on dense weights.

Times are medians of steps that take turns. Memory is what the tensors of a step hold at their worst moment, besides
the base: activations, adapters' gradients, and whatever dense weights there are.

    python examples/benchmark_quant.py
    python examples/benchmark_quant.py --dim 256 --layers 2 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import funclora as fl
from funclora._torch.memory import Peak


class Row(NamedTuple):
    seconds: float
    peak: float  # MB that a step takes besides the base
    base: float  # MB
    loss: float


def loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def ours(model: Any, params: dict[str, Tensor], config: fl.LoraConfig, ids: Tensor) -> Callable[[], float]:
    adapters: Any = fl.init(model, config, params=params)
    optimizer = fl.optim.adamw(1e-3)
    step = fl.train_step(model, loss, optimizer)
    now = [adapters, optimizer.init(adapters)]

    def run() -> float:
        *now[:], metrics = step(params, *now, ids)
        return metrics["loss"].item()

    return run


def theirs(model: Any, options: dict[str, Any], ids: Tensor) -> Callable[[], float]:
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-3)

    def run() -> float:
        optimizer.zero_grad()
        value = loss(adapted, ids)
        value.backward()
        optimizer.step()
        return value.item()

    return run


def measure(runs: dict[str, Callable[[], float]], bases: dict[str, float], rounds: int) -> dict[str, Row]:
    losses = {name: run() for name, run in runs.items()}  # the first step is not measured
    peaks: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        with Peak() as memory:
            run()
        peaks[name] = memory.peak / 2**20
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: Row(statistics.median(times[name]), peaks[name], bases[name], losses[name]) for name in runs}


def main(argv: list[str] | None = None) -> dict[str, dict[str, Row]]:
    parser = argparse.ArgumentParser(description="Measures training steps on 4-bit weights.")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    dense = LlamaForCausalLM(LlamaConfig(
        vocab_size=1024, hidden_size=options.dim, intermediate_size=options.dim * 8 // 3 // 64 * 64,
        num_hidden_layers=options.layers, num_attention_heads=8, num_key_value_heads=4,
    ))  # fmt: skip
    ids = torch.randint(1024, (options.rows, options.tokens))
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)

        def load() -> Any:
            packing = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )  # fmt: skip
            return AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=packing, device_map="cpu", dtype=torch.float32
            )

        results = {}
        for method in ("LoRA", "DoRA"):
            shared: dict[str, Any] = {
                "r": options.rank, "lora_alpha": options.rank, "target_modules": "all-linear",
                "use_dora": method == "DoRA", "task_type": "CAUSAL_LM",
            }  # fmt: skip
            config, model = fl.LoraConfig(**shared), load()
            params, full = fl.base_params(model), fl.base_params(dense)
            runs = {
                "funclora, 4 bits": ours(model, params, config, ids),
                "PEFT, 4 bits": theirs(load(), shared, ids),
                "funclora, float32": ours(dense, full, config, ids),
            }
            sizes = [sum(tensor.nbytes for tensor in base.values()) / 2**20 for base in (params, full)]
            bases = dict(zip(runs, (sizes[0], sizes[0], sizes[1]), strict=True))
            results[method] = rows = measure(runs, bases, options.rounds)
            print(f"\n{method:18}  {'ms/step':>8}  {'to PEFT':>8}  {'step MB':>8}  {'base MB':>8}  {'loss':>7}")
            for name, row in rows.items():
                ratio = row.seconds / rows["PEFT, 4 bits"].seconds
                print(f"{name:18}  {1e3 * row.seconds:8.0f}  {ratio:8.2f}  {row.peak:8.1f}  {row.base:8.1f}  "
                      f"{row.loss:7.3f}")  # fmt: skip
    return results


if __name__ == "__main__":
    main()

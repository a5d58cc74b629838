"""Saving and loading many adapters as folders, against PEFT, in turns in one process.

    python examples/benchmark_files.py --adapters 100

The model is a Llama of 6 layers, 512 wide, with random weights; the adapters have rank 8 on all its linear layers.
PEFT loads each adapter into its one wrapped model and saves it from there; funclora loads values and saves values.
Every folder that PEFT wrote is loaded by funclora, and must hold the same factors.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import funclora as fl


def llama(quick: bool) -> Any:
    hidden, inner, layers = (32, 48, 2) if quick else (512, 1376, 6)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4, vocab_size=400
        )
    ).eval()


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Seconds for all adapters, by what was done."""
    parser = argparse.ArgumentParser(description="Saving and loading adapters, against PEFT.")
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    model, n = llama(options.quick), options.adapters
    config = fl.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    given = [fl.init(model, config, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    names = [f"m{i}" for i in range(n)]
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in range(options.rounds):
            ours, theirs = Path(folder, f"ours{turn}"), Path(folder, f"theirs{turn}")
            loaded: list[Any] = []

            def save_ours(ours: Path = ours) -> None:
                for name, adapters in zip(names, given, strict=True):
                    fl.save_peft(ours / name, adapters, config)

            def load_ours(ours: Path = ours, loaded: list[Any] = loaded) -> None:
                loaded += [fl.load_peft(ours / name, model)[0] for name in names]

            def load_theirs(ours: Path = ours) -> Any:
                wrapped = peft.PeftModel.from_pretrained(llama(options.quick), ours / names[0], adapter_name=names[0])
                for name in names[1:]:
                    wrapped.load_adapter(ours / name, adapter_name=name)
                return wrapped

            times.setdefault("save, funclora", []).append(seconds(save_ours))
            times.setdefault("load, funclora", []).append(seconds(load_ours))
            started = time.perf_counter()
            wrapped = load_theirs()
            times.setdefault("load, PEFT", []).append(time.perf_counter() - started)
            started = time.perf_counter()
            wrapped.save_pretrained(theirs)
            times.setdefault("save, PEFT", []).append(time.perf_counter() - started)
            for name, adapters in zip(names, loaded, strict=True):
                again: Any = fl.load_peft(theirs / name, model)[0]
                pairs = [(again[key], rule) for key, rule in adapters.items()]
                same = all(torch.equal(one.a, other.a) and torch.equal(one.b, other.b) for one, other in pairs)
                if not same:
                    raise RuntimeError(f"{name}: PEFT's folder holds other factors")
    medians = {name: statistics.median(some) for name, some in times.items()}
    print(f"{n} adapters, medians of {options.rounds} rounds")
    for what in ("save", "load"):
        a, b = medians[f"{what}, funclora"], medians[f"{what}, PEFT"]
        print(f"{what}: funclora {a:.2f} s, PEFT {b:.2f} s, ratio {a / b:.3f}")
    return medians


if __name__ == "__main__":
    main()

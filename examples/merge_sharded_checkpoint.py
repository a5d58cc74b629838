"""Merges a PEFT adapter into a sharded checkpoint without loading the model, and loads the result.

    python examples/merge_sharded_checkpoint.py

The model is a small Llama with random weights in four files, the adapter a DoRA of its attention with a new output
layer, so that the tied embeddings come apart. The script then extracts an adapter back from the merged model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import funclora as fl


class Result(NamedTuple):
    report: fl.io.MergeReport
    difference: float  # of the merged model's logits from those of the base under the adapter
    effect: float  # of the adapter on the logits
    tied: bool
    files: list[str]
    extracted: fl.io.ExtractReport


def make_base(folder: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")


def make_adapter(base: Path, folder: Path) -> None:
    model: Any = transformers.LlamaForCausalLM.from_pretrained(base)
    config = fl.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True, modules_to_save=["lm_head"])
    adapters = fl.init(model, config)
    # Noise in the place of training: the update must not be zero.
    trained = fl.optim.apply_updates(
        adapters, torch.utils._pytree.tree_map(lambda leaf: 0.1 * torch.randn_like(leaf), adapters)
    )
    fl.save_peft(folder, trained, config)


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to leave the folders; else they are removed")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        base, adapter, out = folder / "base", folder / "adapter", folder / "merged"
        make_base(base)
        make_adapter(base, adapter)

        report = fl.merge_checkpoint(base, adapter, out, verify=True)
        assert report.verification is not None
        for weight in report.weights[:3]:
            deviation = report.verification.deviations[weight.name]
            print(f"{weight.name}: {weight.change}, {deviation:.3f} units of rounding from the exact value")
        print(f"... {len(report.weights)} weights, {report.unchanged} as they were; untied: {', '.join(report.untied)}")

        # Nothing of funclora is needed from here on.
        merged: Any = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
        model: Any = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapters, _ = fl.load_peft(adapter, model)
        ids = torch.randint(256, (2, 16))
        with torch.no_grad():
            logits, before = merged(ids).logits, model(ids).logits
            under = fl.apply(model, fl.base_params(model), adapters, ids).logits
        difference, effect = (logits - under).abs().max().item(), (under - before).abs().max().item()
        print(f"the adapter moves logits by up to {effect:.3f}; the merged model is within {difference:.4f} of that")

        extracted = fl.extract_adapter(base, out, folder / "extracted", r=8, rest="save")
        worst = max(extracted.weights, key=lambda weight: weight.residual)
        print(f"an adapter of rank 8 leaves {worst.residual:.1%} of the change out at most, at {worst.name}")
        files = sorted(file.name for file in out.iterdir())
        return Result(report, difference, effect, merged.config.tie_word_embeddings, files, extracted)


if __name__ == "__main__":
    main()

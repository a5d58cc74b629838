"""A step of direct preference optimisation: `funclora train --task preference` against TRL's DPOTrainer with PEFT.

    python examples/benchmark_preference.py              everything; writes docs/benchmarks-preference.json and .md
    python examples/benchmark_preference.py --quick      tiny sizes and two rounds: shows that it runs
    python examples/benchmark_preference.py --page-only  the page again, from the .json

The same pairs in the same order, the same initial adapter, AdamW and clipping; the losses of all steps must agree.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import peft
import torch
from benchmark_steps import OURS, RANK, Case, Comparison, Prepared, Record, Step, on_disk, optimizer, words
from benchmark_tools import HOW, Bench, Benchmark, Goal, Result, compared, facts, head, ms, table_of_goals, table_row
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

THEIRS = "TRL + PEFT"


class Size(NamedTuple):
    layers: int
    dim: int
    vocab: int
    tokens: int  # of a prompt with an answer, at most
    pairs: int


FULL, QUICK = Size(6, 512, 32_000, 128, 4), Size(1, 32, 99, 16, 2)


def size_of(bench: Bench) -> Size:
    return QUICK if bench.quick else FULL


def model(bench: Bench) -> tuple[Any, PreTrainedTokenizerFast]:
    size = size_of(bench)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.dim, intermediate_size=size.dim * 8 // 3, num_hidden_layers=size.layers,
        num_attention_heads=8, num_key_value_heads=4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config), words(size.vocab)


def records(bench: Bench, n: int) -> list[Record]:
    """Prompts and answers of random words."""
    size, chosen = size_of(bench), random.Random(0)
    most = size.tokens // 2

    def text(length: int) -> str:
        return " ".join(f"w{chosen.randrange(size.vocab - 2)}" for _ in range(length))

    def answer() -> str:
        return f" {text(chosen.randrange(most // 2, most))}"

    return [{"prompt": text(most), "chosen": answer(), "rejected": answer()} for _ in range(n)]


def theirs(prepared: Prepared) -> Step:
    settings, folder, batches = prepared.made.settings, prepared.folder, prepared.batches()
    start = on_disk(prepared)
    config = peft.LoraConfig.from_pretrained(start)
    config.inference_mode = False
    args = DPOConfig(
        output_dir=str(folder / "theirs"), per_device_train_batch_size=settings.batch, max_steps=1000,
        learning_rate=settings.lr, lr_scheduler_type="constant", report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, max_length=settings.context, activation_checkpointing=False,
    )  # fmt: skip
    trainer: Any = DPOTrainer(
        model=LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list([row for batch in batches for row in batch]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "model"),
        peft_config=config,
    )
    peft.set_peft_model_state_dict(trainer.model, peft.load_peft_weights(str(start)))
    trainable, update = optimizer(trainer.model, settings.lr)
    trainer.current_gradient_accumulation_steps = 1
    rows, n, clip = iter(list(trainer.train_dataset)), settings.batch, settings.clip

    def step() -> float:
        update.zero_grad()
        loss = trainer.training_step(trainer.model, trainer.data_collator([next(rows) for _ in range(n)]))
        torch.nn.utils.clip_grad_norm_(trainable, clip)
        update.step()
        return float(loss)

    return step


def cases(bench: Bench) -> list[Case]:
    size = size_of(bench)
    common = {"task": "preference", "batch": size.pairs, "context": size.tokens}
    return [Case(method, common | {"method": method.lower()}) for method in ("LoRA", "DoRA")]


# --- the page --------------------------------------------------------------------------------------------------

LAYERS = "the arithmetic of the layers is the same for both"
IMPORTS = "the base model and what both import are the same for both"


def goals(result: Result) -> Iterator[Goal]:
    for method in ("LoRA", "DoRA"):
        row = result.find(method)
        yield compared(f"a step, {method}: time", row, OURS, THEIRS, 0.75, LAYERS)
        own, other = peaks = row.peaks.get(OURS), row.peaks.get(THEIRS)
        share = own / other if own and other else None
        yield Goal(f"a step, {method}: peak memory", THEIRS, 0.8, IMPORTS, share, peaks=peaks)


def page(result: Result) -> Iterator[str]:
    size = FULL
    yield "# Benchmark of preferences\n"
    yield "A step of direct preference optimisation (DPO): `funclora train --task preference` against TRL's"
    yield "`DPOTrainer` with PEFT. Both have the same pairs in the same order, the same initial adapter, AdamW and"
    yield "clipping.\n"
    yield HOW
    yield from facts(result)
    yield f"- Llama with {size.layers} layers, {size.dim} wide, {size.vocab:,} tokens, random weights in float32; rank"
    yield f"  {RANK} on all linear layers; {size.pairs} pairs a step, prompts of {size.tokens // 2} tokens and answers"
    yield f"  of {size.tokens // 4} to {size.tokens // 2}. The losses of all steps differ by at most"
    yield f"  {result.about['apart']:.0e}."
    yield "\n## Numbers to reach\n"
    yield from table_of_goals(goals(result))
    yield "\n## Time\n"
    yield from head("step", f"{THEIRS} (ms)", f"`{OURS}` (ms)")
    yield from (table_row(name, ms(row.median(THEIRS)), ms(row.median(OURS))) for name, row in result.rows.items())
    yield "\nThe arithmetic of the layers is the same for both: two passes forward, one of them without gradients, and"
    yield "one backward. The output layer is not: `funclora.losses.token_log_probs` computes logits for the tokens of"
    yield "the answers only, a part of them at a time, and with them what the gradient needs. On a CPU, TRL's fused"
    yield "output layer computes them for all positions, and again in backward."


COMPARISON = Comparison(model, records, THEIRS, theirs, cases)
BENCHMARK = Benchmark(
    "benchmarks-preference", __file__, ("transformers", "trl", "peft"), COMPARISON.jobs, page, apart=COMPARISON.apart,
    memory_of=COMPARISON.memory_of,
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    main()

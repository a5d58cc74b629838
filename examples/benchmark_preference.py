"""A step of direct preference optimisation: `funclora train --task preference` against TRL's DPOTrainer with PEFT.

The same pairs in the same order, the same initial adapter, AdamW and clipping. Steps take turns, and times are
medians. Memory is what the tensors of a step hold at their worst moment, besides the base, the adapters and the
optimizer's state.

    python examples/benchmark_preference.py
    python examples/benchmark_preference.py --dim 64 --layers 1 --vocabulary 512 --rounds 1
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import funclora as fl
from funclora._apps.train.reading import read
from funclora._apps.train.setup import Ready, ready
from funclora._apps.train.step import Steps
from funclora._torch.memory import Peak

WHY = """The arithmetic of the layers is the same for both: two passes forward, one of them without gradients, and
one backward. The output layer is not: `funclora.losses.token_log_probs` computes logits for the tokens of the answers
only, a part of them at a time, and with them what the gradient needs. On a CPU, TRL's fused output layer computes
them for all positions, and again in backward."""
OURS, THEIRS = "funclora train", "TRL + PEFT"
REACH = {"time": 0.75, "memory": 0.8}


class Row(NamedTuple):
    seconds: float
    peak: float  # MiB
    losses: list[float]


def folder_of_a_model(folder: Path, options: argparse.Namespace) -> list[dict[str, str]]:
    """A Llama of random weights with a token for each word, and pairs of answers of random words."""
    words = ["<pad>", "<end>", *(f"w{i}" for i in range(options.vocabulary - 2))]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.dim, intermediate_size=options.dim * 8 // 3,
        num_hidden_layers=options.layers, num_attention_heads=8, num_key_value_heads=4, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )).save_pretrained(folder)  # fmt: skip

    def text(n: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(options.vocabulary - 2, (n,)).tolist())

    n = options.tokens // 2
    lengths = torch.randint(n // 2, n, (options.pairs * (options.rounds + 2), 2)).tolist()
    return [{"prompt": text(n), "chosen": f" {text(a)}", "rejected": f" {text(b)}"} for a, b in lengths]


def ours(made: Ready, steps: Steps) -> Callable[[], float]:
    values = steps.vectors.of(made.start.adapters)
    now: list[Any] = [0, values, steps.init(values)]

    def run() -> float:
        done = steps(*now)
        now[:] = [now[0] + 1, done.values, done.state]
        return float(done.numbers[0])

    return run


def theirs(made: Ready, steps: Steps, rows: list[dict[str, str]], folder: Path) -> Callable[[], float]:
    settings = made.settings
    fl.save_peft(folder / "start", *made.start.exported(made.start.adapters))
    config = peft.LoraConfig.from_pretrained(folder / "start")
    config.inference_mode = False
    base = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    args = DPOConfig(
        output_dir=str(folder / "theirs"), per_device_train_batch_size=settings.batch, max_steps=1000,
        learning_rate=settings.lr, lr_scheduler_type="constant", report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, max_length=settings.context, activation_checkpointing=False,
    )  # fmt: skip
    trainer: Any = DPOTrainer(
        model=base,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "model"),
        peft_config=config,
    )
    model = trainer.model
    peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder / "start")))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, settings.lr, weight_decay=0.0, fused=True)
    records = list(trainer.train_dataset)
    now = [0]
    trainer.current_gradient_accumulation_steps = 1

    def run() -> float:
        some = [records[int(source.rpartition(":")[2]) - 1] for source in steps.batches.sources(now[0])]
        optimizer.zero_grad()
        loss = trainer.training_step(model, trainer.data_collator(some))
        torch.nn.utils.clip_grad_norm_(trainable, settings.clip)
        optimizer.step()
        now[0] += 1
        return float(loss)

    return run


def measure(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, Row]:
    losses = {name: [run()] for name, run in runs.items()}  # the first step is not measured
    peaks: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        with Peak() as memory:
            losses[name].append(run())
        peaks[name] = memory.peak / 2**20
    for i in range(rounds):
        for name in [*runs][:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            losses[name].append(runs[name]())
            times[name].append(time.perf_counter() - start)
    return {name: Row(statistics.median(times[name]), peaks[name], losses[name]) for name in runs}


def compare(method: str, options: argparse.Namespace, folder: Path, rows: list[dict[str, str]]) -> dict[str, Row]:
    settings = read(
        None,
        {
            "model": folder / "model", "data": [folder / "pairs.jsonl"], "task": "preference", "validation_split": 0.0,
            "method": method, "rank": 16, "alpha": 32, "lr": 1e-4, "schedule": "constant", "warmup": 0.0,
            "batch": options.pairs, "context": options.tokens, "out": folder / "run",
        },
    )  # fmt: skip
    made = ready(settings, folder)
    steps = Steps(made.start.base, made.start.adapters, made.data, made.settings)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        other = theirs(made, steps, rows, folder / method)
    return measure({OURS: ours(made, steps), THEIRS: other}, options.rounds)


def page(results: dict[str, dict[str, Row]], options: argparse.Namespace, command: str) -> str:
    table = []
    for method, rows in results.items():
        own, other = rows[OURS], rows[THEIRS]
        gap = max(abs(a - b) for a, b in zip(own.losses, other.losses, strict=True))
        table.append(
            f"| {method} | {1e3 * other.seconds:.0f} ms, {other.peak:.0f} MiB | {1e3 * own.seconds:.0f} ms, "
            f"{own.peak:.0f} MiB | {own.seconds / other.seconds:.2f} | {own.peak / other.peak:.2f} | {gap:.0e} |"
        )
    versions = (
        f"- Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"trl {trl.__version__}, peft {peft.__version__}, {date.today()}"
    )
    work = (
        f"- Llama with {options.layers} layers, {options.dim} wide, {options.vocabulary:,} tokens, random weights in "
        f"float32; rank 16 on all linear layers; {options.pairs} pairs a step, prompts of {options.tokens // 2} tokens "
        f"and answers of {options.tokens // 4} to {options.tokens // 2}; {options.rounds} steps of each."
    )
    return "\n".join([
        "# Benchmark of preferences",
        "",
        __doc__.split("\n\n")[1].strip() if __doc__ else "",
        "",
        f"- {platform.processor() or platform.machine()}, {options.threads} threads; {options.note}",
        versions,
        f"- `{command}`",
        work,
        "",
        f"| | {THEIRS} | `{OURS}` | time | memory | difference of the losses |",
        "|---|---|---|---|---|---|",
        *table,
        "",
        f"Asked for are {REACH['time']} × the time and {REACH['memory']} × the memory.",
        "",
        WHY,
        "",
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, dict[str, Row]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt with an answer, at most")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--note", default="nothing else was running", help="about the machine, for the page")
    parser.add_argument("--page", type=Path, help="file to write the results to")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    results = {}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        rows = folder_of_a_model(folder / "model", options)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "pairs.jsonl").write_text(lines, encoding="utf-8")
        for method in ("lora", "dora"):
            (folder / method).mkdir()
            (folder / method / "model").symlink_to(folder / "model")
            results[{"lora": "LoRA", "dora": "DoRA"}[method]] = compare(method, options, folder, rows)
    print(f"{'':6}{THEIRS:>22}{OURS:>22}{'time':>7}{'memory':>8}")
    for method, found in results.items():
        cells = [f"{1e3 * row.seconds:6.0f} ms {row.peak:6.0f} MiB" for row in (found[THEIRS], found[OURS])]
        ratios = found[OURS].seconds / found[THEIRS].seconds, found[OURS].peak / found[THEIRS].peak
        print(f"{method:6}{cells[0]:>22}{cells[1]:>22}{ratios[0]:>7.2f}{ratios[1]:>8.2f}")
    if options.page:
        command = "python examples/benchmark_preference.py"
        options.page.write_text(page(results, options, command), encoding="utf-8")
    return results


if __name__ == "__main__":
    main()

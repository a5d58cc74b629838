"""A step of contrastive training: `funclora train --task embedding` against sentence-transformers with PEFT.

    python examples/benchmark_embeddings.py            everything; writes docs/benchmarks-embeddings.md
    python examples/benchmark_embeddings.py --quick    tiny sizes and two rounds: shows that it runs, measures nothing

Every text of a batch is compared with all the others, so a large batch is computed in parts (gradient caching). Model,
texts, batches, initial adapter, AdamW and clipping are the same; the contenders take turns as in benchmark.py. Before
anything is timed, their losses and gradients must agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import random
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from benchmark import far, peft_leaves
from benchmark_plot import Row, head, machine, progress, replace, table_row
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import funclora as fl
from funclora._apps.train.reading import read
from funclora._apps.train.setup import Ready, ready
from funclora._apps.train.step import Steps, training_model
from funclora._torch.memory import Peak

OURS, THEIRS = "funclora", "sentence-transformers + PEFT"
MODULES = ("torch", "transformers", "sentence-transformers", "peft")
RANK = 16
TOLERANCE = 1e-3  # of losses and gradients, float32
Pair = dict[str, str]


class Size(NamedTuple):
    layers: int
    dim: int
    vocab: int
    tokens: int  # of a text, at most
    batch: int
    chunk: int


FULL, QUICK = Size(4, 256, 8000, 32, 256, 32), Size(1, 32, 99, 8, 16, 4)


class Case(NamedTuple):
    """What is compared: a method, with the batch in parts or whole."""

    name: str
    method: str
    chunk: int  # 0: the whole batch at once


class Contender(NamedTuple):
    """One of the two.

    Attributes:
        gradient: the loss of the first batch, and its gradient by weight and leaf; nothing is updated.
        step: takes the next step and returns its loss.
    """

    gradient: Callable[[], tuple[float, dict[str, torch.Tensor]]]
    step: Callable[[], float]


@dataclasses.dataclass
class Result:
    """What one case gave; of contenders by name.

    Attributes:
        seconds: of each round.
        cpu: seconds of computation in all threads.
        peaks: bytes of the tensors of a step at the worst moment, without base, adapters and optimizer state.
        losses: of each step, before and while it was measured.
        gap: largest difference of the first gradients, as a share of the largest value.
    """

    seconds: Row
    cpu: Row
    peaks: dict[str, int]
    losses: dict[str, list[float]]
    gap: float


def folder_of_a_model(folder: Path, size: Size) -> None:
    """A BERT of random weights with a token for each word. Without dropout: contenders would draw different masks."""
    words = ["<pad>", *(f"w{i}" for i in range(size.vocab - 1))]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(
        vocab_size=size.vocab, hidden_size=size.dim, intermediate_size=4 * size.dim, num_hidden_layers=size.layers,
        num_attention_heads=4, max_position_embeddings=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )).save_pretrained(folder)  # fmt: skip


def pairs(n: int, size: Size) -> list[Pair]:
    """Texts of random words; the second one of a pair has half of the first one's."""
    chosen = random.Random(0)

    def words() -> list[str]:
        length = chosen.randint(size.tokens // 4, size.tokens // 2)
        return [f"w{chosen.randrange(size.vocab - 1)}" for _ in range(length)]

    found = []
    for _ in range(n):
        shared = words()
        found.append({name: " ".join([*shared, *words()]) for name in ("anchor", "positive")})
    return found


def ours(made: Ready, steps: Steps) -> Contender:
    base: Any = made.start.base
    model, adapters = training_model(base, made.settings), made.start.adapters
    values = steps.vectors.of(adapters)
    now: list[Any] = [0, values, steps.init(values)]

    def gradient() -> tuple[float, dict[str, torch.Tensor]]:
        (batch,) = steps.batches.step(0, slice(1))
        total, grads = fl.value_and_grad(base.loss)(model, base.params, adapters, batch)
        n = base.count(batch)
        leaves = {
            f"{name} {leaf}": getattr(rule, leaf) / n
            for name, rule in grads.items()
            for leaf in ("a", "b", "magnitude")
            if hasattr(rule, leaf)
        }
        return float(total) / n, leaves

    def step() -> float:
        done = steps(*now)
        now[:] = [now[0] + 1, done.values, done.state]
        return float(done.numbers[0])

    return Contender(gradient, step)


def theirs(made: Ready, steps: Steps, rows: list[Pair], number: int, folder: Path) -> Contender:
    """The texts of all steps are tokens before the first one, as they are for funclora."""
    settings = made.settings
    fl.save_peft(folder / "start", *made.start.exported(made.start.adapters))
    body: Any = Transformer(str(settings.model))
    body.model = wrapped = peft.PeftModel.from_pretrained(body.model, str(folder / "start"), is_trainable=True)
    layers = [body, Pooling(body.model.config.hidden_size, "mean"), Normalize()]
    model = SentenceTransformer(modules=layers, device=str(made.start.base.device)).train()
    loss: Any = losses.MultipleNegativesRankingLoss(model, scale=settings.scale)
    if settings.chunk:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=settings.scale, mini_batch_size=settings.chunk)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, settings.lr, weight_decay=0.0, fused=True)

    def features(k: int) -> list[Any]:
        some = [rows[int(example.source.rpartition(":")[2]) - 1] for example in steps.batches.rows(k)]
        return [
            {key: x.to(model.device) if isinstance(x, torch.Tensor) else x for key, x in given.items()}
            for given in (model.preprocess([row[name] for row in some]) for name in ("anchor", "positive"))
        ]

    waiting = iter([features(k) for k in range(number)])

    def gradient() -> tuple[float, dict[str, torch.Tensor]]:
        value = loss(features(0), None)
        value.backward()
        leaves: dict[str, Any] = {
            f"{name} {leaf}": parameter.grad
            for name in made.start.adapters
            for leaf, parameter in peft_leaves(wrapped, name).items()
        }
        optimizer.zero_grad()
        return float(value), leaves

    def step() -> float:
        optimizer.zero_grad()
        value = loss(next(waiting), None)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trainable, settings.clip)
        optimizer.step()
        return float(value)

    return Contender(gradient, step)


def agree(runs: dict[str, Contender]) -> float:
    """The largest difference of the gradients; an error if the contenders do not compute the same."""
    (loss, grads), (other, wanted) = (runs[name].gradient() for name in (OURS, THEIRS))
    if not abs(loss - other) <= TOLERANCE * abs(other):
        raise RuntimeError(f"The losses differ: {OURS} has {loss}, {THEIRS} {other}")
    if grads.keys() != wanted.keys():
        raise RuntimeError(f"The contenders train different tensors: {sorted(grads.keys() ^ wanted.keys())}")
    if idle := [name for name, grad in wanted.items() if not grad.any()]:
        raise RuntimeError(f"No gradient reaches {idle}")
    gaps = {name: far(grads[name].reshape(wanted[name].shape), wanted[name]) for name in wanted}
    worst = max(gaps, key=lambda name: gaps[name])
    if gaps[worst] > TOLERANCE:
        raise RuntimeError(f"The gradients differ, in {worst} by {gaps[worst]:.1e} of the largest value")
    return gaps[worst]


def measure(case: Case, runs: dict[str, Contender], rounds: int, wait: Callable[[], object]) -> Result:
    gap = agree(runs)
    found = {name: [run.step()] for name, run in runs.items()}  # the first step is not measured
    peaks = {}
    for name, run in runs.items():
        with Peak() as memory:
            found[name].append(run.step())
        peaks[name] = memory.peak
    seconds, cpu = (Row("", RANK, case.name, {name: [] for name in runs}) for _ in range(2))
    for i in range(rounds):
        for name in [*runs][:: 1 if i % 2 else -1]:
            wait()
            start, computed = time.perf_counter(), time.process_time()
            found[name].append(runs[name].step())
            wait()
            seconds.seconds[name].append(time.perf_counter() - start)
            cpu.seconds[name].append(time.process_time() - computed)
    for own, other in zip(found[OURS], found[THEIRS], strict=True):
        if not abs(own - other) <= TOLERANCE * abs(other):
            raise RuntimeError(f"{case.name}: the losses go apart: {found}")
    return Result(seconds, cpu, peaks, found, gap)


def compare(case: Case, size: Size, options: argparse.Namespace, rows: list[Pair], folder: Path) -> Result:
    """Both contenders on the records in `pairs.jsonl` of the folder, which also has the model."""
    (own := folder / case.name).mkdir()
    settings = read(
        None,
        {
            "model": folder / "model", "data": [folder / "pairs.jsonl"], "task": "embedding", "validation_split": 0.0,
            "method": case.method, "rank": RANK, "alpha": 2 * RANK, "init": "false", "lr": 1e-4, "warmup": 0.0,
            "schedule": "constant", "batch": size.batch, "chunk": case.chunk, "out": own / "run",
            "device": options.device, "context": 64,
        },
    )  # fmt: skip
    made = ready(settings, own)
    steps = Steps(made.start.base, made.start.adapters, made.data, made.settings)
    runs = {OURS: ours(made, steps), THEIRS: theirs(made, steps, rows, options.rounds + 2, own)}
    wait = torch.cuda.synchronize if options.device == "cuda" else (lambda: None)
    return measure(case, runs, options.rounds, wait)


def page(about: dict[str, Any], size: Size, results: dict[str, Result]) -> Iterator[str]:
    yield "# Benchmark of embeddings\n"
    yield f"A training step with in-batch negatives, {size.batch} pairs in a batch: `funclora train --task embedding`"
    yield "against sentence-transformers with PEFT. Large batches are computed in parts, and each part again for its"
    yield f"gradient: `--chunk {size.chunk}` against `CachedMultipleNegativesRankingLoss` with parts of that size."
    yield "The whole batch at once is `--chunk 0` against `MultipleNegativesRankingLoss`. [Embeddings](embeddings.md)"
    yield "has the commands.\n"
    if about["quick"]:
        yield '!!! warning "A quick run"\n    A tiny model and two rounds. These numbers mean nothing.\n'
    yield f"- BERT ({size.layers} layers, {size.dim} wide, {size.vocab:,} tokens, random weights, float32, no dropout);"
    yield f"  rank {RANK} on all its linear layers; texts of {size.tokens // 2} to {size.tokens} tokens."
    yield "- Both have the same adapter at the start, the same batches, AdamW and clipping. A step is forward and"
    yield "  backward pass, clipping and update. The texts are tokens before, and only funclora pads them in the step."
    gap = max(result.gap for result in results.values())
    apart = max(
        abs(own - other)
        for result in results.values()
        for own, other in zip(result.losses[OURS], result.losses[THEIRS], strict=True)
    )
    yield f"- Checked before: gradients differ by at most {gap:.0e} of the largest value of each tensor."
    yield f"  The losses of all steps differ by at most {apart:.0e}."
    before, after = about["load"]
    yield f"- {about['machine']}, {os.cpu_count()} cores, {about['threads']} threads; load when it began: {before:.1f},"
    yield f"  at the end: {after:.1f}"
    yield f"- {about['versions']}"
    yield f"- `{about['command']}`, {about['date']}, {about['minutes']:.0f} minutes\n"
    yield "## Time\n"
    yield f"Medians over {about['rounds']} rounds in which the contenders took turns. A ratio is the median of the"
    yield "ratios within each round, with the lowest and the highest in brackets; below 1, funclora is faster. It is"
    yield "also given for seconds of computation, which other programs on the machine disturb less.\n"
    if before > 1:
        yield "The machine was busy with other programs when this was measured: the seconds and the first ratio contain"
        yield "their work, so compare by computation.\n"
    yield from head("step", f"{THEIRS} (s)", f"{OURS} (s)", "ratio", "by computation")
    for name, result in results.items():
        times = (f"{result.seconds.median(who):.2f}" for who in (THEIRS, OURS))
        yield table_row(name, *times, result.seconds.ratio(OURS, THEIRS), result.cpu.ratio(OURS, THEIRS))
    yield "\n## Peak memory\n"
    yield "MiB that the tensors of a step hold at its worst moment, without the base, the adapter and the optimizer's"
    yield "state at its beginning.\n"
    yield from head("step", THEIRS, OURS, "ratio")
    for name, result in results.items():
        own, other = result.peaks[OURS], result.peaks[THEIRS]
        yield table_row(name, f"{other / 2**20:.1f}", f"{own / 2**20:.1f}", f"{own / other:.2f}")


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help='nothing unless "embeddings" has this in it')
    parser.add_argument("--out", type=Path, help="folder to write to; docs, but a new one in /tmp for a quick run")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; by default as many as it takes")
    options = parser.parse_args(argv)
    if options.only not in "embeddings":
        return {}
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.rounds = 2
    size = QUICK if options.quick else FULL
    parts = f"parts of {size.chunk}"
    cases = [
        Case(f"LoRA, {parts}", "lora", size.chunk),
        Case(f"DoRA, {parts}", "dora", size.chunk),
        Case("LoRA, whole batch", "lora", 0),
    ]
    words = ["python", "examples/benchmark_embeddings.py", *(sys.argv[1:] if argv is None else argv)]
    versions = {"Python": platform.python_version()} | {name: importlib.metadata.version(name) for name in MODULES}
    about: dict[str, Any] = {
        "machine": machine(options.device), "threads": torch.get_num_threads(), "load": [os.getloadavg()[0]],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}", "command": shlex.join(words),
        "rounds": options.rounds, "quick": options.quick,
    }  # fmt: skip
    start = time.perf_counter()
    results = {}
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name, progress(len(cases)) as tick, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        folder_of_a_model(folder / "model", size)
        rows = pairs(size.batch * (options.rounds + 2), size)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "pairs.jsonl").write_text(lines, encoding="utf-8")
        for case in cases:
            tick(case.name)
            results[case.name] = compare(case, size, options, rows, folder)
            tick("")
    about["minutes"] = (time.perf_counter() - start) / 60
    about["load"].append(os.getloadavg()[0])
    out = options.out or (Path(tempfile.mkdtemp(prefix="benchmark-")) if options.quick else Path("docs"))
    out.mkdir(parents=True, exist_ok=True)
    replace(out / "benchmarks-embeddings.md", ("\n".join(page(about, size, results)) + "\n").encode())
    print(f"{about['minutes']:.1f} minutes. Written: {out / 'benchmarks-embeddings.md'}")
    return results


if __name__ == "__main__":
    main()

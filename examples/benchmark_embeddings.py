"""A step of contrastive training: `funclora train --task embedding` against sentence-transformers with PEFT.

    python examples/benchmark_embeddings.py              everything; writes docs/benchmarks-embeddings.json and .md
    python examples/benchmark_embeddings.py --quick      tiny sizes and two rounds: shows that it runs
    python examples/benchmark_embeddings.py --page-only  the page again, from the .json

Every text of a batch is compared with all the others, so a large batch is computed in parts (gradient caching). Model,
texts, batches, initial adapter, AdamW and clipping are the same; losses and gradients must agree.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import peft
import torch
from benchmark import far, peft_leaves
from benchmark_steps import OURS, RANK, TOLERANCE, Case, Comparison, Prepared, Record, Step, on_disk, optimizer, words
from benchmark_tools import HOW, Bench, Benchmark, Goal, Result, compared, facts, head, table_of_goals, table_row
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import funclora as fl
from funclora._apps.train.step import training_model

THEIRS = "sentence-transformers + PEFT"
TEXTS = ("anchor", "positive")
Gradients = tuple[float, dict[str, torch.Tensor]]  # the loss, and its gradient by weight and leaf


class Size(NamedTuple):
    layers: int
    dim: int
    vocab: int
    tokens: int  # of a text, at most
    batch: int
    chunk: int


FULL, QUICK = Size(4, 256, 8000, 32, 256, 32), Size(1, 32, 99, 8, 16, 4)


def size_of(bench: Bench) -> Size:
    return QUICK if bench.quick else FULL


def model(bench: Bench) -> tuple[Any, PreTrainedTokenizerFast]:
    """A BERT without dropout: contenders would draw different masks."""
    size = size_of(bench)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size.vocab, hidden_size=size.dim, intermediate_size=4 * size.dim, num_hidden_layers=size.layers,
        num_attention_heads=4, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    tokenizer = words(size.vocab)
    tokenizer.model_max_length = 64
    return BertForMaskedLM(config), tokenizer


def records(bench: Bench, n: int) -> list[Record]:
    """Texts of random words; the second one of a pair has half of the first one's."""
    size, chosen = size_of(bench), random.Random(0)

    def some() -> list[str]:
        length = chosen.randint(size.tokens // 4, size.tokens // 2)
        return [f"w{chosen.randrange(size.vocab - 2)}" for _ in range(length)]

    found = []
    for _ in range(n):
        shared = some()
        found.append({name: " ".join([*shared, *some()]) for name in TEXTS})
    return found


def cases(bench: Bench) -> list[Case]:
    """With the batch in parts, or whole."""
    size = size_of(bench)
    common = {"task": "embedding", "batch": size.batch, "context": 64, "init": "false"}
    return [
        Case(f"{name}, {f'parts of {chunk}' if chunk else 'whole batch'}", common | {"method": method, "chunk": chunk})
        for name, method, chunk in (("LoRA", "lora", size.chunk), ("DoRA", "dora", size.chunk), ("LoRA", "lora", 0))
    ]


# --- sentence-transformers -------------------------------------------------------------------------------------


def wrapped(prepared: Prepared) -> tuple[Any, Any, Callable[[list[Record]], list[Any]]]:
    """The model, its loss, and what makes tokens of records."""
    settings = prepared.made.settings
    body: Any = Transformer(str(settings.model))
    body.model = peft.PeftModel.from_pretrained(body.model, str(on_disk(prepared)), is_trainable=True)
    layers = [body, Pooling(body.model.config.hidden_size, "mean"), Normalize()]
    model = SentenceTransformer(modules=layers, device="cpu").train()
    loss: Any = losses.MultipleNegativesRankingLoss(model, scale=settings.scale)
    if settings.chunk:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=settings.scale, mini_batch_size=settings.chunk)
    return body.model, loss, lambda rows: [model.preprocess([row[name] for row in rows]) for name in TEXTS]


def theirs(prepared: Prepared) -> Step:
    """The texts of all steps are tokens before the first one, as they are for funclora."""
    model, loss, tokens = wrapped(prepared)
    waiting = iter([tokens(batch) for batch in prepared.batches()])
    clip = prepared.made.settings.clip
    trainable, update = optimizer(model, prepared.made.settings.lr)

    def step() -> float:
        update.zero_grad()
        value = loss(next(waiting), None)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trainable, clip)
        update.step()
        return float(value)

    return step


def check(prepared: Prepared) -> float:
    """The largest difference of the first gradients, as a share of the largest value."""
    base: Any = prepared.made.start.base
    adapters: Any = prepared.made.start.adapters
    (batch,) = prepared.steps.batches.step(0, slice(1))
    own = training_model(base, prepared.made.settings)
    total, grads = fl.value_and_grad(base.loss)(own, base.params, adapters, batch)
    n = base.count(batch)
    leaves = {
        f"{name} {leaf}": getattr(rule, leaf) / n
        for name, rule in grads.items()
        for leaf in ("a", "b", "magnitude")
        if hasattr(rule, leaf)
    }
    model, loss, tokens = wrapped(prepared)
    value = loss(tokens(prepared.batches()[0]), None)
    value.backward()
    wanted: dict[str, Any] = {
        f"{name} {leaf}": parameter.grad for name in adapters for leaf, parameter in peft_leaves(model, name).items()
    }
    return agree((float(total) / n, leaves), (float(value), wanted))


def agree(own: Gradients, other: Gradients) -> float:
    """The largest difference of the gradients; an error if the contenders do not compute the same."""
    (loss, grads), (expected, wanted) = own, other
    if not abs(loss - expected) <= TOLERANCE * abs(expected):
        raise RuntimeError(f"The losses differ: {OURS} has {loss}, {THEIRS} {expected}")
    if grads.keys() != wanted.keys():
        raise RuntimeError(f"The contenders train different tensors: {sorted(grads.keys() ^ wanted.keys())}")
    if idle := [name for name, grad in wanted.items() if not grad.any()]:
        raise RuntimeError(f"No gradient reaches {idle}")
    gaps = {name: far(grads[name].reshape(wanted[name].shape), wanted[name]) for name in wanted}
    worst = max(gaps, key=lambda name: gaps[name])
    if gaps[worst] > TOLERANCE:
        raise RuntimeError(f"The gradients differ, in {worst} by {gaps[worst]:.1e} of the largest value")
    return gaps[worst]


# --- the page --------------------------------------------------------------------------------------------------

SAME = "both run the base forward twice and backward once over every part; the products of the adapter are small"


def goals(result: Result) -> Iterator[Goal]:
    for name, row in result.rows.items():
        yield compared(f"a step, {name}", row, OURS, THEIRS, 1.0, SAME)


def page(result: Result) -> Iterator[str]:
    size = FULL
    yield "# Benchmark of embeddings\n"
    yield f"A training step with in-batch negatives, {size.batch} pairs in a batch: `funclora train --task embedding`"
    yield "against sentence-transformers with PEFT. Large batches are computed in parts, and each part again for its"
    yield f"gradient: `--chunk {size.chunk}` against `CachedMultipleNegativesRankingLoss` with parts of that size."
    yield "The whole batch at once is `--chunk 0` against `MultipleNegativesRankingLoss`. [Embeddings](embeddings.md)"
    yield "has the commands.\n"
    yield HOW
    yield from facts(result)
    yield f"- BERT ({size.layers} layers, {size.dim} wide, {size.vocab:,} tokens, random weights, float32, no dropout);"
    yield f"  rank {RANK} on all its linear layers; texts of {size.tokens // 2} to {size.tokens} tokens."
    yield "- Both have the same adapter at the start, the same batches, AdamW and clipping. A step is forward and"
    yield "  backward pass, clipping and update. The texts are tokens before, and only funclora pads them in the step."
    yield f"- Checked before: gradients differ by at most {result.about['gap']:.0e} of the largest value of each"
    yield f"  tensor. The losses of all steps differ by at most {result.about['apart']:.0e}."
    yield "\n## Numbers to reach\n"
    yield from table_of_goals(goals(result))
    yield "\n## Time\n"
    yield from head("step", f"{THEIRS} (s)", f"`{OURS}` (s)")
    for name, row in result.rows.items():
        yield table_row(name, *(f"{row.median(who):.2f}" for who in (THEIRS, OURS)))


COMPARISON = Comparison(model, records, THEIRS, theirs, cases, check)
BENCHMARK = Benchmark(
    "benchmarks-embeddings", __file__, ("transformers", "sentence-transformers", "peft"), COMPARISON.jobs, page,
    apart=COMPARISON.apart, memory_of=COMPARISON.memory_of,
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    main()

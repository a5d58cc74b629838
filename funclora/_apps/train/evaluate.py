"""Evaluation of adapters: the losses of the validation data, and continuations of some prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from funclora._apps.train.batches import evaluation
from funclora._apps.train.embedding import EmbeddingBase
from funclora._apps.train.settings import Settings
from funclora._apps.train.step import autocast, moved
from funclora._bind.apply import bind
from funclora.distributed import _ranks as ranks
from funclora.errors import ConfigError
from funclora.rules.base import Adapters

if TYPE_CHECKING:
    from funclora._apps.train.base import Base
    from funclora._apps.train.examples import Example


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
        means: "loss" in nats for each label; for classification "correct", the share of labels; and what the base
            watches. Empty without data.
        samples: prompts and their continuations.
    """

    means: dict[str, float]
    samples: list[tuple[str, str]]


@torch.no_grad()
def evaluate(
    base: Base,
    adapters: Adapters,
    examples: Sequence[Example],
    settings: Settings,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Losses of examples, and the continuations of `settings.sample`.

    Args:
        base: the frozen model, in evaluation mode.
        adapters: the adapters to evaluate.
        examples: may be empty.
        settings: the run.
        interrupted: called before each batch.

    Returns:
        None if it was interrupted.

    Raises:
        ConfigError: there are examples, and no position of them has a label.
    """
    bound = bind(base.model, base.params, adapters)
    pad, part = base.tokenizer.pad_token_id, slice(ranks.rank(), None, ranks.size())
    found: list[tuple[int, dict[str, Any]]] = []  # of each batch of this process: labels, sums
    rows = settings.chunk or settings.batch
    batches = -(-len(examples) // rows)
    own = evaluation(examples, batch=rows, pad=pad, task=base.task, part=part)
    if settings.shard and batches % ranks.size() and ranks.rank() >= batches % ranks.size():
        # Every process must gather the weights as often as the others: this one computes a batch that does not count.
        own = itertools.chain(own, evaluation(examples, batch=rows, pad=pad, task=base.task, part=slice(1)))
    for batch in own:
        if interrupted():
            return None
        with autocast(settings, base.device):
            given = base.prepared(moved(batch, base.device))
            scores = base.by_row(bound, given) if isinstance(base, EmbeddingBase) else base.score(bound, given)
        found.append((base.count(batch), {key: value.cpu().double() for key, value in scores.items()}))
    found = found[: len(range(batches)[part])]
    labels, sums = 0, dict[str, Any]()
    dealt = ranks.dealt(found)  # in their order, so that the sum is the same for any number of processes
    for count, parts in dealt:
        labels += count
        if not isinstance(base, EmbeddingBase):  # whose rows are judged together
            sums = {key: sums.get(key, 0) + value for key, value in parts.items()}
    if examples and not labels:
        raise ConfigError("validation: no position of the validation data has a label. Give other data.")
    samples = []
    for prompt in settings.sample:
        if interrupted():
            return None
        with autocast(settings, base.device):
            samples.append((prompt, base.generate(bound, prompt, settings.sample_tokens)))
    if isinstance(base, EmbeddingBase) and dealt:
        loss, values = base.judge({name: torch.cat([parts[name] for _, parts in dealt]) for name in dealt[0][1]})
        return Evaluation({"loss": loss, **values}, samples)
    means = {key: float(value[0] / value[1]) if value.dim() else float(value) / labels for key, value in sums.items()}
    return Evaluation(means, samples)

"""One optimizer step: micro-batches, the gradient of their sum, the update."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
import torch
from torch import Tensor, nn

from funclora._apps.train.batches import Batches
from funclora._apps.train.optimizer import Vectors, joins, optimizer, schedule, total_steps
from funclora._apps.train.settings import Settings
from funclora._bind.apply import bind
from funclora._train.step import autograd, micro_seed, seeded, value_and_grad
from funclora.distributed import _ranks as ranks
from funclora.distributed._mean import TreeSum, ordered_sums
from funclora.distributed._ranks import part_of, parts_of
from funclora.errors import ConfigError, UnsupportedError
from funclora.optim import apply_updates, global_norm
from funclora.rules.base import Adapters, Rule

if TYPE_CHECKING:
    from funclora._apps.train.base import Base
    from funclora._apps.train.examples import Data


class Stepped(NamedTuple):
    """The result of a step.

    Attributes:
        values: the adapters, as `Vectors` has them.
        state: the optimizer's.
        numbers: `[2 + watched]`, the loss per label and the norm of the gradient before clipping; and the means of what
            the base watches, NaN without a value.
        tokens: number of tokens read.
    """

    values: Any
    state: Any
    numbers: Tensor
    tokens: int


class Steps:
    """The steps of a run, each a pure function of adapters, optimizer state and its number.

    Args:
        base: the frozen model; not changed.
        adapters: give the structure.
        data: the training data.
        settings: the run.

    Attributes:
        per_epoch: steps in an epoch.
        total: steps of the run.
        rate: the learning rate as a function of the steps taken.
        vectors: the form in which adapters are trained.
        init: `values -> state` of the optimizer.

    Raises:
        ConfigError: there are no examples, or settings contradict each other.
        UnsupportedError: the model cannot recompute its activations.
    """

    def __init__(self, base: Base, adapters: Adapters, data: Data, settings: Settings) -> None:
        if not data.train:
            raise ConfigError("data: there are no examples to train on.")
        self.base, self.seed = base, settings.seed
        self.accumulation, self.shard = settings.accumulation, settings.shard
        self.batches = Batches.of(settings, data.train, base.tokenizer.pad_token_id, data.shares)
        self.per_epoch = self.batches.steps_per_epoch
        self.total = total_steps(settings, self.per_epoch)
        self.rate = schedule(settings, self.total)
        self.vectors = Vectors(adapters, joined=joins(settings))
        self.init, self._update = optimizer(settings, self.total)
        self._gradient = _gradient(base, settings)

    def __call__(self, k: int, values: Any, state: Any) -> Stepped:
        """Step k, which counts from 0. Every process computes some of its micro-batches, and all get the same result.

        Raises:
            ConfigError: none of its positions has a label.
        """
        adapters = self.vectors.tree(values)
        together = self.base.together
        shared = range(self.accumulation) if together else part_of(self.accumulation)
        own = range(self.batches.size(k))[shared.start : shared.stop]
        labels = tokens = 0
        sums = TreeSum()
        for i, batch in zip(own, self.batches.step(k, slice(own.start, own.stop)), strict=True):
            labels += self.base.count(batch)
            tokens += _tokens(batch) if ranks.is_first() or not together else 0
            sums.add(self._passed(k, i, batch, adapters))
        if not own:
            like: list[Any] = [*optree.tree_leaves(values), *self._numbers()]
            sums.add([torch.full_like(leaf, -0.0) for leaf in like])  # not 0.0: that would change the sum of -0.0
        if self.shard and not together:  # every process must gather the weights as often as the others
            most = max(len(range(self.batches.size(k))[s.start : s.stop]) for s in parts_of(self.accumulation))
            for _ in range(most - len(own)):
                self._passed(k, 0, self.batches.step(k, slice(1))[0], adapters)
        labels, tokens = ranks.sums(labels, tokens)
        if not labels:
            raise ConfigError(f"data: no position of step {k + 1} has a label. Its examples: {self.sources(k)}.")
        with torch.no_grad():
            *total, loss, watched = ordered_sums(sums.total(), ranks.size())
            # Divided once, not for each loss: the count covers all micro-batches.
            means: Any = optree.tree_unflatten(optree.tree_structure(values), [x.mul_(1 / labels) for x in total])
            numbers = torch.stack([loss / labels, global_norm(means)])
            if self.base.watched:
                sums_, counts = watched.unbind(-1)
                numbers = torch.cat([numbers, sums_ / counts])
            updates, state = self._update(means, state, params=values)
            values = apply_updates(values, updates)
        return Stepped(values, state, numbers, tokens)

    def _passed(self, k: int, i: int, batch: Mapping[str, Tensor], adapters: Adapters) -> list[Tensor]:
        """The sums of micro-batch i of step k: gradients, loss, `[watched, 2]`. Its seed is its own, in any process."""
        with seeded(micro_seed(step_seed(self.seed, k), i), adapters):
            given = self.base.prepared(moved(batch, self.base.device))
            (loss, found), grads = self._gradient(adapters, given)
        vectors: Any = self.vectors.of(grads)
        _, watched = self._numbers()
        for row, name in zip(watched, self.base.watched, strict=True):
            row.copy_(found[name])
        return [*optree.tree_leaves(vectors), loss, watched]

    def _numbers(self) -> tuple[Tensor, Tensor]:
        """A loss, and what is watched, `[watched, 2]`, for sums of them."""
        device = self.base.device
        return torch.zeros((), device=device), torch.zeros(len(self.base.watched), 2, device=device)

    def sources(self, k: int) -> str:
        """The sources of the examples of step k; the first ones by name."""
        sources = self.batches.sources(k)
        return ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if len(sources) > 8 else "")


def training_model(base: Base, settings: Settings) -> nn.Module:
    """The model in training mode: a copy of the module tree with the same weights, but its own flags.

    Raises:
        UnsupportedError: it cannot recompute its activations.
    """
    model: Any = bind(base.model, base.params, {}).train()
    if settings.neftune:
        embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model.embed
        embeddings.register_forward_hook(noise(settings.neftune))
    if settings.checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise UnsupportedError(
                f"checkpointing: {base.name} ({type(model).__name__}) cannot recompute its activations. Leave it out."
            )
        # The second name is the old one; newer versions of transformers warn about it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model  # type: ignore[no-any-return]


def _gradient(base: Base, settings: Settings) -> Callable[..., tuple[tuple[Tensor, Any], dict[str, Rule]]]:
    """`(adapters, batch) -> ((loss, watched), gradients)`, sums over labels, with the model in training mode."""
    if settings.checkpointing and settings.compile:
        raise ConfigError(
            "checkpointing and compile exclude each other: torch.compile decides what to recompute. Give one."
        )
    model = training_model(base, settings)

    def loss(bound: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(settings, base.device):
            return base.watch(bound, batch)

    if not settings.compile:
        eager = value_and_grad(loss, has_aux=True)
        return lambda adapters, batch: eager(model, base.params, adapters, batch)

    @torch.compile
    def compiled(params: Mapping[str, Tensor], adapters: Adapters, batch: Mapping[str, Tensor]) -> Any:
        return loss(bind(model, params, adapters), batch)

    def gradient(adapters: Adapters, batch: Mapping[str, Tensor]) -> tuple[tuple[Tensor, Any], dict[str, Rule]]:
        for tensor in batch.values():
            for dim in range(tensor.dim()):  # otherwise there would be a graph for each length
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        # Not a compiled torch.func.grad: there, dropout does not support varying sizes.
        value, found, grads = autograd(lambda tree: compiled(base.params, tree, batch), dict(adapters))
        return (value, found), grads

    return gradient


def noise(alpha: float) -> Callable[..., Tensor]:
    """A forward hook that adds uniform noise to embeddings `[batch, seq, dim]` (NEFTune, arXiv 2310.05914).

    noise = alpha / √(seq·dim)·U(-1, 1)
    """

    def add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        size = alpha / (output.size(1) * output.size(2)) ** 0.5
        return output + torch.zeros_like(output).uniform_(-size, size)

    return add


def autocast(settings: Settings, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Compute the block in the precision of the run."""
    return torch.autocast(device.type, torch.bfloat16) if settings.bf16 else contextlib.nullcontext()


def moved(batch: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    """The batch on a device."""
    if device.type == "cpu":
        return batch
    return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}


def _tokens(batch: Mapping[str, Tensor]) -> int:
    """Number of tokens read, without padding if there is a mask."""
    masks = [mask for name, mask in batch.items() if name.startswith("attention_mask")]
    return sum(int(mask.sum()) for mask in masks) if masks else batch["input_ids"].numel()


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's randomness."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=7).digest(), "little")

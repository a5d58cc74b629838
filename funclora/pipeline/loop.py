"""Training: from adapters and data to trained adapters, step by step, resumable at every step.

Batches, dropout and learning rate of a step are functions of the seed and the step's number. All that a step needs from
the one before it are the adapters and the optimizer's state.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor, nn

from funclora._apply import Adapters, bind
from funclora._rules import Rule
from funclora._train import seeded, value_and_grad
from funclora.errors import ConfigError, NonFiniteError, UnsupportedError
from funclora.optim import apply_updates, global_norm
from funclora.pipeline.batches import Batches, evaluation
from funclora.pipeline.checkpoint import Progress, Run, fingerprint, opened
from funclora.pipeline.optimizer import Vectors, optimizer, schedule, total_steps
from funclora.pipeline.settings import Settings

if TYPE_CHECKING:
    from funclora.pipeline.base import Base
    from funclora.pipeline.examples import Data
    from funclora.pipeline.journal import Journal

# Why a run stopped.
FINISHED, PATIENCE = "finished", "patience"
# Steps after which the losses are looked at, if no line is written before: until then a device is not waited for.
UNSEEN = 50


@dataclass(frozen=True, eq=False)
class Outcome:
    """What training gives.

    Attributes:
        adapters: the result: those of the last step; with `patience`, those of the best evaluation.
        step: the step that they are of.
        losses: `{"train": [(step, loss)], "validation": [(step, loss)]}`, nats per label, as in metrics.jsonl.
        best: step and loss of the best evaluation; None without validation data.
        stopped: `FINISHED` or `PATIENCE`.
    """

    adapters: dict[str, Rule]
    step: int
    losses: dict[str, list[tuple[int, float]]]
    best: tuple[int, float] | None
    stopped: str


def train(
    base: Base, adapters: Adapters, data: Data, settings: Settings, journal: Journal, run: Run | None = None
) -> Outcome:
    """Train adapters on data, or go on with the run in `settings.out` (`settings.resume`).

    Args:
        base: the frozen model; not changed.
        adapters: fresh adapters. On resume they give the structure, the checkpoint the values.
        data: what to train and evaluate on.
        settings: the run.
        journal: where it is told.
        run: the folder, from `checkpoint.opened`, for a caller that keeps other processes out while it loads the model
            and writes the result; by default it is opened here.

    Returns:
        The outcome.

    Raises:
        ConfigError: the folder is in use, holds another run, or holds a run and `resume` is not set.
        NonFiniteError: a loss or gradient is not finite.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written; the message says how to go on. Exit code 130.
        OSError: something cannot be written; the last checkpoint is intact.
    """
    with contextlib.ExitStack() as stack:
        if run is None:
            run = stack.enter_context(opened(settings))
        interrupted = stack.enter_context(interruptible())
        return _Training(base, adapters, data, settings, journal, run, interrupted).outcome()


class _Training:
    """A run at work."""

    def __init__(
        self,
        base: Base,
        adapters: Adapters,
        data: Data,
        settings: Settings,
        journal: Journal,
        run: Run,
        interrupted: Callable[[], bool],
    ) -> None:
        self.base, self.data, self.settings, self.journal, self.run = base, data, settings, journal, run
        self.interrupted = interrupted
        if not data.train:
            raise ConfigError("data: there is no example to train on.")
        if settings.patience and not (settings.eval_every and data.validation):
            raise ConfigError(
                f"patience={settings.patience}: it counts evaluations, and there are none to count. Set --eval-every "
                "and give --validation or --validation-split."
            )
        self.device = torch.device(settings.device)
        self.rows = {"batch": settings.batch, "pad": base.tokenizer.pad_token_id, "task": settings.task}
        self.batches = Batches(data.train, accumulation=settings.accumulation, seed=settings.seed, **self.rows)
        self.total = total_steps(settings, self.batches.steps_per_epoch)
        self.rate = schedule(settings, self.total)
        self.optimizer = optimizer(settings, self.total)
        self.gradient = gradient_of(base, settings)
        self.vectors = Vectors(adapters)
        self.values = self.vectors.of(adapters)
        self.state = self.optimizer.init(self.values)
        self.unseen: list[Tensor] = []  # [loss, norm] of steps whose values were not looked at yet
        self.progress = Progress()
        run.begin({"data": data.digest(), "base model": fingerprint(base.params)})
        if run.last is not None:
            self.progress = self._restore(run.last)
            run.prune(self.progress)  # what a process that was killed had no time for
        self.saved = (run.last, self.progress.evaluated)
        self.fresh = (self.progress.tokens, self.progress.seconds)
        journal.begin(self.progress.step, self.total, run.id, self.progress.metrics)
        if settings.resume:
            journal.note(f"Going on after step {self.progress.step} of {self.total}.")

    def outcome(self) -> Outcome:
        """Train to the end."""
        progress = self.progress
        while True:
            evaluated = self._evaluate() if self._is_evaluated_here() else False
            if not progress.stopped and progress.step >= self.total:
                progress.stopped = FINISHED
            if self._is_saved_here(evaluated) or self.interrupted():
                self._save()
            if self.interrupted():
                raise KeyboardInterrupt(
                    f"Stopped after step {progress.step} of {self.total}. The same command with --resume goes on."
                )
            if progress.stopped:
                break
            self._step()
        best = progress.best
        if progress.stopped == PATIENCE and best is not None and best[0] != progress.step:
            self._restore(best[0])
        step = best[0] if progress.stopped == PATIENCE and best else progress.step
        # Of their own: views of one vector are no leaves that can be saved.
        tree: Any = self.vectors.tree(self.values)
        adapters: Any = optree.tree_map(torch.Tensor.clone, tree)
        return Outcome(adapters, step, self.journal.losses, best, progress.stopped)

    # Steps

    def _step(self) -> None:
        progress, started = self.progress, time.perf_counter()
        batches = self.batches.step(progress.step)
        labels = sum(self.base.count(batch) for batch in batches)
        if not labels:
            raise ConfigError(f"data: no position of step {progress.step + 1} has a label: {self._sources()}.")
        adapters = self.vectors.tree(self.values)
        losses: list[Tensor] = []
        sums: Any = None
        with seeded(_seed(self.settings.seed, progress.step), adapters):
            for batch in batches:
                loss, grads = self.gradient(adapters, _moved(batch, self.device))
                losses.append(loss)
                vectors: Any = self.vectors.of(grads)
                sums = vectors if sums is None else optree.tree_map(torch.Tensor.add_, sums, vectors)
        with torch.no_grad():
            means = optree.tree_map(lambda vector: vector.mul_(1 / labels), sums)
            self.unseen.append(torch.stack([torch.stack(losses).sum() / labels, global_norm(means)]))
            updates, self.state = self.optimizer.update(means, self.state, params=self.values)
            self.values = apply_updates(self.values, updates)
        progress.step += 1
        progress.tokens += sum(_tokens(batch) for batch in batches)
        line = progress.step % self.settings.log_every == 0 or progress.step == self.total
        if line or len(self.unseen) >= UNSEEN or self.device.type == "cpu":
            self._look()
        progress.seconds += time.perf_counter() - started
        self.journal.tick(progress.step)
        if line:
            self._line()

    def _look(self) -> None:
        """Fetch the losses and norms that were not looked at yet.

        Raises:
            NonFiniteError: one of them is not finite.
        """
        if not self.unseen:
            return
        first = self.progress.step - len(self.unseen)
        for step, (loss, norm) in enumerate(torch.stack(self.unseen).tolist(), start=first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
                raise NonFiniteError(
                    f"step {step + 1} of {self.total}: {what}. Its examples: {self._sources(step)}; "
                    f"{self.run.state()}. Look at the examples, or train anew with a lower --lr or without --bf16."
                )
            self.progress.pending.append((loss, norm))
        self.unseen.clear()

    def _line(self) -> None:
        progress = self.progress
        losses = [loss for loss, _ in progress.pending]
        tokens, seconds = progress.tokens - self.fresh[0], progress.seconds - self.fresh[1]
        self.journal.line({
            "step": progress.step,
            "epoch": self._epoch(),
            "loss": math.fsum(losses) / len(losses),
            "grad_norm": progress.pending[-1][1],
            "lr": self.rate(torch.tensor(progress.step - 1)).item(),
            "tokens": progress.tokens,
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "seconds": round(progress.seconds, 3),
        })  # fmt: skip
        progress.pending.clear()

    def _epoch(self) -> float:
        return round(self.progress.step / self.batches.steps_per_epoch, 4)

    def _sources(self, step: int | None = None) -> str:
        sources = self.batches.sources(self.progress.step if step is None else step)
        return ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if len(sources) > 8 else "")

    # Evaluations

    def _is_evaluated_here(self) -> bool:
        progress, every = self.progress, self.settings.eval_every
        if not (self.data.validation or self.settings.sample) or progress.evaluated >= progress.step:
            return False
        return progress.step == self.total or bool(every and progress.step and progress.step % every == 0)

    @torch.no_grad()
    def _evaluate(self) -> bool:
        """Evaluate, unless Ctrl-C comes in between."""
        base, progress = self.base, self.progress
        bound = bind(base.model, base.params, self.vectors.tree(self.values))
        line: dict[str, Any] = {"step": progress.step, "epoch": self._epoch()}
        sums: dict[str, Any] = {}
        labels = 0
        for batch in evaluation(self.data.validation, **self.rows):
            if self.interrupted():
                return False
            labels += base.count(batch)
            with _autocast(self.settings, self.device):
                scores = base.score(bound, _moved(batch, self.device))
            sums = {key: sums.get(key, 0) + value.double() for key, value in scores.items()}
        samples = []
        for prompt in self.settings.sample:
            if self.interrupted():
                return False
            with _autocast(self.settings, self.device):
                samples.append((prompt, base.generate(bound, prompt, self.settings.sample_tokens)))
        if labels:
            means = {key: float(value) / labels for key, value in sums.items()}
            self._judge(means["loss"])
            line |= {"validation_loss": means["loss"]}
            line |= {"validation_accuracy": means["correct"]} if "correct" in means else {}
            self.journal.line(line)
        elif self.data.validation:
            raise ConfigError("validation: no position of the validation data has a label.")
        if samples:
            self.journal.samples(progress.step, samples)
        progress.evaluated = progress.step
        return True

    def _judge(self, loss: float) -> None:
        """Remember the best evaluation, and stop after too many without a better one."""
        progress = self.progress
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"step {progress.step} of {self.total}: the validation loss is {loss}; {self.run.state()}. Look at the "
                "validation data, or train anew with a lower --lr or without --bf16."
            )
        if progress.best is None or loss < progress.best[1]:
            progress.best, progress.waited = (progress.step, loss), 0
        else:
            progress.waited += 1
        if self.settings.patience and progress.waited >= self.settings.patience:
            progress.stopped = PATIENCE
            self.journal.note(
                f"Stopped after step {progress.step}: {progress.waited} evaluations without a better one than after "
                f"step {progress.best[0]}."
            )

    # Checkpoints

    def _is_saved_here(self, evaluated: bool) -> bool:
        progress, every = self.progress, self.settings.save_every
        if progress.stopped:
            return True
        if every and progress.step and progress.step % every == 0:
            return True
        is_best = progress.best is not None and progress.best[0] == progress.step
        return evaluated and (is_best or not every)

    def _save(self) -> None:
        progress = self.progress
        if self.saved == (progress.step, progress.evaluated):
            return
        self._look()
        progress.metrics = self.journal.mark()
        self.run.save(progress, self._tree(self.vectors.tree(self.values), self.state, _generators(self.device)))
        self.saved = (progress.step, progress.evaluated)

    def _restore(self, step: int) -> Progress:
        like = self._tree(self.vectors.tree(self.values), self.state, _generators(self.device))
        progress, tree = self.run.load(step, like)
        self.values, self.state = self.vectors.of(tree["adapters"]), tree["optimizer"]
        torch.set_rng_state(tree["generators"]["cpu"])
        if "cuda" in tree["generators"]:
            torch.cuda.set_rng_state(tree["generators"]["cuda"], self.device)
        return progress

    @staticmethod
    def _tree(adapters: Any, state: Any, generators: dict[str, Tensor]) -> dict[str, Any]:
        return {"adapters": adapters, "optimizer": state, "generators": generators}


def gradient_of(base: Base, settings: Settings) -> Callable[..., tuple[Tensor, dict[str, Rule]]]:
    """`(adapters, batch) -> (loss, gradients)`, both sums over labels, with the model in training mode."""
    if settings.checkpointing and settings.compile:
        raise ConfigError("checkpointing and compile: torch.compile recomputes what it wants to. Choose one of them.")
    # A copy of the module tree over the same weights: the flags are its own.
    model: Any = bind(base.model, base.params, {}).train()
    if settings.checkpointing:
        _recompute(model, base.name)
    device = torch.device(settings.device)

    def loss(bound: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with _autocast(settings, device):
            return base.loss(bound, batch)

    run = value_and_grad(loss)

    def gradient(params: Mapping[str, Tensor], adapters: Adapters, batch: Any) -> tuple[Tensor, dict[str, Rule]]:
        return run(model, params, adapters, batch)

    compiled: Callable[..., Any] = torch.compile(gradient) if settings.compile else gradient
    return lambda adapters, batch: compiled(base.params, adapters, batch)


def _recompute(model: Any, name: str) -> None:
    """Let a transformers model recompute its activations in backward."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UnsupportedError(f"checkpointing: {name} ({type(model).__name__}) cannot recompute its activations.")
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _autocast(settings: Settings, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if settings.bf16 else contextlib.nullcontext()


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    if device.type == "cpu":
        return batch
    return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}


def _tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens that are read, without padding where a mask says what that is."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None and mask.dim() == 2 else batch["input_ids"].numel()


def _seed(seed: int, step: int) -> int:
    """Of the randomness in a step."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=7).digest(), "little")


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's global generators, which no step draws from."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed in the block; pressed again, it interrupts as always."""
    pressed = False

    def press(signum: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt("Stopped at once. The same command with --resume goes on from the last checkpoint.")
        pressed = True

    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)

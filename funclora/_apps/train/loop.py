"""Training: from adapters and data to trained adapters, step by step, resumable at every step.

Batches, dropout and learning rate of a step are functions of the seed and the step's number. From the previous step, it
needs only the adapters and the optimizer's state.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor

from funclora._apps.train.checkpoint import DamagedError, Run, RunProgress, fingerprint, opened, tree_fingerprint
from funclora._apps.train.evaluate import evaluate
from funclora._apps.train.optimizer import schedule, total_steps
from funclora._apps.train.settings import Settings
from funclora._apps.train.step import Steps
from funclora.distributed import _ranks as ranks
from funclora.errors import ConfigError, NonFiniteError
from funclora.rules.base import Adapters, Rule

if TYPE_CHECKING:
    from funclora._apps.train.base import Base
    from funclora._apps.train.examples import Data
    from funclora._apps.train.journal import Journal

CHECKPOINTS_OF_A_RUN = 10  # unless set otherwise
# Why a run stopped.
FINISHED, PATIENCE = "finished", "patience"
# What the settings call a mean of an evaluation -> its names.
METRICS = {"loss": ("loss",), "accuracy": ("correct", "rewards/accuracies"), "margin": ("rewards/margins",)}
# Steps after which losses are fetched, if no line is written earlier: until then, the device is not synchronised.
UNSEEN = 50


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of training.

    Attributes:
        adapters: the trained adapters: of the best evaluation, or of the last step (`final`).
        step: their step.
        taken: the number of steps taken.
        losses: `{"train": [(step, loss)], "validation": [(step, loss)]}`, nats per label, as in metrics.jsonl.
        best: step and loss (or other metric) of the best evaluation; None without validation data.
        stopped: `FINISHED` or `PATIENCE`.
    """

    adapters: dict[str, Rule]
    step: int
    taken: int
    losses: dict[str, list[tuple[int, float]]]
    best: tuple[int, float] | None
    stopped: str

    def chosen(self) -> str:
        """Which adapter it is, for messages.

        Examples:
            >>> Outcome({}, 30, 90, {}, (30, 1.5), FINISHED).chosen()
            'of step 30, the best evaluation; the last step is 90'
        """
        best = ", the best evaluation" if self.best is not None and self.best[0] == self.step else ""
        last = f"; the last step is {self.taken:,}" if self.taken != self.step else ""
        return f"of step {self.step:,}{best}{last}"


def train(
    base: Base, adapters: Adapters, data: Data, settings: Settings, journal: Journal, run: Run | None = None
) -> Outcome:
    """Train adapters on data, or continue the run in `settings.out` (`settings.resume`).

    Args:
        base: the frozen model; not changed.
        adapters: new adapters. On resume, they give the structure and the checkpoint gives the values.
        data: the training and validation data.
        settings: the run.
        journal: receives messages and metrics.
        run: the folder, from `checkpoint.opened`, for a caller that holds the lock while it loads the model and
            writes the result; by default it is opened here.

    Returns:
        The outcome.

    Raises:
        ConfigError: the folder is in use, contains another run, or contains a run and `resume` is not set.
        NonFiniteError: a loss or gradient is not finite.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint is written; the message says how to continue. Exit code 130.
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
        if settings.patience and not (settings.eval_every and data.validation):
            raise ConfigError(
                f"patience={settings.patience}: it counts evaluations, but there are none. Set --eval-every "
                "and give --validation or --validation-split."
            )
        if settings.eval_every and not (data.validation or settings.sample):
            raise ConfigError(
                f"eval_every={settings.eval_every}: there is no data to evaluate on. Give --validation, a larger "
                "--validation-split or --sample; or leave --eval-every out."
            )
        self.steps = Steps(base, adapters, data, settings)
        self.total = self.steps.total
        self.values = self.steps.vectors.of(adapters)
        self.state = self.steps.init(self.values)
        self.unseen: list[Tensor] = []  # numbers of steps that were not fetched yet
        self.progress = RunProgress()
        digests = {"data": data.digest(), **{name: fingerprint(part) for name, part in base.constants.items()}}
        if settings.adapter is not None:
            digests["starting adapter"] = tree_fingerprint(adapters)
        ranks.check_equal(digests | {"initial adapter": tree_fingerprint(adapters)})
        run.begin(digests)
        if ranks.is_first() and run.last is not None:
            self.progress = self._restore_last()
            self._check_length()
            run.prune(self.progress)  # what a killed process did not finish
        run.describe()
        self._as_first()
        self.saved = (run.last, self.progress.evaluated)
        self.before = (self.progress.tokens, self.progress.seconds)
        journal.begin(self.progress.step, self.total, run.id, self.progress.metrics)
        if settings.resume:
            journal.note(f"Continuing after step {self.progress.step} of {self.total}.")

    def outcome(self) -> Outcome:
        """Train to the end."""
        progress = self.progress
        while True:
            evaluated = self._evaluate() if self._is_evaluated_here() else False
            if not progress.stopped and progress.step >= self.total:
                progress.stopped = FINISHED
            (presses,) = ranks.sums(self.interrupted())
            if self._is_saved_here(evaluated) or presses:
                self._save()
            if presses:
                raise KeyboardInterrupt(
                    f"Step {progress.step} of {self.total} is done and saved. The same command with --resume continues."
                )
            if progress.stopped:
                break
            self._step()
        best = progress.best
        taken = progress.step
        step = best[0] if self.settings.final == "best" and best is not None else taken
        if step != taken:
            if ranks.is_first():
                self._restore(step)
            self._as_first()
        # Copies: views of one vector cannot be saved.
        tree: Any = self.steps.vectors.tree(self.values)
        adapters: Any = optree.tree_map(torch.Tensor.clone, tree)
        return Outcome(adapters, step, taken, self.journal.losses, best, progress.stopped)

    # Steps

    def _step(self) -> None:
        progress, started = self.progress, time.perf_counter()
        self.values, self.state, numbers, tokens = self.steps(progress.step, self.values, self.state)
        self.unseen.append(numbers)
        progress.step += 1
        progress.tokens += tokens
        line = progress.step % self.settings.log_every == 0 or progress.step == self.total
        if line or len(self.unseen) >= UNSEEN or not numbers.is_cuda:
            self._look()
        progress.seconds += time.perf_counter() - started
        self.journal.tick(progress.step)
        if line:
            self._line()

    def _look(self) -> None:
        """Fetch the losses and norms of the steps since the last fetch.

        Raises:
            NonFiniteError: one of them is not finite.
        """
        if not self.unseen:
            return
        first = self.progress.step - len(self.unseen)
        for step, (loss, norm, *watched) in enumerate(torch.stack(self.unseen).tolist(), start=first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
                raise NonFiniteError(
                    f"step {step + 1} of {self.total}: {what}. Its examples: {self.steps.sources(step)}; "
                    f"{self.run.state()}. Check the examples, or start again with a lower --lr or without --bf16."
                )
            self.progress.pending.append([loss, norm, *watched])
        self.unseen.clear()

    def _line(self) -> None:
        progress = self.progress
        columns = [[x for x in column if not math.isnan(x)] for column in zip(*progress.pending, strict=True)]
        means = [math.fsum(column) / len(column) if column else None for column in columns]
        watched = dict(zip(self.base.watched, means[2:], strict=True))
        tokens, seconds = progress.tokens - self.before[0], progress.seconds - self.before[1]
        self.journal.line({
            "step": progress.step,
            "epoch": self._epoch(),
            "loss": means[0],
            "grad_norm": progress.pending[-1][1],
            **{name: value for name, value in watched.items() if value is not None},
            "lr": self.steps.rate(torch.tensor(progress.step - 1)).item(),
            "tokens": progress.tokens,
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "seconds": round(progress.seconds, 3),
        })  # fmt: skip
        progress.pending.clear()

    def _epoch(self) -> float:
        return round(self.progress.step / self.steps.per_epoch, 4)

    # Evaluations

    def _is_evaluated_here(self) -> bool:
        progress, every = self.progress, self.settings.eval_every
        if not (self.data.validation or self.settings.sample) or progress.evaluated >= progress.step:
            return False
        return progress.step == self.total or bool(every and progress.step and progress.step % every == 0)

    def _evaluate(self) -> bool:
        """Evaluate, unless Ctrl-C comes in between."""
        progress = self.progress
        adapters = self.steps.vectors.tree(self.values)
        alone = ranks.size() == 1  # several processes could not know of each other when to stop
        interrupted = self.interrupted if alone else lambda: False
        found = evaluate(self.base, adapters, self.data.validation, self.settings, interrupted)
        if found is None:
            return False
        if found.means:
            self._judge(found.means)
            names = {"correct": "accuracy"}
            line = {
                f"validation_{names.get(key, key)}": value
                for key, value in found.means.items()
                if not math.isnan(value)
            }
            self.journal.line({"step": progress.step, "epoch": self._epoch(), **line})
        if found.samples:
            self.journal.samples(progress.step, found.samples)
        progress.evaluated = progress.step
        return True

    def _judge(self, means: Mapping[str, float]) -> None:
        """Remember the best evaluation, and stop after too many evaluations without improvement."""
        progress, loss = self.progress, means["loss"]
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"step {progress.step} of {self.total}: the validation loss is {loss}; {self.run.state()}. Check the "
                "validation data, or start again with a lower --lr or without --bf16."
            )
        value = next((means[name] for name in METRICS[self.settings.metric] if name in means), None)
        if value is None:
            raise ConfigError(
                f"metric: an evaluation of this data has no {self.settings.metric}, only {', '.join(means)}. Set it to "
                "loss."
            )
        if math.isnan(value):
            raise ConfigError(
                f"metric: no batch of the validation data has both good and bad answers, so there is no "
                f"{self.settings.metric}. Set it to loss, or give other validation data."
            )
        sign = 1 if self.settings.metric == "loss" else -1
        if progress.best is None or sign * value < sign * progress.best[1]:
            progress.best, progress.waited = (progress.step, value), 0
        else:
            progress.waited += 1
        if self.settings.patience and progress.waited >= self.settings.patience:
            progress.stopped = PATIENCE
            self.journal.note(
                f"Stopped after step {progress.step}: {progress.waited} evaluations without improvement since "
                f"step {progress.best[0]}."
            )

    # Checkpoints

    def _is_saved_here(self, evaluated: bool) -> bool:
        progress, every = self.progress, self.settings.save_every
        if not (every or self.settings.eval_every):
            every = math.ceil(self.total / CHECKPOINTS_OF_A_RUN)
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
        ranks.check_equal({f"adapter after step {progress.step}": tree_fingerprint(self.values)})
        progress.metrics = self.journal.mark()
        self.run.save(progress, self._tree())
        self.saved = (progress.step, progress.evaluated)

    def _check_length(self) -> None:
        """Go on to another end than before, if that is what the settings say.

        Raises:
            ConfigError: the run is longer already, or early stopping ended it.
        """
        progress, before, where = self.progress, self.run.before, self.run.folder
        if progress.step > self.total:
            raise ConfigError(
                f"steps: the run in {where} has taken {progress.step} steps already, expected at most {self.total}. "
                "Give more --steps."
            )
        if before is None:
            return
        if progress.stopped == PATIENCE:
            raise ConfigError(
                f"resume: early stopping ended the run in {where} after step {progress.step}, so it gets no longer. "
                "Start another run from its adapter with --adapter."
            )
        progress.stopped = ""
        total, taken = total_steps(before, self.steps.per_epoch), torch.arange(progress.step)
        if not torch.equal(schedule(before, total)(taken), self.steps.rate(taken)):
            self.journal.note(
                f"The first {progress.step} steps had the learning rates of a run of {total} steps, so the result "
                f"is not that of a run of {self.total} steps. With a constant schedule and warm-up steps it would be."
            )

    def _restore_last(self) -> RunProgress:
        """Go on from the last checkpoint that is intact."""
        damaged: list[tuple[int, DamagedError]] = []
        for step in reversed(self.run.steps()):
            try:
                progress = self._restore(step)
            except DamagedError as error:  # noqa: PERF203 -- each is a file
                damaged.append((step, error))
            else:
                self.run.last = step
                break
        else:
            raise damaged[0][1]
        for bad, _ in damaged:
            aside = self.run.set_aside(bad)
            self.journal.note(f"The checkpoint of step {bad} is damaged and was set aside as {aside}.")
        return progress

    def _restore(self, step: int) -> RunProgress:
        progress, tree = self.run.load(step, self._tree())
        self.values, self.state = self.steps.vectors.of(tree["adapters"]), tree["optimizer"]
        torch.set_rng_state(tree["generators"]["cpu"])
        if "cuda" in tree["generators"]:
            torch.cuda.set_rng_state(tree["generators"]["cuda"].cpu(), self.base.device)
        return progress

    def _as_first(self) -> None:
        """Take over the progress, adapters and optimizer of the first process: it chooses the checkpoint."""
        self.progress, self.run.last, self.run.id = ranks.from_first((self.progress, self.run.last, self.run.id))
        self.values, self.state = ranks.tensors_from_first((self.values, self.state))

    def _tree(self) -> dict[str, Any]:
        """All tensors of a checkpoint, including the states of torch's global generators, which no step uses."""
        device = self.base.device
        cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        return {
            "adapters": self.steps.vectors.tree(self.values),
            "optimizer": self.state,
            "generators": {"cpu": torch.get_rng_state(), **cuda},
        }


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed in the block; a second Ctrl-C interrupts as usual."""
    pressed = False

    def press(signum: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt("The same command with --resume continues from the last checkpoint.")
        pressed = True

    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)

"""Training: from adapters and data to trained adapters, step by step, resumable at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from funclora._apply import Adapters
from funclora._rules import Rule
from funclora.pipeline.settings import Settings

if TYPE_CHECKING:
    from funclora.pipeline.base import Base
    from funclora.pipeline.checkpoint import Run
    from funclora.pipeline.examples import Data
    from funclora.pipeline.journal import Journal

# Why a run stopped.
FINISHED, PATIENCE = "finished", "patience"


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
    raise NotImplementedError

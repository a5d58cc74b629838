"""Reporting the progress of a run to all outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from funclora._apps.train._sinks import Line, Metrics, MLflow, Samples, Sink, TensorBoard, Terminal, WeightsAndBiases
from funclora._apps.train.checkpoint import METRICS
from funclora._apps.train.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

EVENTS = "tensorboard"


class Journal:
    """The outputs of a run: `with Journal(settings, quiet=as_json) as journal: train(..., journal)`.

    Args:
        settings: the run's.
        quiet: print nothing in the terminal.
        console: the terminal output; stderr by default.

    Attributes:
        notes: the messages.
        losses: `{"train": [(step, loss)], "validation": [(step, loss)]}`, of the steps before a resume too.

    Raises, when made:
        ConfigError: `tensorboard`, `wandb` or `mlflow` is requested and not installed.
    """

    def __init__(self, settings: Settings, *, quiet: bool = False, console: Console | None = None) -> None:
        self.notes: list[str] = []
        self.losses: dict[str, list[tuple[int, float]]] = {"train": [], "validation": []}
        self._metrics = Metrics(settings.out / METRICS)
        self._terminal = None if quiet else Terminal(console)
        self._sinks: list[Sink] = [self._metrics]
        if settings.tensorboard:
            self._sinks.append(TensorBoard(settings.out / EVENTS))
        if settings.wandb is not None:
            self._sinks.append(WeightsAndBiases(settings))
        if settings.mlflow is not None:
            self._sinks.append(MLflow(settings))
        if self._terminal:
            self._sinks.append(self._terminal)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        for sink in self._sinks:
            sink.close()

    def begin(self, step: int, total: int, id: str, size: int) -> None:
        """Start, or continue after a step.

        Args:
            step: number of steps taken.
            total: total number of steps.
            id: a name that no other run has.
            size: of metrics.jsonl at that step, in bytes; later lines are cut off.

        Raises:
            FormatError: metrics.jsonl is shorter than that, or broken.
            OSError: a file cannot be written.
        """
        for line in self._metrics.cut(size):
            self._count(line)
        for sink in self._sinks:
            sink.begin(step, total, id)

    def line(self, line: Line) -> None:
        """Numbers of a step: `step`, and `loss` or `validation_loss`, and more."""
        self._count(line)
        for sink in self._sinks:
            sink.line(line)

    def samples(self, step: int, samples: Samples) -> None:
        """Continuations of the prompts after a step."""
        for sink in self._sinks:
            sink.samples(step, samples)

    def tick(self, step: int) -> None:
        """A step is done."""
        if self._terminal:
            self._terminal.tick(step)

    def note(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.notes.append(text)
        if self._terminal:
            self._terminal.say(text)

    def mark(self) -> int:
        """The size of metrics.jsonl in bytes, after it was flushed to the disk."""
        return self._metrics.flushed()

    def _count(self, line: Line) -> None:
        for name, key in (("train", "loss"), ("validation", "validation_loss")):
            if key in line:
                self.losses[name].append((line["step"], line[key]))


class Mute(Journal):
    """The journal of a process that reports nothing, because another one does."""

    def __init__(self) -> None:
        self.notes = []
        self.losses = {"train": [], "validation": []}
        self._terminal = None
        self._sinks = []

    def begin(self, step: int, total: int, id: str, size: int) -> None:
        """Nothing."""

    def mark(self) -> int:
        """Nothing was written."""
        return 0

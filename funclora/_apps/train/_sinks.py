"""The outputs of a run: metrics.jsonl, TensorBoard, Weights & Biases, the terminal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from funclora._apps.train.settings import Settings
from funclora._files.typed import as_type
from funclora.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from rich.console import Console

Line = dict[str, Any]
Samples = Sequence[tuple[str, str]]  # prompt, continuation


class Sink(Protocol):
    """One output."""

    def begin(self, step: int, total: int, id: str) -> None:
        """The run starts after the step, of a total number of steps; `id` is a unique name."""

    def line(self, line: Line) -> None:
        """Numbers of a step."""

    def samples(self, step: int, samples: Samples) -> None:
        """Continuations after a step."""

    def close(self) -> None:
        """The run has ended."""


_HINT = "Restore it, or start again in another folder."


class Metrics:
    """metrics.jsonl: a line of JSON for each line."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stream: Any = None

    def cut(self, size: int) -> list[Line]:
        """Forget what is behind the first `size` bytes; what is before them."""
        if not size:
            self._stream = self.file.open("wb", buffering=0)
            return []
        try:
            self._stream = self.file.open("r+b", buffering=0)
            head = self._stream.read(min(size, self.file.stat().st_size))
            lines = [_line(line, str(self.file)) for line in head.splitlines()]
        except (FileNotFoundError, ValueError, RecursionError) as error:
            raise FormatError(f"{self.file}: lines from before the checkpoint are missing: {error}. {_HINT}") from error
        if len(head) < size:
            raise FormatError(f"{self.file}: expected {size} bytes, as at the checkpoint, found {len(head)}. {_HINT}")
        self._stream.truncate(size)
        self._stream.seek(size)
        return lines

    def begin(self, step: int, total: int, id: str) -> None:
        pass

    def line(self, line: Line) -> None:
        rest = memoryview(json.dumps(line).encode() + b"\n")
        try:
            while rest:  # unbuffered, for readers that follow it: a full disk may accept only a part
                rest = rest[self._stream.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror or error}: no line can be added", str(self.file)) from error

    def samples(self, step: int, samples: Samples) -> None:
        self.line({"step": step, "samples": [{"prompt": prompt, "continuation": text} for prompt, text in samples]})

    def flushed(self) -> int:
        """Its size, after it was flushed to the disk."""
        os.fsync(self._stream.fileno())
        size: int = self._stream.tell()
        return size

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def _line(text: bytes, where: str) -> Line:
    """A line of before, whose numbers are numbers."""
    line: Line = as_type(dict[str, Any], json.loads(text), where)
    as_type(int, line.get("step"), f"{where}: step")
    for name in ("loss", "validation_loss"):
        if name in line:
            as_type(float, line[name], f"{where}: {name}")
    return line


class TensorBoard:
    """TensorBoard's event files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "tensorboard: it is requested, but not installed. Install it (pip install tensorboard), or leave "
                f"--tensorboard out. ({error})"
            ) from error
        self._open = SummaryWriter

    def begin(self, step: int, total: int, id: str) -> None:
        # What an earlier process wrote after its last checkpoint is written again.
        self._writer = self._open(str(self.folder), purge_step=step + 1 if step else None)

    def line(self, line: Line) -> None:
        for name, value in _numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def samples(self, step: int, samples: Samples) -> None:
        for prompt, text in samples:
            self._writer.add_text(f"samples/{prompt[:40]}", f"{prompt}**{text}**", step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run on wandb.ai, or in its offline mode."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._run: Any = None
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "wandb: it is requested, but not installed. Install it (pip install wandb), or leave --wandb out."
            ) from error
        self._wandb: Any = wandb

    def begin(self, step: int, total: int, id: str) -> None:
        from funclora._apps.train.checkpoint import plain

        self._run = self._wandb.init(
            project=self.settings.wandb,
            dir=str(self.settings.out),
            id=id,
            resume="allow",
            config=plain(self.settings),
        )

    def line(self, line: Line) -> None:
        self._run.log(_numbers(line), step=line["step"])

    def samples(self, step: int, samples: Samples) -> None:
        rows = [[step, prompt, text] for prompt, text in samples]
        self._run.log({"samples": self._wandb.Table(["step", "prompt", "continuation"], data=rows)}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class MLflow:
    """A run of an experiment, on the server or in the folder that MLflow is set to (MLFLOW_TRACKING_URI)."""

    TAG = "funclora.run"  # by which a resumed run finds itself

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._open = False
        try:
            import mlflow
        except ImportError as error:
            raise ConfigError(
                "mlflow: it is requested, but not installed. Install it (pip install mlflow), or leave --mlflow out."
            ) from error
        self._mlflow: Any = mlflow

    def begin(self, step: int, total: int, id: str) -> None:
        from funclora._apps.train.checkpoint import plain

        experiment = self._mlflow.set_experiment(self.settings.mlflow).experiment_id
        before = self._mlflow.search_runs(
            [experiment], filter_string=f"tags.`{self.TAG}` = '{id}'", output_format="list", max_results=1
        )
        if before:
            self._mlflow.start_run(run_id=before[0].info.run_id)
        else:
            self._mlflow.start_run(run_name=self.settings.out.name, tags={self.TAG: id})
            self._mlflow.log_params(plain(self.settings))
        self._open = True

    def line(self, line: Line) -> None:
        self._mlflow.log_metrics(_numbers(line), step=line["step"])

    def samples(self, step: int, samples: Samples) -> None:
        text = "\n\n".join(f"{prompt}{continuation}" for prompt, continuation in samples)
        self._mlflow.log_text(text, f"samples/{step:08d}.txt")

    def close(self) -> None:
        if self._open:
            self._mlflow.end_run()


def _numbers(line: Line) -> dict[str, float]:
    """The values that are drawn as curves, grouped as in TensorBoard."""
    return {
        f"validation/{key.removeprefix('validation_')}" if key.startswith("validation_") else f"train/{key}": value
        for key, value in line.items()
        if key != "step"
    }


class Terminal:
    """A progress bar in a terminal; in a log, a line every few seconds."""

    EVERY = 10.0  # seconds between lines of training in a log

    def __init__(self, console: Console | None) -> None:
        from funclora._apps.train.console import Console

        self.console = console or Console(stderr=True)
        self._bar: Any = None
        self._task: Any = None
        self._total = 0
        self._said = 0.0

    def begin(self, step: int, total: int, id: str) -> None:
        self._total = total
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
            console=self.console, transient=True, refresh_per_second=4,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, completed=step)
        self._bar.start()

    def tick(self, step: int) -> None:
        """A step is done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def line(self, line: Line) -> None:
        text = _words(line)
        if "validation_loss" in line:
            self.say(f"step {line['step']}: {text}")
        elif self._bar:
            self._bar.update(self._task, description=text)
        elif time.monotonic() > self._said + self.EVERY or line["step"] == self._total:
            self.say(f"step {line['step']} of {self._total}: {text}")
            self._said = time.monotonic()

    def samples(self, step: int, samples: Samples) -> None:
        from rich.markup import escape

        for prompt, text in samples:
            self.console.print(f"  [dim]{escape(prompt)}[/dim]{escape(text)}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A separate line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


_SHOWN: Mapping[str, str] = {
    "loss": "loss {:.4f}",
    "validation_loss": "validation loss {:.4f}",
    "validation_accuracy": "accuracy {:.1%}",
    "rewards/accuracies": "accuracy {:.1%}",
    "rewards/margins": "margin {:.3f}",
    "validation_recall_at_1": "recall at 1 {:.1%}",
    "validation_spearman": "Spearman {:.3f}",
    "validation_rewards/accuracies": "accuracy {:.1%}",
    "validation_rewards/margins": "margin {:.3f}",
    "tokens_per_second": "{:.0f} tokens/s",
}


def _words(line: Line) -> str:
    return ", ".join(form.format(line[key]) for key, form in _SHOWN.items() if key in line)

"""A complete run: from settings to a folder with a trained adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from funclora._apps.train.checkpoint import continued, opened
from funclora._apps.train.device import resolved
from funclora._apps.train.finish import check_results, finish, rehearse
from funclora._apps.train.journal import Journal, Mute
from funclora._apps.train.loop import Outcome, train
from funclora._apps.train.settings import Settings, compares_rows
from funclora._apps.train.setup import ready
from funclora.distributed import _ranks as ranks
from funclora.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Result:
    """The result of a run.

    Attributes:
        outcome: of the training.
        folders: the adapter's, and the merged model's if there is one.
        notes: the messages of the run.
    """

    outcome: Outcome
    folders: list[Path]
    notes: list[str]


def run(settings: Settings, *, quiet: bool = False) -> Result:
    """Train an adapter, or continue its training (`settings.resume`), and write it; together with other processes.

    `settings.out` gets `run.toml` (all settings), `metrics.jsonl`, `checkpoints`, `adapter` (a PEFT folder) and, with
    `merge`, `merged`. It is locked for other processes meanwhile.

    Args:
        settings: from `reading.read`.
        quiet: print nothing in the terminal.

    Raises:
        FuncloraError: the settings, the model, the data or the folder are invalid, or a loss is not finite.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint is written.
        OSError: something cannot be written.
    """
    check_processes(settings)
    settings = resolved(continued(settings))
    with opened(settings) as folder:
        check_results(settings)
        with Journal(settings, quiet=quiet) if ranks.is_first() else Mute() as journal:
            prepared = ready(settings, settings.out)
            settings, data, start = prepared.settings, prepared.data, prepared.start
            rehearse(start, settings)
            for note in data.notes:
                journal.note(note)
            outcome = train(start.base, start.adapters, data, settings, journal, folder)
        folders = finish(start, outcome, data, settings) if ranks.is_first() else []
        return Result(outcome, folders, journal.notes)


def check_processes(settings: Settings) -> None:
    """Raise `ConfigError` if a run cannot be divided among the processes that there are."""
    passes, processes = settings.accumulation, ranks.size()
    if settings.shard and processes == 1:
        raise ConfigError(
            "shard: there is one process. Start several: torchrun --nproc-per-node 4 -m funclora train ..."
        )
    if settings.shard and settings.compile:
        raise ConfigError(
            "shard and compile exclude each other: a graph keeps the weights that it gathers for its backward pass, so "
            "each process would hold the whole base. Give one."
        )
    if compares_rows(settings):
        parts = -(-settings.batch // (settings.chunk or settings.batch))
        if parts < processes:
            raise ConfigError(
                f"chunk: {parts} part{'s' * (parts > 1)} of a batch cannot be divided among {processes} processes. "
                f"Give --batch {max(settings.batch, processes)} --chunk {max(1, settings.batch // processes)}, or "
                "smaller parts."
            )
    elif passes < processes:
        raise ConfigError(
            f"accumulation: {passes} forward pass{'es' * (passes > 1)} of a step cannot be divided among {processes} "
            f"processes. Give --accumulation {processes} or a multiple of it, and a smaller --batch, for as many rows "
            "in a step."
        )

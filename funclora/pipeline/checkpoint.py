"""A run on disk. Killed at any moment, its folder holds the last checkpoint as a whole.

run.json                        what the run is: settings, digests of data and base; its presence says that there is one
checkpoints/00000040.safetensors    adapters, optimizer, generators; progress as JSON in its metadata
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from funclora.pipeline.settings import Settings


class Run:
    """The folder of one run, from `opened`."""

    folder: Path


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Run]:
    """The folder of a run, with other processes kept out of it.

    To be entered before anything is loaded or written: most of what can be wrong with the folder shows at once.

    Raises:
        ConfigError: another process is at work in `settings.out`; it holds a run and `resume` is not set; `resume` is
            set and it holds none.
        OSError: the folder cannot be written to.
    """
    raise NotImplementedError
    yield

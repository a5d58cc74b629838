"""Telling what a run does: terminal, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

from funclora.pipeline.settings import Settings


class Journal:
    """A context manager: `with Journal(settings, quiet=as_json) as journal: train(..., journal)`.

    Raises, when made:
        ConfigError: `tensorboard` or `wandb` is asked for and not installed.
    """

    def __init__(self, settings: Settings, *, quiet: bool = False) -> None:
        raise NotImplementedError

    def __enter__(self) -> Journal:
        raise NotImplementedError

    def __exit__(self, *error: object) -> None:
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Say something in a line of its own, above the progress bar."""
        raise NotImplementedError

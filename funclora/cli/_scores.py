"""The computation of `funclora eval`: scores of adapters on files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

import funclora as fl
from funclora._apps.train.adapters import check_head
from funclora._apps.train.base import context_limit, known_classes, known_problem, load_base, load_tokenizer
from funclora._apps.train.embedding import embedding, with_pooling
from funclora._apps.train.examples import Example, read_examples
from funclora._apps.train.folder import load_config
from funclora._apps.train.reference import WORDS, load_reference, preferring
from funclora._apps.train.scores import BATCH, Score, scores
from funclora._apps.train.settings import EMBEDDING, PREFERENCE, SEQUENCE, TOKEN, Settings
from funclora._apps.train.setup import check_vocabulary
from funclora._apps.train.tasks import trained_classes, trained_problem
from funclora._files.atomic import replace_files
from funclora.cli._adapters import for_base
from funclora.cli._output import json_text
from funclora.io.hf.origin import check_origin

EVAL_FILE = "eval.json"

OnProgress = Callable[[str, int], None]
V = TypeVar("V")


@dataclass(frozen=True)
class Scores:
    """Scores of adapters on files.

    Attributes:
        adapters: names.
        files: names.
        classes: names; empty for tasks without.
        base: the base model's score on each file; empty if it has no head for the task.
        scores: `scores[adapter][file]`.
        notes: what was cut off or not read, by file.
    """

    adapters: list[str]
    files: list[str]
    classes: tuple[str, ...]
    base: list[Score]
    scores: list[list[Score]]
    notes: dict[str, list[str]]

    @property
    def unit(self) -> str:
        """What the loss is a mean over."""
        if "rewards/accuracies" in self.metrics:
            return "answer" if "kl" in self.metrics else "pair"
        if {"recall_at_1", "spearman"} & self.scores[0][0].values.keys() and not self.classes:
            return "record"
        return "label" if self.classes else "token"

    @property
    def metrics(self) -> list[str]:
        """The names of the values that all scores have."""
        every = [score.values for row in self.scores for score in row]
        return [name for name in every[0] if all(name in values for values in every)]

    def rows(self) -> dict[str, list[Score]]:
        """The scores on each file by adapter, the base model first."""
        base = {"(base)": self.base} if self.base else {}
        return base | dict(zip(self.adapters, self.scores, strict=True))

    def tree(self) -> dict[str, Any]:
        """All scores, by name."""
        first = self.scores[0]
        tree: dict[str, Any] = {f"{self.unit}s": self._by_file(first, lambda score: score.labels)}
        for metric in self.metrics:
            if self.base:
                base = tree.setdefault("base", {})
                base[metric] = self._by_file(self.base, lambda score, metric=metric: score.values[metric])  # type: ignore[misc]
        for metric in self.metrics:
            tree[metric] = self._by_adapter(lambda score, metric=metric: score.values[metric])  # type: ignore[misc]
        if first[0].by_class:
            tree["classes"] = self.classes
            tree["f1"] = self._by_adapter(lambda score: score.by_class)
            if any(score.by_span for row in self.scores for score in row):
                tree["f1_of_spans"] = self._by_adapter(lambda score: score.by_span)
        if first[0].confusion:
            tree["confusion"] = self._by_adapter(lambda score: score.confusion)
        return tree | {"notes": self.notes}

    def _by_file(self, row: Sequence[Score], of: Callable[[Score], V]) -> dict[str, V]:
        return {file: of(score) for file, score in zip(self.files, row, strict=True)}

    def _by_adapter(self, of: Callable[[Score], V]) -> dict[str, dict[str, V]]:
        return {name: self._by_file(row, of) for name, row in zip(self.adapters, self.scores, strict=True)}

    def write(self, folder: Path) -> None:
        """Write `eval.json`; a heatmap of the losses if there are several files; confusions if there are classes."""
        text = json_text(self.tree()) + "\n"

        def write(file: Path) -> None:
            file.write_text(text, encoding="utf-8")

        replace_files(folder, {EVAL_FILE: write})
        if len(self.files) > 1:
            self._heatmap(folder / "heatmap.png")
        if self.scores[0][0].confusion:
            from funclora.cli._confusion import plot_confusions

            panels = [
                (f"{name} on {file}", score.confusion)
                for name, row in self.rows().items()
                for file, score in zip(self.files, row, strict=True)
            ]
            columns = len(self.files) if len(self.files) > 1 else min(4, len(panels))
            plot_confusions(panels, self.classes, folder / "confusion.png", columns=columns)

    def _heatmap(self, file: Path) -> None:
        from funclora.demo.plot import heatmap

        losses = [[score.values["loss"] for score in row] for row in self.scores]
        best = [min(column) for column in zip(*losses, strict=True)]
        against = [score.values["loss"] for score in self.base] or best
        other = "the base model" if self.base else "the best adapter"
        heatmap(
            {"": [[x - b for x, b in zip(row, against, strict=True)] for row in losses]},
            self.adapters,
            self.files,
            file,
            label=f"loss minus loss of {other}, nats per {self.unit} (lower is better)",
            title=f"Loss of each adapter minus the loss of {other} (bold: best of its column)",
        )


def evaluated(
    folders: Mapping[str, Path],
    files: Sequence[Path],
    settings: Settings,
    *,
    rows: int | None,
    memory: int | None,
    threshold: float,
    progress: OnProgress,
) -> Scores:
    """Scores of saved adapters on files, each with the loss that training has.

    Args:
        folders: PEFT folders by name.
        files: texts, or records: see `records.read`.
        settings: of the model, the task and the fields.
        rows: maximum number of examples from each file.
        memory: bytes for a pass.
        threshold: the probability from which on a text is of a class, where it has several.
        progress: called at each step with a description and the total number of calls.

    Raises:
        FuncloraError: an argument is missing or invalid, or an adapter cannot be loaded or run.
    """
    names = [str(file) if [f.name for f in files].count(file.name) > 1 else file.name for file in files]
    settings = with_problem(folders, settings)
    if settings.task == EMBEDDING:
        settings = with_pooling(settings, folders)
    classes, limit = classes_of(folders, settings), context_limit(settings)
    tokenizer = load_tokenizer(settings)
    examples: list[list[Example]] = []
    notes = {}
    for file, name in zip(files, names, strict=True):  # all are read before anything large is loaded
        found, notes[name] = read_examples(file, settings, tokenizer, limit, classes)
        if rows is not None and len(found) > rows:
            found = [found[i] for i in torch.linspace(0, len(found) - 1, rows).round().long().tolist()]
        examples.append(found)
    base = load_base(settings, tokenizer, classes)
    if settings.task == EMBEDDING:
        base = embedding(base, settings)
    check_vocabulary(base, *examples)
    if settings.task == PREFERENCE:
        base = preferring(base, {} if settings.reference in WORDS else load_reference(base, settings), settings)
    ticks = len(folders) + sum(math.ceil(len(some) / BATCH) for some in examples)
    members: list[dict[str, fl.Rule]] = [] if base.new else [{}]
    for name, folder in folders.items():
        progress(f"loading {name}", ticks)
        with for_base(base.name, [folder]):
            members.append(fl.load_peft(folder, base.model)[0])
        check_head(base, members[-1], name)
    check_origin(folders.values(), settings.model)
    by_file = []
    for file, some in zip(files, examples, strict=True):

        def step(file: Path = file) -> None:
            progress(f"evaluating on {file.name}", ticks)

        by_file.append(scores(base, members, some, memory=memory, threshold=threshold, divided=True, progress=step))
    by_member = [[column[i] for column in by_file] for i in range(len(members))]
    alone = [] if base.new else by_member.pop(0)
    return Scores(list(folders), names, base.classes, alone, by_member, notes)


def with_problem(folders: Mapping[str, Path], settings: Settings) -> Settings:
    """The settings with what labels are for the adapters, or else for the head of their base."""
    known = replace(settings, problem=trained_problem(folders, settings.task, settings.problem))
    return replace(known, problem=known_problem(known))


def classes_of(folders: Mapping[str, Path], settings: Settings) -> tuple[str, ...]:
    """The names of the classes of adapters, or else of their base; numbers if neither has names."""
    found = trained_classes(folders, settings.task)
    if found or settings.model is None or settings.task not in (SEQUENCE, TOKEN):
        return found
    return known_classes(settings) or tuple(map(str, range(load_config(settings.model).num_labels)))

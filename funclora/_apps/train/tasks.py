"""What saved adapters were trained for: the task, and the names of its classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from funclora._apps.train.folder import PROBLEM_TYPES
from funclora._apps.train.qlora import TASK_TYPES
from funclora._apps.train.settings import AUTO, CAUSAL, SEQ2SEQ, SEQUENCE, TASKS, TOKEN
from funclora._apps.train.tokenizer import load_config
from funclora._files.atomic import read_json
from funclora.errors import ConfigError
from funclora.io.hf.heads import CLASSES_FILE, classes_of, problem_of
from funclora.io.peft.files import CONFIG_FILE


def trained_task(folders: Mapping[str, Path], model: Path | None, task: str | None = None) -> str:
    """The task that all adapters were trained for.

    Args:
        folders: PEFT folders by name.
        model: the base's folder; None for the demo's base.
        task: the task, if the user gives it.

    Raises:
        ConfigError: they were trained for different tasks, or it is not known.
        FormatError: a configuration cannot be read.
    """
    if task is not None:
        if task not in TASKS:
            raise ConfigError(f"--task: expected one of {', '.join(TASKS)}, got {task!r}.")
        return task
    known = {name: task for task, name in reversed(TASK_TYPES.items())}  # of several tasks with one name the first
    found: dict[str, str] = {}
    for name, folder in folders.items():
        kind = read_json(folder / CONFIG_FILE).get("task_type")
        if kind is None and (folder / CLASSES_FILE).exists():
            raise ConfigError(f"{folder}: {CONFIG_FILE} does not say the task of these classes. Give it with --task.")
        if kind is not None and kind not in known:
            raise ConfigError(
                f"{folder}: was trained for {kind!r}, which has no loss here. Give an adapter for one of "
                f"{', '.join(known)}."
            )
        if kind is not None:
            found[name] = known[kind]
    if len({*found.values()}) > 1:
        (one, first), (other, second) = list({task: name for name, task in found.items()}.items())[:2]
        raise ConfigError(
            f"{first} was trained for {one}, {second} for {other}, which have no loss in common. Give adapters of one "
            "task."
        )
    if found:
        return next(iter(found.values()))
    return SEQ2SEQ if model is not None and load_config(model).is_encoder_decoder else CAUSAL


def trained_classes(folders: Mapping[str, Path], task: str) -> tuple[str, ...]:
    """The names of the classes of all adapters: of `classes.json`, or else the numbers of the saved head's outputs.

    Args:
        folders: PEFT folders by name.
        task: as from `trained_task`.

    Returns:
        The names; empty for tasks without classes, and where no adapter brings names or a head.

    Raises:
        ConfigError: the adapters have different classes.
        FormatError: a file cannot be read.
    """
    if task not in (SEQUENCE, TOKEN):
        return ()
    found = {name: classes_of(folder) for name, folder in folders.items()}
    given = {classes: name for name, classes in found.items() if classes}
    if len(given) > 1:
        (one, first), (other, second) = list(given.items())[:2]
        raise ConfigError(
            f"{first} has the classes {_short(one)}, {second} has {_short(other)}. Give adapters with the same classes "
            "in the same order."
        )
    return next(iter(given), ())


def trained_problem(folders: Mapping[str, Path], task: str, problem: str) -> str:
    """What labels are for the heads of all adapters.

    Args:
        folders: PEFT folders by name.
        task: as from `trained_task`.
        problem: what the user says, one of `settings.PROBLEMS`; `settings.AUTO` for nothing.

    Returns:
        One of `settings.PROBLEMS`, or `settings.AUTO` if nobody says it.

    Raises:
        ConfigError: the adapters were trained for different ones, or for another than the user says.
        FormatError: a file cannot be read.
    """
    if task != SEQUENCE:
        return problem
    known = {kind: problem for problem, kind in PROBLEM_TYPES.items()}
    found = {known[kind]: name for name, folder in folders.items() if (kind := problem_of(folder)) is not None}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ConfigError(f"{first} was trained for {one}, {second} for {other}. Give adapters of one problem.")
    own = next(iter(found), AUTO)
    if AUTO not in (own, problem) and own != problem:
        raise ConfigError(f"problem: {found[own]} was trained for {own}, and the problem is {problem}. Leave it out.")
    return problem if own == AUTO else own


def _short(classes: tuple[str, ...]) -> str:
    text = json.dumps(classes, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."

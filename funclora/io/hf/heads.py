"""The heads of adapters that classify: which class of model they were trained on, and the names of their classes."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from funclora._config.peft_fields import HEADS
from funclora.errors import ConfigError, FormatError, UnsupportedError
from funclora.io.hf.library import check_config, transformers
from funclora.io.hf.remembered import remembered
from funclora.io.peft.files import WEIGHTS_FILE, AdapterFiles
from funclora.io.peft.tensors import StoredTensors

CLASSES_FILE = "classes.json"  # beside an adapter: the names of its classes, in the order of the head's outputs
PROBLEM_TYPES = (_SINGLE := "single_label_classification", "multi_label_classification", "regression")
# PEFT's task types with a head -> transformers' class that chooses a model for the task.
MODELS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def classes_of(folder: Path) -> tuple[str, ...]:
    """The names of the classes of an adapter: of `classes.json`, or else the numbers of its head's outputs.

    Returns:
        The names; empty if the folder has neither.

    Raises:
        FormatError: the file cannot be read.
    """
    found = _read(folder)
    return tuple(map(str, range(_outputs(folder)))) if found is None else found[0]


def problem_of(folder: Path) -> str | None:
    """What the head of an adapter for texts was trained for, as transformers' `problem_type`; None if nothing says it.

    A head with a single output was trained for numbers.

    Raises:
        FormatError: `classes.json` cannot be read.
    """
    found = _read(folder)
    if found is not None:
        return found[1]
    return "regression" if _outputs(folder) == 1 else None


def classes_text(classes: Sequence[str], problem: str) -> str:
    r"""The contents of `classes.json`.

    Args:
        classes: their names, in the order of the head's outputs.
        problem: transformers' `problem_type`.

    Examples:
        >>> classes_text(["no", "yes"], "single_label_classification")
        '["no", "yes"]\n'
    """
    value: Any = [*classes] if problem == _SINGLE else {"problem_type": problem, "classes": [*classes]}
    return json.dumps(value, ensure_ascii=False) + "\n"


def _read(folder: Path) -> tuple[tuple[str, ...], str] | None:
    """The names of `classes.json` and the type of its problem; None if there is no such file."""
    file = folder / CLASSES_FILE
    if not file.exists():
        return None
    try:
        names = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: this is not JSON: {error}") from error
    problem: Any = _SINGLE
    if isinstance(names, dict):
        problem, names = names.get("problem_type"), names.get("classes")
        if problem not in PROBLEM_TYPES:
            raise FormatError(
                f"{file}: problem_type: expected one of {', '.join(PROBLEM_TYPES)}, got {reprlib.repr(problem)}."
            )
    if not isinstance(names, list) or len({*map(str, names)}) < len(names) or not names:
        raise FormatError(f"{file}: expected a list of the names of the classes, without repetition.")
    return tuple(map(str, names)), problem


def _outputs(folder: Path) -> int:
    """The number of outputs of the head among an adapter's tensors; 0 if there is none."""
    if not (folder / WEIGHTS_FILE).exists():
        return 0
    ends = {*HEADS["SEQ_CLS"], *HEADS["TOKEN_CLS"]}
    shapes = StoredTensors(AdapterFiles(folder)).shapes()
    heads = {
        key: shape
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) == 2 and ends & {*key.split(".")} and "lora_" not in key
    }
    # A head of several layers ends with the one that gives the classes.
    return heads[max(heads)][0] if heads else 0


def with_head(folder: Path, config: Mapping[str, Any], adapters: Sequence[AdapterFiles]) -> dict[str, Any]:
    """The configuration of a base model for the class that adapters were trained on; the same one if they have no head.

    Args:
        folder: the base's folder, for messages.
        config: the contents of its `config.json`.
        adapters: the adapters.

    Raises:
        ConfigError: they were trained for different tasks, or with different classes.
        FormatError: a file cannot be read.
        UnsupportedError: transformers has no class of this model for the task.
    """
    tasks = {files.folder: kind for files in adapters if (kind := files.config.get("task_type")) in MODELS}
    if not tasks:
        return dict(config)
    if len({*tasks.values()}) > 1:
        (one, first), (other, second) = list({task: folder for folder, task in tasks.items()}.items())[:2]
        raise ConfigError(
            f"{first} was trained for {one}, {second} for {other}: no model has both heads. Merge them one by one."
        )
    task = next(iter(tasks.values()))
    cls = remembered(["class for a task", dict(config), task], lambda: _class(folder, config, task))
    changed = {**config, "architectures": [cls]}
    names = {classes_of(adapter) for adapter in tasks} - {()} if task != "QUESTION_ANS" else set()
    problems = {problem_of(adapter) for adapter in tasks} if task == "SEQ_CLS" else {None}
    if len(problems) > 1:
        raise ConfigError(
            f"{', '.join(map(str, tasks))} were trained for {', '.join(map(str, problems))}. Merge them one by one."
        )
    (problem,) = problems
    if problem not in (None, _SINGLE) or config.get("problem_type") is not None:
        changed["problem_type"] = problem
    if len(names) > 1:
        raise ConfigError(f"{', '.join(map(str, tasks))} have different classes. Merge them one by one.")
    for classes in names:
        numbers = classes == tuple(map(str, range(len(classes))))
        had = config.get("id2label")
        if not numbers or not isinstance(had, dict) or len(had) != len(classes):
            labels = [f"LABEL_{name}" if numbers else name for name in classes]
            changed["id2label"] = {str(i): label for i, label in enumerate(labels)}
            changed["label2id"] = {label: i for i, label in enumerate(labels)}
            changed.pop("num_labels", None)
    return changed


def _class(folder: Path, config: Mapping[str, Any], task: str) -> str:
    """The name of the class for a task."""
    check_config(folder, config)
    library = transformers()
    mapping, kind = getattr(library, MODELS[task])._model_mapping, config.get("model_type")
    known = library.CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in library.CONFIG_MAPPING else None
    if known not in mapping:
        raise UnsupportedError(
            f"{folder}: the adapter has task_type={task!r}, but transformers has no {MODELS[task]} for a model of type "
            f"{kind!r}. Give the folder of the model that it was trained on."
        )
    found = mapping[known]
    return (found[0] if isinstance(found, tuple) else found).__name__  # type: ignore[no-any-return]

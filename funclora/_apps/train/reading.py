"""Settings in files and on the command line: reading, checking, writing."""

from __future__ import annotations

import functools
import json
import math
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from funclora._apps.train.aliases import ALIASES, VALUES, known_as
from funclora._apps.train.config_file import table
from funclora._apps.train.settings import (
    CAUSAL,
    DECODERS,
    EMBEDDING,
    PREFERENCE,
    SEQ2SEQ,
    SEQUENCE,
    TOKEN,
    Settings,
    compares_rows,
)
from funclora._config.peft_fields import INITIALISERS, is_initialiser
from funclora._files.atomic import replace_files
from funclora.errors import ConfigError, near

# If both are given, one has no effect.
EXCLUSIVE = (("steps", "epochs"), ("validation", "validation_split"))
# Keys that only these tasks use.
ONLY = {
    **dict.fromkeys(("train_on", "turns"), (CAUSAL,)),
    **dict.fromkeys(("chat_template", "packing"), DECODERS),
    "text_field": (CAUSAL, SEQUENCE),
    "label_field": (SEQUENCE, TOKEN, PREFERENCE),
    "problem": (SEQUENCE,),
    **dict.fromkeys((f.name for f in fields(Settings) if f.metadata["group"] == "Preferences"), (PREFERENCE,)),
    **dict.fromkeys((f.name for f in fields(Settings) if f.metadata["group"] == "Embeddings"), (EMBEDDING,)),
}
# Keys that have an effect only with some values of another key.
NEEDS = {
    **dict.fromkeys(("beta1", "beta2", "epsilon"), ("optimizer", ("adamw", "adamw-8bit"))),
    "momentum": ("optimizer", ("sgd",)),
    "cycles": ("schedule", ("cosine-restarts",)),
    "power": ("schedule", ("polynomial",)),
    "decay": ("schedule", ("wsd",)),
    "label_smoothing": ("loss", ("dpo",)),
    "gamma": ("loss", ("simpo",)),
    **dict.fromkeys(("desirable", "undesirable"), ("loss", ("kto",))),
    "reference": ("loss", ("dpo", "ipo", "kto")),
    "scale": ("objective", ("auto", "in-batch", "cosent")),
    "margin": ("objective", ("triplet",)),
    "lr_end": ("schedule", ("cosine", "cosine-restarts", "linear", "polynomial", "wsd")),
}
# What an adapter in a folder brings.
ADAPTER_KEYS = {f.name for f in fields(Settings) if f.metadata["group"] == "Adapter"} - {"adapter"}


def read(file: Path | None, overrides: Mapping[str, object]) -> Settings:
    """The settings of a run.

    Paths are relative to the working directory, also in a file.

    Args:
        file: TOML or YAML, by its suffix; None for the defaults.
        overrides: key -> value; they take precedence over the file. Values may be texts, as on a command line.

    Returns:
        All keys, checked.

    Raises:
        FormatError: the file cannot be read, or is neither.
        ConfigError: a key is unknown, or a value has the wrong type, is out of range, or has no effect.
        UnsupportedError: a YAML file, and PyYAML is not installed.

    Examples:
        >>> read(None, {"lr": "1e-3"}).lr
        0.001
        >>> read(None, {"rnak": 8})
        Traceback (most recent call last):
        funclora.errors.ConfigError: --rnak: there is no such option. Near names: --rank.
    """
    given: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, value in (table(file) if file is not None else {}).items():
        take(given, sources, name, value, f"{file}: ")
    return combined(given, f"{file}: ", overrides)


def take(given: dict[str, Any], sources: dict[str, str], name: str, value: object, where: str) -> None:
    """Add a key of a file, which may be a key of another trainer, to what is given.

    Args:
        given: key -> value, which grows.
        sources: key -> the key in the file that set it, which grows.
        name: the key in the file.
        value: its value.
        where: the beginning of messages.

    Raises:
        ConfigError: the key is unknown, its value has no counterpart here or is invalid, or another key of the file has
            set the same one.
    """
    keys = {f.name: f for f in fields(Settings)}
    for key, raw in _here(name, value, where).items():
        made = _value(f"{where}{name}", keys[key], raw, from_text=False)
        if key in sources and given[key] != made:
            raise ConfigError(f"{where}{sources[key]} and {name} both mean {key}. Give one of them.")
        given[key] = made
        sources.setdefault(key, name)


def combined(given: Mapping[str, Any], file: str, overrides: Mapping[str, object]) -> Settings:
    """The settings that keys of a file and options of the command line give together.

    Args:
        given: from `take`.
        file: the beginning of messages about these.
        overrides: as for `read`.

    Raises:
        ConfigError: as for `read`.
    """
    keys = {f.name: f for f in fields(Settings)}
    given = dict(given)
    where = dict.fromkeys(given, file)
    for key, value in overrides.items():
        if key not in keys:
            known = known_as(key)
            hint = f" Here it is {option(known)}." if known else near(option(key), map(option, keys), 1)
            raise ConfigError(f"{option(key)}: there is no such option.{hint}")
        given[key] = from_option(key, value)
        where[key] = ""

    def called(key: str) -> str:
        return f"{where[key]}{key}" if where.get(key) else option(key)

    for pair in EXCLUSIVE:
        both = [key for key in pair if key in given]
        chosen = [key for key in both if not where[key]]
        if len(both) == 2 and len(chosen) != 1:
            raise ConfigError(f"{called(both[0])} and {called(both[1])} exclude each other. Give one of them.")
        for key in both:
            if chosen and key not in chosen:  # the command line chose the other key
                del given[key]
    if "double_quant" in given and given.get("quantize") not in ("nf4", "fp4") and given.pop("double_quant"):
        raise ConfigError(
            f"{called('double_quant')}: only nf4 and fp4 have scales to quantise. Set quantize to one of them."
        )
    if given.get("adapter") is not None:
        for key in given:
            if key in ADAPTER_KEYS:
                raise ConfigError(
                    f"{called(key)}: with {called('adapter')}, it is that of the folder. Leave it out, or start a new "
                    "adapter."
                )
    settings = Settings(**given)
    _check_together(settings, called)
    return settings


def from_option(key: str, value: object) -> Any:
    """The value of a key that the command line gives, which may be a text, or texts with commas.

    Raises:
        ConfigError: it has the wrong type, or is out of range.

    Examples:
        >>> from_option("roles", "human=user,gpt=assistant")
        ('human=user', 'gpt=assistant')
    """
    (key_of_settings,) = (f for f in fields(Settings) if f.name == key)
    return _value(option(key), key_of_settings, value, from_text=True)


def _here(name: str, value: object, where: str) -> dict[str, Any]:
    """What a key of a file means: itself, or what a key of another trainer is here."""
    keys = [f.name for f in fields(Settings)]
    if name in keys:
        return {name: value}
    if name not in ALIASES:
        raise ConfigError(f"{where}{name!r} is not a key of a run.{near(name, keys, 1)}")
    if value is None:
        return {}
    try:
        return ALIASES[name].convert(value)
    except ConfigError as error:
        raise ConfigError(f"{where}{name}: {error}.") from error


def write(settings: Settings, file: Path) -> None:
    """Write all keys as TOML, from which `read` makes the same settings. The file is replaced atomically.

    Raises:
        OSError: it cannot be written.
    """
    text = as_toml(settings)

    def fill(draft: Path) -> None:
        draft.write_text(text, encoding="utf-8")

    replace_files(file.parent, {file.name: fill})


def as_toml(settings: Settings, keys: Collection[str] | None = None) -> str:
    """All keys that have a value, or only some, by group.

    Examples:
        >>> print(as_toml(Settings(rank=4)).splitlines()[0])
        # Model
    """
    lines: list[str] = []
    group = None
    for f in fields(settings):
        if keys is not None and f.name not in keys:
            continue
        value = getattr(settings, f.name)
        if value is None or _implied(settings, f.name):
            continue
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"# {group}"] if lines else [f"# {group}"]
        lines.append(f"{f.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def option(key: str) -> str:
    """A key as an option of the command.

    Examples:
        >>> option("lora_plus")
        '--lora-plus'
    """
    return "--" + key.replace("_", "-")


@functools.cache
def kind_of(key: str) -> tuple[type, bool]:
    """A key's type (`str`, `bool`, `int`, `float`, `Path` or `tuple`, of texts), and whether it may be missing."""
    hint = _hints()[key]
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None)), True
    return typing.get_origin(hint) or hint, False


@functools.cache
def element_of(key: str) -> type:
    """The type of the values in a list: `str`, `float` or `Path`."""
    element: type = typing.get_args(_hints()[key])[0]
    return element


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Settings)


def _value(where: str, f: Field[Any], value: object, *, from_text: bool) -> Any:
    """A value of the key's type, within its limits."""
    kind, optional = kind_of(f.name)
    if optional and (value is None or (value == "auto" and "auto" in f.metadata)):
        return None
    if f.name == "init" and isinstance(value, bool):  # true and false are two of its names
        value = str(value).lower()
    if isinstance(value, str):
        value = VALUES.get(f.name, {}).get(value, value)
    if kind is tuple:
        made: Any = _listed(where, element_of(f.name), value, from_text, whole="whole" in f.metadata)
    else:
        made = _typed(where, kind, value, from_text)
    limits = f.metadata
    if "choices" in limits and made not in limits["choices"]:
        raise ConfigError(
            f"{where}: expected one of {', '.join(limits['choices'])}, got {reprlib.repr(made)}."
            f"{near(made, limits['choices'], 1)}"
        )
    bounds: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
        ("least", "at least", lambda limit: made >= limit),
        ("most", "at most", lambda limit: made <= limit),
        ("above", "more than", lambda limit: made > limit),
        ("below", "less than", lambda limit: made < limit),
    )
    for name, words, fits in bounds:
        if name in limits and not fits(limits[name]):
            raise ConfigError(f"{where}: expected {words} {limits[name]}, got {reprlib.repr(made)}.")
    return made


_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
}
_LISTS: dict[type, str] = {str: "texts", float: "numbers", Path: "paths"}


def _listed(where: str, element: type, value: object, from_text: bool, *, whole: bool) -> tuple[Any, ...]:
    """The values of a list; a text with commas is one too, as on a command line."""
    if isinstance(value, Path):
        value = [value]
    elif isinstance(value, str) and not whole:
        is_path = element is Path and Path(value).exists()
        value = [value] if is_path else [part.strip() for part in value.split(",")]
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: expected a list of {_LISTS[element]}, got {reprlib.repr(value)}.")
    return tuple(_typed(where, element, part, from_text) for part in value)


def _typed(where: str, kind: type, value: object, from_text: bool) -> Any:
    wrong = ConfigError(f"{where}: expected {_WORDS[kind]}, got {reprlib.repr(value)}.")
    if kind in (int, float):
        number = _number(kind, value) if from_text and isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, (int, float) if kind is float else int):
            raise wrong
        try:
            if kind is float and not math.isfinite(float(number)):
                raise wrong
        except OverflowError:
            raise wrong from None
        return kind(number)
    if kind is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if kind is Path:
        return Path(_text(where, str(value) if isinstance(value, Path) else value))
    return _text(where, value)


def _number(kind: type, text: str) -> int | float | None:
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        return None


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: expected a text, got {reprlib.repr(value)}.")
    if not value:
        raise ConfigError(f"{where}: expected a text, got an empty one. Leave the key out for its default.")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise ConfigError(f"{where}: {value!r} contains an invalid character.")
    return value


def _check_together(settings: Settings, called: Any) -> None:
    """Raise `ConfigError` for values that contradict each other, or that would have no effect."""
    if not is_initialiser(settings.init) and settings.init not in ("true", "false"):
        names = ["true", "false", *(name for name in INITIALISERS if isinstance(name, str)), "pissa_niter_4"]
        raise ConfigError(
            f"{called('init')}: expected one of {', '.join(names)}, got {settings.init!r}."
            f"{near(settings.init, names, 1)}"
        )
    if settings.init == "loftq" and settings.quantize not in ("nf4", "fp4"):
        raise ConfigError(f"{called('init')}: loftq compensates for 4-bit quantisation. Set quantize to nf4 or fp4.")
    if settings.init == "eva" and settings.task in (SEQ2SEQ, EMBEDDING):
        raise ConfigError(
            f"{called('init')}: eva needs one text per example, but {settings.task} has several. Use another."
        )
    for key, tasks in ONLY.items():
        if settings.task not in tasks and getattr(settings, key) != getattr(Settings, key):
            raise ConfigError(
                f"{called(key)}: only {' and '.join(filter(None, (', '.join(tasks[:-1]), tasks[-1])))} "
                f"use{'s' * (len(tasks) == 1)} it, and the task is "
                f"{settings.task}. Leave it out."
            )
    if settings.turns != Settings.turns and settings.train_on == "all":
        raise ConfigError(f"{called('turns')}: with train_on all, every turn has loss. Leave one of them out.")
    if settings.chat_template is not None and settings.model is None:
        raise ConfigError(f"{called('chat_template')}: the demo's base reads no chats. Give a model, or leave it out.")
    for key, (other, values) in NEEDS.items():
        if getattr(settings, other) not in values and getattr(settings, key) != getattr(Settings, key):
            raise ConfigError(
                f"{called(key)}: has an effect only if {other} is {' or '.join(values)}, and it is "
                f"{getattr(settings, other)}. Leave it out, or set {called(other)}."
            )
    if settings.task == PREFERENCE and settings.loss != "kto" and settings.label_field != Settings.label_field:
        raise ConfigError(f"{called('label_field')}: pairs of answers have no label. Leave it out, or set loss to kto.")
    has = {SEQUENCE: ("accuracy",), TOKEN: ("accuracy",), PREFERENCE: ("accuracy", "margin")}.get(settings.task, ())
    if settings.metric not in ("loss", *has):
        raise ConfigError(
            f"{called('metric')}: an evaluation of {settings.task} has no {settings.metric}. Set it to "
            f"{' or '.join(('loss', *has))}."
        )
    if settings.attention != "auto" and settings.model is None:
        raise ConfigError(f"{called('attention')}: the demo's base has only one implementation. Leave it out.")
    if settings.sample_tokens != Settings.sample_tokens and not settings.sample:
        raise ConfigError(f"{called('sample_tokens')}: there is no prompt to continue. Give {called('sample')} too.")
    if settings.sample and settings.task in (TOKEN, EMBEDDING):
        raise ConfigError(f"{called('sample')}: {settings.task} cannot continue prompts. Leave it out.")
    if settings.chunk and settings.compile:
        raise ConfigError(
            f"{called('chunk')}: torch.compile decides what to compute again. Leave one of chunk and compile out."
        )
    if compares_rows(settings) and settings.accumulation > 1:
        raise ConfigError(
            f"{called('accumulation')}: the texts of a batch are compared with each other, so it cannot be divided. "
            f"Set {called('batch')} to its whole size, and {called('chunk')} to what fits into memory."
        )
    if settings.patience and not settings.eval_every:
        raise ConfigError(f"{called('patience')}: needs evaluations. Set {called('eval_every')} too.")
    if settings.weights and len(settings.weights) != len(settings.data):
        raise ConfigError(
            f"{called('weights')}: expected a number for each of {len(settings.data)} --data, got "
            f"{len(settings.weights)}."
        )
    if any(weight <= 0 for weight in settings.weights):
        raise ConfigError(f"{called('weights')}: expected numbers above 0, got {list(settings.weights)}.")
    if settings.model is not None and not settings.data:
        raise ConfigError(f"{called('data')}: there is no data to train {settings.model} on. Give a file or a folder.")


def _implied(settings: Settings, key: str) -> bool:
    """Whether a key has no effect, because another one is used instead."""
    return (
        (key == "epochs" and settings.steps is not None)
        or (key == "validation_split" and settings.validation is not None)
        or (key == "double_quant" and settings.quantize not in ("nf4", "fp4"))
        or (key in ADAPTER_KEYS and settings.adapter is not None)
        or (key in ONLY and settings.task not in ONLY[key])
        or (key in NEEDS and getattr(settings, NEEDS[key][0]) not in NEEDS[key][1])
    )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")

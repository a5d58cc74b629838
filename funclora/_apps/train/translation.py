"""The settings of axolotl, LLaMA-Factory or transformers' Trainer, translated: nothing is dropped silently."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from funclora._apps.train.aliases import ALIASES, AXOLOTL, FACTORY, TRL
from funclora._apps.train.config_file import table
from funclora._apps.train.reading import ADAPTER_KEYS, as_toml, take
from funclora._apps.train.settings import Settings
from funclora._files.atomic import read_json
from funclora.errors import ConfigError, FuncloraError

# Keys that only this project has.
_SIGNS = {
    AXOLOTL: ("base_model", "datasets", "sequence_len", "micro_batch_size"),
    FACTORY: ("finetuning_type", "stage", "cutoff_len", "dataset_dir", "lora_rank"),
}
# What a key that is missing stands for there, where it is something else here.
_DEFAULTS: dict[str, dict[str, Any]] = {
    TRL: {"learning_rate": 5e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "warmup_steps": 0, "r": 8,
          "lora_alpha": 8},
    AXOLOTL: {"micro_batch_size": 1, "val_set_size": 0.0, "warmup_ratio": 0.03},
    FACTORY: {"learning_rate": 5e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "warmup_steps": 0,
              "cutoff_len": 2048, "lora_rank": 8, "val_size": 0.0},
}  # fmt: skip
# Keys without effect on the adapter, or with the only value that there is here.
_NEEDLESS: dict[str, str] = {
    **dict.fromkeys(
        ("overwrite_output_dir", "overwrite_cache", "dataset_prepared_path", "logging_dir", "plot_loss", "strict",
         "debug", "do_train", "do_eval", "hub_model_id", "push_to_hub", "remove_unused_columns", "model_type",
         "tokenizer_type", "run_name", "disable_tqdm", "include_num_input_tokens_seen", "save_safetensors",
         "save_only_model"),
        "has no effect on the adapter",
    ),
    **dict.fromkeys(
        ("preprocessing_num_workers", "dataset_processes", "dataset_num_proc", "dataloader_num_workers",
         "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_timeout", "tf32", "gradient_checkpointing_kwargs",
         "group_by_length", "pad_to_sequence_len", "eval_sample_packing", "per_device_eval_batch_size",
         "eval_batch_size", "saves_per_epoch", "low_cpu_mem_usage"),
        "changes speed or memory only",
    ),
}  # fmt: skip
# Keys that say what is done here anyway, with these values.
_USUAL: dict[str, tuple[Any, ...]] = {
    "stage": ("sft",), "finetuning_type": ("lora",), "peft_type": ("LORA",), "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
}  # fmt: skip
_RECOGNISED = ("alpaca", "chat_template", "completion", "sharegpt")  # axolotl's names of forms of records


@dataclass(frozen=True)
class Translation:
    """A translated file.

    Attributes:
        project: where the file is from.
        given: key of a run -> value.
        sources: key of a run -> the key in the file, or "default of" the project.
        needless: key in the file -> why it needs no translation.
        left: key in the file -> why it was not translated.
    """

    project: str
    given: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    needless: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def as_toml(self) -> str:
        """A file for `funclora train`, with a comment for each key that is not in it."""
        defaults = [key for key, source in self.sources.items() if source.startswith("default")]
        lines = [f"# Translated from settings of {self.project}.", as_toml(Settings(**self.given), self.given).strip()]
        notes = {
            "Not translated": self.left,
            "Not needed": self.needless,
            f"Defaults of {self.project}": dict.fromkeys(defaults, "is not in the file"),
        }
        for title, reasons in notes.items():
            if reasons:
                lines += ["", f"# {title}:", *(f"# - {key}: {why}" for key, why in reasons.items())]
        return "\n".join(lines) + "\n"


def translate(file: Path) -> Translation:
    """The settings in a file of another trainer.

    Args:
        file: YAML or TOML.

    Returns:
        The translation; each key of the file is translated, needless, or left.

    Raises:
        FormatError: the file cannot be read.
        UnsupportedError: a YAML file, and PyYAML is not installed.
    """
    keys = table(file)
    marks = {project: sum(sign in keys for sign in signs) for project, signs in _SIGNS.items()}
    project = max(marks, key=lambda name: marks[name]) if any(marks.values()) else TRL
    made = Translation(project)
    for name, value in keys.items():
        try:
            _translate(made, name, value, keys)
        except FuncloraError as error:  # noqa: PERF203 -- each is a key
            made.left[name] = _reason(name, error)
    _decide(made)
    return made


def _translate(made: Translation, name: str, value: Any, keys: Mapping[str, Any]) -> None:
    special = _SPECIAL.get((made.project, name))
    if special is not None:
        special(made, value, keys)
    elif name in _NEEDLESS:
        made.needless[name] = _NEEDLESS[name]
    elif isinstance(value, str) and value in _USUAL.get(name, ()):
        made.needless[name] = "is what is done here"
    elif value is None or (name not in ALIASES and name not in _KEYS and value in (False, "", [], {})):
        made.needless[name] = "is off"
    else:
        before = len(made.given)
        take(made.given, made.sources, name, value, "")
        if len(made.given) == before and name not in made.sources.values():
            made.needless[name] = "is what is done here"


def _decide(made: Translation) -> None:
    """Between keys of which one has no effect there, and the project's defaults for what is missing."""
    if "steps" in made.given and made.given.pop("epochs", None) is not None:
        made.needless[made.sources.pop("epochs")] = f"{made.sources['steps']} decides"
    brought = ADAPTER_KEYS if "adapter" in made.given else frozenset()
    for key in brought & {*made.given}:
        del made.given[key]
        made.needless[made.sources.pop(key)] = "the folder of the adapter decides"
    given: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, value in _DEFAULTS[made.project].items():
        take(given, sources, name, value, "")
    if made.project == FACTORY:
        given["alpha"] = 2.0 * made.given.get("rank", given["rank"])
    if "steps" in made.given:
        given.pop("epochs", None)
    if "validation" in made.given:
        given.pop("validation_split", None)
    for key, value in given.items():
        if key not in made.given and key not in brought and value != getattr(Settings, key):
            made.given[key], made.sources[key] = value, f"default of {made.project}"


def _set(made: Translation, key: str, value: Any, name: str) -> None:
    """Set a key of a run because of a key of the file."""
    first = key not in made.sources
    take(made.given, made.sources, key, value, "")
    if first:
        made.sources[key] = name


def _adapter(made: Translation, value: Any, keys: Mapping[str, Any]) -> None:
    if value not in ("lora", "qlora"):
        raise ConfigError(f"{reprlib.repr(value)} is no method here. Give method = lora or dora.")
    made.needless["adapter"] = "is what is done here"
    if value == "qlora":
        _set(made, "quantize", "nf4", "adapter")


def _datasets(made: Translation, value: Any, keys: Mapping[str, Any]) -> None:
    entries = value if isinstance(value, list) else [value]
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ConfigError(f"expected a list of maps with a path, got {reprlib.repr(value)}")
        for key, given in entry.items():
            known = key == "path" or (key == "type" and given in _RECOGNISED) or (key == "split" and given == "train")
            if key == "ds_type" or known:
                continue
            made.left[f"datasets[{i}].{key}"] = f"{reprlib.repr(given)}: records are recognised by their fields here"
    _set(made, "data", [entry["path"] for entry in entries], "datasets")


def _named_data(made: Translation, value: Any, keys: Mapping[str, Any]) -> None:
    """LLaMA-Factory's datasets, which are names in a file."""
    folder = Path(str(keys.get("dataset_dir") or "data"))
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    info = folder / "dataset_info.json"
    if not isinstance(names, list) or not info.is_file():
        raise ConfigError(f"{reprlib.repr(value)}: names of dataset_info.json are not known here. Give a file as data.")
    known, files = read_json(info), []
    for name in names:
        entry = known.get(str(name))
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise ConfigError(f"{info} names no file for {reprlib.repr(name)}. Give a file as data.")
        for key, given in entry.items():
            if key not in ("file_name", "formatting"):
                made.left[f"dataset.{key}"] = f"{reprlib.repr(given)}: records are recognised by their fields here"
        files.append(str(folder / entry["file_name"]))
    _set(made, "data", files, "dataset")


def _folder_of_data(made: Translation, value: Any, keys: Mapping[str, Any]) -> None:
    made.needless["dataset_dir"] = "is part of data"


def _template(made: Translation, value: Any, keys: Mapping[str, Any]) -> None:
    if value == "tokenizer_default":
        made.needless["chat_template"] = "is what is done here"
        return
    raise ConfigError(f"{reprlib.repr(value)}: the tokenizer's own is used. Give another as a file, chat_template.")


_Special = Callable[[Translation, Any, Mapping[str, Any]], None]
_SPECIAL: dict[tuple[str, str], _Special] = {
    (AXOLOTL, "adapter"): _adapter,
    (AXOLOTL, "datasets"): _datasets,
    (FACTORY, "dataset"): _named_data,
    (FACTORY, "dataset_dir"): _folder_of_data,
    (FACTORY, "template"): _template,
    (AXOLOTL, "chat_template"): _template,
}
_KEYS = {f.name for f in fields(Settings)}


def _reason(name: str, error: FuncloraError) -> str:
    text = str(error).removeprefix(f"{name}: ").removeprefix(f"{name!r} ")
    return " ".join(text.split()).rstrip(".")

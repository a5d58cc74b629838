"""`adapter_config.json` and `LoraConfig`, in both directions."""

from __future__ import annotations

import json
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from funclora._config.config import LoraConfig, is_initialiser
from funclora._config.embeddings import TiedEmbeddings
from funclora._config.names import named
from funclora._files.atomic import read_json
from funclora.errors import ConfigError, FormatError, PeftFormatWarning, UnsupportedError, near

CONFIG_FILE = "adapter_config.json"

# With these task types PEFT trains in full what these names end the full name of, whatever the file says.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

_OWN = tuple(f.name for f in fields(LoraConfig))
# Null and an empty list, dict or string mean the default.
_OPTIONAL = frozenset(_OWN) - {"r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights"}
# Where PEFT takes a list or a set, and a dict would be read as the list of its keys.
_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_to_transform")
# Whatever they say, the result is the same. `fan_in_fan_out` follows from the type of a layer.
_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
})  # fmt: skip
# They change what PEFT computes, or the base weights, in ways that the rules here do not have.
_UNSUPPORTED = frozenset({
    "alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication",
    "loftq_config", "lora_ga_config", "megatron_config", "monteclora_config", "use_bdlora", "use_qalora",
    "velora_config",
})  # fmt: skip
# The options of initialisations, with the values that they have here unless decompose or init_eva is told otherwise.
_OF_INITIALISATION: Mapping[str, Mapping[str, Any]] = {
    "eva_config": {
        "rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False,
        "adjust_scaling_factors": True,
    },
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
}  # fmt: skip


def from_peft(config: Any) -> LoraConfig:
    """`LoraConfig.from_peft`."""
    raw = _settled(config if isinstance(config, Mapping) else _asked(config))
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"from_peft: expected a configuration with peft_type='LORA', got {kind!r}.")
    if (why := _beyond_us(raw)) is not None:
        raise ConfigError(f"from_peft: {why}")
    if unknown := _unknown(raw):
        raise ConfigError(f"from_peft: there is no such field: {', '.join(unknown)}.{near(unknown[0], _OWN)}")
    return LoraConfig(**_own_fields(raw))


def _asked(config: Any) -> Mapping[str, Any]:
    """The fields of one of PEFT's objects, which knows how to give them."""
    ask = getattr(config, "to_dict", None)
    raw = ask() if callable(ask) and not isinstance(config, type) else None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"from_peft: expected a peft.LoraConfig or a dict, got a {type(config).__name__}.")
    return raw


def to_peft(config: LoraConfig) -> Any:
    """`LoraConfig.to_peft`."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("to_peft needs PEFT. Type: pip install peft") from error
    options = {name: dict(usual) for name, usual in _OF_INITIALISATION.items() if config.init_lora_weights == name[:-7]}
    return peft.LoraConfig(**_peft_fields(config), **options)


def config_text(config: LoraConfig, targets: Sequence[str], *, fan_in_fan_out: bool) -> str:
    """The text of the file.

    Args:
        config: the configuration.
        targets: full names of the modules that are adapted, which stand for "all-linear".
        fan_in_fan_out: layers of transformers' `Conv1D` are adapted.
    """
    values = _peft_fields(config)
    if config.all_linear:
        values["target_modules"] = _listed(targets)
    if config.init_lora_weights == "eva":
        values["init_lora_weights"] = True  # PEFT would ask for an eva_config
    values |= {
        "auto_mapping": None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "peft_type": "LORA",
        "revision": None,
    }
    # Sorted here, not by json: the order within rank_pattern and alpha_pattern decides which pattern wins.
    return json.dumps(dict(sorted(values.items())), indent=2, allow_nan=False) + "\n"


def _peft_fields(config: LoraConfig) -> dict[str, Any]:
    """The fields with PEFT's types."""
    values = {name: _plain(getattr(config, name)) for name in _OWN}
    if not config.target_modules:
        values["target_modules"] = []  # null would make PEFT add the usual targets of the model
    return values


def _own_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are ours, as `LoraConfig` takes them."""
    values = {k: raw[k] for k in _OWN if k in raw and not (k in _OPTIONAL and _is_empty(raw[k]))}
    for name in _LISTS:
        if isinstance(values.get(name), dict):
            raise ConfigError(f"{name}: expected a list, got {reprlib.repr(values[name])}.")
    path = values.get("base_model_name_or_path")
    if path is not None and not isinstance(path, str):
        raise ConfigError(f"base_model_name_or_path: expected a string, got {path!r}.")
    return values


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple, set, dict, str)) and not value)


def _beyond_us(raw: Mapping[str, Any]) -> str | None:
    """Why a configuration cannot be ours, though PEFT knows what it means."""
    for name in sorted(_UNSUPPORTED & raw.keys()):
        if raw[name]:
            hint = " Its options are arguments of decompose and init_eva." if name in _OF_INITIALISATION else ""
            return f"{name}={reprlib.repr(raw[name])} is not supported.{hint}"
    initialiser = raw.get("init_lora_weights", True)
    if isinstance(initialiser, str) and not is_initialiser(initialiser):
        return (
            f"init_lora_weights={initialiser!r} is not supported: PEFT may change the base weights when it "
            "loads such an adapter. Convert it with PEFT (save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)) first."
        )
    return None


def _settled(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields without options of an initialisation that say nothing new."""

    def is_usual(name: str) -> bool:
        options, usual = raw[name], _OF_INITIALISATION.get(name)
        return usual is not None and isinstance(options, Mapping) and options.items() <= usual.items()

    return {name: value for name, value in raw.items() if not is_usual(name)}


def _unknown(raw: Mapping[str, Any]) -> list[str]:
    return sorted(k for k in raw.keys() - {*_OWN} - _WITHOUT_EFFECT - _UNSUPPORTED if raw[k])


def _listed(names: Sequence[str]) -> list[str] | str:
    """Full names as PEFT's `target_modules`.

    A list is matched by the ends of names, so "0" would mean "1.0" too: numbers need a regular expression.
    """
    if any(name.isdigit() for name in names):
        return "|".join(map(re.escape, names))
    return list(names)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def read_config(file: Path, model: nn.Module) -> tuple[LoraConfig, bool]:
    """The configuration in a file.

    Args:
        file: the path of `adapter_config.json`.
        model: the model that the adapter is for; some task types mean more than the file says.

    Returns:
        The configuration, and whether PEFT itself wrote the file, which sorts patterns that it trained in another
        order.

    Raises:
        FormatError: the file is missing, broken, or has a value that is invalid.
        UnsupportedError: the file asks for something that is not supported.
    """
    # How an adapter started says nothing about one that is there.
    raw = {name: value for name, value in _json(file).items() if name not in _OF_INITIALISATION}
    kind = raw.get("peft_type")
    if kind != "LORA":
        got = f"got {kind!r}" if "peft_type" in raw else "but it is missing"
        raise FormatError(f"{file}: peft_type: expected 'LORA', {got}. Only LoRA and DoRA adapters are supported.")
    if (why := _beyond_us(raw)) is not None:
        raise UnsupportedError(f"{file}: {why}")
    if "r" not in raw:
        raise FormatError(f"{file}: r is missing.")
    if "lora_alpha" not in raw:
        _warn(f"{file}: lora_alpha is missing; PEFT takes 8.")
    if unknown := _unknown(raw):
        _warn(f"{file}: unknown fields are ignored, as PEFT 0.21 does: {', '.join(unknown)}.")
    try:
        config = LoraConfig(**_own_fields(raw))
    except (ConfigError, OverflowError) as error:
        raise FormatError(f"{file}: {error}") from error
    if config.ensure_weight_tying and not TiedEmbeddings.of(model).tied:
        _warn(f"{file}: ensure_weight_tying has no effect, as in PEFT: the model ties nothing to its input embeddings.")
        config = config.replace(ensure_weight_tying=False)
    return config.replace(modules_to_save=_saved(config, model)), "megatron_core" in raw


def has_in_out_linear(file: Path) -> bool:
    """Whether the file says that layers of transformers' `Conv1D` are adapted. PEFT lets the last layer decide."""
    return bool(_json(file).get("fan_in_fan_out"))


def _json(file: Path) -> dict[str, Any]:
    if not file.parent.is_dir():
        raise FormatError(f"{file.parent}: there is no such folder. Give a PEFT folder: it holds {file.name}.")
    if not file.is_file():
        inner = sorted(str(found.parent) for found in file.parent.glob(f"*/{file.name}"))
        hint = f" PEFT keeps named adapters in folders of their own: {', '.join(inner)}." if inner else ""
        raise FormatError(f"{file.parent}: there is no {file.name} in this folder.{hint}")
    return read_json(file)


def _saved(config: LoraConfig, model: nn.Module) -> Iterable[str] | None:
    """What PEFT trains in full, named exactly.

    PEFT compares the ends of names without regard to dots ("classifier" means "pre_classifier" too) and adds the
    usual heads of the task type, whether the model has them or not.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    heads = HEADS.get(config.task_type or "", ())
    entries = dict.fromkeys([*(config.modules_to_save or ()), *heads])
    loose = [
        n for n, m in modules.items()
        if any(n.endswith(e) and not named(n, e) for e in entries) and any(True for _ in m.parameters())
    ]  # fmt: skip
    exact = [e for e in entries if any(named(n, e) for n in modules)]
    # An entry of the file that means nothing at all is kept: selecting the targets will say so.
    lost = [e for e in entries if e not in exact and e not in heads and not any(n.endswith(e) for n in modules)]
    return tuple(dict.fromkeys([*exact, *loose, *lost])) or None


def _warn(message: str) -> None:
    warnings.warn(message, PeftFormatWarning, stacklevel=4)

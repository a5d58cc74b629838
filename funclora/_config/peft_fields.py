"""PEFT's fields of a LoRA configuration: fields that are also ours, fields without effect, unsupported fields."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from funclora.errors import ConfigError, near

DECOMPOSITIONS = ("pissa", "olora", "loftq")
INITIALISERS = (True, False, "gaussian", "orthogonal", *DECOMPOSITIONS, "eva")

# With these task types PEFT fully fine-tunes the modules whose full names end with these names, also if the file
# does not name them.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Fields where null, or an empty list, dict or string, does not mean the default.
_REQUIRED = frozenset(("r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights"))
# Fields where PEFT takes a list or a set, and a dict would be read as the list of its keys.
_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_to_transform")
# Fields without effect on the result. `fan_in_fan_out` follows from the type of a layer.
_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
    "lora_B_layout", "unsloth_fused_expert_lora",  # of unsloth, see `_grouped_by_expert`
})  # fmt: skip
# Fields that change what PEFT computes, or the base weights, in ways that no rule here can express.
_UNSUPPORTED = frozenset({
    "alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication",
    "loftq_config", "lora_ga_config", "megatron_config", "monteclora_config", "use_bdlora", "use_qalora",
    "velora_config",
})  # fmt: skip
# The options of initialisations, with the default values of decompose and init_eva.
OF_INITIALISATION: Mapping[str, Mapping[str, Any]] = {
    "eva_config": {
        "rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False,
        "adjust_scaling_factors": True,
    },
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
}  # fmt: skip


def is_initialiser(value: str) -> bool:
    """Whether `init_lora_weights` may have this value."""
    return value in INITIALISERS or niter_of(value) is not None


def niter_of(value: object) -> int | None:
    """The number of iterations in "pissa_niter_[k]"; None for every other value."""
    found = re.fullmatch(r"pissa_niter_([0-9]+)", value) if isinstance(value, str) else None
    return int(found[1]) if found else None


def own_fields_of(config: Any, names: Collection[str]) -> dict[str, Any]:
    """The fields of a PEFT configuration that are also ours, as `LoraConfig` takes them.

    Args:
        config: a `peft.LoraConfig`, or a dict as in `adapter_config.json`.
        names: the names of our fields.

    Raises:
        ConfigError: it has a value that is not supported, or an unknown field.
    """
    raw = _settled(config if isinstance(config, Mapping) else _asked(config))
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"from_peft: expected a configuration with peft_type='LORA', got {kind!r}.")
    if (why := beyond_us(raw)) is not None:
        raise ConfigError(f"from_peft: {why}")
    if unknown := unknown_fields(raw, names):
        raise ConfigError(f"from_peft: there is no such field: {', '.join(unknown)}.{near(unknown[0], names)}")
    return own_fields(raw, names)


def _asked(config: Any) -> Mapping[str, Any]:
    """The fields of a PEFT object, as its own method returns them."""
    ask = getattr(config, "to_dict", None)
    raw = ask() if callable(ask) and not isinstance(config, type) else None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"from_peft: expected a peft.LoraConfig or a dict, got a {type(config).__name__}.")
    return raw


def to_peft(values: Mapping[str, Any]) -> Any:
    """The `peft.LoraConfig` with the given values of our fields.

    Raises:
        ConfigError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("to_peft needs PEFT. Type: pip install peft") from error
    initialiser = values["init_lora_weights"]
    options = {name: dict(usual) for name, usual in OF_INITIALISATION.items() if initialiser == name[:-7]}
    return peft.LoraConfig(**peft_fields(values), **options)


def peft_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of our fields with PEFT's types."""
    found = {name: _plain(value) for name, value in values.items()}
    if not found["target_modules"]:
        found["target_modules"] = []  # null would make PEFT add the usual targets of the model
    return found


def own_fields(raw: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The fields with the given names, as `LoraConfig` takes them."""
    values = {k: raw[k] for k in names if k in raw and (k in _REQUIRED or not _is_empty(raw[k]))}
    for name in _LISTS:
        if isinstance(values.get(name), dict):
            raise ConfigError(f"{name}: expected a list, got {reprlib.repr(values[name])}.")
    path = values.get("base_model_name_or_path")
    if path is not None and not isinstance(path, str):
        raise ConfigError(f"base_model_name_or_path: expected a string, got {path!r}.")
    return values


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple, set, dict, str)) and not value)


def beyond_us(raw: Mapping[str, Any]) -> str | None:
    """Why a configuration that PEFT accepts is not supported here."""
    for name in sorted(_UNSUPPORTED & raw.keys()):
        if raw[name]:
            hint = " Its options are arguments of decompose and init_eva." if name in OF_INITIALISATION else ""
            return f"{name}={reprlib.repr(raw[name])} is not supported.{hint}"
    if _grouped_by_expert(raw):
        return (
            "target_parameters: unsloth before 2026.9.6 has stored B of the experts by expert, where PEFT stores it by "
            "rank, so that every expert would get columns of others. Load the folder with a newer unsloth, which knows "
            "both, and save it again."
        )
    initialiser = raw.get("init_lora_weights", True)
    if isinstance(initialiser, str) and not is_initialiser(initialiser):
        return (
            f"init_lora_weights={initialiser!r} is not supported: PEFT may change the base weights when it "
            "loads such an adapter. Convert it with PEFT (save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)) first."
        )
    return None


def _grouped_by_expert(raw: Mapping[str, Any]) -> bool:
    """Whether unsloth has written a folder whose experts are not stored as PEFT stores them; newer releases say it."""
    if not raw.get("target_parameters"):
        return False
    auto = raw.get("auto_mapping")
    auto = auto if isinstance(auto, Mapping) else {}
    for source in (raw, auto):
        detail = source.get("unsloth_fused_expert_lora")
        parameters = detail.get("parameters") if isinstance(detail, Mapping) else None
        entries = [e for e in parameters.values() if isinstance(e, Mapping)] if isinstance(parameters, Mapping) else []
        layouts = [entry.get("lora_B_layout") for entry in entries] or [source.get("lora_B_layout")]
        if layouts != [None]:
            return any(layout != "rank_major" for layout in layouts)
    return bool(auto.get("unsloth_fixed"))


def _settled(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields without the options of an initialisation that have their default values."""

    def is_usual(name: str) -> bool:
        options, usual = raw[name], OF_INITIALISATION.get(name)
        return usual is not None and isinstance(options, Mapping) and options.items() <= usual.items()

    return {name: value for name, value in raw.items() if not is_usual(name)}


def unknown_fields(raw: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Fields that are unknown here and in PEFT, and have a value other than an empty one."""
    return sorted(k for k in raw.keys() - {*names} - _WITHOUT_EFFECT - _UNSUPPORTED if raw[k])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value

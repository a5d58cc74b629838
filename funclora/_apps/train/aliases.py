"""What the keys of transformers, PEFT, TRL, axolotl, LLaMA-Factory and unsloth are called here."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from funclora.errors import ConfigError

TRL, AXOLOTL, FACTORY, UNSLOTH = PROJECTS = ("TRL, transformers, PEFT", "axolotl", "LLaMA-Factory", "unsloth")
_LETTERS = dict(zip("TAFU", PROJECTS, strict=True))


@dataclass(frozen=True)
class Alias:
    """A key of other trainers.

    Attributes:
        key: the key of a run that it sets.
        projects: who has it.
        convert: its value -> key of a run -> value. A `ConfigError` says why a value has no counterpart.
    """

    key: str
    projects: tuple[str, ...]
    convert: Callable[[Any], dict[str, Any]]


def _same(key: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {key: value}


def _on(key: str, value: Any, off: Any = None) -> Callable[[Any], dict[str, Any]]:
    """A flag: on is `value` of `key`, off is `off`, or nothing."""

    def convert(given: Any) -> dict[str, Any]:
        if not isinstance(given, bool):
            raise ConfigError(f"expected true or false, got {reprlib.repr(given)}")
        return {key: value} if given else {} if off is None else {key: off}

    return convert


def _words(key: str, words: Mapping[Any, Any], remedy: str) -> Callable[[Any], dict[str, Any]]:
    """A value that is one of some; None stands for no setting."""

    def convert(given: Any) -> dict[str, Any]:
        if not isinstance(given, str | int | bool) or given not in words:
            raise ConfigError(f"{reprlib.repr(given)} has no counterpart. {remedy}")
        value = words[given]
        return {} if value is None else {key: value}

    return convert


def _steps(given: Any) -> dict[str, Any]:
    return {} if given == -1 else {"steps": given}


def _whole_steps(key: str) -> Callable[[Any], dict[str, Any]]:
    def convert(given: Any) -> dict[str, Any]:
        if isinstance(given, float) and 0 < given < 1:
            raise ConfigError(f"a share of the run, {given}, is not known here. Give a number of steps as {key}")
        return {key: int(given) if isinstance(given, float) and given == int(given) else given}

    return convert


def _share(given: Any) -> dict[str, Any]:
    if isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given) and given >= 1:
        raise ConfigError(f"{given} is a number of records. Give the share of the data as validation_split")
    return {"validation_split": float(given) if type(given) is int else given}


def _targets(given: Any) -> dict[str, Any]:
    return {"targets": "all-linear" if given in ("all", ["all"]) else given}


def _schedule_options(given: Any) -> dict[str, Any]:
    names = {"num_cycles": "cycles", "power": "power", "num_decay_steps": "decay", "min_lr_rate": "lr_end"}
    if not isinstance(given, dict) or {*given} - {*names}:
        raise ConfigError(f"{reprlib.repr(given)}: of these, only {', '.join(names)} are known here")
    return {names[name]: value for name, value in given.items()}


def _reports(given: Any) -> dict[str, Any]:
    names = given if isinstance(given, list) else [given]
    if "wandb" in names:
        raise ConfigError("Weights & Biases needs the name of a project. Give it as wandb")
    if {*map(str, names)} - {"none", "tensorboard"}:
        raise ConfigError(f"{reprlib.repr(given)} has no counterpart. Give tensorboard, wandb or mlflow")
    return {"tensorboard": True} if "tensorboard" in names else {}


def _resume(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        raise ConfigError("a run goes on from the last checkpoint in its own folder. Give that as out, and resume")
    return {"resume": given}


_BITS = {4: "nf4", 8: "int8", "4": "nf4", "8": "int8"}
_FLASH = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
_CHECKPOINTING = {True: True, False: None, "unsloth": True, "true": True, "false": None}
_STEPS_ONLY = "Give a number of steps"

# key there -> key here, who has it, and how its value is converted, unless it is the same
_TABLE: dict[str, tuple[str, str] | tuple[str, str, Callable[[Any], dict[str, Any]]]] = {
    "model_name_or_path": ("model", "TF"),
    "base_model": ("model", "A"),
    "model_name": ("model", "U"),
    "torch_dtype": ("dtype", "TA"),
    "load_in_4bit": ("quantize", "TAU", _on("quantize", "nf4")),
    "load_in_8bit": ("quantize", "TAU", _on("quantize", "int8")),
    "quantization_bit": ("quantize", "F", _words("quantize", _BITS, "Give quantize = nf4, fp4 or int8")),
    "bnb_4bit_quant_type": (
        "quantize", "TA", _words("quantize", {"nf4": None}, "Give quantize = fp4 instead of load_in_4bit"),
    ),
    "bnb_4bit_use_double_quant": ("double_quant", "TA"),
    "double_quantization": ("double_quant", "F"),
    "attn_implementation": ("attention", "TA"),
    "flash_attention": ("attention", "A", _on("attention", "flash_attention_2")),
    "sdp_attention": ("attention", "A", _on("attention", "sdpa")),
    "eager_attention": ("attention", "A", _on("attention", "eager")),
    "flash_attn": ("attention", "F", _words("attention", _FLASH, "Give attention")),
    "validation_file": ("validation", "T"),
    "val_set_size": ("validation_split", "A", _share),
    "val_size": ("validation_split", "F", _share),
    "dataset_text_field": ("text_field", "TU"),
    "completion_only_loss": ("train_on", "T", _on("train_on", "completions", "all")),
    "assistant_only_loss": ("train_on", "T", _on("train_on", "completions", "all")),
    "train_on_inputs": ("train_on", "A", _on("train_on", "all", "completions")),
    "train_on_prompt": ("train_on", "F", _on("train_on", "all", "completions")),
    "mask_history": ("turns", "F", _on("turns", "last")),
    "max_length": ("context", "T"),
    "max_seq_length": ("context", "TU"),
    "sequence_len": ("context", "A"),
    "cutoff_len": ("context", "F"),
    "sample_packing": ("packing", "A"),
    "neat_packing": ("packing", "F"),
    "use_dora": ("method", "TFU", _on("method", "dora")),
    "peft_use_dora": ("method", "A", _on("method", "dora")),
    "r": ("rank", "TU"),
    "lora_r": ("rank", "TA"),
    "lora_rank": ("rank", "F"),
    "lora_alpha": ("alpha", "TAFU"),
    "use_rslora": ("rslora", "TFU"),
    "peft_use_rslora": ("rslora", "A"),
    "lora_dropout": ("dropout", "TAFU"),
    "target_modules": ("targets", "TU", _targets),
    "lora_target_modules": ("targets", "TA", _targets),
    "lora_target_linear": ("targets", "A", _on("targets", "all-linear")),
    "lora_target": ("targets", "F", _targets),
    "lora_modules_to_save": ("modules_to_save", "TA"),
    "additional_target": ("modules_to_save", "F"),
    "init_lora_weights": ("init", "TU"),
    "peft_init_lora_weights": ("init", "A"),
    "pissa_init": ("init", "F", _on("init", "pissa")),
    "lora_model_dir": ("adapter", "A"),
    "adapter_name_or_path": ("adapter", "F"),
    "optim": ("optimizer", "TFU"),
    "adam_beta1": ("beta1", "TAF"),
    "adam_beta2": ("beta2", "TAF"),
    "adam_epsilon": ("epsilon", "TAF"),
    "learning_rate": ("lr", "TAFU"),
    "lr_scheduler_type": ("schedule", "TFU"),
    "lr_scheduler": ("schedule", "A"),
    "lr_scheduler_kwargs": ("cycles, power, decay, lr_end", "TAF", _schedule_options),
    "cosine_min_lr_ratio": ("lr_end", "A"),
    "warmup_steps": ("warmup", "TAFU"),
    "warmup_ratio": ("warmup", "TAFU"),
    "loraplus_lr_ratio": ("lora_plus", "AF"),
    "max_grad_norm": ("clip", "TAFU"),
    "num_train_epochs": ("epochs", "TFU"),
    "num_epochs": ("epochs", "A"),
    "max_steps": ("steps", "TAFU", _steps),
    "per_device_train_batch_size": ("batch", "TFU"),
    "micro_batch_size": ("batch", "A"),
    "gradient_accumulation_steps": ("accumulation", "TAFU"),
    "neftune_noise_alpha": ("neftune", "TAFU"),
    "gradient_checkpointing": (
        "checkpointing", "TAF", _words("checkpointing", _CHECKPOINTING, "Give checkpointing = true or false"),
    ),
    "use_gradient_checkpointing": (
        "checkpointing", "U", _words("checkpointing", _CHECKPOINTING, "Give checkpointing = true or false"),
    ),
    "torch_compile": ("compile", "TA"),
    "random_state": ("seed", "U"),
    "eval_steps": ("eval_every", "TAFU", _whole_steps("eval_every")),
    "eval_strategy": ("eval_every", "TAFU", _words("eval_every", {"no": 0, "steps": None}, _STEPS_ONLY)),
    "evaluation_strategy": ("eval_every", "TAF", _words("eval_every", {"no": 0, "steps": None}, _STEPS_ONLY)),
    "early_stopping_patience": ("patience", "A"),
    "early_stopping_steps": ("patience", "F"),
    "load_best_model_at_end": ("final", "TAF", _on("final", "best", "last")),
    "output_dir": ("out", "TAFU"),
    "resume_from_checkpoint": ("resume", "TAFU", _resume),
    "save_steps": ("save_every", "TAFU", _whole_steps("save_every")),
    "save_strategy": ("save_every", "TAFU", _words("save_every", {"steps": None}, _STEPS_ONLY + " as save_every")),
    "save_total_limit": ("keep", "TAFU"),
    "logging_steps": ("log_every", "TAFU", _whole_steps("log_every")),
    "wandb_project": ("wandb", "A"),
    "report_to": ("tensorboard", "TFU", _reports),
}  # fmt: skip

ALIASES: dict[str, Alias] = {
    name: Alias(row[0], tuple(_LETTERS[letter] for letter in row[1]), row[2] if len(row) == 3 else _same(row[0]))
    for name, row in _TABLE.items()
}

# Key of a run -> value there -> value here.
VALUES: dict[str, dict[str, str]] = {
    "optimizer": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
        # Paged memory changes no value.
        **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), "adamw-8bit"),
    },
    "schedule": {
        "cosine_with_restarts": "cosine-restarts",
        "constant_with_warmup": "constant",
        "warmup_stable_decay": "wsd",
    },
    "dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
}


def known_as(name: str) -> str | None:
    """What a key or option of other trainers is called here, as the end of a message; None for an unknown one.

    Examples:
        >>> known_as("--learning-rate")
        'lr'
        >>> known_as("rnak")
    """
    alias = ALIASES.get(name.lstrip("-").replace("-", "_"))
    return None if alias is None else alias.key

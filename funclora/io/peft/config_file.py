"""`adapter_config.json` and `LoraConfig`, in both directions."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields

from torch import nn

from funclora._config.config import LoraConfig
from funclora._config.embeddings import TiedEmbeddings
from funclora._config.names import named
from funclora._config.peft_fields import HEADS, OF_INITIALISATION, beyond_us, own_fields, peft_fields, unknown_fields
from funclora.errors import ConfigError, FormatError, PeftFormatWarning, UnsupportedError
from funclora.io.peft.files import AdapterFiles

_OWN = tuple(f.name for f in fields(LoraConfig))


def config_text(config: LoraConfig, targets: Sequence[str], *, fan_in_fan_out: bool) -> str:
    """The text of the file.

    Args:
        config: the configuration.
        targets: full names of the modules that are adapted, which stand for "all-linear".
        fan_in_fan_out: layers of transformers' `Conv1D` are adapted.
    """
    values = peft_fields({name: getattr(config, name) for name in _OWN})
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


def _listed(names: Sequence[str]) -> list[str] | str:
    """Full names as PEFT's `target_modules`.

    A list is matched by the ends of names, so "0" would mean "1.0" too: numbers need a regular expression.
    """
    if any(name.isdigit() for name in names):
        return "|".join(map(re.escape, names))
    return list(names)


def read_config(files: AdapterFiles, model: nn.Module) -> tuple[LoraConfig, bool]:
    """The configuration in a file.

    Args:
        files: the folder.
        model: the model that the adapter is for; some task types mean more than the file says.

    Returns:
        The configuration, and whether PEFT itself wrote the file, which sorts patterns that it trained in another
        order.

    Raises:
        FormatError: the file has a value that is invalid.
        UnsupportedError: the file asks for something that is not supported.
    """
    # The initialisation of an adapter has no effect on the stored values.
    file = files.config_file
    raw = {name: value for name, value in files.config.items() if name not in OF_INITIALISATION}
    kind = raw.get("peft_type")
    if "peft_type" not in raw and "lora_parameters" in raw:
        raise UnsupportedError(f"{file}: this is mlx-lm's configuration. Read the folder with funclora.io.load_mlx.")
    if kind != "LORA":
        got = f"got {kind!r}" if "peft_type" in raw else "but it is missing"
        raise FormatError(f"{file}: peft_type: expected 'LORA', {got}. Only LoRA and DoRA adapters are supported.")
    if (why := beyond_us(raw)) is not None:
        raise UnsupportedError(f"{file}: {why}")
    if "r" not in raw:
        raise FormatError(f"{file}: r is missing.")
    if "lora_alpha" not in raw:
        _warn(f"{file}: lora_alpha is missing; PEFT takes 8.")
    if unknown := unknown_fields(raw, _OWN):
        _warn(f"{file}: unknown fields are ignored, as PEFT 0.21 does: {', '.join(unknown)}.")
    try:
        config = LoraConfig(**own_fields(raw, _OWN))
    except (ConfigError, OverflowError) as error:
        raise FormatError(f"{file}: {error}") from error
    if config.ensure_weight_tying and not TiedEmbeddings.of(model).tied:
        _warn(f"{file}: ensure_weight_tying has no effect, as in PEFT: the model ties nothing to its input embeddings.")
        config = config.replace(ensure_weight_tying=False)
    return config.replace(modules_to_save=_saved(config, model)), "megatron_core" in raw


def _saved(config: LoraConfig, model: nn.Module) -> Iterable[str] | None:
    """The full names of the modules that PEFT fully fine-tunes.

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

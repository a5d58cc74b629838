"""PEFT's adapter folders: `save_peft` and `load_peft`.

A folder means here what it means to PEFT 0.21: what is written is what PEFT computes our outputs from, what is read
gives PEFT's outputs. Where that cannot be, both refuse.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from safetensors.torch import save
from torch import nn

from funclora._apply import Adapters, named_tensors
from funclora._config import LoraConfig
from funclora._rules import Rule
from funclora._targets import named, select
from funclora._tokens import Tied
from funclora.errors import PeftFormatWarning, TargetError, UnsupportedError
from funclora.io._files import replace_files
from funclora.io._peft_agree import as_wrapped
from funclora.io._peft_config import CONFIG_FILE, config_text, read_config
from funclora.io._peft_fold import folded
from funclora.io._peft_keys import Keys, Wrapped
from funclora.io._peft_limits import differences, obstacles, obstacles_in_model, obstacles_of_ties
from funclora.io._peft_rules import Reader, tensors_of
from funclora.io._peft_ties import output_layer, tied_as_in_peft
from funclora.io._peft_weights import COMPILED, WEIGHTS_FILE, StoredTensors


def save_peft(
    path: str | os.PathLike[str], adapters: Adapters, config: LoraConfig, *, fold_scaling: bool = False
) -> None:
    """Write adapters as a folder that PEFT loads: `adapter_config.json` and `adapter_model.safetensors`.

    Each file is replaced as a whole, the weights first. What is in the folder besides stays.

    The model is not asked for, so a target of the configuration that the adapters lack as a whole goes unnoticed,
    and so does a module that the model holds under two names. `load_peft` notices both. Rows of a weight that are
    zero stay zero under DoRA here, and become NaN in PEFT.

    Args:
        path: the folder; made if it does not exist.
        adapters: full parameter name -> rule.
        config: the configuration that the adapters were made with.
        fold_scaling: write s·B in place of B, and α = r, for readers that know no rsLoRA and no patterns (vLLM,
            llama.cpp). Lower ranks are filled up with zeros to the highest one. PEFT computes the same from it.

    Raises:
        ConfigError: adapters and configuration do not agree.
        ParamsError: the leaves of a rule do not fit each other.
        UnsupportedError: PEFT cannot hold an adapter, or would compute something else from it.
        NonFiniteError: an adapter holds NaN or infinity.
        OSError: the folder cannot be written. What was there is then still there.

    Examples:
        >>> import tempfile
        >>> from funclora import init
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_peft(folder, init(model, config), config)
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    config = tied_as_in_peft(config, adapters)
    wrapped = as_wrapped(adapters, config)
    if fold_scaling:
        adapters, config = folded(adapters, config)
    tensors = tensors_of(adapters, wrapped)
    # Copies, because a safetensors file cannot hold two views of one tensor.
    written = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in sorted(tensors.items())}
    by_module = [w for w in wrapped.values() if not w.by_parameter]
    fan_in_fan_out = any(w.in_out_linear for w in by_module)
    text = config_text(config, [w.module for w in by_module], fan_in_fan_out=fan_in_fan_out)

    def write_weights(file: Path) -> None:
        file.write_bytes(save(written, metadata={"format": "pt"}))  # save_file's files are for their owner alone

    def write_config(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    replace_files(Path(path), {WEIGHTS_FILE: write_weights, CONFIG_FILE: write_config})


def load_peft(path: str | os.PathLike[str], model: nn.Module) -> tuple[dict[str, Rule], LoraConfig]:
    """Read a folder that PEFT, or `save_peft`, has written.

    The adapters lie on the devices of their base weights, in float32 where the base is in half precision and in its
    dtype otherwise, as PEFT keeps them. The model is only read, its weights only compared with those in the file.

    Args:
        path: the folder.
        model: the base model that the adapter was trained on.

    Returns:
        Full parameter name -> rule, and the configuration. Applied to the model they give PEFT's outputs, in training
        mode up to dropout.

    Raises:
        FormatError: a file is missing or broken, or the files do not fit each other or the model.
        TargetError: the configuration does not fit the model.
        UnsupportedError: the folder needs something that funclora does not have, or that PEFT computes in a way that
            no rule equals.
        NonFiniteError: a tensor holds NaN or infinity.

    Examples:
        >>> import tempfile, torch
        >>> from funclora import init
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> adapters = init(model, config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_peft(folder, adapters, config)
        ...     loaded, loaded_config = load_peft(folder, model)
        >>> torch.equal(loaded["0.weight"].a, adapters["0.weight"].a), loaded_config == config
        (True, True)
    """
    folder = Path(path)
    file = folder / CONFIG_FILE
    config, by_peft = read_config(file, model)
    try:
        targets = select(model, config)
    except TargetError as error:
        raise TargetError(f"{file}: {error}") from error
    weights = {name: tensor for name, tensor, _, _ in named_tensors(model)}
    wrapped = {
        name: Wrapped(name, target.module, target.layout, tuple(weights[name].shape), _by_parameter(name, config))
        for name, target in targets.items()
        if target.layout is not None
    }
    ties = {name: target.to for name, target in targets.items() if target.rule is Tied}
    wrapped |= {name: output_layer(name, wrapped[to]) for name, to in ties.items() if to in wrapped}
    everything = [*wrapped.values()]
    saved = [n for n, _ in model.named_modules() if any(named(n, entry) for entry in config.modules_to_save or ())]
    reasons = (
        *obstacles(everything, saved, config),
        *obstacles_of_ties({name: targets[to].rule for name, to in ties.items()}, ties, config),
        *obstacles_in_model(model, everything),
    )
    for name, why in reasons:
        raise UnsupportedError(f"{folder}: the adapter of {name!r} cannot be read: {why}")
    keys = Keys(everything)
    stored = StoredTensors(folder / WEIGHTS_FILE, compiled=any(COMPILED in name for name in weights))
    reader = Reader(stored, keys, config, wrapped)
    rules = {name: reader.rule(name, target, weights[name]) for name, target in targets.items() if name not in ties}
    rules |= {name: reader.tied(name, targets[name], rules[to], weights[name]) for name, to in ties.items()}
    adapters: dict[str, Rule] = {name: rules[name] for name in targets}
    stored.refuse_rest(keys, weights, adapters)
    for message in (*stored.notes, *differences(model, everything, config, by_peft=by_peft)):
        warnings.warn(f"{folder}: {message}", PeftFormatWarning, stacklevel=2)
    return adapters, config


def _by_parameter(name: str, config: LoraConfig) -> bool:
    return any(named(name, entry) for entry in config.target_parameters or ())

"""PEFT's adapter folders: `save_peft` and `load_peft`.

A folder means here what it means to PEFT 0.21: what is written is what PEFT computes our outputs from, what is read
gives PEFT's outputs. Where that cannot be, both refuse.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from funclora._apply import Adapters, named_tensors
from funclora._config import LoraConfig
from funclora._layout import Attention
from funclora._rules import DoRA, Full, LoRA, Rule
from funclora._targets import Target, named, select
from funclora.errors import FormatError, PeftFormatWarning, TargetError, UnsupportedError
from funclora.io._files import replace_files
from funclora.io._peft_agree import as_wrapped
from funclora.io._peft_config import CONFIG_FILE, config_text, read_config
from funclora.io._peft_decomposed import on_the_original
from funclora.io._peft_keys import Keys, Leaves, Wrapped
from funclora.io._peft_limits import counts_twice, differences, obstacles, obstacles_in_model
from funclora.io._peft_weights import WEIGHTS_FILE, StoredTensors


def save_peft(path: str | os.PathLike[str], adapters: Adapters, config: LoraConfig) -> None:
    """Write adapters as a folder that PEFT loads: `adapter_config.json` and `adapter_model.safetensors`.

    Each file is replaced as a whole, the weights first. What is in the folder besides stays.

    The model is not asked for, so a target of the configuration that the adapters lack as a whole goes unnoticed,
    and so does a module that the model holds under two names. `load_peft` notices both. Rows of a weight that are
    zero stay zero under DoRA here, and become NaN in PEFT.

    Args:
        path: the folder; made if it does not exist.
        adapters: full parameter name -> rule.
        config: the configuration that the adapters were made with.

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
    wrapped = as_wrapped(adapters, config)
    keys = Keys(wrapped.values())
    tensors: dict[str, Tensor] = {}
    for name, rule in adapters.items():
        if isinstance(rule, Full):
            tensors[keys.full(name)] = rule.value
            continue
        w = wrapped[name]
        leaves = w.form.pack({leaf: getattr(rule, leaf) for leaf in rule.leaves}, w)
        tensors |= {keys.leaf(w, leaf): tensor for leaf, tensor in leaves.items()}
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

    PEFT decomposes the model's weights when it loads an adapter with `init_lora_weights="pissa"` or "olora". Here such
    an adapter comes out relative to the weights as they are (`relative_to_original`), with twice the rank.

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
        >>> import tempfile
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
    wrapped = {}
    for name, target in targets.items():
        if target.layout is not None:
            by_parameter = any(named(name, entry) for entry in config.target_parameters or ())
            shape = tuple(weights[name].shape)
            wrapped[name] = Wrapped(name, target.module, target.layout, shape, by_parameter)
    everything = [*wrapped.values()]
    saved = [n for n, _ in model.named_modules() if any(named(n, entry) for entry in config.modules_to_save or ())]
    for name, why in (*obstacles(everything, saved, config), *obstacles_in_model(model, everything)):
        raise UnsupportedError(f"{folder}: the adapter of {name!r} cannot be read: {why}")
    keys = Keys(everything)
    stored = StoredTensors(folder / WEIGHTS_FILE)
    adapters: dict[str, Rule] = {}
    for name, target in targets.items():
        weight = weights[name]
        if name in wrapped:
            adapters[name] = _low_rank(stored, keys, wrapped[name], target, weight, config)
        else:
            key = keys.full(name)
            adapters[name] = Full(stored.take(key, weight.shape, weight, weight.dtype, repr(name)))
    stored.refuse_rest(keys, weights, adapters)
    for message in differences(model, everything, config, by_peft=by_peft):
        warnings.warn(f"{folder}: {message}", PeftFormatWarning, stacklevel=2)
    return on_the_original(file, model, adapters, config) if config.decomposition else (adapters, config)


def _low_rank(
    stored: StoredTensors, keys: Keys, w: Wrapped, target: Target, weight: Tensor, config: LoraConfig
) -> LoRA | DoRA:
    """The rule of one weight from its tensors."""
    rows, wanted = stored.rows(keys.leaf(w, "a"), repr(w.name)), target.r * w.experts
    if rows != wanted:
        raise FormatError(
            f"{stored.file}: {keys.leaf(w, 'a')!r} has {rows} rows, expected {wanted}: rank {target.r} by r and "
            f"rank_pattern of the configuration{f', {w.experts} experts' if w.experts > 1 else ''}."
            + (" PEFT sorts rank_pattern when it saves, and the first key that matches counts." if config.rank_pattern
               else "")
        )  # fmt: skip
    shapes = dict(zip(("a", "b"), w.layout.factor_shapes(w.shape, target.r), strict=True))
    if config.use_dora:
        shapes["magnitude"] = w.layout.magnitude_shape(w.shape)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    blank: Leaves = {leaf: torch.empty(shape, device="meta") for leaf, shape in shapes.items()}
    packed = {
        leaf: stored.take(keys.leaf(w, leaf), tensor.shape, weight, dtype, f"{w.name!r} (rank {target.r})")
        for leaf, tensor in w.form.pack(blank, w).items()
    }
    leaves = [leaf.contiguous() for leaf in w.form.unpack(packed, w).values()]
    scaling, dropout = target.scaling, float(config.lora_dropout)
    if isinstance(w.layout, Attention):
        dropout = 0.0  # PEFT merges before it calls the module
        scaling *= 2 if counts_twice(w) else 1
    return (DoRA if config.use_dora else LoRA)(*leaves, scaling=scaling, dropout=dropout, layout=w.layout)

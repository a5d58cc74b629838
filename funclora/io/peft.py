"""PEFT's adapter folders: `save_peft` and `load_peft`.

A folder means here what it means to PEFT 0.21: what is written is what PEFT computes our outputs from, what is read
gives PEFT's outputs. Where that cannot be, both refuse.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
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
    opened = PeftFolder(Path(path), model)
    adapters = {name: opened.rule(name) for name in opened.targets}
    opened.refuse_rest(opened.weights, adapters)
    for message in opened.differences():
        warnings.warn(f"{opened.folder}: {message}", PeftFormatWarning, stacklevel=2)
    return adapters, opened.config


class PeftFolder:
    """A folder and a model that fit each other; the rules are read one at a time.

    Attributes:
        folder: the folder.
        config: its configuration.
        targets: full parameter name -> what the configuration says of it.
        weights: full name -> tensor of the model, which may be on the meta device: rules are then on the CPU.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder, self._model = folder, model
        file = folder / CONFIG_FILE
        self.config, self._by_peft = read_config(file, model)
        try:
            self.targets = select(model, self.config)
        except TargetError as error:
            raise TargetError(f"{file}: {error}") from error
        self.weights = {name: tensor for name, tensor, _, _ in named_tensors(model)}
        self._wrapped = {}
        for name, target in self.targets.items():
            if target.layout is not None:
                by_parameter = any(named(name, entry) for entry in self.config.target_parameters or ())
                shape = tuple(self.weights[name].shape)
                self._wrapped[name] = Wrapped(name, target.module, target.layout, shape, by_parameter)
        everything = [*self._wrapped.values()]
        listed = self.config.modules_to_save or ()
        saved = [n for n, _ in model.named_modules() if any(named(n, entry) for entry in listed)]
        for name, why in (*obstacles(everything, saved, self.config), *obstacles_in_model(model, everything)):
            raise UnsupportedError(f"{folder}: the adapter of {name!r} cannot be read: {why}")
        self._keys = Keys(everything)
        self._stored = StoredTensors(folder / WEIGHTS_FILE)

    def rule(self, name: str) -> Rule:
        """The rule of one of the targets, read from the file at every call."""
        weight, target = self.weights[name], self.targets[name]
        if name in self._wrapped:
            return _low_rank(self._stored, self._keys, self._wrapped[name], target, weight, self.config)
        return Full(self._stored.take(self._keys.full(name), weight.shape, weight, weight.dtype, repr(name)))

    def refuse_rest(self, weights: Mapping[str, Tensor], adapters: Adapters) -> None:
        """Raise `FormatError` if the file holds something that no target took and that the base weights do not hold.

        Args:
            weights: full name -> base weight, for every name of the model.
            adapters: full name -> rule, at least of the parameters that are trained in full.
        """
        self._stored.refuse_rest(self._keys, weights, adapters)

    def differences(self) -> Iterator[str]:
        """What a reader of the folder should know."""
        return differences(self._model, [*self._wrapped.values()], self.config, by_peft=self._by_peft)


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

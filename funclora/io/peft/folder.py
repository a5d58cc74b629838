"""PEFT's adapter folders: `save_peft` and `load_peft`.

A folder has the same meaning as in PEFT 0.21: PEFT computes our outputs from a written folder, and a folder that is
read gives PEFT's outputs. Where this is impossible, reading and writing raise an error.
"""

from __future__ import annotations

import contextlib
import os
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from funclora._api.arguments import check_model, check_path
from funclora._bind.checks import check_rules
from funclora._bind.params import named_tensors
from funclora._config.checks import check_config
from funclora._config.config import LoraConfig
from funclora._config.embeddings import TiedEmbeddings
from funclora._config.targets import Unmatched, select, without
from funclora._files.atomic import replace_files
from funclora._files.snapshot import ChangedError, attempts
from funclora.errors import PeftFormatWarning, TargetError, UnsupportedError
from funclora.io.peft.config_file import config_text, read_config
from funclora.io.peft.consistency import check_against_config
from funclora.io.peft.decomposed import on_the_original
from funclora.io.peft.embeddings import with_stored_embeddings
from funclora.io.peft.files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from funclora.io.peft.fold import folded
from funclora.io.peft.in_model import in_model, refuse_in_model
from funclora.io.peft.keys import Keys, PeftTarget
from funclora.io.peft.limits import differences, unsupported_by_peft, unsupported_in_model, unsupported_ties
from funclora.io.peft.older_names import OlderNames
from funclora.io.peft.rules import Reader, tensors_of
from funclora.io.peft.tensors import StoredTensors
from funclora.io.peft.ties import output_layer, tied_as_in_peft
from funclora.rules.base import Adapters, Rule
from funclora.rules.tokens import Tied


def save_peft(
    path: str | os.PathLike[str],
    adapters: Adapters,
    config: LoraConfig,
    *,
    fold_scaling: bool = False,
    model: nn.Module | None = None,
) -> None:
    """Write adapters as a folder that PEFT loads: `adapter_config.json` and `adapter_model.safetensors`.

    Both files are replaced as a whole, and never one without the other. `load_peft` reads the old or the new adapter at
    any time, also where this process is killed between the two files: for other programs the folder then has no
    configuration. What is in the folder besides stays.

    With `model`, PEFT computes from the folder what `apply` computes, or an error says what PEFT would do. Without it
    these go unnoticed: a target of the configuration that the adapters lack as a whole, names that PEFT takes for
    experts, a layer that the model never calls or holds in two places, and names that PEFT changes. `load_peft` notices
    the first. Zero rows of a weight stay zero with DoRA in funclora, and become NaN in PEFT.

    Args:
        path: the folder; made if it does not exist.
        adapters: full parameter name -> rule.
        config: the configuration that the adapters were made with.
        fold_scaling: write s·B in place of B, and α = r, for programs without rsLoRA and patterns (vLLM, llama.cpp).
            Smaller ranks are padded with zeros to the largest one. PEFT computes the same result.
        model: the model that the adapters are for. Only its structure is read. In a mixture of experts `init` gives
            the experts adapters as PEFT does, and the model is needed to write them.

    Raises:
        ConfigError: adapters and configuration do not agree.
        ParamsError: the leaves of a rule do not fit each other.
        UnsupportedError: PEFT cannot represent an adapter, or would compute something else from it.
        NonFiniteError: an adapter holds NaN or infinity.
        OSError: the folder cannot be written, or another process writes it now. What was there is then still there.

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
    check_path(path, order="path, adapters, config")
    check_rules(adapters)
    check_config(config)
    if model is not None:
        check_model(model)
        adapters, config = in_model(model, adapters, config)
    config = tied_as_in_peft(config, adapters)
    wrapped = check_against_config(adapters, config)
    if fold_scaling:
        adapters, config = folded(adapters, config)
    tensors = tensors_of(adapters, wrapped)
    if model is not None:
        refuse_in_model(model, wrapped, tensors)
    # Copies, because a safetensors file cannot hold two views of one tensor.
    written = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in sorted(tensors.items())}
    by_module = [w for w in wrapped.values() if not w.by_parameter]
    fan_in_fan_out = any(w.in_out_linear for w in by_module)
    text = config_text(config, [w.module for w in by_module], fan_in_fan_out=fan_in_fan_out)

    def write_weights(file: Path) -> None:
        file.write_bytes(save(written, metadata={"format": "pt"}))  # save_file's files are for their owner alone

    def write_config(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    replace_files(Path(path), {WEIGHTS_FILE: write_weights, CONFIG_FILE: write_config}, together=True)


def load_peft(path: str | os.PathLike[str], model: nn.Module) -> tuple[dict[str, Rule], LoraConfig]:
    """Read a folder that PEFT, or `save_peft`, has written.

    The adapters are on the devices of their base weights, in float32 if the base is in half precision and in its dtype
    otherwise, as in PEFT. The model is only read, and its weights are only compared with weights in the file.

    If another process replaces the folder meanwhile, either the old or the new adapter is read, never a mixture.

    PEFT decomposes the model's weights when it loads an adapter with `init_lora_weights="pissa"` or "olora". Here
    such an adapter is converted to the original weights (`relative_to_original`), with twice the rank.

    Args:
        path: the folder.
        model: the base model that the adapter was trained on.

    Returns:
        Full parameter name -> rule, and the configuration. Applied to the model they give PEFT's outputs, in training
        mode up to dropout.

    Raises:
        FormatError: a file is missing or broken, or the files do not fit each other or the model.
        TargetError: the configuration does not fit the model.
        UnsupportedError: the folder needs something that funclora does not have, or that no rule computes as PEFT does.
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
    check_path(path, order="path, model")
    check_model(model)
    for last in attempts():
        with contextlib.suppress(*(() if last else (ChangedError,))):
            return load_files(AdapterFiles(Path(path)), model)
    raise AssertionError("the last attempt returns or raises")


def load_files(files: AdapterFiles, model: nn.Module) -> tuple[dict[str, Rule], LoraConfig]:
    """As `load_peft`, from files that are open.

    Raises:
        ChangedError: a program has written into them meanwhile.
    """
    opened = PeftFolder(files, model)
    adapters = {name: opened.rule(name) for name in opened.targets}
    opened.refuse_rest(opened.weights, adapters)
    files.check()
    for message in opened.differences():
        warnings.warn(f"{opened.folder}: {message}", PeftFormatWarning, stacklevel=3)
    if opened.config.decomposition:
        return on_the_original(files.config_file, model, adapters, opened.config)
    return adapters, opened.config


class PeftFolder:
    """A folder and a matching model; the rules are read one at a time.

    Where the configuration asks for a decomposition, they are relative to the decomposed weights.

    Attributes:
        folder: the folder.
        config: its configuration.
        targets: full parameter name -> what the configuration says of it.
        weights: full name -> tensor of the model, which may be on the meta device: rules are then on the CPU.

    Args:
        files: the folder.
        model: the model.
        values: full name -> weight, for a model on the meta device.
    """

    def __init__(self, files: AdapterFiles, model: nn.Module, values: Mapping[str, Tensor] | None = None) -> None:
        self.folder, self._model = files.folder, model
        folder, file = files.folder, files.config_file
        config, self._by_peft = read_config(files, model)
        self.weights = {name: tensor for name, tensor, _, _ in named_tensors(model)}
        self._stored = StoredTensors(files, components={part for name in self.weights for part in name.split(".")})
        older = OlderNames(model, self.weights, self._stored, config)
        config, grown = with_stored_embeddings(model, values or self.weights, self._stored, older.config)
        self._notes = [*older.notes, *grown]
        unmatched: list[Unmatched] = []
        try:
            self.targets = targets = select(model, config, unmatched=unmatched)
        except TargetError as error:
            raise TargetError(f"{file}: {error} {_advice(config, model)}") from error
        self._unmatched = [each.message for each in unmatched]
        self.config = config = without(config, unmatched)
        wrapped = {
            name: PeftTarget(
                name, t.module, t.layout, tuple(self.weights[name].shape), config.names("target_parameters", name)
            )
            for name, t in targets.items()
            if t.layout is not None
        }
        first = dict(model.named_modules())
        self._further = {n: t.tied_to for n, t in targets.items() if t.rule is Tied and t.module not in first}
        self._ties = {n: t.tied_to for n, t in targets.items() if t.rule is Tied and t.module in first}
        wrapped |= {name: output_layer(name, wrapped[to]) for name, to in self._ties.items() if to in wrapped}
        self._wrapped = [*wrapped.values()]
        saved = [n for n, _ in model.named_modules() if config.names("modules_to_save", n)]
        reasons = (
            *unsupported_by_peft(self._wrapped, saved, config),
            *unsupported_ties({name: targets[to].rule for name, to in self._ties.items()}, self._ties, config),
            *unsupported_in_model(model, self._wrapped),
        )
        for name, why in reasons:
            raise UnsupportedError(f"{folder}: the adapter of {name!r} cannot be read: {why}")
        self._keys = Keys(self._wrapped)
        table = self.weights.get(f"{TiedEmbeddings.of(model).input}.weight")
        older.join(self._keys, wrapped)
        self._stored.advice = " ".join([*self._unmatched, _advice(config, model)])
        self._stored.vocabulary = 0 if table is None else table.shape[0]
        self._reader = Reader(self._stored, self._keys, config, wrapped)

    def rule(self, name: str) -> Rule:
        """The rule of one of the targets, read from the file at every call."""
        target, weight = self.targets[name], self.weights[name]
        if name in self._further:
            return Tied(self._further[name])
        if name in self._ties:
            return self._reader.tied(name, target, self.rule(self._ties[name]), weight)
        return self._reader.rule(name, target, weight)

    def refuse_rest(self, weights: Mapping[str, Tensor], adapters: Adapters) -> None:
        """Raise `FormatError` if the file holds something that no target took and that the base weights do not hold.

        Args:
            weights: full name -> base weight, for every name of the model.
            adapters: full name -> rule, at least of the parameters that are trained in full.
        """
        self._stored.refuse_rest(self._keys, weights, adapters)

    def differences(self) -> Iterator[str]:
        """Notes for the reader of the folder."""
        yield from self._stored.notes
        yield from self._notes
        for message in self._unmatched:
            yield f"{message} Every tensor of the file has its place: the entry is left out."
        yield from differences(self._model, self._wrapped, self.config, by_peft=self._by_peft)


def _advice(config: LoraConfig, model: nn.Module) -> str:
    """What to do if an adapter does not match a model."""
    base = config.base_model_name_or_path
    which = f"of {reprlib.repr(base)}" if base else "that it was trained on"
    return f"If the adapter is for another model than this {type(model).__name__}, load it on the one {which}."

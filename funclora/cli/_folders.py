"""Reading the folder of an adapter, with its base model or without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from funclora._config.config import LoraConfig
from funclora.errors import UnsupportedError
from funclora.io.foreign.bare import is_foreign, read_factors
from funclora.io.foreign.mlx import load_mlx
from funclora.io.hf.fitted import FittedCheckpoint
from funclora.io.hf.origin import check_origin
from funclora.io.hf.weights import Weights
from funclora.io.merge.adapters import LazyMapping
from funclora.io.peft.files import AdapterFiles
from funclora.io.peft.folder import PeftFolder
from funclora.io.peft.without_model import read_bare
from funclora.rules.base import Rule
from funclora.rules.tokens import Tied


class BaseFolder:
    """The folder of a base model, whose weights are read one at a time.

    Attributes:
        folder: the folder.
        structure: the model without weights.
        params: full name -> weight, read at every access.
    """

    def __init__(self, checkpoint: FittedCheckpoint) -> None:
        self.folder, self.structure = checkpoint.folder, checkpoint.structure
        weights = Weights(checkpoint, self.structure)
        self.params: Mapping[str, Tensor] = LazyMapping([*self.structure.shapes], weights.read)


class AdapterFolder:
    """A PEFT folder, or what another program wrote instead.

    Attributes:
        folder: the folder.
        config: its configuration.
        rules: full parameter name -> rule. Parameters that are tied to another one are left out: they are the same
            weight, and `notes` name them.
        notes: remarks for the user.

    Args:
        folder: the folder.
        base: the model; without it, LoRA and DoRA of modules can be read.

    Raises:
        FormatError: a file is missing or broken, or the files do not fit each other or the model.
        TargetError: the configuration does not fit the model.
        UnsupportedError: the folder depends on the model, which is not given; or the adapter belongs to decomposed
            weights.
        NonFiniteError: a tensor holds NaN or infinity.
    """

    def __init__(self, folder: Path, base: BaseFolder | None) -> None:
        self.folder = folder
        self.rules: Mapping[str, Rule]
        self.notes: list[str] = []
        self.config: LoraConfig
        if is_foreign(folder):
            self._read_foreign(base)
            return
        files = AdapterFiles(folder)
        if base is None:
            self.rules, self.config = read_bare(files, in_out=files.has_in_out_linear, dora=True)
            return
        opened = PeftFolder(files, base.structure.model, base.params)
        self.config = opened.config
        if opened.config.decomposition:
            raise UnsupportedError(
                f"{folder}: init_lora_weights={opened.config.init_lora_weights!r}: the adapter belongs to decomposed "
                "weights. Convert it to the original weights: save_peft(new_folder, *load_peft(folder, model))."
            )
        names = [name for name, target in opened.targets.items() if target.rule is not Tied]
        self.rules = LazyMapping(names, opened.rule)
        for name in opened.targets:
            opened.rule(name)  # every tensor of the file must be valid before any is used
        opened.refuse_rest(base.params, LazyMapping([*opened.targets], opened.rule))
        check_origin([folder], base.folder)
        self.notes = [f"{folder}: {message}" for message in opened.differences()]
        tied = [name for name, target in opened.targets.items() if target.rule is Tied]
        if tied:
            self.notes.append(f"{folder}: {', '.join(tied)}: tied to another weight, so they change with it.")

    def _read_foreign(self, base: BaseFolder | None) -> None:
        if base is None:
            self.rules, self.config = read_factors(self.folder)
        elif self.folder.is_dir():
            self.rules, self.config = load_mlx(self.folder, base.structure.model)
        else:
            raise UnsupportedError(
                f"{self.folder}: the weights of a pipeline are not read. Leave --base out, or convert the file first "
                "(funclora convert --from diffusers)."
            )

"""The contents of the folder of an adapter or a model, and its changes to a base model, one weight at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funclora.analysis import Spectra, Spectrum
from funclora.analysis._changes import change, changes
from funclora.analysis._data import Data
from funclora.analysis._spectrum import measured
from funclora.cli._folders import AdapterFolder, BaseFolder
from funclora.errors import FormatError, near
from funclora.io.foreign.bare import is_foreign
from funclora.io.hf.checkpoint import CONFIG_FILE as MODEL_CONFIG
from funclora.io.hf.checkpoint import Checkpoint, OnProgress
from funclora.io.hf.fitted import FittedCheckpoint
from funclora.io.peft.files import CONFIG_FILE as ADAPTER_CONFIG
from funclora.rules.dense import Delta, Full


@dataclass(frozen=True)
class Inspection(Data):
    """What `inspect_folder` found.

    Attributes:
        kind: "adapter" or "model".
        folder: the inspected folder.
        base: the folder of the base model, if given.
        config: for an adapter, the main fields of its configuration; empty for a model.
        parameters: number of values that the adapter trains, or that the model contains.
        norm: ‖ΔW‖ of all weights together, or ‖W‖ for a model without a base.
        share: norm / ‖W‖ of the weights in `rows`; None without a base.
        rows: one for each weight.
        skipped: integer tensors of a model.
        notes: remarks for the user.
    """

    kind: str
    folder: str
    base: str | None
    config: dict[str, Any]
    parameters: int
    norm: float
    share: float | None
    rows: tuple[Spectrum, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    def plot(self, file: Path) -> None:
        """Draw the rows as a PNG."""
        Spectra(self.rows).plot(file)


def inspect_folder(
    folder: Path, base: Path | None = None, *, singular: bool = True, progress: OnProgress | None = None
) -> Inspection:
    """Inspect the folder of an adapter or a model.

    Args:
        folder: a PEFT folder, or the folder of a transformers model; also mlx-lm's folder, or a LoRA file of an image
            model.
        base: the folder of the base model of the adapter or of the fine-tuned model.
        singular: compute singular values; otherwise only norms.
        progress: called with the number of finished weights and of all weights.

    Raises:
        FormatError: a folder is missing or broken, or does not fit the base.
        TargetError: the adapter's configuration does not fit the base.
        UnsupportedError: the adapter needs the base, which is not given; a model is quantised; or transformers is
            needed and not installed.
        NonFiniteError: a tensor contains NaN or infinity.
    """
    tell = progress or (lambda done, total: None)
    if is_foreign(folder):
        return _adapter(folder, base, singular, tell)
    if not folder.is_dir():
        raise FormatError(
            f"{folder}: there is no such folder. Give a PEFT folder, or the folder of a transformers model."
        )
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(folder, base, singular, tell)
    if (folder / MODEL_CONFIG).is_file():
        return _model(folder, base, singular, tell)
    inner = sorted(str(found.parent) for found in folder.glob(f"*/{ADAPTER_CONFIG}"))
    hint = f" It contains the adapters {', '.join(inner[:5])}." if inner else ""
    raise FormatError(f"{folder}: contains neither {ADAPTER_CONFIG} (an adapter) nor {MODEL_CONFIG} (a model).{hint}")


@contextlib.contextmanager
def opened_base(folder: Path | None, *adapters: Path) -> Iterator[BaseFolder | None]:
    """The base model as the adapters know it, open for reading; None if no folder is given."""
    if folder is None:
        yield None
        return
    with FittedCheckpoint(folder, [adapter for adapter in adapters if not is_foreign(adapter)]) as checkpoint:
        yield BaseFolder(checkpoint)


def facts(found: AdapterFolder) -> dict[str, Any]:
    """The main fields of an adapter's configuration."""
    names = (
        "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "target_parameters", "modules_to_save", "bias",
        "rank_pattern", "alpha_pattern", "task_type", "base_model_name_or_path",
    )  # fmt: skip
    return {name: getattr(found.config, name) for name in names}


@torch.no_grad()
def _adapter(folder: Path, base: Path | None, singular: bool, progress: OnProgress) -> Inspection:
    with opened_base(base, folder) as model:
        found = AdapterFolder(folder, model)
        names, rows, parameters = [*found.rules], [], 0
        params = None if model is None else model.params
        layouts = None if model is None else model.structure.model
        for done, each in enumerate(changes(found.rules, params, layouts), start=1):
            rows.append(measured(each, singular=singular))
            parameters += sum(getattr(each.given, leaf).numel() for leaf in each.given.leaf_names)
            progress(done, len(names))
    return _inspection("adapter", folder, base, facts(found), parameters, rows, (), tuple(found.notes))


@torch.no_grad()
def _model(folder: Path, base: Path | None, singular: bool, progress: OnProgress) -> Inspection:
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(Checkpoint(folder))
        other = None if base is None else stack.enter_context(Checkpoint(base))
        if other is not None:
            _refuse_unlike(own, other)
        rows, parameters = [], 0
        skipped = tuple(key for key, tensor in own.tensors.items() if not tensor.is_floating)
        keys = [key for key in own.tensors if key not in skipped]
        for done, key in enumerate(keys, start=1):
            weight = own.read(key)
            parameters += weight.numel()
            rows.append(_row(key, weight, None if other is None else other.read(key), singular=singular))
            progress(done, len(keys))
    return _inspection("model", folder, base, {}, parameters, rows, skipped, ())


def _row(key: str, weight: Tensor, base: Tensor | None, *, singular: bool) -> Spectrum:
    """A weight of a model, or its difference from the base's."""
    if base is not None:
        return replace(measured(change(key, Full(weight), base), singular=singular), rule="")
    found = measured(change(key, Delta(weight), None), singular=singular)
    return replace(found, rule="", of="W", scaling=None)


def _refuse_unlike(own: Checkpoint, base: Checkpoint) -> None:
    """Raise `FormatError` unless both contain the same tensors."""
    for one, other in ((own, base), (base, own)):
        for key in one.tensors:
            if key not in other.tensors:
                raise FormatError(
                    f"{other.folder}: there is no {key!r}, which {one.folder} contains. They belong to different "
                    f"models, or only one of them ties its weights.{near(key, other.tensors, n=3)}"
                )
    for key, tensor in own.tensors.items():
        if tensor.shape != base.tensors[key].shape:
            raise FormatError(
                f"{own.folder}: {key!r} has shape {list(tensor.shape)}, in {base.folder} it has "
                f"{list(base.tensors[key].shape)}. They belong to different models."
            )
        if tensor.is_floating != base.tensors[key].is_floating:
            raise FormatError(
                f"{own.folder}: {key!r} is stored as {tensor.dtype}, in {base.folder} as {base.tensors[key].dtype}. "
                "One of them is quantised."
            )


def _inspection(kind: str, folder: Path, base: Path | None, config: Mapping[str, Any], parameters: int,
                rows: list[Spectrum], skipped: tuple[str, ...], notes: tuple[str, ...]) -> Inspection:  # fmt: skip
    norm = math.hypot(*(row.norm for row in rows))
    of_base = math.hypot(*(row.base_norm or 0.0 for row in rows))
    return Inspection(
        kind=kind,
        folder=str(folder),
        base=None if base is None else str(base),
        config=dict(config),
        parameters=parameters,
        norm=norm,
        share=norm / of_base if of_base else None,
        rows=tuple(rows),
        skipped=skipped,
        notes=notes,
    )

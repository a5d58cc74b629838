"""Extracting an adapter from a fully fine-tuned model."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from funclora._api.arguments import check_path
from funclora._config.config import LoraConfig
from funclora._config.target import Target
from funclora._config.targets import select
from funclora._files.safetensors import certainly_within
from funclora._files.staging import staged_folder
from funclora._torch.linalg import randomized_svd, svd
from funclora.errors import ConfigError, FormatError, TargetError, UnsupportedError
from funclora.io.hf.checkpoint import Checkpoint
from funclora.io.hf.structure import Structure
from funclora.io.hf.weights import Weights
from funclora.io.peft.folder import save_peft
from funclora.rules.base import Rule
from funclora.rules.dense import Full
from funclora.rules.layouts import Layout
from funclora.rules.low_rank import LoRA

# Differences with more elements are decomposed in float32, which needs half the time and memory.
_DOUBLE = 2**20


@dataclass(frozen=True)
class ExtractedWeight:
    """One weight of an extracted adapter.

    Attributes:
        name: its full name in the model.
        shape: its shape.
        norm: ‖Δ‖, of the difference of both models (Frobenius norm).
        residual: ‖Δ − B·A‖ / ‖Δ‖, the relative error of the adapter. No adapter of this rank has a smaller one (Eckart
            and Young 1936).
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    residual: float


@dataclass(frozen=True)
class ExtractReport:
    """The result of an extraction.

    Attributes:
        weights: the adapted weights, in the order of the model.
        same: targets that are equal in both models, and have no adapter.
        saved: parameters that the adapter contains completely.
        ignored: parameters that differ, and that the adapter does not change.
    """

    weights: tuple[ExtractedWeight, ...]
    same: tuple[str, ...]
    saved: tuple[str, ...]
    ignored: tuple[str, ...]


def extract_adapter(
    base_dir: str | os.PathLike[str],
    tuned_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    r: int,
    target_modules: str | Collection[str] | None = "all-linear",
    target_parameters: Collection[str] | None = None,
    rest: Literal["error", "save", "ignore"] = "error",
    niter: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractReport:
    """Write the LoRA adapter of rank r that is nearest to a fully fine-tuned model as a PEFT folder.

    Each target's difference Δ = tuned − base is replaced by the first r terms of its singular value decomposition.
    Weights are read one at a time. Differences outside the targets are never silently left out.

    Args:
        base_dir: the folder of the base model.
        tuned_dir: the folder of the fine-tuned model.
        out_dir: the new folder; it must not exist, or be empty.
        r: the rank.
        target_modules: which weights get an update, as in `LoraConfig`.
        target_parameters: further weights, by names of parameters (experts).
        rest: what to do with other parameters that differ: "error" raises and names them, "save" saves them completely
            in the adapter (`modules_to_save`, and `bias="all"` for biases), "ignore" leaves them out.
        niter: use a randomised decomposition with this number of power iterations (Halko et al., arXiv 0909.4061),
            which is faster for large weights and nearly as good; None for the exact decomposition.
        progress: called with the number of finished weights and of all weights.

    Returns:
        A report of the adapter and its errors.

    Raises:
        FormatError: a folder is broken, the models do not fit each other, or nothing differs.
        ConfigError: an argument is invalid, or `out_dir` is in use.
        TargetError: a target matches nothing; or parameters differ that no target covers, and `rest` is "error".
        UnsupportedError: a PEFT folder cannot represent a difference.
        OSError: a file cannot be read or written.

    Examples:
        >>> extract_adapter("model", "tuned", "adapter", r=16)  # doctest: +SKIP
        ExtractReport(weights=(...), same=(), saved=(), ignored=())
        >>> extract_adapter("nowhere", "tuned", "adapter", r=16)
        Traceback (most recent call last):
        funclora.errors.FormatError: nowhere: there is no such folder. Give the folder of a transformers model.
    """
    for where, path in (("base_dir", base_dir), ("tuned_dir", tuned_dir), ("out_dir", out_dir)):
        check_path(path, where)
    if rest not in ("error", "save", "ignore"):
        raise ConfigError(f"rest: expected 'error', 'save' or 'ignore', got {rest!r}.")
    if niter is not None and (not isinstance(niter, int) or niter < 0):
        raise ConfigError(f"niter: expected a number of iterations (at least 0) or None, got {niter!r}.")
    config = LoraConfig(
        r=r,
        lora_alpha=r,  # s = 1
        target_modules=target_modules,
        target_parameters=target_parameters,
        base_model_name_or_path=str(base_dir),
    )
    out = Path(out_dir)
    with (
        staged_folder(out, [Path(base_dir), Path(tuned_dir)]) as draft,
        Checkpoint(Path(base_dir)) as base,
        Checkpoint(Path(tuned_dir)) as tuned,
    ):
        if base.config.get("architectures") != tuned.config.get("architectures"):
            raise FormatError(
                f"{tuned.folder} is a {tuned.config.get('architectures')}, {base.folder} a "
                f"{base.config.get('architectures')} (architectures in config.json); expected the same."
            )
        structure = Structure(base.folder, base.config, base.shapes)
        trained = Structure(tuned.folder, tuned.config, tuned.shapes)
        _refuse_other_sizes(base.folder, structure, tuned.folder, trained)
        pair = _Pair(structure, Weights(base, structure), Weights(tuned, trained))
        found = _Extraction(pair, config, niter, progress or (lambda done, total: None))
        if not found.adapters and not found.changed:
            raise FormatError(f"{tuned.folder} has the same weights as {base.folder}, so there is nothing to extract.")
        if not found.adapters:
            raise TargetError(f"target_modules: no target differs, only {_some(found.changed)}.")
        if found.changed and rest == "error":
            raise TargetError(
                f"{_some(found.changed)} differ{'s' if len(found.changed) == 1 else ''} too, and no target covers "
                "this. Save it completely (rest='save'), leave it out (rest='ignore'), or add targets."
            )
        config, saved = found.saved(config) if rest == "save" else (found.exact(config), {})
        base.check()
        tuned.check()
        save_peft(draft, {**found.adapters, **saved}, config, model=structure.model)
    return ExtractReport(
        weights=tuple(found.weights),
        same=tuple(found.same),
        saved=tuple(saved),
        ignored=tuple(found.changed) if rest == "ignore" else (),
    )


def _refuse_other_sizes(base: Path, structure: Structure, tuned: Path, trained: Structure) -> None:
    for name, shape in structure.shapes.items():
        other = trained.shapes.get(name)
        if other != shape:
            has = "does not have it" if other is None else f"has {list(other)}"
            raise FormatError(
                f"{base}: {name!r} has the shape {list(shape)}, and {tuned} {has}; expected the same. If only the "
                "number of tokens differs, resize the base as the training did (model.resize_token_embeddings)."
            )
    for name in trained.shapes.keys() - structure.shapes.keys():
        raise FormatError(f"{tuned}: it has {name!r}, but {base} does not; expected models with the same structure.")


class _Pair:
    """Two checkpoints of one model."""

    def __init__(self, structure: Structure, base: Weights, tuned: Weights) -> None:
        self.structure, self.base, self.tuned = structure, base, tuned

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        old, new = self.base.read(name), self.tuned.read(name)
        return old, new


class _Extraction:
    """Compare every parameter of the model."""

    def __init__(
        self, pair: _Pair, config: LoraConfig, niter: int | None, progress: Callable[[int, int], None]
    ) -> None:
        self._pair, self._model = pair, pair.structure.model
        self._targets = select(self._model, config)
        self.adapters: dict[str, Rule] = {}
        self.weights: list[ExtractedWeight] = []
        self.same: list[str] = []
        self.changed: list[str] = []
        names = [*pair.structure.shapes]
        for done, name in enumerate(names, start=1):
            self._look(name, config.r, niter)
            progress(done, len(names))

    def _look(self, name: str, r: int, niter: int | None) -> None:
        old, new = self._pair.read(name)
        if old.is_meta or new.is_meta:
            return  # integers are counters and indices, which are not trained
        delta = new.double() - old.double() if old.numel() <= _DOUBLE else new.float() - old.float()
        if not certainly_within(delta, 1e15):
            raise FormatError(f"{name!r} contains NaN, infinity or huge values in one of the models.")
        target = self._targets.get(name)
        if not delta.any():
            if target is not None:
                self.same.append(name)
        elif target is None or target.rule is Full:
            self.changed.append(name)
        else:
            assert target.layout is not None
            a, b, norm, residual = _nearest(name, delta, target.layout, r, niter)
            self.adapters[name] = LoRA(a, b, layout=target.layout)
            self.weights.append(ExtractedWeight(name, tuple(delta.shape), norm, residual))

    def exact(self, config: LoraConfig) -> LoraConfig:
        """A configuration whose targets are exactly the adapted weights."""
        targets = {name: target for name, target in self._targets.items() if name in self.adapters}
        parameters = [name for name in targets if config.names("target_parameters", name)]
        modules = [target.module for name, target in targets.items() if not config.names("target_parameters", name)]
        candidates: list[Any] = [
            sorted({module.rpartition(".")[2] for module in modules}),
            modules,
            "|".join(module.replace(".", r"\.") for module in modules),
        ]
        for candidate in candidates:
            exact = config.replace(target_modules=candidate or None, target_parameters=parameters or None)
            if _selects(self._model, exact, targets):
                return exact
        raise UnsupportedError(f"no list of targets selects exactly {_some([*targets])}.")

    def saved(self, config: LoraConfig) -> tuple[LoraConfig, dict[str, Rule]]:
        """A configuration that also includes the differences outside the targets, and their values."""
        config = self.exact(config)
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        for name in self.changed:
            if name not in parameters:
                raise UnsupportedError(f"{name!r} differs, but is a buffer, which a PEFT folder cannot contain.")
        owners = list(dict.fromkeys(n.rpartition(".")[0] for n in self.changed if not n.endswith(".bias")))
        biases = any(n.endswith(".bias") and n.rpartition(".")[0] not in owners for n in self.changed)
        config = config.replace(modules_to_save=owners or None, bias="all" if biases else "none")
        full = [name for name, target in select(self._model, config).items() if target.rule is Full]
        return config, {name: Full(self._pair.tuned.read(name)) for name in full}


def _selects(model: torch.nn.Module, config: LoraConfig, wanted: dict[str, Target]) -> bool:
    try:
        return select(model, config).keys() == wanted.keys()
    except TargetError:
        return False


def _nearest(
    name: str, delta: Tensor, layout: Layout, r: int, niter: int | None
) -> tuple[Tensor, Tensor, float, float]:
    """The factors in float32 of the best update of rank r, ‖Δ‖, and its relative error."""
    matrix = layout.to_matrix(delta)
    k = min(r, *matrix.shape[-2:])
    if niter is None:
        u, s, vh = svd(name, matrix)
    else:  # eight directions more than are kept
        generator = torch.Generator().manual_seed(0)
        u, s, vh = randomized_svd(name, matrix, min(k + 8, *matrix.shape[-2:]), niter, generator)
    root = s[..., :k].sqrt()
    a, b = root.unsqueeze(-1) * vh[..., :k, :], u[..., :, :k] * root.unsqueeze(-2)
    a, b = a.float(), b.float()
    norm = torch.linalg.vector_norm(matrix)
    residual = torch.linalg.vector_norm(matrix - b.to(matrix.dtype) @ a.to(matrix.dtype)) / norm
    # A weight with a dimension smaller than r is padded with zeros.
    a = torch.nn.functional.pad(a, (0, 0, 0, r - k))
    b = torch.nn.functional.pad(b, (0, r - k))
    shapes = layout.factor_shapes(delta.shape, r)
    return a.reshape(shapes[0]).contiguous(), b.reshape(shapes[1]).contiguous(), float(norm), float(residual)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")

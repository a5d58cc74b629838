"""Combining PEFT folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, nn

from funclora._api.arguments import check_generator, check_model, check_path, check_paths
from funclora._bind.params import base_params
from funclora._config.config import LoraConfig
from funclora._config.infer import configured
from funclora._config.targets import select
from funclora.algebra import combine
from funclora.errors import ConfigError, UnsupportedError
from funclora.io.peft.files import AdapterFiles
from funclora.io.peft.folder import load_peft, save_peft
from funclora.io.peft.tensors import SAVED_DTYPES
from funclora.io.peft.without_model import read_bare
from funclora.rules.base import Adapters, Rule
from funclora.rules.low_rank import LowRank


@dataclass(frozen=True)
class CombinedFolders:
    """The result of `combine_peft`.

    Attributes:
        sources: the adapters that it read.
        adapters: the combination.
        config: its configuration.
    """

    sources: tuple[dict[str, Rule], ...]
    adapters: dict[str, Rule]
    config: LoraConfig


def combine_peft(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: Generator | None = None,
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
) -> CombinedFolders:
    """Combine PEFT folders into one PEFT folder, with the same meaning in PEFT.

    LoRA on modules needs no model: its files contain the factors, ranks and alphas. DoRA, `modules_to_save`, trained
    biases and `target_parameters` need it.

    The scalings of the sources, including rsLoRA, become part of the factors and of `lora_alpha` in the new
    configuration; unequal ranks are written to `rank_pattern` and `alpha_pattern`. The targets of all sources are
    joined.

    Args:
        paths: the folders.
        out: the new folder.
        weights: a number for each folder, 1 for all if None.
        combination_type: as in `funclora.algebra.combine`, and so are all options up to `generator`.
        svd_rank: the rank of decomposed updates.
        svd_clamp: the quantile at which decomposed factors are clamped.
        density: the share of entries that pruning keeps.
        majority_sign_method: how TIES chooses signs.
        generator: of DARE's random numbers.
        model: the base model, with its weights.
        dtype: of the written factors; they are computed at least in float32.

    Returns:
        What was read, and what was written.

    Raises:
        FormatError: a folder is broken, or does not fit the model.
        UnsupportedError: a folder needs the model, or PEFT cannot represent the result.
        ConfigError: an option is invalid, or no configuration describes all sources together.
        NonFiniteError: a tensor holds NaN or infinity.
        OSError: the new folder cannot be written.

    Examples:
        >>> import tempfile
        >>> from funclora import LoraConfig, init
        >>> model, config = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), LoraConfig(r=2, target_modules=["0"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("math", "code"):
        ...         save_peft(f"{folder}/{name}", init(model, config), config)
        ...     both = combine_peft([f"{folder}/math", f"{folder}/code"], f"{folder}/both", [0.7, -0.3], "cat")
        ...     load_peft(f"{folder}/both", model)[1].r, both.config.lora_alpha
        (4, 4)
    """
    check_paths(paths)
    check_path(out, "out", "paths, out, weights")
    check_model(model, optional=True)
    check_generator(generator)
    if dtype not in SAVED_DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(map(str, SAVED_DTYPES))}, got {dtype!r}.")
    if Path(out).resolve() in {Path(path).resolve() for path in paths}:
        raise ConfigError(f"out: {os.fspath(out)!r} is one of the adapters to combine. Name another folder.")
    if model is None:
        folders = [AdapterFiles(Path(path)) for path in paths]
        in_out = any(files.has_in_out_linear for files in folders)
        read = [read_bare(files, in_out=in_out) for files in folders]
    else:
        read = [load_peft(path, model) for path in paths]
    sources = [adapters for adapters, _ in read]
    combined = combine(
        sources,
        weights,
        combination_type,
        svd_rank=svd_rank,
        svd_clamp=svd_clamp,
        density=density,
        majority_sign_method=majority_sign_method,
        generator=generator,
        params=None if model is None else base_params(model),
    )
    adapters, config = configured(combined, [config for _, config in read])
    if model is not None:
        adapters = _placed(model, adapters, config)
    adapters = {name: _cast(rule, dtype) for name, rule in adapters.items()}
    save_peft(out, adapters, config, model=model)
    return CombinedFolders(tuple(sources), adapters, config)


def _placed(model: nn.Module, adapters: Adapters, config: LoraConfig) -> dict[str, Rule]:
    """The rules with the layouts that the model gives to the targets of the configuration, which must be theirs."""
    targets = select(model, config)
    if missing := targets.keys() - adapters.keys():
        raise UnsupportedError(
            f"the combination has no rule for {', '.join(map(repr, sorted(missing)))}, which its configuration needs: "
            "the adapters do not train the same kinds of parameters."
        )
    found: dict[str, Rule] = {}
    for name, rule in adapters.items():
        layout = targets[name].layout if name in targets else None
        found[name] = replace(rule, layout=layout) if isinstance(rule, LowRank) and layout is not None else rule
    return found


def _cast(rule: Rule, dtype: torch.dtype) -> Rule:
    """The rule with its factors in that dtype; a parameter that is trained in full keeps its own."""
    if not isinstance(rule, LowRank):
        return rule
    return replace(rule, **{leaf: getattr(rule, leaf).to(dtype) for leaf in rule.leaf_names})

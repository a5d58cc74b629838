"""The adapters that a run starts from, and the form in which they are saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optree
import torch

from funclora._apps.train.base import Base, Batch
from funclora._apps.train.qlora import forget, pack, packed_names, splits_weights, task_type, trained_whole
from funclora._apps.train.settings import DECODERS, Settings
from funclora._apps.train.tasks import trained_classes, trained_problem, trained_task
from funclora._config.config import LoraConfig
from funclora._init.decompose import decompose
from funclora._init.eva import init_eva
from funclora._init.fresh import init
from funclora._init.relative import relative_to_original
from funclora.errors import ConfigError
from funclora.io.hf.origin import check_origin
from funclora.io.peft.files import AdapterFiles
from funclora.io.peft.folder import load_peft
from funclora.rules.base import Adapters, Rule


@dataclass(frozen=True, eq=False)
class Start:
    """The adapters at the start of a run, and the base that they belong to.

    Attributes:
        base: the base model of the run; where `init` splits the weights, with the remaining part.
        adapters: full parameter name -> rule: fresh, or those of `settings.adapter`.
        config: theirs.
    """

    base: Base
    adapters: dict[str, Rule]
    config: LoraConfig

    def exported(self, trained: Adapters) -> tuple[dict[str, Rule], LoraConfig]:
        """The trained adapters and their configuration, for the base as it was loaded.

        With "pissa" and "olora" their rank is twice that of the settings.
        """
        if self.config.decomposition is None:
            return dict(trained), self.config
        if self.config.decomposition == "loftq":
            # The base is quantised like any 4-bit copy of it, and the adapter compensates for that.
            return dict(trained), self.config.replace(init_lora_weights=True)
        return relative_to_original(trained, self.adapters, self.config)


def configuration(base: Base, settings: Settings) -> LoraConfig:
    """The configuration that the settings and the base's new modules give.

    Raises:
        ConfigError: a value is invalid, or values contradict each other.
    """
    words = {"true": True, "false": False}
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear" if settings.targets == ("all-linear",) else settings.targets,
        use_rslora=settings.rslora,
        use_dora=settings.method == "dora",
        modules_to_save=trained_whole(base.model, settings, base.new) or None,
        init_lora_weights=words.get(settings.init, settings.init),
        # PEFT's classes for a task need transformers' models.
        task_type=None if settings.model is None else task_type(base.model, settings),
        base_model_name_or_path=None if settings.model is None else str(settings.model),
    )


def begin(base: Base, settings: Settings, batches: Iterable[Batch] = ()) -> Start:
    """Fresh adapters, a function of base, settings and seed (and of the batches, for "eva"); or those of a folder.

    Where `init` splits the weights ("pissa", "olora", "loftq") this is done in full precision, before they are
    quantised.

    Args:
        base: from `load_base`.
        settings: the run's.
        batches: training batches for "eva", used repeatedly.

    Raises:
        ConfigError: a value is invalid, or the initialisation does not fit the weights.
        TargetError: a target matches nothing, or cannot be adapted.
        ParamsError: the rank of a weight is too low for "pissa", or "eva" sees too few inputs.

    Examples:
        >>> from funclora._apps.train.base import load_base, load_tokenizer
        >>> settings = Settings(targets=("q_proj",), rank=4)
        >>> start = begin(load_base(settings, load_tokenizer(settings)), settings)
        >>> len(start.adapters), start.config.r
        (4, 4)
    """
    if settings.adapter is not None:
        return _loaded(base, settings, settings.adapter)
    config = configuration(base, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.targets != ("all-linear",) and "all-linear" in settings.targets:
        raise ConfigError(
            "targets: all-linear already includes all linear layers. Give it alone, or give names of modules."
        )
    if config.init_lora_weights == "eva":
        inputs = [{key: value.to(base.device) for key, value in batch.items()} for batch in batches]
        adapters, config = init_eva(
            base.model,
            config,
            inputs,
            generator=generator,
            params=base.params,
            forward=base.logits,
        )
        return Start(base, adapters, config)
    if config.decomposition is None:
        return Start(base, init(base.model, config, generator=generator, params=base.params), config)
    if config.decomposition == "loftq":
        params, adapters = decompose(
            base.model,
            config,
            generator=generator,
            params=base.params,
            quantize=lambda weight: pack({"w": weight}, ["w"], settings, weight.device)["w"],
        )
    else:
        params, adapters = decompose(base.model, config, generator=generator, params=base.params)
    if settings.quantize != "none" and splits_weights(settings):
        rest = [name for name in packed_names(base.model, settings, base.new) if not is_packed(params[name])]
        params = params | pack(params, rest, settings, base.device)
        forget(base.model, [name for name in params if is_packed(params[name])])
    return Start(replace(base, params=params), adapters, config)


def as_adapter(settings: Settings) -> Settings:
    """The settings with what the folder of the starting adapter says: its method, rank, targets, ...

    Raises:
        ConfigError: the adapter was trained for another task.
        FormatError: there is no adapter, or its configuration cannot be read.
    """
    if settings.adapter is None:
        return settings
    config = LoraConfig.from_peft(AdapterFiles(settings.adapter).config)
    task = trained_task({str(settings.adapter): settings.adapter}, settings.model)
    if task != settings.task and not {task, settings.task} <= {*DECODERS}:
        raise ConfigError(
            f"task: the adapter in {settings.adapter} was trained for {task}, and the task is {settings.task}. "
            f"Set task to {task}."
        )
    targets = config.target_modules
    return replace(
        settings,
        problem=trained_problem({str(settings.adapter): settings.adapter}, task, settings.problem),
        method="dora" if config.use_dora else "lora",
        rank=config.r,
        alpha=config.lora_alpha,
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        targets=(targets,) if isinstance(targets, str) else tuple(targets or ()),
        modules_to_save=tuple(config.modules_to_save or ()),
    )


def adapter_classes(settings: Settings) -> tuple[str, ...]:
    """The classes of the starting adapter, in the order of its head's outputs; empty if there are none."""
    if settings.adapter is None:
        return ()
    return trained_classes({str(settings.adapter): settings.adapter}, settings.task)


def _loaded(base: Base, settings: Settings, folder: Path) -> Start:
    """The adapters of a folder.

    Raises:
        ConfigError: they lack the head that the model lacks too.
        FuncloraError: they cannot be read, or do not fit the model.
    """
    tree: Any
    tree, config = load_peft(folder, base.model)
    check_origin([folder], settings.model)
    check_head(base, tree, str(folder))
    adapters: Any = optree.tree_map(lambda leaf: leaf.to(base.device), tree)
    own = configuration(base, settings)
    return Start(
        base,
        dict(adapters),
        config.replace(
            base_model_name_or_path=own.base_model_name_or_path, task_type=config.task_type or own.task_type
        ),
    )


def check_head(base: Base, adapters: Mapping[str, Rule], name: str) -> None:
    """Raise `ConfigError` if an adapter does not bring the head that its base does not have."""
    for module in base.new:
        if not any(parameter.startswith(f"{module}.") for parameter in adapters):
            raise ConfigError(
                f"{name}: contains no weights of {module!r}, and {base.name} neither, so its classes would be random. "
                "Save the head with the adapter (modules_to_save)."
            )


def is_packed(weight: torch.Tensor) -> bool:
    """Whether a weight is a quantised one."""
    from funclora._quant.tensor import Quantized

    return isinstance(weight, Quantized)

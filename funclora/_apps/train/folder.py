"""The transformers model of a folder, with the head that a task needs."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funclora._apps.train.settings import CAUSAL, EMBEDDING, PREFERENCE, PROBLEMS, SEQ2SEQ, SEQUENCE, SINGLE, TOKEN
from funclora._apps.train.tokenizer import load_config as load_config
from funclora.errors import ConfigError, FormatError
from funclora.io.hf.checkpoint import CONFIG_FILE, stored_tensors
from funclora.io.hf.heads import PROBLEM_TYPES as TYPES
from funclora.io.hf.library import OPTIONS, first_line, quiet, reading, transformers
from funclora.io.hf.sharded import load_sharded
from funclora.io.hf.structure import at_most, named_class, nothing_stored

_PARAMETERS = 200_000  # more than any model has
_ROOM = 1 << 27  # values that are not stored: buffers, new heads

CLASSES = {
    CAUSAL: "AutoModelForCausalLM",
    SEQUENCE: "AutoModelForSequenceClassification",
    TOKEN: "AutoModelForTokenClassification",
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
    PREFERENCE: "AutoModelForCausalLM",
    EMBEDDING: "AutoModel",
}
PROBLEM_TYPES = dict(zip(PROBLEMS, TYPES, strict=True))  # as transformers calls them


def load_model(
    folder: Path,
    task: str | None,
    *,
    dtype: str = "auto",
    attention: str = "auto",
    classes: Sequence[str] = (),
    problem: str = SINGLE,
    seed: int = 0,
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model on the CPU, in evaluation mode, frozen.

    Only safetensors files are read. For classification, the head and the pooler may be missing or of another size; they
    are then initialised from the seed.

    Args:
        folder: of a transformers model.
        task: one of `settings.TASKS`; None for the model class in the folder's configuration.
        dtype: "auto" for the folder's, or a name.
        attention: transformers' `attn_implementation`; "auto" for its choice.
        classes: names of the classes; those of the folder's configuration if empty.
        problem: what labels of texts are, one of `settings.PROBLEMS`.
        seed: of new weights.

    Returns:
        The model, and the full names of the modules whose weights are new.

    Raises:
        FormatError: the folder contains no model, is broken, or lacks weights that cannot be initialised.
        ConfigError: transformers has no model of this architecture for the task.
    """
    config = load_config(folder)
    if classes and task in (SEQUENCE, TOKEN):
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
    if task == SEQUENCE and (problem != SINGLE or config.problem_type is not None):
        config.problem_type = PROBLEM_TYPES[problem]
    cls = _class(folder, config, task)
    _check_size(folder, _empty(folder, config, cls, task))
    remedy = " Give a folder with config.json and complete .safetensors files."
    chosen = _without_pooler(config, cls, task)
    if attention != "auto":
        chosen["attn_implementation"] = attention
        _check_attention(folder, config, cls, attention)
    with torch.random.fork_rng(devices=[]), reading(folder, f"model: transformers cannot load {folder}", remedy):
        torch.default_generator.manual_seed(seed)
        model, report = cls.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=task in (SEQUENCE, TOKEN),
            **chosen,
            **OPTIONS,
        )
    missing = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    new = tuple(dict.fromkeys(_new_module(folder, model, key, task) for key in sorted(missing)))
    return model.eval().requires_grad_(False), new


def load_divided(
    folder: Path, task: str, *, dtype: str, attention: str, device: torch.device, **quantization: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model without weights, and these in pieces: no process holds all of them at any time.

    Args:
        folder: of a transformers model.
        task: one without a new head.
        dtype: as for `load_model`.
        attention: as for `load_model`.
        device: where the pieces are kept.
        **quantization: as for `load_sharded`.

    Raises:
        FuncloraError: as `load_sharded` does.
        ConfigError: transformers has no model of this architecture for the task.
    """
    config = load_config(folder)
    cls = _class(folder, config, task)
    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    if chosen:
        _check_attention(folder, config, cls, attention)
    given = None if dtype == "auto" else getattr(torch, dtype)
    model, params = load_sharded(
        folder,
        make=lambda: cls.from_config(config, trust_remote_code=False, **chosen, **({"dtype": given} if given else {})),
        dtype=given,
        device=device,
        **quantization,
    )
    return model.eval().requires_grad_(False), params


def empty_model(folder: Path, task: str | None) -> nn.Module:
    """The model's structure, on the meta device.

    Args:
        folder: of a transformers model.
        task: as for `load_model`.

    Raises:
        FormatError: the folder contains no model.
        ConfigError: transformers has no model of this architecture for the task.
    """
    config = load_config(folder)
    return _empty(folder, config, _class(folder, config, task), task)


def longest_context(model: nn.Module) -> int | None:
    """The maximum number of positions of a model; None if there is no limit.

    Args:
        model: a transformers model, which may be on the meta device.
    """
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    for table in positions_after_padding(model):
        limit = min(limit or table.num_embeddings, table.num_embeddings - int(table.padding_idx or 0) - 1)
    return limit if isinstance(limit, int) and limit > 0 else None


def positions_after_padding(model: nn.Module) -> list[nn.Embedding]:
    """The position embeddings of RoBERTa and similar models, which count from the padding id in the configuration."""
    return [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]


def _class(folder: Path, config: Any, task: str | None) -> Any:
    """The class that loads the model: from the configuration, or transformers' choice for the task."""
    library = transformers()
    if task is None:
        return named_class(folder, config.architectures)
    if task == EMBEDDING and config.is_encoder_decoder:
        raise ConfigError(
            f"task: a model of type {config.model_type!r} ({folder}) has an encoder and a decoder, so a text has no "
            "single embedding. Give an encoder or a decoder."
        )
    if type(config) not in getattr(library, CLASSES[task])._model_mapping:
        fitting = [t for t, name in CLASSES.items() if type(config) in getattr(library, name)._model_mapping]
        raise ConfigError(
            f"task: a model of type {config.model_type!r} ({folder}) does not support {task}. It supports "
            f"{', '.join(fitting) or 'no task of this command'}."
        )
    return getattr(library, CLASSES[task])


def _empty(folder: Path, config: Any, cls: Any, task: str | None) -> nn.Module:
    """The model of a configuration on the meta device."""
    with reading(folder, f"model: the config.json of {folder} does not describe a model"), at_most(_PARAMETERS):
        if task is None:
            with nothing_stored(torch.float32):
                return cls(config)  # type: ignore[no-any-return]
        with torch.device("meta"):
            more = _without_pooler(config, cls, task)
            model: nn.Module = cls.from_config(config, trust_remote_code=False, **more)
    return model


def _without_pooler(config: Any, cls: Any, task: str | None) -> dict[str, Any]:
    """The argument that leaves out the layer of an encoder that makes its own embedding, which is not used."""
    if task != EMBEDDING:
        return {}
    own = cls._model_mapping[type(config)]
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(own.__init__).parameters else {}


def _check_attention(folder: Path, config: Any, cls: Any, attention: str) -> None:
    """Raise `ConfigError` if a model does not have this implementation of attention, or a package for it is missing."""
    try:
        with quiet(transformers()), torch.device("meta"):
            cls.from_config(copy.deepcopy(config), attn_implementation=attention, trust_remote_code=False)
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"attention: {attention} cannot be used for {folder}: {first_line(error)}. auto is always possible."
        ) from error


def _check_size(folder: Path, model: nn.Module) -> None:
    """Raise `FormatError` if a model needs much more memory than its files: transformers would initialise the rest."""
    stored = sum(tensor.nbytes for tensor in stored_tensors(folder).values())
    tensors = itertools.chain(model.parameters(), model.buffers())
    needed = sum(tensor.numel() for tensor in tensors)
    if needed > 8 * stored + _ROOM:  # a byte contains two values of four bits
        raise FormatError(
            f"model: {folder / CONFIG_FILE} describes {needed:,} values, but the weight files contain {stored:,} bytes."
        )


def _new_module(folder: Path, model: nn.Module, key: str, task: str | None) -> str:
    """The module of a weight that is missing in the folder; it must be one that a task may initialise."""
    body: str = getattr(model, "base_model_prefix", "")
    module = key.rpartition(".")[0]
    inside = bool(body) and key.startswith(f"{body}.")
    if task in (SEQUENCE, TOKEN) and not inside and module:
        return key.split(".")[0]
    if task in (SEQUENCE, TOKEN) and inside and key.split(".")[1] == "pooler":
        return f"{body}.pooler"
    raise FormatError(
        f"model: the files in {folder} lack {key!r}, or contain it with another shape, so it would be random. Give the "
        f"folder of a complete model of this class, {type(model).__name__}."
    )

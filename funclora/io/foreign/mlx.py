"""mlx-lm's adapter folders: `load_mlx` and `save_mlx`.

A folder has `adapter_config.json` (`fine_tune_type`, `num_layers`, `lora_parameters`: rank, scale, dropout, keys) and
`adapters.safetensors`, with mlx-lm's names and layout:

    weight          key                        shape
    linear layer    q_proj.lora_a, .lora_b     [in, r], [r, out]     W + scale · (lora_a · lora_b)ᵀ
    embedding       embed_tokens.lora_a, ...   [N, r], [r, D]        W + scale · lora_a · lora_b
    DoRA            q_proj.m                   [out]
    experts         switch_mlp.up_proj.lora_a  [E, r, in], [E, out, r]
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from funclora._api.arguments import check_model, check_path
from funclora._bind.checks import check_adapters, check_rules
from funclora._bind.params import base_params
from funclora._config.config import LoraConfig
from funclora._config.embeddings import TiedEmbeddings
from funclora._files.atomic import parse_json, replace_files
from funclora._files.safetensors import read_header
from funclora._files.snapshot import ChangedError, attempts, open_files
from funclora.errors import ConfigError, FormatError, NonFiniteError, ParamsError, UnsupportedError
from funclora.io.foreign.factors import Factors, rules_of
from funclora.io.peft.fold import alike
from funclora.rules.base import Adapters, Rule
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Embedding, Linear, stacked
from funclora.rules.low_rank import LoRA, LowRank

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapters.safetensors"
_KINDS = {"lora": LoRA, "dora": DoRA}
_LEAF = re.compile(r"^(?P<module>.+)\.(?P<leaf>lora_a|lora_b|m)$")
_LAYER = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)\.(?P<inside>.+)$")
_EXPERTS = re.compile(r"^(?P<block>.+)\.switch_mlp\.(?P<part>gate_proj|up_proj|down_proj)$")
_MERGE = "Merge the adapter (funclora.merge), save the model, and convert it with mlx_lm.convert."
_TIED = "mlx-lm uses the update of a tied embedding in the output layer too."


def load_mlx(path: str | os.PathLike[str], model: nn.Module) -> tuple[dict[str, Rule], LoraConfig]:
    """Read the folder of an adapter that mlx-lm has trained.

    The names of modules in mlx-lm are those of transformers for most families of models. The adapters are on the
    devices of their base weights, in float32 or in the weight's dtype if it is wider.

    Args:
        path: the folder, with `adapter_config.json` and `adapters.safetensors`.
        model: the base model, of transformers. Only its structure is read.

    Returns:
        Full parameter name -> `LoRA` or `DoRA`, and a configuration with which `save_peft` writes them.

    Raises:
        FormatError: a file is missing or broken, or does not fit the model.
        UnsupportedError: the folder has no adapter (`fine_tune_type` "full"), or one that no rule computes.
        NonFiniteError: a tensor contains NaN or infinity.

    Examples:
        >>> import tempfile
        >>> from funclora import init
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 3)})])})
        >>> adapters = init(model, LoraConfig(r=2, target_modules=["q_proj"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_mlx(folder, adapters, model)
        ...     loaded, config = load_mlx(folder, model)
        >>> list(loaded), config.target_modules
        (['layers.0.q_proj.weight'], ('q_proj',))
    """
    check_path(path, order="path, model")
    check_model(model)
    for last in attempts():
        with contextlib.suppress(*(() if last else (ChangedError,))):
            file, factors = read_mlx(Path(path))
            _refuse_embeddings(file, factors, model)
            return rules_of(file, _with_experts(file, factors, model), model)
    raise AssertionError("the last attempt returns or raises")


def save_mlx(path: str | os.PathLike[str], adapters: Adapters, model: nn.Module) -> None:
    """Write adapters as a folder that mlx-lm loads (`mlx_lm.generate --adapter-path`).

    mlx-lm has one rank, one scale and one dropout for all modules. Where the rules have several, s is multiplied into
    B, and smaller ranks are padded with zeros. Layers without an adapter get one of zeros there.

    Args:
        path: the folder; made if it does not exist. Both files are replaced together.
        adapters: full parameter name -> rule, all `LoRA` or all `DoRA`.
        model: the base model; only its structure is read.

    Raises:
        UnsupportedError: mlx-lm has no form for a rule.
        ParamsError: an adapter does not fit the model.
        ConfigError: there are no adapters, or they are of both kinds or have several dropouts.
        NonFiniteError: an adapter contains NaN or infinity.
        OSError: the folder cannot be written. What was there is then still there.

    Examples:
        >>> import tempfile
        >>> from funclora import init
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 3)})])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_mlx(folder, init(model, LoraConfig(r=2, target_modules=["q_proj"])), model)
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['adapter_config.json', 'adapters.safetensors']
    """
    check_path(path, order="path, adapters, model")
    check_rules(adapters)
    check_model(model)
    rules = {name: _supported(name, rule, model) for name, rule in adapters.items()}
    if not rules:
        raise ConfigError("adapters: there is no adapter to write.")
    check_adapters(base_params(model), rules)
    kinds = {kind for kind, cls in _KINDS.items() for rule in rules.values() if isinstance(rule, cls)}
    dropouts = {rule.dropout for rule in rules.values()}
    if len(kinds) > 1 or len(dropouts) > 1:
        raise ConfigError(
            "adapters: mlx-lm has one kind and one dropout for all modules, got "
            f"{', '.join(sorted(kinds))} and {', '.join(f'{p:g}' for p in sorted(dropouts))}. Make them alike."
        )
    if len({(rule.r, float(rule.scaling)) for rule in rules.values()}) > 1:
        rules = {name: rule for name, rule in alike(rules).items() if isinstance(rule, LoRA | DoRA)}
    first = next(iter(rules.values()))
    tensors: dict[str, Tensor] = {}
    for name, rule in rules.items():
        module = name.removesuffix(".weight")
        leaves = {"lora_a": rule.a.mT, "lora_b": rule.b.mT}
        leaves |= {"m": rule.magnitude} if isinstance(rule, DoRA) else {}
        for leaf, tensor in leaves.items():
            if not tensor.isfinite().all():
                raise NonFiniteError(f"{name!r}: {leaf} contains NaN or infinity. Such an adapter is not written.")
            tensors[f"{module}.{leaf}"] = tensor.detach().to("cpu", copy=True).contiguous()
    layers, keys = _places(list(rules), model)
    config = {
        "fine_tune_type": kinds.pop(),
        "num_layers": layers,
        "lora_parameters": {"rank": first.r, "scale": float(first.scaling), "dropout": first.dropout, "keys": keys},
    }

    def write_weights(draft: Path) -> None:
        draft.write_bytes(save(tensors, metadata={"format": "mlx"}))

    def write_config(draft: Path) -> None:
        draft.write_text(json.dumps(config, indent=4, sort_keys=True) + "\n", encoding="utf-8")

    replace_files(Path(path), {WEIGHTS_FILE: write_weights, CONFIG_FILE: write_config}, together=True)


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is mlx-lm's."""
    return "lora_parameters" in config or "fine_tune_type" in config


def read_mlx(folder: Path) -> tuple[Path, dict[str, Factors]]:
    """The path of the weights, and the factors by the names of modules."""
    opened = open_files(folder, [WEIGHTS_FILE, CONFIG_FILE])
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in opened:
            raise FormatError(f"{folder}: there is no {name} in this folder. mlx-lm writes it.")
    kind, scale, dropout = _parameters(
        folder / CONFIG_FILE, parse_json(folder / CONFIG_FILE, opened[CONFIG_FILE].read())
    )
    file, weights = folder / WEIGHTS_FILE, opened[WEIGHTS_FILE]
    leaves: dict[str, dict[str, Tensor]] = {}
    for key, stored in read_header(weights).items():
        match = _LEAF.match(key)
        if match is None:
            raise FormatError(f"{file}: unexpected key {key!r}: expected names that end with lora_a, lora_b or m.")
        if not stored.is_floating:
            raise FormatError(f"{file}: {key!r} has dtype {stored.dtype}, expected a floating-point one.")
        leaves.setdefault(match["module"], {})[match["leaf"]] = stored.read(weights.descriptor)
    for each in opened.values():
        each.check()
    if not leaves:
        raise FormatError(f"{file}: there are no tensors in this file.")
    wanted = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    factors = {}
    for module, found in leaves.items():
        if found.keys() != wanted:
            raise FormatError(
                f"{file}: {module!r} has {', '.join(sorted(found))}, expected {', '.join(sorted(wanted))} with "
                f"fine_tune_type={kind!r}."
            )
        a, b = found["lora_a"], found["lora_b"]
        if kind == "lora" and a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]:
            factors[module] = Factors(a, b, scale, dropout=dropout)
            continue
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or not b.shape[0]:
            raise FormatError(
                f"{file}: {module!r}: lora_a has shape {list(a.shape)} and lora_b {list(b.shape)}, expected [in, r] "
                "and [r, out]."
            )
        factors[module] = Factors(a.mT, b.mT, scale, found.get("m"), dropout=dropout)
    return file, factors


def _parameters(file: Path, config: Mapping[str, Any]) -> tuple[str, float, float]:
    """The kind of fine-tuning, the scale and the dropout."""
    if not is_mlx(config):
        raise FormatError(f"{file}: expected mlx-lm's fields fine_tune_type and lora_parameters, got neither.")
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    given = config.get("lora_parameters")
    if kind == "full":
        raise UnsupportedError(
            f"{file}: fine_tune_type='full': the folder holds whole weights. Fuse them into a model with mlx_lm.fuse, "
            "and compare that with its base (extract_adapter)."
        )
    if not isinstance(kind, str) or kind not in _KINDS or not isinstance(given, Mapping):
        raise FormatError(
            f"{file}: expected fine_tune_type 'lora' or 'dora' and a dict lora_parameters, got {kind!r} and "
            f"{given!r:.80}."
        )
    if "lora_layers" in config and given.get("alpha", given.get("rank")) != given.get("rank"):
        raise UnsupportedError(
            f"{file}: lora_layers and alpha: a release of mlx-lm before 0.19 has written this. Before 0.15 the update "
            "was multiplied by scale · alpha / rank, since then by scale. Write num_layers for lora_layers, remove "
            "alpha, and give the scale that the adapter was trained with."
        )
    scale: Any = given.get("scale")
    dropout: Any = given.get("dropout", 0.0)
    for name, value in (("scale", scale), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{file}: lora_parameters: {name}: expected a number, got {value!r:.80}.")
    try:
        LoraConfig(r=1, lora_alpha=scale, lora_dropout=dropout, target_modules=["x"])
    except ConfigError as error:
        raise FormatError(f"{file}: lora_parameters: {error} (scale is lora_alpha / r.)") from error
    return kind, float(scale), float(dropout)


def _with_experts(file: Path, factors: Mapping[str, Factors], model: nn.Module) -> dict[str, Factors]:
    """The factors by transformers' names of experts: two parameters, of which one holds the gates above the ups."""
    modules = {name for name, _ in model.named_modules()}
    found: dict[str, Factors] = {}
    experts: dict[str, dict[str, Factors]] = {}
    for name, given in factors.items():
        match = _EXPERTS.match(name)
        if match is None or given.a.dim() != 3:
            found[_today(name, modules)] = given
            continue
        block = f"{_today(match['block'], modules)}.experts"
        if match["part"] == "down_proj":
            found[f"{block}.down_proj"] = given
        else:
            experts.setdefault(f"{block}.gate_up_proj", {})[match["part"]] = given
    for name, parts in experts.items():
        some = next(iter(parts.values()))
        pairs = [
            (part.a, part.b) if part else (some.a, torch.zeros_like(some.b))
            for part in (parts.get("gate_proj"), parts.get("up_proj"))
        ]
        if len({pair[1].shape[0] for pair in pairs}) > 1 or len({pair[0].shape[-1] for pair in pairs}) > 1:
            raise FormatError(f"{file}: the experts of {name!r} have factors of several shapes.")
        a, b = stacked(pairs)
        found[name] = Factors(a, b, some.scaling, dropout=some.dropout)
    return found


def _today(name: str, modules: Set[str]) -> str:
    """The name of a module in transformers, which has renamed Mixtral's block of experts."""
    return name if name in modules else re.sub(r"\.block_sparse_moe\b", ".mlp", name)


def _refuse_embeddings(file: Path, factors: Mapping[str, Factors], model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for name, given in factors.items():
        if isinstance(modules.get(name), nn.Embedding):
            why = _of_embedding(model, dora=given.magnitude is not None)
            if why:
                raise UnsupportedError(f"{file}: the adapter of {name!r} cannot be read: {why}")


def _of_embedding(model: nn.Module, *, dora: bool) -> str:
    if dora:
        return "mlx-lm's DoRA of an embedding has a magnitude for each token, not for each dimension."
    return _TIED if TiedEmbeddings.of(model).tied else ""


def _supported(name: str, rule: Rule, model: nn.Module) -> LoRA | DoRA:
    why = ""
    if type(rule) not in _KINDS.values():
        why = f"mlx-lm has no place for the rule {type(rule).__name__}."
    elif not isinstance(rule, LowRank) or not isinstance(rule.layout, Linear | Embedding):
        why = f"mlx-lm does not adapt a layer of layout {type(getattr(rule, 'layout', rule)).__name__}."
    elif isinstance(rule.layout, Embedding):
        why = _of_embedding(model, dora=isinstance(rule, DoRA))
    elif name.rpartition(".")[0] in TiedEmbeddings.of(model).tied:
        why = "the output layer of this model has no weight of its own in mlx-lm."
    if why:
        raise UnsupportedError(f"{name!r} cannot be written for mlx-lm: {why} {_MERGE}")
    assert isinstance(rule, LoRA | DoRA)
    if not float(rule.scaling):
        raise ParamsError(f"{name!r} has scaling 0, so it has no effect. Leave it out.")
    return rule


def _places(names: list[str], model: nn.Module) -> tuple[int, list[str]]:
    """The number of last layers that have adapters, and the names of the modules inside of a layer, or in full."""
    keys: dict[str, None] = {}
    first: dict[str, int] = {}
    for name in names:
        module = name.removesuffix(".weight")
        match = _LAYER.match(module)
        keys[match["inside"] if match else module] = None
        if match:
            first[match["list"]] = min(int(match["index"]), first.get(match["list"], int(match["index"])))
    if len(first) > 1:
        raise UnsupportedError(
            f"mlx-lm knows one list of layers, the adapters have {', '.join(map(repr, first))}. {_MERGE}"
        )
    for place, index in first.items():
        return len([*model.get_submodule(place).children()]) - index, list(keys)
    return 0, list(keys)

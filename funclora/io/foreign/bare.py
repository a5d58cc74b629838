"""The factors in a file of another program, without the model: enough to look at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from funclora._config.config import LoraConfig
from funclora._config.infer import configured
from funclora._files.atomic import parse_json
from funclora._files.safetensors import read_header
from funclora._files.snapshot import OpenFile
from funclora.errors import ConfigError, FormatError, ParamsError, UnsupportedError
from funclora.io.foreign.factors import Factors, refuse_infinite
from funclora.io.foreign.mlx import CONFIG_FILE, is_mlx, read_mlx
from funclora.rules.base import Rule
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Conv, Linear
from funclora.rules.low_rank import LoRA

# The ends of the keys of A and B: of PEFT, kohya's scripts, diffusers, and diffusers before 0.22.
_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
_ALPHA, _MAGNITUDE, _METADATA = ".alpha", ".lora_magnitude_vector", "lora_adapter_metadata"


def is_foreign(path: Path) -> bool:
    """Whether a path is a file of factors, or a folder of mlx-lm."""
    if path.is_file():
        return path.suffix == ".safetensors"
    file = path / CONFIG_FILE
    return file.is_file() and is_mlx(parse_json(file, file.read_bytes()))


def read_factors(path: Path) -> tuple[dict[str, Rule], LoraConfig]:
    """The adapters, in float32 at least, by the names that they have there, and the numbers of most of them.

    All layers are taken for linear ones or plain convolutions, which is enough to calculate with the factors.

    Raises:
        FormatError: the file is missing or broken, or is no LoRA.
        UnsupportedError: it is an adapter of another kind.
        NonFiniteError: a tensor contains NaN or infinity.
    """
    file, factors = read_mlx(path) if path.is_dir() else (path, _pairs(path))
    rules: dict[str, Rule] = {}
    for name, given in factors.items():
        refuse_infinite(file, name, given)
        a, b = (
            leaf.float().contiguous() if leaf.element_size() < 4 else leaf.contiguous() for leaf in (given.a, given.b)
        )
        if a.dim() < 2 or a.dim() != b.dim() or a.shape[0] != b.shape[1]:
            raise FormatError(f"{file}: the factors of {name!r} have the shapes {list(a.shape)} and {list(b.shape)}.")
        layout = Conv() if a.dim() > 2 else Linear()
        rule: LoRA | DoRA = LoRA(a, b, scaling=given.scaling, dropout=given.dropout, layout=layout)
        if given.magnitude is not None:
            rule = DoRA(a, b, given.magnitude.float().flatten(), scaling=given.scaling, layout=layout)
        rules[f"{name}.weight"] = rule
    return configured(rules, [LoraConfig(target_modules=list(factors))])


def _pairs(file: Path) -> dict[str, Factors]:
    opened = OpenFile(file)
    header = read_header(opened)
    for key, stored in header.items():
        if not stored.is_floating:
            raise FormatError(f"{file}: {key!r} has dtype {stored.dtype}, expected a floating-point one.")
    scalings = _scalings(file)
    left = {key: stored.read(opened.descriptor) for key, stored in header.items()}
    opened.check()
    found: dict[str, Factors] = {}
    for key in header:
        for down, up in _PAIRS:
            name = key.removesuffix(down)
            if name != key and name + up in left and key in left:
                a, b, alpha = left.pop(key), left.pop(name + up), left.pop(name + _ALPHA, None)
                scaling = _scaling(file, name, a, alpha, scalings)
                found[name] = Factors(a, b, scaling, left.pop(name + _MAGNITUDE, None))
    if left:
        raise UnsupportedError(
            f"{file}: {next(iter(left))!r} is no factor of a low-rank update with both factors in the file."
        )
    if not found:
        raise FormatError(f"{file}: there are no low-rank updates in this file.")
    return found


def _scaling(file: Path, name: str, a: Tensor, alpha: Tensor | None, scalings: dict[str, LoraConfig]) -> float:
    r = a.shape[0] if a.dim() else 0
    if alpha is not None:
        if alpha.numel() != 1 or not r:
            raise FormatError(f"{file}: {name + _ALPHA!r} has shape {list(alpha.shape)}, expected one number.")
        return float(alpha) / r
    for component, config in scalings.items():
        inside = name.removeprefix(f"{component}.")
        if inside != name or not component:
            return config.scaling(max(r, 1), config.alpha_of(inside))
    return 1.0


def _scalings(file: Path) -> dict[str, LoraConfig]:
    """The configurations that diffusers stores in its files, by component."""
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(_METADATA)
    if text is None:
        return {}
    try:
        fields = json.loads(text)
        parts: dict[str, dict[str, Any]] = {}
        for key, value in fields.items():
            component, _, field = key.rpartition(".")
            parts.setdefault(component, {})[field] = value
        return {component: LoraConfig.from_peft(part) for component, part in parts.items()}
    except (ValueError, AttributeError, RecursionError, ConfigError, ParamsError) as error:
        raise FormatError(f"{file}: its metadata ({_METADATA}) cannot be read: {error}") from error

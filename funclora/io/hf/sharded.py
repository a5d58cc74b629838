"""Reading a model's folder in pieces: each process reads its share of each weight, and none ever holds the model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

import funclora.errors
from funclora._api.arguments import check_dtype, kind_of, refuse
from funclora._config.config import LoraConfig
from funclora._config.targets import select
from funclora._files.safetensors import NAMES
from funclora._quant.packing import FourBit, Packing, Parts
from funclora._quant.quantize import check_packable, packing_of, quantized, targeted
from funclora._quant.tensor import Quantized
from funclora.distributed._gatherer import Gatherer, gathered
from funclora.distributed._shards import LEAST, Dense, Division, group_of
from funclora.errors import ConfigError, FormatError
from funclora.io.hf.checkpoint import Checkpoint, with_dtype
from funclora.io.hf.library import OPTIONS, reading, transformers
from funclora.io.hf.origin import sample
from funclora.io.hf.structure import Structure, build, only_buffers_stored
from funclora.io.hf.weights import Weights


class _Share(NamedTuple):
    """What a process has read of a weight: its parts, and the packing that they are to have."""

    division: Division
    packing: Packing
    dtype: torch.dtype
    parts: Parts


class _Read(NamedTuple):
    """What a process has read: its shares by name, tied ones under one name, and a digest of what must be the same."""

    structure: Structure
    shares: dict[str, Tensor | _Share]
    digest: str


def load_sharded(
    folder: str | os.PathLike[str],
    *,
    make: Callable[[], nn.Module] | None = None,
    group: Any = None,
    dtype: torch.dtype | None = None,
    quantize: Literal["nf4", "fp4", "int8"] | None = None,
    double_quant: bool = False,
    targets: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A transformers model whose weights are divided among processes: each reads only its share of every weight.

    The result is that of `shard` (after `quantize`) on the loaded model, bit for bit, but no process ever holds more
    than its share, and the weight that it is packing or using. A tensor that belongs to several parameters, and
    parameters that are in several tensors (experts), are read as `from_pretrained` reads them. Every process must call
    it, with the same arguments. If one cannot read its share, all raise the error.

    Args:
        folder: of a transformers model, with safetensors files.
        make: makes the model, if it is not of the class and configuration in `config.json`; for example
            `lambda: AutoModel.from_config(config, attn_implementation="eager")`. It is called where parameters take no
            memory, with `dtype` as the default dtype.
        group: a process group, or a mesh of one dimension; by default all processes.
        dtype: of the weights; by default the folder's.
        quantize: the kind of `funclora.quantize`; None leaves the weights as they are.
        double_quant: whether to quantise the scales of the blocks too (4 bits only).
        targets: the weights to quantise, as for `funclora.quantize`; by default those of all linear layers except the
            output layer.
        device: where the pieces are kept.

    Returns:
        `(model, params)`. The parameters of the model are on the meta device: it only tells `bind`, `apply` and `init`
        the structure. Tensors of fewer than 1024 elements and integers are whole in each process.

    Raises:
        FormatError: the folder contains no model, is broken, or lacks weights; or processes read different folders.
        UnsupportedError: its class is not in transformers, the weights are quantised already, or are stored in a way
            that cannot be read in parts.
        ConfigError: torch.distributed is not initialised, or an argument is wrong.
        NonFiniteError: a weight to quantise holds NaN or infinity.

    Examples:
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> model, params = load_sharded("model", quantize="nf4")  # doctest: +SKIP
        >>> load_sharded("nowhere")
        Traceback (most recent call last):
        funclora.errors.FormatError: nowhere: there is no such folder. Give the folder of a transformers model.
        >>> dist.destroy_process_group()
    """
    group = group_of(group)
    try:
        read = _read(Path(folder), make, dtype, (quantize, double_quant, targets), group, torch.device(device))
    except Exception as error:  # whatever it is, the others must not wait for this process
        _agree(Path(folder), error, group)
        raise
    _agree(Path(folder), read.digest, group)
    params = {
        name: _weight(share, group) if isinstance(share, _Share) else share for name, share in read.shares.items()
    }
    for names in read.structure.ties:
        params |= dict.fromkeys(names, params[names[0]])
    return read.structure.model, {name: params[name] for name in read.structure.shapes}


def _read(
    folder: Path,
    make: Callable[[], nn.Module] | None,
    dtype: torch.dtype | None,
    quantize: tuple[str | None, bool, Iterable[str] | None],
    group: Any,
    device: torch.device,
) -> _Read:
    """Everything that needs no other process."""
    check_dtype(dtype)
    kind, double_quant, targets = quantize
    packing = None if kind is None else packing_of(kind, double_quant)
    if packing is None and (double_quant or targets is not None):
        raise ConfigError("double_quant and targets say how to quantise; set quantize too, for example to 'nf4'.")
    with Checkpoint(folder) as checkpoint:
        dtype = dtype or _dtype_of(checkpoint)
        model: Any = _model(checkpoint, make, dtype)
        structure = Structure(folder, checkpoint.config, checkpoint.shapes, model)
        packed = {} if packing is None else dict.fromkeys(_packed(structure, targets), packing)
        weights = Weights(checkpoint, structure)
        dtypes = _dtypes(model, dtype)
        tied = {name: names[0] for names in structure.ties for name in names}
        gatherer = Gatherer(group)
        shares = {
            name: _share(weights, name, torch.Size(shape), dtypes[name], packed.get(name), gatherer, device)
            for name, shape in structure.shapes.items()
            if tied.get(name, name) == name
        }
        values = sample(checkpoint.tensors)
        checkpoint.check()
    _finish(model, folder, device)
    layout = [
        (name, str(share.packing if isinstance(share, _Share) else tuple(share.shape)), str(share.dtype))
        for name, share in shares.items()
    ]
    return _Read(structure, shares, hashlib.sha256(repr((layout, sorted(values.items()))).encode()).hexdigest())


def _model(checkpoint: Checkpoint, make: Callable[[], nn.Module] | None, dtype: torch.dtype) -> nn.Module:
    """The model, with parameters on the meta device and real buffers."""
    if make is None:
        config = with_dtype(checkpoint.config, str(dtype).removeprefix("torch."))
        return build(checkpoint.folder, config, len(checkpoint.tensors), only_buffers_stored(dtype))
    with only_buffers_stored(dtype):
        model: Any = make()
    if not isinstance(model, transformers().PreTrainedModel):
        refuse("make", "a function that returns a transformers model", make, f"It returned {kind_of(model)}.")
    if model.dtype != dtype:
        raise ConfigError(
            f"make: it made the model in {model.dtype}, but the weights are to be {dtype}. Pass dtype= to both, or set "
            "it in the configuration."
        )
    return cast(nn.Module, model)


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of a folder, as `from_pretrained` chooses it: that of its configuration, or of its first weight."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if named is None:
        return next((t.torch_dtype for t in checkpoint.tensors.values() if t.is_floating), torch.float32)
    found = getattr(torch, named, None) if isinstance(named, str) else None
    if found not in NAMES:
        raise FormatError(f"{checkpoint.folder}: config.json: dtype: expected the name of a dtype, got {named!r}.")
    return cast(torch.dtype, found)


def _packed(structure: Structure, targets: Iterable[str] | None) -> list[str]:
    """The names of the weights to quantise."""
    if targets is None:
        linear = select(structure.model, LoraConfig(target_modules="all-linear"))
        names = [name for name, target in linear.items() if target.layout is not None]
    else:
        names = targeted(dict(structure.model.named_parameters(remove_duplicate=False)), targets)
    for tied in structure.ties:
        if {*tied} & {*names} and not {*tied} <= {*names}:
            raise ConfigError(
                f"targets: {', '.join(map(repr, tied))} are one parameter. Quantise it under all of its names, or "
                "leave it out."
            )
    return names


def _dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each weight, as `from_pretrained` chooses it: some models keep a few weights in float32."""
    kept = {re.compile(name.replace("*", ".*")): wide for name, wide in model._get_dtype_plan(dtype).items()}
    return {
        name: next((wide for pattern, wide in kept.items() if pattern.search(name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def _share(
    weights: Weights,
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    packing: Packing | None,
    gatherer: Gatherer,
    device: torch.device,
) -> Tensor | _Share:
    """This process's share of a weight, or the weight if it is small."""
    n = shape.numel()
    if not dtype.is_floating_point or n < LEAST:
        small = weights.read_flat(name, 0, n).view(shape).to(device, dtype)
        return small if packing is None else quantized(name, small, packing)
    division = Division(packing or Dense(), shape, gatherer)
    values = weights.read_flat(name, division.first, division.last).to(device, dtype)
    piece = torch.cat([values, values.new_zeros(division.width - len(values))])
    if packing is None:
        return _Share(division, Dense(), dtype, (piece,))
    check_packable(name, piece)
    single = packing.plain() if isinstance(packing, FourBit) else packing
    return _Share(division, packing, dtype, single.pack(piece.view(-1, packing.unit(shape))))


def _weight(share: _Share, group: Any) -> Quantized:
    """The weight of a share. Double quantisation needs the scales of all blocks, so these are gathered for a moment."""
    parts = share.parts
    if isinstance(share.packing, FourBit) and share.packing.nested:
        count = share.division.counts(parts)[1]
        scales = gathered(parts[1], count, group)  # type: ignore[arg-type]
        _, values, *rest = share.packing.with_nested((parts[0], scales, parts[2]))
        parts = (parts[0], share.division.cut(values, 1), *rest)
    return share.division.weight(parts, share.dtype)


def _finish(model: Any, folder: Path, device: torch.device) -> None:
    """What `from_pretrained` does beside reading weights."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        with reading(folder, f"transformers cannot read generation_config.json in {folder}"):
            model.generation_config = transformers().GenerationConfig.from_pretrained(str(folder), **OPTIONS)


def _agree(folder: Path, outcome: str | Exception, group: Any) -> None:
    """Raise an error in every process if another one has failed, or has read something else.

    Args:
        folder: what is read.
        outcome: the digest of what this process has read, or its error, which the caller raises.
        group: the process group.
    """
    mine = outcome if isinstance(outcome, str) else (type(outcome).__name__, str(outcome))
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    for rank, other in enumerate(found):
        if isinstance(outcome, str) and not isinstance(other, str):
            kind = getattr(funclora.errors, other[0], FormatError)
            raise kind(f"rank {rank}: {other[1]}")
    for rank, other in enumerate(found):
        if isinstance(outcome, str) and other != found[0]:
            raise FormatError(
                f"{folder}: rank {rank} has read another model than rank 0. Every process must name a folder with the "
                "same files, and pass the same arguments."
            )

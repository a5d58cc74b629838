"""Verifying a merged checkpoint: its tensors and the outputs of its model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from funclora._bind.apply import apply
from funclora._bind.merge import merge
from funclora._bind.params import base_params
from funclora._config.outlined import original_of
from funclora._files.safetensors import DTYPES, fill
from funclora._torch.memory import free_on_host
from funclora.errors import FormatError
from funclora.io.hf.checkpoint import Checkpoint
from funclora.io.hf.library import OPTIONS, reading
from funclora.io.merge import rewrite as _rewrite
from funclora.io.merge.plan import MergePlan, Written
from funclora.io.merge.rewrite import PartRewriter
from funclora.rules.base import Rule

# Deviations that are more than rounding, in units of it. A weight that is computed wider than it is stored is rounded
# once; the sums of one that is computed as it is stored are rounded too.
_LIMITS = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 16.0, torch.float64: 16.0}
# The same for logits, relative to the largest one: the rounding errors of all weights add up through the model.
_LOGITS = {torch.float16: 0.03, torch.bfloat16: 0.2, torch.float32: 1e-3, torch.float64: 1e-3}


@dataclass(frozen=True)
class MergeVerification:
    """The result of verifying a merged checkpoint.

    Attributes:
        deviations: full name of a rewritten parameter -> the largest deviation from its value in float64, in units of
            rounding: the distance of neighbouring numbers of the dtype at the larger of base and result, for float32
            and float64, in which the sums themselves are rounded, at the largest of a block of results. 0.5 is exact
            arithmetic, rounded once.
        unchanged: number of other tensors that were compared and equal the base's, byte for byte or rounded.
        logits: the largest difference between the outputs of the merged model and of the base model with the adapters,
            relative to the largest output; None if it was not computed.
        skipped: why it was not computed; empty if it was.
    """

    deviations: Mapping[str, float]
    unchanged: int
    logits: float | None
    skipped: str


def verify(plan: MergePlan, folder: Path) -> MergeVerification:
    """Compare a merged checkpoint with its plan.

    Raises:
        FormatError: a tensor or the model's output is wrong.
    """
    deviations: dict[str, float] = {}
    unchanged = 0
    with Checkpoint(folder) as merged:
        if merged.tensors.keys() != plan.tensors.keys():
            odd = sorted(merged.tensors.keys() ^ plan.tensors.keys())
            raise FormatError(f"{folder}: its tensors are not those of the plan, for example {odd[0]!r}.")
        for written in plan.tensors.values():
            if not written.parts:
                _compare_unchanged(plan, merged, written)
                unchanged += 1
        for name, holders in plan.holders.items():
            deviations[name] = _deviation(plan, merged, name)
            dtype = DTYPES[holders[0][0].dtype]
            if not deviations[name] <= _LIMITS[dtype]:
                raise FormatError(f"{folder}: {name!r} deviates by {deviations[name]:g} units of rounding of {dtype}.")
    logits, skipped = _compare_outputs(plan, folder)
    return MergeVerification(deviations, unchanged, logits, skipped)


def _compare_unchanged(plan: MergePlan, merged: Checkpoint, written: Written) -> None:
    source, result = plan.base.tensors[written.source], merged.tensors[written.key]
    at, size = plan.base.descriptor(source.file), merged.descriptor(result.file)
    same = result.shape == source.shape
    if written.dtype == source.dtype:
        for start in range(0, source.nbytes, _CHUNK):
            n = min(_CHUNK, source.nbytes - start)
            pieces = torch.empty(n, dtype=torch.uint8), torch.empty(n, dtype=torch.uint8)
            fill(at, pieces[0], source.start + start)
            fill(size, pieces[1], result.start + start)
            same &= torch.equal(*pieces)
    else:
        n = source.shape[0] if source.shape else 1
        for first, length in _rewrite.ranges(n, math.prod(source.shape[1:])):
            base = plan.base.read(written.source, first, length).to(DTYPES[written.dtype])
            same &= bool(((base == merged.read(written.key, first, length)) | base.isnan()).all())
    if not same:
        raise FormatError(f"{result.file}: {written.key!r} differs from the base, although no adapter changes it.")


_CHUNK = 16 << 20


def _deviation(plan: MergePlan, merged: Checkpoint, name: str) -> float:
    """The largest deviation of a parameter, over all its parts."""
    rules = plan.adapters.rules(name)
    worst = 0.0
    for written, part in plan.holders[name]:
        exactly = PartRewriter(part, rules, plan.structure.shapes[name], plan.base.read, double=True)
        for first, length in exactly.blocks():
            base, wanted = exactly.dense(first, length)
            got = merged.read(written.key, part.first + first, length)
            if got.numel():
                worst = max(worst, _units(got, wanted.double(), base.double()))
    return worst


def _units(got: Tensor, wanted: Tensor, base: Tensor) -> float:
    """The largest deviation in units of the dtype's spacing (see `MergeVerification`)."""
    info = torch.finfo(got.dtype)
    scale = torch.maximum(wanted.abs(), base.abs())
    if got.dtype.itemsize >= 4:
        scale = scale.max()
    # The exponent of a power of two just below: frexp gives mantissas from 0.5 to 1.
    exponent = torch.frexp(scale).exponent.double() - 1
    spacing = torch.exp2(exponent) * info.eps
    spacing = spacing.clamp_min(info.smallest_normal * info.eps)
    return float(((got.double() - wanted).abs() / spacing).max())


# --- the model as a whole --------------------------------------------------------------------------------------


def _compare_outputs(plan: MergePlan, folder: Path) -> tuple[float | None, str]:
    """The relative difference of outputs, or why it was not computed."""
    elements = sum(math.prod(shape) for shape in plan.structure.shapes.values())
    # Both models in float32, the weights from merging several adapters, and working memory.
    needed, free = 4 * elements * (3 if len(plan.adapters.folders) > 1 else 2) * 5 // 4, free_on_host()
    if free is None:
        return None, "the amount of free memory is unknown on this system"
    if needed > free:
        return None, f"both models would need {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free"
    model: Any = original_of(plan.structure.model)
    inputs = _probe(model)
    if isinstance(inputs, str):
        return None, inputs
    cls = type(model)
    # What the base's folder lacks is random here, and the adapters replace it.
    other = {"config": model.config, "ignore_mismatched_sizes": True} if plan.base.is_fitted else {}
    base, merged = _load(cls, plan.base.folder, **other), _load(cls, folder)
    try:
        wanted = _first(_adapted(plan, base, inputs))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        return None, f"{plan.structure.name} does not accept the probe input: {error}"
    with torch.no_grad():
        got = _first(merged(**inputs))
    difference = float((got - wanted).abs().max() / wanted.abs().max())
    dtype = max((DTYPES[w.dtype] for w in plan.tensors.values() if w.parts), key=lambda dtype: torch.finfo(dtype).eps)
    if not difference <= _LOGITS[dtype]:
        raise FormatError(
            f"{folder}: the merged model's output differs by {difference:g} relative to the largest value, from the "
            "base model with the adapters."
        )
    return difference, ""


def _load(cls: Any, folder: Path, **options: Any) -> Any:
    with reading(folder, f"{folder}: transformers cannot load it"):
        return cls.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **OPTIONS, **options).eval()


def _adapted(plan: MergePlan, base: Any, inputs: dict[str, Tensor]) -> Any:
    """The output of the base model with the adapters, without any merged file."""
    params: dict[str, Tensor] = base_params(base)
    # A single adapter is applied without merging; of several, all except the last are merged in float32.
    layers: list[dict[str, Rule]] = []
    for name in plan.adapters.names:
        for i, rule in enumerate(plan.adapters.rules(name)):
            while len(layers) <= i:
                layers.append({})
            layers[i][name] = rule
    for layer in layers[:-1]:
        params = merge(params, layer)
    with torch.no_grad():
        return apply(base, params, layers[-1], **inputs)


def _first(output: Any) -> Tensor:
    """The first tensor of what a model returned: its logits, or hidden states."""
    return cast(Tensor, output[0])


def _probe(model: Any) -> dict[str, Tensor] | str:
    """A probe input for a model, or why there is none."""
    config, name = model.config, getattr(model, "main_input_name", None)
    if name == "input_ids":
        text = config.get_text_config()
        vocabulary = getattr(text, "vocab_size", None)
        if isinstance(vocabulary, int) and vocabulary > 0:
            ids = (torch.arange(16) * 7919 % vocabulary).unsqueeze(0)
            return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    if name == "pixel_values":
        size, channels = getattr(config, "image_size", None) or 64, getattr(config, "num_channels", 3)
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.arange(channels * height * width, dtype=torch.float32).mul(0.37).sin()
        return {"pixel_values": pixels.reshape(1, channels, height, width)}
    return f"{type(model).__name__} needs {name!r}, for which there is no probe input"

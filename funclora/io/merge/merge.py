"""Folders of transformers: merging adapters into a checkpoint that never is in memory as a whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from funclora._api.arguments import check_dtype, check_path, check_paths
from funclora._files.safetensors import DTYPES
from funclora._files.staging import check_out, flush_files, staged_folder
from funclora.io.hf.checkpoint import Checkpoint
from funclora.io.hf.origin import check_origin
from funclora.io.merge.plan import MergePlan
from funclora.io.merge.verify import MergeVerification
from funclora.io.merge.verify import verify as verified
from funclora.io.merge.write import write


@dataclass(frozen=True)
class MergedWeight:
    """What a merge does to one parameter.

    Attributes:
        name: its full name in the model.
        keys: the tensors of the result that hold it.
        shape: its shape.
        change: what is done to it, for people.
        before: its dtype in the base.
        after: its dtype in the result.
        nbytes: bytes of it in the result.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    change: str
    before: torch.dtype
    after: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or would do.

    Attributes:
        model: the class of the model.
        weights: the parameters that are rewritten, in the order of the model.
        unchanged: how many tensors of the result are those of the base.
        files: name -> bytes of the tensors, for each file of tensors.
        untied: parameters that were tied and now have a value of their own.
        carried: the other files that were carried over.
        skipped: files of the base that were left out, because they hold weights in another format.
        verification: what reading the result again gave; None without `verify`.
    """

    model: str
    weights: tuple[MergedWeight, ...]
    unchanged: int
    files: dict[str, int]
    untied: tuple[str, ...]
    carried: tuple[str, ...]
    skipped: tuple[str, ...]
    verification: MergeVerification | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(self.files.values())


def merge_checkpoint(
    base_dir: str | os.PathLike[str],
    adapter_dirs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    verify: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge PEFT folders into the folder of a transformers model, as a new folder that `from_pretrained` takes.

    The model is never in memory, only blocks of one weight and its factors. Weights that no adapter touches are
    copied as bytes. Each merged weight is computed in float32, or in
    float64 if any side of it is, and rounded once. The result is written under another
    name next to `out_dir` and then renamed: a process that is killed leaves no `out_dir`, and the base is only read.

    An adapter on one of several tied weights, say the embedding, gives it a value of its own: the result holds both,
    and `tie_word_embeddings` is false in its configuration.

    Args:
        base_dir: a folder with `config.json` and `model.safetensors`, or several files and their index.
        adapter_dirs: PEFT's folder, or several.
        out_dir: the folder to make; it must not exist, or be empty.
        weights: the factor of each adapter's update, else 1. Updates of LoRA add up. DoRA and weights that are trained
            in full have no part, so they take the factor 1, and no other adapter may touch the same weight.
        dtype: the dtype of every floating-point tensor of the result; else each keeps its own.
        max_shard_size: bytes of a file of tensors at most, or a text such as "5GB"; else the files are those of the
            base. A single larger tensor still makes a file of its own.
        verify: read the result again and compare every tensor with its value in float64, and the outputs of both
            models on a probe input where they fit into memory, before `out_dir` appears.
        fsync: return when the result is on the disk, and safe from a power failure; otherwise the system decides when,
            as with `cp`.
        dry_run: check everything and say what would be done, but write nothing.
        progress: called with the bytes that are written and the bytes in all.

    Returns:
        What was done.

    Raises:
        FormatError: a folder is broken, or an adapter holds a key that fits no weight.
        ConfigError: an argument is invalid, or `out_dir` is in use.
        TargetError: an adapter's configuration does not fit the model.
        UnsupportedError: the base is quantised or stored in a way that a merge cannot keep, the adapters' result would
            depend on their order, or a tie cannot be broken.
        NonFiniteError: an adapter or a merged weight holds NaN or infinity, or overflows its dtype.
        OSError: the disk is full, or something cannot be read or written.

    Examples:
        >>> merge_checkpoint("model", "adapter", "merged")  # doctest: +SKIP
        MergeReport(model='LlamaForCausalLM', ...)
        >>> merge_checkpoint("nowhere", "adapter", "merged")
        Traceback (most recent call last):
        funclora.errors.FormatError: nowhere: there is no such folder. Give that of a transformers model.
    """
    several = [adapter_dirs] if isinstance(adapter_dirs, (str, os.PathLike)) else adapter_dirs
    check_path(base_dir, "base_dir")
    check_paths(several, "adapter_dirs")
    check_path(out_dir, "out_dir")
    check_dtype(dtype)
    base, out = Path(base_dir), Path(out_dir)
    folders = [Path(folder) for folder in several]
    with contextlib.ExitStack() as stack:
        draft = None
        if dry_run:
            check_out(out, [base, *folders])
        else:
            draft = stack.enter_context(staged_folder(out, [base, *folders]))
        plan = MergePlan(stack.enter_context(Checkpoint(base)), folders, weights, dtype, max_shard_size)
        check_origin(folders, base)
        verification = None
        if draft is not None:
            write(plan, draft, progress or (lambda done, total: None))
            if verify:
                verification = verified(plan, draft)
            if fsync:
                flush_files(draft)
        return _report(plan, verification)


def _report(plan: MergePlan, verification: MergeVerification | None) -> MergeReport:
    weights = []
    for name in plan.adapters.names:
        holders = plan.holders.get(name)
        if holders is None:
            continue  # it stays tied to one that is there
        before = DTYPES[plan.base.tensors[holders[0][0].source].dtype]
        after = DTYPES[holders[0][0].dtype]
        shape = plan.structure.shapes[name]
        keys, size = tuple(w.key for w, _ in holders), torch.Size(shape).numel() * after.itemsize
        weights.append(MergedWeight(name, keys, shape, plan.adapters.words[name], before, after, size))
    return MergeReport(
        model=plan.structure.name,
        weights=tuple(weights),
        unchanged=sum(not w.parts for w in plan.tensors.values()),
        files={name: sum(plan.tensors[key].nbytes for key in keys) for name, keys in plan.files.items()},
        untied=tuple(plan.untied),
        carried=tuple(str(path) for path in plan.base.small),
        skipped=tuple(str(path) for path in plan.skipped),
        verification=verification,
    )

"""Merging adapters into transformers folders, without loading the whole checkpoint into memory."""

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
from funclora.io.hf.fitted import FittedCheckpoint
from funclora.io.hf.origin import check_origin
from funclora.io.merge.plan import MergePlan
from funclora.io.merge.verify import MergeVerification
from funclora.io.merge.verify import verify as verified
from funclora.io.merge.write import write


@dataclass(frozen=True)
class MergedWeight:
    """The change of one parameter by a merge.

    Attributes:
        name: its full name in the model.
        keys: the tensors of the result that contain it.
        shape: its shape.
        change: description of the change.
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
    """The result of a merge, or of its dry run.

    Attributes:
        model: the class of the model.
        weights: the parameters that are rewritten, in the order of the model.
        unchanged: number of tensors that are equal to the base's.
        files: name -> bytes of the tensors, for each file of tensors.
        untied: parameters that were tied and now have their own value.
        left_out: tensors of the base that the class of the adapter's head does not have.
        carried: other files that were copied.
        skipped: files of the base that were left out, because they contain weights in another format.
        verification: the result of the verification; None without `verify`.
    """

    model: str
    weights: tuple[MergedWeight, ...]
    unchanged: int
    files: dict[str, int]
    untied: tuple[str, ...]
    left_out: tuple[str, ...]
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

    Only blocks of one weight and its factors are in memory, never the whole model. Weights without an adapter are
    copied byte for byte. Each merged weight is computed in float32, or in float64 if one of its inputs is, and rounded
    once. The result is written under another name next to `out_dir` and then renamed: a killed process leaves no
    `out_dir`, and the base is only read.

    An adapter on one of several tied weights, such as the embedding, gives it its own value: the result contains both,
    and `tie_word_embeddings` is false in its configuration.

    Args:
        base_dir: a folder with `config.json` and `model.safetensors`, or several files and their index.
        adapter_dirs: PEFT's folder, or several.
        out_dir: the new folder; it must not exist, or be empty.
        weights: the factor of each adapter's update; 1 by default. LoRA updates are added. DoRA and fully fine-tuned
            weights cannot be scaled, so their factor must be 1, and no other adapter may change the same weight.
        dtype: the dtype of every floating-point tensor of the result; by default, each keeps its own.
        max_shard_size: maximum bytes of a file of tensors, or a text such as "5GB"; by default, the files are the same
            as in the base. A single larger tensor gets its own file.
        verify: before `out_dir` appears, read the result again and compare every tensor with its value in float64, and,
            if they fit into memory, the outputs of both models on a probe input.
        fsync: return when the result is on the disk, and safe from a power failure; otherwise the system decides when,
            as with `cp`.
        dry_run: check everything and report what would be done, but write nothing.
        progress: called with the number of written bytes and of all bytes.

    Returns:
        The report.

    Raises:
        FormatError: a folder is broken, or an adapter contains a key that fits no weight.
        ConfigError: an argument is invalid, or `out_dir` is in use.
        TargetError: an adapter's configuration does not fit the model.
        UnsupportedError: the base is quantised or stored in a way that a merge cannot reproduce, the result would
            depend on the order of the adapters, or a tie cannot be removed.
        NonFiniteError: an adapter or a merged weight contains NaN or infinity, or overflows its dtype.
        OSError: the disk is full, or something cannot be read or written.

    Examples:
        >>> merge_checkpoint("model", "adapter", "merged")  # doctest: +SKIP
        MergeReport(model='LlamaForCausalLM', ...)
        >>> merge_checkpoint("nowhere", "adapter", "merged")
        Traceback (most recent call last):
        funclora.errors.FormatError: nowhere: there is no such folder. Give the folder of a transformers model.
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
        plan = MergePlan(stack.enter_context(FittedCheckpoint(base, folders)), folders, weights, dtype, max_shard_size)
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
            continue  # it stays tied to one that is included
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
        left_out=tuple(plan.base.left_out),
        carried=tuple(str(path) for path in plan.base.small),
        skipped=tuple(str(path) for path in plan.skipped),
        verification=verification,
    )

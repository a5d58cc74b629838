"""Writing a planned merge: every tensor to its position in its file, by several threads, in any order."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from funclora._files.safetensors import DTYPES, Stored, copy_range, spill
from funclora.io.hf.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, OnProgress
from funclora.io.hf.structure import Part
from funclora.io.merge.plan import MergePlan, Written
from funclora.io.merge.rewrite import PartRewriter, cast, ranges, rounded

Job = Callable[[], int]  # does a part of the work and returns its bytes of the result

_COPY = 64 << 20  # bytes that a job copies
_COMPUTE = 16 << 20  # bytes that a job computes


def write(plan: MergePlan, folder: Path, progress: OnProgress) -> None:
    """Write the result of a plan into an empty folder. As with `cp`, the system decides when the data reaches the disk.

    Raises:
        NonFiniteError: a merged weight contains NaN or infinity, or overflows its dtype.
        OSError: the disk is full, or something cannot be read or written.
    """
    drafts = plan.drafts(folder)
    total = sum(draft.size for draft in drafts.values())
    free = shutil.disk_usage(folder).free
    if free < total:
        raise OSError(errno.ENOSPC, f"{total:,} bytes are needed and {free:,} are free", str(folder))
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[int, Stored]] = {}
        files = {}
        for name, draft in drafts.items():
            file = stack.enter_context((folder / name).open("wb"))
            files[folder / name] = file
            file.write(draft.head)
            file.flush()
            os.ftruncate(file.fileno(), draft.size)
            places |= {key: (file.fileno(), stored) for key, stored in draft.places.items()}
        done = sum(len(draft.head) for draft in drafts.values())
        for nbytes in _run(_jobs(plan, places)):
            done += nbytes
            progress(done, total)
        _small_files(plan, folder)
        plan.base.check()
        for path, file in files.items():
            if not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise FileNotFoundError(errno.ENOENT, "it was replaced by another file meanwhile", str(path))


def _small_files(plan: MergePlan, folder: Path) -> None:
    for path in plan.base.small:
        for parent in reversed(path.parents[:-1]):  # not the folder itself: if it is gone, so are the tensors
            (folder / parent).mkdir(exist_ok=True)
        plan.base.copy(path, folder / path)
    if plan.config != plan.base.stored_config:
        text = json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    index = plan.index()
    if index is not None:
        (folder / INDEX_FILE).write_text(index, encoding="utf-8")


def threads() -> int:
    """Number of cores that this process may use, up to a number that no disk can supply with data."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def _run(jobs: Iterator[Job]) -> Iterator[int]:
    """Run the jobs in threads, few at a time, and yield their results; the first exception ends them all."""
    n = threads()
    # One torch thread for each of our threads, since the blocks are small.
    with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending: set[Future[int]] = set()
        try:
            for job in jobs:
                pending.add(pool.submit(job))
                if len(pending) > n:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in pending:
                future.cancel()


def _jobs(plan: MergePlan, places: dict[str, tuple[int, Stored]]) -> Iterator[Job]:
    """All jobs. As many files as there are threads are written side by side: two threads do not share a file's lock."""
    base = plan.base
    runs = _Runs(base)
    by_file: dict[int, list[Iterable[Job]]] = {}
    for key, written in plan.tensors.items():
        target, place = places[key]
        source = base.tensors[written.source]
        if not written.parts and written.dtype == source.dtype:
            runs.add(source, target, place)
            continue
        for first, length in _gaps(written, source):
            by_file.setdefault(target, []).append(_casts(base, source, first, length, target, place))
    for target, copies in runs.jobs().items():
        by_file.setdefault(target, []).append(copies)
    for name in plan.adapters.names:
        holders = plan.holders.get(name, ())
        for target in dict.fromkeys(places[written.key][0] for written, _ in holders):
            some = [(written, part) for written, part in holders if places[written.key][0] == target]
            by_file.setdefault(target, []).append(_updates(plan, name, some, places))
    yield from _in_turn([itertools.chain.from_iterable(each) for each in by_file.values()], threads())


def _in_turn(files: list[Iterator[Job]], n: int) -> Iterator[Job]:
    """The jobs of n files in turn; when a file has no more, the next one takes its place."""
    following = iter(files)
    active = deque(itertools.islice(following, n))
    while active:
        file = active.popleft()
        for candidate in itertools.chain([file], following):
            job = next(candidate, None)
            if job is not None:
                active.append(candidate)
                yield job
                break


def _updates(
    plan: MergePlan, name: str, holders: Sequence[tuple[Written, Part]], places: dict[str, tuple[int, Stored]]
) -> Iterator[Job]:
    """The jobs of one parameter in one file. Its rules are read when the first of them is asked for."""
    rules = plan.adapters.rules(name)
    for written, part in holders:
        double = written.dtype == "F64"  # a base or an adapter in float64 is computed so in any case
        rewriter = PartRewriter(part, rules, plan.structure.shapes[name], plan.base.read, double=double)
        yield from _rewrites(rewriter, part, name, *places[written.key])


def _rewrites(rewriter: PartRewriter, part: Part, name: str, target: int, place: Stored) -> Iterator[Job]:
    dtype = DTYPES[place.dtype]
    row = place.nbytes // place.shape[0] if place.shape else place.nbytes

    def job(blocks: list[tuple[int, int]]) -> Job:
        def rewrite() -> int:
            with torch.inference_mode():
                for first, length in blocks:
                    value = rounded(rewriter.dense(first, length)[1], dtype, name)
                    spill(target, value, place.start + (part.first + first) * row)
            return sum(length for _, length in blocks) * row

        return rewrite

    batch: list[tuple[int, int]] = []
    for block in rewriter.blocks():
        batch.append(block)
        if sum(length for _, length in batch) * row >= _COMPUTE:
            yield job(batch)
            batch = []
    if batch:
        yield job(batch)


def _gaps(written: Written, source: Stored) -> list[tuple[int, int]]:
    """The slices of a tensor that no rewritten part covers."""
    n = source.shape[0] if source.shape else 1
    gaps, at = [], 0
    for part in sorted(written.parts, key=lambda part: part.first):
        if part.first > at:
            gaps.append((at, part.first - at))
        at = part.first + (part.shape[0] if part.shape else 1)
    return [*gaps, (at, n - at)] if at < n else gaps


def _casts(base: Checkpoint, source: Stored, first: int, length: int, target: int, place: Stored) -> Iterator[Job]:
    """Slices of which at most the dtype changes."""
    dtype = DTYPES[place.dtype]
    n = source.shape[0] if source.shape else 1
    row = place.nbytes // n if n else 0

    def job(begin: int, count: int) -> Job:
        def change() -> int:
            spill(target, cast(base.read(source.key, begin, count), dtype, source.key), place.start + begin * row)
            return count * row

        return change

    for begin, count in ranges(length, row // dtype.itemsize):
        yield job(first + begin, count)


class _Runs:
    """Tensors that are copied unchanged; neighbours in both files are joined."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._pieces: list[tuple[Path, int, int, int, int]] = []  # file, start, target, at, nbytes

    def add(self, source: Stored, target: int, place: Stored) -> None:
        self._pieces.append((source.file, source.start, target, place.start, source.nbytes))

    def jobs(self) -> dict[int, Iterator[Job]]:
        """For each file that is written, the jobs that copy."""
        joined: dict[int, list[tuple[Path, int, int, int]]] = {}
        for file, start, target, at, nbytes in sorted(self._pieces, key=lambda piece: (piece[2], piece[3])):
            pieces = joined.setdefault(target, [])
            if pieces:
                last, begin, where, size = pieces[-1]
                if file == last and (begin + size, where + size) == (start, at):
                    pieces[-1] = (file, begin, where, size + nbytes)
                    continue
            pieces.append((file, start, at, nbytes))
        return {target: self._copies(target, pieces) for target, pieces in joined.items()}

    def _copies(self, target: int, pieces: list[tuple[Path, int, int, int]]) -> Iterator[Job]:
        for file, start, at, nbytes in pieces:
            for offset in range(0, nbytes, _COPY):
                yield self._job(file, start + offset, target, at + offset, min(_COPY, nbytes - offset))

    def _job(self, file: Path, start: int, target: int, at: int, nbytes: int) -> Job:
        source = self._base.descriptor(file)

        def copy() -> int:
            copy_range(source, start, target, at, nbytes)
            return nbytes

        return copy

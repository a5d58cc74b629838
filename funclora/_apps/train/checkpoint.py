"""A run on disk. If it is killed at any moment, its folder contains the last complete checkpoint.

run.json                            what the run is: settings, digests of data and base. With it the folder holds a run
checkpoints/00000040.safetensors    after step 40: adapters, optimizer, generators; metadata: progress, checksum
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import reprlib
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funclora._apps.train.reading import as_toml
from funclora._apps.train.settings import RUN_FILE, Settings
from funclora._files.atomic import read_json, replace_files
from funclora._files.locks import claimed_folder
from funclora._files.seal import BLANK, is_intact, sealed
from funclora._files.typed import as_type
from funclora.distributed import _ranks as ranks
from funclora.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from torch import Tensor

RUN, CHECKPOINTS, METRICS = "run.json", "checkpoints", "metrics.jsonl"

# Settings that may differ when a run is resumed. Paths are not compared; the contents of the files are.
_FREE = {field.name for field in fields(Settings) if field.metadata["group"] == "Output"} | {
    "model",
    "shard",
    "adapter",
    "reference",
    "final",
    "data",
    "validation",
    "chat_template",
    "sample",
    "sample_tokens",
}
LENGTH = ("steps", "epochs")  # may differ too: the run then goes on to another end


@dataclass
class RunProgress:
    """The progress of a run: its state without tensors.

    Attributes:
        step: number of optimizer steps taken.
        evaluated: the last step that was evaluated; -1 before the first.
        best: step and loss (or other metric) of the best evaluation.
        waited: number of evaluations since then.
        pending: loss, gradient norm and what is watched of each step since the last line of metrics.jsonl.
        metrics: size of metrics.jsonl in bytes.
        tokens: number of tokens trained on.
        seconds: duration of the steps.
        stopped: why it ended; empty if it has not ended.
    """

    step: int = 0
    evaluated: int = -1
    best: tuple[int, float] | None = None
    waited: int = 0
    pending: list[list[float]] = field(default_factory=list)
    metrics: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stopped: str = ""


class DamagedError(FormatError):
    """A file is not what was written into it."""


class Run:
    """The folder of one run, from `opened`.

    Attributes:
        folder: where it is.
        id: a unique name.
        last: the step of the last checkpoint; None before the first.
        before: with `begin`, the settings of the run so far if it had another length; otherwise None.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.out
        self.id = uuid.uuid4().hex
        steps = self.steps()
        self.last = steps[-1] if steps else None
        self.before: Settings | None = None
        self._content = ""

    def file(self, step: int) -> Path:
        """The checkpoint after a step."""
        return self.folder / CHECKPOINTS / f"{step:08d}.safetensors"

    def begin(self, digests: Mapping[str, str]) -> None:
        """Check that the run's settings and digests are the same as before, except for its length.

        Args:
            digests: name -> digest of everything else that determines the outcome.

        Raises:
            ConfigError: the run in the folder has other settings or digests.
            FormatError: run.json is broken.
        """
        given = {"settings": {k: v for k, v in plain(self.settings).items() if k not in _FREE}, "digests": {**digests}}
        file = self.folder / RUN
        if not file.exists():
            self._content = json.dumps({"id": self.id, **given}, indent=1) + "\n"
            return
        stored = read_json(file)
        self.id = as_type(str, stored.get("id"), f"{file}: id")
        settings = as_type(dict[str, Any], stored.get("settings"), f"{file}: settings")
        known = as_type(dict[str, Any], stored.get("digests"), f"{file}: digests")
        differ = [
            f"{key} = {reprlib.repr(settings.get(key))} there and {given['settings'].get(key)!r} here"
            for key in {**settings, **given["settings"]}
            if key not in LENGTH and settings.get(key) != given["settings"].get(key)
        ] + [f"other {key} than there" for key in {**known, **digests} if known.get(key) != digests.get(key)]
        if differ:
            raise ConfigError(
                f"resume: the run in {self.folder} differs: {'; '.join(differ)}. Give its original settings "
                "and files, or another --out."
            )
        steps = as_type(int | None, settings.get("steps"), f"{file}: steps")
        epochs = as_type(float, settings.get("epochs"), f"{file}: epochs")
        if (steps, epochs) != (self.settings.steps, self.settings.epochs):
            self.before = replace(self.settings, steps=steps, epochs=epochs)
            self._content = json.dumps({"id": self.id, **given}, indent=1) + "\n"

    def describe(self) -> None:
        """Write the run's settings and digests, if it is new or has another length than before."""
        if self._content:
            toml = as_toml(self.settings)
            replace_files(self.folder, {RUN_FILE: _writer(toml), RUN: _writer(self._content)})

    def save(self, progress: RunProgress, tree: Any) -> None:
        """Write a checkpoint atomically, and remove old checkpoints.

        Args:
            progress: the progress of the run.
            tree: tensors by any structure.

        Raises:
            OSError: it cannot be written; earlier checkpoints are unchanged.
        """
        from safetensors.torch import save

        from funclora._torch.pytree import keyed_copies

        file = self.file(progress.step)
        content = sealed(save(keyed_copies(tree), {"progress": json.dumps(asdict(progress)), **BLANK}))
        try:
            replace_files(file.parent, {file.name: _writer(content)})
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error}: the checkpoint of step {progress.step} cannot be written; "
                f"{self.state()}, and --resume continues from it",
                str(file),
            ) from error
        self.last = progress.step
        self.prune(progress)

    def set_aside(self, step: int) -> Path:
        """Give a damaged checkpoint another name, which is returned: it counts no more, and can be looked at."""
        aside = self.file(step).with_suffix(".damaged")
        self.file(step).replace(aside)
        return aside

    def prune(self, progress: RunProgress) -> None:
        """Remove old checkpoints."""
        kept = {*self.steps()[-self.settings.keep :], progress.best[0] if progress.best else progress.step}
        for step in self.steps():
            if step not in kept:
                self.file(step).unlink(missing_ok=True)

    def load(self, step: int, like: Any) -> tuple[RunProgress, Any]:
        """The progress and the tree of a checkpoint.

        Args:
            step: which.
            like: a tree of the same structure, shapes, dtypes and devices.

        Raises:
            DamagedError: the file is not what was written.
            FormatError: it is not a checkpoint of such a tree.
        """
        import optree
        from safetensors import SafetensorError
        from safetensors.torch import load

        from funclora._torch.pytree import leaf_keys

        file = self.file(step)
        hint = "Remove it to continue from the checkpoint before it, if there is one"
        broken = f"{file}: this is not a checkpoint, or it is broken"
        leaves: list[Tensor]
        leaves, spec = optree.tree_flatten(like)
        try:
            content = file.read_bytes()
            if not is_intact(content):
                raise DamagedError(f"{file}: this is not what was written: its checksum does not match. {hint}.")
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            progress, tensors = _progress(header["__metadata__"]["progress"], step, broken), load(content)
        except OSError as error:
            raise DamagedError(f"{file}: it cannot be read: {error.strerror or error}. {hint}.") from error
        except DamagedError:
            raise
        except FormatError as error:
            raise FormatError(f"{error} {hint}.") from error
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"{broken}: {' '.join(str(error).split())}. {hint}.") from error
        keys = leaf_keys(spec)
        if {*keys} != {*tensors}:
            odd = sorted({*keys} ^ {*tensors})
            raise FormatError(f"{file}: expected other tensors than are there: {', '.join(odd[:5])}. {hint}.")
        for key, leaf in zip(keys, leaves, strict=True):
            got = tensors[key]
            if got.shape != leaf.shape or got.dtype != leaf.dtype:
                raise FormatError(
                    f"{file}: {key}: expected {leaf.dtype} {list(leaf.shape)}, got {got.dtype} {list(got.shape)}. "
                    f"{hint}."
                )
        return progress, spec.unflatten([tensors[key].to(leaf.device) for key, leaf in zip(keys, leaves, strict=True)])

    def state(self) -> str:
        """A description of the last good checkpoint."""
        if self.last is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.file(self.last)}"

    def steps(self) -> list[int]:
        """The steps of the existing checkpoints, in order."""
        files = (self.folder / CHECKPOINTS).glob("*.safetensors")
        return sorted(int(file.stem) for file in files if file.stem.isdecimal())


class Follower(Run):
    """The folder of a run for a process that writes nothing into it: another one does, and says what is there."""

    def begin(self, digests: Mapping[str, str]) -> None:
        """Nothing: the first process checks."""

    def describe(self) -> None:
        """Nothing."""

    def save(self, progress: RunProgress, tree: Any) -> None:
        """Nothing; the first process saves."""
        self.last = progress.step

    def prune(self, progress: RunProgress) -> None:
        """Nothing."""


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Run]:
    """The folder of a run, locked for other processes; of those that torchrun started, the first has it.

    To be entered before anything is loaded or written, so that most problems with the folder are found at once.

    Raises:
        ConfigError: `settings.out` cannot be written to; another process uses it; it contains a run and
            `resume` is not set; `resume` is set and it contains none.
    """
    folder = settings.out
    if not ranks.is_first():
        ranks.meet()
        if not folder.is_dir():
            raise ConfigError(f"out: process {ranks.rank()} sees no {folder}. Give a folder that all machines share.")
        yield Follower(settings)
        return
    busy = ConfigError(f"out: another process is using {folder}. Wait for it to end, or use another folder.")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(claimed_folder(folder, busy))
            _check(settings)
            probe = folder / f".{uuid.uuid4().hex}.tmp"
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"out: {folder} cannot be written to: {error.strerror or error}. Give another folder with --out."
            ) from error
        for parent in (folder, folder / CHECKPOINTS):
            for draft in parent.glob(".*.tmp"):  # of a process that was killed
                draft.unlink(missing_ok=True)
        ranks.meet()
        yield Run(settings)


def _check(settings: Settings) -> None:
    """Raise `ConfigError` unless the contents of the folder agree with `resume`."""
    folder = settings.out
    there = (folder / RUN).exists()
    if there and not settings.resume:
        raise ConfigError(f"out: {folder} contains a run. Continue it with --resume, or use another folder.")
    if not there:
        for own in (CHECKPOINTS, METRICS):
            if (folder / own).exists():
                raise ConfigError(
                    f"out: {folder} contains {own}, but no {RUN} that describes its run. Use another folder."
                )
    if not there and settings.resume:
        raise ConfigError(f"resume: {folder} contains no run to continue. Start one without --resume, or check --out.")


def fingerprint(params: Mapping[str, Tensor]) -> str:
    """A cheap digest of weights: names, shapes, dtypes and a sample of the values of each tensor."""
    import torch

    from funclora._quant.tensor import Quantized
    from funclora.distributed._shards import whole_parts

    digest = hashlib.sha256()
    for name, weight in params.items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        for tensor in whole_parts(weight) if isinstance(weight, Quantized) else (weight,):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                flat = tensor.detach().reshape(-1)
                sample = flat[:: max(1, len(flat) // 256)].cpu().contiguous()
                digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tree_fingerprint(tree: Any) -> str:
    """The same of the tensors of any structure."""
    import optree

    return fingerprint({str(i): leaf for i, leaf in enumerate(optree.tree_leaves(tree))})


def continued(settings: Settings) -> Settings:
    """The settings; if torchrun started the run again, those that continue it."""
    there = ranks.is_restarted() and (settings.out / RUN).exists()
    return replace(settings, resume=settings.resume or ranks.from_first(there))


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values."""
    raw: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    return raw


def _progress(text: str, step: int, where: str) -> RunProgress:
    """The progress in a checkpoint of a step; a `FormatError` if there is none."""
    progress: RunProgress = as_type(RunProgress, json.loads(text), where)
    if progress.step != step:
        raise FormatError(f"{where}: it is of step {progress.step}, expected {step}.")
    if min(progress.step, progress.waited, progress.metrics, progress.tokens) < 0:
        raise FormatError(f"{where}: step, waited, metrics and tokens are 0 at least.")
    return progress


def _writer(content: str | bytes) -> Any:
    return partial(_write, content=content.encode() if isinstance(content, str) else content)


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)

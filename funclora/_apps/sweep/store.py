"""A search on disk. If it is killed at any moment, the folder contains the last complete state.

sweep.json        the configuration, which later runs in the folder must agree with
state.json        how far each member is; names the files with its tensors. Its renaming is the commit
before.json       the state before, which is gone on from if something of the last one is damaged
state/*.safetensors
results.jsonl     one line for each member and evaluation
"""

from __future__ import annotations

import contextlib
import json
import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from funclora._files.atomic import replace_files
from funclora._files.locks import claimed_folder
from funclora._files.names import file_inside
from funclora._files.seal import BLANK, CHECKSUM, is_intact, sealed
from funclora._files.typed import as_type
from funclora.distributed import _ranks as ranks
from funclora.errors import ConfigError, FormatError, FuncloraWarning

CONFIG, STATE, BEFORE, RESULTS = "sweep.json", "state.json", "before.json", "results.jsonl"
LIVE, HALVED, NOT_FINITE, STOPPED = STATUSES = ("live", "halved", "not finite", "stopped")


@dataclass
class MemberProgress:
    """The progress of a member.

    Attributes:
        step: steps taken.
        status: of `LIVE`, `HALVED` (dropped at a rung), `NOT_FINITE` and `STOPPED` (no improvement any more).
        loss: held-out loss at the last evaluation.
        file: the file with its tensors, if they are still needed.
        best_step: the evaluation with the lowest loss.
        best_loss: this loss.
        best_file: the file with the tensors of then, if they are kept.
        waited: evaluations since then.
        metrics: other held-out scores at the last evaluation, such as "accuracy".
    """

    step: int = 0
    status: str = LIVE
    loss: float | None = None
    file: str | None = None
    best_step: int | None = None
    best_loss: float | None = None
    best_file: str | None = None
    waited: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def files(self) -> set[str]:
        """The files with its tensors."""
        return {name for name in (self.file, self.best_file) if name is not None}


@dataclass
class State:
    """The state of a search between two commits, without tensors.

    Attributes:
        members: by id.
        size: members in a population; None before it was measured.
        budget: the `--memory` that the size was measured for.
        rung: number of rungs so far.
        files: tensor files written so far.
        lines: results written so far.
        done: whether everything is written.
    """

    members: dict[int, MemberProgress]
    size: int | None = None
    budget: int | None = None
    rung: int = 0
    files: int = 0
    lines: int = 0
    done: bool = False
    records: list[dict[str, Any]] = field(default_factory=list)


def claimed(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keep other processes out of a search's folder; to be entered before a `Store` is made, which writes there."""
    if not ranks.is_first():
        return contextlib.nullcontext()
    busy = ConfigError(f"--out: another process is using {folder}. Wait for it to end, or use another folder.")
    return claimed_folder(folder, busy)


class Store:
    """The folder of one search."""

    def __init__(self, folder: Path, config: Mapping[str, Any], n: int) -> None:
        """Open a folder: start a search, or continue the one in it.

        Raises:
            ConfigError: the folder has a search with another configuration.
            FormatError: its files are broken.
        """
        self.folder = folder
        self.tensors = folder / "state"
        self._n = n
        given: dict[str, Any] = json.loads(json.dumps(config))  # as it will be read again
        if (folder / CONFIG).exists():
            _agree(folder, _read(folder / CONFIG), given)
        else:
            replace_files(folder, {CONFIG: _writer(_json(given))})
        self.state = State({i: MemberProgress() for i in range(n)})
        self._last: bytes | None = None  # what state.json holds
        self._before: set[str] = set()  # files with tensors of the state before
        self._load()
        self._sweep_up()

    def _load(self) -> None:
        """Take up the last state that is intact together with its files."""
        damaged: list[FormatError] = []
        for file in (self.folder / STATE, self.folder / BEFORE):
            if not file.exists():
                continue
            try:
                self.state, self._last = self._read_state(file), file.read_bytes()
            except FormatError as error:
                damaged.append(error)
            else:
                break
        if damaged and self._last is None:
            raise damaged[0]
        for why in damaged:
            warnings.warn(f"{why} The search goes on from the state before it.", FuncloraWarning, stacklevel=3)
        if not damaged and (self.folder / BEFORE).exists():
            self._before = _named((self.folder / BEFORE).read_bytes())

    def _read_state(self, file: Path) -> State:
        raw = _read(file)
        if not is_intact(file.read_bytes()):
            raise FormatError(f"{file} is damaged: its checksum does not match. Use another --out.")
        try:
            del raw[CHECKSUM]
            state: State = as_type(State, {**raw, "records": []}, str(file))
            self._check(state)
            with (self.folder / RESULTS).open(encoding="utf-8") as results:
                lines = [json.loads(line) for line, _ in zip(results, range(state.lines), strict=False)]
            state.records = [self._record(line, state) for line in lines]
        except FormatError as error:
            raise FormatError(f"{error} Use another --out.") from error
        except (ValueError, RecursionError, FileNotFoundError) as error:
            raise FormatError(f"{file} is broken: {error} Use another --out.") from error
        if len(state.records) != state.lines:
            raise FormatError(f"{self.folder / RESULTS} has lost lines. Use another --out.")
        for name in {name for member in state.members.values() for name in member.files}:
            tensors = file_inside(self.tensors, name, f"{file}: file")
            if not tensors.is_file() or not is_intact(tensors.read_bytes()):
                raise FormatError(f"{tensors} is missing or damaged: its checksum does not match. Use another --out.")
        return state

    def _check(self, state: State) -> None:
        """Raise `ValueError` for a state that no search has."""
        if {*state.members} != {*range(self._n)}:
            raise ValueError(f"members: expected those from 0 to {self._n - 1}.")
        members = state.members.values()
        counts = [count for member in members for count in (member.step, member.waited, member.best_step or 0)]
        numbers = [state.rung, state.files, state.lines, *counts]
        if min(numbers) < 0 or (state.size is not None and state.size < 1):
            raise ValueError("a number is negative.")
        for i, member in state.members.items():
            if member.status not in STATUSES:
                raise ValueError(f"members[{i}]: {reprlib.repr(member.status)} is no status.")
            if member.status == LIVE and member.step and member.file is None and not state.done:
                raise ValueError(f"members[{i}]: its tensors are in no file.")

    def _record(self, line: Any, state: State) -> dict[str, Any]:
        """A line of the results."""
        where = str(self.folder / RESULTS)
        record: dict[str, Any] = as_type(dict[str, Any], line, where)
        if as_type(int, record.get("member"), f"{where}: member") not in state.members:
            raise ValueError(f"{where}: there is no member {record['member']}.")
        as_type(int, record.get("step"), f"{where}: step")
        for name in ("heldout_loss", "train_loss"):
            as_type(float | None, record.get(name), f"{where}: {name}")
        return record

    def put(self, tensors: Mapping[int, Mapping[str, Tensor]], number: int) -> str:
        """Write tensors by member into a new file, which belongs to the search with the next commit.

        Args:
            tensors: by member.
            number: of the file; those below `state.files` exist.

        Returns:
            The name of the file.
        """
        name = f"{number:06d}.safetensors"
        flat = {f"{i}/{key}": tensor for i, own in tensors.items() for key, tensor in own.items()}
        replace_files(self.tensors, {name: _writer(sealed(save(flat, dict(BLANK))))})
        return name

    def commit(self) -> None:
        """Commit the state, from which a later run continues."""
        state = self.state
        state.lines = len(state.records)
        lines = "".join(json.dumps(record) + "\n" for record in state.records)
        raw = {**BLANK, **asdict(state)}
        del raw["records"]
        content = sealed(_json(raw).encode())
        # Results first: the next run cuts off lines beyond those in the state.
        before = {} if self._last is None or state.done else {BEFORE: _writer(self._last)}
        replace_files(self.folder, {RESULTS: _writer(lines), **before, STATE: _writer(content)})
        if state.done:  # nothing is to be gone on from
            (self.folder / BEFORE).unlink(missing_ok=True)
        self._before = _named(self._last) if before and self._last is not None else set()
        self._last = content
        self._sweep_up()

    def load(self, i: int, name: str) -> dict[str, Tensor]:
        """The tensors of a member in a file."""
        prefix = f"{i}/"
        try:
            with safe_open(str(self.tensors / name), framework="pt") as file:
                return {key[len(prefix) :]: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{self.tensors / name} cannot be read: {' '.join(str(error).split())}. Use another --out."
            ) from error

    def _sweep_up(self) -> None:
        """Remove files that no commit refers to: old tensors, and drafts of killed processes."""
        used = {name for member in self.state.members.values() for name in member.files} | self._before
        for file in [*self.tensors.glob("*.safetensors"), *self.tensors.glob(".*.tmp"), *self.folder.glob(".*.tmp")]:
            if file.name not in used:
                file.unlink(missing_ok=True)


class Follower(Store):
    """The folder of a search for a process that commits nothing: the first one does."""

    def commit(self) -> None:
        """Nothing: the state is the same in all processes."""
        self.state.lines = len(self.state.records)

    def _sweep_up(self) -> None:
        """Nothing."""


def opened(folder: Path, config: Mapping[str, Any], n: int) -> Store:
    """The folder of a search; of several processes, the first has it. As `Store`."""
    with ranks.first_alone():
        store = (Store if ranks.is_first() else Follower)(folder, config, n)
    ranks.meet()  # before anything changes there
    return store


def _agree(folder: Path, stored: dict[str, Any], config: dict[str, Any]) -> None:
    for key in [*stored, *(key for key in config if key not in stored)]:
        if stored.get(key) != config.get(key):
            raise ConfigError(
                f"--out: {folder} has a search with {key} = {_short(stored.get(key))}, this one has "
                f"{_short(config.get(key))}. Give the same options to continue it, or another folder."
            )


def _named(state: bytes) -> set[str]:
    """The files with tensors that a state names."""
    try:
        members = json.loads(state)["members"].values()
        files = [member[key] for member in members for key in ("file", "best_file")]
        return {str(file) for file in files if file is not None}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()  # it is damaged, and will not be gone on from


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not JSON: {error}. Use another --out.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{file}: expected an object. Use another --out.")
    return content


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _writer(content: str | bytes) -> Any:
    return partial(_write, content=content.encode() if isinstance(content, str) else content)


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)

"""Any bytes in the state of a run or of a search: it goes on, or there is an error that names a file of it."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import BYTES, JSON, Edit, damaged, edited, little_memory, with_header
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_runs import byte_base, data, fresh
from tiny_runs import settings as run_settings

import funclora as fl
from funclora._apps.sweep.search import Search
from funclora._apps.sweep.settings import SearchSettings
from funclora._apps.sweep.space import Space
from funclora._apps.sweep.store import Store
from funclora._apps.sweep.task import Task
from funclora._apps.train.base import Base, ByteTokenizer
from funclora._apps.train.checkpoint import opened
from funclora._apps.train.examples import Data, Example
from funclora._apps.train.journal import Journal
from funclora._apps.train.loop import train
from funclora._apps.train.settings import CAUSAL, Settings
from funclora._files.seal import BLANK, CHECKSUM, sealed
from funclora.demo.model import ByteLM, ByteLMConfig
from funclora.errors import FuncloraError

hostile = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = b"the quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 20
RUN = ["run.json", "metrics.jsonl", "checkpoints/00000004.safetensors"]
SEARCH = ["sweep.json", "state.json", "results.jsonl", "state/000000.safetensors"]


class StoppedError(Exception):
    """The run or search is as far as it should be."""


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    model = ByteLM(ByteLMConfig(dim=16, layers=1, heads=2, hidden=24, context=12)).eval().requires_grad_(False)
    rows = [Example([*TEXT[i : i + 12]], [*TEXT[i : i + 12]], (12,), f"t:{i}") for i in range(0, len(TEXT) - 12, 12)]
    base = Base("toy", model, fl.base_params(model), ByteTokenizer(), CAUSAL, 12)
    return Task(base, Data(rows, rows[:5]), Settings(steps=4, batch=2, warmup=1.0), rows[:5])


def go_on(folder: Path) -> None:
    """Resume the run."""
    given = run_settings(folder, steps=5, eval_every=2, save_every=2, keep=9, dropout=0.0, resume=True)
    base = byte_base()
    with opened(given) as run, Journal(given, quiet=True) as journal:
        train(base, fresh(base, given), data(), given, journal, run)


def search_on(folder: Path, task: Task, stop: bool = False) -> None:
    members = Space(lr="1e-3,1e-2", rank="2", targets="q_proj").grid()
    given = SearchSettings(steps=4, every=2, halving=0, budget=2**40)
    store = Store(folder, {"members": [member.values for member in members]}, 2)

    def observe(status: Any) -> None:
        if stop and store.state.lines:
            raise StoppedError("after the first evaluation")

    search = Search(task, members, given, store, observe)
    if not store.state.done:
        search.run()


@pytest.fixture(scope="module")
def whole(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after four of five steps, and a search after one of two evaluations."""
    root = tmp_path_factory.mktemp("whole")
    given = run_settings(root / "run", steps=5, eval_every=2, save_every=2, keep=9, dropout=0.0)
    base = byte_base()
    with opened(given) as run, Journal(given, quiet=True) as journal:
        train(base, fresh(base, given), data(), given, journal, run)
    (root / "run" / "checkpoints" / "00000005.safetensors").unlink()
    with pytest.raises(StoppedError, match="after the first"):
        search_on(root / "search", task, stop=True)
    for kind, files in (("run", RUN), ("search", SEARCH)):
        assert all((root / kind / file).is_file() for file in files)
    return root


@pytest.fixture
def attempt(whole: Path, task: Task, tmp_path: Path) -> Callable[..., str]:
    """Goes on with one of the files replaced; what is said, empty if it went on."""

    def run(kind: str, name: str, content: bytes) -> str:
        folder = tmp_path / kind
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole / kind, folder)
        (folder / name).write_bytes(content)
        with warnings.catch_warnings(), little_memory():
            warnings.simplefilter("ignore")
            try:
                go_on(folder) if kind == "run" else search_on(folder, task)
            except FuncloraError as error:
                str(error).encode()
                assert str(folder) in str(error)  # noqa: PT017
                assert len(str(error).splitlines()) == 1  # noqa: PT017
                return str(error)
        return ""

    return run


PLACES = st.sampled_from([("run", file) for file in RUN] + [("search", file) for file in SEARCH])


def resealed(content: bytes) -> bytes:
    """With the checksum that fits, where there is one: who can write a file can write that too."""
    blank = re.sub(rb'("sha256": ?")[0-9a-f]{64}"', rb"\g<1>" + BLANK[CHECKSUM].encode() + b'"', content, count=1)
    try:
        return sealed(blank)
    except ValueError:
        return content


def test_the_sound_ones_go_on(attempt: Callable[..., str], whole: Path) -> None:
    for kind, file in [("run", RUN[0]), ("search", SEARCH[0])]:
        assert attempt(kind, file, (whole / kind / file).read_bytes()) == ""


@hostile
@given(PLACES, BYTES, st.booleans())
def test_bytes(attempt: Callable[..., str], whole: Path, place: Any, edits: list[Edit], seal: bool) -> None:
    kind, file = place
    content = damaged((whole / kind / file).read_bytes(), edits)
    attempt(kind, file, resealed(content) if seal else content)


@hostile
@given(st.sampled_from([("run", "run.json"), ("search", "sweep.json"), ("search", "state.json")]), JSON)
def test_json(attempt: Callable[..., str], whole: Path, place: Any, edits: list[tuple[int, Any]]) -> None:
    kind, file = place
    tree = edited(json.loads((whole / kind / file).read_text()), edits)
    attempt(kind, file, resealed(json.dumps(tree).encode()))


@hostile
@given(st.sampled_from([("run", "metrics.jsonl"), ("search", "results.jsonl")]), st.integers(0, 9), JSON)
def test_lines(attempt: Callable[..., str], whole: Path, place: Any, at: int, edits: list[tuple[int, Any]]) -> None:
    kind, file = place
    lines = (whole / kind / file).read_text().splitlines()
    at %= len(lines)
    lines[at] = json.dumps(edited(json.loads(lines[at]), edits))
    attempt(kind, file, ("\n".join(lines) + "\n").encode())


def with_progress(content: bytes, progress: Any) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["progress"] = json.dumps(progress)
    text = json.dumps(header).encode()
    return resealed(len(text).to_bytes(8, "little") + text + content[8 + size :])


def progress_of(content: bytes) -> Any:
    return json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["progress"])


SEEDS: dict[str, tuple[dict[str, Any], str]] = {
    "no pair": ({"best": ""}, "best: expected tuple"),
    "infinite": ({"best": [float("inf"), 0.5]}, "best: expected tuple"),
    "half a pair": ({"best": [4]}, "best: expected tuple"),
    "a flag": ({"step": True}, "step: expected int, got True"),
    "another step": ({"step": 3}, "it is of step 3, expected 4"),
    "negative": ({"metrics": -1}, "0 at least"),
    "huge": ({"metrics": 2**62}, "expected 4611686018427387904 bytes"),
    "larger than any": ({"tokens": 2**70}, "tokens: expected int"),
    "no numbers": ({"pending": [["a", 1]]}, r"pending\[0\]\[0\]: expected float, got 'a'"),
    "more": ({"x": 1}, "'x' is missing or unknown"),
    "a list": ({"stopped": []}, "stopped: expected str"),
}


@pytest.mark.parametrize("what", SEEDS)
def test_progress_that_failed(attempt: Callable[..., str], whole: Path, what: str) -> None:
    changes, message = SEEDS[what]
    content = (whole / "run" / RUN[2]).read_bytes()
    assert re.search(message, attempt("run", RUN[2], with_progress(content, progress_of(content) | changes)))


@hostile
@given(JSON)
def test_progress(attempt: Callable[..., str], whole: Path, edits: list[tuple[int, Any]]) -> None:
    content = (whole / "run" / RUN[2]).read_bytes()
    attempt("run", RUN[2], with_progress(content, edited(progress_of(content), edits)))


@hostile
@example(("run", RUN[2]), [(189, {"\n": None})])
@example(("search", SEARCH[3]), [(189, {"\n": None})])
@given(st.sampled_from([("run", RUN[2]), ("search", SEARCH[3])]), JSON)
def test_headers(attempt: Callable[..., str], whole: Path, place: Any, edits: list[tuple[int, Any]]) -> None:
    kind, file = place
    attempt(kind, file, resealed(with_header((whole / kind / file).read_bytes(), edits)))

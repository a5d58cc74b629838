"""Runs killed by SIGKILL, at random and at each moment in which they write, and resumed until they end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run, same, settings

from funclora._apps.train import loop
from funclora._apps.train.checkpoint import CHECKPOINTS, METRICS, RUN

HERE = Path(__file__).parent


class Server:
    """Children that train; see `run_server`."""

    def __init__(self) -> None:
        paths = [str(HERE), str(HERE.parents[1]), str(HERE.parents[2])]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "run_server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, out: Path, **given: Any) -> int:
        """The exit code of a child."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdin.write(json.dumps({"out": str(out), **given}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.process.stderr.read()
        return int(answer)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.kill()
    server.process.communicate()


def holds_a_run(out: Path) -> bool:
    return (out / RUN).exists()


def without_times(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def steps(out: Path) -> list[int]:
    return sorted(int(file.stem) for file in (out / CHECKPOINTS).glob("*.safetensors"))


RUNS: list[dict[str, Any]] = [
    {},
    {"method": "dora"},
    {"task": "preference", "log_every": 5},
    {"task": "preference", "loss": "kto", "log_every": 5},
]


@pytest.mark.parametrize("seed", range(len(RUNS)))
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(server: Server, seed: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 40, "save_every": 3, "eval_every": 8, **RUNS[seed]}
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert server.run(whole, **options) == 0
    moments = random.Random(seed)
    went_on = set()
    for _ in range(6):
        moment = moments.randint(1, 5), moments.randrange(15_000)
        assert server.run(out, resume=holds_a_run(out), kill_in=moment, **options) == -signal.SIGKILL
        went_on |= {*steps(out)[-1:]}
    assert len(went_on) > 1, "some were killed after a checkpoint, and went on from it"
    assert server.run(out, resume=holds_a_run(out), **options) == 0
    ends = [run(settings(folder, resume=True, **options))[0] for folder in (whole, out)]
    same(ends[1].adapters, ends[0].adapters)
    assert ends[1].losses == ends[0].losses
    assert len(ends[1].losses["train"]) == 40 // options.get("log_every", 1)
    assert [without_times(folder) for folder in (out, whole)] == [without_times(whole)] * 2
    assert ends[1].best == ends[0].best


def test_killed_in_each_moment_in_which_it_writes(server: Server, tmp_path: Path) -> None:
    """Before, amid and after each write, flush, renaming and removal of a run that saves twice and keeps one."""
    options: dict[str, Any] = {"steps": 2, "warmup": 0, "save_every": 1, "keep": 1}
    whole, _ = run(settings(tmp_path / "whole", **options))
    seen = set()
    for at in range(1, 100):
        out = tmp_path / f"{at}"
        code = server.run(out, kill_at=at, **options)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        seen.add((holds_a_run(out), *steps(out)))
        ended, _ = run(settings(out, resume=holds_a_run(out), **options))
        same(ended.adapters, whole.adapters)
        assert ended.losses == whole.losses
        assert steps(out) == [2]
        assert not [*out.rglob("*.tmp")], "drafts are swept up"
    else:
        raise AssertionError("the run never ended")
    assert seen >= {(False,), (True,), (True, 1), (True, 1, 2), (True, 2)}


def test_a_state_that_was_not_saved_would_be_noticed(tmp_path: Path) -> None:
    """The comparison has teeth: without the state of the optimizer the weights are others."""
    given = settings(tmp_path / "whole", save_every=4)
    whole, _ = run(given)
    short = replace(given, out=tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Training, "_step", stops_after(loop._Training._step, 5))
        with pytest.raises(StoppedError, match="here"):
            run(short)
    forget(short.out / CHECKPOINTS / "00000004.safetensors", "optimizer/")
    again, _ = run(replace(short, resume=True))
    with pytest.raises(AssertionError, match="weight"):
        same(again.adapters, whole.adapters)


class StoppedError(Exception):
    pass


def stops_after(step: Any, n: int) -> Any:
    def wrapped(training: Any) -> None:
        if training.progress.step == n:
            raise StoppedError("here")
        step(training)

    return wrapped


def forget(file: Path, name: str) -> None:
    """Zero the tensors of a checkpoint whose key contains a name."""
    from safetensors import safe_open
    from safetensors.torch import save

    from funclora._files.seal import BLANK, sealed

    with safe_open(file, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    assert any(name in key for key in tensors)
    kept = {key: value * 0 if name in key else value for key, value in tensors.items()}
    file.write_bytes(sealed(save(kept, {**metadata, **BLANK})))

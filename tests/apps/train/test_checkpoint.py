"""Checkpoints: what comes back, what is refused, what is left when the disk says no."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save
from tiny_runs import byte_base, data, run, same, settings

import funclora as fl
from funclora._apps.train import checkpoint
from funclora._apps.train.base import Base
from funclora._apps.train.checkpoint import CHECKPOINTS, RUN, Run, RunProgress, fingerprint, opened
from funclora._apps.train.settings import Settings
from funclora._files.seal import BLANK, sealed
from funclora.errors import ConfigError, FormatError, FuncloraError


def steps(out: Path) -> list[int]:
    return sorted(int(file.stem) for file in (out / CHECKPOINTS).glob("*.safetensors"))


def at(out: Path, step: int) -> Path:
    return out / CHECKPOINTS / f"{step:08d}.safetensors"


# --- what comes back -------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 3), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
PROGRESS = st.builds(
    RunProgress,
    step=st.integers(0, 10**6),
    evaluated=st.integers(-1, 10**6),
    best=st.none() | st.tuples(st.integers(0, 99), st.floats(allow_nan=False)),
    waited=st.integers(0, 9),
    pending=st.lists(st.lists(st.floats(allow_nan=False), min_size=2, max_size=4), max_size=3),
    metrics=st.integers(0, 10**9),
    tokens=st.integers(0, 10**12),
    seconds=st.floats(0, 1e9),
    stopped=st.sampled_from(["", "finished", "patience"]),
)


@given(st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=4), PROGRESS, st.booleans())
def test_what_is_saved_comes_back_bit_for_bit(kinds: Any, progress: RunProgress, shared: bool) -> None:
    def leaf(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        values = torch.randn([*shape, 2]).mul(100).to(dtype)
        return values[..., 0] if shared else values[..., 0].clone()  # strided, a part of another's memory

    tree = {"a": [leaf(*kind) for kind in kinds], "b": (torch.ones(2),)}
    with tempfile.TemporaryDirectory() as folder, opened(Settings(out=Path(folder) / "run")) as run:
        run.save(progress, tree)
        again, back = run.load(progress.step, {"a": [torch.zeros_like(x) for x in tree["a"]], "b": (torch.ones(2),)})
    assert again == progress
    for got, want in zip(back["a"], tree["a"], strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("log_every", [1, 3])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_resumed_run_is_the_uninterrupted_one(method: str, log_every: int, tmp_path: Path) -> None:
    """From each of its checkpoints, line boundaries or not."""
    given = settings(tmp_path / "whole", method=method, log_every=log_every, eval_every=4, save_every=1, keep=99)
    whole, _ = run(given)
    assert steps(given.out) == list(range(1, 9))
    lines = (given.out / "metrics.jsonl").read_text()
    for step in range(1, 9):
        for later in steps(given.out):
            if later > step:
                at(given.out, later).unlink()
        with (given.out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "loss": 1.0}\n{"half')
        assert steps(given.out)[-1] == step
        torch.manual_seed(step)  # nothing depends on it
        again, journal = run(replace(given, resume=True))
        same(again.adapters, whole.adapters)
        assert again.losses == whole.losses == journal.losses
        assert again.best == whole.best
        assert f"Continuing after step {step} of 8." in journal.notes
        timeless = [[without_time(line) for line in text.splitlines()] for text in
                    ((given.out / "metrics.jsonl").read_text(), lines)]  # fmt: skip
        assert timeless[0] == timeless[1]


def without_time(line: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if "second" not in key}


def test_the_last_are_kept_and_the_best(tmp_path: Path) -> None:
    given = settings(tmp_path, steps=60, lr=5e-2, eval_every=5, save_every=4, dropout=0.0, keep=2)
    outcome, _ = run(given, rows=data(n=4))
    assert outcome.best is not None
    assert outcome.best[0] < 52
    assert steps(tmp_path) == [outcome.best[0], 56, 60]


def test_generators_are_saved_and_come_back(tmp_path: Path) -> None:
    """A step does not draw from them, but what comes after a run may."""
    torch.manual_seed(5)
    run(settings(tmp_path))
    want = torch.rand(3)
    torch.manual_seed(6)
    run(settings(tmp_path, resume=True))
    assert torch.equal(torch.rand(3), want)


# --- what is refused -------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path: Path) -> None:
    run(settings(tmp_path))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(
        ConfigError, match=rf"out: {tmp_path} contains a run. Continue it with --resume, or use another"
    ):
        run(settings(tmp_path))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("name", ["metrics.jsonl", CHECKPOINTS])
def test_what_looks_like_a_run_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=rf"contains {name}, but no run.json"):
        run(settings(tmp_path))


def test_there_must_be_something_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume: .* contains no run to continue. Start one without --resume"):
        run(settings(tmp_path / "run", resume=True))
    assert not (tmp_path / "run").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lr": 2e-2}, r"lr = 0.01 there and 0.02 here\. Give"),
        (
            {"clip": 2.0, "method": "dora"},
            r"method = 'lora' there and 'dora' here; clip = 1.0 there and 2.0 here\. Give",
        ),
        ({"targets": ("q_proj",)}, r"targets = \['all-linear'\] there and \['q_proj'\] here\. Give"),
    ],
)
def test_other_settings_are_named(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = settings(tmp_path, save_every=4)
    run(given)
    with pytest.raises(ConfigError, match=f"resume: the run in .* differs: {said}"):
        run(replace(given, resume=True, **changed))


def test_other_data_and_another_base_are_named(tmp_path: Path) -> None:
    given = settings(tmp_path, save_every=4)
    run(given)
    base = byte_base()
    params = {name: tensor + (name == "embed.weight") for name, tensor in base.params.items()}
    other = Base(**vars(base) | {"params": params})
    with pytest.raises(ConfigError, match=r"differs: other data than there\. Give"):
        run(replace(given, resume=True), base, data(n=12))
    with pytest.raises(ConfigError, match=r"differs: other base model than there\. Give"):
        run(replace(given, resume=True), other)


def test_what_does_not_decide_the_outcome_may_change(tmp_path: Path) -> None:
    """The folder moved, the data lie elsewhere, more checkpoints are kept."""
    given = settings(tmp_path / "here", save_every=3)
    whole, _ = run(given)
    at(given.out, 8).unlink()
    given.out.rename(tmp_path / "there")
    again, _ = run(
        replace(
            given, out=tmp_path / "there", resume=True, keep=7, save_every=1, log_every=2, model=Path("elsewhere"),
            data=(Path("elsewhere.jsonl"),), merge=True, sample=("hello",), sample_tokens=2,
        )
    )  # fmt: skip
    same(again.adapters, whole.adapters)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    given = settings(tmp_path / "run")
    with opened(given):
        for resume in (False, True):
            with pytest.raises(ConfigError, match=f"out: another process is using {given.out}"):
                run(replace(given, resume=resume))
    run(given)


def test_a_fingerprint_is_that_of_the_weights() -> None:
    params = {"a": torch.arange(5000.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.empty(0)}
    plain = fingerprint(params)
    assert plain == fingerprint({name: tensor.clone() for name, tensor in params.items()})
    strided = params | {"b": torch.ones(3, 2, dtype=torch.bfloat16).T}
    assert plain == fingerprint(strided)
    for other in ({"a": params["a"] + 1}, {"b": params["b"].float()}, {"b": params["b"].T}, {"d": params["a"]}):
        assert fingerprint(params | other) != plain


def test_a_fingerprint_of_packed_weights_is_that_of_what_they_hold() -> None:
    weight = torch.randn(64, 64)
    one, same, other = (fl.quantize({"a": w}, ["a"], "nf4") for w in (weight, weight.clone(), -weight))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


# --- broken files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(settings(out))
    return out


def resumed_with(finished: Path, name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        subprocess.run(["cp", "-r", str(finished), str(out)], check=True)
        (out / name).write_bytes(content)
        run(settings(out, resume=True))


CHECKPOINT = f"{CHECKPOINTS}/00000008.safetensors"


@pytest.mark.parametrize("name", [RUN, "metrics.jsonl"])
@given(cut=st.integers(0, 5000), byte=st.integers(0, 255), whole=st.booleans())
@hypothesis_settings(max_examples=15)
@example(cut=0, byte=0, whole=False)
@example(cut=1, byte=ord("["), whole=False)
def test_broken_files_are_named(finished: Path, name: str, cut: int, byte: int, whole: bool) -> None:
    """One byte is another, and all behind it may be gone: an error of the family, or a run that ends."""
    content = (finished / name).read_bytes()
    cut = min(cut, len(content) - 1)
    tail = content[cut + 1 :] if whole else b""
    with_error = None
    try:
        resumed_with(finished, name, content[:cut] + bytes([byte]) + tail)
    except FuncloraError as error:
        with_error = str(error)
    if not whole and name != "metrics.jsonl" and len(content) - cut > 3:
        assert with_error is not None
        assert Path(name).name in with_error


@given(cut=st.integers(0, 12_000), byte=st.integers(0, 255), whole=st.booleans())
@hypothesis_settings(max_examples=15)
@example(cut=0, byte=0, whole=False)
@example(cut=11_000, byte=171, whole=True)  # in a tensor, where the format itself notices nothing
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(finished: Path, cut: int, byte: int, whole: bool) -> None:
    """Whatever the damage, the run ends as if the last checkpoint had not been written."""
    content = (finished / CHECKPOINT).read_bytes()
    cut = min(cut, len(content) - 1)
    damaged = content[:cut] + bytes([byte]) + (content[cut + 1 :] if whole else b"")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        subprocess.run(["cp", "-r", str(finished), str(out)], check=True)
        (out / CHECKPOINT).write_bytes(damaged)
        ended, journal = run(settings(out, resume=True))
        same(ended.adapters, run(settings(finished, resume=True))[0].adapters)
        aside = (out / CHECKPOINT).with_suffix(".damaged")
        if damaged == content:
            assert journal.notes == ["Continuing after step 8 of 8."]
        else:
            said = f"The checkpoint of step 8 is damaged and was set aside as {aside}."
            assert journal.notes == [said, "Continuing after step 7 of 8."]
            assert aside.read_bytes() == damaged
            assert steps(out) == [7, 8]
            assert (out / CHECKPOINT).read_bytes()[-8:] == content[-8:]


def test_without_an_intact_checkpoint_nothing_changes(finished: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(finished), str(tmp_path / "run")], check=True)
    for step in (7, 8):
        at(tmp_path / "run", step).write_bytes(at(finished, step).read_bytes()[:-1])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(FormatError, match=r"00000008\.safetensors: this is not what was written: its checksum"):
        run(settings(tmp_path / "run", resume=True))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def rewritten(file: Path, metadata: Any = None, **changed: Any) -> None:
    """Another checkpoint, with the checksum that it needs."""
    with safe_open(file, framework="pt") as stored:
        metadata = metadata or stored.metadata()
    tensors = load_file(file) | changed
    content = save({key: value for key, value in tensors.items() if value is not None}, {**metadata, **BLANK})
    file.write_bytes(sealed(content))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"generators/cpu": None}, "expected other tensors than are there: generators/cpu"),
        ({"more": torch.ones(1)}, "expected other tensors than are there: more"),
        ({"generators/cpu": torch.ones(3)}, r"generators/cpu: expected torch.uint8 \[5056\], got torch.float32 \[3\]"),
        ({"metadata": {"progress": "{}"}}, "this is not a checkpoint, or it is broken: .*'step' is missing"),
        ({"metadata": {"progress": "[]"}}, "this is not a checkpoint, or it is broken"),
        ({"metadata": {"other": "{}"}}, "this is not a checkpoint, or it is broken: 'progress'"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    changed: dict[str, Any], said: str, finished: Path, tmp_path: Path
) -> None:
    subprocess.run(["cp", "-r", str(finished), str(tmp_path / "run")], check=True)
    rewritten(tmp_path / "run" / CHECKPOINT, **changed)
    with pytest.raises(FormatError, match=rf"00000008.safetensors: {said}"):
        run(settings(tmp_path / "run", resume=True))


def test_lost_lines_are_named(finished: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(finished), str(tmp_path / "run")], check=True)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(FormatError, match=r"metrics.jsonl: lines from before the checkpoint are missing"):
        run(settings(tmp_path / "run", resume=True))


# --- a disk that says no ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size, if the test may make one."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"no file system can be made here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    whole, _ = run(settings(tmp_path / "whole", save_every=1))
    with tmpfs(tmp_path / "small", "64k") as folder:
        given = settings(folder / "run", save_every=1, keep=99)
        with pytest.raises(OSError, match="No space left on device") as caught:
            run(given)
        last = steps(given.out)[-1]
        assert 1 <= last < 8
        message = str(caught.value)
        assert "\n" not in message
        assert (
            f"the checkpoint of step {last + 1} cannot be written; the last good checkpoint is {at(given.out, last)}"
            in message
        )
        assert not [*given.out.rglob("*.tmp")]
        remount(folder, "size=1m")
        again, journal = run(replace(given, resume=True))
        assert journal.notes == [f"Continuing after step {last} of 8."]
        same(again.adapters, whole.adapters)
        assert again.losses == whole.losses


def test_a_full_disk_at_a_line_of_metrics(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "64k") as folder:
        given = settings(folder / "run", steps=8, save_every=2, keep=1)
        blocks = 0
        out = given.out

        def fill() -> None:
            with (folder / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"0" * 512)

        base = byte_base()

        class Filling(Base):
            def loss(self, bound: Any, batch: Any) -> Any:
                nonlocal blocks
                blocks += 1
                if blocks == 11:  # in step 6
                    fill()
                return super().loss(bound, batch)

        # A page of the file system holds many lines.
        with pytest.raises(OSError, match="No space left on device") as caught:
            run(replace(given, eval_every=0), Filling(**vars(base)))
        assert str(out) in str(caught.value)
        assert steps(out) == [4]
        (folder / "ballast").unlink()
        again, _ = run(replace(given, resume=True), base)
    whole, _ = run(settings(tmp_path / "whole", save_every=2))
    same(again.adapters, whole.adapters)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_no_space_at_any_call(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(tmp_path / "run", save_every=2)
    whole, _ = run(settings(tmp_path / "whole", save_every=2))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save = Run.save

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise full

    def at_six(store: Run, progress: RunProgress, tree: Any) -> None:
        with monkeypatch.context() as patch:
            if progress.step == 6:
                where: Any = {"write": checkpoint, "fsync": os, "replace": Path}[call]
                patch.setattr(where, {"write": "_write"}.get(call, call), fails)
            save(store, progress, tree)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", at_six)
        with pytest.raises(OSError, match=r"No space left on device: the checkpoint of step 6 cannot be written"):
            run(given)
    assert steps(given.out) == [2, 4]
    assert not [*given.out.rglob("*.tmp")]
    again, _ = run(replace(given, resume=True))
    same(again.adapters, whole.adapters)


def test_a_read_only_folder_is_named_at_once(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "64k") as folder:
        (folder / "run").mkdir()
        remount(folder, "ro")
        for out in (folder / "run", folder / "new"):
            said = rf"out: {out} cannot be written to: Read-only file system. Give another folder with --out"
            with pytest.raises(ConfigError, match=said), opened(settings(out)):
                pass
        remount(folder, "rw")


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    for out in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(ConfigError, match=rf"out: {out} cannot be written to: (File exists|Not a directory)"):
            run(settings(out))
    assert (tmp_path / "run").read_text() == "mine"

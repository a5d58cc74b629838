"""Commands that torchrun starts: their results are those of one process, bit for bit, and they end with one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from launch import torchrun

HERE = Path(__file__).parent

pytestmark = pytest.mark.slow

# The last step of an epoch has three micro-batches of the four.
TRAIN = ("train", "--data", "data.jsonl", "--validation-split", "0.2", "--context", "48", "--batch", "2",
         "--accumulation", "4", "--steps", "6", "--eval-every", "2", "--rank", "2", "--lr", "0.01", "--dropout", "0.1",
         "--schedule", "constant", "--warmup", "1", "--final", "last", "--device", "cpu")  # fmt: skip
DORA = (*TRAIN, "--method", "dora", "--optimizer", "adafactor", "--sample", "def ")


def given(folder: Path) -> None:
    """The data of the commands."""
    rows = [{"text": f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 3)} for i in range(18)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def done(n: int, folder: Path, *lines: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    """What the commands came to in each of n processes, in the order of the commands."""
    given(folder)
    (folder / "commands.json").write_text(json.dumps(lines), encoding="utf-8")
    torchrun(n, folder, HERE / "commands.py", "commands.json")
    each = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(n)]
    return [list(ends) for ends in zip(*each, strict=True)]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    given(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for out, line in (("lora", TRAIN), ("dora", DORA), ("longer", TRAIN)):
            words = [{"6": "8"}.get(word, word) if out == "longer" else word for word in line]
            end = commands.ended([*words, "--out", out])
            assert end["code"] == 0, end
    return folder


REFUSED = {
    "out": (*TRAIN, "--out", "lora"),
    "passes": ("train", "--data", "data.jsonl", "--out", "other"),
    "option": ("train", "--ranks", "3"),
    "device": (*TRAIN[:-1], "cpu:0", "--out", "other"),
    "command": ("inspect", "lora/adapter"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The same in two processes, and what is refused."""
    folder = tmp_path_factory.mktemp("two")
    lines = {"lora": (*TRAIN, "--out", "lora"), "dora": (*DORA, "--out", "dora"), **REFUSED}
    return folder, dict(zip(lines, done(2, folder, *lines.values()), strict=True))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_run_of_two_processes_is_that_of_one(two: Any, alone: Path, kind: str) -> None:
    folder, ends = two
    assert [end["code"] for end in ends[kind]] == [0, 0], ends[kind]
    assert adapter(folder / kind) == adapter(alone / kind)
    assert numbers(folder / kind) == numbers(alone / kind)
    first, second = ends[kind]
    assert f"wrote {kind}/adapter" in first["out"].replace(os.sep, "/")
    assert "step 6" in first["err"]
    assert second["out"] == second["err"] == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out", "out: lora contains a run. Continue it with --resume, or use another folder."),
        ("passes", "accumulation: 1 forward pass of a step cannot be divided among 2 processes. Give --accumulation 2"),
        ("option", "No such option: --ranks"),
        ("device", "device: cpu:0 cannot be that of 2 processes."),
        ("command", "this command works in one process. Start it without torchrun."),
    ],
)
def test_an_error_is_one_line_of_one_process(two: Any, name: str, message: str) -> None:
    folder, ends = two
    assert [end["code"] for end in ends[name]] == [2, 2], ends[name]
    said = "".join(end["err"] for end in ends[name])
    assert message in said
    assert said.count("\n") == 1, said
    assert not (folder / "other").exists()


def test_a_run_continues_in_another_number_of_processes(two: Any, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = two
    monkeypatch.chdir(folder)
    end = commands.ended(["train", "--out", "lora", "--resume", "--steps", "8"])
    assert end["code"] == 0, end
    assert adapter(folder / "lora") == adapter(alone / "longer")


def test_killed_processes_are_started_again_and_lose_nothing(tmp_path: Path, alone: Path) -> None:
    given(tmp_path)
    output = torchrun(2, tmp_path, HERE / "dies.py", *TRAIN, "--out", "lora", restarts=2)
    assert "Continuing after step 2 of 6" in output
    assert "Continuing after step 4 of 6" in output
    assert "Traceback" not in output
    assert adapter(tmp_path / "lora") == adapter(alone / "lora")


def test_four_processes_train_the_same_adapter(tmp_path: Path, alone: Path) -> None:
    ends = done(4, tmp_path, (*TRAIN, "--out", "lora"))
    assert [end["code"] for end in ends[0]] == [0] * 4, ends
    assert adapter(tmp_path / "lora") == adapter(alone / "lora")
    assert numbers(tmp_path / "lora") == numbers(alone / "lora")

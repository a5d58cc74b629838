"""What a dry run says: memory against what real steps take, examples with their loss."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import task_models
import torch

from funclora._apps.train.adapters import Start
from funclora._apps.train.examples import Data
from funclora._apps.train.journal import Journal
from funclora._apps.train.loop import train
from funclora._apps.train.plan import memory, plan, shown
from funclora._apps.train.reading import read
from funclora._apps.train.settings import CAUSAL, SEQ2SEQ, SEQUENCE, TASKS, TOKEN, Settings
from funclora._apps.train.setup import ready
from funclora._torch.memory import Peak

WITHIN = 1.25  # the estimate's factor, either way


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    return {kind: task_models.save(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "bert", "t5")}


def settings_of(folders: dict[str, Path], task: str, folder: Path, data: str | None = None, **changes: Any) -> Settings:
    return Settings(
        model=folders[task_models.KIND[task]],
        task=task,
        data=(task_models.data(folder / "train.jsonl", data or task),),
        out=folder / "run",
        **{"validation_split": 0.0} | changes,
    )


def taken(start: Start, data: Data, settings: Settings) -> int:
    """What a step of the loop itself hold at their worst moment."""
    with Journal(settings, quiet=True) as journal, Peak() as used:
        train(start.base, start.adapters, data, settings, journal)
    return int(used.peak)


@pytest.mark.parametrize(
    ("rows", "context", "changes"),
    [(4, 96, {}), (6, 256, {"method": "dora", "rank": 4}), (2, 256, {"quantize": "nf4"})],
)
def test_the_estimate_is_near_what_steps_take(tmp_path: Path, rows: int, context: int, changes: dict[str, Any]) -> None:
    text = "import os\n" * 40
    (tmp_path / "train.txt").write_text(text * rows)
    settings = Settings(
        data=(tmp_path / "train.txt",), context=context, batch=rows, steps=1, validation_split=0.0,
        out=tmp_path / "run",
        **changes,
    )  # fmt: skip
    made = ready(settings, tmp_path)
    found = memory(made.start, made.data.train, settings)
    used = taken(made.start, made.data, settings)
    estimated = found.adapters + found.step
    assert used / WITHIN < estimated < used * WITHIN, (estimated, used)
    assert found.total == found.base + estimated


@pytest.mark.parametrize("task", TASKS)
def test_the_estimate_of_every_task(folders: dict[str, Path], tmp_path: Path, task: str) -> None:
    data = "prompt" if task == CAUSAL else task
    settings = settings_of(folders, task, tmp_path, data, batch=4, steps=1)
    made = ready(settings, tmp_path)
    found = memory(made.start, made.data.train, settings)
    used = taken(made.start, made.data, settings)
    assert used / 2 < found.adapters + found.step < used * 2  # of kilobytes


def test_memory_counts_packed_weights_as_packed(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_of(folders, CAUSAL, tmp_path, "prompt")
    packed = replace(settings, quantize="nf4")
    sizes = [plan(ready(s, tmp_path)).memory.base for s in (settings, packed)]
    assert sizes[1] < sizes[0]


def test_a_warmup_longer_than_what_is_tried_out(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_of(folders, CAUSAL, tmp_path, "prompt", batch=2, epochs=2.0, warmup=4.0)
    assert plan(ready(settings, tmp_path)).steps == 12


def test_a_plan_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    made = ready(settings_of(folders, CAUSAL, tmp_path, "prompt", dropout=0.5), tmp_path)
    start = made.start
    before = {name: value.clone() for name, value in start.base.params.items()}
    state = torch.get_rng_state()
    first, second = plan(made), plan(made)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in start.base.params.items())
    assert first.steps == 2
    assert first.rows == (12, 0)
    assert first.summary.trainable == sum(row.trainable for row in first.summary.rows) > 0
    assert not (tmp_path / "run").exists()


def test_examples_show_their_loss(folders: dict[str, Path], tmp_path: Path) -> None:
    def first(task: str, data: str | None = None, **changes: Any) -> Any:
        made = ready(settings_of(folders, task, tmp_path, data, **changes), tmp_path)
        return shown(made.start.base, made.data.train[0])

    assert first(CAUSAL, "prompt").parts == (("<s>0 + 0 =", False), (" 0</s>", True))
    assert first(CAUSAL, "prompt", train_on="all").parts == (("<s>", False), ("0 + 0 = 0</s>", True))
    assert [loss for _, loss in first(CAUSAL, "text").parts] == [False, True]
    sequence = first(SEQUENCE)
    assert (sequence.parts, sequence.answer) == ((("the red</s>", False),), "colour")
    assert first(SEQ2SEQ).parts == (("double red</s>", False), ("red red</s>", True))
    assert first(TOKEN).answer == "a/O red/W x/O"
    assert first(TOKEN).source == "train.jsonl:1"


def test_long_examples_are_cut_for_people(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("abc " * 2000)
    settings = Settings(data=(tmp_path / "long.txt",), validation_split=0.0)
    made = ready(settings, tmp_path)
    assert len(shown(made.start.base, made.data.train[0]).parts[1][0]) <= 256
    # A base that reads more.
    example = replace(made.data.train[0], ids=[97] * 5000, labels=[97] * 5000)
    _, part = shown(made.start.base, example).parts
    assert part[0].endswith("aaa ...")
    assert len(part[0]) == 1204


def test_a_rank_beyond_use_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = task_models.save(tmp_path / "model", "llama")
    given = {"model": model, "data": task_models.data(tmp_path / "prompt.jsonl", "prompt"), "targets": ["q_proj"]}
    notes = {rank: ready(read(None, given | {"rank": rank}), tmp_path).data.notes for rank in (16, 17)}
    assert not any("can use" in note for note in notes[16])
    assert any(re.match(r"The rank 17 is more than .*q_proj.weight \(16×16\).* at most rank 16", n) for n in notes[17])

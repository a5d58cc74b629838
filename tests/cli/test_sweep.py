"""`funclora sweep`: members go the way they would go alone, and a search that is killed ends as if it had not been."""

import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import task_models
import text_models
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import funclora
import funclora as fl
from funclora._apps.sweep import memory, report
from funclora._apps.sweep.search import Search, _TooMany
from funclora._apps.sweep.settings import SearchSettings
from funclora._apps.sweep.space import Member, Space
from funclora._apps.sweep.store import HALVED, LIVE, NOT_FINITE, STOPPED, Store, claimed
from funclora._apps.sweep.task import Task, load_task
from funclora._apps.train.base import Base, ByteTokenizer
from funclora._apps.train.evaluate import evaluate
from funclora._apps.train.examples import Data, Example
from funclora._apps.train.reading import read
from funclora._apps.train.run import run as train
from funclora._apps.train.settings import CAUSAL, EMBEDDING, PREFERENCE, SEQ2SEQ, SEQUENCE, TOKEN, Settings
from funclora._apps.train.step import Steps
from funclora._files import atomic as _files
from funclora._files.seal import BLANK, sealed
from funclora.cli._app import app
from funclora.demo.model import ByteLM, ByteLMConfig
from funclora.distributed import _ranks as ranks
from funclora.errors import ConfigError, FormatError, FuncloraWarning

TEXT = b"the quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 20
SETTINGS = SearchSettings(steps=4, every=2, halving=0, keeps_best=False, budget=2**40)
EIGHT = Space(lr="1e-3,1e-2,3e-2,1e-1", rank="2", targets="q_proj", method="lora,dora")
MIXED = Space(lr="1e-2", rank="2,4", targets="all-linear,q_proj+v_proj")


def pieces(text: bytes, name: str) -> list[Example]:
    return [
        Example([*text[i : i + 12]], [*text[i : i + 12]], (12,), f"{name}:{i}") for i in range(0, len(text) - 12, 12)
    ]


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    model = ByteLM(ByteLMConfig(dim=16, layers=1, heads=2, hidden=24, context=12)).eval().requires_grad_(False)
    base = Base("toy", model, fl.base_params(model), ByteTokenizer(), CAUSAL, 12)
    heldout = pieces(TEXT[: 5 * 13], "heldout")
    return Task(base, Data(pieces(TEXT, "train"), heldout), Settings(steps=4, batch=2, warmup=1.0), heldout)


def searched(
    folder: Path, task: Task, members: list[Member], settings: SearchSettings = SETTINGS, save: int | None = None
) -> Search:
    config = {"members": [member.values for member in members], "steps": settings.steps}
    search = Search(task, members, settings, Store(folder, config, len(members)))
    if not search.store.state.done:
        search.run()
        if save is not None:
            report.write(search, save)
    return search


def losses(search: Search) -> dict[tuple[int, int], float]:
    return {(r["member"], r["step"]): r["heldout_loss"] for r in search.store.state.records}


def comparable(folder: Path) -> tuple[Any, ...]:
    """All that a search leaves, but for times."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    weights = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted((folder / "adapters").rglob("*.safetensors"))
    }
    return lines, (folder / "leaderboard.json").read_text(), weights


# The space


def test_a_grid_has_every_combination_once() -> None:
    members = Space(lr="1e-3,1e-2,1e-3", rank="2,4", alpha="2r,8", seeds="0,7").grid()
    assert len(members) == 2 * 2 * 2 * 2 * 2 * 2
    assert len({tuple(m.values.items()) for m in members}) == len(members) - 2 * 2 * 2 * 2  # 2r and 8 agree at rank 4
    assert {(m.rank, m.alpha) for m in members} == {(2, 4), (2, 8), (4, 8)}
    assert [m.id for m in members] == list(range(len(members)))


def test_draws_are_decided_by_the_seed_and_begin_alike() -> None:
    space = Space(lr="1e-4:1e-2", rank="2:16", alpha="1:64")
    assert space.draws(8, seed=3) == space.draws(32, seed=3)[:8]
    assert space.draws(8, seed=3) != space.draws(8, seed=4)


def test_draws_are_log_uniform_and_within_their_range() -> None:
    members = Space(lr="1e-4:1e-2", rank="2:16").draws(400, seed=0)
    rates = [m.lr for m in members]
    assert 1e-4 <= min(rates) < 1.2e-4
    assert 0.8e-2 < max(rates) <= 1e-2
    assert 0.42 < sum(rate < 1e-3 for rate in rates) / 400 < 0.58
    assert {m.rank for m in members} == set(range(2, 17))
    assert {m.method for m in members} == {"lora", "dora"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "1e-3,fast"}, "--lr: expected a positive number, got 'fast'"),
        ({"lr": "-1"}, "--lr: expected a positive number, got '-1'"),
        ({"lr": "1e-3,,1"}, "--lr: expected values with commas"),
        ({"lr": "1:2:3"}, "--lr: expected a range low:high"),
        ({"lr": "1e-2:1e-4"}, "--lr: expected a range whose first number is the lower"),
        ({"lr": "1e-4:1e-2"}, "--lr: a range needs a number of samples; add --random"),
        ({"rank": "2.5"}, "--rank: expected a positive integer, got '2.5'"),
        ({"rank": "0"}, "--rank: expected a positive integer"),
        ({"alpha": "xr"}, "--alpha: expected a positive number or 2r, got 'xr'"),
        ({"seeds": "a"}, "--seeds: expected an integer"),
        ({"method": "lora,dorra"}, r"--method: .* got 'dorra'. Near names: dora\."),
        ({"init": "gausian"}, r"--init: .* got 'gausian'. Near names: gaussian\."),
        ({"init": "orthogonal", "rank": "3"}, "needs even ranks"),
    ],
)
def test_options_that_cannot_be_read(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Space(**options).grid()


# Memory


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2**31), ("512MiB", 2**29), ("1.5 GB", 1_500_000_000), ("100", 100), ("3k", 3000)]
)
def test_sizes(text: str, size: int) -> None:
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2 XB", "-1GB", "2i"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 2GiB"):
        memory.parse_size(text)


@pytest.mark.parametrize(("budget", "size"), [(110, 1), (119, 1), (120, 2), (259, 15), (260, 16), (10**6, 23)])
def test_the_largest_population_that_fits(budget: int, size: int) -> None:
    tried = []

    def measure(n: int) -> int:
        tried.append(n)
        return 100 + 10 * n

    found, expected = memory.fitting(measure, 23, budget)
    assert found == size
    assert expected == 100 + 10 * size
    assert max(tried) <= max(2 * size, 2)


def test_a_probe_that_runs_out_of_memory_ends_the_search_for_a_size() -> None:
    def measure(n: int) -> int:
        if n > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return n

    assert memory.fitting(measure, 64, 10**9) == (4, 4)


def test_a_budget_below_one_member_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"one member alone needs 2.00 GiB.* budget is 1.00 GiB.*lower --batch"):
        memory.fitting(lambda n: 2**31, 4, 2**30)


def test_what_running_out_of_memory_looks_like() -> None:
    for error in (torch.OutOfMemoryError("x"), RuntimeError("not enough memory: you tried"), MemoryError()):
        assert memory.is_out_of_memory(error)
    assert not memory.is_out_of_memory(RuntimeError("shapes"))
    assert not memory.is_out_of_memory(ValueError("not enough memory"))


def test_the_peak_sees_a_large_tensor() -> None:
    cpu = torch.device("cpu")
    memory.reset_peak(cpu)
    before = memory.peak(cpu)
    torch.ones(2**27, dtype=torch.uint8)
    assert memory.peak(cpu) - before > 2**26


# Trajectories


def alone(task: Task, member: Member, search: SearchSettings) -> tuple[dict[str, fl.Rule], list[float]]:
    """The member's training as a run of its own."""
    settings = task.member_settings(member)
    adapters = task.start(member).adapters
    steps = Steps(task.base, adapters, task.data, settings)
    values, heldout = steps.vectors.of(adapters), []
    state = steps.init(values)
    for k in range(search.steps):
        values, state, *_ = steps(k, values, state)
        if (k + 1) % search.every == 0:
            found = evaluate(task.base, steps.vectors.tree(values), task.heldout, settings)
            assert found is not None
            heldout.append(found.means["loss"])
    return steps.vectors.tree(values), heldout


def test_each_member_goes_the_way_it_would_go_alone(tmp_path: Path, task: Task) -> None:
    members = [*MIXED.grid()[::3], replace(MIXED.grid()[0], lr=0.1, seed=5, init="gaussian", dropout=0.3)]
    members = [replace(member, id=i) for i, member in enumerate(members)]
    task = replace(task, settings=replace(task.settings, weight_decay=0.1, clip=0.3, lora_plus=4.0))
    search = Search(task, members, SETTINGS, Store(tmp_path, {}, len(members)))
    search.run()
    found = losses(search)
    assert len({m.method for m in members}) == 2
    for member in members:
        adapters, heldout = alone(task, member, SETTINGS)
        assert [found[member.id, step] for step in (2, 4)] == pytest.approx(heldout, abs=2e-5)
        for name, rule in search.adapters(member.id).items():
            for leaf in rule.leaf_names:
                torch.testing.assert_close(getattr(rule, leaf), getattr(adapters[name], leaf), rtol=1e-3, atol=2e-4)
    assert max(found.values()) - min(found.values()) > 0.01  # they differ by more than they may deviate


KINDS = {
    "text": CAUSAL, "prompt": CAUSAL, "messages": CAUSAL, SEQUENCE: SEQUENCE, TOKEN: TOKEN, SEQ2SEQ: SEQ2SEQ,
    "numbers": SEQUENCE, "several": SEQUENCE, PREFERENCE: PREFERENCE, "verdicts": PREFERENCE, "packed": PREFERENCE,
    EMBEDDING: EMBEDDING, "scored": EMBEDDING,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_winners_settings_train_it_again(kind: str, tmp_path: Path) -> None:
    """With every kind of data, dropout of the adapters, and a validation file."""
    task = KINDS[kind]
    model = task_models.save(tmp_path / "model", task_models.KIND[task], template=text_models.PLAIN)
    config = json.loads((model / "config.json").read_text())  # the model's own dropout is drawn for all members at once
    (model / "config.json").write_text(json.dumps({k: 0.0 if "drop" in k else v for k, v in config.items()}))
    data = task_models.data(tmp_path / "data.jsonl", PREFERENCE if kind == "packed" else kind)
    out = tmp_path / "search"
    targets = {CAUSAL: "q_proj+v_proj", PREFERENCE: "q_proj+v_proj", SEQ2SEQ: "q+v"}.get(task, "query+value")
    options = f"--steps 5 --batch 3 --eval-every 2 --halving 0 --save 4 --rank 2 --lr 1e-2,5e-2 --targets {targets}"
    options += " --loss kto" * (kind == "verdicts") + " --packing --context 40" * (kind == "packed")
    result = invoke(
        "sweep", "--model", str(model), "--task", task, "--data", str(data), "--validation", str(data), "--json",
        "--out", str(out), "--dropout", "0.2", "--seeds", "3,4", "--method", "lora", *options.split(),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    board = json.loads(result.stdout)["leaderboard"]
    assert len(board) == 4
    assert ("accuracy" in board[0]) == (kind in (SEQUENCE, TOKEN))
    assert ("rewards/accuracies" in board[0]) == (task == PREFERENCE)
    assert ("pearson" in board[0], "micro_f1" in board[0]) == (kind in ("numbers", "scored"), kind == "several")
    assert ("recall_at_1" in board[0]) == (kind == EMBEDDING)
    for row in board[::3]:
        (folder,) = (out / "adapters").glob(f"*-member-{row['member']:03d}")
        settings = read(folder / "run.toml", {"out": str(tmp_path / f"again-{row['member']}")})
        assert (settings.lr, settings.dropout, settings.seed) == (row["lr"], 0.2, row["seed"])
        again = train(settings, quiet=True)
        best = again.outcome.best
        assert best is not None
        assert best[0] == row["best_step"]
        assert best[1] == pytest.approx(row["heldout_loss"], abs=2e-4)
        ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, settings.out / "adapter"))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=2e-3)
        for name in ("README.md", "tokenizer.json", "base.json", *(["classes.json"] if "accuracy" in row else [])):
            assert (folder / name).is_file(), name


def test_members_have_betas_of_their_own(tmp_path: Path) -> None:
    """They are compared by the loss of one beta."""
    model = task_models.save(tmp_path / "model", "llama")
    data = task_models.data(tmp_path / "data.jsonl", PREFERENCE)
    given = ["--model", str(model), "--task", PREFERENCE, "--data", str(data), "--validation", str(data)]
    options = ["--steps", "4", "--batch", "3", "--rank", "2", "--targets", "q_proj", "--method", "lora", "--lr", "5e-2"]
    out = tmp_path / "search"
    result = invoke(
        "sweep", *given, *options, "--beta", "0.1,5", "--halving", "0", "--save", "2", "--json", "--out", str(out)
    )
    assert result.exit_code == 0, result.output
    board = json.loads(result.stdout)["leaderboard"]
    assert {row["beta"] for row in board} == {0.1, 5.0}
    for row in board:
        (folder,) = (out / "adapters").glob(f"*-member-{row['member']:03d}")
        settings = read(folder / "run.toml", {"out": str(tmp_path / f"again-{row['member']}"), "final": "last"})
        assert settings.beta == row["beta"]
        train(settings, quiet=True)
        ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, settings.out / "adapter"))
        if row["best_step"] == 4:
            for name, tensor in ours.items():
                torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=2e-3)
        scored = invoke("eval", str(folder), *given[:6], "--beta", "0.1", "--json")
        (loss,) = json.loads(scored.stdout)["loss"][folder.name].values()
        assert loss == pytest.approx(row["heldout_loss"], rel=1e-3)
    refused = invoke("sweep", *given, "--init", "false", "--out", str(tmp_path / "other"))
    assert "init: with false each member starts from another adapter" in refused.stderr
    refused = invoke("sweep", "--beta", "0.2", "--out", str(tmp_path / "other"))
    assert "--beta: only preference uses it, and the task is causal-lm" in refused.stderr


def test_a_member_stops_by_itself_and_its_best_adapter_counts(tmp_path: Path, task: Task) -> None:
    members = Space(lr="1e-3,3", rank="2", targets="q_proj", method="lora").grid()
    task = replace(task, settings=replace(task.settings, steps=12))
    settings = replace(SETTINGS, steps=12, every=1, patience=2, keeps_best=True)
    search = searched(tmp_path, task, members, settings)
    steady, wild = (search.progress[i] for i in (0, 1))
    assert (steady.status, steady.step) == (LIVE, 12)
    assert (wild.status, wild.waited) == (STOPPED, 2)
    assert wild.best_step == wild.step - 2
    found = losses(search)
    assert wild.best_loss == min(loss for (i, _), loss in found.items() if i == 1) < found[1, wild.step]
    score = task.scores([search.adapters(1)])[0]
    assert score.values["loss"] == pytest.approx(wild.best_loss, rel=1e-6)
    # It has no more to go, so it is compared with those that went to the end.
    board = {row["member"]: row["heldout_loss"] for row in search.leaderboard()}
    assert board == {0: steady.best_loss, 1: wild.best_loss}
    assert [*board.values()] == sorted(board.values())
    report.write(search, 2)
    (folder,) = (tmp_path / "adapters").glob("*-member-001")
    card = (folder / "README.md").read_text()
    assert f"| steps | {wild.step} (patience) |" in card
    assert f"| adapter | of step {wild.best_step}, the best evaluation; the last step is {wild.step} |" in card
    assert not list((tmp_path / "state").iterdir())


def test_a_trajectory_does_not_depend_on_the_population(tmp_path: Path, task: Task) -> None:
    members = [replace(member, id=i) for i, member in enumerate(MIXED.grid()[1:6])]
    together = losses(searched(tmp_path / "a", task, members))
    by_three = losses(searched(tmp_path / "b", task, members, replace(SETTINGS, population=2)))
    assert together.keys() == by_three.keys()
    assert len(together) == 2 * len(members)
    for key, loss in together.items():
        assert by_three[key] == pytest.approx(loss, abs=2e-5)


def test_data_are_a_function_of_seed_and_step(task: Task) -> None:
    batches = {(seed, step): task.batch([seed], step)["input_ids"] for seed in (0, 1) for step in (0, 1)}
    for one, other in itertools.combinations(batches.values(), 2):
        assert not torch.equal(one, other)
    assert torch.equal(task.batch([0, 1], 1)["input_ids"], torch.cat([batches[0, 1], batches[1, 1]]))


# Halving


def test_cuts_and_points() -> None:
    settings = SearchSettings(steps=81, every=20, halving=3, rungs=3)
    assert settings.cuts(32) == [9, 27]
    assert settings.points(32) == [9, 20, 27, 40, 60, 80, 81]
    assert settings.cuts(8) == [27]
    assert settings.cuts(2) == []
    assert replace(settings, halving=0).cuts(32) == []
    assert replace(settings, steps=2).cuts(32) == [1]


def test_each_rung_keeps_the_best(tmp_path: Path, task: Task) -> None:
    members = Space(lr="1e-4,1e-3,1e-2,5e-2,1e-1", rank="2", targets="q_proj", method="lora", seeds="0,1").grid()
    settings = replace(SETTINGS, steps=9, every=3, halving=3)
    task = replace(task, settings=replace(task.settings, steps=9))
    search = searched(tmp_path, task, members, settings, save=2)
    found = losses(search)
    assert settings.cuts(10) == [1, 3]
    field = set(range(10))
    for step, keep in ((1, 4), (3, 2)):
        assert {i for i, s in found if s == step} == field
        field = set(sorted(field, key=lambda i: found[i, step])[:keep])
    assert {i for i, s in found if s == 9} == field
    assert {i for i, p in search.progress.items() if p.status == LIVE} == field
    assert {p.status for p in search.progress.values()} == {LIVE, HALVED}
    board = json.loads((tmp_path / "leaderboard.json").read_text())
    assert [row["step"] for row in board] == [9] * 2 + [3] * 2 + [1] * 6
    for _, rows in itertools.groupby(board, key=lambda row: row["step"]):
        of_step = [row["heldout_loss"] for row in rows]
        assert of_step == sorted(of_step)
    assert search.status.done == search.status.total == 10 * 1 + 4 * 2 + 2 * 6


def test_a_member_whose_loss_is_not_finite_is_dropped_and_reported(tmp_path: Path, task: Task) -> None:
    good = Space(lr="1e-2", rank="2", targets="q_proj").grid()
    bad = [*good, replace(good[0], id=2, lr=1e38)]
    search = searched(tmp_path / "bad", task, bad, save=3)
    assert [search.progress[i].status for i in range(3)] == [LIVE, LIVE, NOT_FINITE]
    step = search.progress[2].step
    assert any(f"member 2 dropped at step {step}: its loss is not finite" in note for note in search.status.notes)
    lines = [json.loads(line) for line in (tmp_path / "bad" / "results.jsonl").read_text().splitlines()]
    assert [line["heldout_loss"] for line in lines if line["member"] == 2][-1] is None
    expected = losses(searched(tmp_path / "good", task, good))
    found = losses(search)
    for key, loss in expected.items():
        assert found[key] == pytest.approx(loss, abs=2e-5)
    assert len(list((tmp_path / "bad" / "adapters").iterdir())) == 2
    assert search.ranking()[-1] == 2


# Memory that runs out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not enough memory")])
def test_a_population_that_runs_out_of_memory_is_halved(tmp_path: Path, task: Task, error: Exception) -> None:
    members = EIGHT.grid()
    search = Search(task, members, SETTINGS, Store(tmp_path, {}, len(members)))
    step, sizes = search.step, []

    def limited(params: Any, stack: Any, state: Any, batch: Any, **options: Any) -> Any:
        sizes.append(len(stack))
        # The probe may be large: memory runs out later, when something else took it.
        if len(stack) > 2 and len(sizes) > 6:
            raise error
        return step(params, stack, state, batch, **options)

    search.step = limited
    search.run()
    assert "memory ran out with 8 members together, continuing with 4" in search.status.notes
    assert "memory ran out with 4 members together, continuing with 2" in search.status.notes
    assert max(sizes[8:]) == search.store.state.size == 2
    expected = losses(searched(tmp_path / "plain", task, members))
    found = losses(search)
    assert found.keys() == expected.keys()
    assert [found[key] for key in expected] == pytest.approx([*expected.values()], abs=2e-5)


def test_the_process_with_the_least_memory_decides_for_all(
    tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = EIGHT.grid()
    search = Search(task, members, SETTINGS, Store(tmp_path, {}, len(members)))
    others: list[Any] = [(3, 100), _TooMany(2, "not enough memory")]  # what it measured, and what then ran out
    monkeypatch.setattr(ranks, "gathered", lambda own: [own, others.pop(0) if others else None])
    search.run()
    assert search.store.state.size == 1
    assert search.status.notes[0].startswith("3 members together: 0 MiB")
    assert "memory ran out with 2 members together, continuing with 1" in search.status.notes


def test_memory_that_one_member_exhausts_is_an_error(tmp_path: Path, task: Task) -> None:
    search = Search(task, EIGHT.grid()[:2], SETTINGS, Store(tmp_path, {}, 2))
    search.store.state.size, search.store.state.budget = 2, SETTINGS.budget

    def exhausted(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    search.step = exhausted
    with pytest.raises(ConfigError, match=r"a single member: CUDA out of memory.*Lower --batch"):
        search.run()


def test_other_errors_are_not_taken_for_memory(tmp_path: Path, task: Task) -> None:
    search = Search(task, EIGHT.grid()[:2], SETTINGS, Store(tmp_path, {}, 2))

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("shapes do not match")

    search.step = broken
    with pytest.raises(RuntimeError, match="shapes do not match"):
        search.run()


# Killed and resumed

SMALL = Space(lr="1e-3,1e-2,1e-1", rank="2", targets="q_proj+v_proj", method="lora,dora").grid()
CUT = replace(SETTINGS, steps=4, every=2, halving=2, rungs=2, population=4)


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, write: int, *, before: bool) -> Iterator[None]:
    """Ends everything at one of the writes: before it, or between it and whatever follows."""
    count = itertools.count()

    def replace_files(folder: Path, writers: dict[str, Callable[[Path], None]]) -> None:
        for name, writer in writers.items():
            k = next(count)
            if k == write and before:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f".{name}.draft.tmp").write_text("half")
                raise Killed
            _files.replace_files(folder, {name: writer})
            if k == write:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("funclora._apps.sweep.store.replace_files", replace_files)
        patch.setattr("funclora._apps.sweep.report.replace_files", replace_files)
        yield


def test_killed_at_any_write_it_ends_with_the_same_result(
    tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    for picture in ("learning_curves", "learning_rates", "parallel_coordinates"):  # slow, and not looked at here
        monkeypatch.setattr(report, picture, lambda rows, file: file.write_bytes(b""))
    searched(tmp_path / "whole", task, SMALL, CUT, save=2)
    expected = comparable(tmp_path / "whole")
    assert len(expected[0]) == 6 + 3
    writes, interrupted = 0, 0
    while True:
        folder = tmp_path / str(writes)
        with killed_at(monkeypatch, writes, before=writes % 2 == 0):
            try:
                searched(folder, task, SMALL, CUT, save=2)
            except Killed:
                interrupted += 1
            else:
                break
        searched(folder, task, SMALL, CUT, save=2)
        assert comparable(folder) == expected, f"killed at write {writes}"
        assert not list(folder.rglob("*.tmp"))
        writes += 3
    assert interrupted > 6


def command(out: Path, *more: str) -> list[str]:
    options = "--lr 1e-3,1e-2,3e-2 --rank 2 --targets q_proj --method lora,dora --steps 8 --eval-every 2 --halving 2"
    tail = ["--context", "8", "--batch", "1", "--rows", "2", "--memory", "1TiB", "--save", "1"]
    pairs = zip(options.split()[::2], options.split()[1::2], strict=True)
    own = [word for pair in pairs if pair[0] not in more for word in pair]  # lists that are repeated would add up
    return ["sweep", "--out", str(out), *own, *tail, *more]


def process(out: Path, dies: int | None = None) -> int:
    """The exit code of the command, killed that many calls of functions after its first commit."""
    paths = [str(Path(funclora.__file__).parents[1]), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    code = "" if dies is None else f"import dying; dying.die_after_writing('state.json', {dies}); "
    code += "from funclora.cli import main; main()"
    argv = [sys.executable, "-c", code, *command(out)]
    return subprocess.run(argv, env=environment, stdout=subprocess.DEVNULL, check=False).returncode


def test_sigkill_at_random_moments_changes_nothing(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert process(whole) == 0
    moments = random.Random(0)
    for _ in range(2):
        assert process(out, dies=moments.randrange(20_000)) == -signal.SIGKILL
    assert process(out) == 0
    assert comparable(out) == comparable(whole)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len({(line["member"], line["step"]) for line in lines}) == len(lines)


def test_lines_that_no_commit_counts_are_cut_off(tmp_path: Path, task: Task) -> None:
    first = Search(task, SMALL, CUT, Store(tmp_path, {}, len(SMALL)))
    first.run()
    n = first.store.state.lines
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"member": 0')
    again = Store(tmp_path, {}, len(SMALL))
    assert len(again.state.records) == n
    again.commit()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == n


def test_broken_files_are_told(tmp_path: Path, task: Task) -> None:
    searched(tmp_path, task, SMALL[:2], CUT)
    config = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(FormatError, match=r"has lost lines. Use another --out"):
        Store(tmp_path, config, 2)
    (tmp_path / "state.json").write_text("{")
    (tmp_path / "before.json").unlink()
    with pytest.raises(FormatError, match=r"state.json is not JSON"):
        Store(tmp_path, config, 2)


@pytest.mark.parametrize("what", ["state", "cut state", "tensors", "no tensors"])
def test_a_damaged_state_is_left_for_the_one_before(what: str, tmp_path: Path, task: Task) -> None:
    """The search goes on from there and ends as it would have ended."""
    expected = losses(searched(tmp_path / "whole", task, SMALL, CUT))
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "_cut", killed)
        with pytest.raises(Killed, match="at the rung"):
            searched(out, task, SMALL, CUT)
    last = json.loads((out / "state.json").read_text())
    file = out / "state" / max(member["file"] for member in last["members"].values() if member["file"])
    damaged = {"tensors": file, "no tensors": file}.get(what, out / "state.json")
    content = damaged.read_bytes()
    if what == "no tensors":
        damaged.unlink()
    else:
        damaged.write_bytes(content[:-40] + (b"0" if what != "tensors" else b"") + content[-39:])
    with pytest.warns(FuncloraWarning, match=r"(damaged|not JSON).* The search goes on from the state before it\."):
        again = searched(out, task, SMALL, CUT)
    assert losses(again) == expected


def killed(*_: object) -> None:
    raise Killed("at the rung")


def test_a_file_outside_of_the_folder_is_not_read(tmp_path: Path, task: Task) -> None:
    """`state.json` names files; none of them leads out of the folder, by a path or by a link."""
    searched(tmp_path / "in", task, SMALL[:2], CUT)
    folder = tmp_path / "in"
    config, state = (json.loads((folder / f"{name}.json").read_text()) for name in ("sweep", "state"))
    (folder / "before.json").unlink()
    name = next(member["file"] for member in state["members"].values())
    outside = tmp_path / "outside.safetensors"
    (folder / "state" / name).rename(outside)
    (folder / "state" / "link.safetensors").symlink_to(outside)
    for given in ("../../outside.safetensors", str(outside), "link.safetensors", "a" * 10_000, 7, "..", "\x1b[2J"):
        for member in state["members"].values():
            member["file"] = given
        (folder / "state.json").write_bytes(sealed(json.dumps({**state, **BLANK}).encode()))
        with pytest.raises(FormatError, match=r"state\.json: .*file: (expected |.*a link that leads out)"):
            Store(folder, config, 2)
        assert outside.exists()


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "search"
    with claimed(out), pytest.raises(ConfigError, match="another process is using"), claimed(out):
        pass
    assert not out.exists(), "nothing was begun"
    with claimed(out):
        Store(out, {}, 1)
    assert out.exists()


# The command


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def test_the_command_leaves_what_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(*command(out, "--json"))
    assert result.exit_code == 0, result.output
    outcome = json.loads(result.stdout)
    board = json.loads((out / "leaderboard.json").read_text())
    assert outcome["leaderboard"] == board
    assert len(board) == 6
    for picture in ("learning_curves.png", "learning_rates.png", "parallel_coordinates.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    (folder,) = (out / "adapters").iterdir()
    assert folder.name == f"01-member-{board[0]['member']:03d}"
    task = load_task(Settings(data=(out / "data.jsonl",), context=8), out, rows=2)
    adapters, config = fl.load_peft(folder, task.base.model)
    assert config.use_dora == (board[0]["method"] == "dora")
    assert task.scores([adapters])[0].values["loss"] == pytest.approx(board[0]["heldout_loss"], rel=1e-4)
    assert not list((out / "state").iterdir())

    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.json*")}
    again = invoke(*command(out))  # done already: told again, nothing is written
    assert again.exit_code == 0
    assert "The best 6 of 6" in again.output
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.json*")} == before

    other = invoke(*command(out, "--clip", "0.5"))
    assert other.exit_code == 2
    assert re.search(r"has a search with clip = 1.0, this one has 0.5\.", other.stderr)
    assert len(other.stderr.splitlines()) == 1
    other = invoke(*command(out, "--domain", "email", "--json"))
    assert other.exit_code == 2
    assert other.stdout == ""
    assert re.search(r'has a search with data = "\w+", this one has "\w+"', other.stderr)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "dorra"], "Near names: dora"),
        (["--domain", "emial"], "Near names: email"),
        (["--targets", "q_prj"], "q_proj"),
        (["--lr", "1e-4:1e-2"], "add --random 32"),
        (["--memory", "lots"], "expected a size such as 2GiB"),
        (["--memory", "1MiB"], "one member alone needs"),
        (["--model", "somewhere"], "there is no data to train somewhere on. Give a file or a folder."),
        (["--dropout", "1"], "--dropout: expected a number from 0, below 1, got '1'"),
        (["--validation-split", "0"], "nothing is held out, so members cannot be compared. Give --validation"),
        (["--eval-every", "-1"], "--eval-every: expected at least 0"),
        (["--compare", "one"], "--compare: expected two folders of searches, got 1."),
        (["--compare", "one,two"], "one contains no sweep.json, so it is not the folder of a search."),
        (["--device", "toaster"], "'toaster' cannot be used here"),
    ],
)
def test_errors_are_one_line_with_a_remedy(tmp_path: Path, args: list[str], message: str) -> None:
    result = invoke("sweep", "--out", str(tmp_path / "out"), "--rows", "2", *args)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("funclora sweep: ")
    assert message in result.stderr


def test_if_no_loss_stays_finite_the_command_says_so(tmp_path: Path) -> None:
    result = invoke(*command(tmp_path / "out", "--lr", "1e38", "--targets", "all-linear"))
    assert result.exit_code == 2
    assert "No member has a finite loss" in result.stderr


# Other models


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    vocabulary = {word: i for i, word in enumerate(["</s>", "<unk>", *(f"w{k}" for k in range(30))])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, num_key_value_heads=2, max_position_embeddings=64, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return file


def test_a_folder_of_transformers_and_a_file_of_texts(tmp_path: Path, llama: Path) -> None:
    data = jsonl(tmp_path / "texts.jsonl", [" ".join(f"w{(i + k) % 30}" for k in range(20)) for i in range(16)])
    out = tmp_path / "out"
    options = (
        "--lr 1e-2,1e-1 --rank 2 --targets q_proj+v_proj --steps 4 --eval-every 2 --halving 0 --context 8 --rows 3"
    )
    result = invoke("sweep", "--model", str(llama), "--data", str(data), "--out", str(out), "--json", *options.split())
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["leaderboard"]) == 4
    written = json.loads(next((out / "adapters").glob("01-*/adapter_config.json")).read_text())
    assert written["task_type"] == "CAUSAL_LM"
    assert written["base_model_name_or_path"] == str(llama)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", r"texts.jsonl:1: expected a text under 'text'.* it has no fields"),
        ("[", r"texts.jsonl:1: expected JSON in each line"),
        ('{"text": 3}', r"texts.jsonl:1: text: expected a text, got 3"),
        ("", r"texts.jsonl: contains no records"),
    ],
)
def test_data_that_cannot_be_read(tmp_path: Path, llama: Path, line: str, message: str) -> None:
    (tmp_path / "texts.jsonl").write_text(line + "\n")
    with pytest.raises(FormatError, match=message):
        load_task(Settings(model=llama, data=(tmp_path / "texts.jsonl",)), tmp_path)


def test_a_file_of_settings(tmp_path: Path, llama: Path) -> None:
    """What is not searched is as in the file; what a search does not do is refused."""
    data = jsonl(tmp_path / "texts.jsonl", [" ".join(f"w{(i + k) % 30}" for k in range(20)) for i in range(16)])
    file = tmp_path / "run.toml"
    lines = [f'model = "{llama}"', f'data = "{data}"', 'targets = ["q_proj"]', "rank = 2", "alpha = 3.0", "steps = 2"]
    file.write_text("\n".join([*lines, "validation_split = 0.2", "context = 8"]))
    result = invoke("sweep", str(file), "--out", str(tmp_path / "out"), "--lr", "1e-3,1e-2", "--json")
    assert result.exit_code == 0, result.output
    board = json.loads(result.stdout)["leaderboard"]
    assert {(row["rank"], row["alpha"], row["targets"], row["method"]) for row in board} == {(2, 3, "q_proj", "lora")}
    assert {row["lr"] for row in board} == {1e-3, 1e-2}
    for name, more in (("merge", ["merge = true"]), ("chunk", ['task = "embedding"', "chunk = 2"])):
        file.write_text("\n".join([*lines, *more]))
        result = invoke("sweep", str(file), "--out", str(tmp_path / "other"))
        assert f"run.toml: {name} has no effect in a search. Leave it out." in result.stderr


def test_two_searches_side_by_side(tmp_path: Path) -> None:
    for name, *more in (("one", "--method", "lora"), ("two", "--method", "dora"), ("three", "--domain", "email")):
        assert invoke(*command(tmp_path / name, "--halving", "0", *more)).exit_code == 0
    boards = [json.loads((tmp_path / name / "leaderboard.json").read_text()) for name in ("one", "two")]
    result = invoke("sweep", "--compare", f"{tmp_path / 'one'},{tmp_path / 'two'}", "--json")
    found = json.loads(result.stdout)
    by_rate = [{row["lr"]: row["heldout_loss"] for row in board} for board in boards]
    expected = [by_rate[1][row["lr"]] - row["heldout_loss"] for row in boards[0]]
    assert found["differences"] == pytest.approx(expected)
    assert (found["pairs"], found["mean_difference"]) == (3, pytest.approx(sum(expected) / 3))
    assert found["second_is_better"] == sum(x < 0 for x in expected)
    assert found["options"] == {"method": ["lora", "dora"]}
    assert [side["best_member"] for side in found["searches"]] == [board[0]["member"] for board in boards]
    shown = invoke("sweep", "--compare", f"{tmp_path / 'one'},{tmp_path / 'two'}").stdout
    assert "3 pairs of members are equal in all other options" in " ".join(shown.split())
    other = invoke("sweep", "--compare", f"{tmp_path / 'one'},{tmp_path / 'three'}")
    assert "have different data, so their losses cannot be compared." in other.stderr


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text("{}")
    data = jsonl(tmp_path / "texts.jsonl", ["w1"])
    result = invoke("sweep", "--model", str(tmp_path), "--data", str(data), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "pip install 'funclora[hf]'" in result.stderr


# Pictures and the comparison


def test_axes_of_the_picture() -> None:
    heights, ticks = report._places([1e-4, 1e-2, 1e-3], "lr")
    assert heights == {1e-4: 0, 1e-3: 0.5, 1e-2: 1}
    assert [text for _, text in ticks] == ["0.0001", "0.001", "0.01"]
    rates = [10 ** (-4 + k / 10) for k in range(21)]
    heights, ticks = report._places(rates, "lr")
    assert [heights[rate] for rate in rates] == pytest.approx([k / 20 for k in range(21)])
    assert [float(text) for _, text in ticks] == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2], rel=1e-3)
    assert report._places(["b", "a"], "targets")[0] == {"a": 0, "b": 1}


@pytest.mark.parametrize("losses_", [[], [None], [1.0], [1.0, 2.0, None, math.pi]])
def test_pictures_of_few_members(tmp_path: Path, losses_: list[float | None]) -> None:
    rows = [
        {"member": i, "heldout_loss": loss, "step": 1, "status": LIVE, **SMALL[i].values}
        for i, loss in enumerate(losses_)
    ]
    report.parallel_coordinates(rows, tmp_path / "p.png")
    report.learning_curves(rows, tmp_path / "l.png")
    report.learning_rates(rows, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


def test_the_comparison_with_members_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    file = Path(__file__).parents[2] / "examples" / "sweep_speed.py"
    result = runpy.run_path(str(file))["main"](["--members=3", "--steps=2", "--context=8"])
    assert result.members == 3
    assert result.difference < 1e-3
    assert f"{result.ratio:8.1f}" in capsys.readouterr().out

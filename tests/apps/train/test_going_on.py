"""Going on: longer runs, from an adapter in a folder, and which adapter is the result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import task_models
import torch
from tiny_runs import byte_base, close, data, fresh, llama_base, run, same, settings
from transformers.integrations.neftune import neftune_post_forward_hook

import funclora as fl
from funclora._apps.train import loop
from funclora._apps.train.checkpoint import opened
from funclora._apps.train.finish import ADAPTER
from funclora._apps.train.folder import load_model
from funclora._apps.train.journal import Journal
from funclora._apps.train.loop import FINISHED
from funclora._apps.train.reading import read
from funclora._apps.train.run import run as whole_run
from funclora._apps.train.settings import CAUSAL, SEQUENCE, Settings
from funclora._apps.train.step import noise
from funclora.errors import ConfigError


def killed(given: Settings, at: int, rows: Any = None) -> None:
    """A run that Ctrl-C ends after a step."""
    base = byte_base()
    with opened(given) as folder, Journal(given, quiet=True) as journal:
        training = loop._Training(base, fresh(base, given), rows or data(), given, journal, folder, lambda: False)
        training.interrupted = lambda: training.progress.step >= at
        with pytest.raises(KeyboardInterrupt, match="is done and saved"):
            training.outcome()


# --- longer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_longer_run_is_that_from_the_start(tmp_path: Path, schedule: str) -> None:
    given = settings(tmp_path / "run", schedule=schedule, decay=3)
    if schedule == "wsd":  # the short one ends before its decay
        want, _ = run(replace(given, steps=12, out=tmp_path / "whole"))
        killed(replace(given, steps=9), 5)
    else:
        want, _ = run(replace(given, steps=12, out=tmp_path / "whole"))
        run(given)
    got, journal = run(replace(given, steps=12, resume=True))
    same(got.adapters, want.adapters)
    assert not any("learning rates" in note for note in journal.notes)
    assert [loss for _, loss in got.losses["train"]] == [loss for _, loss in want.losses["train"]]
    again, _ = run(replace(given, steps=12, resume=True))
    same(again.adapters, want.adapters)


def test_another_schedule_before_is_said_and_a_kill_in_the_longer_part_changes_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(settings(tmp_path / name))
    want, journal = run(settings(tmp_path / "a", steps=12, resume=True))
    assert "The first 8 steps had the learning rates of a run of 8 steps" in " ".join(journal.notes)
    killed(settings(tmp_path / "b", steps=12, resume=True), 10)
    assert json.loads((tmp_path / "b" / "run.json").read_text())["settings"]["steps"] == 12
    assert read(tmp_path / "b" / "run.toml", {}).steps == 12
    got, _ = run(settings(tmp_path / "b", steps=12, resume=True))
    same(got.adapters, want.adapters)


def test_a_run_gets_no_shorter_than_it_is_and_early_stopping_is_the_end(tmp_path: Path) -> None:
    run(settings(tmp_path / "run"))
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(ConfigError, match=r"steps: the run in .* has taken 8 steps already, expected at most 6"):
        run(settings(tmp_path / "run", steps=6, resume=True))
    assert (tmp_path / "run" / "run.json").read_text() == before
    stopped = settings(tmp_path / "stopped", steps=60, lr=5e-2, eval_every=2, patience=1, dropout=0.0)
    outcome, _ = run(stopped, rows=data(n=4))
    assert outcome.stopped != FINISHED
    with pytest.raises(ConfigError, match=r"resume: early stopping ended .* with --adapter"):
        run(replace(stopped, steps=90, resume=True), rows=data(n=4))


# --- the result ------------------------------------------------------------------------------------------------


def test_the_best_is_the_result_unless_the_last_is_asked_for(tmp_path: Path) -> None:
    given = settings(tmp_path / "run", steps=60, lr=5e-2, eval_every=5, dropout=0.0)
    best, _ = run(given, rows=data(n=4))
    assert best.best is not None
    assert best.step == best.best[0] < best.taken == 60
    assert best.best[1] == min(loss for _, loss in best.losses["validation"])
    short, _ = run(replace(given, out=tmp_path / "last", final="last"), rows=data(n=4))
    assert (short.step, short.taken) == (60, 60)
    again, _ = run(replace(given, final="last", resume=True), rows=data(n=4))
    same(again.adapters, short.adapters)
    assert best.chosen() == f"of step {best.step}, the best evaluation; the last step is 60"
    assert short.chosen() == "of step 60"


# --- from a folder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return task_models.save(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return task_models.save(tmp_path_factory.mktemp("bert"), "bert")


def given(out: Path, model: Path, task: str = CAUSAL, **options: Any) -> Settings:
    records = task_models.data(out.parent / f"{task}.jsonl", "prompt" if task == CAUSAL else task)
    values: dict[str, Any] = {"model": model, "task": task, "data": records, "out": out, "steps": 3, "lr": 1e-2}
    return read(None, values | {"batch": 2, "validation_split": 0.0} | options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dora", "rank": 3, "rslora": True},
        {"init": "pissa", "rank": 2, "targets": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "quantize": "nf4"},
    ],
    ids=str,
)
def test_it_starts_where_the_folder_ends(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    first = whole_run(given(tmp_path / "first", llama, **options), quiet=True)
    kept = {key: value for key, value in options.items() if key == "quantize"}
    folder = tmp_path / "first" / ADAPTER
    still = given(tmp_path / "still", llama, adapter=folder, lr=1e-30, **kept)
    second = whole_run(still, quiet=True)
    model = task_models.CLASSES[CAUSAL].from_pretrained(llama)
    before, config = fl.load_peft(folder, model)
    after, own = fl.load_peft(tmp_path / "still" / ADAPTER, model)
    close(after, before, 1e-6)
    assert own == config
    assert "started from" in (tmp_path / "still" / ADAPTER / "README.md").read_text()
    # Its file makes the same run, and it is no other than the one that went on.
    again = read(tmp_path / "still" / "run.toml", {"out": tmp_path / "again", "lr": 1e-2})
    whole_run(again, quiet=True)
    trained, _ = fl.load_peft(tmp_path / "again" / ADAPTER, model)
    with pytest.raises(AssertionError, match="not close"):
        close(trained, before, 1e-4)
    assert first.outcome.taken == second.outcome.taken == 3
    resumed = whole_run(replace(again, resume=True), quiet=True)
    assert resumed.outcome.step == 3


def test_a_classifier_goes_on_with_its_head_and_classes(bert: Path, tmp_path: Path) -> None:
    whole_run(given(tmp_path / "first", bert, SEQUENCE), quiet=True)
    folder = tmp_path / "first" / ADAPTER
    whole_run(given(tmp_path / "second", bert, SEQUENCE, adapter=folder, lr=1e-30), quiet=True)
    assert (folder / "classes.json").read_text() == (tmp_path / "second" / ADAPTER / "classes.json").read_text()
    names = json.loads((folder / "classes.json").read_text())
    model = task_models.CLASSES[SEQUENCE].from_pretrained(bert, num_labels=len(names))
    close(fl.load_peft(tmp_path / "second" / ADAPTER, model)[0], fl.load_peft(folder, model)[0], 1e-6)
    with pytest.raises(ConfigError, match=r"task: the adapter in .* was trained for sequence-classification"):
        whole_run(given(tmp_path / "third", bert, CAUSAL, adapter=folder), quiet=True)


def test_another_starting_adapter_is_another_run(llama: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        whole_run(given(tmp_path / name, llama, seed=seed), quiet=True)
    run = given(tmp_path / "run", llama, adapter=tmp_path / "a" / ADAPTER)
    whole_run(run, quiet=True)
    with pytest.raises(ConfigError, match="other starting adapter than there"):
        whole_run(replace(run, adapter=tmp_path / "b" / ADAPTER, resume=True), quiet=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rank", "8"), ("method", "dora"), ("targets", ["q_proj"]), ("init", "pissa"), ("dropout", "0.1")],
)
def test_what_the_folder_decides_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"--{key}: with --adapter, it is that of the folder"):
        read(None, {"adapter": "folder", key: value})


# --- optimizers, noise, attention ------------------------------------------------------------------------------


def test_noise_is_that_of_transformers() -> None:
    module = torch.nn.Embedding(5, 6).train()
    module.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    output = torch.randn(2, 7, 6)
    torch.manual_seed(0)
    want = neftune_post_forward_hook(module, None, output)
    torch.manual_seed(0)
    torch.testing.assert_close(noise(5.0)(module, None, output), want)
    assert not torch.allclose(want, output, atol=1e-2)


@pytest.mark.parametrize("base", [byte_base, llama_base])
def test_noise_is_drawn_in_training_only_and_by_step(base: Any, tmp_path: Path) -> None:
    plain, _ = run(settings(tmp_path / "plain", dropout=0.0, neftune=0.0), base(), data(17))
    noisy, _ = run(settings(tmp_path / "noisy", dropout=0.0, neftune=5.0), base(), data(17))
    again, _ = run(settings(tmp_path / "again", dropout=0.0, neftune=5.0), base(), data(17))
    same(noisy.adapters, again.adapters)
    assert plain.losses["train"] != noisy.losses["train"]


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "adamw-8bit"])
def test_optimizers_learn_and_go_on_after_a_kill(optimizer: str, tmp_path: Path) -> None:
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    options: dict[str, Any] = {"optimizer": optimizer, "dropout": 0.0, "lora_plus": 2.0, "schedule": "polynomial"}
    rate = {"sgd": 1.0, "adafactor": 1e-2, "adamw-8bit": 1e-2}[optimizer]
    want, _ = run(settings(tmp_path / "whole", lr=rate, steps=30, **options), rows=data(n=4))
    losses = [loss for _, loss in want.losses["train"]]
    assert sum(losses[-3:]) < 0.99 * sum(losses[:3])
    again = settings(tmp_path / "killed", lr=rate, steps=30, **options)
    killed(again, 11, data(n=4))
    got, _ = run(replace(again, resume=True), rows=data(n=4))
    same(got.adapters, want.adapters)


def test_attention_is_the_models(llama: Path, tmp_path: Path) -> None:
    for name in ("eager", "sdpa"):
        model, _ = load_model(llama, CAUSAL, attention=name)
        assert model.config._attn_implementation == name  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"attention: flash_attention_2 cannot be used .* auto is always"):
        load_model(llama, CAUSAL, attention="flash_attention_2")

"""What a run tells: lines, curves, the terminal; what is asked for and not there."""

from __future__ import annotations

import builtins
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import byte_base, data, fresh, run, settings

from funclora._apps.train._sinks import Terminal
from funclora._apps.train.checkpoint import CHECKPOINTS, RUN
from funclora._apps.train.journal import Journal
from funclora._apps.train.loop import train
from funclora.errors import ConfigError


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def told(given: Any, **options: Any) -> str:
    """What is seen of a run."""
    text = io.StringIO()
    base = byte_base()
    with Journal(given, console=Console(file=text, width=120, **options)) as journal:
        train(base, fresh(base, given), data(), given, journal)
    return text.getvalue()


def test_metrics_have_a_line_for_each_step_and_evaluation(tmp_path: Path) -> None:
    run(settings(tmp_path, eval_every=4))
    training = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 9))
    assert {*training[0]} == {
        "step", "epoch", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds"
    }  # fmt: skip
    assert [line["epoch"] for line in training[:5]] == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert training[0]["lr"] == 0.0
    assert training[2]["lr"] == pytest.approx(1e-2)
    tokens = [line["tokens"] for line in training]
    assert tokens == sorted(tokens)
    assert tokens[3] == sum(len(row.ids) for row in data().train), "an epoch reads every token once, padding none"
    assert [line["step"] for line in lines(tmp_path) if "validation_loss" in line] == [4, 8]


def test_tensorboard_has_the_curves_also_of_a_resumed_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = settings(tmp_path, eval_every=4, tensorboard=True, sample=("ab",), sample_tokens=2, keep=9)
    outcome, _ = run(given)
    (tmp_path / CHECKPOINTS / "00000008.safetensors").unlink()
    run(replace(given, resume=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {*events.Tags()["scalars"]} >= {"train/loss", "train/lr", "validation/loss"}
    for name, key in (("train/loss", "train"), ("validation/loss", "validation")):
        got = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]
        assert outcome.losses[key] == got
    assert events.Tags()["tensors"], "the samples"


def hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed."""
    real = builtins.__import__

    def without(module: str, *rest: Any, **more: Any) -> Any:
        if module.split(".")[0] == name or module == f"torch.utils.{name}":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *rest, **more)

    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)


@pytest.mark.parametrize(("name", "value"), [("tensorboard", True), ("wandb", "project"), ("mlflow", "experiment")])
def test_what_is_asked_for_and_not_installed_is_named(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden(name, monkeypatch)
    said = rf"{name}: it is requested, but not installed. Install it \(pip install {name}\), or leave --{name} out"
    with pytest.raises(ConfigError, match=said):
        Journal(settings(tmp_path, **{name: value}))


class FakeRun:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.logged, self.finished = options, [], False  # type: ignore[var-annotated]

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        made.append(FakeRun(options))
        return made[-1]

    fake = SimpleNamespace(init=init, Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    given = settings(tmp_path, eval_every=4, wandb="bytes", sample=("ab",), sample_tokens=2)
    run(given)
    (tmp_path / CHECKPOINTS / "00000008.safetensors").unlink()
    run(replace(given, resume=True))
    first, second = made
    assert first.options["project"] == "bytes"
    assert first.options["id"] == second.options["id"] == json.loads((tmp_path / RUN).read_text())["id"]
    assert first.options["resume"] == "allow"
    assert first.options["config"]["lr"] == given.lr
    assert first.finished
    assert second.finished
    assert [step for step, values in first.logged if "train/loss" in values] == list(range(1, 9))
    assert [step for step, values in second.logged if "train/loss" in values] == [5, 6, 7, 8]
    assert [step for step, values in first.logged if "validation/loss" in values] == [4, 8]
    (table,) = (values["samples"] for step, values in first.logged if "samples" in values and step == 4)
    assert table[0] == ["step", "prompt", "continuation"]
    assert table[1][0][:2] == [4, "ab"]


class FakeMLflow:
    """The functions of MLflow that are documented for runs, with a run in memory for each tag."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.active: dict[str, Any] | None = None

    def set_experiment(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=f"experiment {name}")

    def search_runs(
        self, experiments: list[str], filter_string: str, output_format: str, max_results: int
    ) -> list[Any]:
        assert (experiments, output_format, max_results) == (["experiment bytes"], "list", 1)
        tag = filter_string.removeprefix("tags.`funclora.run` = '").removesuffix("'")
        return [SimpleNamespace(info=SimpleNamespace(run_id=tag))] if tag in self.runs else []

    def start_run(self, run_id: str = "", run_name: str = "", tags: Any = None) -> None:
        assert self.active is None
        fresh: dict[str, Any] = {"name": run_name, "params": {}, "metrics": [], "texts": {}, "started": 0}
        self.active = self.runs[run_id] if run_id else self.runs.setdefault(tags["funclora.run"], fresh)
        self.active["started"] += 1

    def log_params(self, params: dict[str, Any]) -> None:
        assert self.active is not None
        self.active["params"] |= params

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        assert self.active is not None
        self.active["metrics"].append((step, metrics))

    def log_text(self, text: str, file: str) -> None:
        assert self.active is not None
        self.active["texts"][file] = text

    def end_run(self) -> None:
        self.active = None


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    given = settings(tmp_path, eval_every=4, mlflow="bytes", sample=("ab",), sample_tokens=2)
    outcome, _ = run(given)
    (tmp_path / CHECKPOINTS / "00000008.safetensors").unlink()
    run(replace(given, resume=True))
    ((tag, made),) = fake.runs.items()
    assert tag == json.loads((tmp_path / RUN).read_text())["id"]
    assert (made["started"], made["name"], fake.active) == (2, tmp_path.name, None)
    assert made["params"]["lr"] == given.lr
    steps = [step for step, values in made["metrics"] if "train/loss" in values]
    assert steps == [*range(1, 9), 5, 6, 7, 8]
    losses = {step: values["validation/loss"] for step, values in made["metrics"] if "validation/loss" in values}
    assert [*losses.items()] == outcome.losses["validation"]
    assert [*made["texts"]] == ["samples/00000004.txt", "samples/00000008.txt"]
    assert all(text.startswith("ab") for text in made["texts"].values())


def test_a_log_has_few_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(settings(tmp_path / "a", eval_every=4, sample=("a[b]",), sample_tokens=2))
    assert text.count("\n") == 1 + 2 + 2 + 1
    assert text.splitlines()[0].startswith("step 1 of 8: loss ")
    assert "step 4: validation loss " in text
    assert "  a[b]" in text, "no markup"
    assert "step 8 of 8: loss " in text
    assert "tokens/s" in text
    monkeypatch.setattr(Terminal, "EVERY", 0.0)
    assert told(settings(tmp_path / "b")).count("loss") == 8 + 1


def test_a_terminal_has_a_bar(tmp_path: Path) -> None:
    text = told(settings(tmp_path, eval_every=4), force_terminal=True)
    assert "8/8" in text
    assert "validation loss" in text


def test_quiet_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, journal = run(settings(tmp_path, eval_every=4))
    journal.note("for who asks")
    assert journal.notes == ["for who asks"]
    assert capfd.readouterr() == ("", "")


def test_no_bar_is_left_behind(tmp_path: Path) -> None:
    text = io.StringIO()
    with Journal(settings(tmp_path), console=Console(file=text, force_terminal=True)) as journal:
        journal.begin(0, 8, "id", 0)
        assert "\x1b[?25l" in text.getvalue(), "the cursor is hidden"
    assert "\x1b[?25h" in text.getvalue(), "and comes back"

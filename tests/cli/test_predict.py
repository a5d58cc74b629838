"""`funclora predict`: each record's classes are those of its own adapter alone, in PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import task_models
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer
from typer.testing import CliRunner, Result

import funclora
from funclora._apps.train.run import run as train
from funclora._apps.train.settings import SEQUENCE, TOKEN, Settings
from funclora._tracking.routed import Routed
from funclora.cli._app import app
from funclora.errors import UnsupportedError

CLASSES = ["beast", "colour", "verb"]
LOADED: dict[str, Any] = {SEQUENCE: AutoModelForSequenceClassification, TOKEN: AutoModelForTokenClassification}
TAGS = [
    {"tokens": ["see", "old", "York", "now"], "label": ["O", "B-LOC", "I-LOC", "O"]},
    {"tokens": ["Ann", "runs"], "label": ["B-PER", "O"]},
    {"tokens": ["go"], "label": ["O"]},
]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, args)])


def printed(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def complaint(*args: object) -> str:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return line


def jsonl(file: Path, *records: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module", params=[SEQUENCE, TOKEN])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model without a head, and two adapters for a task, of both methods."""
    task, path = request.param, tmp_path_factory.mktemp("predict")
    task_models.save(path / "model", "bert")
    data = task_models.data(path / "data.jsonl", task) if task == SEQUENCE else jsonl(path / "data.jsonl", *TAGS)
    for name, method in (("one", "lora"), ("two", "dora")):
        settings = Settings(
            model=path / "model", task=task, data=(data,), out=path / name, steps=12, batch=4, rank=2, lr=0.1,
            method=method, init="gaussian", validation_split=0.0,
        )  # fmt: skip
        train(settings, quiet=True)
        shutil.copytree(path / name / "adapter", path / "adapters" / name)
    return task, path


@torch.no_grad()
def by_peft(trained: tuple[str, Path], record: dict[str, Any], adapter: str) -> torch.Tensor:
    """The probabilities: `[classes]`, or for tags `[words, classes]`."""
    task, path = trained
    classes = json.loads((path / "adapters" / adapter / "classes.json").read_text())
    base = LOADED[task].from_pretrained(path / "model", num_labels=len(classes))
    model = PeftModel.from_pretrained(base, path / "adapters" / adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(path / "model")
    if task == SEQUENCE:
        return model(**tokenizer(record["text"], return_tensors="pt")).logits[0].softmax(-1)
    words = [f" {word}" if i else word for i, word in enumerate(record["tokens"])]
    given = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    ids = given.word_ids()
    return model(**given).logits[0].softmax(-1)[[ids.index(word) for word in range(len(words))]]


def test_each_record_has_its_own_adapter(trained: tuple[str, Path], tmp_path: Path) -> None:
    task, path = trained
    records = [json.loads(line) for line in (path / "data.jsonl").read_text().splitlines()]
    names = [("one", "two")[i % 2] for i in range(len(records))]
    file = jsonl(
        tmp_path / "d.jsonl", *(record | {"adapter": name} for record, name in zip(records, names, strict=True))
    )
    out = tmp_path / "out.jsonl"
    picture = tmp_path / "confusion.png"
    args = (path / "adapters", "--model", path / "model", "--data", file)
    found = printed(*args, "--batch", 3, "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    classes = found["classes"]
    hits = total = 0
    for record, name, row in zip(records, names, found["results"], strict=True):
        shares = by_peft(trained, record, name)
        best = [classes[i] for i in shares.argmax(-1).flatten().tolist()]
        assert (row["adapter"], row["label"]) == (name, record["label"])
        if task == SEQUENCE:
            assert row["predicted"] == best[0]
            assert [*row["scores"].values()] == pytest.approx(shares.tolist(), abs=1e-5)
            assert [*row["scores"]] == classes == CLASSES
        else:
            assert row["predicted"] == best
            assert row["scores"] == pytest.approx(shares.amax(-1).tolist(), abs=1e-5)
        right = [record["label"]] if task == SEQUENCE else record["label"]
        hits, total = hits + sum(a == b for a, b in zip(right, best, strict=True)), total + len(right)
    assert found["metrics"]["accuracy"] == pytest.approx(hits / total)
    assert ("span_f1" in found["metrics"]) == (task == TOKEN)
    assert sum(map(sum, found["metrics"]["confusion"])) == total
    assert (found["records"], found["compared"]) == (len(records), len(records))
    written = run(*args, "--out", out)
    assert written.stdout.startswith(f"{out}: {len(records)} records\n{len(records)} of {len(records)} records have")
    assert [json.loads(line)["predicted"] for line in out.read_text().splitlines()] == [
        row["predicted"] for row in found["results"]
    ]
    assert "already exists. Give another file, or --overwrite" in complaint(*args, "--out", out)


def test_a_model_that_loses_track_of_its_rows(
    trained: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then each adapter has rows of its own."""
    _, path = trained
    records = [json.loads(line) for line in (path / "data.jsonl").read_text().splitlines()]
    file = jsonl(
        tmp_path / "d.jsonl", *(record | {"adapter": ("one", "two")[i % 2]} for i, record in enumerate(records))
    )
    args = (path / "adapters", "--model", path / "model", "--data", file)
    before = printed(*args)
    scored = ("eval", *args[:-1], path / "data.jsonl", "--json")
    scores = json.loads(CliRunner().invoke(app, [*map(str, scored)]).stdout)
    bind, refused = funclora.bind, []

    def refuse(*args: Any, **options: Any) -> Any:
        refused.append(args)
        raise UnsupportedError("rows are lost")

    def bind_alone(model: Any, params: Any, adapters: Any) -> Any:
        routed = any(isinstance(rule, Routed) for rule in adapters.values())
        return refuse() if routed else bind(model, params, adapters)

    monkeypatch.setattr("funclora._train.members.route", refuse)
    monkeypatch.setattr(funclora, "bind", bind_alone)
    assert printed(*args)["results"] == [
        row | {"scores": pytest.approx(row["scores"], abs=1e-5)} for row in before["results"]
    ]
    assert len(refused) == 1
    again = json.loads(CliRunner().invoke(app, [*map(str, scored)]).stdout)
    assert len(refused) == 2
    assert again["loss"]["one"] == pytest.approx(scores["loss"]["one"], rel=1e-5)
    assert again["confusion"] == scores["confusion"]


def test_records_without_classes_have_no_metrics(trained: tuple[str, Path], tmp_path: Path) -> None:
    task, path = trained
    record = {"text": "the red"} if task == SEQUENCE else {"tokens": ["old", "York"]}
    file = jsonl(tmp_path / "d.jsonl", record)
    args = ("--model", path / "model", "--data", file)
    found = printed(path / "adapters" / "two", *args)
    assert (found["metrics"], found["compared"]) == (None, 0)
    shown = run(path / "adapters" / "two", *args).stdout.splitlines()
    (row,) = found["results"]
    if task == SEQUENCE:
        assert shown == [f"{file}:1 under two", f"{row['predicted']} {max(row['scores'].values()):.1%}"]
    else:
        assert shown == [f"{file}:1 under two", f"old/{row['predicted'][0]} York/{row['predicted'][1]}"]
    assert "--plot: no record of" in complaint(path / "adapters" / "two", *args, "--plot", tmp_path / "x.png")


@pytest.mark.parametrize("trained", [TOKEN], indirect=True)
def test_words_that_are_cut_off_have_no_tag(trained: tuple[str, Path], tmp_path: Path) -> None:
    _, path = trained
    file = jsonl(tmp_path / "d.jsonl", {"tokens": ["old", "York", "and", "new"]}, {"tokens": []})
    found = printed(path / "adapters" / "one", "--model", path / "model", "--data", file, "--context", 8)
    row, empty = found["results"]
    assert [tag is None for tag in row["predicted"]] == [False, False, True, True]
    assert [score is None for score in row["scores"]] == [False, False, True, True]
    assert empty["predicted"] == empty["scores"] == []
    assert any("cut off after 8 tokens" in note for note in found["notes"])


def test_a_model_with_a_head_of_its_own(tmp_path: Path) -> None:
    model = task_models.save_classifier(tmp_path / "model", "bert", CLASSES)
    file = jsonl(tmp_path / "d.jsonl", {"text": "red"}, {"text": "a cat sleeps", "label": "beast"})
    found = printed("--model", model, "--data", file)
    plain = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in found["results"]:
        with torch.no_grad():
            shares = plain(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(-1)
        assert row["predicted"] == CLASSES[int(shares.argmax())]
    assert (found["compared"], found["metrics"]["accuracy"] in (0, 1)) == (1, True)


def test_what_does_not_do(trained: tuple[str, Path], tmp_path: Path) -> None:
    task, path = trained
    good = {"text": "red"} if task == SEQUENCE else {"tokens": ["red"]}
    model = ("--model", path / "model")
    other = {"label": "noun"} if task == SEQUENCE else {"label": ["B-ORG"]}
    cases: list[tuple[dict[str, Any], list[object], str]] = [
        (good | {"adapter": "ones"}, [], "d.jsonl:1: there is no adapter 'ones'. Near names: one"),
        (good | {"scores": 1}, ["--adapter", "one"], "d.jsonl:1: has 'scores', which would be written over."),
        (good | other, ["--adapter", "one"], "is none of the classes"),
        ({"body": "red"}, ["--adapter", "one"], "d.jsonl:1: expected a value under"),
        (good, [], "no record names one of the given adapters: one, two."),
        (good, ["--adapter", "three"], "--adapter: there is no adapter 'three'."),
    ]
    for record, args, message in cases:
        assert message in complaint(path / "adapters", *model, *args, "--data", jsonl(tmp_path / "d.jsonl", record)), (
            record
        )
    mixed = jsonl(tmp_path / "d.jsonl", good | {"adapter": "one"}, good | {"adapter": None})
    message = complaint(path / "adapters", *model, "--data", mixed)
    assert "d.jsonl:2: " in message
    assert "without an adapter its classes would be random" in message
    assert "causal-lm has no classes." in complaint("--data", mixed)

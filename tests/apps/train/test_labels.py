"""Labels of texts: what they are taken for; training on numbers, several classes and pairs, as in transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import task_models
import text_models
import torch
from tiny_runs import close
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from typer.testing import CliRunner

import funclora as fl
from funclora._apps.train.base import known_problem
from funclora._apps.train.batches import Batches
from funclora._apps.train.examples import Data, prepare
from funclora._apps.train.folder import PROBLEM_TYPES
from funclora._apps.train.journal import Journal
from funclora._apps.train.loop import train
from funclora._apps.train.plan import plan
from funclora._apps.train.run import run
from funclora._apps.train.settings import AUTO, MULTI, REGRESSION, SEQUENCE, SINGLE, Settings
from funclora._apps.train.setup import Ready, ready
from funclora._apps.train.tasks import trained_problem
from funclora.cli._app import app
from funclora.errors import ConfigError, FormatError
from funclora.io.peft.folder import load_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]
WORDS = task_models.WORDS
NUMBERS = [{"text": f"the {word}", "label": i / 4 - 1} for i, word in enumerate(WORDS * 2)]
PAIRS = [
    {"sentence1": f"the {word}", "sentence2": f"a {other}", "score": float(i % 5)}
    for i, (word, other) in enumerate(zip(WORDS * 2, WORDS[3:] * 4, strict=False))
]
SETS = [
    {"text": f"the {word}", "label": [name for k, name in enumerate(("red", "big", "new")) if i >> k & 1]}
    for i, word in enumerate(WORDS * 2)
]
ENTAILED = [{"premise": r["sentence1"], "hypothesis": r["sentence2"], "label": i % 3} for i, r in enumerate(PAIRS)]
SEVERAL = [{"text": f"the {word}", "label": [i / 4, -i / 7]} for i, word in enumerate(WORDS * 2)]
GLUE = ("text=sentence1", "text_pair=sentence2", "label=score")
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "numbers": (NUMBERS, {}),
    "pairs": (PAIRS, {"fields": GLUE}),
    "several numbers": (SEVERAL, {}),
    "several classes": (SETS, {}),
    "a class of a pair": (ENTAILED, {"fields": ("text=premise", "text_pair=hypothesis")}),
}
PROBLEM = dict(zip(KINDS, (REGRESSION, REGRESSION, REGRESSION, MULTI, SINGLE), strict=True))


def jsonl(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def prepared(folder: Path, labels: list[Any], known: tuple[str, ...] = (), **options: Any) -> Data:
    file = jsonl(folder / "data.jsonl", [{"text": "x", "label": label} for label in labels])
    settings = Settings(data=(file,), model=Path("model"), task=SEQUENCE, validation_split=0.0, **options)
    return prepare(settings, text_models.tokenizer(ends=True), None, known)


# What labels are taken for


@pytest.mark.parametrize(
    ("labels", "options", "problem", "classes", "targets"),
    [
        (["a", "b"], {}, SINGLE, ("a", "b"), [(), ()]),
        ([3, 1], {}, SINGLE, ("1", "3"), [(), ()]),
        ([3, 1], {"problem": REGRESSION}, REGRESSION, ("0",), [(3.0,), (1.0,)]),
        ([0.5, 2], {}, REGRESSION, ("0",), [(0.5,), (2.0,)]),
        ([1.0, 2.0], {}, REGRESSION, ("0",), [(1.0,), (2.0,)]),
        (["1.5", "2"], {}, REGRESSION, ("0",), [(1.5,), (2.0,)]),
        (["1.5", "2"], {"problem": SINGLE}, SINGLE, ("1.5", "2"), [(), ()]),
        (["1.5", "v2"], {}, SINGLE, ("1.5", "v2"), [(), ()]),
        ([[0.5, 1], [2, 3]], {}, REGRESSION, ("0", "1"), [(0.5, 1.0), (2.0, 3.0)]),
        ([["b"], ["b", "a"], []], {}, MULTI, ("a", "b"), [(0.0, 1.0), (1.0, 1.0), (0.0, 0.0)]),
        ([[7], [10, 7]], {}, MULTI, ("7", "10"), [(1.0, 0.0), (1.0, 1.0)]),
        ([[0], [1]], {}, MULTI, ("0", "1"), [(1.0, 0.0), (0.0, 1.0)]),
        ([[0, 1, 1], [0, 0, 0]], {}, MULTI, ("0", "1", "2"), [(0.0, 1.0, 1.0), (0.0, 0.0, 0.0)]),
        ([[0.0, 1.0], [1.0, 1.0]], {}, MULTI, ("0", "1"), [(0.0, 1.0), (1.0, 1.0)]),
        ([[0.0, 1.0], [1.0, 1.0]], {"problem": REGRESSION}, REGRESSION, ("0", "1"), [(0.0, 1.0), (1.0, 1.0)]),
        ([[0, 1], [1, 1]], {"known": ("no", "yes")}, MULTI, ("no", "yes"), [(0.0, 1.0), (1.0, 1.0)]),
        ([["x"]], {"known": ("y", "x")}, MULTI, ("y", "x"), [(0.0, 1.0)]),
    ],
)
def test_what_labels_are(
    tmp_path: Path, labels: list[Any], options: Any, problem: str, classes: tuple[str, ...], targets: Any
) -> None:
    data = prepared(tmp_path, labels, **options)
    assert (data.problem, data.classes) == (problem, classes)
    assert [example.targets for example in data.train] == targets
    assert [len(example.labels) for example in data.train] == [problem == SINGLE] * len(labels)
    hint = "Whole numbers are names of classes. With problem regression they are learned as numbers."
    assert (hint in data.notes) == (labels == [3, 1] and problem == SINGLE)
    assert any("regression" in note for note in data.notes) == (problem == REGRESSION or hint in data.notes)
    assert any("multi-label" in note for note in data.notes) == (problem == MULTI)


def test_numbers_of_a_table_are_texts(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,label\nx,1.5\ny,-2\n")
    settings = Settings(data=(tmp_path / "data.csv",), model=Path("m"), task=SEQUENCE, validation_split=0.0)
    data = prepare(settings, text_models.tokenizer(), None)
    assert (data.problem, [example.targets for example in data.train]) == (REGRESSION, [(1.5,), (-2.0,)])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0.5, "high"], {}, ":2: label: classes are of type str here, but float in .*:1. Give all as texts"),
        ([0.5, True], {}, ":2: label: classes are of type bool here, but float"),
        (["a", ["b"]], {}, ":2: label: is a list here, but a single value in .*:1. Give all as lists"),
        ([["a"], "b"], {}, ":2: label: is a single value here, but a list in .*:1"),
        ([{"a": 1}], {}, r":1: label: expected a class as a text or a whole number, got \{'a': 1\}"),
        ([[None]], {}, ":1: label: expected a class as a text or a whole number, got None"),
        ([[]], {}, "label: expected at least one class, got none"),
        ([[0.5], [0.5, 1.0]], {}, r":2: label: expected a number, got \[0.5, 1.0\]"),
        (["a", "b"], {"problem": REGRESSION}, ":1: label: expected a number, got 'a'"),
        (["1.5", "nan"], {"problem": REGRESSION}, ":2: label: expected a number, got 'nan'"),
        ([0, 1.5], {"problem": SINGLE}, "label: expected at least two classes, got 0"),
        ([0, 1, 1.5], {"problem": SINGLE}, ":3: label: .* got 1.5. Numbers are learned with problem regression"),
        ([["a"], ["b"]], {"problem": SINGLE}, ":1: label: .* got .*'a'.*. Lists are learned with problem multi-label"),
        (["a", "b"], {"problem": MULTI}, ":1: label: expected a list of classes, got 'a'"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path: Path, labels: list[Any], options: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        prepared(tmp_path, labels, **options)


def test_a_pair_is_what_the_tokenizer_makes_of_two_texts(tmp_path: Path) -> None:
    tokenizer = text_models.tokenizer(ends=True, segments=True)
    file = jsonl(tmp_path / "d.jsonl", [{"text": "ab", "text_pair": "c" * 30, "label": i} for i in (0, 1)])
    settings = Settings(data=(file,), model=Path("m"), task=SEQUENCE, validation_split=0.0, context=12)
    data = prepare(settings, tokenizer, None)
    want = tokenizer("ab", "c" * 30, truncation=True, max_length=12)
    assert [*data.train[0].ids] == want["input_ids"]
    assert [*data.train[0].segments] == want["token_type_ids"] == [0] * 3 + [1] * 9
    assert any(note.startswith("2 examples cut off after 12 tokens") for note in data.notes)
    assert not any("puts nothing between" in note for note in data.notes)
    plain = prepare(settings, text_models.tokenizer(begins=True), None)
    assert any("of two texts that the tokenizer puts nothing between" in note for note in plain.notes)
    mixed = jsonl(tmp_path / "mixed.jsonl", [{"text": "a", "text_pair": "b", "label": 0}, {"text": "a", "label": 1}])
    with pytest.raises(FormatError, match=r":2: has 'text', but .*:1 has 'text'.* of one kind"):
        prepare(replace(settings, data=(mixed,)), tokenizer, None)


# Training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without dropout, in float64."""
    torch.manual_seed(0)
    path = task_models.save(tmp_path_factory.mktemp("bert"), "bert", segments=True)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float64, **dropout).save_pretrained(path)
    return path


def begun(folder: Path, out: Path, kind: str, **options: Any) -> Ready:
    rows, given = KINDS[kind]
    out.mkdir(exist_ok=True)
    settings = Settings(
        model=folder, task=SEQUENCE, data=(jsonl(out / "data.jsonl", rows),), out=out / "run",
        **{"validation_split": 0.0, "rank": 2, "alpha": 4.0, "lr": 1e-2, "batch": 7, "warmup": 2, "steps": 20}
        | given | options,
    )  # fmt: skip
    return ready(settings, out)


def in_their_form(kind: str, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """The records as a user of transformers has them."""
    rows = []
    for record in KINDS[kind][0]:
        first, *second = (record[key] for key in record if key not in ("label", "score"))
        label: Any = record.get("label", record.get("score"))
        if PROBLEM[kind] == MULTI:
            label = [float(name in label) for name in classes]
        rows.append({"texts": (first, *second), "label": label})
    return rows


def classifier(folder: Path, classes: tuple[str, ...], kind: str) -> Any:
    """transformers' model, whose loss and pipeline depend on the type of the problem."""
    torch.manual_seed(99)  # another new head than the run's
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(classes), problem_type=PROBLEM_TYPES[PROBLEM[kind]],
        id2label=dict(enumerate(classes)), label2id={name: i for i, name in enumerate(classes)},
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_are_those_of_transformers_trainer(folder: Path, tmp_path: Path, kind: str) -> None:
    made = begun(folder, tmp_path, kind)
    base, settings = made.start.base, made.settings
    assert (base.problem, settings.problem) == (PROBLEM[kind],) * 2
    fl.save_peft(tmp_path / "begin", made.start.adapters, made.start.config)
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), in_their_form(kind, base.classes)
    model: Any = classifier(folder, base.classes, kind)
    model = peft.PeftModel.from_pretrained(model, str(tmp_path / "begin"), is_trainable=True)
    at = {f"data.jsonl:{i + 1}": i for i in range(len(rows))}
    batches = Batches.of(settings, made.data.train, base.tokenizer.pad_token_id)
    order = [at[example.source] for k in range(20) for example in batches.rows(k)]

    class InOurOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return order

    def collated(some: list[dict[str, Any]]) -> Mapping[str, torch.Tensor]:
        batch = tokenizer.pad([tokenizer(*row["texts"]) for row in some], return_tensors="pt")
        labels = torch.tensor([row["label"] for row in some])
        return {**batch, "labels": labels.double() if labels.is_floating_point() else labels}

    args = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=settings.batch, max_steps=20,
        learning_rate=settings.lr, warmup_steps=2, weight_decay=0.0, max_grad_norm=settings.clip, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        remove_unused_columns=False, lr_scheduler_type="cosine",
    )  # fmt: skip
    trainer = InOurOrder(model=model, args=args, train_dataset=rows, data_collator=collated)
    trainer.train()
    model.save_pretrained(str(tmp_path / "end"))
    want, _ = load_peft(tmp_path / "end", base.model)
    with Journal(settings, quiet=True) as journal:
        outcome = train(base, made.start.adapters, made.data, settings, journal)
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ours = [loss for _, loss in outcome.losses["train"]]
    assert len(ours) == len(theirs) == 20
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)
    for name, rule in made.start.adapters.items():
        for leaf in rule.leaf_names:
            assert not torch.equal(getattr(rule, leaf), getattr(outcome.adapters[name], leaf)), "trained"
    close(outcome.adapters, want, 2e-4)


# The results


def invoke(*args: object) -> Any:
    result = CliRunner().invoke(app, [*map(str, args)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run with its adapter and the merged model."""
    kind, path = request.param, tmp_path_factory.mktemp("run")
    settings = begun(folder, path, kind).settings
    held = jsonl(path / "held.jsonl", KINDS[kind][0])
    run(replace(settings, validation=held, merge=True, eval_every=10), quiet=True)
    return kind, path


def read_as(kind: str) -> list[str]:
    fields = KINDS[kind][1].get("fields")
    return ["--fields", ",".join(fields)] if fields else []


def test_transformers_pipelines_give_the_same_scores(trained: tuple[str, Path], folder: Path) -> None:
    kind, path = trained
    rows = KINDS[kind][0]
    found = invoke(
        "predict", path / "run/adapter", "--model", folder, "--data", path / "data.jsonl", "--json", *read_as(kind)
    )
    classes, results = tuple(found["classes"]), found["results"]
    assert [{key: row[key] for key in rows[0]} for row in results] == rows, "the records as they were"
    tokenizer = AutoTokenizer.from_pretrained(path / "run/adapter")
    theirs: Any = peft.PeftModel.from_pretrained(classifier(folder, classes, kind), path / "run/adapter").eval()
    whole = AutoModelForSequenceClassification.from_pretrained(path / "run/merged")
    assert [whole.config.id2label[i] for i in range(len(classes))] == [*classes]
    for model in (theirs, whole):
        pipe: Any = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
        for row, result in zip(in_their_form(kind, classes), results, strict=True):
            given = dict(zip(("text", "text_pair"), row["texts"], strict=False))
            scores = {each["label"]: each["score"] for each in pipe(given, top_k=None)}
            if PROBLEM[kind] == REGRESSION:
                numbers = result["predicted"] if len(classes) > 1 else [result["predicted"]]
                assert numbers == pytest.approx([scores[name] for name in classes], abs=1e-5)
                assert "scores" not in result
                continue
            assert result["scores"] == pytest.approx(scores, abs=1e-5)
            if PROBLEM[kind] == MULTI:
                assert result["predicted"] == [name for name in classes if scores[name] >= 0.5]
            else:
                assert result["predicted"] == max(scores, key=lambda name: scores[name])


def test_scores_are_those_of_the_run_and_of_scipy_and_sklearn(trained: tuple[str, Path], folder: Path) -> None:
    from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]
    from sklearn.metrics import f1_score  # type: ignore[import-untyped]

    kind, path = trained
    args = (path / "run/adapter", "--model", folder, "--data", path / "data.jsonl", "--json", *read_as(kind))
    threshold = ("--threshold", 0.3) if PROBLEM[kind] == MULTI else ()
    scored, said = invoke("eval", *args, *threshold), invoke("predict", *args, *threshold)
    names, results = said["classes"], said["results"]
    lines = [json.loads(line) for line in (path / "run/metrics.jsonl").read_text().splitlines()]
    told = [line["validation_loss"] for line in lines if "validation_loss" in line]
    by_name = {
        key: of["adapter"]["data.jsonl"] for key, of in scored.items() if isinstance(of, dict) and "adapter" in of
    }
    assert by_name["loss"] == pytest.approx(min(told), rel=1e-5)
    outputs = 1 if PROBLEM[kind] == SINGLE else len(names)
    assert scored["labels"] == {"data.jsonl": len(results) * outputs}
    true = [row["label"] for row in in_their_form(kind, tuple(names))]
    if PROBLEM[kind] == REGRESSION:
        columns = [
            torch.tensor(values).reshape(len(true), -1).T for values in (true, [r["predicted"] for r in results])
        ]
        for name, of in (("pearson", pearsonr), ("spearman", spearmanr)):
            each = [of(a.numpy(), b.numpy())[0] for a, b in zip(*columns, strict=True)]
            assert said["metrics"][name] == pytest.approx(sum(each) / len(each), abs=1e-5)
    if PROBLEM[kind] == MULTI:
        predicted = [[float(name in row["predicted"]) for name in names] for row in results]
        assert predicted != [[float(x >= 0.5) for x in row["scores"].values()] for row in results], "it matters"
        for average in ("micro", "macro"):
            assert said["metrics"][f"{average}_f1"] == pytest.approx(f1_score(true, predicted, average=average))
        right = sum(a == b for a, b in zip(true, predicted, strict=True)) / len(true)
        assert said["metrics"]["all_right"] == pytest.approx(right)
    assert said["compared"] == len(results)
    for name in ("pearson", "spearman", "micro_f1", "macro_f1", "all_right", "accuracy"):
        assert (name in by_name) == (name in said["metrics"])
        assert by_name.get(name) == pytest.approx(said["metrics"].get(name), abs=1e-5)
    assert ("confusion" in scored) == (PROBLEM[kind] == SINGLE)


def test_training_goes_on_with_the_same_problem(trained: tuple[str, Path], folder: Path, tmp_path: Path) -> None:
    kind, path = trained
    options = {"adapter": path / "run/adapter", **{key: getattr(Settings, key) for key in ("rank", "alpha")}}
    made = begun(folder, tmp_path, kind, **options)
    assert (made.start.base.problem, made.settings.problem) == (PROBLEM[kind],) * 2
    other = next(problem for problem in (MULTI, REGRESSION) if problem != PROBLEM[kind])
    with pytest.raises(ConfigError, match=f"was trained for {PROBLEM[kind]}, and the problem is {other}"):
        begun(folder, tmp_path, kind, problem=other, **options)
    shown = plan(made).examples[0].answer
    first = KINDS[kind][0][0]
    label = first.get("label", first.get("score"))
    assert shown == (", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in label)
                     if isinstance(label, list) else f"{label:g}")  # fmt: skip


def test_a_picture_needs_single_classes(trained: tuple[str, Path], folder: Path, tmp_path: Path) -> None:
    kind, path = trained
    args = ["predict", path / "run/adapter", "--model", folder, "--data", path / "data.jsonl", *read_as(kind)]
    result = CliRunner().invoke(app, [*map(str, args), "--plot", str(tmp_path / "p.png")])
    if PROBLEM[kind] == SINGLE:
        assert result.exit_code == 0
        return
    assert result.exit_code == 2
    assert f"--plot: draws single classes, and the problem is {PROBLEM[kind]}" in result.stderr
    plain = CliRunner().invoke(app, [*map(str, args)])
    word = "numbers: pearson" if PROBLEM[kind] == REGRESSION else "classes: micro F1"
    assert f"14 of 14 records have the right {word}" in plain.stdout


def test_the_head_of_a_model_says_its_problem(tmp_path: Path) -> None:
    """And a folder whose adapters were trained elsewhere: one output is a number."""
    for i, (classes, problem_type, problem) in enumerate([
        (("0",), None, REGRESSION), (("a", "b"), None, AUTO), (("a", "b"), "multi_label_classification", MULTI),
        (("a", "b"), "regression", REGRESSION), (("a", "b"), "single_label_classification", SINGLE),
    ]):  # fmt: skip
        folder = task_models.save_classifier(tmp_path / str(i), "bert", classes)
        config = json.loads((folder / "config.json").read_text()) | {"problem_type": problem_type}
        (folder / "config.json").write_text(json.dumps(config))
        assert known_problem(Settings(model=folder, task=SEQUENCE)) == problem
        assert known_problem(Settings(model=folder, task=SEQUENCE, problem=SINGLE)) == SINGLE
    data = jsonl(tmp_path / "d.jsonl", [{"text": "the dog"}, {"text": "the cat", "label": 2}])
    found = invoke("predict", "--model", tmp_path / "0", "--data", data, "--json")
    assert all(isinstance(row["predicted"], float) for row in found["results"])
    assert found["compared"] == 1


def test_adapters_of_different_problems_are_not_compared(folder: Path, tmp_path: Path) -> None:
    for name, problem in (("one", "regression"), ("two", "multi_label_classification")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "classes.json").write_text(json.dumps({"problem_type": problem, "classes": ["0"]}))
    both = {name: tmp_path / name for name in ("one", "two")}
    with pytest.raises(ConfigError, match=r"one was trained for regression, two for multi-label. Give adapters of one"):
        trained_problem(both, SEQUENCE, AUTO)
    (tmp_path / "one" / "classes.json").write_text(json.dumps({"problem_type": "ranking", "classes": ["0"]}))
    with pytest.raises(FormatError, match=r"problem_type: expected one of single_label_.* got 'ranking'"):
        trained_problem(both, SEQUENCE, AUTO)

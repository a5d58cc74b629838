"""What a run leaves, loaded by PEFT and transformers: the outputs that it was trained with, element by element."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optree
import peft
import pytest
import task_models
import torch
from torch import Tensor
from transformers import AutoTokenizer

import funclora as fl
from funclora._apps.train.adapters import Start
from funclora._apps.train.examples import Data, prepare
from funclora._apps.train.finish import card, check_results, finish, rehearse
from funclora._apps.train.loop import Outcome
from funclora._apps.train.run import run
from funclora._apps.train.settings import CAUSAL, EMBEDDING, SEQ2SEQ, SEQUENCE, TASKS, TOKEN, Settings
from funclora._apps.train.setup import ready
from funclora.errors import ConfigError

CLASSES = {SEQUENCE: 3, TOKEN: 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    return {kind: task_models.save(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "gpt2", "bert", "t5")}


def begun(folder: Path | None, task: str, out: Path, **changes: Any) -> tuple[Settings, Start, Data]:
    out.mkdir(exist_ok=True)
    data: tuple[Path, ...] = ()
    if folder is not None:
        data = (task_models.data(out / "train.jsonl", "prompt" if task == CAUSAL else task),)
    settings = Settings(model=folder, task=task, data=data, out=out / "run", **{"validation_split": 0.0} | changes)
    made = ready(settings, out)
    return made.settings, made.start, made.data


def trained(start: Start) -> Outcome:
    """As after some steps: every leaf has moved, B is not zero."""
    tree: Any = start.adapters
    adapters: Any = optree.tree_map(lambda x: x + 0.05 * torch.randn_like(x), tree)
    return Outcome(adapters, 7, 7, {"train": [(1, 2.5), (7, 1.5)], "validation": [(7, 1.75)]}, (7, 1.75), "finished")


def batch(task: str) -> dict[str, Tensor]:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return both | ({"labels": ids[:, :3].contiguous()} if task == SEQ2SEQ else {})


def logits(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = model.eval()(**given).logits
    return result


def base_of(folder: Path, task: str, classes: int | None = None) -> Any:
    labels = {"num_labels": classes or CLASSES[task]} if task in CLASSES else {}
    torch.manual_seed(99)  # another new head than the run's
    return task_models.CLASSES[task].from_pretrained(folder, **labels)


METHODS: list[dict[str, Any]] = [
    {}, {"method": "dora"}, {"rslora": True, "rank": 4}, {"init": "pissa", "rank": 4},
    {"init": "olora", "rank": 4, "method": "dora"}, {"init": "false"}, {"init": "gaussian", "dropout": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("task", [task for task in TASKS if task != EMBEDDING])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m.values())) or "lora")
def test_peft_computes_what_was_trained(
    folders: dict[str, Path], tmp_path: Path, task: str, method: dict[str, Any]
) -> None:
    folder = folders[task_models.KIND[task]]
    settings, start, data = begun(folder, task, tmp_path, merge=True, **method)
    outcome = trained(start)
    base = start.base
    expected = base.logits(fl.bind(base.model, base.params, outcome.adapters), batch(task))
    assert (expected - base.logits(fl.bind(base.model, base.params, start.adapters), batch(task))).abs().max() > 1e-2
    adapter, merged = finish(start, outcome, data, settings)
    theirs = peft.PeftModel.from_pretrained(base_of(folder, task), adapter)
    torch.testing.assert_close(logits(theirs, batch(task)), expected, rtol=1e-4, atol=1e-4)
    whole = task_models.CLASSES[task].from_pretrained(merged)
    torch.testing.assert_close(logits(whole, batch(task)), expected, rtol=1e-4, atol=1e-4)
    for place in (adapter, merged):
        assert AutoTokenizer.from_pretrained(place)("red")["input_ids"] == base.tokenizer("red")["input_ids"]
    if task in CLASSES:
        assert [whole.config.id2label[i] for i in range(CLASSES[task])] == list(data.classes)
        assert json.loads((adapter / "classes.json").read_text()) == list(data.classes)


def test_what_was_not_in_the_folder_is_in_the_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    settings, start, data = begun(folders["bert"], SEQUENCE, tmp_path)
    full = {name for name, rule in start.adapters.items() if isinstance(rule, fl.Full)}
    assert full == {f"{m}.{p}" for m in ("classifier", "bert.pooler.dense") for p in ("weight", "bias")}
    (adapter,) = finish(start, trained(start), data, settings)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert {"bert.pooler", "classifier"} <= set(config["modules_to_save"])
    assert (config["task_type"], config["base_model_name_or_path"]) == ("SEQ_CLS", str(folders["bert"]))


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_head_of_the_folder_is_trained_on(tmp_path: Path, kind: str, quantize: str) -> None:
    folder = task_models.save_classifier(tmp_path / "model", kind, ("verb", "colour", "beast"))
    settings, start, data = begun(folder, SEQUENCE, tmp_path, quantize=quantize, merge=True)
    base, outcome = start.base, trained(start)
    assert (base.new, data.classes) == ((), ("verb", "colour", "beast"))
    expected = base.logits(fl.bind(base.model, base.params, outcome.adapters), batch(SEQUENCE))
    adapter, merged = finish(start, outcome, data, settings)
    if quantize == "none":
        theirs = peft.PeftModel.from_pretrained(base_of(folder, SEQUENCE), adapter)
        torch.testing.assert_close(logits(theirs, batch(SEQUENCE)), expected, rtol=1e-4, atol=1e-4)
        whole = task_models.CLASSES[SEQUENCE].from_pretrained(merged)
        torch.testing.assert_close(logits(whole, batch(SEQUENCE)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("task", "kind"),
    [(CAUSAL, "gpt2"), (SEQUENCE, "llama"), (SEQUENCE, "gpt2"), (SEQUENCE, "roberta"), (TOKEN, "roberta"),
     (SEQUENCE, "bart")],
)  # fmt: skip
def test_other_architectures(folders: dict[str, Path], tmp_path: Path, task: str, kind: str) -> None:
    folder = folders.get(kind) or task_models.save(tmp_path / "model", kind)
    settings, start, data = begun(folder, task, tmp_path, merge=True)
    outcome, base = trained(start), start.base
    given = batch(task)
    given["input_ids"][:, -1] = base.tokenizer.eos_token_id  # BART classifies there
    expected = base.logits(fl.bind(base.model, base.params, outcome.adapters), given)
    adapter, merged = finish(start, outcome, data, settings)
    plain = base_of(folder, task)
    plain.config.pad_token_id = base.tokenizer.pad_token_id
    theirs = peft.PeftModel.from_pretrained(plain, adapter)
    torch.testing.assert_close(logits(theirs, given), expected, rtol=1e-4, atol=1e-4)
    whole = task_models.CLASSES[task].from_pretrained(merged)
    torch.testing.assert_close(logits(whole, given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["true", "pissa", "loftq"])
@pytest.mark.parametrize("task", [CAUSAL, SEQUENCE])
def test_packed_bases(folders: dict[str, Path], tmp_path: Path, task: str, init: str) -> None:
    folder = folders[task_models.KIND[task]]
    settings, start, data = begun(folder, task, tmp_path, quantize="nf4", init=init, rank=4, alpha=4.0, merge=True)
    base, outcome = start.base, trained(start)
    assert any(isinstance(value, fl.Quantized) for value in base.params.values())
    expected = base.logits(fl.bind(base.model, base.params, outcome.adapters), batch(task))
    adapter, merged = finish(start, outcome, data, settings)
    theirs = base_of(folder, task)
    if init != "pissa":  # the adapter belongs to weights that are packed as the run's were
        packed = fl.dequantize(base.params)
        theirs.load_state_dict({name: packed[name] for name in theirs.state_dict()})
    else:  # and here to the original ones, of which the packed rest is a rounding
        dense = begun(folder, task, tmp_path / "dense", init=init, rank=4, alpha=4.0)[1]
        expected = base.logits(fl.bind(base.model, dense.base.params, outcome.adapters), batch(task))
    wrapped = peft.PeftModel.from_pretrained(theirs, adapter)
    torch.testing.assert_close(logits(wrapped, batch(task)), expected, rtol=1e-4, atol=1e-4)
    whole = task_models.CLASSES[task].from_pretrained(merged)
    if init == "true":  # merged into the original weights
        original = peft.PeftModel.from_pretrained(base_of(folder, task), adapter)
        expected = logits(original, batch(task))
    torch.testing.assert_close(logits(whole, batch(task)), expected, rtol=1e-4, atol=1e-4)


def test_eva_starts_from_the_data(folders: dict[str, Path], tmp_path: Path) -> None:
    settings, start, data = begun(folders["llama"], CAUSAL, tmp_path, init="eva", rank=2, batch=4)
    plain = begun(folders["llama"], CAUSAL, tmp_path, rank=2)[1]
    assert sum(r.r or 0 for r in start.adapters.values()) == sum(r.r or 0 for r in plain.adapters.values())
    again = begun(folders["llama"], CAUSAL, tmp_path, init="eva", rank=2, batch=4)[1]
    a: Any = start.adapters
    b: Any = again.adapters
    for x, y in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True):
        assert torch.equal(x, y)
    (adapter,) = finish(start, outcome := trained(start), data, settings)
    expected = start.base.logits(fl.bind(start.base.model, start.base.params, outcome.adapters), batch(CAUSAL))
    theirs = peft.PeftModel.from_pretrained(base_of(folders["llama"], CAUSAL), adapter)
    torch.testing.assert_close(logits(theirs, batch(CAUSAL)), expected, rtol=1e-4, atol=1e-4)


def test_the_demo(tmp_path: Path) -> None:
    from funclora.demo.model import load_base, load_weights

    settings, start, data = begun(None, CAUSAL, tmp_path, merge=True, rank=2)
    outcome, ids = trained(start), torch.tensor([list(b"import asyncio")])
    model = load_base()
    expected = fl.apply(model, fl.base_params(model), outcome.adapters, ids)
    adapter, merged = finish(start, outcome, data, settings)
    theirs: Any = peft.PeftModel.from_pretrained(load_base(), adapter)
    torch.testing.assert_close(theirs(ids), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_weights(str(merged / "model.safetensors"))(ids), expected, rtol=1e-4, atol=1e-4)


def test_the_card_says_what_it_is_and_its_code_runs(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, start, data = begun(folders["bert"], SEQUENCE, tmp_path)
    (adapter,) = finish(start, trained(start), data, settings)
    text = (adapter / "README.md").read_text()
    assert text.startswith(f'---\nbase_model: "{folders["bert"]}"\nlibrary_name: peft\n')
    for words in ("beast, colour, verb", "2.5000 at step 1, 1.5000 at step 7", "1.7500 at step 7", "14 examples",
                  "rank = 16", 'task = "sequence-classification"'):  # fmt: skip
        assert words in text
    monkeypatch.chdir(adapter.parent)
    code = text.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["classes"] == ["beast", "colour", "verb"]
    assert logits(names["model"], names["tokenizer"]("the dog", return_tensors="pt")).shape == (1, 3)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_cards_code_classifies_a_batch_as_the_run_did(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "gpt2":  # without a padding token
        folder = task_models.save(tmp_path / "model", kind)
        tokens = AutoTokenizer.from_pretrained(folder)
        tokens.pad_token = None
        tokens.save_pretrained(folder)
    else:  # with a head of another size
        folder = task_models.save_classifier(tmp_path / "model", kind, ("a", "b"))
    settings, start, data = begun(folder, SEQUENCE, tmp_path)
    base, outcome = start.base, trained(start)
    (adapter,) = finish(start, outcome, data, settings)
    monkeypatch.chdir(adapter.parent)
    names: dict[str, Any] = {}
    code = (adapter / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "README.md", "exec"), names)
    given = names["tokenizer"](["the dog runs", "a"], return_tensors="pt", padding=True)
    given = {key: given[key] for key in ("input_ids", "attention_mask")}
    expected = base.logits(fl.bind(base.model, base.params, outcome.adapters), given)
    torch.testing.assert_close(logits(names["model"], given), expected, rtol=1e-4, atol=1e-4)


def test_a_card_counts_packed_examples(folders: dict[str, Path], tmp_path: Path) -> None:
    settings, start, data = begun(folders["llama"], CAUSAL, tmp_path, packing=True)
    assert len(data.train) < 12
    assert "12 examples" in card(start, trained(start), data, settings).partition("## Data")[0]


def test_results_are_replaced_as_a_whole_and_only_by_their_run(folders: dict[str, Path], tmp_path: Path) -> None:
    settings, start, data = begun(folders["llama"], CAUSAL, tmp_path, merge=True)
    adapter, _ = finish(start, trained(start), data, settings)
    (adapter / "other").write_text("x")
    with pytest.raises(ConfigError, match="adapter is not empty"):
        check_results(settings)
    check_results(replace(settings, resume=True))
    finish(start, trained(start), data, replace(settings, resume=True))
    assert not (adapter / "other").exists()
    assert sorted(path.name for path in settings.out.iterdir()) == ["adapter", "merged"]


def test_a_run_in_a_folder_that_it_reads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for key in ("model", "data", "validation"):
        read = tmp_path / "texts"
        given: Any = {"model": tmp_path / "m", "data": (tmp_path / "d",), "out": read / "run"}
        with pytest.raises(ConfigError, match=r"^out: .*run is inside .*texts, which is read. Give another"):
            check_results(Settings(**given | {key: (tmp_path / "d", read) if key == "data" else read}))


def test_what_could_not_be_written_is_not_trained(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, start, _ = begun(folders["llama"], CAUSAL, tmp_path, merge=True)
    rehearse(start, settings)
    assert not settings.out.exists()
    # A folder whose weights a merge cannot keep.
    copy = task_models.save(tmp_path / "other", "llama")
    other = replace(settings, model=copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(fl.errors.FormatError, match="other"):
        rehearse(start, other)

    def refuse(*_: object, **__: object) -> None:
        raise fl.errors.UnsupportedError("PEFT has no such thing.")

    monkeypatch.setattr("funclora._apps.train.finish.save_peft", refuse)
    with pytest.raises(fl.errors.UnsupportedError, match="PEFT has no such thing"):
        run(settings, quiet=True)
    assert not settings.out.exists()


def test_targets_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="targets: all-linear already includes all"):
        begun(folders["llama"], CAUSAL, tmp_path, targets=("all-linear", "q_proj"))
    with pytest.raises(fl.errors.TargetError, match=r"'q_prj' matches no module. Near names: q_proj"):
        begun(folders["llama"], CAUSAL, tmp_path, targets=("q_prj",))
    with pytest.raises(fl.errors.TargetError, match="modules_to_save: 'head' matches no module"):
        begun(folders["llama"], CAUSAL, tmp_path, modules_to_save=("head",), quantize="nf4")


def test_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    folder = task_models.save(tmp_path / "model", "llama", rows=100)
    with pytest.raises(ConfigError, match=r"train.jsonl:1: token '.' has the id \d+, but the embedding of .* 100 rows"):
        begun(folder, CAUSAL, tmp_path)


def test_prepared_data_are_a_function_of_the_settings(folders: dict[str, Path], tmp_path: Path) -> None:
    settings, start, data = begun(folders["llama"], CAUSAL, tmp_path)
    assert prepare(settings, start.base.tokenizer, 128).digest() == data.digest()

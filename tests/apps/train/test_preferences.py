"""Preferences: their records, batches, references and settings."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import optree
import pytest
import task_models
import torch
from text_models import FORGETS, PLAIN, said, tokenizer
from tiny_runs import close, llama_base, preferences, run, same, settings

import funclora as fl
from funclora import losses
from funclora._apps.train.batches import collate
from funclora._apps.train.examples import Data, prepare
from funclora._apps.train.journal import Journal
from funclora._apps.train.loop import train
from funclora._apps.train.packing import is_packed, pack
from funclora._apps.train.plan import plan
from funclora._apps.train.preference_rows import alone, compared, halves, judged
from funclora._apps.train.reading import read
from funclora._apps.train.reference import preferring, with_preferences
from funclora._apps.train.rows import IGNORED, Example
from funclora._apps.train.settings import PREFERENCE, Settings
from funclora._apps.train.setup import ready
from funclora._apps.train.step import Steps
from funclora._train.step import value_and_grad
from funclora.errors import ConfigError, FormatError
from funclora.losses import _log_probs

ASKED = {"role": "user", "content": "say cat"}
PAIR = {"prompt": "say cat: ", "chosen": "cat", "rejected": "no cat"}


def said_by(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def data(folder: Path, rows: list[dict[str, Any]], tokens: Any = None, **options: Any) -> Data:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {"data": (file,), "model": Path("m"), "task": PREFERENCE, "validation_split": 0.0, **options}
    return prepare(Settings(**given), tokens or tokenizer(PLAIN), None)


def texts(example: Example, tokens: Any) -> list[tuple[str, list[str]]]:
    return [(tokens.decode(half.ids), said(tokens, half)) for half in halves(example)]


GOOD, BAD = said_by("cat"), said_by("no cat")
CHAT = "<|im_start|>user\nsay cat<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "say cat", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "say cat", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": "cat", "rejected": "no cat"},
        {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": "say cat"}],
            "chosen": {"from": "gpt", "value": "cat"},
            "rejected": {"from": "gpt", "value": "no cat"},
        },
        {"instruction": "say cat", "chosen": "cat", "rejected": "no cat"},
    ],
    ids=["implicit", "explicit", "repeated", "text and chats", "text and answers", "answers", "messages", "ShareGPT",
         "Alpaca"],
)  # fmt: skip
def test_chats_of_all_forms(tmp_path: Path, record: dict[str, Any]) -> None:
    tokens = tokenizer(PLAIN)
    (example,) = data(tmp_path, [record], tokens).train
    assert texts(example, tokens) == [
        (f"{CHAT}{answer}<|im_end|>\n", [f"{answer}<|im_end|>\n"]) for answer in ("cat", "no cat")
    ]


@pytest.mark.parametrize(
    ("record", "options"),
    [
        (PAIR, {}),
        ({"chosen": "say cat: cat", "rejected": "say cat: no cat"}, {}),
        (
            {"question": "say cat: ", "good": "cat", "bad": "no cat"},
            {"fields": ("prompt=question", "chosen=good", "rejected=bad")},
        ),
    ],
)  # fmt: skip
def test_texts_have_an_end(tmp_path: Path, record: dict[str, Any], options: dict[str, Any]) -> None:
    tokens = tokenizer()
    (example,) = data(tmp_path, [record], tokens, **options).train
    implicit = "prompt" not in record and not options  # whose prompt ends before the space
    both = (" cat", " no cat") if implicit else ("cat", "no cat")
    start = "say cat:" if implicit else "say cat: "
    assert texts(example, tokens) == [(f"{start}{answer}</s>", [f"{answer}</s>"]) for answer in both]


def test_both_answers_begin_where_the_prompt_is_the_same(tmp_path: Path) -> None:
    """Its end merges into the first token of one of them."""
    tokens = tokenizer(merges=[("t", "h")])
    (example,) = data(tmp_path, [{"prompt": "a t", "chosen": "his", "rejected": "o"}], tokens).train
    assert texts(example, tokens) == [("a this</s>", ["this</s>"]), ("a to</s>", ["to</s>"])]


def test_kto_takes_verdicts_and_both_answers_of_a_pair(tmp_path: Path) -> None:
    tokens = tokenizer(PLAIN)
    rows = [{"prompt": [ASKED], "completion": [GOOD], "label": True}, {"messages": [ASKED, BAD], "label": False}]
    for some in ([rows[0]], [rows[1]], [{"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}]):
        found = data(tmp_path, some, tokens, loss="kto").train
        for example in found:
            good = example.lengths[0] > 0
            answer = "cat" if good else "no cat"
            assert texts(example, tokens) == [(f"{CHAT}{answer}<|im_end|>\n", [f"{answer}<|im_end|>\n"])]
            assert example.lengths == ((len(example.ids), 0) if good else (0, len(example.ids)))
        assert len(found) == 1 + ("chosen" in some[0])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}], {}, "data.jsonl:1: expected prompt, chosen and rejected"),
        ([{"prompt": "a", "completion": "b", "label": True}], {}, "has a single answer with a verdict, and dpo "),
        ([{"prompt": "a", "completion": "b", "label": 2}], {"loss": "kto"}, "label: expected true for a good answer"),
        ([{**PAIR, "chosen": ""}], {}, "data.jsonl:1: chosen: the answer is empty"),
        ([{**PAIR, "chosen": 3}], {}, "data.jsonl:1: chosen: expected a text or a list of messages, got 3"),
        ([{**PAIR, "rejected": "cat"}], {}, "the chosen and the rejected answer are the same"),
        ([PAIR, {"chosen": [ASKED, GOOD]}], {}, "data.jsonl:2: expected prompt, chosen and rejected"),
    ],
)  # fmt: skip
def test_records_that_do_not_fit(tmp_path: Path, rows: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        data(tmp_path, rows, **options)


def test_an_answer_of_turns_that_the_template_rewrites_is_refused(tmp_path: Path) -> None:
    long = [GOOD, {"role": "user", "content": "again"}, GOOD]
    with pytest.raises(FormatError, match="the chat template rewrites the turns of this answer"):
        data(tmp_path, [{"prompt": [ASKED], "chosen": long, "rejected": [BAD]}], tokenizer(FORGETS))


def test_what_is_cut_off_is_said(tmp_path: Path) -> None:
    found = data(tmp_path, [PAIR, {**PAIR, "prompt": "say cat " * 9}], tokenizer(), context=20)
    assert len(found.train) == 1
    assert any("without a token that has loss in the first 20 tokens left out" in note for note in found.notes)


def example(*ids: int, start: int = 1) -> Example:
    return Example([*ids], [IGNORED] * start + [*ids[start:]], (len(ids),), "a")


def test_single_answers_are_put_after_the_prompt_of_another() -> None:
    rows = [judged(example(i, i + 1, i + 2, start=2), i % 20 == 0) for i in (10, 20, 30, 40)]
    for group, before in ((0, [3, 0, 1, 2]), (2, [1, 0, 3, 2])):
        batch = collate(rows, pad=0, task=PREFERENCE, group=group)
        assert batch["desirable"].tolist() == [False, True, False, True]
        for i, k in enumerate(before):
            assert batch["input_ids"][i, 1].tolist() == [*rows[i].ids[:2], rows[k].ids[2]]
            assert batch["labels"][i, 1].tolist() == [IGNORED, IGNORED, rows[k].ids[2]]
    assert collate(rows[:1], pad=0, task=PREFERENCE)["labels"][0, 1].tolist() == [IGNORED] * 3
    assert collate(rows, pad=0, task=PREFERENCE, context=2)["input_ids"].shape == (4, 2, 2)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo", "kto"])
def test_the_loss_of_a_batch_is_that_of_its_formula(loss: str) -> None:
    given = Settings(task=PREFERENCE, loss=loss, beta=0.7, label_smoothing=0.1 * (loss == "dpo"))
    base = preferring(llama_base(), {}, given)
    config = fl.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapters = fl.init(base.model, config, generator=torch.Generator().manual_seed(0))
    bound, plain = fl.bind(base.model, base.params, adapters), fl.bind(base.model, base.params, {})
    single = loss == "kto"
    rows = [
        judged(example(i, 5, *range(3, i), start=2), i % 2 == 0) if single else
        compared(example(i, *range(2, i)), example(i, 3, 1, i))
        for i in range(4, 8)
    ]  # fmt: skip
    batch = base.prepared(collate(rows, pad=0, task=PREFERENCE))
    total, watched = base.watch(bound, batch)

    def log_probs(model: Any, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        sums, lengths = [], []
        by_token[model is bound, k] = tokens = []
        for i in range(len(rows)):
            ids, labels = batch["input_ids"][i, k][None], batch["labels"][i, k]
            logits = model(input_ids=ids).logits.log_softmax(-1)[0]
            places = [t for t in range(1, len(labels)) if labels[t] != IGNORED]
            tokens += [logits[t - 1, labels[t]] for t in places]
            sums.append(torch.stack(tokens[-len(places) :]).sum())
            lengths.append(len(places))
        return torch.stack(sums), torch.tensor(lengths)

    by_token: dict[tuple[bool, int], list[torch.Tensor]] = {}
    (c, nc), (r, nr) = log_probs(bound, 0), log_probs(bound, 1)
    (rc, _), (rr, _) = log_probs(plain, 0), log_probs(plain, 1)
    good = batch.get("desirable", torch.ones(4, dtype=torch.bool))
    want = {
        "dpo": lambda: losses.dpo(c, r, rc, rr, beta=0.7, label_smoothing=0.1),
        "ipo": lambda: losses.ipo(c / nc, r / nr, rc / nc, rr / nr, beta=0.7),
        "orpo": lambda: losses.orpo(c / nc, r / nr, beta=0.7),
        "simpo": lambda: losses.simpo(c / nc, r / nr, beta=0.7),
        "kto": lambda: losses.kto(c, rc, good, (r - rr).mean(), beta=0.7),
    }[loss]()
    torch.testing.assert_close(total, want.sum(), rtol=1e-5, atol=1e-5)
    assert base.count(batch) == 4
    found = {name: float(x[0] / x[1]) for name, x in watched.items()}
    assert {*found} == {*base.watched}
    sides = (0,) if single else (0, 1)
    ours, theirs = ([x for k in sides for x in by_token[trained, k]] for trained in (True, False))
    squares = [float(a - b) ** 2 / 2 for a, b in zip(ours, theirs, strict=True)]
    assert found.get("kl_per_token") == (
        None if loss in ("orpo", "simpo") else pytest.approx(sum(squares) / len(squares), rel=1e-4)
    )
    if loss == "kto":
        first, second = (0.7 * (c - rc))[good].mean(), (0.7 * (c - rc))[~good].mean()
        assert found["kl"] == pytest.approx(max(float((r - rr).mean()), 0), rel=1e-4, abs=1e-5)
    else:
        rewards = [0.7 * (x if loss in ("orpo", "simpo") else x - y) for x, y in ((c, rc), (r, rr))]
        rewards = [x / n if loss in ("orpo", "simpo") else x for x, n in zip(rewards, (nc, nr), strict=True)]
        first, second = (x.mean() for x in rewards)
        assert found["rewards/accuracies"] == float((rewards[0] > rewards[1]).float().mean())
    assert found["rewards/chosen"] == pytest.approx(float(first), rel=1e-4)
    assert found["rewards/rejected"] == pytest.approx(float(second), rel=1e-4)
    assert found["rewards/margins"] == pytest.approx(float(first - second), rel=1e-4)


def test_a_single_answer_has_no_estimate_of_kl() -> None:
    base = preferring(llama_base(), {}, Settings(task=PREFERENCE, loss="kto"))
    batch = base.prepared(collate([judged(example(4, 5, 6), True)], pad=0, task=PREFERENCE))
    loss, watched = base.watch(fl.bind(base.model, base.params, {}), batch)
    assert float(loss) == pytest.approx(0.5)
    assert watched["rewards/margins"].tolist() == [0.0, 0.0]


def test_a_divided_output_layer_is_used_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process waits for the others there: also for one whose only answer has no other prompt."""
    uses: list[int] = []
    of = _log_probs._of

    def counted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        uses[-1] += 1
        return of(logits, labels)

    monkeypatch.setattr(_log_probs, "_of", counted)
    monkeypatch.setattr(losses, "token_log_probs", functools.partial(losses.token_log_probs, at_once=1))
    answers = [judged(example(i, *range(2, i)), i % 2 == 0) for i in range(4, 9)]
    for shard in (False, True):
        base = preferring(llama_base(), {}, Settings(task=PREFERENCE, loss="kto", shard=shard))
        uses.clear()
        for rows in (answers[:1], answers[1:3], answers):
            uses.append(0)
            base.watch(fl.bind(base.model, base.params, {}), base.prepared(collate(rows, pad=0, task=PREFERENCE)))
        assert len({*uses}) == (1 if shard else 3)


# Packed rows


def many(loss: str) -> list[Example]:
    """Of different lengths, the first without a prompt."""
    made = []
    for i in range(3, 12):
        answer = example(i, *range(2, i), start=(i > 3) + i % 2 * (i > 5))
        other = example(i, 3, 1, *[2] * (i % 3), start=answer.labels.count(IGNORED))
        made.append(judged(answer, i % 2 == 0) if loss == "kto" else compared(answer, other))
    return made


def test_the_answers_of_a_pair_are_in_rows_side_by_side() -> None:
    pairs = [compared(example(1, 2, 3), example(1, 4)), compared(example(5, 6), example(5, 7, start=0))]
    assert [row.lengths for row in pack(pairs, 4)] == [(3, 2), (2, 2)]
    rows = pack(pairs, 5)
    assert [row.lengths for row in rows] == [(3, 2, 2, 2)]
    assert is_packed(rows, PREFERENCE)
    assert not is_packed(pairs, PREFERENCE)
    assert alone(rows[0])[0] == pairs[0]
    x = -100
    assert {name: tensor.tolist() for name, tensor in collate([*rows, pairs[1]], pad=0, task=PREFERENCE).items()} == {
        "input_ids": [[[1, 2, 3, 5, 6], [1, 4, 5, 7, 0]], [[5, 6, 0, 0, 0], [5, 7, 0, 0, 0]]],
        "labels": [[[x, 2, 3, x, 6], [x, 4, x, 7, x]], [[x, 6, x, x, x], [5, 7, x, x, x]]],
        "position_ids": [[[0, 1, 2, 0, 1], [0, 1, 0, 1, 0]], [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]],
        "pairs": [[True, True], [True, False]],
    }


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo", "kto"])
@pytest.mark.parametrize("limit", [None, 9])
def test_packed_answers_have_the_losses_that_they_have_alone(loss: str, limit: int | None) -> None:
    """So have the gradient and all that is watched; what is beyond the model's context counts in neither."""
    base = replace(preferring(llama_base(), {}, Settings(task=PREFERENCE, loss=loss)), limit=limit)
    config = fl.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapters = fl.init(base.model, config, generator=torch.Generator().manual_seed(0))
    rows = pack(many(loss), 12)
    plain = [one for row in rows for one in alone(row)]
    assert sorted(plain, key=str) == sorted(many(loss), key=str)
    assert len({len(row.lengths) for row in rows}) > 1
    found: list[Any] = []
    for batch in (collate(rows, pad=0, task=PREFERENCE), collate(plain, pad=0, task=PREFERENCE)):
        assert ("pairs" in batch) == ("position_ids" in batch) == ("attention_mask" not in batch)
        assert base.count(batch) == len(plain) == 9
        (value, watched), grads = value_and_grad(base.watch, has_aux=True)(
            base.model, base.params, adapters, base.prepared(batch)
        )
        assert {*watched} == {*base.watched}
        tree: Any = grads
        found.append((value, watched, optree.tree_leaves(tree)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    by_pair = [
        base.by_row(fl.bind(base.model, base.params, adapters), collate(some, pad=0, task=PREFERENCE))
        for some in (rows, plain)
    ]
    there = by_pair[0].pop("pairs")
    torch.testing.assert_close({name: x[there] for name, x in by_pair[0].items()}, by_pair[1], rtol=1e-4, atol=1e-5)
    lengths = by_pair[1]["lengths"]
    assert len({*lengths.flatten().tolist()}) > 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return task_models.save(tmp_path_factory.mktemp("llama"), "llama")


def settings_of(model: Path, folder: Path, **options: Any) -> Settings:
    file = task_models.data(folder / "data.jsonl", PREFERENCE)
    return read(None, {"model": model, "task": PREFERENCE, "data": [file], "out": folder / "run"} | options)


@pytest.mark.parametrize(
    ("init", "reference", "own"),
    [
        ("true", "start", False), ("true", "base", False), ("false", "start", True), ("false", "base", False),
        ("pissa", "start", True), ("pissa", "base", True), ("olora", "base", True),
    ],
)  # fmt: skip
def test_the_reference_is_what_the_settings_say(
    model: Path, tmp_path: Path, init: str, reference: str, own: bool
) -> None:
    """It computes what the base of the folder does, or with an adapter that changes it what the start does."""
    start = ready(settings_of(model, tmp_path, init=init, reference=reference, rank=4), tmp_path).start
    base: Any = start.base
    assert bool(base.reference) == own
    ids = torch.tensor([[5, 6, 7, 8]])
    got = fl.bind(base.model, base.params, base.reference)(input_ids=ids).logits
    original = ready(settings_of(model, tmp_path), tmp_path).start.base
    adapters = start.adapters if init == "false" and reference == "start" else {}
    want = fl.bind(original.model, original.params, adapters)(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_reference_may_be_another_adapter(model: Path, tmp_path: Path) -> None:
    start = ready(settings_of(model, tmp_path, init="false"), tmp_path).start
    fl.save_peft(tmp_path / "other", *start.exported(start.adapters))
    found: Any = ready(settings_of(model, tmp_path, reference=str(tmp_path / "other")), tmp_path).start.base
    same(found.reference, start.adapters)
    with pytest.raises(ConfigError, match="reference: expected start, base or a PEFT folder"):
        ready(settings_of(model, tmp_path, reference="nowhere"), tmp_path)
    loftq = replace(start, config=start.config.replace(init_lora_weights="loftq"))
    with pytest.raises(ConfigError, match="reference: with init loftq the base is never run without an adapter"):
        with_preferences(loftq, settings_of(model, tmp_path, reference="base"))


def test_a_run_with_another_reference_is_not_resumed(tmp_path: Path) -> None:
    given = settings(tmp_path / "run", task=PREFERENCE, steps=2, warmup=0)
    run(given)
    base = llama_base()
    config = fl.LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False)
    with pytest.raises(ConfigError, match="other reference than there"):
        run(
            replace(given, resume=True, steps=3),
            preferring(base, fl.init(base.model, config), given),
            preferences(given),
        )


@pytest.mark.parametrize("option", ["beta", "loss", "reference", "metric"])
def test_options_without_effect_are_refused(option: str) -> None:
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "beta": ({"beta": 0.2}, "--beta: only preference uses it, and the task is causal-lm"),
        "loss": ({"task": PREFERENCE, "gamma": 0.5}, "--gamma: has an effect only if loss is simpo"),
        "reference": ({"task": PREFERENCE, "loss": "orpo", "reference": "base"}, "--reference: has an effect only if"),
        "metric": ({"metric": "margin"}, "--metric: an evaluation of causal-lm has no margin. Set it to loss"),
    }
    given, message = cases[option]
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(None, given)


@pytest.mark.parametrize("metric", ["loss", "accuracy", "margin"])
def test_the_best_evaluation_is_that_of_the_metric(tmp_path: Path, metric: str) -> None:
    outcome, _ = run(settings(tmp_path / "run", task=PREFERENCE, steps=12, eval_every=3, lr=5e-2, metric=metric))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    name = {"loss": "validation_loss", "accuracy": "validation_rewards/accuracies"}.get(
        metric, "validation_rewards/margins"
    )
    found = [(line["step"], line[name]) for line in lines if name in line]
    best = (min if metric == "loss" else max)(value for _, value in found)
    assert outcome.best == next((step, value) for step, value in found if value == best)
    assert outcome.step == outcome.best[0]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo"])
def test_a_packed_run_is_that_of_the_same_batches(model: Path, tmp_path: Path, loss: str) -> None:
    """Each step has all pairs, in another order."""
    found = []
    for name, packing in (("plain", False), ("packed", True)):
        (tmp_path / name).mkdir()
        given = settings_of(
            model, tmp_path / name, loss=loss, packing=packing, steps=5, batch=14, lr=1e-2, init="false", context=64,
            validation_split=0.0,
        )  # fmt: skip
        made = ready(given, tmp_path / name)
        steps = Steps(made.start.base, made.start.adapters, made.data, made.settings)
        assert steps.per_epoch == 1
        assert len(made.data.train) == (3 if packing else 7)
        with Journal(made.settings, quiet=True) as journal:
            outcome = train(made.start.base, made.start.adapters, made.data, made.settings, journal)
        lines = [json.loads(line) for line in (given.out / "metrics.jsonl").read_text().splitlines()]
        names = ("loss", "grad_norm", *made.start.base.watched)
        found.append((outcome.adapters, [{name: line[name] for name in names} for line in lines]))
        shown = plan(made)
        assert shown.memory.step > 0
        sources = [example.source for example in shown.examples]
        assert [source.endswith("chosen") for source in sources] == [True, False] * 2
        assert all(("the first" in source) == packing for source in sources)
    (got, lines), (want, expected) = found
    close(got, want, 1e-4)
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("options", [{"quantize": "nf4"}, {"checkpointing": True}, {"method": "dora", "merge": True}])
def test_options_of_other_tasks_work(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    from funclora._apps.train.run import run as whole

    result = whole(settings_of(model, tmp_path, steps=2, validation_split=0.3, **options), quiet=True)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert len(result.outcome.losses["train"]) == 2
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"

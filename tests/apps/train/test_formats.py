"""Records as other trainers have them, names by option, several files, and what is left out."""

# ruff: noqa: E501 -- a record stands in a line

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_models import PLAIN, said, tokenizer

from funclora._apps.train.batches import Batches
from funclora._apps.train.examples import Data, Example, prepare
from funclora._apps.train.formats import Format
from funclora._apps.train.records import Record
from funclora._apps.train.settings import CAUSAL, SEQUENCE, TOKEN, Settings
from funclora.errors import ConfigError, FormatError

Rows = list[dict[str, Any]]
MODEL = Path("model")  # settings name one; nothing here opens it


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def jsonl(file: Path, rows: Rows | str) -> Path:
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    return file


def examples(folder: Path, rows: Rows | str, tokens: Any = None, **settings: Any) -> Data:
    file = jsonl(folder / "data.jsonl", rows)
    given = {"data": (file,), "model": MODEL, "validation_split": 0.0, **settings}
    return prepare(Settings(**given), tokenizer(PLAIN) if tokens is None else tokens, None)


CHAT = {"messages": [user("2 + 3?"), answer("5")]}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"name": "add", "arguments": {"a": 2}}
INSTRUCTION = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n{}### Response:\n"
)
WITH = ", paired with an input that provides further context"

# A record, options, and the record that it must be read as.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ShareGPT": ({"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}, {}, CHAT),
    "ShareGPT with a system turn": (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]},
        {}, {"messages": [SYSTEM, *CHAT["messages"]]}),
    "ShareGPT with a system field": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]},
        {}, {"messages": [SYSTEM, *CHAT["messages"]]}),
    "ShareGPT with weights": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": False}, {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
        {}, {"messages": [user("a"), answer("b", train=False), user("c"), answer("d")]}),
    "ShareGPT's names in OpenAI's field": ({"messages": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}, {}, CHAT),
    "OpenAI's names in ShareGPT's field": ({"conversations": CHAT["messages"]}, {}, CHAT),
    "other names": (
        {"dialog": [{"speaker": "me", "said": "2 + 3?"}, {"speaker": "it", "said": "5"}]},
        {"fields": ("messages=dialog", "role=speaker", "content=said"), "roles": ("me=user", "it=assistant")}, CHAT),
    "human and gpt by option": (
        {"messages": [{"role": "human", "content": "2 + 3?"}, {"role": "gpt", "content": "5"}]},
        {"roles": ("human=user", "gpt=assistant")}, CHAT),
    "Alpaca": (INSTRUCTION, {}, {"messages": [user("Add.\n2 and 3"), answer("5")]}),
    "Alpaca without input": ({**INSTRUCTION, "input": ""}, {}, {"messages": [user("Add."), answer("5")]}),
    "LLaMA-Factory's Alpaca": (
        {**INSTRUCTION, "system": "Be brief.", "history": [["Hi", "Ho"]]}, {},
        {"messages": [SYSTEM, user("Hi"), answer("Ho"), user("Add.\n2 and 3"), answer("5")]}),
    "Alpaca by other names": (
        {"question": "Add.", "context": "2 and 3", "reply": "5"},
        {"fields": ("instruction=question", "input=context", "output=reply")}, {"messages": [user("Add.\n2 and 3"), answer("5")]}),
    "prompts by other names": (
        {"question": "2 + 3?", "answer": "5"}, {"fields": ("prompt=question", "completion=answer")}, {"prompt": "2 + 3?", "completion": "5"}),
    "names changed about": (
        {"completion": "2 + 3?", "prompt": "5"}, {"fields": ("prompt=completion", "completion=prompt")}, {"prompt": "2 + 3?", "completion": "5"}),
    "TRL's prompts of messages": (
        {"prompt": [user("a"), answer("b"), user("c")], "completion": [answer("d")]}, {},
        {"messages": [user("a"), answer("b", train=False), user("c"), answer("d")]}),
    "a preference's chosen answer": (
        {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}, {"fields": ("completion=chosen",)}, {"prompt": "2 + 3?", "completion": "5"}),
    "a preference's chosen chat": (
        {"chosen": CHAT["messages"], "rejected": []}, {"fields": ("messages=chosen",)}, CHAT),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_a_record_of_another_form_is_read_as_ours(tmp_path: Path, name: str) -> None:
    theirs, options, ours = SAME[name]
    got, want = examples(tmp_path, [theirs], **options), examples(tmp_path, [ours])
    assert got.train == want.train
    assert got.train


def test_a_call_of_a_function_as_sharegpt_writes_it() -> None:
    record = Record(
        {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "5"}]},
        "d:1", "d:1")  # fmt: skip
    read, _ = Format.of((), (), tokenizer(PLAIN)).standard(record)
    assert read.fields["messages"] == [
        user("2 + 3?"),
        answer("", tool_calls=[{"type": "function", "function": CALL}]),
        {"role": "tool", "content": "5"},
    ]


def test_alpaca_without_a_chat_template_has_its_own_words(tmp_path: Path) -> None:
    tokens = tokenizer()
    data = examples(tmp_path, [INSTRUCTION, {**INSTRUCTION, "input": ""}], tokens)
    assert [tokens.decode(example.ids) for example in data.train] == [
        ALPACA.format(WITH, "### Input:\n2 and 3\n\n") + "5</s>",
        ALPACA.format("", "") + "5</s>",
    ]
    assert [said(tokens, example) for example in data.train] == [["5</s>"], ["5</s>"]]
    assert data.notes[0].endswith("prompts in Alpaca's own words and completions, without a chat template.")
    (note,) = [note for note in examples(tmp_path, [INSTRUCTION]).notes if "chat" in note]
    assert note.endswith("read as a chat: the user's instruction with its input, and the answer.")


WRONG: list[tuple[Rows | str, dict[str, Any], str]] = [
    ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {}, r"data.jsonl:1: has chosen and rejected answers. .* --task preference, .* --fields completion=chosen"),
    ([{"text": "a", "label": None}], {"task": SEQUENCE}, "data.jsonl:1: label: is null. Give it a value"),
    ([{"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]}], {}, "none is of the role 'assistant', .* --roles human=user"),
    ('[{"text": "a"}]', {}, "data.jsonl:1: expected an object in each line, .* one array of objects is named .json"),
    ([{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]}], {}, r"messages\[1\]: value: expected the JSON of a f"),
    ([{"instruction": 1, "output": "b"}], {}, "data.jsonl:1: instruction: expected a text, got 1"),
    ([{**INSTRUCTION, "history": ["a"]}], {}, "history: expected a list of pairs"),
    ([{"question": "a", "prompt": "b", "completion": "c"}], {"fields": ("prompt=question",)}, "has 'question', which is read as 'prompt', and 'prompt' too"),
    ([{"conversations": 5}], {}, "messages: expected a list of objects, got 5"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "message"), WRONG)
def test_records_that_do_not_fit(tmp_path: Path, rows: Rows | str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        examples(tmp_path, rows, **options)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": ("prompt",)}, "fields: expected pairs such as prompt=question, got 'prompt'"),
        ({"fields": ("promt=a",)}, "fields: expected one of .* got 'promt'.* Near names: prompt"),
        ({"fields": ("prompt=a", "prompt=b")}, "fields: 'prompt' is given twice"),
        ({"roles": ("human=usr",)}, "roles: expected one of .* got 'usr'.* Near names: user"),
        ({"roles": ("=user",)}, "roles: expected pairs such as human=user"),
    ],
)
def test_options_that_are_no_pairs(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        examples(tmp_path, [CHAT], **options)


# What is left out


def test_bad_records_are_left_out_counted_and_named(tmp_path: Path) -> None:
    lines = [
        json.dumps({"prompt": "a", "completion": "b"}), "{", json.dumps({"text": "c"}), json.dumps({"prompt": "d"}),
        json.dumps({"prompt": "e", "completion": 5}), json.dumps({"prompt": "f", "completion": "g"}), "[]",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    with pytest.raises(FormatError, match=r"data\.jsonl:2: expected JSON in each line"):
        examples(tmp_path, text)
    data = examples(tmp_path, text, skip_bad=True)
    assert [example.source for example in data.train] == ["data.jsonl:1", "data.jsonl:6"]
    (note,) = data.notes
    assert note.startswith("5 records that cannot be used are left out: ")
    assert all(f"data.jsonl:{line}: " in note for line in (2, 3, 4))
    assert note.endswith(" And 2 more.")
    assert examples(tmp_path, "\n".join(lines[i] for i in (0, 5)), skip_bad=True).notes == []


def test_bytes_and_rows_that_are_broken_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "aa"}\n{"text": "\xff"}\n{"text": "bb"}\n')
    table = jsonl(tmp_path / "data.csv", "text\naa\nb,c\nbb\n")
    for path in (file, table):
        settings = Settings(data=(path,), model=MODEL, validation_split=0.0, skip_bad=True)
        data = prepare(settings, tokenizer(), None)
        assert [tokenizer().decode(example.ids) for example in data.train] == ["aa</s>", "bb</s>"]
        assert data.notes[0].startswith("1 record that cannot be used is left out: ")


def test_a_chat_that_cannot_be_learned_and_a_class_that_is_none_are_left_out(tmp_path: Path) -> None:
    data = examples(tmp_path, [CHAT, {"messages": [user("a"), answer(" ")]}], skip_bad=True)
    assert len(data.train) == 1
    rows: Rows = [
        {"text": "a", "label": "x"},
        {"text": "b", "label": "y"},
        {"text": "c", "label": 1.5},
        {"text": "d", "label": 3},
    ]
    data = examples(tmp_path, rows, task=SEQUENCE, skip_bad=True)
    assert data.classes == ("x", "y")
    assert [example.source for example in data.train] == ["data.jsonl:1", "data.jsonl:2"]
    rows = [
        {"tokens": ["a"], "label": ["x"]},
        {"tokens": ["b"], "label": ["x", "y"]},
        {"tokens": ["c"], "label": ["z"]},
    ]
    data = examples(tmp_path, rows, task=TOKEN, skip_bad=True)
    assert (data.classes, len(data.train)) == (("x", "z"), 2)


def test_if_all_are_bad_nothing_is_trained(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no token is left to .* 2 records that cannot be used are left out"):
        examples(tmp_path, "{\n{\n", skip_bad=True)


# Several files


def test_several_files_are_read_in_order_and_may_be_of_several_kinds(tmp_path: Path) -> None:
    one, two = jsonl(tmp_path / "a.jsonl", [{"text": "aa"}]), jsonl(tmp_path / "b.jsonl", [CHAT, CHAT])
    data = prepare(Settings(data=(one, two), model=MODEL, validation_split=0.0), tokenizer(PLAIN), None)
    assert [example.source for example in data.train] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]
    with pytest.raises(FormatError, match=r"b.jsonl:1: has 'messages', but .*a.jsonl:1 has 'text'. Validation data"):
        prepare(Settings(data=(one,), validation=two, model=MODEL), tokenizer(PLAIN), None)
    empty = jsonl(tmp_path / "c.jsonl", [{"text": ""}])
    with pytest.raises(FormatError, match=r"c\.jsonl: no token is left"):
        prepare(Settings(data=(one, empty), model=MODEL, validation_split=0.0), tokenizer(eos=None), None)


def test_files_with_weights(tmp_path: Path) -> None:
    files = tuple(jsonl(tmp_path / f"{name}.jsonl", [{"text": name * 3}] * n) for name, n in (("a", 4), ("b", 6)))
    settings = Settings(data=files, weights=(2.0, 0.5), model=MODEL, validation_split=0.0, batch=4)
    data = prepare(settings, tokenizer(), None)
    assert data.shares == ((4, 2.0), (6, 0.5))
    plain = prepare(Settings(data=files, model=MODEL, validation_split=0.0), tokenizer(), None)
    assert plain.shares == ()
    assert (plain.train, plain.digest() == data.digest()) == (data.train, False)
    batches = Batches.of(settings, data.train, 0, data.shares)
    assert batches.steps_per_epoch == 3  # 8 + 3 rows
    rows = [source for k in range(6) for source in batches.sources(k)]
    assert Counter(rows) == {**{f"a.jsonl:{i}": 4 for i in range(1, 5)}, **{f"b.jsonl:{i}": 1 for i in range(1, 7)}}
    packed = prepare(
        Settings(data=files, weights=(2.0, 0.5), model=MODEL, validation_split=0.0, packing=True, context=8),
        tokenizer(),
        None,
    )
    assert [n for n, _ in packed.shares] == [2, 3]
    assert not any("a.jsonl" in row.source and "b.jsonl" in row.source for row in packed.train)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 3)), min_size=1, max_size=3), st.integers(0, 3))
def test_weights_are_exact(parts: list[tuple[int, float]], seed: int) -> None:
    """Of each part an epoch has its share, and after any number of epochs no row was there twice more than another."""
    rows = [Example([part], [part], (1,), f"{part}:{i}") for part, (n, _) in enumerate(parts) for i in range(n)]
    batches = Batches(rows, batch=2, accumulation=1, seed=seed, pad=0, task=CAUSAL, shares=parts)
    seen: Counter[str] = Counter()
    for epoch in range(4):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        sources = [source for k in steps for source in batches.sources(k)]
        for part, (n, weight) in enumerate(parts):
            assert sum(source.startswith(f"{part}:") for source in sources) == max(1, round(n * weight))
        seen.update(sources)
        for part, (n, _) in enumerate(parts):
            counts = [seen[f"{part}:{i}"] for i in range(n)]
            assert max(counts) - min(counts) <= 1
    again = Batches(rows, batch=2, accumulation=1, seed=seed, pad=0, task=CAUSAL, shares=parts)
    assert again.sources(batches.steps_per_epoch) == batches.sources(batches.steps_per_epoch)

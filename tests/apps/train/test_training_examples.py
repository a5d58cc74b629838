"""Records as examples: the ids and the places of the loss are TRL's, and nothing is dropped in silence."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_models import BRACKETS, MARKED, PLAIN, said, tokenizer

from funclora._apps.train.examples import IGNORED, Data, Example, prepare
from funclora._apps.train.settings import SEQ2SEQ, SEQUENCE, TOKEN, Settings
from funclora._apps.train.tokenizer import ByteTokenizer
from funclora.errors import ConfigError, FormatError, UnsupportedError

Rows = list[dict[str, Any]]
MODEL = Path("model")  # settings name one; nothing here opens it
TEXTS: Rows = [{"text": text} for text in ("a few words", "é 😀 \u2028 lines\n\n", "ended</s>", "<s>begun")]
PAIRS: Rows = [
    {"prompt": "1 + 1 = ", "completion": "2"},
    {"prompt": "Say é:", "completion": " é</s>"},
    {"prompt": "", "completion": "all of it"},
    {"prompt": "nothing", "completion": ""},
    {"prompt": "merge t", "completion": "his"},
]


def turns(*contents: str, system: str | None = None) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}


CHATS: Rows = [
    turns("hi", "hello é"),
    turns("a", "b", "c", "d\n", system="Be brief."),
    turns("x", "y", "no answer yet"),
]


def jsonl(file: Path, rows: Rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def examples(folder: Path, rows: Rows, tokens: Any, **settings: Any) -> Data:
    file = jsonl(folder / "data.jsonl", rows)
    return prepare(Settings(**{"data": (file,), "model": MODEL, "validation_split": 0.0, **settings}), tokens, None)


def trl(folder: Path, rows: Rows, tokens: Any, **options: Any) -> Rows:
    """What TRL's trainer makes of the same rows."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **shape))
    args = SFTConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, max_length=512, disable_tqdm=True,
        activation_checkpointing=False, **options,
    )  # fmt: skip
    trainer: Any = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokens)
    return list(trainer.train_dataset)


@pytest.mark.parametrize(
    "options", [{}, {"begins": True}, {"merges": [("t", "h"), ("Ġ", "t")]}], ids=["plain", "begins", "merges"]
)
@pytest.mark.parametrize(("rows", "train_on"), [(TEXTS, "completions"), (PAIRS, "completions"), (PAIRS, "all")])
def test_texts_and_pairs_are_those_of_trl(tmp_path: Path, rows: Rows, train_on: str, options: dict[str, Any]) -> None:
    data = examples(tmp_path, rows, tokenizer(**options), train_on=train_on)
    only = {"completion_only_loss": train_on == "completions"} if rows is PAIRS else {}
    theirs = trl(tmp_path, rows, tokenizer(**options), **only)
    assert len(theirs) == len(rows)
    assert [(example.ids, example.labels) for example in data.train] == [(t["input_ids"], t["labels"]) for t in theirs]
    assert [example.source for example in data.train] == [f"data.jsonl:{i + 1}" for i in range(len(rows))]


@pytest.mark.parametrize("train_on", ["completions", "all"])
@pytest.mark.parametrize("begins", [False, True])
def test_chats_with_generation_markers_are_those_of_trl(tmp_path: Path, train_on: str, begins: bool) -> None:
    data = examples(tmp_path, CHATS, tokenizer(MARKED, begins=begins), train_on=train_on)
    theirs = trl(tmp_path, CHATS, tokenizer(MARKED, begins=begins), assistant_only_loss=train_on == "completions")
    assert [(example.ids, example.labels) for example in data.train] == [(t["input_ids"], t["labels"]) for t in theirs]


def test_tools_reach_the_template_as_with_trl(tmp_path: Path) -> None:
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}" + MARKED
    tool = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = [{**turns("a", "b"), "tools": json.dumps(tool), "chat_template_kwargs": {"mood": "!"}}]
    (ours,) = examples(tmp_path, rows, tokenizer(template)).train
    (theirs,) = trl(tmp_path, rows, tokenizer(template), assistant_only_loss=True)
    assert (ours.ids, ours.labels) == (theirs["input_ids"], theirs["labels"])
    assert '"name": "f"' in tokenizer().decode(ours.ids)


def test_chats_without_markers_have_loss_on_what_each_turn_adds(tmp_path: Path) -> None:
    tokens = tokenizer(PLAIN)
    data = examples(tmp_path, CHATS, tokens)
    marked = examples(tmp_path, CHATS, tokenizer(MARKED)).train
    assert [example.ids for example in data.train] == [example.ids for example in marked]
    end = "<|im_end|>\n"
    assert [said(tokens, example) for example in data.train] == [
        ["hello é" + end],
        ["b" + end, "d\n" + end],
        ["y" + end],
    ]
    brackets = tokenizer(BRACKETS, begins=True)
    chats = [turns("a", "b", "c", "d"), turns("e", "f", "g")]
    data = examples(tmp_path, chats, brackets)
    assert [said(brackets, example) for example in data.train] == [[" b</s>", " d</s>"], [" f</s>"]]
    assert brackets.decode(data.train[1].ids) == "<s>[INST] e [/INST] f</s>[INST] g [/INST]"  # one <s>: the template's


def test_a_token_over_the_border_of_a_turn_has_loss(tmp_path: Path) -> None:
    # As transformers has it with markers: the token in which the assistant's text begins is the assistant's.
    merges = [("Ċ", "Ċ")]
    row = turns("a", "\nb")
    data = [examples(tmp_path, [row], tokenizer(template, merges=merges)).train[0] for template in (PLAIN, MARKED)]
    assert data[0].ids == data[1].ids
    assert said(tokenizer(merges=merges), data[0]) == ["\n\nb<|im_end|>\n"]
    assert said(tokenizer(merges=merges), data[1]) == ["\n\nb<|im_end|>"]


@pytest.mark.parametrize("name", ["cohere", "gemma", "gemma3", "lfm2", "llama3", "qwen2_5_vl", "qwen3_instruct_2507"])
def test_real_templates_have_the_loss_where_trls_markers_have_it(tmp_path: Path, name: str) -> None:
    templates = resources.files("trl") / "chat_templates"
    files = [templates / f"{name}{suffix}.jinja" for suffix in ("", "_training")]
    if not all(file.is_file() for file in files):
        pytest.skip("this version of TRL has no such template")
    plain, marked = (tokenizer(file.read_text(encoding="utf-8")) for file in files)
    chats = [turns("hi", "hello é"), turns("a", "b", "c", "d")]
    assert examples(tmp_path, chats, plain).train == examples(tmp_path, chats, marked).train
    assert "generation %}" not in plain.chat_template


def test_a_last_character_of_several_tokens_has_loss_whole(tmp_path: Path) -> None:
    template = MARKED.replace("+ '<|im_end|>' }}{%- endgeneration -%}", "}}{%- endgeneration -%}<|im_end|>")
    assert template != MARKED
    tokens = tokenizer(template)
    (example,) = examples(tmp_path, [turns("é", "no 😀")], tokens).train
    assert said(tokens, example) == ["no 😀"]


def test_messages_that_the_template_leaves_out_are_counted(tmp_path: Path) -> None:
    template = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    data = examples(tmp_path, [turns("a b", "c", system="brief")], tokenizer(template))
    (note,) = data.notes
    assert note.startswith("1 example in which the chat template leaves out or changes some messages; the first is")
    assert examples(tmp_path, CHATS, tokenizer(PLAIN)).notes == []


CHAT_ERRORS: list[tuple[dict[str, Any], str | None, type[Exception], str]] = [
    (turns("a", "b"), None, ConfigError, "tokenizer has no chat template. Give the file .* as prompt and completion"),
    ({"messages": []}, PLAIN, FormatError, r"data.jsonl:1: messages: expected a list of objects, got \[\]"),
    ({"messages": "hi"}, PLAIN, FormatError, "messages: expected a list of objects, got 'hi'"),
    (
        {"messages": [{"from": "user"}]},
        PLAIN,
        FormatError,
        r"messages\[0\]: expected {.* got {'from': 'user'}",
    ),
    ({"messages": [{"role": "user"}]}, PLAIN, FormatError, r"messages\[0\]: content: expected a text, got None"),
    (
        {"messages": [{"role": "assistant", "content": "a"}]},
        PLAIN,
        FormatError,
        "1 example whose greeting has no loss: the chat template cannot ask for it",
    ),
    (turns("a", "b", system="c"), BRACKETS, FormatError, "the chat template refuses these messages: roles must alter"),
    ({**turns("a", "b"), "tools": "["}, PLAIN, FormatError, "data.jsonl:1: tools: expected JSON"),
    ({**turns("a", "b"), "tools": {}}, PLAIN, FormatError, "data.jsonl:1: tools: expected a list, got {}"),
    ({**turns("a", "b"), "chat_template_kwargs": 1}, PLAIN, FormatError, "chat_template_kwargs: expected an object"),
    (turns("a"), PLAIN, FormatError, "1 example without a token that has loss left out; the first is .*data.jsonl:1"),
]


@pytest.mark.parametrize(("row", "template", "kind", "message"), CHAT_ERRORS)
def test_chats_that_cannot_be_trained_on(
    tmp_path: Path, row: dict[str, Any], template: str | None, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        examples(tmp_path, [row], tokenizer(template))
    assert len(str(caught.value).splitlines()) == 1


def test_a_tokenizer_that_cannot_tell_where_tokens_are_from(tmp_path: Path) -> None:
    class Slow:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            return self.inner(*args, **options)

        is_fast = False

    slow = Slow(tokenizer(PLAIN))
    with pytest.raises(UnsupportedError, match=r"no fast one.* train_on all"):
        examples(tmp_path, CHATS, slow)
    assert examples(tmp_path, CHATS, slow, train_on="all").train
    with pytest.raises(UnsupportedError, match="needs a fast tokenizer"):
        examples(tmp_path, [{"tokens": ["a", "b"], "label": [0, 1]}], slow, task=TOKEN)


def test_a_tokenizer_that_ends_texts_itself_ends_them_once(tmp_path: Path) -> None:
    ends = tokenizer(begins=True, ends=True)
    data = examples(tmp_path, [{"text": "ab"}], ends)
    assert ends.decode(data.train[0].ids) == "<s>ab</s>"
    data = examples(tmp_path, [{"prompt": "ab", "completion": "cd"}], ends)
    (pair,) = data.train
    assert data.notes == []  # the end of the prompt alone is no token that merges
    assert (ends.decode(pair.ids), said(ends, pair)) == ("<s>abcd</s>", ["cd</s>"])


def test_start_and_end_tokens_of_both_text_and_tokenizer_are_counted(tmp_path: Path) -> None:
    data = examples(tmp_path, [{"text": "<s>ab</s>"}, {"text": "cd"}], tokenizer(begins=True, ends=True))
    assert data.notes == [
        f"1 example that {what} token twice: the text's and the tokenizer's; the first is {tmp_path}/data.jsonl:1."
        for what in ("begin with the start", "end with the end")
    ]


def test_a_prompt_that_merges_with_its_completion_is_counted(tmp_path: Path) -> None:
    tokens = tokenizer(merges=[("t", "h")])
    data = examples(tmp_path, PAIRS, tokens)
    assert said(tokens, data.train[-1]) == ["this</s>"]
    (note,) = [note for note in data.notes if "merges" in note]
    assert note.startswith(
        "1 example in which the end of the prompt merges into the first token of the completion; the first is"
    )
    assert note.endswith("data.jsonl:5.")


# Lengths


@given(n=st.integers(2, 60), context=st.integers(2, 20))
def test_every_token_of_a_text_is_predicted_once(
    tmp_path_factory: pytest.TempPathFactory, n: int, context: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "long.txt"
    text = "".join(chr(48 + i) for i in range(n))
    file.write_text(text)
    data = prepare(Settings(data=(file,), context=context, validation_split=0.0), ByteTokenizer(), None)
    assert all(len(example.ids) <= context and example.labels == example.ids for example in data.train)
    assert "".join(chr(i) for example in data.train for i in example.labels[1:]) == text[1:]
    assert data.train[0].ids[0] == 48


def test_what_is_too_long_is_cut_off_or_left_out_and_counted(tmp_path: Path) -> None:
    rows: Rows = [
        {"prompt": "a" * 4, "completion": "b" * 9},
        {"prompt": "a" * 30, "completion": "b"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a" * 10, "completion": "b"},
    ]
    data = examples(tmp_path, rows, tokenizer(), context=10)
    assert [len(example.ids) for example in data.train] == [10, 3]
    assert sum(label != IGNORED for label in data.train[0].labels) == 6
    assert data.notes == [
        "1 example cut off after 10 tokens; the first is data.jsonl:1.",
        "2 examples without a token that has loss in the first 10 tokens left out; the first is data.jsonl:2.",
    ]


def test_the_context_is_the_models_at_most(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": "x" * 100}])
    data = prepare(Settings(data=(file,), validation_split=0.0), ByteTokenizer(), 32)
    assert max(len(example.ids) for example in data.train) == 32
    assert data.notes[0] == "The context is 32 tokens, the model's maximum, instead of 512."
    assert data.notes[-1].startswith("1 example of more than 32 tokens split into several")


def test_examples_without_tokens_or_loss_are_counted(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("", "a", "ab", "")]
    data = examples(tmp_path, rows, ByteTokenizer(), model=None)
    assert [example.ids for example in data.train] == [list(b"ab")]
    assert [note.split(";")[0] for note in data.notes] == [
        "2 examples without tokens left out",
        "1 example without a token that has loss left out",
    ]
    with pytest.raises(FormatError, match=r"data.jsonl: no token is left to .* 1 example without tokens"):
        examples(tmp_path, rows[:1], ByteTokenizer())


# Which data it is


SCHEMA_ERRORS: list[tuple[Rows, dict[str, Any], str]] = [
    (
        [{"txt": "a"}],
        {},
        "data.jsonl:1: expected a text under 'text', prompt and .* it has 'txt'",
    ),
    ([{}], {}, "it has no fields"),
    ([{"text": None}], {}, "it has no fields"),
    ([{"text": "a", "prompt": "b"}], {}, "data.jsonl:1: has prompt, text, which are different kinds of data"),
    ([{"text": "a", "completion": "b"}], {}, "data.jsonl:1: has completion, text, which are different kinds of data"),
    ([{"text": "a", "messages": []}], {}, "data.jsonl:1: has messages, text, which are different kinds of data"),
    ([{"prompt": "b"}], {}, "data.jsonl:1: expected a value under 'completion'; it has 'prompt'"),
    ([{"completion": "b"}], {}, "expected a value under 'prompt'"),
    ([{"text": "a"}, {"text": 3}], {}, "data.jsonl:2: text: expected a text, got 3"),
    ([{"text": "a"}, {"prompt": "a", "completion": "b"}], {}, "data.jsonl:2: has 'prompt', but .*:1 has 'text'"),
    ([{"text": "a"}, {"body": "a"}], {}, "data.jsonl:2: expected a text under 'text'"),
    ([{"prompt": ["a"], "completion": "b"}], {}, r"prompt: expected a text, got \['a'\]"),
    ([{"text": "a", "lable": 1}], {"task": SEQUENCE}, "expected a value under 'label'; .* Near names: lable"),
    ([{"tokens": ["a"], "label": [1.5]}], {"task": TOKEN}, "expected a class as a text or a whole number, got 1.5"),
    ([{"text": "a", "label": 1}] * 2, {"task": SEQUENCE}, "expected at least two classes, got 1"),
    (
        [{"text": "a", "label": 1}, {"text": "a", "label": "1"}],
        {"task": SEQUENCE},
        ":2: label: .* str here, but int",
    ),
    ([{"tokens": "a b", "label": [1, 2]}], {"task": TOKEN}, "tokens: expected a list, got 'a b'"),
    ([{"tokens": ["a"], "label": 1}], {"task": TOKEN}, "label: expected a list, got 1"),
    ([{"tokens": ["a", 2], "label": [1, 2]}], {"task": TOKEN}, "tokens: expected words, got 2"),
    ([{"tokens": ["a", "b"], "label": [1]}], {"task": TOKEN}, "expected a class for each of 2 words, got 1"),
    ([{"text": "a"}], {"task": SEQ2SEQ}, "expected a value under 'prompt'"),
]


@pytest.mark.parametrize(("rows", "settings", "message"), SCHEMA_ERRORS)
def test_records_that_do_not_fit(tmp_path: Path, rows: Rows, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        examples(tmp_path, rows, tokenizer(), **settings)
    assert len(str(caught.value).splitlines()) == 1


def test_settings_that_contradict_themselves(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": ()}, "data: no training data is given. Give a file"),
        ({"context": 1}, "context: expected at least 2 tokens"),
        ({"packing": True, "model": None}, "packing: the demo's base cannot"),
        ({"validation_split": 0.9}, "validation_split: 0.9 of 4 leaves nothing"),
    ]
    for settings, message in cases:
        with pytest.raises(ConfigError, match=message):
            examples(tmp_path, TEXTS, tokenizer(), **settings)


def test_fields_that_are_not_read_are_named(tmp_path: Path) -> None:
    data = examples(tmp_path, [{"body": "abc", "id": 1}, {"body": "def", "url": "x"}], tokenizer(), text_field="body")
    assert data.notes == ["Fields that are not read: id, url."]


def test_the_field_of_text_may_be_any(tmp_path: Path) -> None:
    data = examples(tmp_path, PAIRS[:2], tokenizer(), text_field="completion")
    assert [said(tokenizer(), example) for example in data.train] == [["2</s>"], [" é</s>"]]


def test_a_tokenizer_without_an_end_token_is_noted(tmp_path: Path) -> None:
    tokens = tokenizer(eos=None)
    data = examples(tmp_path, PAIRS[:1], tokens)
    assert said(tokens, data.train[0]) == ["2"]
    assert data.notes == ["The tokenizer has no end token, so the model cannot learn to stop."]


# Classification and translation


def test_classes_of_texts(tmp_path: Path) -> None:
    tokens = tokenizer(begins=True, ends=True)
    rows = [{"text": "ab", "label": "no"}, {"text": "c" * 40, "label": "yes"}, {"text": "", "label": "no"}]
    data = examples(tmp_path, rows, tokens, task=SEQUENCE, context=10)
    assert data.classes == ("no", "yes")
    assert [example.labels for example in data.train] == [[0], [1], [0]]
    assert [tokens.decode(example.ids) for example in data.train] == ["<s>ab</s>", f"<s>{'c' * 8}</s>", "<s></s>"]
    assert any(note.startswith("1 example cut off after 10 tokens") for note in data.notes)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, 0], ("0", "9", "10")),
        (["10", "9"], ("9", "10")),
        ([True, False], ("False", "True")),
        (["b", "a"], ("a", "b")),
    ],
)
def test_classes_are_sorted(tmp_path: Path, labels: list[Any], classes: tuple[str, ...]) -> None:
    rows = [{"text": "x", "label": label} for label in labels]
    data = examples(tmp_path, rows, tokenizer(), task=SEQUENCE)
    assert data.classes == classes
    assert [classes[example.labels[0]] for example in data.train] == [str(label) for label in labels]
    assert f"{len(classes)} classes: {', '.join(classes)}." in data.notes


@pytest.mark.parametrize(
    ("known", "classes"), [(("b", "c", "a"), ("b", "c", "a")), (("b", "x"), ("a", "b")), ((), ("a", "b"))]
)
def test_classes_that_the_model_knows_have_its_order(
    tmp_path: Path, known: tuple[str, ...], classes: tuple[str, ...]
) -> None:
    file = jsonl(tmp_path / "data.jsonl", [{"text": "x", "label": label} for label in "ab"])
    settings = Settings(data=(file,), model=MODEL, task=SEQUENCE, validation_split=0.0)
    data = prepare(settings, tokenizer(), None, known)
    assert data.classes == classes
    assert [classes[example.labels[0]] for example in data.train] == ["a", "b"]
    assert ("The model's head has other classes: b, x." in data.notes) == ("x" in known)
    assert ("No training example is of class c." in data.notes) == ("c" in known)


def test_a_class_that_only_the_validation_has_is_named(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": label} for label in "abc"]
    held = jsonl(tmp_path / "held.jsonl", rows)
    data = examples(tmp_path, rows[:2], tokenizer(), task=SEQUENCE, validation=held)
    assert data.classes == ("a", "b", "c")
    assert "No training example is of class c." in data.notes


def test_classes_of_words_are_at_their_first_tokens(tmp_path: Path) -> None:
    tokens = tokenizer(begins=True, ends=True)
    rows: Rows = [
        {"tokens": ["ab", "c", "def"], "ner": ["B", "O", "I"]},
        {"tokens": ["x" * 20, "y"], "ner": ["I", "B"]},
        {"tokens": ["a", "", "b"], "ner": ["O", "B", "I"]},
        {"tokens": [], "ner": []},
    ]
    data = examples(tmp_path, rows, tokens, task=TOKEN, label_field="ner", context=12)
    assert data.classes == ("B", "I", "O")
    x = IGNORED
    assert [example.labels for example in data.train] == [
        [x, 0, x, 2, x, 1, x, x, x, x],
        [x, 1, *[x] * 10],
        [x, 2, 1, x, x],
    ]
    assert all(len(example.ids) == len(example.labels) for example in data.train)
    assert [note.split(";")[0] for note in data.notes][1:] == [
        "1 example cut off after 12 tokens",
        "1 example with words that have no token, whose classes are lost",
        "1 example without tokens left out",
    ]


@pytest.mark.parametrize("prefix", [False, True])
def test_words_are_apart(tmp_path: Path, prefix: bool) -> None:
    tokens = tokenizer(prefix=prefix)
    data = examples(tmp_path, [{"tokens": ["a", "red", "x"], "label": ["O", "W", "O"]}], tokens, task=TOKEN)
    (example,) = data.train
    assert tokens.decode(example.ids).strip() == "a red x"
    assert [label for label in example.labels if label != IGNORED] == [0, 1, 0]


def test_pairs_of_a_translation(tmp_path: Path) -> None:
    for ends in (False, True):
        tokens = tokenizer(ends=ends)
        rows = [{"prompt": "ab", "completion": "xyz"}, {"prompt": "a" * 20, "completion": "b" * 20}]
        data = examples(tmp_path, rows, tokens, task=SEQ2SEQ, context=8)
        end = "</s>" if ends else ""
        assert [tokens.decode(example.ids) for example in data.train] == ["ab" + end, "a" * (8 - ends) + end]
        assert [tokens.decode(example.labels) for example in data.train] == ["xyz</s>", "b" * 7 + "</s>"]
        assert [note.split(";")[0] for note in data.notes] == ["1 example cut off after 8 tokens"]


# Parts


def test_the_held_out_part_is_a_function_of_the_seed(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}"} for i in range(40)]
    data = [examples(tmp_path, rows, tokenizer(), validation_split=0.1, seed=seed) for seed in (0, 0, 1)]
    assert data[0] == data[1]
    sources = [[example.source for example in some.validation] for some in data]
    assert sources[0] != sources[2]
    for some in data:
        assert len(some.validation) == 4
        together = [*some.train, *some.validation]
        assert sorted(example.source for example in together) == sorted(f"data.jsonl:{i + 1}" for i in range(40))
        assert "4 of 40 examples are held out for evaluation." in some.notes


def test_of_one_long_text_the_end_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(33 + i % 90) for i in range(400)))
    data = prepare(Settings(data=(tmp_path / "a.txt",), context=11, validation_split=0.1), ByteTokenizer(), None)
    whole = prepare(Settings(data=(tmp_path / "a.txt",), context=11, validation_split=0.0), ByteTokenizer(), None)
    assert [*data.train, *data.validation] == whole.train
    assert len(data.validation) == 4
    few = prepare(Settings(data=(tmp_path / "a.txt",), context=300), ByteTokenizer(), None)
    assert (len(few.train), few.validation) == (2, [])
    assert any(note.startswith("No example is held out for evaluation: 2 are too few for") for note in few.notes)


def test_a_file_of_validation(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "held.jsonl", PAIRS[:1])
    data = examples(tmp_path, PAIRS, tokenizer(), validation=file, validation_split=0.5)
    assert len(data.train) == len(PAIRS)
    assert [(example.source, example.ids) for example in data.validation] == [("held.jsonl:1", data.train[0].ids)]
    with pytest.raises(FormatError, match=r"held.jsonl:1: has 'prompt', but .*data.jsonl:1 has 'text'"):
        examples(tmp_path, TEXTS, tokenizer(), validation=file)
    jsonl(file, [{"prompt": "a" * 600, "completion": ""}])
    with pytest.raises(FormatError, match=r"held.jsonl: no token is left"):
        examples(tmp_path, PAIRS, tokenizer(), validation=file)


def test_packed_rows_have_the_same_tokens_with_loss(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * (i % 5), "completion": "c" * (i % 7)} for i in range(30)]
    plain, packed = (examples(tmp_path, rows, tokenizer(), packing=packing, context=20) for packing in (False, True))
    assert len(packed.train) < len(plain.train)
    assert packed.notes[0].startswith("29 examples packed into ")  # of 30, one is the end token alone

    def counted(data: Data) -> int:
        return sum(label != IGNORED for row in data.train for label in row.labels[1:])

    assert counted(packed) == counted(plain)
    assert sorted(i for row in packed.train for i in row.ids) == sorted(i for row in plain.train for i in row.ids)


def test_the_digest_is_of_all_that_a_run_sees() -> None:
    example = Example([1, 2], [IGNORED, 2], (2,), "a:1")
    data = Data([example], [example])
    assert data.digest() == Data([dataclasses.replace(example, source="b:1")], [example], notes=["n"]).digest()
    others = [
        Data([example, example], []),
        Data([], [example, example]),
        Data([dataclasses.replace(example, ids=[1, 3])], [example]),
        Data([dataclasses.replace(example, labels=[1, 2])], [example]),
        Data([dataclasses.replace(example, lengths=(1, 1))], [example]),
        Data([example], [example], ("a", "b")),
        Data([example], [example], ("a, b",)),
        Data([Example([1], [2, IGNORED], (2,), "")], [example]),
    ]
    assert len({data.digest(), *(other.digest() for other in others)}) == 1 + len(others)
    assert len(data.digest()) == 64


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    examples(tmp_path, TEXTS, tokenizer(), validation_split=0.5)
    assert torch.equal(torch.get_rng_state(), state)

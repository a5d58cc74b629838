"""Chat templates from folders: rendered as transformers renders them, and stopped when they take too much."""

# ruff: noqa: E501 -- a template stands in a line

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import trl
from damage import TREES, little_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from text_models import BRACKETS, FORGETS, MARKED, PLAIN, tokenizer
from transformers.utils import chat_template_utils

from funclora._apps.train import templates
from funclora._apps.train.chat import chats, opened
from funclora._apps.train.records import Record
from funclora.errors import FormatError

TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer", "description": "one"}}, "required": ["a"]}}}
]  # fmt: skip
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "<think>easy</think>\n5", "reasoning_content": "easy"},
    {"role": "user", "content": "é 💡"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "name": "add", "content": "6", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "Six."},
]  # fmt: skip
STOCK = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SOURCES = {file.stem: file.read_text() for file in STOCK} | {
    "plain": PLAIN, "marked": MARKED, "brackets": BRACKETS, "forgets": FORGETS,
    "filters": "{{ messages|map(attribute='role')|unique|sort|join(', ') }}{{ messages|selectattr('role', 'in', "
    "['user'])|list|length }}{{ '%s-%05d'|format('a', 3) }}{{ '{:>8}|{}'.format('x', 2) }}{{ 'a b'.split()|last }}"
    "{{ messages[::-1][0].role|upper|center(20) }}{{ {'b': 1, 'a': [none, true]}|tojson(indent=2) }}{{ 2 ** 5 % 7 }}",
    "loops": "{% set ns = namespace(n=0, s='') %}{% for m in messages if m.role != 'tool' %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.s = ns.s ~ loop.index ~ m['role'] ~ none %}{{ loop.revindex }}{{ loop.last }}{% else %}none{% endfor %}"
    "{{ ns.n }}{{ ns.s }}{% for k, v in messages[0].items() %}{{ k }}{{ v }}{% if loop.first %}{% continue %}{% endif %}"
    "{% endfor %}{% for i in range(4) %}{{ i * 'ab' + [i, i]|string }}{% endfor %}",
    "macros": "{% macro turn(m, mark='#') %}{{ mark }}{{ m.role }}{{ caller(m) if caller else '' }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% call(x) turn(m, mark='!') %}{{ x.content }}{% endcall %}{% endfor %}"
    "{% set text %}{{ messages|length }} turns{% endset %}{{ text }}{% filter upper %}{{ text }}{% endfilter %}"
    "{% for m in [1, [2, [3]]] recursive %}{{ loop(m) if m is iterable else m }}{% endfor %}",
}  # fmt: skip


def rendered(source: str, messages: list[dict[str, Any]], *, ours: bool, tools: Any = None, **options: Any) -> Any:
    """The text, and what an error says."""
    tokens = tokenizer(source)
    try:
        if not ours:
            return tokens.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        with templates.bounded():
            return tokens.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    except Exception as error:  # noqa: BLE001 -- templates refuse what they do not know
        return type(error), str(error)


@pytest.mark.parametrize("name", SOURCES)
def test_texts_are_those_of_transformers(name: str) -> None:
    source, fine = SOURCES[name], 0
    for messages in (TURNS, TURNS[:3], TURNS[1:3], TURNS[1:2], [TURNS[1], TURNS[6]]):
        for tools in (None, TOOLS):
            for options in ({}, {"add_generation_prompt": True}, {"enable_thinking": False}):
                got, want = (rendered(source, messages, ours=ours, tools=tools, **options) for ours in (True, False))
                assert got == want
                fine += isinstance(got, str)
    assert fine, "it takes none of these conversations"


@pytest.mark.parametrize(
    "name", [name for name, source in SOURCES.items() if "generation" in source and "endgen" in source]
)
def test_marked_tokens_are_those_of_transformers(name: str) -> None:
    tokens = tokenizer(SOURCES[name])
    options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
    turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS[1:3]]
    messages = turns if name in ("llava_next_training", "idefics3_training") else TURNS[1:3]
    want = tokens.apply_chat_template(messages, **options)
    with templates.bounded():
        got = tokens.apply_chat_template(messages, **options)
    assert dict(got) == dict(want)
    assert sum(got["assistant_masks"])


def test_the_budget_is_for_conversations_of_any_length() -> None:
    """Hundreds of turns and a million characters take a part of it."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " + "word " * 500} for i in range(400)]
    for name in ("qwen3", "llama3_1", "gptoss", "deepseekv3", "gemma4", "phi3", "loops", "macros", "filters"):
        want = rendered(SOURCES[name], messages, ours=False)
        assert isinstance(want, str), name
        assert rendered(SOURCES[name], messages, ours=True) == want, name


def test_the_budget_is_spent() -> None:
    loops = "{% for i in range(100000) %}" * 2 + "{% endfor %}" * 2
    assert rendered(loops, TURNS, ours=True)[1] == "it takes more than 3,000,000 steps"
    assert rendered(loops.replace("100000", "900"), TURNS, ours=True) == ""


LOOP = "{% for i in range(100000) %}"
HOSTILE = {
    "division": ("{{ 1 / 0 }}", "fails on these messages: division by zero"),
    "a long loop": ("{% for i in range(10 ** 7) %}{% endfor %}", "fails on these messages: Range too big"),
    "loops in loops": (LOOP * 3 + "{% endfor %}" * 3, "it takes more than 50,000 steps"),
    "loops that find nothing": (f"{LOOP}{{% for j in range(100000) if false %}}{{% endfor %}}{{% endfor %}}", "steps"),
    "loops without output": (f"{LOOP}{{% set x = range(100000)|sum %}}{{% endfor %}}", "steps"),
    "a macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    "two macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "steps"),
    "a loop in itself": (
        "{% for m in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1]) }}{{ loop([1]) }}{% endif %}{% endfor %}",
        "steps"),
    "a text": ("{{ 'a' * 10 ** 9 }}", "it makes a value of more than 10,000,000 characters"),
    "a text the other way": ("{{ 10 ** 9 * 'a' }}", "more than 10,000,000 characters"),
    "a text in vain": ("{% set x = 'a' * 10 ** 9 %}", "more than 10,000,000 characters"),
    "a list": ("{{ ([1] * 10 ** 9)|length }}", "more than 10,000,000 characters"),
    "a number": ("{{ 9 ** (9 ** 9) }}", "a number of more than 10,000 bits"),
    "a number, often": ("{% set ns = namespace(x=3) %}" + LOOP + "{% set ns.x = ns.x * ns.x %}{% endfor %}", "10,000 bits"),
    "doubled": ("{% set ns = namespace(x='a') %}" + LOOP + "{% set ns.x = ns.x + ns.x %}{% endfor %}", "10,000,000"),
    "doubled by ~": ("{% set ns = namespace(x='a') %}" + LOOP + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "10,000,000"),
    "doubled lists": (
        "{% set ns = namespace(x=[1]) %}" + LOOP + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}", "steps"),
    "doubled maps": (
        "{% set ns = namespace(x=1) %}" + LOOP + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}", "steps"),
    "doubled by dict": (
        "{% set ns = namespace(x=1) %}" + LOOP + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}", "steps"),
    "literal text": (f"{LOOP}{'x' * 1000}{{% endfor %}}", "it makes more than 10,000,000 characters"),
    "constants": (f"{LOOP}{{{{ '{'x' * 1000}' }}}}{{% endfor %}}", "it makes more than 10,000,000 characters"),
    "long output": ("{% set x = 'a' * 10 ** 6 %}" + LOOP + "{{ x }}{% endfor %}", "it makes more than 10,000,000"),
    "in a block": ("{% set x %}" + LOOP + "{{ 'a' * 1000 }}{% endfor %}{% endset %}", "it makes more than 10,000,000"),
    "center": ("{{ 'a'|center(10 ** 9) }}", "center makes a value of more than"),
    "center, at once": ("{{ 'a'|center(1000000000) }}", "center makes a value of more than"),
    "ljust": ("{{ 'a'.ljust(10 ** 9) }}", "ljust makes a value of more than"),
    "zfill": ("{{ 'a'.zfill(10 ** 9) }}", "zfill makes"),
    "expandtabs": ("{{ '\t'.expandtabs(10 ** 9) }}", "expandtabs makes"),
    "replace": ("{% set x = 'a' * 10 ** 5 %}{{ x.replace('a', x) }}", "replace makes a value of more than"),
    "join": ("{% set x = 'a' * 10 ** 6 %}{{ x|join(x) }}", "join makes a value of more than"),
    "join, the method": ("{% set x = 'a' * 10 ** 6 %}{{ x.join(x) }}", "join makes a value of more than"),
    "indent": ("{{ ('a\n' * 10 ** 4)|indent(10 ** 6) }}", "indent makes"),
    "tojson": ("{{ [[1]]|tojson(indent=10 ** 9) }}", "tojson makes"),
    "batch": ("{{ [1]|batch(10 ** 9, 0)|list }}", "batch makes"),
    "slice": ("{{ [1]|slice(10 ** 9)|list }}", "slice makes"),
    "mapped": ("{{ range(100000)|map('string')|map('center', 9999)|join }}", "it makes more than 10,000,000"),
    "a width": ("{{ '{:>1000000000}'.format(1) }}", "more than 10,000,000 characters"),
    "a width from outside": ("{{ '{:>{w}}'.format(1, w=10 ** 9) }}", "format makes a value of more than"),
    "a width by map": ("{{ '{a:>{w}}'.format_map({'a': 1, 'w': 10 ** 9}) }}", "fails|makes"),
    "a width of %": ("{{ '%1000000000d' % 1 }}", "more than 10,000,000 characters"),
    "a width of % from outside": ("{{ '%*d' % (10 ** 9, 1) }}", "format makes a value of more than"),
    "a width of the filter": ("{{ '%999999999d'|format(1) }}", "more than 10,000,000 characters"),
    "many widths": ("{{ ('{:>99999}' * 1000).format(1) }}", "more than 10,000,000 characters"),
    "words": ("{{ lipsum(n=10 ** 6) }}", "'lipsum' is undefined"),
    "a search": (
        "{% set x = 'a' * 9 * 10 ** 6 %}" + LOOP + "{% if 'b' in x %}{% endif %}{% endfor %}", "50,000 steps"),
    "slices": ("{% set x = 'a' * 9 * 10 ** 6 %}" + LOOP + "{% set y = x[::-1] %}{% endfor %}", "50,000 steps"),
    "marks": (
        "{{ 'a' * 9 * 10 ** 6 }}{% for i in range(100000) %}{% generation %}{% endgeneration %}{% endfor %}", "steps"),
    "a class": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    "a class by attr": ("{{ (messages|attr('__class__')).x }}", "is unsafe|is undefined|has no attribute"),
    "a change": ("{{ messages.append(1) }}", "is unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "no loader for this environment"),
    "no syntax": ("{% for %}", "refuses these messages"),
    "too deep": ("{% for i in [1] %}" * 25 + "{% endfor %}" * 25, "fails on these messages: too many statically nested"),
    "brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "fails on these messages: maximum recursion depth"),
    "too long": ("x" * (1 << 19), "it has 524,288 characters, of 262,144 at most"),
    "a complaint": ("{{ raise_exception('a\nb' * 9999) }}", "refuses these messages: a"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_too_much_or_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "STEPS", 50_000)
    source, message = HOSTILE[name]
    record = Record({"messages": TURNS[1:3]}, "d.jsonl:7", "/d.jsonl:7")
    with little_memory():
        for use in (lambda: chats(record, tokenizer(source), "all"), lambda: opened(record, tokenizer(source))):
            with pytest.raises(FormatError, match=message) as caught:
                use()
            assert str(caught.value).startswith("/d.jsonl:7: the chat template ")
            assert len(str(caught.value).splitlines()) == 1
            assert len(str(caught.value)) < 500
    assert chat_template_utils._compile_jinja_template.__name__ == "_compile_jinja_template"


PIECES = ["messages", "m", "'a'", "x", "9", "10 ** 9", "[x, x]", "{'k': x}", "x * 9", "x ~ x", "x + x", "x.join(x)", "''",
          "x|string", "x|list", "x|tojson(indent=99)", "x[::-1]", "x.format(x)", "x % x", "x.replace('', x)", "x|center(999)",
          "range(9999)", "loop.length", "f(x)", "x.items()", "x|map('string')|join", "x.__class__", "x is in x"]  # fmt: skip
STATEMENTS = ["{{ E }}", "{% set x = E %}", "{% set ns.x = E %}", "{% for m in E %}", "{% endfor %}", "{% if E %}",
              "{% endif %}", "{% macro f(x) %}", "{% endmacro %}", "{% for x in E recursive %}", "{{ loop(E) }}"]  # fmt: skip


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(STATEMENTS), st.sampled_from(PIECES)), max_size=7), TREES)
def test_any_template_ends(parts: list[tuple[str, str]], content: Any) -> None:
    source = "{% set ns = namespace(x=9) %}" + "".join(statement.replace("E", piece) for statement, piece in parts)
    # What was opened is closed, so that more than a few are templates.
    opened_blocks: list[str] = []
    for statement, _ in parts:
        word = statement[3:].split()[0]
        if word in ("for", "if", "macro"):
            opened_blocks.append(word)
        elif word.startswith("end") and opened_blocks:
            opened_blocks.pop()
    source += "".join(f"{{% end{word} %}}" for word in reversed(opened_blocks))
    record = Record({"messages": [{"role": "user", "content": "a", "x": content}]}, "d:1", "d:1")
    with little_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            chats(record, tokenizer(source), "all")
        except FormatError as error:
            str(error).encode()
            assert len(str(error).splitlines()) == 1  # noqa: PT017


TAKEN = ["chat_template", "tokenize", "messages", "conversation", "add_generation_prompt", "return_dict", "tools", "bos_token",
         "continue_final_message", "return_tensors", "tokenizer_kwargs", "return_assistant_tokens_mask", "padding"]  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("value", ["X", True, []])
def test_a_record_sets_nothing_that_is_not_its(name: str, value: Any) -> None:
    record = Record({"messages": TURNS[1:3], "chat_template_kwargs": {name: value}}, "d.jsonl:7", "/d.jsonl:7")
    message = f"^/d.jsonl:7: chat_template_kwargs: '{name}' is not for a record to set"
    for use in (lambda: chats(record, tokenizer(PLAIN)), lambda: opened(record, tokenizer(PLAIN))):
        with pytest.raises(FormatError, match=message):
            use()


def test_what_a_template_asks_for_is_given() -> None:
    source = "{{ mood }}{{ documents|length }}{{ messages[0].content }}"
    options = {"mood": "!", "documents": [{"title": "a", "text": "b"}]}
    record = Record({"messages": TURNS[1:2], "chat_template_kwargs": options}, "d:1", "d:1")
    tokens = tokenizer(source)
    assert tokens.decode(opened(record, tokens)) == "!12 + 3?"


def test_threads_have_budgets_of_their_own() -> None:
    texts: list[Any] = []

    def render() -> None:
        texts.append(rendered(SOURCES["loops"], TURNS, ours=True))

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [rendered(SOURCES["loops"], TURNS, ours=False)] * 4
    assert chat_template_utils._compile_jinja_template.__name__ == "_compile_jinja_template"


@pytest.mark.parametrize("value", [{"a": "x"}, [1], 5])
def test_a_template_that_is_no_text(value: Any) -> None:
    tokens = tokenizer(PLAIN)
    tokens.chat_template = value
    record = Record({"messages": TURNS[1:3]}, "d:1", "d:1")
    for train_on in ("completions", "all"):
        with pytest.raises(FormatError, match=r"^d:1: .*template"):
            chats(record, tokens, train_on)


def test_tools_as_text_are_read_strictly() -> None:
    record = Record({"messages": TURNS[1:3], "tools": "[" * 10_000}, "d:1", "d:1")
    with pytest.raises(FormatError, match=r"^d:1: tools: expected JSON in this text"):
        chats(record, tokenizer(PLAIN))
    again = Record({"messages": TURNS[1:3], "tools": json.dumps(TOOLS)}, "d:1", "d:1")
    source = "{{ tools|tojson }}"
    tokens = tokenizer(source)
    assert json.loads(tokens.decode(opened(again, tokens))) == TOOLS

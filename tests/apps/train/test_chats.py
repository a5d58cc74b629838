"""Chats in the templates that models come with: what is learned is what the model sees when it answers."""

# ruff: noqa: E501 -- a case stands in a line

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trl
from text_models import FORGETS, MARKED, PLAIN, tokenizer
from trl.chat_template_utils import get_training_chat_template

from funclora._apps.train.chat import Chat, Chats, chats, opened
from funclora._apps.train.records import Record
from funclora.errors import FormatError, FuncloraError, UnsupportedError

FOLDER = Path(trl.__file__).parent / "chat_templates"
STOCK = {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.jinja"))}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a place.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "description": "its name"}}, "required": ["city"]}}}
]  # fmt: skip


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL: dict[str, Any] = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "weather", "arguments": {"city": "Paris"}},
}
ONE = [user("Name a fruit."), assistant("A pear.")]
CASES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": ONE},
    "two turns": {"messages": [*ONE, user("And another?"), assistant("A quince.")]},
    "tools": {
        "tools": TOOLS,
        "messages": [
            user("Is it raining in Paris?"), assistant("", tool_calls=[CALL]),
            {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "cloudy"},
            assistant("No, only clouds."),
        ],
    },
    "thinking": {
        "messages": [
            user("2 + 3?"), assistant("It is 5.", reasoning_content="Two and three."),
            user("Plus 1?"), assistant("So 6.", reasoning_content="Five and one."),
        ]
    },
}  # fmt: skip

ALTERNATE = "refuses these messages: Conversation roles must alternate"
NO_CALLS = "leaves out its tool_calls"
NO_TOOLS = "does not show the tools"
NO_REASONING = "leaves out its reasoning_content"
NO_PROMPT = r"asks the model to answer after '.*<think>\\n', but shows this answer as"
# What is not right is refused, for this reason.
REFUSED = {
    **{(name, "tools"): ALTERNATE for name in ("cohere", "cohere2", "gemma", "gemma3")},
    **{(name, "tools"): NO_TOOLS for name in ("deepseek_r1_distill", "deepseekv3", "llama3", "phi3", "phi3_5",
                                              "qwen2_5_vl", "idefics3", "smolvlm")},
    ("llava_next", "tools"): "refuses these messages: str object has no element 0",
    ("lfm2", "tools"): NO_CALLS,
    **{(name, "thinking"): NO_REASONING for name in (
        "cohere", "cohere2", "gemma", "gemma3", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "idefics3", "lfm2",
        "lfm2_v2", "llama3", "llama3_1", "llama3_2", "llava_next", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl",
        "qwen3_instruct_2507", "qwen3_vl", "smolvlm")},
    **{(name, case): NO_PROMPT for name in ("deepseek_r1_distill", "deepseekv3")
       for case in ("one turn", "two turns", "thinking")},
}  # fmt: skip
# Those for images want the content in parts; the others take a text.
PARTS = {"idefics3", "llava_next", "smolvlm"}
# Their answers begin as the generation prompt does only with this option.
THINKING = {
    **{
        (name, case): False
        for name in STOCK
        if name.startswith("nemotron")
        for case in ("one turn", "two turns", "tools")
    },
    ("qwen3_5_nothink", "thinking"): True,
}
# Their earlier turns are rewritten, so that each has an example of its own.
SPLIT = {
    *((name, "two turns") for name in ("gptoss", "phi3", "phi3_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6")),
    ("qwen3", "tools"),
    *((name, "thinking") for name in (
        "diffusion_gemma", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl",
        "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3", "qwen3_5_nothink",
        "qwen3_5_think", "qwen3_6")),
}  # fmt: skip


def made(template: str, *args: Any, **fields: Any) -> Chats:
    return chats(Record(fields, "d.jsonl:7", "/d.jsonl:7"), tokenizer(template), *args)


def stretches(chat: Chat) -> Iterator[tuple[str, str]]:
    """What has loss, and all that comes before it."""
    tokens = tokenizer()
    bits = [*chat.said, False]
    starts = [i for i in range(len(chat.ids)) if bits[i] and (i == 0 or not bits[i - 1])]
    for start in starts:
        end = bits.index(False, start)
        yield tokens.decode(chat.ids[:start]), tokens.decode(chat.ids[start:end])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [name for name in STOCK if not name.endswith("_training")])
def test_the_table_of_stock_templates(name: str, case: str) -> None:
    """Every answer comes after what `apply_chat_template` gives at inference, and is what it adds; or it is refused."""
    record = CASES[case]
    if reason := REFUSED.get((name, case)):
        with pytest.raises(FuncloraError, match=rf"^/d.jsonl:7: .*{reason}"):
            made(STOCK[name], **record)
        return
    tokens = tokenizer(STOCK[name])
    messages = record["messages"]
    if name in PARTS:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    options: dict[str, Any] = {"tokenize": False, "tools": record.get("tools")}
    if (name, case) in THINKING:
        options["enable_thinking"] = THINKING[name, case]
    want = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokens.apply_chat_template(messages[:i], add_generation_prompt=True, **options)
            whole = tokens.apply_chat_template(messages[: i + 1], **options)
            want.append((prompt, whole.removeprefix(prompt)))
    chats = made(STOCK[name], **record)
    got = [stretch for chat in chats.found for stretch in stretches(chat)]
    assert got == want
    assert len(chats.found) == (len(want) if (name, case) in SPLIT else 1)
    assert any(remark.startswith("split") for remark in chats.remarks) == ((name, case) in SPLIT)
    assert any("enable_thinking" in remark for remark in chats.remarks) == ((name, case) in THINKING)
    *_, last = chats.found
    assert tokenizer().decode(last.ids) == tokens.apply_chat_template(messages, **options)


MARKED_STOCK = [name for name in STOCK if name.endswith("_training") or "generation %}" in STOCK[name]]


@pytest.mark.parametrize("name", MARKED_STOCK)
@pytest.mark.parametrize("case", CASES)
def test_marked_templates_have_the_mask_of_transformers(name: str, case: str) -> None:
    """The last turn of the last example is what transformers marks; so is every turn, if there is one example."""
    record = CASES[case]
    tokens = tokenizer(STOCK[name])
    try:
        found = made(STOCK[name], **record).found
    except FormatError as error:
        assert "leaves out its" in str(error) or "refuses" in str(error) or "show the tools" in str(error)  # noqa: PT017
        return
    messages = record["messages"]
    if "idefics3" in name or "llava_next" in name or "smolvlm" in name:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    want = tokens.apply_chat_template(
        messages, tools=record.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    marked = Chat(want["input_ids"], [bool(bit) for bit in want["assistant_masks"]])
    assert found[-1].ids == marked.ids
    every, theirs = [turn for chat in found for turn in stretches(chat)], [*stretches(marked)]
    assert every[-1] == theirs[-1]
    assert len(every) == len(theirs)
    if len(found) == 1:
        assert every == theirs


@pytest.mark.parametrize("case", ["one turn", "two turns", "thinking", "tools"])
def test_every_turn_of_qwen3_is_that_of_trls_training_template(case: str) -> None:
    """TRL's template keeps the earlier turns as they were, in one text; here they are in examples of their own."""
    theirs = get_training_chat_template(tokenizer(STOCK["qwen3"]))
    assert theirs == STOCK["qwen3_training"]
    ours, marked = (
        [answer for chat in made(source, **CASES[case]).found for _, answer in stretches(chat)]
        for source in (STOCK["qwen3"], theirs)
    )
    ends = ["<|im_end|>" if answer.endswith("<|im_end|>") else "<|im_end|>\n" for answer in marked]
    assert [answer.removesuffix("<|im_end|>\n") for answer in ours] == [
        answer.removesuffix(end) for answer, end in zip(marked, ends, strict=True)
    ]
    assert all(answer.endswith("<|im_end|>\n") for answer in ours)


def answers(template: str, *args: Any, **fields: Any) -> list[str]:
    return [answer for chat in made(template, *args, **fields).found for _, answer in stretches(chat)]


TWO = CASES["two turns"]["messages"]


def test_a_turn_that_is_rewritten_later_has_an_example_of_its_own() -> None:
    chats = made(FORGETS, messages=TWO)
    first, second = chats.found
    start = "<|im_start|>"
    assert tokenizer().decode(first.ids) == (
        f"{start}user\nName a fruit.<|im_end|>\n{start}assistant\n<think>A pear.<|im_end|>\n"
    )
    assert next(stretches(first))[1] == "<think>A pear.<|im_end|>\n"
    assert f"{start}assistant\nA pear.<|im_end|>" in tokenizer().decode(second.ids)
    assert [answer for _, answer in stretches(second)] == ["<think>A quince.<|im_end|>\n"]
    assert chats.remarks == [
        "split, since the chat template rewrites earlier turns: each answer is learned as the model sees it when it answers"
    ]


@pytest.mark.parametrize("template", [PLAIN, MARKED, FORGETS])
def test_which_turns_have_loss(template: str) -> None:
    end = "<|im_end|>" if template == MARKED else "<|im_end|>\n"
    mark = "<think>" if template == FORGETS else ""
    first, second = f"{mark}A pear.{end}", f"{mark}A quince.{end}"
    assert answers(template, messages=TWO) == [first, second]
    assert answers(template, "completions", "last", messages=TWO) == [second]
    for own in ({"train": False}, {"weight": 0}, {"weight": 0.0}):
        assert answers(template, messages=[TWO[0], {**TWO[1], **own}, *TWO[2:]]) == [second]
        assert answers(template, messages=[*TWO[:3], {**TWO[3], **own}]) == [first]
    assert answers(template, messages=[{**TWO[0], "train": False}, {**TWO[1], "weight": 1}, *TWO[2:]]) == [
        first,
        second,
    ]
    assert answers(template, messages=[{**TWO[0], "weight": None}, {**TWO[1], "train": None}, *TWO[2:]]) == [
        first,
        second,
    ]


def test_a_greeting_has_no_loss_as_nothing_asks_for_it() -> None:
    messages = [assistant("Hello!"), *ONE]
    chats = made(PLAIN, messages=messages)
    assert [answer for chat in chats.found for _, answer in stretches(chat)] == ["A pear.<|im_end|>\n"]
    assert "<|im_start|>assistant\nHello!" in tokenizer().decode(chats.found[0].ids)
    assert chats.remarks == ["whose greeting has no loss: the chat template cannot ask for it"]
    assert answers(MARKED, messages=messages) == ["Hello!<|im_end|>", "A pear.<|im_end|>"]  # as TRL has it


def test_contents_in_parts_and_calls_as_json_texts() -> None:
    parts = [user([{"type": "text", "text": "Name a "}, {"type": "text", "text": "fruit."}]), ONE[1]]
    for template in (PLAIN, MARKED, STOCK["qwen3"]):
        assert made(template, messages=parts) == made(template, messages=ONE)
    assert tokenizer().decode(opened(Record({"messages": parts[:1]}, "d", "d"), tokenizer(PLAIN))) == (
        "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n"
    )
    tools = CASES["tools"]
    call = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
    messages = [tools["messages"][0], assistant(None, tool_calls=[call]), *tools["messages"][2:]]
    for name in ("qwen2_5", "llama3_1", "qwen3_5_think"):
        assert answers(STOCK[name], tools=TOOLS, messages=messages) == answers(STOCK[name], **tools)


DROPS = PLAIN.replace("m['content'] + ", "('' if m.role == 'assistant' else m['content']) + ")
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "an answer that is left out": (DROPS, {"messages": ONE}, r"messages\[1\]: the chat template leaves out its content"),
    "a short one": (DROPS, {"messages": [ONE[0], assistant("m")]}, r"messages\[1\]: the chat template leaves out its content"),
    "a part of one": (
        PLAIN.replace("m['content'] + ", "m['content'][:3] + "), {"messages": ONE}, r"messages\[1\]: .* leaves out its content, or a part of it"),
    "a marked one": (MARKED.replace("m['content'] + '<|im_end|>' }}{%- end", "'<|im_end|>' }}{%- end"), {"messages": ONE},
                     "leaves out its content"),
    "reasoning": (PLAIN, {"messages": [ONE[0], assistant("a", reasoning_content="b")]}, "leaves out its reasoning_content"),
    "reasoning by another name": (PLAIN, {"messages": [ONE[0], assistant("a", reasoning="b")]}, "leaves out its reasoning,"),
    "reasoning in the text": (
        PLAIN.replace("m['content'] + ", "m['content'].split('</think>')[-1] + "),
        {"messages": [ONE[0], assistant("<think>b</think>a")]}, "leaves out its content, or a part"),
    "calls": (PLAIN, {"messages": [ONE[0], assistant("a", tool_calls=[CALL])]}, "leaves out its tool_calls"),
    "tools": (PLAIN, {"messages": ONE, "tools": TOOLS}, "the chat template does not show the tools"),
    "nothing said": (PLAIN, {"messages": [ONE[0], assistant(" ")]}, r'messages\[1\]: the assistant says nothing, .* "train": false'),
    "roles": (PLAIN, {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
              "none is of the role 'assistant', and 'human', 'gpt' are not roles .* --roles human=user,gpt=assistant"),
    "an image": (PLAIN, {"messages": [user([{"type": "image"}]), ONE[1]]}, r"messages\[0\]: content: expected parts"),
    "a weight between": (PLAIN, {"messages": [ONE[0], {**ONE[1], "weight": 0.5}]}, "weight: expected 0 or 1, got 0.5"),
    "a weight as a text": (PLAIN, {"messages": [ONE[0], {**ONE[1], "train": "no"}]}, "train: expected false or true, got 'no'"),
    "a taught question": (PLAIN, {"messages": [{**ONE[0], "weight": 1}, ONE[1]]}, r"messages\[0\]: weight: only messages of the a"),
    "train and weight": (PLAIN, {"messages": [ONE[0], {**ONE[1], "train": True, "weight": 0}]}, "contradict each other"),
    "calls that are none": (PLAIN, {"messages": [ONE[0], assistant("a", tool_calls="b")]}, "tool_calls: expected a list"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_could_not_be_learned_is_refused(what: str) -> None:
    template, fields, message = WRONG[what]
    with pytest.raises(FormatError, match=f"^/d.jsonl:7: .*{message}") as caught:
        made(template, **fields)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_not_learned_may_be_left_out() -> None:
    messages = [ONE[0], assistant("", tool_calls=[CALL], train=False), *TWO[2:]]
    assert answers(PLAIN, messages=messages) == ["A quince.<|im_end|>\n"]
    assert made(PLAIN, messages=messages).remarks == ["in which the chat template leaves out or changes some messages"]


def test_no_turn_is_chosen_where_all_have_loss() -> None:
    with pytest.raises(FormatError, match="train or weight has no effect with train_on all"):
        made(PLAIN, "all", messages=[ONE[0], {**ONE[1], "train": True}])
    (chat,) = made(FORGETS, "all", messages=TWO).found
    assert all(chat.said)


def test_a_prompt_that_no_answer_follows_names_both() -> None:
    with pytest.raises(
        UnsupportedError, match=r"after '.*<think>\\n', but shows this answer as '.*A pear\..*never see"
    ):
        made(STOCK["deepseek_r1_distill"], messages=ONE)
    assert "A pear." in answers(STOCK["deepseek_r1_distill_training"], messages=ONE)[0]

"""The messages of a record: checked, with what is taught in them, and in the forms that chat templates expect."""

from __future__ import annotations

import inspect
import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from funclora._apps.train.records import Record
from funclora._apps.train.strict_json import parse
from funclora.errors import FormatError

Message = dict[str, Any]

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function", "ipython")
REASONING = ("reasoning_content", "reasoning", "thinking")  # transformers takes one for another
_TAUGHT = ("train", "weight")  # axolotl's and OpenAI's names


@dataclass(frozen=True)
class Conversation:
    """The messages of a record.

    Attributes:
        messages: as the record has them, without `train` and `weight`.
        taught: the numbers of the assistant's messages, except those that the record takes out.
        last: the number of the assistant's last message; -1 without.
        chosen: whether the record itself says what is taught.
    """

    messages: list[Message]
    taught: tuple[int, ...]
    last: int
    chosen: bool


def conversation(record: Record) -> Conversation:
    """The messages of a record, checked.

    Raises:
        FormatError: they are no list of messages, or contradict themselves.
    """
    messages = record.fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise FormatError(f"{record.where}: messages: expected a list of objects, got {reprlib.repr(messages)}.")
    taught = [_check(message, f"{record.where}: messages[{i}]") for i, message in enumerate(messages)]
    roles = [message["role"] for message in messages]
    if ASSISTANT not in roles and (odd := [role for role in dict.fromkeys(roles) if role not in ROLES]):
        raise FormatError(
            f"{record.where}: messages: none is of the role {ASSISTANT!r}, and {', '.join(map(reprlib.repr, odd))} "
            f"{'are not roles' if len(odd) > 1 else 'is no role'} that chat templates know. Say what they mean, such "
            "as --roles human=user,gpt=assistant."
        )
    own = [i for i, role in enumerate(roles) if role == ASSISTANT]
    return Conversation(
        [{name: value for name, value in message.items() if name not in _TAUGHT} for message in messages],
        tuple(i for i in own if taught[i] is not False),
        own[-1] if own else -1,
        any(choice is not None for choice in taught),
    )


def _check(message: Any, at: str) -> bool | None:
    """Whether a message is taught; None if it does not say so."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise FormatError(
            f'{at}: expected {{"role": "user", "content": "..."}} or the like, got {reprlib.repr(message)}.'
        )
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise FormatError(
                    f'{at}: content: expected parts such as {{"type": "text", "text": "..."}}, got '
                    f"{reprlib.repr(part)}. Only texts are supported."
                )
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise FormatError(f"{at}: content: expected a text, got {reprlib.repr(content)}.")
    if not isinstance(message.get("tool_calls") or [], list):
        raise FormatError(f"{at}: tool_calls: expected a list, got {reprlib.repr(message['tool_calls'])}.")
    said = {name: message[name] for name in _TAUGHT if message.get(name) is not None}
    for name, value in said.items():
        if value not in (0, 1):  # and so False and True
            raise FormatError(
                f"{at}: {name}: expected {'false or true' if name == 'train' else '0 or 1'}, got "
                f"{reprlib.repr(value)}. A message has loss, or it has none."
            )
        if value and message["role"] != ASSISTANT:
            raise FormatError(f"{at}: {name}: only messages of the assistant can have loss. Leave it out.")
    if len({bool(value) for value in said.values()}) > 1:
        raise FormatError(f"{at}: train and weight contradict each other. Leave one out.")
    return bool(next(iter(said.values()))) if said else None


def forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages as they are, and in the other forms that templates expect.

    Templates for images and texts want a list of parts, others a text; some want the arguments of a tool's call as an
    object, as transformers documents, others as a JSON text, as OpenAI writes them.
    """
    found: list[list[Message]] = []
    for content in (lambda own: own, as_text, _as_parts):
        for arguments in (_as_object, _as_json):
            form = [_formed(message, content, arguments) for message in messages]
            if form not in found:
                found.append(form)
                yield form


def _formed(message: Message, content: Any, arguments: Any) -> Message:
    formed = dict(message)
    if formed.get("content") is not None:
        formed["content"] = content(formed["content"])
    if formed.get("tool_calls"):
        formed["tool_calls"] = [_call(call, arguments) for call in formed["tool_calls"]]
    return formed


def _call(call: Any, arguments: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], arguments)}
    return {**call, "arguments": arguments(call["arguments"])} if "arguments" in call else call


def as_text(content: Any) -> str:
    """A message's content as one text."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content or [])


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_object(arguments: Any) -> Any:
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return read if isinstance(read, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def said(message: Message) -> dict[str, list[str]]:
    """What a message says: the texts of its content, its reasoning and its calls, by the field's name.

    Examples:
        >>> said({"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": "1"}}]})
        {'tool_calls': ['add', '1']}
    """
    found = {"content": [as_text(message.get("content"))]}
    for name in REASONING:
        if isinstance(message.get(name), str):
            found[name] = [message[name]]
    found["tool_calls"] = [*_leaves([_call(call, _as_object) for call in message.get("tool_calls") or []])]
    return {name: texts for name, texts in found.items() if any(text.strip() for text in texts)}


def _leaves(value: Any) -> Iterator[str]:
    """The names and arguments of calls."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in ("type", "id", "index"):
                yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def has(text: str, part: str) -> bool:
    r"""Whether a part is in a text, white space aside, or as JSON writes it.

    Examples:
        >>> has("<think>\nb\n</think>\n\na", "<think>b</think> a"), has('{"a": "1\\n"}', "1\n"), has("b", "a")
        (True, True, False)
    """
    whole = squeezed(text)
    in_json = (json.dumps(part, ensure_ascii=escaped)[1:-1] for escaped in (True, False))
    return any(squeezed(form) in whole for form in (part, *in_json))


def squeezed(text: str) -> str:
    """A text without white space."""
    return "".join(text.split())


def options_of(record: Record, tokenizer: Any) -> dict[str, Any]:
    """Further arguments of the template, as in TRL: `tools`, and what `chat_template_kwargs` has.

    Raises:
        FormatError: they are of another form, or not for a record to set.
    """
    tools = record.fields.get("tools")
    options = record.fields.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        tools = parse(tools, f"{record.where}: tools", "JSON in this text")
    if tools is not None and not isinstance(tools, list):
        raise FormatError(f"{record.where}: tools: expected a list, got {reprlib.repr(tools)}.")
    if not isinstance(options, dict):
        raise FormatError(f"{record.where}: chat_template_kwargs: expected an object, got {reprlib.repr(options)}.")
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map, "messages"}
    for name in options:
        if name in taken - {"documents", "kwargs"}:
            raise FormatError(
                f"{record.where}: chat_template_kwargs: {name!r} is not for a record to set. It may hold what the "
                "template itself asks for, such as enable_thinking."
            )
    return {"tools": tools or None, **options}

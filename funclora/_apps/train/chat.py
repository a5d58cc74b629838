"""Chats as token ids: the tokenizer's chat template, and which tokens of its text are the assistant's."""

from __future__ import annotations

import inspect
import re
import reprlib
from dataclasses import dataclass
from typing import Any

from funclora._apps.train import templates
from funclora._apps.train.records import Record
from funclora._apps.train.strict_json import parse
from funclora.errors import ConfigError, FormatError, FuncloraError, UnsupportedError
from funclora.io.hf.library import first_line

MARKER = re.compile(r"\{%[-+]?\s*generation\b")
NO_TEMPLATE = (
    "data: has chats (messages), but the tokenizer has no chat template. Put one into the model's folder as "
    "chat_template.jinja, such as that of the model's instruct version, or give the data as prompt and completion."
)


@dataclass(frozen=True)
class Chat:
    """A chat as the model reads it.

    Attributes:
        ids: of the whole chat.
        said: which of them belong to the assistant.
        whole: whether the text of every message is in it.
    """

    ids: list[int]
    said: list[bool]
    whole: bool


def chat(record: Record, tokenizer: Any, mask: bool) -> Chat:
    """A record's messages in the chat template, and which tokens belong to the assistant.

    With `{% generation %}` markers in the template, these are the tokens between the markers. Without markers, they are
    the tokens that a turn of the assistant adds to the text: everything after the generation prompt, including the end
    of the turn.

    Args:
        record: with `messages`, and optionally `tools` and `chat_template_kwargs` for the template.
        tokenizer: transformers'.
        mask: find the assistant's tokens; otherwise all tokens count.

    Raises:
        ConfigError: the tokenizer has no chat template.
        FormatError: the messages are invalid, or the template refuses them.
        UnsupportedError: the template changes earlier text when a turn is added, or the tokenizer does not report the
            positions of its tokens.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(NO_TEMPLATE)
    if mask and not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            "data: this tokenizer does not tell where its tokens are from (it is no fast one), so the assistant's "
            "are unknown. train_on all has the loss on whole chats."
        )
    messages, more = _messages(record), _more(record, tokenizer)
    text: str = _apply(record, tokenizer, messages, tokenize=False, **more)
    # Templates for images and texts leave out a text that is not in a list; others leave out the reasoning.
    whole = all((message.get("content") or "").strip() in text for message in messages)
    if not mask:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return Chat(ids, [True] * len(ids), whole)
    if MARKER.search(_template(record, tokenizer, more["tools"])):
        options = {"return_dict": True, "return_assistant_tokens_mask": True, **more}
        out = _apply(record, tokenizer, messages, tokenizer_kwargs={"return_offsets_mapping": True}, **options)
        said = [bool(bit) for bit in out["assistant_masks"]]
        offsets = out["offset_mapping"]
        for i in range(1, len(said)):
            # If the last character consists of several tokens, transformers marks only the first.
            said[i] |= said[i - 1] and offsets[i] == offsets[i - 1] and offsets[i][0] < offsets[i][1]
        return Chat(out["input_ids"], said, whole)
    spans = _spans(record, tokenizer, messages, text, more)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [any(a < end and b > start for start, end in spans) for a, b in out["offset_mapping"]]
    return Chat(out["input_ids"], inside, whole)


def opened(record: Record, tokenizer: Any, *, go_on: bool = False) -> list[int]:
    """The ids of a chat up to the beginning of the assistant's answer.

    Args:
        record: as for `chat`.
        tokenizer: transformers', with a chat template.
        go_on: up to the end of what the assistant says in the last message, so that this is continued.

    Raises:
        FormatError: the messages are invalid, or the template refuses them.
    """
    messages, more = _messages(record), _more(record, tokenizer)
    end = {"continue_final_message": True} if go_on else {"add_generation_prompt": True}
    text = _apply(record, tokenizer, messages, tokenize=False, **end, **more)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has added them
    return ids


def _spans(
    record: Record, tokenizer: Any, messages: list[dict[str, Any]], text: str, more: dict[str, Any]
) -> list[tuple[int, int]]:
    """The positions of the assistant's turns in the text."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise FormatError(f"{record.where}: messages[0] belongs to the assistant; expected a prompt before it.")
        options = {"tokenize": False, **more}
        before = _apply(record, tokenizer, messages[:i], add_generation_prompt=True, **options)
        after = _apply(record, tokenizer, messages[: i + 1], **options)
        if not (after.startswith(before) and text.startswith(after)):
            raise UnsupportedError(
                f"{record.where}: with messages[{i}] the chat template also changes the text before or after it, so "
                "which tokens are the assistant's cannot be told. Put {% generation %} and {% endgeneration %} around "
                "its text in the template, or set train_on to all."
            )
        spans.append((len(before), len(after)))
    return spans


def _apply(record: Record, tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ConfigError("chat templates need jinja2. Type: pip install 'funclora[train]'") from error
    try:
        with templates.bounded():
            return tokenizer.apply_chat_template(messages, **options)
    except FuncloraError:
        raise
    except templates.TooMuchError as error:
        raise FormatError(f"{record.where}: the chat template was stopped: {error}.") from error
    except jinja2.TemplateError as error:
        raise FormatError(f"{record.where}: the chat template refuses these messages: {first_line(error)}") from error
    except Exception as error:  # a template is a program
        raise FormatError(f"{record.where}: the chat template fails on these messages: {first_line(error)}") from error


def _template(record: Record, tokenizer: Any, tools: Any) -> str:
    """The source of the template that is taken."""
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except Exception as error:
        raise FormatError(f"{record.where}: there is no chat template to take: {first_line(error)}") from error
    if not isinstance(template, str):
        raise FormatError(f"{record.where}: the chat template is no text, but {reprlib.repr(template)}.")
    return template


def _messages(record: Record) -> list[dict[str, Any]]:
    messages = record.fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise FormatError(f"{record.where}: messages: expected a list of objects, got {reprlib.repr(messages)}.")
    for i, message in enumerate(messages):
        at = f"{record.where}: messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise FormatError(
                f'{at}: expected {{"role": "user", "content": "..."}} or the like, got {reprlib.repr(message)}.'
            )
        if not isinstance(message.get("content"), str) and not (
            message.get("content") is None and message.get("tool_calls")
        ):
            raise FormatError(f"{at}: content: expected a text, got {reprlib.repr(message.get('content'))}.")
    return messages


def _more(record: Record, tokenizer: Any) -> dict[str, Any]:
    """Further arguments of the template, as in TRL."""
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

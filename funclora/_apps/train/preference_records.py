"""Records of preferences: two answers to a prompt of which one is better, or one answer with a verdict.

They become records of prompt and completion, or of messages, one for each answer.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from funclora._apps.train.records import Record
from funclora._apps.train.rows import common
from funclora.errors import FormatError

CHOSEN, REJECTED = PAIR = ("chosen", "rejected")


def answers(record: Record, label_field: str) -> list[tuple[Record, bool]]:
    """The answers of a record, each as a record of its own, and whether it is a good one.

    Args:
        record: in the standard form: `chosen` and `rejected`, texts or messages, after a `prompt` or `messages`, or
            each with the prompt that they have in common; or one answer, as for training on it, with a label.
        label_field: the name of the label.

    Raises:
        FormatError: an answer is missing or of another kind than its prompt, or the label is neither true nor false.

    Examples:
        >>> record = Record({"chosen": "1+1=2", "rejected": "1+1=3"}, "pairs.jsonl:1", "pairs.jsonl:1")
        >>> [(answer.fields, good) for answer, good in answers(record, "label")]
        [({'prompt': '1+1=', 'completion': '2'}, True), ({'prompt': '1+1=', 'completion': '3'}, False)]
    """
    fields = record.fields
    if not {*PAIR} <= fields.keys():
        rest = {name: value for name, value in fields.items() if name != label_field}
        if "messages" in rest:
            rest["messages"] = _taught(rest["messages"], len(rest["messages"]) - 1)
        return [(replace(record, fields=rest), _verdict(fields[label_field], record, label_field))]
    rest = {name: value for name, value in fields.items() if name not in (*PAIR, "prompt", "messages")}
    prompt, said = _split(record)
    found = []
    for name, answer in zip(PAIR, said, strict=True):
        if not answer:
            raise FormatError(f"{record.where}: {name}: the answer is empty. Give it, or leave the record out.")
        own: dict[str, Any] = {"prompt": prompt, "completion": answer}
        if isinstance(prompt, list):
            own = {"messages": _taught([*prompt, *answer], len(prompt))}
        found.append((replace(record, fields={**rest, **own}), name == CHOSEN))
    return found


def _split(record: Record) -> tuple[Any, tuple[Any, Any]]:
    """The prompt and the two answers after it: texts, or lists of messages."""
    fields = record.fields
    prompt = fields.get("prompt") if fields.get("prompt") is not None else fields.get("messages")
    pair = [_listed(fields[name]) for name in PAIR]
    for name, value in zip(("prompt", *PAIR), (prompt, *pair), strict=True):
        if not isinstance(value, (str, list)) and (value is not None or name != "prompt"):
            raise FormatError(
                f"{record.where}: {name}: expected a text or a list of messages, got {reprlib.repr(value)}."
            )
    chats = isinstance(prompt, list) or isinstance(pair[0], list) or isinstance(pair[1], list)
    if chats:
        pair = [[{"role": "assistant", "content": value}] if isinstance(value, str) else value for value in pair]
    shared = common(*pair)
    if prompt is None:
        if not chats and shared and pair[0][shared - 1 : shared] == " " and shared < min(map(len, pair)):
            shared -= 1  # a space belongs to the token after it
        return pair[0][:shared], (pair[0][shared:], pair[1][shared:])
    if chats and isinstance(prompt, str):
        asked = {"role": "user", "content": prompt}
        prompt = pair[0][:shared] if asked in pair[0][:shared] else [asked]
    if chats and all(answer[: len(prompt)] == prompt for answer in pair):
        pair = [answer[len(prompt) :] for answer in pair]
    return prompt, (pair[0], pair[1])


def _listed(value: Any) -> Any:
    """An answer; a single message as a list."""
    return [value] if isinstance(value, dict) else value


def _taught(messages: Any, first: int) -> Any:
    """Messages of which only those from one on have loss."""
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "train": False} if i < first and isinstance(message, dict) and _speaks(message) else message
        for i, message in enumerate(messages)
    ]


def _speaks(message: dict[str, Any]) -> bool:
    return message.get("role") == "assistant"


def _verdict(value: Any, record: Record, label_field: str) -> bool:
    if value in (0, 1) and isinstance(value, (bool, int)):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "0", "1"):  # of a CSV file
        return value.strip().lower() in ("true", "1")
    raise FormatError(
        f"{record.where}: {label_field}: expected true for a good answer or false for a bad one, got "
        f"{reprlib.repr(value)}."
    )


def one_kind(there: Sequence[str], record: Record, loss: str, label_field: str) -> tuple[str, ...]:
    """The fields that are read from a record of preferences, of which `there` have a value.

    Raises:
        FormatError: it has none of the forms, or one that the loss cannot take.
    """
    if {*PAIR} <= {*there}:
        return (*PAIR, "prompt", "messages", "tools", "chat_template_kwargs")
    answered = "messages" in there or {"prompt", "completion"} <= {*there}
    if answered and label_field in there:
        if loss != "kto":
            raise FormatError(
                f"{record.where}: has a single answer with a verdict, and {loss} compares two. Set loss to kto."
            )
        return (
            ("messages", "tools", "chat_template_kwargs", label_field)
            if "messages" in there
            else ("completion", "prompt", label_field)
        )
    names = ", ".join(map(reprlib.repr, sorted(there))) or "no fields"
    raise FormatError(
        f"{record.where}: expected prompt, chosen and rejected, or for kto an answer with {label_field!r}; it has "
        f"{names}. Give other names with --fields, such as chosen=good."
    )

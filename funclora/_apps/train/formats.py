"""Records as other trainers have them, as this command's own: ShareGPT's, Alpaca's, TRL's, and names by option."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from funclora._apps.train.records import Record
from funclora._apps.train.strict_json import parse
from funclora.errors import ConfigError, FormatError, near

# What has a name of its own in records.
NAMES = (
    "messages",
    "tools",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "anchor",
    "positive",
    "negative",
    "sentence1",
    "sentence2",
    "score",
    "tokens",
    "text",
    "text_pair",
    "label",
    "instruction",
    "input",
    "output",
    "system",
    "role",
    "content",
)
_IN_MESSAGES = ("role", "content")
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
CHAT_FORM = "instruction, input and output are read as a chat: the user's instruction with its input, and the answer"
TEXT_FORM = (
    "instruction, input and output are read as prompts in Alpaca's own words and completions, without a chat template"
)
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
_WITH_INPUT = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Format:
    """How the records of some data are read.

    Attributes:
        fields: name -> the field of the data that has it.
        roles: role of the data -> the role of chat templates.
        chats: whether instructions become chats, for which the tokenizer has a template.
    """

    fields: Mapping[str, str]
    roles: Mapping[str, str]
    chats: bool

    @classmethod
    def of(cls, fields: Sequence[str], roles: Sequence[str], tokenizer: Any) -> Format:
        """From the settings' `fields` and `roles`, pairs such as "prompt=question".

        Raises:
            ConfigError: they are no such pairs, or name what there is not.
        """
        given = _pairs("fields", fields, "prompt=question")
        for name in given:
            if name not in NAMES:
                raise ConfigError(
                    f"fields: expected one of {', '.join(NAMES)} before '=', got {name!r}.{near(name, NAMES, 1)}"
                )
        named = _pairs("roles", roles, "human=user")
        for role in named.values():
            if role not in ROLES:
                raise ConfigError(
                    f"roles: expected one of {', '.join(ROLES)} after '=', got {role!r}.{near(role, ROLES, 1)}"
                )
        return cls(given, named, bool(getattr(tokenizer, "chat_template", None)))

    def standard(self, record: Record) -> tuple[Record, str]:
        """A record with the names and structure of this command, and what is to be said of its form, if anything.

        Raises:
            FormatError: it has a form that is known, and contradicts it.
        """
        fields, said = self._renamed(record), ""
        if "conversations" in fields and "messages" not in fields:
            fields = _moved(fields, "conversations", "messages")
        if "instruction" in fields and not {"prompt", "messages"} & fields.keys():
            fields, said = self._instructed(record, fields)
        if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):
            fields = _joined(fields)
        for name in ("prompt", "chosen", "rejected"):
            if isinstance(fields.get(name), (list, dict)):
                value, at = fields[name], f"{record.where}: {name}"
                several = value if isinstance(value, list) else [value]
                fields = {**fields, name: [self._message(each, f"{at}[{i}]") for i, each in enumerate(several)]}
        if isinstance(fields.get("messages"), list):
            at = f"{record.where}: messages"
            messages = [self._message(each, f"{at}[{i}]") for i, each in enumerate(fields["messages"])]
            system = fields.get("system")
            if isinstance(system, str) and not (messages and _role(messages[0]) == "system"):
                fields = {name: value for name, value in fields.items() if name != "system"}
                messages = [*([{"role": "system", "content": system}] if system else []), *messages]
            fields = {**fields, "messages": messages}
        return replace(record, fields=fields), said

    def _renamed(self, record: Record) -> dict[str, Any]:
        fields = record.fields
        for name, own in self.fields.items():
            if name in _IN_MESSAGES or own not in fields:
                continue
            if name in fields and name not in self.fields.values():
                raise FormatError(
                    f"{record.where}: has {own!r}, which is read as {name!r}, and {name!r} too. Remove one of them."
                )
        new = {own: name for name, own in self.fields.items() if name not in _IN_MESSAGES}
        return {new.get(name, name): value for name, value in fields.items()}

    def _message(self, message: Any, at: str) -> Any:
        """A message with `role` and `content`, whatever the data calls them."""
        if not isinstance(message, dict):
            return message
        role, content = self.fields.get("role", "role"), self.fields.get("content", "content")
        sharegpt = {"from", "value"} <= message.keys() and not {"role", "content"} & message.keys()
        if sharegpt and not {"role", "content"} & self.fields.keys():
            role, content = "from", "value"
        message = _moved(_moved(message, role, "role"), content, "content")
        said = message.get("role")
        if not isinstance(said, str):
            return message
        known = {**(_SHAREGPT_ROLES if sharegpt else {}), **self.roles}
        if sharegpt and said == "function_call" and said not in self.roles:
            calls = parse(str(message.get("content")), f"{at}: value", "the JSON of a function's call")
            calls = calls if isinstance(calls, list) else [calls]
            return {
                **message, "role": "assistant", "content": "",
                "tool_calls": [{"type": "function", "function": call} for call in calls],
            }  # fmt: skip
        return {**message, "role": known.get(said, said)}

    def _instructed(self, record: Record, fields: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Alpaca's instructions: as chats, or in the words that Alpaca was trained with."""
        rest = {name: value for name, value in fields.items() if name not in ("instruction", "input", "output")}
        instruction, given, answer = fields["instruction"], fields.get("input") or "", fields.get("output")
        for name, value in (("instruction", instruction), ("input", given), ("output", answer or "")):
            if not isinstance(value, str):
                raise FormatError(f"{record.where}: {name}: expected a text, got {reprlib.repr(value)}.")
        if not self.chats:
            prompt = _ALPACA.format(_WITH_INPUT if given else "") + f"### Instruction:\n{instruction}\n\n"
            prompt += (f"### Input:\n{given}\n\n" if given else "") + "### Response:\n"
            return {**rest, "prompt": prompt} | ({} if answer is None else {"completion": answer}), TEXT_FORM
        turns: list[dict[str, Any]] = []
        history = rest.pop("history", None) or []
        if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
            raise FormatError(f"{record.where}: history: expected a list of pairs, got {reprlib.repr(history)}.")
        for pair in history:
            turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
        asked = f"{instruction}\n{given}" if instruction and given else instruction or given
        turns.append({"role": "user", "content": asked})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return {**rest, "messages": turns}, CHAT_FORM


def _joined(fields: dict[str, Any]) -> dict[str, Any]:
    """TRL's prompts and completions of messages, as a chat with loss on the completion."""
    rest = {name: value for name, value in fields.items() if name not in ("prompt", "completion")}
    prompt = [
        {**message, "train": False} if isinstance(message, dict) and message.get("role") == "assistant" else message
        for message in fields["prompt"]
    ]
    return {**rest, "messages": [*prompt, *fields["completion"]]}


def _moved(fields: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in fields.items()}


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _pairs(key: str, texts: Sequence[str], example: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not (name and sign and value):
            raise ConfigError(f"{key}: expected pairs such as {example}, got {text!r}.")
        if name in found:
            raise ConfigError(f"{key}: {name!r} is given twice. Give one value.")
        found[name] = value
    return found

"""The prompts of `funclora generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from funclora._apps.train.chat import opened
from funclora._apps.train.formats import Format
from funclora._apps.train.records import Record, read
from funclora._apps.train.tokenizer import begun
from funclora.errors import ConfigError, FormatError, near

RESULTS = ("tokens", "ended")  # what the result of a record has besides its adapter and completion


@dataclass(frozen=True)
class Prompt:
    """A row.

    Attributes:
        ids: its tokens; at least one.
        adapter: name of its adapter; None for the base model.
        fields: the fields of the record, for the result.
        where: for messages: "p.jsonl:3" or "--prompt".
    """

    ids: list[int]
    adapter: str | None
    fields: dict[str, Any]
    where: str


class Reader:
    """Makes prompts from texts and messages.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        vocabulary: number of rows of the model's embedding.
        limit: maximum context in tokens; None if there is no limit.
        decoder: whether the answer is in the same context.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, limit: int | None, decoder: bool) -> None:
        self.tokenizer, self._vocabulary, self._limit, self._decoder = tokenizer, vocabulary, limit, decoder

    def text(self, text: str, adapter: str | None, where: str, fields: dict[str, Any] | None = None) -> Prompt:
        """A prompt as it is, with the tokenizer's special tokens.

        Raises:
            ConfigError: it has no tokens, too many tokens, or tokens that the model does not have.
        """
        ids = begun(self.tokenizer, text) if self._decoder else self.tokenizer(text)["input_ids"]
        return self._checked(ids, adapter, fields or {"prompt": text}, where)

    def messages(self, record: Record, adapter: str | None, *, go_on: bool = False) -> Prompt:
        """A conversation in the tokenizer's chat template, up to the beginning of the assistant's answer.

        Args:
            record: has `messages`. If the last one is the assistant's, it is the reference, and not in the prompt.
            adapter: name of the adapter.
            go_on: continue the assistant's last message instead.

        Raises:
            ConfigError: as for `text`, or the tokenizer has no chat template.
            FormatError: the template refuses the conversation.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                f"{record.where}: the model's tokenizer has no chat template, which messages need. Give a prompt "
                "instead of messages, or the file of a template with --chat-template."
            )
        messages = record.fields["messages"]
        last = messages[-1] if isinstance(messages, list) and messages else None
        if not isinstance(last, dict) or last.get("role") != "assistant":
            return self._checked(opened(record, self.tokenizer), adapter, record.fields, record.where)
        if go_on:
            ids = opened(record, self.tokenizer, go_on=True)
            return self._checked(ids, adapter, record.fields, record.where)
        if len(messages) == 1:
            raise FormatError(
                f"{record.where}: messages: the assistant's turn is the only one, so there is no prompt before it. "
                "--continue-final-message continues it."
            )
        answer = last.get("content") if {*last} == {"role", "content"} else last
        asked = replace(record, fields=_with_reference(record, {"messages": messages[:-1]}, answer))
        return self._checked(opened(asked, self.tokenizer), adapter, asked.fields, record.where)

    def _checked(self, ids: list[int], adapter: str | None, fields: dict[str, Any], where: str) -> Prompt:
        if not ids:
            raise ConfigError(
                f"{where}: the prompt is empty, so there is no token to continue. Give at least one word."
            )
        if max(ids) >= self._vocabulary:
            raise ConfigError(
                f"{where}: this prompt contains token {max(ids)}, but the model's embedding has {self._vocabulary} "
                "rows. Does the tokenizer in --model belong to this model?"
            )
        if self._limit is not None and len(ids) > self._limit - self._decoder:
            raise ConfigError(
                f"{where}: the prompt has {len(ids)} tokens; the model's context has {self._limit}, including the "
                "answer. Shorten the prompt."
            )
        return Prompt(ids, adapter, fields, where)


def read_prompts(
    file: Path,
    reader: Reader,
    form: Format,
    names: Sequence[str],
    defaults: Sequence[str | None],
    *,
    go_on: bool = False,
) -> list[Prompt]:
    """The prompts of a file, as `records.read` reads it.

    Each record has a `prompt` or `messages`, and may name an `adapter`; null (in a CSV file, an empty text) is the base
    model. Its own answer, a `completion` or the assistant's last message, becomes its `reference`.

    Args:
        file: the file.
        reader: makes the prompts.
        form: how the records name their fields and roles.
        names: of the available adapters.
        defaults: the adapters of records without the field, each for a prompt of its own; None is the base model.
        go_on: continue an assistant's last message.

    Raises:
        FormatError: the file is broken, or a record has another form.
        ConfigError: a record names an unknown adapter, or its prompt does not fit the model.
    """
    prompts = []
    for raw in read(file, "prompt"):
        record, _ = form.standard(raw)
        fields, where = record.fields, record.where
        refuse_taken(record, RESULTS)
        if ("prompt" in fields) == ("messages" in fields):
            there = ", ".join(map(repr, fields)) or "no fields"
            raise FormatError(f'{where}: expected either "prompt" or "messages", got {there}.')
        if "messages" not in fields and not isinstance(fields["prompt"], str):
            raise FormatError(f"{where}: prompt: expected a text, got {fields['prompt']!r:.60}.")
        if "completion" in fields:
            fields = _with_reference(record, {}, fields["completion"])
        for name in dict.fromkeys(adapter_of(record, names, default) for default in defaults):
            if "messages" in fields:
                prompts.append(reader.messages(replace(record, fields=fields), name, go_on=go_on))
            else:
                prompts.append(reader.text(fields["prompt"], name, where, fields))
    return prompts


def adapter_of(record: Record, names: Sequence[str], default: str | None) -> str | None:
    """The adapter that a record names: null (in a CSV file, an empty text) is the base model.

    Raises:
        FormatError: it names something else.
        ConfigError: there is no such adapter.
    """
    named = record.fields.get("adapter", default)
    if not isinstance(named, str | None):
        raise FormatError(f"{record.where}: adapter: expected a name or null, got {named!r}.")
    return known(named or None, names, record.where)


def refuse_taken(record: Record, names: Sequence[str]) -> None:
    """Raise `FormatError` if a record has fields that its result has too."""
    if taken := [name for name in names if name in record.fields]:
        raise FormatError(
            f"{record.where}: has {', '.join(map(repr, taken))}, which would be written over. Rename or remove it."
        )


def _with_reference(record: Record, fields: dict[str, Any], reference: Any) -> dict[str, Any]:
    """The fields of a record, some with other values, and its own answer under another name than the model's."""
    if "reference" in record.fields:
        raise FormatError(
            f"{record.where}: has a reference, and an answer of its own that would be written under this name. Rename "
            "or remove one of them."
        )
    own = {name: value for name, value in record.fields.items() if name != "completion"}
    return {**own, **fields, "reference": reference}


def known(adapter: str | None, names: Sequence[str], where: str) -> str | None:
    """The name, if there is such an adapter.

    Raises:
        ConfigError: there is none.
    """
    if adapter is not None and adapter not in names:
        hint = (
            near(adapter, names)
            or " No adapters are given: name PEFT folders, or a folder of them, on the command line."
        )
        raise ConfigError(f"{where}: there is no adapter {adapter!r}.{hint}")
    return adapter

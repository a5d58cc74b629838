"""Chats as token ids: the tokenizer's chat template, and which tokens of its text are the assistant's."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from funclora._apps.train import templates
from funclora._apps.train.messages import (
    ASSISTANT,
    REASONING,
    Conversation,
    Message,
    conversation,
    forms,
    has,
    options_of,
    said,
    squeezed,
)
from funclora._apps.train.records import Record
from funclora._apps.train.rows import common
from funclora.errors import ConfigError, FormatError, FuncloraError, UnsupportedError
from funclora.io.hf.library import first_line

MARKER = re.compile(r"\{%[-+]?\s*generation\b")
NO_TEMPLATE = (
    "data: has chats (messages), but the tokenizer has no chat template. Give the file of one, such as that of the "
    "model's instruct version, with --chat-template, or give the data as prompt and completion."
)
THINKING = "enable_thinking"  # what the templates of models that think call it
SHORT = 40  # characters that a template may well have by chance
ALL, LAST = TURNS = ("all", "last")

Span = tuple[int, int]


@dataclass(frozen=True)
class Chat:
    """A chat as the model reads it, or the beginning of one.

    Attributes:
        ids: of its text.
        said: which of them have loss.
    """

    ids: list[int]
    said: list[bool]


@dataclass(frozen=True)
class Chats:
    """What a record gives to train on.

    Attributes:
        found: usually one; several if the template rewrites what was said before.
        remarks: what is to be known about it, each as a participle.
    """

    found: list[Chat]
    remarks: list[str]


def chats(record: Record, tokenizer: Any, train_on: str = "completions", turns: str = ALL) -> Chats:
    """A record's messages in the chat template, and which tokens have loss.

    With `{% generation %}` markers in the template, these are the tokens between the markers. Without markers, they are
    what a turn of the assistant adds to what the model sees when it answers: everything after the generation prompt,
    including the end of the turn. Where a template rewrites earlier turns, such as one that removes their reasoning,
    each turn is shown as it was when it was the last, in an example of its own; turns that are the beginning of
    another's text share its example.

    Args:
        record: with `messages`, and optionally `tools` and `chat_template_kwargs` for the template.
        tokenizer: transformers'.
        train_on: "completions", or "all" for loss on all tokens.
        turns: the assistant's turns with loss: "all" or "last".

    Raises:
        ConfigError: the tokenizer has no chat template.
        FormatError: the messages are invalid, the template refuses them, or it drops what should be learned.
        UnsupportedError: the generation prompt is not how the template begins the answer, or the tokenizer does not
            report the positions of its tokens.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(NO_TEMPLATE)
    if train_on != ALL and not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            "data: this tokenizer does not tell where its tokens are from (it is no fast one), so the assistant's "
            "are unknown. train_on all has the loss on whole chats."
        )
    script = _Script(record, tokenizer)
    talk = script.talk
    if train_on == ALL:
        if talk.chosen:
            raise FormatError(
                f"{record.where}: messages: train or weight has no effect with train_on all. Leave one of them out."
            )
        ids: list[int] = tokenizer(script.text(), add_special_tokens=False, verbose=False)["input_ids"]
        return Chats([Chat(ids, [True] * len(ids))], script.remarks)
    taught = talk.taught if turns == ALL else [i for i in talk.taught if i == talk.last]
    found = []
    for text, spans in script.turns(taught):
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        inside = [any(a < end and b > start for start, end in spans) for a, b in out["offset_mapping"]]
        found.append(Chat(out["input_ids"], inside))
    return Chats(found, script.remarks)


def opened(record: Record, tokenizer: Any, *, go_on: bool = False) -> list[int]:
    """The ids of a chat up to the beginning of the assistant's answer.

    Args:
        record: as for `chats`.
        tokenizer: transformers', with a chat template.
        go_on: up to the end of what the assistant says in the last message, so that this is continued.

    Raises:
        FormatError: the messages are invalid, or the template refuses them.
    """
    end: dict[str, Any] = {"continue_final_message": True} if go_on else {"add_generation_prompt": True}
    ids: list[int] = tokenizer(_Script(record, tokenizer).text(**end), add_special_tokens=False)["input_ids"]
    return ids


class _Script:
    """A record's chat in the template, in the form that the template shows most of."""

    def __init__(self, record: Record, tokenizer: Any) -> None:
        self.record, self.tokenizer = record, tokenizer
        self.options = options_of(record, tokenizer)
        self.talk: Conversation = conversation(record)
        self.remarks: list[str] = []
        source = self._source()
        self.markers = source if MARKER.search(source) else None
        self.messages = self._best_form()
        if self.options["tools"] and self._ignores_tools():
            raise FormatError(
                f"{record.where}: the chat template does not show the tools, so nothing about them can be learned. "
                "Give a template that does with --chat-template, or remove them."
            )

    def text(self, messages: Sequence[Message] | None = None, **options: Any) -> str:
        """The text of some messages; of all, if none are given."""
        given = self.messages if messages is None else [*messages]
        text: str = self._run(self.tokenizer.apply_chat_template, given, tokenize=False, **{**self.options, **options})
        return text

    def turns(self, taught: Sequence[int]) -> list[tuple[str, list[Span]]]:
        """Texts with the places of the assistant's turns, each as the model sees it when it answers."""
        turn = self._marked if self.markers else self._added
        shown = {i: found for i in taught if (found := turn(i)) is not None}
        parts: list[tuple[str, list[Span]]] = []
        left = [*shown]
        while left:
            text = shown[left[-1]][0]
            own = [i for i in left if text.startswith(shown[i][0])]
            parts.insert(0, (text, [span for i in own for span in shown[i][1]]))
            left = [i for i in left if i not in own]
        if len(parts) > 1:
            self.remarks.append(
                "split, since the chat template rewrites earlier turns: each answer is learned as the model sees it "
                "when it answers"
            )
        if not parts:
            return [(self.text(), [])]
        whole = self.text()
        if whole.startswith(parts[-1][0]):
            parts[-1] = (whole, parts[-1][1])
        return parts

    def _added(self, i: int) -> tuple[str, list[Span]] | None:
        """The text up to the end of a turn, and the place of the turn; None for a greeting that nothing asks for."""
        first = after = ""
        thinking = [{}] if THINKING in self.options else [{}, {THINKING: False}, {THINKING: True}]
        for options in thinking:
            try:
                before = self.text(self.messages[:i], add_generation_prompt=True, **options)
            except FormatError:
                if all(message["role"] in ("system", "developer", ASSISTANT) for message in self.messages[:i]):
                    self.remarks.append("whose greeting has no loss: the chat template cannot ask for it")
                    return None
                raise
            after = self.text(self.messages[: i + 1], **options)
            first = first or before
            if after.startswith(before):
                self._check_shown(i, after, after[len(before) :], options)
                if options:
                    value = str(options[THINKING]).lower()
                    self.remarks.append(
                        f"that need {THINKING}={value} for the template to begin these answers; set it in "
                        "chat_template_kwargs when the adapter is used"
                    )
                return after, [(len(before), len(after))]
        same = common(first, after)
        raise UnsupportedError(
            f"{self.record.where}: messages[{i}]: the chat template asks the model to answer after "
            f"{first[max(0, same - 24) :]!r}, but shows this answer as {after[max(0, same - 24) :][:60]!r}. The "
            "model would never see what it learned. Give reasoning_content, if the template wants it; or with "
            "--chat-template a template with {% generation %} around the answers, such as one of TRL's for training; "
            "or set train_on to all."
        )

    def _marked(self, i: int) -> tuple[str, list[Span]]:
        """The text up to the end of a turn, and the marked places of the turn."""
        text, spans = self._marks(self.messages[: i + 1])
        if any(message["role"] == ASSISTANT for message in self.messages[:i]):
            same = common(text, self.text(self.messages[:i]))
            spans = [span for span in spans if span[1] > same]
        self._check_shown(i, text, " ".join(text[start:end] for start, end in spans), {})
        return text, spans

    def _marks(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        [text], [spans] = self._run(
            render_jinja_template,
            [[*messages]],
            chat_template=self.markers,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.options},
        )
        return text, [(start, end) for start, end in spans]

    def _check_shown(self, i: int, text: str, shown: str, options: dict[str, Any]) -> None:
        """Raise `FormatError` unless everything that a message says is in its part of the text."""
        message = self.messages[i]
        parts = said(message)
        at = f"{self.record.where}: messages[{i}]"
        if not parts:
            raise FormatError(
                f"{at}: the assistant says nothing, so only the end of a turn could be learned. Remove this message, "
                'or give it "train": false.'
            )
        for name, own in parts.items():
            gone = not all(has(shown, part) for part in own if part.strip())
            if not gone and len(squeezed("".join(own))) <= SHORT:
                gone = self._without(i, name, options) == text
            if gone:
                raise FormatError(
                    f"{at}: the chat template leaves out its {name}, or a part of it, so that it cannot be learned. "
                    "Give a template that shows it with --chat-template, change the record, or give this message "
                    '"train": false.'
                )

    def _without(self, i: int, name: str, options: dict[str, Any]) -> str | None:
        """The text as it would be without a part of a message; None if the template refuses that."""
        names = REASONING if name in REASONING else (name,)
        message = {key: value for key, value in self.messages[i].items() if key not in names}
        if name == "content":
            message[name] = "" if isinstance(self.messages[i][name], str) else []
        try:
            if self.markers:
                return self._marks([*self.messages[:i], message])[0]
            return self.text([*self.messages[:i], message], **options)
        except FormatError:
            return None

    def _best_form(self) -> list[Message]:
        """The form of the messages of which the template shows most."""
        best: tuple[int, list[Message]] | None = None
        first: FormatError | None = None
        for form in forms(self.talk.messages):
            try:
                text = self.text(form)
            except FormatError as error:
                if isinstance(error.__cause__, templates.TooMuchError):
                    raise
                first = first or error
                continue
            missing = sum(not has(text, part) for message in form for part in _shown(message))
            if best is None or missing < best[0]:
                best = missing, form
            if not missing:
                break
        if best is None:
            assert first is not None
            raise first
        if best[0]:
            self.remarks.append("in which the chat template leaves out or changes some messages")
        return best[1]

    def _ignores_tools(self) -> bool:
        return self.text() == self.text(tools=None)

    def _source(self) -> str:
        """The source of the template that is taken."""
        try:
            template = self.tokenizer.get_chat_template(tools=self.options["tools"])
        except Exception as error:
            raise FormatError(f"{self.record.where}: there is no chat template to take: {first_line(error)}") from error
        if not isinstance(template, str):
            raise FormatError(f"{self.record.where}: the chat template is no text, but {reprlib.repr(template)}.")
        return template

    def _run(self, render: Any, messages: Any, **options: Any) -> Any:
        try:
            import jinja2
        except ModuleNotFoundError as error:
            raise ConfigError("chat templates need jinja2. Type: pip install 'funclora[train]'") from error
        where = self.record.where
        try:
            with templates.bounded():
                return render(messages, **options)
        except FuncloraError:
            raise
        except templates.TooMuchError as error:
            raise FormatError(f"{where}: the chat template was stopped: {error}.") from error
        except jinja2.TemplateError as error:
            raise FormatError(f"{where}: the chat template refuses these messages: {first_line(error)}") from error
        except Exception as error:  # a template is a program
            raise FormatError(f"{where}: the chat template fails on these messages: {first_line(error)}") from error


def _shown(message: Message) -> list[str]:
    """What a template should show of a message, whoever says it: its reasoning may be left out when it is over."""
    return [part for name, own in said(message).items() if name not in REASONING for part in own if part.strip()]

"""From a record to examples: the fields that are read, their token ids, and the positions with loss."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from funclora._apps.train import embedding_rows, preference_rows
from funclora._apps.train.chat import chats
from funclora._apps.train.labels import Labels, class_name
from funclora._apps.train.notes import Notes
from funclora._apps.train.preference_records import answers, one_kind
from funclora._apps.train.records import Record
from funclora._apps.train.rows import IGNORED, Example, common
from funclora._apps.train.settings import DECODERS, EMBEDDING, PREFERENCE, SEQ2SEQ, SEQUENCE, TOKEN, Settings
from funclora._apps.train.tokenizer import begun, ends_texts
from funclora.errors import FormatError, UnsupportedError, near

WORDS, SECOND = "tokens", "text_pair"
# Further fields for the chat template, besides the messages.
CHAT = ("messages", "tools", "chat_template_kwargs")
PAIR = ("prompt", "completion")


def schema(record: Record, settings: Settings) -> tuple[str, ...]:
    """The fields that are read from a record; they determine the kind of data.

    Raises:
        FormatError: it lacks the fields of the task, or has fields of several kinds of data.
    """
    there = {name for name, value in record.fields.items() if value is not None}
    if settings.task == SEQUENCE:
        second = [SECOND] if SECOND in there else []
        return _all(record, settings.text_field, *second, settings.label_field)
    if settings.task == TOKEN:
        return _all(record, WORDS, settings.label_field)
    if settings.task == SEQ2SEQ:
        return _all(record, *PAIR)
    if settings.task == EMBEDDING:
        return embedding_rows.fields_of(there, record, settings.objective)
    if settings.task == PREFERENCE:
        return one_kind([*there], record, settings.loss, settings.label_field)
    if {"chosen", "rejected"} <= there:
        raise FormatError(
            f"{record.where}: has chosen and rejected answers. Learn from both with --task preference, or from one: "
            "--fields completion=chosen, or messages=chosen if it has whole chats."
        )
    name = settings.text_field
    kinds = {CHAT: "messages" in there, PAIR: bool({*PAIR} & there), (name,): name in there}
    if name in (CHAT[0], *PAIR):
        kinds = {(name,): name in there}  # so plain text is expected
    found = [kind for kind, has in kinds.items() if has]
    if len(found) > 1:
        names = ", ".join(next(name for name in kind if name in there) for kind in found)
        raise FormatError(f"{record.where}: has {names}, which are different kinds of data. Keep one of them.")
    if not found:
        raise FormatError(
            f"{record.where}: expected a text under {name!r}, prompt and completion, or messages; {_has(record)} "
            "Give another field of text with text_field."
        )
    return _all(record, *PAIR) if found == [PAIR] else found[0]


def _all(record: Record, *names: str) -> tuple[str, ...]:
    for name in names:
        if name in record.fields and record.fields[name] is None:
            raise FormatError(
                f"{record.where}: {name}: is null. Give it a value, or remove the record. --skip-bad leaves it out."
            )
        if record.fields.get(name) is None:
            remedy = "" if name in (*PAIR, WORDS) else " Give other fields with text_field and label_field."
            raise FormatError(
                f"{record.where}: expected a value under {name!r}; {_has(record)}{near(name, record.fields, 1)}{remedy}"
            )
    return names


def _has(record: Record) -> str:
    names = [name for name, value in record.fields.items() if value is not None]
    return f"it has {', '.join(map(reprlib.repr, names))}." if names else "it has no fields."


def text(record: Record, name: str) -> str:
    """A field's text.

    Raises:
        FormatError: it contains something else.
    """
    value = record.fields[name]
    if not isinstance(value, str):
        raise FormatError(f"{record.where}: {name}: expected a text, got {reprlib.repr(value)}.")
    return value


def reader(
    settings: Settings, tokenizer: Any, context: int, labels: Labels, notes: Notes
) -> Callable[[Record], list[Example]]:
    """The function that makes a record's examples.

    Args:
        settings: the run's.
        tokenizer: transformers' tokenizer, or one with the same interface.
        context: maximum length of an example.
        labels: what labels mean, for classification.
        notes: receives what was cut off.
    """
    tokens = _Tokens(settings, tokenizer, context, labels, notes)
    if tokens.end is None and settings.task in (*DECODERS, SEQ2SEQ) and settings.model is not None:
        notes.say("The tokenizer has no end token, so the model cannot learn to stop.")
    functions = {
        SEQUENCE: tokens.sequence,
        TOKEN: tokens.words,
        SEQ2SEQ: tokens.translation,
        PREFERENCE: tokens.preference,
        EMBEDDING: tokens.texts,
    }
    return functions.get(settings.task, tokens.causal)


class _Tokens:
    def __init__(self, settings: Settings, tokenizer: Any, context: int, labels: Labels, notes: Notes) -> None:
        self.settings, self.tokenizer, self.context, self.notes = settings, tokenizer, context, notes
        self.classes = labels
        self.n_texts = 0  # of a record to compare texts of
        self.end: int | None = tokenizer.eos_token_id
        # The demo's tokenizer accepts only a text.
        self.options = {"verbose": False} if hasattr(tokenizer, "is_fast") else {}
        self.ends = ends_texts(tokenizer)

    def ids(self, text: str, **options: Any) -> list[int]:
        ids: list[int] = self.tokenizer(text, **self.options, **options)["input_ids"]
        return ids

    def ended(self, text: str) -> str:
        """A text with the end token, as TRL's SFTTrainer passes it to the tokenizer."""
        mark: str | None = getattr(self.tokenizer, "eos_token", None)
        return text if mark is None or self.ends or text.endswith(mark) else text + mark

    def causal(self, record: Record) -> list[Example]:
        kind = schema(record, self.settings)
        if kind == CHAT:
            made = chats(record, self.tokenizer, self.settings.train_on, self.settings.turns)
            for remark in made.remarks:
                self.notes.count(remark, record.source)
            return [example for one in made.found for example in self.masked(one.ids, one.said, record)]
        if kind == PAIR:
            ids, said = self.pair(record)
        else:
            ids = self.ids(self.ended(text(record, self.settings.text_field)))
            return self.pieces(ids, record)
        return self.masked(ids, said, record)

    def preference(self, record: Record) -> list[Example]:
        """A pair of answers, or each answer by itself if the loss takes it so."""
        found = []
        for answer, good in answers(record, self.settings.label_field):
            if "messages" in answer.fields:
                made = chats(answer, self.tokenizer)
                for remark in made.remarks:
                    self.notes.count(remark, record.source)
                if len(made.found) > 1:
                    raise FormatError(
                        f"{record.where}: the chat template rewrites the turns of this answer when others follow. "
                        "Give an answer of one turn, with those before it in the prompt."
                    )
                found.append((made.found[0].ids, made.found[0].said, good))
            else:
                found.append((*self.pair(answer), good))
        if "messages" not in record.fields and len(found) == 2 and isinstance(record.fields["chosen"], str):
            # After the same prompt, also if its end merges into one of the answers.
            start = min(said.index(True) if True in said else len(said) for _, said, _ in found)
            found = [(ids, [i >= start for i in range(len(ids))], good) for ids, _, good in found]
        made_of = [(self.masked(ids, said, record), good) for ids, said, good in found]
        if not all(made for made, _ in made_of):
            return []
        if self.settings.loss == "kto":
            return [preference_rows.judged(made[0], good) for made, good in made_of]
        (chosen,), (rejected,) = (made for made, _ in made_of)
        if chosen.ids == rejected.ids:
            raise FormatError(
                f"{record.where}: the chosen and the rejected answer are the same in {self.context} tokens, so nothing "
                "can be learned from them. Remove the record, or leave it out with --skip-bad."
            )
        return [preference_rows.compared(chosen, rejected)]

    def masked(self, ids: list[int], said: list[bool], record: Record) -> list[Example]:
        """The example with loss on the ids that are said."""
        labels = [i if bit else IGNORED for i, bit in zip(ids, said, strict=True)]
        return self.kept(ids[: self.context], labels[: self.context], record, len(ids) - self.context)

    def pair(self, record: Record) -> tuple[list[int], list[bool]]:
        """A prompt with its completion, and which ids are the completion's: all except those of the prompt alone."""
        prompt = text(record, "prompt")
        both = self.ids(prompt + self.ended(text(record, "completion")))
        if self.settings.train_on == "all":
            return both, [True] * len(both)
        alone = begun(self.tokenizer, prompt, **self.options)
        start = common(alone, both)
        if start < len(alone):
            self.notes.count(
                "in which the end of the prompt merges into the first token of the completion", record.source
            )
        return both, [i >= start for i in range(len(both))]

    def pieces(self, ids: list[int], record: Record) -> list[Example]:
        """Split into pieces of at most one context, so that every token except the first is predicted once.

        A piece begins with the last token of the previous piece.
        """
        found = []
        for start in range(0, max(len(ids) - 1, 1), self.context - 1):
            piece = ids[start : start + self.context]
            found += self.kept(piece, piece, record, 0)
        if len(found) > 1:
            self.notes.count(f"of more than {self.context} tokens split into several", record.source)
        return found

    def kept(self, ids: list[int], labels: list[int], record: Record, over: int) -> list[Example]:
        """The example, if any token in it has loss; a causal model does not predict the first token."""
        if not ids:
            self.notes.count("without tokens left out", record.source)
            return []
        seen = labels[1:] if self.settings.task in DECODERS else labels
        if all(label == IGNORED for label in seen):
            cut = f" in the first {self.context} tokens" if over > 0 else ""
            self.notes.count(f"without a token that has loss{cut} left out", record.source)
            return []
        begin: int | None = self.tokenizer.bos_token_id
        if begin is not None and ids[:2] == [begin, begin]:
            self.notes.count("that begin with the start token twice: the text's and the tokenizer's", record.where)
        if self.end is not None and ids[-2:] == [self.end, self.end]:
            self.notes.count("that end with the end token twice: the text's and the tokenizer's", record.where)
        if over > 0:
            self.notes.count(f"cut off after {self.context} tokens", record.source)
        return [Example(list(ids), list(labels), (len(ids),), record.source)]

    def shortened(self, over: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, int]:
        """The ids of a text, cut off but with its special tokens, and the number of lost ids."""
        whole = over(*args, **self.options, **options)
        lost = len(whole["input_ids"]) - self.context
        if lost <= 0:
            return whole, 0
        return over(*args, **self.options, **options, truncation=True, max_length=self.context), lost

    @functools.cached_property
    def glues(self) -> bool:
        """Whether words are joined without spaces, as in the byte-level tokenizers of GPT-2, Llama 3 and Qwen."""
        ids = self.tokenizer(["a", "b"], is_split_into_words=True)["input_ids"]
        return " " not in self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def sequence(self, record: Record) -> list[Example]:
        field, first = self.settings.label_field, text(record, self.settings.text_field)
        paired = SECOND in schema(record, self.settings)
        if paired and self.runs_on:
            self.notes.count("of two texts that the tokenizer puts nothing between", record.source)
        out, lost = self.shortened(self.tokenizer, first, *([text(record, SECOND)] if paired else []))
        ids, targets = out["input_ids"], self.classes.targets(record, field)
        segments = tuple(out.get("token_type_ids", ())) if paired else ()
        if not targets:
            label = self.classes.number(class_name(record.fields[field], record, field), record, field)
            return [replace(example, segments=segments) for example in self.kept(ids, [label], record, lost)]
        made = self.kept(ids, ids, record, lost)
        return [replace(example, labels=[], targets=targets, segments=segments) for example in made]

    def texts(self, record: Record) -> list[Example]:
        """Texts to compare."""
        fields = schema(record, self.settings)
        texts = embedding_rows.texts_of(record, fields)
        score = embedding_rows.score_of(record) if embedding_rows.SCORE in fields else None
        self.n_texts = self.n_texts or len(texts)
        if len(texts) != self.n_texts:
            raise FormatError(
                f"{record.where}: has {len(texts)} texts, and the first record has {self.n_texts}. Give each record "
                "the same number of negatives."
            )
        found = [self.shortened(self.tokenizer, text) for text in texts]
        if not all(out["input_ids"] for out, _ in found):
            self.notes.count("with a text without tokens left out", record.source)
            return []
        if any(lost > 0 for _, lost in found):
            self.notes.count(f"with a text cut off after {self.context} tokens", record.source)
        return [embedding_rows.joined([out["input_ids"] for out, _ in found], score, record.source)]

    @functools.cached_property
    def runs_on(self) -> bool:
        """Whether the second text of a pair begins without a token between it and the first."""
        plain = {"add_special_tokens": False}
        first, second = self.ids("a", **plain), self.ids("b", **plain)
        both, joined = self.tokenizer("a", "b")["input_ids"], [*first, *second]
        return any(both[i : i + len(joined)] == joined for i in range(len(both)))

    def words(self, record: Record) -> list[Example]:
        """The first token of a word gets its class; the others have no loss."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise UnsupportedError(
                "task: token-classification needs a fast tokenizer, which reports the word of each token."
            )
        words, names = word_classes(record, self.settings.label_field)
        if not words:
            return self.kept([], [], record, 0)
        try:
            if self.glues:
                words = [f" {word}" if i and word else word for i, word in enumerate(words)]
            out, lost = self.shortened(self.tokenizer, words, is_split_into_words=True)
        except (AssertionError, TypeError, ValueError) as error:
            raise UnsupportedError(
                f"{record.where}: the tokenizer does not accept words: {' '.join(str(error).split())}"
            ) from error
        labels, seen = [], set()
        for word in out.word_ids():
            new = word is not None and word not in seen
            labels.append(self.classes.number(names[word], record, self.settings.label_field) if new else IGNORED)
            seen.add(word)
        if not lost and len(seen - {None}) < len(words):
            self.notes.count("with words that have no token, whose classes are lost", record.source)
        return self.kept(out["input_ids"], labels, record, lost)

    def translation(self, record: Record) -> list[Example]:
        read, lost = self.shortened(self.tokenizer, text(record, "prompt"))
        said, more = self.shortened(self.tokenizer, text_target=text(record, "completion"))
        labels: list[int] = said["input_ids"]
        if self.end is not None and labels[-1:] != [self.end]:
            labels = [*labels[: self.context - 1], self.end]  # otherwise the decoder cannot learn to stop
        return self.kept(read["input_ids"], labels, record, max(lost, more))


def word_classes(record: Record, label_field: str) -> tuple[list[str], list[str]]:
    """The words of a record and their classes' names.

    Raises:
        FormatError: they are not two lists of equal length, of texts and of classes.
    """
    words, labels = record.fields[WORDS], record.fields[label_field]
    for name, value in ((WORDS, words), (label_field, labels)):
        if not isinstance(value, list):
            raise FormatError(f"{record.where}: {name}: expected a list, got {reprlib.repr(value)}.")
    wrong = next((word for word in words if not isinstance(word, str)), None)
    if wrong is not None:
        raise FormatError(f"{record.where}: {WORDS}: expected words, got {reprlib.repr(wrong)}.")
    if len(words) != len(labels):
        raise FormatError(
            f"{record.where}: {label_field}: expected a class for each of {len(words)} words, got {len(labels)}."
        )
    return words, [class_name(label, record, label_field) for label in labels]

"""The first reading of the data: the records that can be used, their kinds, how many there are, and their classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from funclora._apps.train.formats import Format
from funclora._apps.train.labels import Seen
from funclora._apps.train.notes import Notes
from funclora._apps.train.records import Record, read
from funclora._apps.train.settings import SEQUENCE, TOKEN, Settings
from funclora._apps.train.tokens import schema, word_classes
from funclora.errors import FormatError, FuncloraError

NAMED = 3  # of what is left out


class Survey:
    """The records of some files that can be used, the same ones in the same order each time.

    Args:
        settings: of the task and of the fields.
        form: how records are read.
        notes: receives what is not read.

    Attributes:
        labels: what they look like.
        kinds: the fields that are read -> the first record that has them.
    """

    def __init__(self, settings: Settings, form: Format, notes: Notes) -> None:
        self.settings, self.form, self.notes = settings, form, notes
        self.labels = Seen()
        self.kinds: dict[tuple[str, ...], str] = {}
        self._unused: dict[str, None] = {}
        self._forms: dict[str, None] = {}
        self._bad: list[str] = []
        self._n_bad = 0

    def count(self, paths: Sequence[Path]) -> list[int]:
        """The number of usable records of each file; takes note of what is in them.

        Raises:
            FormatError: a file cannot be read, or a record be used and `skip_bad` is not set.
        """
        return [sum(1 for _ in self._usable(path, first=True)) for path in paths]

    def records(self, path: Path) -> Iterator[Record]:
        """The usable records of a file, in this command's form."""
        return self._usable(path, first=False)

    def left_out(self, error: FuncloraError) -> None:
        """Take note of a record that is left out; raise the error if `skip_bad` is not set."""
        if not self.settings.skip_bad:
            raise error
        self._n_bad += 1
        if len(self._bad) < NAMED:
            self._bad.append(str(error))

    def lines(self) -> list[str]:
        """What is to be said of the records."""
        said = [*self._forms]
        if self._unused:
            said.append(f"Fields that are not read: {', '.join(self._unused)}.")
        if self._n_bad:
            more = f" And {self._n_bad - NAMED} more." if self._n_bad > NAMED else ""
            many = self._n_bad > 1
            said.append(
                f"{self._n_bad} record{'s' * many} that cannot be used {'are' if many else 'is'} left out: "
                f"{' '.join(self._bad)}{more}"
            )
        return said

    def _usable(self, path: Path, *, first: bool) -> Iterator[Record]:
        fields: tuple[str, ...] = ()
        where = ""

        def on_bad(error: FormatError) -> None:
            if first or not self.settings.skip_bad:
                self.left_out(error)

        for raw in read(path, self.settings.text_field, on_bad):
            try:
                record, said = self.form.standard(raw)
                found = schema(record, self.settings)
                if fields and found != fields:
                    raise FormatError(
                        f"{record.where}: has {found[0]!r}, but {where} has {fields[0]!r}. All records of a file must "
                        "be of one kind."
                    )
                if first:
                    self._note_classes(record)
            except FormatError as error:
                on_bad(error)
                continue
            if not fields:
                fields, where = found, record.where
            if first:
                self.kinds.setdefault(found, record.where)
                self._unused.update((name, None) for name in record.fields if name not in fields)
                if said:
                    self._forms[f"{path}: {said}."] = None
            yield record

    def _note_classes(self, record: Record) -> None:
        settings, field = self.settings, self.settings.label_field
        if settings.task == SEQUENCE:
            self.labels.add(record.fields[field], record, field)
        if settings.task == TOKEN:
            word_classes(record, field)
            for label in record.fields[field]:
                self.labels.add(label, record, field)

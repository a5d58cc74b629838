"""Counts of what was cut off, left out or not used, for the messages of a run."""

from __future__ import annotations

from typing import Any


class Notes:
    """Counts of what happened to records.

    Examples:
        >>> notes = Notes()
        >>> notes.count("cut off after 512 tokens", "a.jsonl:3")
        >>> notes.count("cut off after 512 tokens", "a.jsonl:9")
        >>> notes.lines()
        ['2 examples cut off after 512 tokens; the first is a.jsonl:3.']
    """

    def __init__(self) -> None:
        self._said: list[str] = []
        self._counts: dict[str, tuple[int, str]] = {}

    def say(self, line: str) -> None:
        """Add a line."""
        self._said.append(line)

    def count(self, what: str, where: str) -> None:
        """Count one more example that is `what`, a participle."""
        n, first = self._counts.get(what, (0, where))
        self._counts[what] = n + 1, first

    def state(self) -> dict[str, Any]:
        """All that was noted, as JSON has it."""
        return {"said": self._said, "counts": self._counts}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Notes:
        """The notes of a state."""
        notes = cls()
        notes._said = [*state["said"]]
        notes._counts = {what: (int(n), str(first)) for what, (n, first) in state["counts"].items()}
        return notes

    def lines(self) -> list[str]:
        """All notes, one line each."""
        counted = [
            f"{n} example{'s' if n > 1 else ''} {what}; the first is {where}."
            for what, (n, where) in self._counts.items()
        ]
        return [*self._said, *counted]

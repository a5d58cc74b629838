"""rich's console, on which text from files and models cannot steer the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from funclora._apps.train.quiet import QUIET
from funclora.errors import printable


class Console(rich.console.Console):
    """A console that shows control characters in what it is given as escapes; on stderr, nothing with --quiet."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.quiet = self.quiet or (self.stderr and QUIET.get())

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As the base class does."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

"""What the commands that look into folders share: a bar while they read, a picture, and how numbers are shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from funclora.cli._output import print_json

if TYPE_CHECKING:
    from rich.table import Table

    from funclora.cli._diff import Difference
    from funclora.cli._inspect import Inspection

Found = TypeVar("Found", "Difference", "Inspection")

Plot = Annotated[Path | None, typer.Option(help="Draw it too, as this PNG file. Needs matplotlib.", show_default=False)]


def check_plot(file: Path | None) -> None:
    """Raise if the picture could not be drawn; to be called before the work.

    Raises:
        ConfigError: the file is not called .png, or is a folder.
        UnsupportedError: matplotlib is not installed.
    """
    if file is None:
        return
    from funclora.analysis._figure import needs_matplotlib
    from funclora.errors import ConfigError

    if file.suffix.lower() != ".png" or file.is_dir():
        raise ConfigError(f"--plot: expected the name of a .png file, got {str(file)!r}.")
    needs_matplotlib()


@contextlib.contextmanager
def bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr; gives a function of what is done and all."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("reading", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total, description=words)


def tell(found: Found, plot: Path | None, *, as_json: bool, show: Callable[[Found, Path | None], None]) -> None:
    """What was found: its notes as warnings, the picture if there is to be one, and JSON or what `show` prints."""
    import warnings

    from funclora.errors import PeftFormatWarning

    for note in found.notes:
        warnings.warn(note, PeftFormatWarning, stacklevel=2)
    if plot is not None:
        found.plot(plot)
    if as_json:
        print_json(found.to_dict())
    else:
        show(found, plot)


def weights() -> Table:
    """A table with a row for each weight, narrow enough that names fit beside their numbers in 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("weight", overflow="fold")
    return table


def same(values: Iterable[str]) -> str:
    """What all values are; empty if they differ, and a column has to say it."""
    known = set(values)
    return known.pop() if len(known) == 1 else ""


def number(value: float | None, form: str = ".4g") -> str:
    """A number, or a dash for none."""
    return "–" if value is None else format(value, form)


def between(values: Sequence[float | None] | None, form: str = ".2f") -> str:
    """The least and the largest of some numbers, once if they look alike; a dash for none."""
    known = [value for value in values or () if value is not None]
    if not known:
        return "–"
    ends = [format(value, form) for value in (min(known), max(known))]
    return "–".join(dict.fromkeys(ends))


def size(shape: Sequence[int]) -> str:
    """A shape as people write it."""
    return "×".join(map(str, shape))


def short(name: str) -> str:
    """A weight's name for a table: ".weight" goes without saying."""
    return name.removesuffix(".weight")


def words(rule: str, r: int | None, scaling: float | None) -> str:
    """A rule with its rank and scaling, where it has them."""
    return " ".join(
        [rule, *([f"r={r}"] if r is not None else ()), *([f"s={scaling:.3g}"] if scaling is not None else ())]
    )

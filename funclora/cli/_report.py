"""What `inspect` and `diff` share: a progress bar, a plot, and the form of numbers."""

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

Plot = Annotated[
    Path | None, typer.Option(help="Also draw a plot in this PNG file; needs matplotlib.", show_default=False)
]


def check_plot(file: Path | None) -> None:
    """Raise if the plot could not be drawn; to be called before the work.

    Raises:
        ConfigError: the file name does not end in .png, or is a folder.
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
    """A progress bar on stderr, if it is a terminal; yields a function of the finished and the total number."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from funclora._apps.train.console import Console

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("reading", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total, description=words)


def tell(found: Found, plot: Path | None, *, as_json: bool, show: Callable[[Found, Path | None], None]) -> None:
    """Report a result: its notes as warnings, the plot if requested, and JSON or what `show` prints."""
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
    """A table with a row for each weight, narrow enough that names and numbers fit into 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("weight", overflow="fold")
    return table


def same(values: Iterable[str]) -> str:
    """The value, if all values are equal; empty if they differ, so that a column must show them."""
    known = set(values)
    return known.pop() if len(known) == 1 else ""


def number(value: float | None, form: str = ".4g") -> str:
    """A number; a dash for None."""
    return "–" if value is None else format(value, form)


def between(values: Sequence[float | None] | None, form: str = ".2f") -> str:
    """The smallest and the largest of some numbers, only once if they look alike; a dash if there are none."""
    known = [value for value in values or () if value is not None]
    if not known:
        return "–"
    ends = [format(value, form) for value in (min(known), max(known))]
    return "–".join(dict.fromkeys(ends))


def size(shape: Sequence[int]) -> str:
    """A shape, as in 16×32."""
    return "×".join(map(str, shape))


def short(name: str) -> str:
    """A weight's name for a table, without ".weight"."""
    return name.removesuffix(".weight")


def words(rule: str, r: int | None, scaling: float | None) -> str:
    """A rule with its rank and scaling, if it has them."""
    return " ".join(
        [rule, *([f"r={r}"] if r is not None else ()), *([f"s={scaling:.3g}"] if scaling is not None else ())]
    )

"""The application that the commands belong to.

How to write a command:

- One file with one function, whose annotations Typer turns into arguments and options, and a line in the table below.
  Modules that are imported at the top of the file are imported for every `--help`, so torch, transformers, matplotlib
  and everything that imports them are imported inside functions.
- The first sentence of the docstring is shown in the list of commands. The lines of its `Examples:` section are shown
  below the options; each is a complete command line.
- `_options.py` makes lists, flags and types look alike in all commands: declare `Sequence[float]`, `bool`, `Path`.
- Invalid user input raises an error from `funclora.errors` that names the option or file, the expected and the actual
  value, and the fix. The wrapper (`_command.py`) turns it into one line on stderr and exit code 2, adds `--debug`,
  which shows the traceback, and prints each warning of funclora in one line. A command ends in no other way: no
  `typer.Exit`, no `sys.exit`, and nothing of its own on stderr except progress.
- Ctrl-C ends it with exit code 130 and the text in the last column of the table: what remains, and how to continue.
  `{out}` is the value of `--out`. A command that knows more raises `KeyboardInterrupt("what remains")`.
- The result goes to stdout. With the option `json: AsJson = False`, `print_json(tree)` prints the same facts as one
  JSON value and nothing else. Errors then still go to stderr, and stdout stays empty.
"""

from __future__ import annotations

from typing import Annotated

import typer

from funclora import __version__
from funclora.cli._command import Commands, Debug, Quiet, add
from funclora.cli.combine import combine
from funclora.cli.convert import convert
from funclora.cli.demo import demo
from funclora.cli.diff import diff
from funclora.cli.eval import evaluate
from funclora.cli.extract import extract
from funclora.cli.generate import generate
from funclora.cli.inspect import inspect
from funclora.cli.merge import merge
from funclora.cli.predict import predict
from funclora.cli.serve import serve
from funclora.cli.sweep import sweep
from funclora.cli.train import train

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)

DIVIDED = ("eval", "generate", "predict", "sweep", "train")  # by the processes that torchrun starts

for name, function, stopped in (
    ("combine", combine, "{out} is unchanged."),
    ("convert", convert, "{out} is unchanged."),
    ("demo", demo, "The same command starts again."),
    ("diff", diff, "Nothing was written."),
    ("eval", evaluate, "Nothing was written."),
    ("extract", extract, "{out} is unchanged."),
    ("generate", generate, "Nothing was written."),
    ("inspect", inspect, "Nothing was written."),
    ("merge", merge, "{out} is unchanged."),
    ("predict", predict, "Nothing was written."),
    ("serve", serve, "Nothing was written."),
    ("sweep", sweep, "The same command continues with {out}."),
    ("train", train, "If its folder contains a checkpoint, the same command with --resume continues."),
):
    add(app, name, function, stopped, divided=name in DIVIDED)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"funclora {__version__}")
        raise typer.Exit


@app.callback()
def _funclora(
    debug: Debug = False,
    quiet: Quiet = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """LoRA and DoRA as pure functions: adapters are values."""

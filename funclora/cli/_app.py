"""The application that the commands belong to.

How a command is written:

- One file with one function, whose annotations Typer turns into arguments and options, and a line in the table below.
  What is imported at the top of the file is imported for every `--help`: torch, transformers, matplotlib and all
  that imports them come inside of functions.
- The first sentence of its docstring stands in the list of commands; the lines of its `Examples:` section are shown
  below the options, each a whole command line.
- What the user gave and does not do is raised, as an exception of `funclora.errors` whose message names the option
  or the file, what was expected, what came and what to do. The table's wrapper (`_command`) makes it one line on
  stderr and exit code 2, adds `--debug`, which shows the traceback, and turns warnings of funclora into a line each.
  A command ends in no other way: no `typer.Exit`, no `sys.exit`, no words of its own on stderr but for progress.
- Ctrl-C ends it with exit code 130 and the last column of the table: what is left, and how to go on. `{out}` is
  the value of `--out`. A command that knows better raises `KeyboardInterrupt("what is left")`.
- The result goes to stdout. `json: AsJson = False` is the option, and with it `print_json(tree)` prints the same
  facts as one JSON value and nothing else. Errors go to stderr all the same, and stdout stays empty.
"""

from __future__ import annotations

from typing import Annotated

import typer

from funclora.cli._command import Commands, add
from funclora.cli.combine import combine
from funclora.cli.convert import convert
from funclora.cli.demo import demo
from funclora.cli.diff import diff
from funclora.cli.eval import evaluate
from funclora.cli.extract import extract
from funclora.cli.generate import generate
from funclora.cli.inspect import inspect
from funclora.cli.merge import merge
from funclora.cli.sweep import sweep
from funclora.cli.train import train

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)

for name, function, stopped in (
    ("combine", combine, "{out} is as it was."),
    ("convert", convert, "{out} is as it was."),
    ("demo", demo, "The same command begins again."),
    ("diff", diff, "Nothing was written."),
    ("eval", evaluate, "Nothing was written."),
    ("extract", extract, "{out} is as it was."),
    ("generate", generate, "Nothing was written."),
    ("inspect", inspect, "Nothing was written."),
    ("merge", merge, "{out} is as it was."),
    ("sweep", sweep, "The same command goes on with {out}."),
    ("train", train, "If its folder holds a checkpoint, the same command with --resume goes on."),
):
    add(app, name, function, stopped)


@app.callback()
def _funclora(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """LoRA and DoRA as pure functions: adapters are values."""

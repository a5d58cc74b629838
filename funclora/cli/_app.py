"""The application that the commands belong to."""

from __future__ import annotations

import typer

from funclora.cli.combine import combine
from funclora.cli.demo import demo
from funclora.cli.eval import evaluate
from funclora.cli.extract import extract
from funclora.cli.merge import merge
from funclora.cli.sweep import sweep

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)
app.command()(combine)
app.command()(demo)
app.command("eval")(evaluate)
app.command()(extract)
app.command()(merge)
app.command()(sweep)


@app.callback()
def _funclora() -> None:
    """LoRA and DoRA as pure functions: adapters are values."""

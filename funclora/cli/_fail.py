"""How a command ends that was given something wrong."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(command: str, message: str) -> NoReturn:
    """Say what is wrong in one line on stderr, and end with exit code 2."""
    typer.echo(f"funclora {command}: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)

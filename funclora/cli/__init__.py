"""The command line. One file a command; a command imports torch only when it runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `funclora`."""
    try:
        from funclora.cli._app import app
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"funclora's commands need {error.name}. Type: pip install 'funclora[cli]'")
    app(prog_name="funclora")

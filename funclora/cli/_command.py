"""How every command ends: with its result, or with one line on stderr that says what to do."""

from __future__ import annotations

import errno
import functools
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from funclora.errors import FuncloraError, FuncloraWarning

FAILED, STOPPED = 2, 130

# The class has no public name that all versions of Typer share.
UsageError: Any = typer.BadParameter.__bases__[0]

# Type -> how the help writes a value of it; a flag takes none.
VALUES: dict[type, str] = {bool: "", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}

# Module -> the extra that installs it.
EXTRAS = {
    "matplotlib": "demo",
    "transformers": "hf",
    "tokenizers": "hf",
    "datasets": "train",
    "jinja2": "train",
    "yaml": "train",
    "tomli": "train",
    "tensorboard": "train",
    "bitsandbytes": "quant",
    "gguf": "gguf",
}

# What the system says -> what the user can do.
REMEDIES = {
    "ENOSPC": "Free some space, or write to another disk.",
    "EDQUOT": "Free some space, or write to another disk.",
    "EACCES": "Change its permissions, or name another.",
    "EPERM": "Change its permissions, or name another.",
    "EROFS": "Name another folder.",
    "ENOENT": "Name one that is there.",
    "ENOTDIR": "Name a folder.",
    "EISDIR": "Name a file.",
}


class Commands(TyperGroup):
    """The commands; what is wrong with a command line is one line too."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, without boxes: rich takes longer to load than all else."""
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each command's first sentence, whole."""
        rows = [(name, command.get_short_help_str(1 << 10)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command that the arguments name, and end the process."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except UsageError as error:
            if not standalone_mode:
                raise
            if type(error).__name__ == "NoArgsIsHelpError":  # the help is all there is to say
                typer.echo(error.format_message(), err=True)
                sys.exit(FAILED)
            context = getattr(error, "ctx", None)
            names = ["funclora", *(context.command_path.split()[1:] if context is not None else ())]
            say(*names[1:], f"{_sentence(error.format_message())} Type: {' '.join(names)} --help")
            sys.exit(FAILED)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


class Command(TyperCommand):
    """A command, whose usage line has names only: FILE, not {FILE} as some versions of Typer write."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What stands behind the command's name."""
        return [piece.translate({ord("{"): None, ord("}"): None}) for piece in super().collect_usage_pieces(ctx)]

    def get_help_option(self, ctx: Any) -> Any:
        """--help, a flag like the others."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.metavar = VALUES[bool]
        return option


def add(app: typer.Typer, name: str, function: Callable[..., None], stopped: str) -> None:
    """Give the application a command.

    Args:
        app: the application.
        name: of the command.
        function: what it does; raises a `FuncloraError` if it cannot.
        stopped: what is left when Ctrl-C ends it; `{out}` and the like are the command's values.
    """
    text, examples = _examples(inspect.getdoc(function) or "")

    @functools.wraps(function)
    def run(_context: typer.Context, debug: bool, **values: Any) -> None:
        debug = debug or bool(_context.find_root().params.get("debug"))
        said: set[str] = set()

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if not issubclass(category, FuncloraWarning):
                before(message, category, *rest, **more)
            elif str(message) not in said:
                said.add(str(message))
                say(name, f"warning: {message}")

        with warnings.catch_warnings():
            before = warnings.showwarning
            warnings.filterwarnings("always", category=FuncloraWarning)
            warnings.showwarning = show
            try:
                function(**values)
            except KeyboardInterrupt as error:
                say(name, f"stopped. {str(error) or stopped.format(**values)}")
                raise typer.Exit(STOPPED) from error
            except (FuncloraError, OSError, ImportError, MemoryError, RuntimeError) as error:
                message = _complaint(error)
                if message is None:
                    raise
                if debug:
                    traceback.print_exc()
                else:
                    say(name, message)
                raise typer.Exit(FAILED) from error

    own = inspect.signature(function, eval_str=True)
    option = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
    parameters = [
        inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.parameters.values()),
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option),
    ]
    for parameter in parameters[1:]:
        _name_value(parameter)
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, cls=Command, help=text, epilog=examples)(run)


def say(*words: str) -> None:
    """One line on stderr: `funclora COMMAND: message`."""
    *names, message = words
    typer.echo(f"{' '.join(['funclora', *names])}: {' '.join(message.split())}", err=True)


def _name_value(parameter: inspect.Parameter) -> None:
    """Let the help call a parameter's value as `VALUES` does, where the command does not name it."""
    kinds = [parameter.annotation]
    for kind in kinds:  # Annotated[list[Path] | None, Option()] and the like, taken apart as it goes
        kinds += get_args(kind)
    types = [kind for kind in kinds if isinstance(kind, type)]
    words = ["|".join(str(each.value) for each in kind) for kind in types if issubclass(kind, Enum)]
    words += [VALUES[kind] for kind in types if kind in VALUES]
    for info in kinds:
        if isinstance(info, typer.models.ArgumentInfo) and info.metavar is None:
            info.metavar = parameter.name.upper()
        elif isinstance(info, typer.models.OptionInfo) and info.metavar is None:
            info.metavar = words[0] if words else None


def _complaint(error: BaseException) -> str | None:
    """What to tell the user; None if it is not for the user to mend."""
    if isinstance(error, FuncloraError):
        return str(error)
    if isinstance(error, BrokenPipeError):  # | head: Typer ends quietly
        return None
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(module)
        return None if extra is None else f"this needs {module}. Type: pip install 'funclora[{extra}]'"
    if isinstance(error, OSError):
        if error.strerror is None:
            return str(error) or None
        file = f"{error.filename}: " if error.filename is not None else ""
        return f"{file}{error.strerror}. {REMEDIES.get(errno.errorcode.get(error.errno or 0, ''), '')}"
    if isinstance(error, MemoryError | RuntimeError) and not isinstance(error, typer.Exit | typer.Abort):
        from funclora._torch.memory import is_out_of_memory

        if is_out_of_memory(error):
            return f"out of memory: {_first_line(error)} Take less at a time, or another --device."
    return None


def _first_line(error: BaseException) -> str:
    return _sentence(next(iter(str(error).strip().splitlines()), ""))


def _sentence(text: str) -> str:
    return text if not text or text.endswith((".", "?", "!", ")")) else f"{text}."


def _examples(text: str) -> tuple[str, str]:
    """A docstring without its examples, and these."""
    text, _, examples = text.partition("\nExamples:\n")
    paragraphs = [re.sub(r"\s*\n\s*", " ", paragraph) for paragraph in text.strip().split("\n\n")]
    return "\n\n".join(paragraphs), "\n".join(["Examples:", *(line.strip() for line in examples.strip().splitlines())])

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
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from funclora._apps.train.aliases import known_as
from funclora._apps.train.quiet import QUIET
from funclora.cli._options import VALUES, prepared
from funclora.distributed import _ranks as ranks
from funclora.errors import ConfigError, FuncloraError, FuncloraWarning, printable

FAILED, STOPPED = 2, 130

# Options of every command, and of the application.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress; results, warnings and errors are shown.")]

# The class has no public name that all versions of Typer share.
UsageError: Any = typer.BadParameter.__bases__[0]

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
    "starlette": "serve",
    "uvicorn": "serve",
}

# System error -> what the user can do.
REMEDIES = {
    "ENOSPC": "Free some space, or write to another disk.",
    "EDQUOT": "Free some space, or write to another disk.",
    "EACCES": "Change its permissions, or give another.",
    "EPERM": "Change its permissions, or give another.",
    "EROFS": "Give another folder.",
    "ENOENT": "Give one that exists.",
    "ENOTDIR": "Give a folder.",
    "EISDIR": "Give a file.",
}


class Commands(TyperGroup):
    """The group of commands; an invalid command line is also one line on stderr."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, without boxes: loading rich takes longer than everything else."""
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The whole first sentence of each command."""
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
            if type(error).__name__ == "NoArgsIsHelpError":  # the help is the whole message
                text = error.format_message()
                ranks.report(lambda: typer.echo(text, err=True))
                sys.exit(FAILED)
            context = getattr(error, "ctx", None)
            names = ["funclora", *(context.command_path.split()[1:] if context is not None else ())]
            message = error.format_message().replace("Value error, ", "")  # words that some versions of Typer add
            option = str(getattr(error, "option_name", ""))
            known = known_as(option) if names[1:] == ["train"] else None
            if known is not None:
                here = " or ".join(f"--{key.replace('_', '-')}" for key in known.split(", "))
                message = f"No such option: {option}. Here it is {here}."
            fail(*names[1:], f"{_sentence(message)} Type: {' '.join(names)} --help")
            sys.exit(FAILED)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


class Command(TyperCommand):
    """A command with the same help in all versions of Typer: FILE in the usage line, not {FILE}; PATH, not <path>."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            if parameter.param_type_name == "argument" and hasattr(parameter, "display_type_rich"):
                parameter.display_type_rich = lambda ctx: VALUES[Path]  # what all arguments are

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What stands behind the command's name."""
        return [piece.translate({ord("{"): None, ord("}"): None}) for piece in super().collect_usage_pieces(ctx)]

    def make_parser(self, ctx: Any) -> Any:
        """A parser that refuses an option with one value that is given twice."""
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            found = parse(args=self._spelled(args))
            seen: set[str] = set()
            for parameter in found[2]:
                if parameter.param_type_name == "option" and not parameter.multiple:
                    if parameter.name in seen:
                        raise UsageError(f"{parameter.opts[0]}: given twice, and it has only one value. Give one.", ctx)
                    seen.add(parameter.name)
            return found

        parser.parse_args = parse_args
        return parser

    def _spelled(self, args: list[str]) -> list[str]:
        """Arguments with flags in the two forms that there are: `--bf16 true` is --bf16, `--bf16 auto` neither."""
        flags = {option.opts[0]: option for option in self.params if getattr(option, "secondary_opts", None)}
        spelled: list[str] = []
        rest = iter(args)
        for argument in rest:
            if argument == "--":
                return [*spelled, argument, *rest]
            word = argument.lower()
            if not (spelled and spelled[-1] in flags and word in ("true", "false", "auto")):
                spelled.append(argument)
            elif word == "false":
                spelled[-1] = flags[spelled[-1]].secondary_opts[0]
            elif word == "auto" and flags[spelled[-1]].default is None:
                spelled.pop()
            elif word == "auto":
                spelled.append(argument)
        return spelled

    def get_help_option(self, ctx: Any) -> Any:
        """--help, a flag like the others."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.metavar = VALUES[bool]
        return option


def add(app: typer.Typer, name: str, function: Callable[..., None], stopped: str, *, divided: bool = False) -> None:
    """Give the application a command.

    Args:
        app: the application.
        name: of the command.
        function: the command; raises a `FuncloraError` if it cannot do its work.
        stopped: what remains when Ctrl-C ends it; `{out}` and other names are the values of the options.
        divided: whether several processes, started by torchrun, divide its work.
    """
    text, examples = _examples(inspect.getdoc(function) or "")

    @functools.wraps(function)
    def run(_context: typer.Context, debug: bool, quiet: bool, **values: Any) -> None:
        everywhere = _context.find_root().params
        debug = debug or bool(everywhere.get("debug"))
        QUIET.set(quiet or bool(everywhere.get("quiet")))
        said: set[str] = set()

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if not issubclass(category, FuncloraWarning):
                before(message, category, *rest, **more)
            elif str(message) not in said and ranks.is_first():
                said.add(str(message))
                say(name, f"warning: {message}")

        with warnings.catch_warnings():
            before = warnings.showwarning
            warnings.filterwarnings("always", category=FuncloraWarning)
            warnings.showwarning = show
            try:
                if ranks.is_launched() and not divided:
                    raise ConfigError("this command works in one process. Start it without torchrun.")
                with ranks.connected():
                    QUIET.set(QUIET.get() or not ranks.is_first())
                    function(**values | {key: read(values[key]) for key, read in readers.items()})
            except KeyboardInterrupt as error:
                fail(name, f"stopped. {str(error) or stopped.format(**values)}")
                raise typer.Exit(STOPPED) from error
            except (FuncloraError, OSError, ImportError, MemoryError, RuntimeError) as error:
                message = _complaint(error)
                if message is None:
                    raise
                if debug:
                    ranks.report(traceback.print_exc)
                else:
                    fail(name, message)
                raise typer.Exit(FAILED) from error

    own = inspect.signature(function, eval_str=True)
    parameters = [
        inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.parameters.values()),
        inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug),
    ]
    readers = {}
    for i, parameter in enumerate(parameters[1:], start=1):
        parameters[i], reader = prepared(parameter)
        if reader is not None:
            readers[parameter.name] = reader
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, cls=Command, help=text, epilog=examples)(run)


def say(*words: str) -> None:
    """One line on stderr: `funclora COMMAND: message`."""
    *names, message = words
    typer.echo(f"{' '.join(['funclora', *names])}: {printable(' '.join(message.split()))}", err=True)


def fail(*words: str) -> None:
    """The line that says why the command failed; of several processes, one says it."""
    ranks.report(lambda: say(*words))


def _complaint(error: BaseException) -> str | None:
    """The message for the user; None if it is not a user error."""
    if isinstance(error, FuncloraError):
        return str(error)
    if isinstance(error, BrokenPipeError):  # as in "| head": Typer exits silently
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
            return f"out of memory: {_first_line(error)} Reduce the batch or the context, or use another --device."
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

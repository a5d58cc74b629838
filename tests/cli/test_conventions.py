"""What holds for every command: how it ends, what it prints where, and what its help needs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner, Result

import funclora
from funclora.cli._app import app
from funclora.cli._command import Commands, add
from funclora.cli._options import Whole
from funclora.cli._output import AsJson, print_json
from funclora.errors import ConfigError, FuncloraWarning

NAMES = sorted(command.name for command in app.registered_commands if command.name is not None)
HEAVY = ("torch", "transformers", "peft", "matplotlib", "datasets", "numpy", "tokenizers")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(funclora.__file__).parents[1]), "COLUMNS": "200"}
MAIN = "import sys; sys.argv[0] = 'funclora'; from funclora.cli import main; main()"


def shell(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAIN, *args],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_is_looked_at() -> None:
    assert len(NAMES) == len(app.registered_commands)
    assert {"combine", "convert", "demo", "eval", "extract", "merge", "sweep"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_is_light_and_complete(name: str) -> None:
    code = (
        f"import sys\nsys.argv = ['funclora', {name!r}, '--help']\nfrom funclora.cli import main\n"
        f"try: main()\nfinally: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    examples = done.stdout.partition("Examples:")[2]
    assert re.search(rf"funclora {name}\b", examples), done.stdout
    for option in ("--json", "--debug"):
        assert re.search(rf"{option}\b", done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_help_names_values_plainly(name: str) -> None:
    text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
    usage = text.partition("Examples:")[0].partition("─ Options ─")
    assert "{" not in usage[0], text
    own = usage[2].splitlines()
    assert not [line for line in own if re.search(r"<[a-z][a-z0-9| ]*>", line)], text
    assert not [line for line in own if re.search(r"--(json|debug|overwrite|help)\s+[A-Z]+\b", line)], text


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_one_line(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--no-such-option"])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"funclora {name}: ")
    assert "--no-such-option" in line
    assert line.endswith(f"Type: funclora {name} --help")


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_read_without_complaint(name: str) -> None:
    """The lines of the help go through the parser: options have not been renamed since."""
    command = typer.main.get_command(app)
    own = command.commands[name]  # type: ignore[attr-defined]
    lines = [line for line in own.epilog.splitlines() if line.startswith(f"funclora {name}")]
    assert lines
    for line in lines:
        own.make_context(name, shlex.split(line)[2:])


def test_commands_that_are_not_there() -> None:
    result = CliRunner().invoke(app, ["evl"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "funclora: No such command 'evl'. Did you mean 'eval'? Type: funclora --help\n"
    bare = CliRunner().invoke(app, [])
    assert bare.exit_code == 2
    assert all(name in bare.output for name in NAMES)


# The wrapper, on a command of its own


def made(function: Callable[..., None], *args: str, stopped: str = "") -> Result:
    toy = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
    add(toy, "toy", function, stopped)

    @toy.callback()
    def _all(debug: Annotated[bool, typer.Option("--debug")] = False) -> None: ...

    return CliRunner().invoke(toy, list(args))


def raising(error: BaseException) -> Callable[..., None]:
    def toy(out: Annotated[Path, typer.Option(help="Where.")] = Path("there"), json: AsJson = False) -> None:
        """Toy.

        Examples:
            funclora toy
        """
        raise error

    return toy


COMPLAINTS: list[tuple[BaseException, str]] = [
    (ConfigError("--out: expected\n a folder,\tgot  a file."), "--out: expected a folder, got a file."),
    (FileNotFoundError(2, "No such file or directory", "x.json"), "x.json: No such file or directory. Give one"),
    (OSError(28, "No space left on device", "x.json"), "x.json: No space left on device. Free some space"),
    (PermissionError(13, "Permission denied", "x.json"), "x.json: Permission denied. Change its permissions"),
    (OSError(30, "Read-only file system", "x.json"), "x.json: Read-only file system. Give another folder."),
    (ModuleNotFoundError("No module named 'gguf'", name="gguf"), "this needs gguf. Type: pip install 'funclora[gguf]'"),
    (MemoryError("no room"), "out of memory: no room. Reduce the batch"),
    (RuntimeError("CUDA out of memory.\nmore"), "out of memory: CUDA out of memory. Reduce the batch"),
]


@pytest.mark.parametrize(("error", "words"), COMPLAINTS, ids=lambda it: type(it).__name__)
@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_is_one_line_on_stderr(error: BaseException, words: str, as_json: bool) -> None:
    result = made(raising(error), "toy", *(["--json"] if as_json else []))
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"funclora toy: {words}")


@pytest.mark.parametrize("args", [("--debug", "toy"), ("toy", "--debug")])
def test_debug_shows_the_traceback(args: tuple[str, ...]) -> None:
    result = made(raising(ConfigError("--out: no.")), *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("funclora.errors.ConfigError: --out: no.\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), ModuleNotFoundError("x", name="x")])
def test_what_is_no_mistake_of_the_user_is_not_hidden(error: Exception) -> None:
    result = made(raising(error), "toy")
    assert result.exit_code == 1
    assert result.exception is error


def test_ctrl_c_says_what_is_left() -> None:
    result = made(raising(KeyboardInterrupt()), "toy", "--out", "x", stopped="The same command goes on with {out}.")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "funclora toy: stopped. The same command goes on with x.\n"
    result = made(raising(KeyboardInterrupt("Step 3 is saved.")), "toy", stopped="Nothing.")
    assert (result.exit_code, result.stderr) == (130, "funclora toy: stopped. Step 3 is saved.\n")


def test_warnings_are_a_line_each() -> None:
    def toy(json: AsJson = False) -> None:
        """Toy."""
        for words in ("one\nthing", "one\nthing", "another"):
            warnings.warn(words, FuncloraWarning, stacklevel=2)
        print_json({"x": float("inf"), "out": Path("a")})

    result = made(toy, "toy")
    assert result.exit_code == 0, result.output
    assert result.stderr == "funclora toy: warning: one thing\nfunclora toy: warning: another\n"
    assert json.loads(result.stdout) == {"x": None, "out": "a"}


# The shell


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")
def test_ctrl_c_in_a_process() -> None:
    """A signal in the midst of the work."""
    code = (
        "import os, signal, sys; sys.argv[:] = ['funclora', 'eval', 'a', '--data', 'b']\n"
        "import funclora.cli._adapters as module\n"
        "module.adapter_folders = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n"
        "from funclora.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "funclora eval: stopped. Nothing was written.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")
def test_a_broken_pipe_is_quiet() -> None:
    code = (
        "import sys, typer; sys.argv[:] = ['funclora', 'toy']\n"
        "from funclora.cli._command import Commands, add\n"
        "from funclora.cli._output import print_json\n"
        "app = typer.Typer(cls=Commands)\n"
        "def toy():\n    '''Toy.'''\n    [print_json(list(range(9999))) for _ in range(99)]\n"
        "add(app, 'toy', toy, '')\n"
        "app.callback()(lambda: None)\n"
        "app()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "[\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_completion_is_shown_and_installed(shell_name: str, tmp_path: Path) -> None:
    # Else the shell is read off the parent process, which is pytest here.
    environment = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    shown = shell("--show-completion", shell_name, **environment)
    assert shown.returncode == 0, shown.stderr
    assert "_FUNCLORA_COMPLETE=complete_" in shown.stdout
    installed = shell("--install-completion", shell_name, **environment)
    assert installed.returncode == 0, installed.stderr
    assert "completion installed in" in installed.stdout
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert any("_FUNCLORA_COMPLETE=complete_" in text for text in written)


def test_completion_completes() -> None:
    done = shell(_FUNCLORA_COMPLETE="complete_bash", COMP_WORDS="funclora ev", COMP_CWORD="1")
    assert done.stdout.split() == ["eval"]
    done = shell(_FUNCLORA_COMPLETE="complete_bash", COMP_WORDS="funclora combine --type dare_l", COMP_CWORD="3")
    assert done.stdout.split() == ["dare_linear", "dare_linear_svd"]


# Lists, flags and types


def listed(*args: str) -> Result:
    def toy(
        weights: Annotated[Sequence[float] | None, typer.Option("--weights", "--weight", help="Numbers.")] = None,
        files: Annotated[Sequence[Path], typer.Option(help="Files.")] = (Path("a"),),
        says: Annotated[Sequence[Whole] | None, typer.Option(help="Texts.")] = None,
        check: Annotated[bool, typer.Option(help="A flag.")] = False,
        json: AsJson = False,
    ) -> None:
        """Toy."""
        print_json([weights, [str(file) for file in files], says, check])

    return made(toy, "toy", *args)


def test_lists_take_commas_and_repetitions(tmp_path: Path) -> None:
    (tmp_path / "b,c").touch()
    given = [
        "--weights",
        "1,-2.5",
        "--weight",
        "3",
        "--files",
        "x, y",
        "--files",
        str(tmp_path / "b,c"),
        "--says",
        "a, b",
    ]
    result = listed(*given, "--check")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == [[1.0, -2.5, 3.0], ["x", "y", str(tmp_path / "b,c")], ["a, b"], True]
    assert json.loads(listed("--no-check").stdout) == [None, ["a"], None, False]
    assert "--check: given twice" in listed("--check", "--no-check").stderr
    for words, message in [("1,x", "expected numbers with commas"), ("1,,2", "expected values with commas")]:
        result = listed("--weights", words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"funclora toy: --weights: {message} between them, got '{words}'.")


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_has_two_forms_and_every_type_one_spelling(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            (long,) = [option for option in parameter.opts if option.startswith("--")][:1]
            assert parameter.secondary_opts == ([f"--no-{long[2:]}"] if parameter.is_flag else []), long
    text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output.partition("Examples:")[0]
    assert not re.search(r"\b(INTEGER|NUMBER|STRING|<path>|list\[)|\belse\b", text), text

"""The page of a session, run from its first line to its last in an empty folder; what is printed is what it shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import DOCS, ROOT, blocks
from typer.testing import CliRunner

from funclora.cli._app import app

PAGE = DOCS / "session.md"
# Told every ten seconds: how often depends on the machine.
NOW_AND_THEN = re.compile(r"^step \d+ of \d+: .*$")
# A run in the background is killed as soon as it has written a file. There it waits for that, however fast it is.
UNTIL = re.compile(r"until \[ -f (\S+) \];.* kill -9")
WAITS = """
import pathlib, signal; replace = pathlib.Path.replace
def replace_and_wait(self, target):
    replace(self, target)
    if str(target).endswith("{file}"): signal.pause()
pathlib.Path.replace = replace_and_wait
"""
NUMBER = re.compile(r"[-+]?\d[\d,]*\.\d+(?:e[-+]\d+)?")
CLI = "import sys; sys.argv[0] = 'funclora'; from funclora.cli import main; main()"


def steps(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what it prints."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
    assert not parts[0]
    yield from zip(parts[1::2], parts[2::2], strict=True)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if not NOW_AND_THEN.match(line)]


def same(command: str, printed: str, shown: str) -> None:
    """Words and whole numbers are equal, other numbers nearly: processors round differently."""
    got, wanted = lines(printed), lines(shown)
    for a, b in zip(got, wanted, strict=False):
        assert re.sub(r"\s+", " ", NUMBER.sub("#", a)) == re.sub(r"\s+", " ", NUMBER.sub("#", b)), command
        numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(line)] for line in (a, b)]
        # Deviations and differences by rounding are small, and of any size.
        rounding = "deviation" in "".join(wanted) or "logits" in b
        assert rounding or numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=0.05), f"{command}: {a!r}, {b!r}"
    assert len(got) == len(wanted), f"{command}\n{printed}"


def spoken(command: str, together: list[str]) -> str:
    """What a command prints: funclora's in this process, which has its libraries already; all else in a shell."""
    words = shlex.split(command)
    if not together and words[0] == "funclora" and not {"&", ">", "|"} & set(words):
        result = CliRunner().invoke(app, words[1:], env={"COLUMNS": "80"})
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
        return result.output
    program, file = shlex.quote(sys.executable), UNTIL.search(command)
    cli = (WAITS.format(file=file[1]) if file else "") + CLI
    script = [
        f'python() {{ {program} "$@"; }}',
        f'funclora() {{ exec {program} -c {shlex.quote(cli)} "$@"; }}',
        *together,
        command,
        "{ wait; } 2> /dev/null",  # until what was killed is gone
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def run_page(page: Path) -> list[str]:
    """Write the files of a page and run its commands, in the working directory; the commands."""
    ran: list[str] = []
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.code, encoding="utf-8")
            continue
        if block.language == "json":  # a line of a file
            continue
        if block.language == "python":
            exec(block.code, {})
            continue
        assert block.language == "console", block.place
        together: list[str] = []  # a command in the background and the next one are one job
        for command, shown in steps(block.code):
            if command.endswith(" &"):
                assert not shown
                together.append(command)
                continue
            same(command, spoken(command, together), shown)
            together = []
            ran.append(command)
        assert not together
    return ran


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
@pytest.mark.parametrize(
    ("page", "commands"),
    [
        ("classification", {"train", "eval", "predict"}),
        ("embeddings", {"train", "eval", "predict"}),
        ("preferences", {"train", "eval", "generate", "merge"}),
    ],
)
def test_a_page_runs_with_the_model_that_the_session_makes(
    page: str, commands: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (script,) = (block.code for block in blocks(PAGE) if block.title == "make.py")
    Path("make.py").write_text(script, encoding="utf-8")
    spoken("python make.py 2> log", [])
    ran = run_page(DOCS / f"{page}.md")
    assert commands <= {command.split()[1] for command in ran if command.startswith("funclora ")}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
def test_the_session_runs_as_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run_page(PAGE)
    assert {"train", "inspect", "diff", "eval", "generate", "merge"} <= {
        command.split()[1] for command in ran if command.startswith("funclora ")
    }
    assert any("--adapter english/adapter" in command for command in ran if command.startswith("funclora train"))


@pytest.mark.parametrize(
    ("printed", "shown"),
    [("Moo!", "Meuh!"), ("5 rows", "6 rows"), ("loss 0.3", "loss 0.9"), ("a\nb", "a"), ("a", "a\nb")],
)
def test_what_is_not_as_shown_is_found(printed: str, shown: str) -> None:
    same("it", printed, printed)
    with pytest.raises(AssertionError, match="it"):
        same("it", printed, shown)

"""The commands in the README and on the pages of the documentation exist, and take the options that they are given."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pages import PAGES, ROOT, Block, blocks
from typer.main import get_command
from typer.testing import CliRunner

import funclora as fl
from funclora.cli._app import app

RUN = {"combine", "convert", "merge"}  # on the pages of PLACES, for real; of the others, the words are checked
PLACES = {
    "merging.md": ("BASE", {"ADAPTER": 0, "OTHER": 1}),
    "combining.md": ("base", {"adapters/math": 0, "adapters/code": 1}),
    "gguf.md": ("Llama-3.2-1B", {"adapter": 0}),
}
NOT_OURS = {
    "llama-cli",
    "vllm",
    "curl",
    "nginx",
    "mkdir",
    "cp",
    "mv",
    "head",
    "ls",
    "until",
}  # the last with what it waits for and does then, in one line


class Command(NamedTuple):
    """A command of a page, cut into words; the first one is the program."""

    block: Block
    words: list[str]

    def __str__(self) -> str:
        return f"{self.block.place}: {shlex.join(self.words)}"


def commands(page: Path) -> list[Command]:
    found = []
    for block in blocks(page):
        lines = block.code.replace("\\\n", " ").splitlines()
        if block.language == "console":  # the others are what was printed
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif block.language != "sh":
            continue
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            # What a shell does with the rest is no argument: output into a file, into a program, the background.
            words = words[
                : next((i for i, word in enumerate(words) if word in (">", "|", "2>", "2>&1", "&")), len(words))
            ]
            if words:
                found.append(Command(block, words))
    return found


def named(page: Path) -> Any:
    return pytest.param(page, id=str(page.relative_to(ROOT)))


def make(command: Command) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(command.words[1:]) <= set(targets), str(command)


def pip(command: Command) -> None:
    assert command.words[1] == "install", str(command)
    extras = re.findall(r"^([a-z]+) = \[$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    for word in command.words[2:]:
        if match := re.fullmatch(r"(?:\.|funclora)(?:\[([a-z,]+)\])?", word):
            assert set((match[1] or extras[0]).split(",")) <= set(extras), str(command)
        else:
            assert word == "llama-cpp-python", str(command)  # which no extra installs


def python(command: Command) -> None:
    shown = [block for block in blocks(command.block.page) if block.title == command.words[1]]
    if shown:  # a script that the page shows
        assert shown[0].line < command.block.line, str(command)
        return
    script = ROOT / command.words[1]
    assert script.parent == ROOT / "examples", str(command)
    text = script.read_text(encoding="utf-8")
    for option in (word.partition("=")[0] for word in command.words[2:] if word.startswith("-")):
        assert f'"{option}"' in text, f"{command}: {option} is no option of it"


def jupyter(command: Command) -> None:
    assert command.words[1:2] == ["execute"], str(command)
    assert (ROOT / command.words[-1]).exists(), str(command)


def pytest_(command: Command) -> None:
    assert command.words[1] == "-m", str(command)
    assert f'"{command.words[2]}: ' in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), str(command)


def complaint(words: list[str]) -> str:
    """What the command line has to say of the words after `funclora`; nothing runs, and files may be missing."""

    def leaves(command: Any) -> Iterator[Any]:
        for each in getattr(command, "commands", {}).values():
            yield from leaves(each)
        if not hasattr(command, "commands"):
            yield command

    application: Any = get_command(app)
    for command in leaves(application):
        command.callback = lambda **options: None
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            application.main(args=list(words), prog_name="funclora")
        except SystemExit as end:
            return said.getvalue() if end.code and "does not exist" not in said.getvalue() else ""
    return ""


def torchrun(command: Command) -> None:
    """A command in several processes."""
    start = command.words.index("-m")
    assert command.words[start + 1] == "funclora", str(command)
    said = complaint(command.words[start + 2 :])
    assert not said, f"{command}: {said}"


PROGRAMS: dict[str, Callable[[Command], None]] = {
    "make": make, "pip": pip, "python": python, "pytest": pytest_, "jupyter": jupyter, "torchrun": torchrun,
}  # fmt: skip


@pytest.mark.parametrize("page", [named(page) for page in PAGES if commands(page)])
def test_the_commands_of_a_page_exist(page: Path) -> None:
    for command in commands(page):
        program = command.words[0]
        if program == "funclora":
            said = complaint(command.words[1:])
            assert not said, f"{command}: {said}"
        elif program not in NOT_OURS:
            assert program in PROGRAMS, f"{command}: no test knows {program!r}"
            PROGRAMS[program](command)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge", "BASE", "ADAPTER", "-o", "OUT", "--verfy"], "No such option"),
        (["merge", "BASE", "ADAPTER"], "Missing option"),
        (["murge", "BASE"], "No such command"),
        (["convert", "a", "-o", "b", "--base", "c", "--to", "onnx"], "is not"),
    ],
    ids=["option", "missing", "command", "choice"],
)
def test_a_command_that_is_wrong_is_found(words: list[str], said: str) -> None:
    assert said in complaint(words)


@pytest.mark.parametrize("name", PLACES)
def test_the_commands_of_a_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    base, adapters = PLACES[name]
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model.save_pretrained(base)
    for folder, seed in adapters.items():
        config = fl.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        fl.save_peft(folder, fl.init(model, config, generator=torch.Generator().manual_seed(seed)), config)
    (page,) = (page for page in PAGES if page.name == name)
    ran = [command for command in commands(page) if command.words[0] == "funclora" and command.words[1] in RUN]
    assert ran
    for command in ran:
        out = Path(command.words[command.words.index("-o") + 1])
        if out.is_dir():  # as the page shows other ways to the same place
            shutil.rmtree(out)
        result = CliRunner().invoke(app, command.words[1:])
        assert result.exit_code == 0, f"{command}: {result.output}"
        assert out.exists() == ("--dry-run" not in command.words), str(command)

"""The page of `funclora serve`: what it shows is run, from the training to the balancer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import task_models
import text_models
from pages import DOCS, ROOT, blocks
from typer.testing import CliRunner

import funclora as fl
from funclora._apps.serve.metrics import metrics_text
from funclora._apps.serve.options import _COMMON
from funclora.cli._app import app
from funclora.demo.model import load_base
from funclora.serving import Engine

PAGE = DOCS / "serve.md"
TEXT = PAGE.read_text(encoding="utf-8")
WAIT = 120.0  # seconds, much more than anything here takes
MAIN = "import sys; sys.argv[0] = 'funclora'; from funclora.cli import main; main()"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page builds until it serves."""
    monkeypatch.chdir(tmp_path)
    task_models.save(Path("model"), "llama", template=text_models.PLAIN)
    for block in blocks(PAGE):
        if block.title:
            Path(block.title).write_text(block.code, encoding="utf-8")
    for block in blocks(PAGE):
        if block.language == "sh":
            for words in map(shlex.split, block.code.splitlines()):
                if words[:2] == ["funclora", "serve"]:
                    return tmp_path
                if words[0] == "funclora":
                    result = CliRunner().invoke(app, words[1:])
                    assert result.exit_code == 0, f"{words}\n{result.output}"
                elif words[0] != "pip":
                    subprocess.run(words, check=True)
    raise AssertionError("the page serves nothing")


@contextlib.contextmanager
def served(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command in a process of its own, and what it prints when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", *options, "--port", "0", "--json", "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = ""
        while not lines.endswith("}\n"):
            line = process.stdout.readline()
            assert line, process.communicate()
            lines += line
        yield process, json.loads(lines)
    finally:
        process.kill()
        process.communicate()


def test_the_page_runs(folder: Path) -> None:
    with served("model", "--adapters", "adapters") as (process, facts):
        assert (facts["model"], facts["adapters"]) == ("model", ["casual", "formal"])
        done = subprocess.run(
            [sys.executable, "ask.py"],
            env={**os.environ, "FUNCLORA_URL": facts["url"]},
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=True,
        )
        assert done.stdout.startswith("['model', 'casual', 'formal']\nmodel ")
        asked = re.findall(r"^\$ (curl .*)$", TEXT, re.MULTILINE)
        assert len(asked) == 2
        for command in asked if shutil.which("curl") else ():
            words = shlex.split(command.replace("http://127.0.0.1:8000", facts["url"]))
            said = subprocess.run([*words, "-s"], capture_output=True, text=True, timeout=WAIT, check=True).stdout
            if said.startswith("data:"):
                assert said.endswith("data: [DONE]\n\n")
            else:
                assert json.loads(said)["choices"][0]["message"]["role"] == "assistant"
        moves = next(block for block in blocks(PAGE) if "adapters/.formal" in block.code)
        for words in map(shlex.split, moves.code.splitlines()):
            subprocess.run(words, check=True)
        listed = httpx.get(f"{facts['url']}/v1/models", trust_env=False).json()["data"]
        assert [model["id"] for model in listed] == ["model", "casual", "formal"]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=WAIT)
        assert (process.returncode, out, err) == (0, "", "")
    after = next(i for i, block in enumerate(blocks(PAGE)) if "funclora merge" in block.code)
    for block in list(blocks(PAGE))[after:]:
        if block.language == "sh":
            for words in map(shlex.split, block.code.splitlines()):
                result = CliRunner().invoke(app, words[1:])
                assert result.exit_code == 0, f"{words}\n{result.output}"


def test_ctrl_c_and_keys(tmp_path: Path) -> None:
    task_models.save(tmp_path / "model", "llama", template=text_models.PLAIN)
    with served(str(tmp_path / "model"), FUNCLORA_API_KEY="secret") as (process, facts):
        assert httpx.get(f"{facts['url']}/v1/models", trust_env=False).status_code == 401
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT)
        assert (process.returncode, err) == (130, "funclora serve: stopped. All answers have ended.\n")


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_the_balancer_keeps_an_adapter_at_one_server(folder: Path) -> None:
    (block,) = (block for block in blocks(PAGE) if block.title == "nginx.conf")
    (port,) = free_ports(1)
    with (
        served("model", "--adapters", "adapters") as (one, first),
        served("model", "--adapters", "adapters") as (_, second),
    ):
        config = block.code.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        for shown, facts in (("8001", first), ("8002", second)):
            assert f"127.0.0.1:{shown}" in config
            config = config.replace(f"127.0.0.1:{shown}", facts["url"].removeprefix("http://"))
        Path("nginx.conf").write_text(config)
        nginx = subprocess.Popen(
            ["nginx", "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", str(folder / "error.log"), "-g",
             f"daemon off; pid {folder}/nginx.pid;"],
            stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            ask_the_balancer(f"http://127.0.0.1:{port}", [first["url"], second["url"]], one)
        finally:
            nginx.terminate()
            nginx.communicate(timeout=WAIT)


def ask_the_balancer(url: str, servers: list[str], one: subprocess.Popen[str]) -> None:
    with httpx.Client(trust_env=False, timeout=WAIT) as client:

        def counts(server: str) -> float:
            text = client.get(f"{server}/metrics").text
            found = re.search(r'requests_total\{path="/v1/completions",status="200"\} (\d+)', text)
            return float(found[1]) if found else 0

        def ask(name: str) -> list[float]:
            before = [counts(server) for server in servers]
            for stream in (False, True):
                asked = {"model": "formal", "prompt": "x", "max_tokens": 4, "stream": stream}
                response = client.post(f"{url}/v1/completions", json=asked, headers={"X-Model": name})
                assert response.status_code == 200, response.text
            return [counts(server) - n for server, n in zip(servers, before, strict=True)]

        end = time.monotonic() + WAIT
        while True:
            with contextlib.suppress(httpx.TransportError):
                client.get(f"{url}/health")
                break
            assert time.monotonic() < end
        places = [ask(f"name-{i}") for i in range(12)]
        assert all(sorted(place) == [0, 2] for place in places)
        assert len({tuple(place) for place in places}) == 2
        assert [ask(f"name-{i}") for i in range(12)] == places
        one.send_signal(signal.SIGTERM)
        one.communicate(timeout=WAIT)
        servers.pop(0)
        assert [ask(f"name-{i}") for i in range(4)] == [[2]] * 4  # the other one answers for it


def test_the_page_names_what_there_is() -> None:
    for option in _COMMON:
        assert f"`{option}`" in TEXT

    model = load_base()
    engine = Engine(model, fl.base_params(model), {})
    text = metrics_text(Counter(), engine.statistics())
    names = re.findall(r"^# TYPE funclora_(\w+)", text, re.MULTILINE)
    table = TEXT.partition("## Metrics")[2].partition("If `queue_length`")[0].partition("|---|")[2]
    listed = re.findall(r"`(\w+)`", table)
    assert sorted(listed) == sorted(names)
    options = set(re.findall(r"`(--[a-z-]+)", TEXT))
    helped = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert all(option in helped for option in options), options

"""The access log: one line for each request, with numbers and without what was said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import openai
import pytest
from running_server import running, save_all

LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (?P<method>\S+) (?P<path>\S+) status=(?P<status>\S+) model=(?P<model>\S+) "
    r"prompt=(?P<prompt>\S+) completion=(?P<completion>\S+) queue=(?P<queue>\S+) first=(?P<first>\S+) "
    r"total=(?P<total>\S+)"
)
KEY, SECRET = "the-right-key", "a secret word"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("served"), 1)


def test_a_line_for_each_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: Any = {"model": "ad-0", "prompt": SECRET, "max_tokens": 7, "temperature": 0}
    with running(folder, access_log=True, key=KEY) as run:
        whole = run.client.completions.create(**asked, n=2)
        parts = [*run.client.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
        run.http.get("/health")
        run.http.get("/metrics", headers={"Authorization": f"Bearer {KEY}x"})
        run.http.get(f"/nothing%0Astatus=200/{'x' * 300}")
        run.http.post("/v1/completions", json={**asked, "model": f"{SECRET}\nx"})
        run.http.post("/v1/completions", json={**asked, "n": 0})
        with pytest.raises(openai.BadRequestError, match="messages"):
            run.client.chat.completions.create(model="ad-0", messages=[])
    written = capsys.readouterr().err
    assert SECRET not in written
    assert "secret" not in written
    assert KEY not in written
    lines = [LINE.fullmatch(line) for line in written.splitlines()]
    assert all(lines), written
    found = [line.groupdict() for line in lines if line]
    assert whole.usage is not None
    assert parts[-1].usage is not None
    # A line comes after its answer, so the next request may be ahead of it.
    answered, refused = ([line for line in found if (line["model"] == "ad-0") == right] for right in (True, False))
    counts = [(usage.prompt_tokens, usage.completion_tokens) for usage in (whole.usage, parts[-1].usage)]
    assert sorted((int(line["prompt"]), int(line["completion"])) for line in answered) == sorted(counts)
    for line in answered:
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", "200")
        assert 0 <= float(line["queue"]) <= float(line["total"])
        assert 0 <= float(line["first"]) <= float(line["total"])
    short = {(line["method"], line["path"][:20], line["status"], line["model"], line["first"]) for line in refused}
    assert short == {
        ("GET", "/health", "200", "-", "-"),
        ("GET", "/metrics", "401", "-", "-"),
        ("GET", "/nothing%0Astatus%3D", "404", "-", "-"),
        ("POST", "/v1/completions", "404", "-", "-"),
        ("POST", "/v1/completions", "400", "-", "-"),
        ("POST", "/v1/chat/completions", "400", "-", "-"),
    }
    assert len(refused) == len(short)
    assert max(len(line["path"]) for line in refused) < 250


def test_nothing_is_written_unless_it_is_wanted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(folder) as run:
        run.client.completions.create(model="ad-0", prompt="x", max_tokens=2)
        run.http.get("/nothing")
    assert capsys.readouterr() == ("", "")

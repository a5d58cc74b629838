"""Whatever a client does wrong, or does while the server is busy, is told in OpenAI's form and harms nobody else."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running_server import WAIT, Alone, Running, running, save_adapter, save_all, until
from torch import Tensor

import funclora as fl
from funclora._apps.serve import body
from funclora._apps.serve.server import Server
from funclora._apps.serve.settings import Limits, ServeSettings
from funclora.errors import ConfigError, FuncloraWarning, OtherBaseWarning
from funclora.serving._batch import Batch

LONG: Any = {"prompt": "one and two", "max_tokens": 110, "temperature": 1, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("served"), 2)


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Running]:
    with running(folder, limits=Limits(max_tokens=120, body=4096)) as found:
        yield found


def told(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, which has OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    assert error["type"] == kind
    return dict(error)


COMPLETION: dict[str, Any] = {"model": "model", "prompt": "ab", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
# What is asked besides -> status, the field that is named, and words of the message.
WRONG = [
    ({"model": "ad-7"}, 404, "model", "Near names: ad-"),
    ({"model": "../adapters/ad-0"}, 404, "model", "There is no model"),
    ({"model": None}, 400, "model", "expected a text"),
    ({"prompt": []}, 400, "prompt", "1 to 128 prompts"),
    ({"prompt": [[]]}, 400, "prompt", "a text, a list of token ids"),
    ({"prompt": [1, 10_000]}, 400, "prompt", "token ids from 0 to"),
    ({"prompt": [-1]}, 400, "prompt", "token ids from 0 to"),
    ({"prompt": {"a": 1}}, 400, "prompt", "a text, a list of token ids"),
    ({"prompt": "x" * 127}, 400, "max_tokens", "the model's context has 128"),
    ({"prompt": "x" * 128, "max_tokens": None}, 400, None, "the model's context has 128"),
    ({"max_tokens": 0}, 400, "max_tokens", "from 1 to 120"),
    ({"max_tokens": 121}, 400, "max_tokens", "from 1 to 120"),
    ({"max_tokens": True}, 400, "max_tokens", "from 1 to 120"),
    ({"temperature": -0.1}, 400, "temperature", "from 0 to 2"),
    ({"temperature": "hot"}, 400, "temperature", "from 0 to 2"),
    ({"temperature": 1e-320}, 400, "temperature", "0, or a number from 1e-05 to 2"),
    ({"top_p": 0}, 400, "top_p", "from 1e-06 to 1"),
    ({"seed": -1}, 400, "seed", "a whole number"),
    ({"seed": 2**70}, 400, "seed", "a whole number"),
    ({"seed": 1.5}, 400, "seed", "a whole number"),
    ({"n": 0}, 400, "n", "from 1 to 128"),
    ({"n": 65, "prompt": ["a", "b"]}, 400, "n", "more than 128 answers"),
    ({"stop": ""}, 400, "stop", "none of them empty"),
    ({"stop": 0}, 400, "stop", "a text or a list of texts"),
    ({"stop": ["a", None]}, 400, "stop", "a text or a list of texts"),
    ({"stop": ["a"] * 17}, 400, "stop", "at most 16"),
    ({"stream": 1}, 400, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "with stream true"),
    ({"stream": True, "stream_options": {"other": True}}, 400, "other", "not supported"),
    ({"logprobs": 21}, 400, "logprobs", "from 0 to 20"),
    ({"echo": True}, 400, "echo", "supports only False"),
    ({"best_of": 2}, 400, "best_of", "supports only 1"),
    ({"suffix": "x"}, 400, "suffix", "supports only ''"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "supports only 0"),
    ({"logit_bias": {"1": 5}}, 400, "logit_bias", "supports only {}"),
    ({"top_k": 5}, 400, "top_k", "not supported by this server"),
    ({"guided_json": "{}"}, 400, "guided_json", "not supported by this server"),
    ({"chat_template": "{{ x }}"}, 400, "chat_template", "not supported by this server"),
]  # fmt: skip
WRONG_CHATS = [
    ({"messages": []}, "messages", "a list of messages"),
    ({"messages": "x"}, "messages", "a list of messages"),
    ({"messages": [1]}, "messages[0]", "an object"),
    ({"messages": [{"role": "user"}]}, "messages", "content: expected a text"),
    ({"messages": [{"role": "user", "content": "x", "weight": 0}]}, "messages[0]", "expected the fields"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0]", "as role one of system, developer, user"),
    ({"messages": [{"content": "x"}]}, "messages[0]", "as role one of system, developer, user"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "Only texts are supported"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, "max_tokens", "the model's context has 128"),
    ({"max_completion_tokens": 3}, "max_tokens", "contradict each other"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs true"),
    ({"tools": [{"type": "function"}]}, "tools", "supports only []"),
    ({"response_format": {"type": "json_object"}}, "response_format", "supports only"),
    ({"chat_template": "{{ x }}"}, "chat_template", "not supported by this server"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "not supported by this server"),
    ({"prompt": "x"}, "prompt", "not supported by this server"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "status", "param", "words"), WRONG, ids=lambda it: str(it)[:40])
def test_a_wrong_completion(run: Running, extra: Any, status: int, param: str | None, words: str) -> None:
    error = told(run.http.post("/v1/completions", json={**COMPLETION, **extra}), status)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(("extra", "param", "words"), WRONG_CHATS, ids=lambda it: str(it)[:40])
def test_a_wrong_chat(run: Running, extra: Any, param: str | None, words: str) -> None:
    error = told(run.http.post("/v1/chat/completions", json={**CHAT, **extra}), 400)
    assert error["param"] == param
    assert words in error["message"]


NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "u", "n": 1, "stop": None, "seed": None,
    "store": False, "service_tier": "auto",
}  # fmt: skip


def test_what_asks_for_nothing_is_accepted(run: Running) -> None:
    chat = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "top_logprobs": 0,
        "logprobs": False,
    }
    assert run.http.post("/v1/chat/completions", json={**CHAT, **NEUTRAL, **chat}).status_code == 200
    plain = {"best_of": 1, "echo": False, "suffix": None, "logprobs": None}
    assert run.http.post("/v1/completions", json={**COMPLETION, **NEUTRAL, **plain}).status_code == 200


BODIES = [
    (b"{", 400, "expected JSON"),
    (b"[]", 400, "a JSON object"),
    (b'{"a": NaN}', 400, "NaN is not a number"),
    (b'{"model": "a", "model": "b"}', 400, "appears twice"),
    (b'{"model": "\xff"}', 400, "is not UTF-8"),
    (rb'{"model": "model", "prompt": "\ud800"}', 400, "surrogate"),
    (b"[" * 100_000, 413, "4,096 bytes"),
    (b"[" * 4000, 400, "expected JSON"),
]


@pytest.mark.parametrize(("content", "status", "words"), BODIES, ids=lambda it: str(it)[:20])
def test_a_wrong_body(run: Running, content: bytes, status: int, words: str) -> None:
    response = run.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert words in told(response, status)["message"]


def test_a_body_of_unknown_length_is_bounded_too(run: Running) -> None:
    parts = (b" " * 1000 for _ in range(100))
    with contextlib.suppress(httpx.WriteError):  # the server may close before all is sent
        response = run.http.post("/v1/completions", content=parts, headers={"Content-Type": "application/json"})
        told(response, 413)


def test_pages_of_other_sites_cannot_ask(run: Running) -> None:
    """A form of another site can send texts, and another site's name can be made to lead here."""
    response = run.http.post("/v1/completions", content=json.dumps(COMPLETION), headers={"Content-Type": "text/plain"})
    assert "application/json" in told(response, 415)["message"]
    assert told(run.http.get("/v1/models", headers={"Host": "evil.example"}), 403)["code"] == "host"
    assert run.http.get("/v1/models", headers={"Host": "localhost:80"}).status_code == 200


def test_paths_and_methods(run: Running) -> None:
    told(run.http.get("/v1/nothing"), 404)
    told(run.http.get("/v1/completions"), 405)
    told(run.http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "ad-0"}), 404)
    told(run.http.get("/v1/models/nothing"), 404)
    told(run.http.get("/v1/models/"), 404)


def test_a_client_that_sends_nothing_is_left(run: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", int(run.server.url.rpartition(":")[2])), WAIT) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


def test_the_client_knows_the_errors(run: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'x'"):
        run.client.completions.create(model="x", prompt="a")
    with pytest.raises(openai.BadRequestError, match="top_k"):
        run.client.completions.create(model="model", prompt="a", extra_body={"top_k": 3})


# Keys


def test_keys(folder: Path) -> None:
    with running(folder, key="right-Key") as run:
        assert run.client.models.list().data
        for given in (
            "Bearer wrong",
            "Bearer right-Key2",
            "Bearer right-Ke",
            "Bearer",
            "right-Key",
            "Basic right-Key",
            "",
        ):
            for path in ("/v1/models", "/metrics", "/nothing"):
                response = run.http.get(path, headers={"Authorization": given})
                assert told(response, 401)["code"] == "invalid_api_key"
                assert response.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/", "/page.js", "/page.css", "/health"):
            assert run.http.get(path, headers={"Authorization": ""}).status_code == 200
        assert run.http.get("/v1/models", headers={"Host": "served.example"}).status_code == 200


def test_without_a_key_everybody_is_warned_of() -> None:
    with pytest.warns(FuncloraWarning, match="everybody who reaches 0.0.0.0 can use the server"):
        Server(ServeSettings(host="0.0.0.0", port=0, device="cpu"))._socket.close()


# Load


def test_a_full_queue(folder: Path) -> None:
    with running(folder, max_rows=1, max_queue=1) as run:
        statistics = run.engine.statistics

        def ask() -> Any:
            return [*run.client.completions.create(model="ad-0", **LONG, stream=True)]

        pool = ThreadPoolExecutor(2)
        streams = [pool.submit(ask)]
        until(lambda: statistics().running == 1 or streams[0].done())
        streams.append(pool.submit(ask))
        until(lambda: statistics().requests == 2)
        response = run.http.post("/v1/completions", json={"model": "ad-1", **LONG})
        if not streams[0].done():  # a very slow machine
            assert told(response, 429)["code"] == "queue_full"
            assert response.headers["Retry-After"] == "1"
        for stream in streams:
            assert stream.result(WAIT)
        # Of several answers to one request either all are accepted or none.
        told(run.http.post("/v1/completions", json={"model": "ad-1", **LONG, "n": 5}), 429)
        until(lambda: statistics().running + statistics().waiting == 0)
        assert run.http.post("/v1/completions", json={"model": "ad-1", **LONG}).status_code == 200


def test_who_goes_away_frees_the_row(folder: Path) -> None:
    with running(folder, max_rows=1) as run:
        statistics = run.engine.statistics
        asked = {
            "model": "ad-0",
            **LONG,
            "temperature": 0,
            "n": 64,
        }  # many, one after the other: no machine is through before it notices

        def nothing_is_left() -> bool:
            return statistics().running + statistics().waiting == 0

        with run.http.stream("POST", "/v1/completions", json={**asked, "stream": True}) as response:
            next(response.iter_lines())
        until(nothing_is_left)
        assert statistics().finished["cancelled"] > 32
        # And one that waits for the whole answer.
        with socket.create_connection(("127.0.0.1", int(run.server.url.rpartition(":")[2])), WAIT) as client:
            content = json.dumps(asked).encode()
            head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            client.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + content)
            until(lambda: statistics().requests == 128)
        until(nothing_is_left)
        assert statistics().finished["cancelled"] > 64
        assert run.http.post("/v1/completions", json=COMPLETION).status_code == 200


def test_an_answer_that_takes_too_long(folder: Path) -> None:
    with running(folder, limits=Limits(seconds=0.02)) as run:
        assert told(run.http.post("/v1/completions", json={"model": "ad-0", **LONG}), 504)["code"] == "timeout"
        lines = run.http.post("/v1/completions", json={"model": "ad-0", **LONG, "stream": True}).text
        assert "0.02 seconds" in lines
        until(lambda: run.engine.statistics().running == 0)


# Adapters that are broken, replaced, hidden, or somewhere else


def test_a_broken_adapter_harms_its_own_requests_only(tmp_path: Path) -> None:
    folder = save_all(tmp_path, 2)
    broken = folder / "adapters" / "broken"
    shutil.copytree(folder / "adapters" / "ad-0", broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    alone = Alone(folder)
    with running(folder) as run:

        def ask(model: str) -> httpx.Response:
            return run.http.post(
                "/v1/completions", json={"model": model, "prompt": "a b", "max_tokens": 30, "temperature": 0}
            )

        with ThreadPoolExecutor(6) as pool:
            found = [*pool.map(ask, ["broken", "ad-0", "broken", "ad-1", "model", "broken"])]
        for response in (found[0], found[2], found[5]):
            error = told(response, 422)
            assert error["code"] == "adapter_unusable"
            assert "adapter_model.safetensors" in error["message"]
            assert str(tmp_path) not in error["message"]
        for response, name in zip((found[1], found[3], found[4]), ("ad-0", "ad-1", None), strict=True):
            assert response.json()["choices"][0]["text"] == alone.text("a b", name, 30)
        streamed = run.http.post("/v1/completions", json={"model": "broken", "prompt": "a", "stream": True})
        told(streamed, 422)  # before anything was sent


def test_a_folder_that_is_replaced(tmp_path: Path) -> None:
    """Requests that come after it get the new version; those that run keep theirs. So it is after a restart."""
    folder = save_all(tmp_path, 2)
    own, other = folder / "adapters" / "ad-0", folder / "other"
    save_adapter(folder / "model", other, 17, dora=True)
    asked: Any = {"model": "ad-0", "prompt": "a b", "max_tokens": 60, "temperature": 0}
    before = Alone(folder).text("a b", "ad-0", 60)
    with running(folder) as run:
        stream = run.client.completions.create(**asked, stream=True)
        first = next(stream).choices[0].text
        own.rename(folder / "old")
        other.rename(own)
        assert first + "".join(part.choices[0].text for part in stream) == before
        after = Alone(folder).text("a b", "ad-0", 60)
        assert after != before
        assert run.client.completions.create(**asked).choices[0].text == after
        shutil.rmtree(own)
        with pytest.raises(openai.NotFoundError, match="no model 'ad-0'"):
            run.client.completions.create(**asked)
        assert [model.id for model in run.client.models.list()] == ["model", "ad-1"]
    (folder / "old").rename(own)
    with running(folder) as run:
        assert run.client.completions.create(**asked).choices[0].text == before


def test_names_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = save_all(tmp_path, 1)
    outside = tmp_path / "outside"
    shutil.copytree(folder / "adapters" / "ad-0", outside)
    root = folder / "adapters"
    (root / "link").symlink_to(outside)
    (root / "versions").mkdir()
    (root / "inside").symlink_to(root / "ad-0")  # as deployments switch versions
    half = root / "half"
    half.mkdir()
    shutil.copy(outside / "adapter_config.json", half)
    (half / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    with running(folder, loading=True) as run:
        assert [model.id for model in run.client.models.list()] == ["model", "ad-0", "inside"]
        for name in (
            "link",
            "half",
            "../outside",
            str(outside),
            "ad-0/../../outside",
            "..",
            ".",
            ".coming",
            "versions",
            "ad-0/",
            "x\x00",
        ):
            told(run.http.post("/v1/completions", json={**COMPLETION, "model": name}), 404)
        assert run.http.post("/v1/completions", json={**COMPLETION, "model": "inside"}).status_code == 200
        for path in ("link", "half", "../outside", str(outside), "", "..", "/", str(root), "ad-0/../../outside"):
            told(run.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path}), 400)


def test_loading_and_unloading(tmp_path: Path) -> None:
    folder = save_all(tmp_path, 2)
    alone = Alone(folder)
    with running(folder, loading=True) as run:

        def load(name: str, path: str) -> httpx.Response:
            return run.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})

        def unload(name: str) -> httpx.Response:
            return run.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

        def names() -> list[str]:
            return [model.id for model in run.client.models.list()]

        assert load("sql", str(folder / "adapters" / "ad-0")).json()["id"] == "sql"
        assert run.engine.statistics().cache_adapters == 1
        assert names() == ["model", "ad-0", "ad-1", "sql"]
        found = run.client.completions.create(model="sql", prompt="a b", max_tokens=9, temperature=0)
        assert found.choices[0].text == alone.text("a b", "ad-0", 9)
        assert "already the name" in told(load("sql", "ad-1"), 400)["message"]
        assert "already the name" in told(load("ad-1", "ad-0"), 400)["message"]
        told(load("model", "ad-0"), 400)
        assert load("sql", "ad-0").status_code == 200
        assert unload("sql").json()["deleted"]
        told(unload("sql"), 404)
        assert unload("ad-0").status_code == 200
        assert names() == ["model", "ad-1"]
        assert run.engine.statistics().cache_adapters == 0
        told(run.http.post("/v1/completions", json={**COMPLETION, "model": "ad-0"}), 404)
        assert load("ad-0", "ad-0").status_code == 200
        assert names() == ["model", "ad-0", "ad-1"]
        told(unload("model"), 400)
        weights = folder / "adapters" / "ad-1" / "adapter_model.safetensors"
        weights.write_bytes(b"")
        assert told(load("bad", "ad-1"), 422)["code"] == "adapter_unusable"
        assert names() == ["model", "ad-0", "ad-1"]
        told(load("ad-1", "ad-1"), 422)
        assert names() == ["model", "ad-0", "ad-1"]


def test_a_name_that_two_want(tmp_path: Path) -> None:
    folder = save_all(tmp_path, 2)
    alone = Alone(folder)
    with running(folder, loading=True) as run, ThreadPoolExecutor(8) as pool:

        def load(i: int) -> int:
            asked = {"lora_name": "new", "lora_path": f"ad-{i % 2}"}
            return run.http.post("/v1/load_lora_adapter", json=asked).status_code

        found = [*pool.map(load, range(8))]
        winner = 0 if found[0] == 200 else 1
        assert found == [200 if i % 2 == winner else 400 for i in range(8)]
        answer = run.client.completions.create(model="new", prompt="a b", max_tokens=9, temperature=0)
        assert answer.choices[0].text == alone.text("a b", f"ad-{winner}", 9)
        (folder / "adapters" / f"ad-{winner}").rename(folder / "gone")
        assert [model.id for model in run.client.models.list()] == ["model", f"ad-{1 - winner}"]


def test_a_failure_of_the_server_is_told_to_its_owner(
    run: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: Batch, count: int | None = None) -> Tensor:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "read", fails)
        error = told(run.http.post("/v1/completions", json=COMPLETION), 500)
    assert error["code"] == "internal_error"
    assert "device" not in error["message"]
    assert "the device is gone" in caplog.text
    assert run.http.post("/v1/completions", json=COMPLETION).status_code == 200


def test_an_adapter_of_another_base_is_told_once(tmp_path: Path) -> None:
    folder = save_all(tmp_path, 1)
    file = folder / "adapters" / "ad-0" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": "another-model"}))
    asked = {**COMPLETION, "model": "ad-0"}
    with running(folder) as run:
        with pytest.warns(OtherBaseWarning, match="names 'another-model'"):
            assert run.http.post("/v1/completions", json=asked).status_code == 200
        assert run.http.post("/v1/completions", json=asked).status_code == 200  # a warning would be an error


# The start and the end


def test_a_server_that_stops_lets_answers_end(folder: Path) -> None:
    expected = Alone(folder).text("a b", "ad-0", 100)
    with running(folder) as run:
        asked: Any = {"model": "ad-0", "prompt": "a b", "max_tokens": 100, "temperature": 0, "stream": True}
        stream = run.client.completions.create(**asked)
        text = next(stream).choices[0].text
        run.server.stop()
        text += "".join(part.choices[0].text for part in stream)
        assert text == expected
        until(lambda: not run.engine.alive)
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            run.client.completions.create(**asked | {"stream": False})


def test_a_server_without_patience_ends_streams_with_an_error(folder: Path) -> None:
    with running(folder, grace=0.0, max_rows=1) as run:
        asked = {"model": "ad-0", **LONG, "n": 64, "stream": True}
        with run.http.stream("POST", "/v1/completions", json=asked) as response:
            lines = response.iter_lines()
            next(lines)
            run.server.stop()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
        until(lambda: run.engine.statistics().running == 0)


def test_a_port_that_is_taken(folder: Path) -> None:
    with running(folder) as run:
        port = int(run.server.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"--port: 127.0.0.1:{port} cannot be used"), running(folder, port=port):
            pass


def test_what_cannot_be_served(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"), running(folder, adapters=tmp_path / "none"):
        pass
    with (
        pytest.raises(ConfigError, match="has an adapter 'ad-0', and this is the base's name"),
        running(folder, name="ad-0"),
    ):
        pass
    with pytest.raises(fl.errors.FormatError, match="is not a directory"), running(folder, base=tmp_path / "none"):
        pass

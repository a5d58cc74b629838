"""`Stream`, `Token` and `Settings`: what a request says and how its answer comes."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from funclora.errors import ConfigError
from funclora.serving import Settings, Stream, Token


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_tokens", 0, "a positive int, got 0"),
        ("max_tokens", True, "a positive int, got True"),
        ("max_tokens", 1.5, "a positive int, got 1.5"),
        ("temperature", -0.1, "0, or a finite number of at least 1e-05, got -0.1"),
        ("temperature", float("nan"), "0, or a finite number of at least 1e-05, got nan"),
        ("temperature", "hot", "0, or a finite number of at least 1e-05, got 'hot'"),
        ("temperature", 1e-320, "0, or a finite number of at least 1e-05, got "),
        ("top_p", 0, "a number greater than 0 and at most 1, got 0"),
        ("top_p", 1.01, "a number greater than 0 and at most 1, got 1.01"),
        ("seed", -1, "None or an int from 0 to"),
        ("seed", 2**63, "None or an int from 0 to"),
        ("stop_ids", 5, "a tuple of token ids, got 5"),
        ("stop_ids", ("a",), "a tuple of token ids"),
        ("logprobs", -1, "None or an int of at least 0, got -1"),
        ("logprobs", True, "None or an int of at least 0, got True"),
    ],
)
def test_settings_name_the_field(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: expected {expected}"):
        Settings(**{field: value})


def test_a_list_of_stop_ids_is_a_tuple() -> None:
    some: Any = [1, 2]
    assert Settings(stop_ids=some) == Settings(stop_ids=(1, 2))


def test_everyone_gets_all_tokens() -> None:
    stream = Stream(lambda: None)
    early: list[Token | None] = []
    late: list[Token | None] = []
    stream.add_callback(early.append)
    stream._put(Token(1))
    stream.add_callback(late.append)
    reading = threading.Thread(target=lambda: read.extend(stream))
    read: list[Token] = []
    reading.start()
    stream._put(Token(2))
    with pytest.raises(TimeoutError, match=r"within 0\.0 seconds"):
        stream.result(0.0)
    assert not stream.done
    stream._finish("stop")
    reading.join(60)
    assert read == [*stream] == [Token(1), Token(2)]
    assert early == late == [*read, None]
    after: list[Token | None] = []
    stream.add_callback(after.append)
    assert after == early
    assert (stream.result(0.0), stream.finish_reason, stream.done, stream.error) == ([1, 2], "stop", True, None)


def test_an_error_comes_after_the_tokens() -> None:
    stream = Stream(lambda: None)
    stream._put(Token(1))
    stream._finish(None, ConfigError("mine"))
    tokens = iter(stream)
    assert next(tokens) == Token(1)
    with pytest.raises(ConfigError, match="mine"):
        next(tokens)
    with pytest.raises(ConfigError, match="mine"):
        stream.result(0.0)
    assert isinstance(stream.error, ConfigError)


def test_a_callback_that_fails_ends_the_answer() -> None:
    def fails(token: Token | None) -> None:
        raise ValueError(f"on {token}")

    stream = Stream(lambda: None)
    stream.add_callback(fails)
    with pytest.raises(ValueError, match="on Token"):
        stream._put(Token(1))
    stream._finish("length")
    with pytest.raises(ValueError, match="on None"):
        stream.result(0.0)
    assert stream.finish_reason is None

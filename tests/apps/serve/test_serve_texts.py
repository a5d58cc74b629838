"""Whole characters and stop strings, however a text is divided into tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import text_models

from funclora._apps.serve.text import Cutter, Decoder
from funclora._apps.train.tokenizer import ByteTokenizer

TEXTS = ["plain", "é漢字💡 mixed ünd", "a\ufffdb", "", "💡"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), text_models.tokenizer()], ids=["bytes", "bpe"])
def test_characters_come_whole(tokenizer: Any, text: str) -> None:
    decoder = Decoder(tokenizer)
    parts = [decoder.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(parts) + decoder.end() == text
    if "\ufffd" not in text:
        assert [part for part in parts if part] == list(text)


def test_what_never_becomes_a_character_comes_at_the_end() -> None:
    decoder = Decoder(ByteTokenizer())
    assert [decoder.add(byte) for byte in b"a\xe6\xbc"] == ["a", "", ""]
    assert decoder.end() == "\ufffd"
    assert decoder.end() == ""


def test_special_tokens_have_no_text_and_change_none() -> None:
    tokenizer = text_models.tokenizer()
    decoder = Decoder(tokenizer)
    assert [decoder.add(i) for i in (1, *tokenizer("a é")["input_ids"], 2)] == ["", "a", " ", "", "é", ""]


def cut(text: str, stops: list[str]) -> str:
    """By definition: before the stop string that ends first, and of those the longest."""
    ends = [(end, start) for end in range(len(text) + 1) for start in range(end) if text[start:end] in stops]
    return text[: min(ends)[1]] if ends else text


@pytest.mark.parametrize("stops", [["ab"], ["aab", "b"], ["abab", "ba"], ["aaaa"], ["b", "ab", "bab"], []])
def test_a_text_is_cut_alike_however_it_is_divided(stops: list[str]) -> None:
    chosen = random.Random(0)
    stopped = 0
    for _ in range(300):
        text = "".join(chosen.choice("aab") for _ in range(chosen.randint(0, 12)))
        cutter, out, rest = Cutter(stops), "", text
        while rest:
            n = chosen.randint(1, 4)
            out += cutter.add(rest[:n])
            rest = rest[n:]
        out += cutter.end()
        assert out == cut(text, stops)
        assert cutter.stopped == (out != text)
        stopped += cutter.stopped
    assert bool(stopped) == bool(stops)


def test_what_cannot_be_a_stop_string_is_not_kept_back() -> None:
    cutter = Cutter(["stop"])
    assert [cutter.add(part) for part in ("a", "s", "t", "a", "sto")] == ["a", "", "", "sta", ""]
    assert cutter.end() == "sto"

"""Expressions are matched as Python matches them, also those that it would not finish."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import funclora as fl
from funclora._config import regex
from funclora._config.names import named, named_among, unnamed
from funclora.errors import ConfigError

ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\w", r"\d", r"\W", r"\s", "[ab]", "[^a]", "[a-c.]", "", "^", "$", r"\b", r"\B", "0"]
)
PATTERNS: st.SearchStrategy[str] = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map("|".join).map("({})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{0,3}", "{1,}"])).map(
            lambda both: f"(?:{both[0]}){both[1]}"
        ),
        st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map(lambda both: f"{both[0]}{both[1]})"),
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@example(r"(?:(?:a|b)*)*\.0", "ab.0")
@example("(?:(?:)*)*", "a")
@example(r"(?:a$|b)*", "aa")
@given(PATTERNS, st.text("ab.0 _\n", min_size=1, max_size=6))
def test_the_answers_are_those_of_python(pattern: str, name: str) -> None:
    tree = regex._parsed(pattern)
    found = len(name) in regex._Matcher(name).after(tree, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found == (re.fullmatch(pattern, name) is not None)
    assert regex.matches(pattern, name) == found


@given(st.lists(st.text("a.0|\\\\^*", max_size=3), min_size=1, max_size=4), st.text("a.0|\\\\^*", max_size=4))
@example(["0", "10"], "10")
@example(["a.b"], "a0b")
def test_lists_of_texts_are_looked_up(texts: list[str], name: str) -> None:
    pattern = "|".join(map(re.escape, texts))
    assert regex.matches(pattern, name) == (name in texts) == (re.fullmatch(pattern, name) is not None)


def test_no_expression_is_examined_for_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    examined: list[Any] = []
    whole = regex._quantifiers

    def counted(parts: Any) -> float:
        examined.append(parts)
        return whole(parts)

    monkeypatch.setattr(regex, "_quantifiers", counted)
    pattern = "|".join(rf"layers\.{i}\.[qv]_proj" for i in range(50))
    found = [regex.matches(pattern, f"layers.{i}.q_proj") for i in range(60)]
    assert found == [True] * 50 + [False] * 10
    assert len(examined) < 400, "about as many parts as there are alternatives"


@pytest.mark.parametrize(
    "pattern",
    ["(.*)*x", "([a-z]+)*X", "(a|a)*b", ".*.*.*.*.*.*.*.*.*X", "(a?){60}a{60}x", "(?:(?:a*)+.)*x", "(.?){0,80}x"],
)
@pytest.mark.timeout(60)
def test_expressions_that_python_does_not_finish(pattern: str) -> None:
    model = torch.nn.ModuleDict({"a" * 90: torch.nn.Linear(2, 2)})
    with pytest.raises(fl.errors.TargetError, match="matches no full name of a module"):
        fl.init(model, fl.LoraConfig(target_modules=pattern))
    with pytest.raises(fl.errors.TargetError, match=r"rank_pattern: .* matches none"):
        fl.init(model, fl.LoraConfig(target_modules=["a" * 90], rank_pattern={pattern: 2}))


@pytest.mark.parametrize("pattern", [r"(?:(a)\1*)*x", "(?i)(.*)*x", "(?:(?<=a)a*)*x", "(?:(?i:a)*)*x"])
def test_what_cannot_be_bounded_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"may not terminate.*Write a simpler one"):
        regex.matches(pattern, "a" * 90)


@pytest.mark.parametrize(
    ("pattern", "slow"),
    [
        (r".*\.(q|v)_proj", False),
        (
            r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
            False,
        ),
        (r"^(?!.*vision).*\.q_proj$", False),
        (r"(.*\.)?(layers\.(\d+)\.q_proj)", False),
        (r"model(\.\w+)*\.q_proj", True),
    ],
)
def test_usual_expressions_are_left_to_python(pattern: str, slow: bool) -> None:
    assert (regex._quantifiers(regex._parsed(pattern)) > regex._FEW) == slow


NAME = st.lists(st.sampled_from(["a", "b", "ab", "0", "1", "a_b"]), min_size=1, max_size=4).map(".".join)
PATTERN = st.one_of(
    NAME, st.sampled_from(["a.*", r"\w+", "a|b", r"a\.b", ".", "..", "a.b", "b.0", "^a", "b$", "", "a.b.0"])
)


@given(st.lists(PATTERN, max_size=6, unique=True), NAME | st.text("ab.0\n_", max_size=8))
def test_many_expressions_at_once_match_what_each_does(patterns: list[str], name: str) -> None:
    expected = [pattern for pattern in patterns if re.fullmatch(rf"(.*\.)?({pattern})", name)]
    assert regex.Endings(patterns).matching(name) == expected


@given(st.lists(NAME, max_size=6, unique=True), st.lists(NAME, max_size=6))
def test_entries_are_looked_up_as_they_are_compared(entries: list[str], names: list[str]) -> None:
    for name in names:
        assert named_among(name, set(entries)) is any(named(name, entry) for entry in entries)
    assert unnamed(entries, names) == [entry for entry in entries if not any(named(name, entry) for name in names)]

"""The fields of a request: read strictly, so that none is dropped in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from funclora._apps.serve.problems import Problem, malformed
from funclora.errors import near, shortened
from funclora.serving._settings import COLDEST

CHOICES, STOPS, STOP_LENGTH = 128, 16, 1000  # of one request
TOP_LOGPROBS = 20
SEED = (1 << 63) - CHOICES

# What nobody needs to support: the values that ask for nothing. null always does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
}
_NEUTRAL_COMPLETION = {"best_of": (1,), "echo": (False,), "suffix": ("",)}
_NEUTRAL_CHAT = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_COMMON = ("model", "stream", "stream_options", "temperature", "top_p", "seed", "n", "stop", "max_tokens", "logprobs")
_NAMES = ("user", "safety_identifier", "prompt_cache_key")  # they name the caller, and ask for nothing


@dataclass(frozen=True)
class Options:
    """How a request wants to be answered.

    Attributes:
        model: the base or an adapter.
        max_tokens: of each answer; None for as many as there may be.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the most likely tokens of this total probability.
        seed: of the first answer; the next ones have the numbers after it. None for another one each time.
        n: answers to each prompt.
        stop: texts before which an answer ends.
        logprobs: how many likely tokens to list beside each one; None for no log-probabilities.
        stream: whether the answer is sent as it comes.
        usage: whether a stream ends with the numbers of tokens.
    """

    model: str
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    n: int
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    usage: bool


class Fields:
    """The fields of a request's object; what was not read, or says nothing, is refused by name.

    Args:
        body: the object.
        known: names that will be read.
        neutral: names that are not supported, with the values that ask for nothing.

    Raises:
        Problem: the body is no object, or has another field.
    """

    def __init__(self, body: Any, known: tuple[str, ...], neutral: Mapping[str, tuple[Any, ...]]) -> None:
        if not isinstance(body, dict):
            raise Problem(400, f"The body: expected a JSON object, got {shortened(body)}.")
        self._given = {name: value for name, value in body.items() if value is not None}
        for name, value in self._given.items():
            if name in neutral:
                if not any(type(value) is type(each) and value == each for each in _spelled(neutral[name])):
                    raise Problem(
                        400,
                        f"{name}: this server supports only {' or '.join(map(repr, neutral[name]))}, got "
                        f"{shortened(value)}. Leave it out.",
                        param=name,
                        code="unsupported_parameter",
                    )
            elif name not in known:
                raise Problem(
                    400,
                    f"{shortened(name)} is not supported by this server. Leave it out.{near(name, known)}",
                    param=name if len(name) < 100 else None,
                    code="unknown_parameter",
                )

    def get(self, name: str) -> Any:
        """The value; None if it is not given."""
        return self._given.get(name)

    def text(self, name: str) -> str:
        """A text, which must be there."""
        value = self._given.get(name)
        if not isinstance(value, str) or not value:
            raise malformed(name, "a text", value)
        return value

    def flag(self, name: str) -> bool:
        """True or false; false if it is not given."""
        value = self._given.get(name, False)
        if not isinstance(value, bool):
            raise malformed(name, "true or false", value)
        return value

    def whole(self, name: str, default: Any, least: int, most: int) -> Any:
        """A whole number."""
        value = self._given.get(name, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
            raise malformed(name, f"a whole number from {least} to {most}", value)
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number."""
        value = self._given.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise malformed(name, f"a number from {least:g} to {most:g}", value)
        return float(value)


def completion_fields(body: Any) -> Fields:
    """The fields of a request to /v1/completions."""
    return Fields(body, (*_COMMON, "prompt", *_NAMES), {**_NEUTRAL, **_NEUTRAL_COMPLETION})


def chat_fields(body: Any) -> Fields:
    """The fields of a request to /v1/chat/completions."""
    known = (*_COMMON, "messages", "max_completion_tokens", "top_logprobs", *_NAMES)
    return Fields(body, known, {**_NEUTRAL, **_NEUTRAL_CHAT})


def options(fields: Fields, *, chat: bool, longest: int) -> Options:
    """What both kinds of requests have in common.

    Args:
        fields: of the request.
        chat: whether it is to /v1/chat/completions, which asks for log-probabilities in another way.
        longest: the most tokens that an answer may have.

    Raises:
        Problem: a field has a wrong value.
    """
    most = fields.whole("max_tokens", None, 1, longest)
    if chat:
        newer = fields.whole("max_completion_tokens", None, 1, longest)
        if None not in (most, newer) and most != newer:
            raise Problem(400, "max_tokens and max_completion_tokens contradict each other.", param="max_tokens")
        most = newer if most is None else most
    stream = fields.flag("stream")
    extra = fields.get("stream_options")
    if extra is not None and (not stream or not isinstance(extra, dict)):
        raise malformed("stream_options", "an object, with stream true", extra)
    streaming = Fields(extra or {}, ("include_usage",), {"include_obfuscation": (False,)})
    temperature = fields.number("temperature", 1.0, 0, 2)
    if 0 < temperature < COLDEST:
        raise malformed("temperature", f"0, or a number from {COLDEST:g} to 2", temperature)
    return Options(
        model=fields.text("model"),
        max_tokens=most,
        temperature=temperature,
        top_p=fields.number("top_p", 1.0, 1e-6, 1),
        seed=fields.whole("seed", None, 0, SEED),
        n=fields.whole("n", 1, 1, CHOICES),
        stop=_stops(fields.get("stop")),
        logprobs=_chat_logprobs(fields) if chat else fields.whole("logprobs", None, 0, TOP_LOGPROBS),
        stream=stream,
        usage=streaming.flag("include_usage"),
    )


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    most: int = fields.whole("top_logprobs", 0, 0, TOP_LOGPROBS)
    if most and not wanted:
        raise Problem(400, "top_logprobs needs logprobs true. Set it, or leave both out.", param="top_logprobs")
    return most if wanted else None


def _stops(value: Any) -> tuple[str, ...]:
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(each, str) and each for each in found):
        raise malformed("stop", "a text or a list of texts, none of them empty", value)
    if len(found) > STOPS or any(len(each) > STOP_LENGTH for each in found):
        raise Problem(400, f"stop: expected at most {STOPS} texts of {STOP_LENGTH} characters.", param="stop")
    return tuple(found)


def _spelled(values: tuple[Any, ...]) -> list[Any]:
    """The values, with a number in both forms that JSON has for it."""
    return [*values, *(float(value) for value in values if type(value) is int)]

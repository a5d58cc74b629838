"""What is wrong with a request, as OpenAI's interface says it."""

from __future__ import annotations

from typing import Any

RETRY_AFTER = 1  # seconds after which a refused client may ask again


class Problem(Exception):  # noqa: N818
    """A request that cannot be answered.

    Args:
        status: of HTTP.
        message: what was expected, what came, and what to do.
        param: the field of the request, if it is about one.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """What is sent.

        Examples:
            >>> Problem(404, "There is no model 'x'.", param="model").body["error"]["type"]
            'invalid_request_error'
        """
        kind = {429: "rate_limit_error"}.get(self.status, "server_error" if self.status >= 500 else None)
        return {
            "error": {
                "message": self.message,
                "type": kind or "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer: when to come again, and how to prove who asks."""
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def malformed(param: str, expected: str, got: object) -> Problem:
    """A field with a wrong value.

    Examples:
        >>> str(malformed("n", "a whole number from 1 to 16", "x"))
        "n: expected a whole number from 1 to 16, got 'x'."
    """
    import reprlib

    return Problem(400, f"{param}: expected {expected}, got {reprlib.repr(got)}.", param=param)

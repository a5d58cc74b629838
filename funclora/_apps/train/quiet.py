"""Whether a command shows its progress."""

from __future__ import annotations

from contextvars import ContextVar

QUIET: ContextVar[bool] = ContextVar("funclora.quiet", default=False)

"""Counts of what an engine did."""

from __future__ import annotations

import bisect
import threading
from dataclasses import dataclass, field

# Upper limits of the buckets of times to the first token, in seconds.
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Statistics:
    """What an engine did since it was made, and what it does now.

    Attributes:
        requests: accepted requests.
        finished: ended requests by how they ended: "stop", "length", "cancelled" or "error".
        prompt_tokens: tokens of prompts that were read.
        generated_tokens: tokens that were generated.
        steps: decode steps.
        waiting: requests that no row has been free for yet.
        running: rows of the batch now.
        first_tokens: answers whose first token came.
        first_token_seconds: the sum of the times from the request to its first token.
        first_token_buckets: how many of these times were at most so many seconds, by the number of seconds.
        cache_hits: adapters that were in the cache, or being loaded, when a request needed them.
        cache_misses: adapters that were loaded.
        cache_evictions: adapters that were dropped from the cache.
        cache_adapters: adapters in the cache now.
        cache_bytes: their size.
        prefix_hits: prompts whose beginning was known from another one of the same adapter.
        prefix_tokens: tokens of these beginnings, which were not read again.
        prefix_evictions: pieces of prompts that were dropped to make room.
        prefix_bytes: size of the pieces that are kept.
    """

    requests: int
    finished: dict[str, int]
    prompt_tokens: int
    generated_tokens: int
    steps: int
    waiting: int
    running: int
    first_tokens: int
    first_token_seconds: float
    first_token_buckets: dict[float, int]
    cache_hits: int
    cache_misses: int
    cache_evictions: int
    cache_adapters: int
    cache_bytes: int
    prefix_hits: int
    prefix_tokens: int
    prefix_evictions: int
    prefix_bytes: int


@dataclass
class Counts:
    """The counts that only the engine's own calls change."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    first_token_seconds: float = 0.0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "error"), 0))
    first_tokens: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))

    def add(self, **counts: int) -> None:
        """Add to the counts of these names."""
        with self.lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def ended(self, how: str) -> None:
        with self.lock:
            self.finished[how] += 1

    def first_token(self, seconds: float) -> None:
        with self.lock:
            self.first_token_seconds += seconds
            self.first_tokens[bisect.bisect_left(SECONDS, seconds)] += 1

    def buckets(self) -> dict[float, int]:
        """How many first tokens came within each limit."""
        return {limit: sum(self.first_tokens[: i + 1]) for i, limit in enumerate(SECONDS)}

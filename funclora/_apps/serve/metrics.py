"""Numbers about a running server, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from funclora.serving import Statistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Name -> type, meaning, and the field of the statistics.
NUMBERS = {
    "prompt_tokens_total": ("counter", "Tokens of prompts that were read.", "prompt_tokens"),
    "generated_tokens_total": ("counter", "Tokens of answers.", "generated_tokens"),
    "decode_steps_total": ("counter", "Steps of the decode loop: a token for each row.", "steps"),
    "batch_rows": ("gauge", "Answers that are being generated now.", "running"),
    "queue_length": ("gauge", "Answers that wait for a free row.", "waiting"),
    "adapter_cache_hits_total": ("counter", "Requests whose adapter was in memory.", "cache_hits"),
    "adapter_cache_misses_total": ("counter", "Adapters that were loaded.", "cache_misses"),
    "adapter_cache_evictions_total": ("counter", "Adapters that made room for others.", "cache_evictions"),
    "adapter_cache_adapters": ("gauge", "Adapters in memory.", "cache_adapters"),
    "adapter_cache_bytes": ("gauge", "Size of the adapters in memory.", "cache_bytes"),
    "prefix_hits_total": ("counter", "Prompts whose beginning was known already.", "prefix_hits"),
    "prefix_tokens_total": ("counter", "Tokens of prompts that were known already.", "prefix_tokens"),
    "prefix_evictions_total": ("counter", "Pieces of prompts that made room for others.", "prefix_evictions"),
    "prefix_bytes": ("gauge", "Size of the pieces of prompts in memory.", "prefix_bytes"),
}


def metrics_text(requests: Counter[tuple[str, int]], found: Statistics | None) -> str:
    """The page.

    Args:
        requests: how many there were by path and status.
        found: of the engine; None without one.

    Examples:
        >>> print(metrics_text(Counter({("/v1/models", 200): 2}), None).splitlines()[-1])
        funclora_requests_total{path="/v1/models",status="200"} 2
    """
    lines: list[str] = []

    def family(name: str, kind: str, meaning: str, samples: Iterable[tuple[str, float]]) -> None:
        lines.extend([f"# HELP funclora_{name} {meaning}", f"# TYPE funclora_{name} {kind}"])
        lines.extend(f"funclora_{name}{suffix} {value:.17g}" for suffix, value in samples)

    counted = ((f'{{path="{path}",status="{status}"}}', n) for (path, status), n in sorted(requests.items()))
    family("requests_total", "counter", "Requests by path and status.", counted)
    if found is not None:
        ended = ((f'{{reason="{reason}"}}', n) for reason, n in found.finished.items())
        family("answers_total", "counter", "Answers by how they ended.", ended)
        for name, (kind, meaning, field) in NUMBERS.items():
            family(name, kind, meaning, [("", getattr(found, field))])
        buckets = [(f'_bucket{{le="{limit:g}"}}', n) for limit, n in found.first_token_buckets.items()]
        family(
            "time_to_first_token_seconds",
            "histogram",
            "Time from a request to the first token of its answer.",
            [
                *buckets,
                ('_bucket{le="+Inf"}', found.first_tokens),
                ("_sum", found.first_token_seconds),
                ("_count", found.first_tokens),
            ],
        )
    return "\n".join(lines) + "\n"

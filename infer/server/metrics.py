"""What the server counts, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qwen_jax.engine import Stats

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
# Fields of the engine's `Stats`, by the name and the help of the metric.
_GAUGES = {
    "num_waiting": ("qwen_rows_waiting", "Completions that wait for their turn"),
    "num_running": ("qwen_rows_running", "Completions being made"),
    "pages_used": ("qwen_cache_pages_used", "Pages of the cache in use"),
    "pages_total": ("qwen_cache_pages", "Pages of the cache"),
}
_COUNTERS = {
    "prompt_tokens": ("qwen_prompt_tokens", "Tokens of prompts"),
    "generated_tokens": ("qwen_generated_tokens", "Tokens made"),
    "prefix_hits": ("qwen_prefix_hit_tokens", "Tokens of prompts that were found in the cache"),
    "preemptions": ("qwen_preemptions", "Completions that gave up their pages to be computed again"),
    "steps": ("qwen_steps", "Steps of the engine"),
}


class Metrics:
    """Counters of one server.

    Attributes:
      requests: HTTP requests by route and status.
      first_token: seconds from a request to the first token of each of its completions.
      next_token: seconds between tokens of a completion.
    """

    def __init__(self, stats: Callable[[], Stats]) -> None:
        """`stats` gives those of the engine."""
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("qwen_requests", "HTTP requests", ["route", "status"], registry=registry)
        name, text = "qwen_time_to_first_token_seconds", "From a request to the first token of a completion"
        self.first_token = Histogram(name, text, buckets=_SECONDS, registry=registry)
        name, text = "qwen_inter_token_seconds", "Between two tokens of a completion"
        self.next_token = Histogram(name, text, buckets=_SECONDS, registry=registry)
        registry.register(_Engine(stats))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engine(Collector):
    """The engine's own counters, read when they are asked for."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(stats, field))
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(stats, field))

"""What Prometheus is told."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tael.economics.journal import Outcome
from tael.request import Usage
from tael.server.admission import Admission
from tael.server.engine_client import EngineClient

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server. Names are vLLM's, with another prefix, so that its dashboards need
    only that changed. No label comes from a caller: series are bounded."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"tael_{name}", text, registry=self._registry, buckets=SECONDS)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tael_{name}", text, labels, registry=self._registry)

        self._first_token = histogram("time_to_first_token_seconds", "From arrival.")
        self._next_token = histogram("inter_token_latency_seconds", "Between deltas.")
        self._latency = histogram("e2e_request_latency_seconds", "From arrival to settlement.")
        self._queue = histogram("request_queue_time_seconds", "In the engine's own queue.")
        self._prompt = counter("prompt_tokens", "Prompt tokens, cached ones included.")
        self._cached = counter("prompt_tokens_cached", "Prompt tokens read from the cache.")
        self._output = counter("generation_tokens", "Output tokens.")
        self._requests = counter("requests", "Requests, by how they ended.", "outcome")
        self._refused = counter("requests_refused", "Answers of an error status.", "status")

    def watch(self, engine: EngineClient, admission: Admission) -> None:
        """Show what these say when asked."""
        self._registry.register(_Watcher(engine, admission))

    def first_token(self, arrival_s: float) -> None:
        self._first_token.observe(time.monotonic() - arrival_s)

    def next_token(self, last_s: float) -> None:
        self._next_token.observe(time.monotonic() - last_s)

    def request(self, arrival_s: float, usage: Usage, outcome: Outcome) -> None:
        """One that has been settled."""
        self._latency.observe(time.monotonic() - arrival_s)
        self._queue.observe(usage.queue_s)
        self._prompt.inc(usage.num_prompt_tokens)
        self._cached.inc(usage.num_cached_tokens)
        self._output.inc(usage.num_output_tokens)
        self._requests.labels(outcome.value).inc()

    def error(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """In the format of Prometheus."""
        return generate_latest(self._registry)


class _Watcher(Collector):
    def __init__(self, engine: EngineClient, admission: Admission) -> None:
        self._engine = engine
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        def gauge(name: str, text: str, value: float) -> Metric:
            return GaugeMetricFamily(f"tael_{name}", text, value)

        status = self._engine.status
        yield gauge("engine_up", "Whether an engine runs.", status is not None)
        yield CounterMetricFamily(
            "tael_engine_restarts", "Engines that were replaced.", self._engine.num_restarts
        )
        yield gauge("num_requests_held", "Requests not yet settled.", self._admission.num_requests)
        yield gauge("num_tokens_held", "Tokens they may take.", self._admission.num_tokens)
        yield gauge("num_requests_queued", "Prompts not yet sent.", self._admission.num_waiting)
        if status is None:
            return
        yield gauge("num_requests_running", "Sequences being computed.", status.num_running)
        yield gauge("num_requests_waiting", "Sequences in its queue.", status.num_waiting)
        share = status.num_referenced_blocks / status.num_blocks
        yield gauge("kv_cache_usage_perc", "Share of the KV blocks that requests hold.", share)
        yield gauge("kv_blocks", "KV blocks of the pools.", status.num_blocks)
        yield gauge("kv_blocks_referenced", "Held by requests.", status.num_referenced_blocks)
        tiers = GaugeMetricFamily("tael_kv_bytes", "KV by where it lies.", labels=["tier", "state"])
        for tier in status.tiers:
            free_bytes = tier.capacity_bytes - tier.used_bytes - tier.cached_bytes
            tiers.add_metric([tier.name, "used"], tier.used_bytes)
            tiers.add_metric([tier.name, "cached"], tier.cached_bytes)
            tiers.add_metric([tier.name, "free"], free_bytes)
        yield tiers
        errors = CounterMetricFamily(
            "tael_kv_io_errors", "Reads and writes of KV that failed.", labels=["tier"]
        )
        for tier in status.tiers:
            errors.add_metric([tier.name], tier.num_io_errors)
        yield errors
        for name, text, value in (
            ("queries", "Tokens looked up in the prefix cache.", status.num_prefix_query_tokens),
            ("hits", "Tokens found there.", status.num_prefix_hit_tokens),
        ):
            yield CounterMetricFamily(f"tael_prefix_cache_{name}", text, value)

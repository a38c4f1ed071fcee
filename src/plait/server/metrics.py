"""What the server counts, in Prometheus' text format. Holds no prompt, no key and no name of a client."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import anyio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from plait.engines.base import EngineStats
from plait.events import Event, SegmentEnded, SegmentStarted
from plait.server.admission import Admission
from plait.tree import Tree
from plait.types import StopReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TOKENS = tuple(float(2**n) for n in range(4, 15))
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_RATIOS = tuple(n / 10 for n in range(10))


class Metrics:
    """Counters of one server.

    Args:
        admission: Its limits, shown as gauges.
        engines: Counters of each open engine, by the model's name.
    """

    def __init__(self, admission: Admission, engines: Callable[[], Iterable[tuple[str, str, EngineStats]]]) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"plait:{name}", about, labels, registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"plait:{name}", about, buckets=buckets, registry=registry)

        def gauge(name: str, about: str, read: Callable[[], float]) -> None:
            Gauge(f"plait:{name}", about, registry=registry).set_function(read)

        self.requests = counter("requests", "HTTP requests by route and status", "route", "status")
        self.rejections = counter("admission_rejections", "Requests refused for load", "reason")
        self.declined = counter("forks_declined_requests", "Requests admitted without forks, for load")
        self.forks = counter("forks", "Blocks of threads that were opened")
        self.threads = counter("threads", "Threads by how they ended", "outcome")
        self.malformed = counter("malformed_blocks", "Blocks that could not be read", "kind")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.generation_tokens = counter("generation_tokens", "Tokens sampled")
        self.reread_tokens = counter("reread_tokens", "Tokens that parents read again at joins")
        self.engine_requests = counter("engine_requests", "Engine calls by how they ended", "engine", "code")
        self.spans = counter("span_exports", "Runs offered to the span collector, by outcome", "outcome")
        self.disconnects = counter("client_disconnects", "Requests that were left by their client")
        self.critical_path = histogram("critical_path_tokens", "Sampled tokens on the longest chain", _TOKENS)
        self.acceleration = histogram("acceleration_ratio", "1 - L/T of each run", _RATIOS)
        self.latency = histogram("e2e_request_latency_seconds", "From arrival to the last event of a run", _SECONDS)
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first sampled token", _SECONDS)
        self.join_wait = histogram("join_wait_seconds", "From a block's first closed thread to its join", _SECONDS)
        gauge("threads_active", "Threads that sample now", lambda: admission.num_held)
        gauge("threads_waiting", "Threads that wait for a place", lambda: admission.num_waiting)
        gauge("threads_limit", "Places", lambda: admission.max_threads)
        gauge("requests_running", "Requests that run or wait", lambda: admission.num_requests)
        gauge("requests_limit", "Requests at once", lambda: admission.max_requests)
        gauge("tasks", "Asynchronous tasks of the server", lambda: len(anyio.get_running_tasks()))
        registry.register(_Engines(engines))
        # process_resident_memory_bytes, process_open_fds and so on, by the names that every Prometheus client uses.
        ProcessCollector(registry=registry)

    def render(self) -> bytes:
        """All of them, as a scrape reads them."""
        return generate_latest(self._registry)

    def observe(self, tree: Tree, *, engine: str) -> None:
        """Count a run that has ended, or was left."""
        usage = tree.usage()
        self.forks.inc(usage.forks)
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.generation_tokens.inc(usage.sampled_tokens)
        self.reread_tokens.inc(usage.reread_tokens)
        for thread in tree.threads():
            self.threads.labels(str(thread.stop or StopReason.CANCELLED)).inc()
        for segment in tree.segments.values():
            if segment.stop is StopReason.MALFORMED:
                self.malformed.labels("declined").inc()
            if segment.stop is not StopReason.FORCED:
                self.engine_requests.labels(engine, str(segment.stop or StopReason.CANCELLED)).inc()
        if tree.stop is not None:
            self.critical_path.observe(usage.critical_path_tokens)
            self.acceleration.observe(tree.acceleration())


class JoinWaits:
    """Measures, over the events of one run, how long joins waited for the last thread of their block."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._ended: dict[str, float] = {}

    def read(self, event: Event) -> None:
        if isinstance(event, SegmentEnded):
            self._ended[event.id] = event.t
        elif isinstance(event, SegmentStarted) and event.joins:
            first = min(self._ended.get(id, event.t) for id in event.joins)
            self._metrics.join_wait.observe(max(0.0, event.t - first))


class _Engines(Collector):
    """Engines' own counters, read when they are asked for."""

    def __init__(self, engines: Callable[[], Iterable[tuple[str, str, EngineStats]]]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        labels = ["model", "engine"]
        inflight = GaugeMetricFamily("plait:engine_inflight", "Engine calls that sample now", labels=labels)
        queued = GaugeMetricFamily("plait:engine_queued", "Engine calls that wait inside the engine", labels=labels)
        cached = GaugeMetricFamily("plait:engine_cached_tokens", "Tokens whose keys and values are held", labels=labels)
        prefill = CounterMetricFamily("plait:engine_prefill_tokens", "Given tokens that were computed", labels=labels)
        reused = CounterMetricFamily("plait:engine_reused_tokens", "Given tokens found in the cache", labels=labels)
        steps = CounterMetricFamily("plait:engine_steps", "Forward passes", labels=labels)
        waits = CounterMetricFamily("plait:engine_preemptions", "Calls that made way for older ones", labels=labels)
        evicted = CounterMetricFamily("plait:engine_evictions", "Cached contexts given up for room", labels=labels)
        drafted = CounterMetricFamily("plait:engine_drafted_tokens", "Tokens guessed ahead", labels=labels)
        accepted = CounterMetricFamily("plait:engine_accepted_tokens", "Guessed tokens that were right", labels=labels)
        for model, engine, stats in self._engines():
            inflight.add_metric([model, engine], stats.active)
            queued.add_metric([model, engine], stats.queued)
            cached.add_metric([model, engine], stats.cached_tokens)
            prefill.add_metric([model, engine], stats.prefill_tokens)
            reused.add_metric([model, engine], stats.reused_tokens)
            steps.add_metric([model, engine], stats.steps)
            waits.add_metric([model, engine], stats.preemptions)
            evicted.add_metric([model, engine], stats.evictions)
            drafted.add_metric([model, engine], stats.drafted_tokens)
            accepted.add_metric([model, engine], stats.accepted_tokens)
        return [inflight, queued, cached, prefill, reused, steps, waits, evicted, drafted, accepted]

"""Metrics for Prometheus, at a port of their own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.rpc.address import Endpoint, check_port_is_free
from lightning.rpc.interception import Call

if TYPE_CHECKING:
    from prometheus_client.core import Metric

logger = logging.getLogger(__name__)

_LATENCY_BUCKETS_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)
_QUEUED_STATUSES = ("queuing", "requeuing")

_GAUGES: Mapping[str, tuple[str, str]] = {
    "total_spans": ("lightning_spans", "Spans stored."),
    "total_span_bytes": ("lightning_span_bytes", "Bytes that the spans take."),
    "total_workers": ("lightning_workers", "Workers known."),
    "total_resources": ("lightning_resources_versions", "Versions of resources stored."),
    "oldest_queued_age": (
        "lightning_oldest_queued_seconds",
        "How long the rollout at the head of the queue has waited.",
    ),
}
_BY_STATUS: Mapping[str, tuple[str, str]] = {
    "rollouts_by_status": ("lightning_rollouts", "Rollouts stored, by status."),
    "attempts_by_status": ("lightning_attempts", "Attempts stored, by status."),
}
_COUNTERS: Mapping[str, tuple[str, str]] = {
    "evicted_spans": ("lightning_evicted_spans", "Spans dropped to save room."),
    "dropped_rollouts": ("lightning_dropped_rollouts", "Finished rollouts dropped to save room."),
}


class Metrics:
    """Counts calls, asks the store for its figures whenever somebody looks, and shows both over HTTP.

    Args:
        ask: Returns the store's statistics; called from other threads. What it raises is logged, and shown by
            `lightning_store_up`.
        is_serving: Whether the server's health is good.

    Raises:
        ImportError: The package `prometheus-client` is not there.
    """

    def __init__(self, ask: Callable[[], Mapping[str, Any]], is_serving: Callable[[], bool]) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise ImportError(
                "metrics need the package prometheus-client: pip install 'agent-lightning-grpc[metrics]'"
            ) from None
        self._ask = ask
        self._is_serving = is_serving
        self._registry = registry = prometheus.CollectorRegistry()
        labels = ("service", "method")
        self._calls = prometheus.Counter(
            "lightning_calls", "Calls that have ended.", (*labels, "code"), registry=registry
        )
        self._seconds = prometheus.Histogram(
            "lightning_call_seconds",
            "How long calls took that are no streams, waiting for work included.",
            labels,
            registry=registry,
            buckets=_LATENCY_BUCKETS_SECONDS,
        )
        self._received = prometheus.Counter(
            "lightning_received_bytes", "Bytes of requests.", labels, registry=registry
        )
        self._sent = prometheus.Counter(
            "lightning_sent_bytes", "Bytes of responses.", labels, registry=registry
        )
        self._under_way = prometheus.Gauge(
            "lightning_calls_in_flight", "Calls under way, streams included.", registry=registry
        )
        self._streams = prometheus.Gauge(
            "lightning_streams", "Calls under way that are streams.", registry=registry
        )
        registry.register(_StoreFigures(self))
        self._http: tuple[Any, Any] | None = None

    def begun(self, call: Call) -> None:
        """See `Observer`."""
        self._under_way.inc()
        if call.is_stream:
            self._streams.inc()

    def ended(self, call: Call) -> None:
        """See `Observer`."""
        self._under_way.dec()
        service, _, method = call.method.lstrip("/").rpartition("/")
        self._calls.labels(service, method, call.code.name).inc()
        self._received.labels(service, method).inc(call.received_bytes)
        self._sent.labels(service, method).inc(call.sent_bytes)
        if call.is_stream:
            self._streams.dec()
        else:
            self._seconds.labels(service, method).observe(call.seconds)

    def serve(self, endpoint: Endpoint) -> Endpoint:
        """Show them at `endpoint`, under `/metrics`; returns where that is, if a port was to be picked.

        Raises:
            OSError: The port is taken.
        """
        from prometheus_client import start_http_server

        check_port_is_free(endpoint)
        self._http = start_http_server(endpoint.port, endpoint.host or "0.0.0.0", self._registry)
        return replace(endpoint, port=self._http[0].server_port).reachable

    async def close(self) -> None:
        """Show them no more."""
        if self._http is None:
            return
        (server, thread), self._http = self._http, None
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        await asyncio.to_thread(thread.join)

    def figures(self) -> Iterator[Metric]:
        """The store's, as they are now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        yield GaugeMetricFamily(
            "lightning_serving", "Whether health checks are answered SERVING.", self._is_serving()
        )
        try:
            statistics = self._ask()
        except Exception as error:  # noqa: BLE001  # whatever is wrong with the store, the rest can be shown
            logger.warning("the store has no statistics now: %s: %s", type(error).__name__, error)
            yield GaugeMetricFamily("lightning_store_up", "Whether the store told its figures.", 0)
            return
        yield GaugeMetricFamily("lightning_store_up", "Whether the store told its figures.", 1)
        by_status = statistics.get("rollouts_by_status", {})
        queued = sum(by_status.get(status, 0) for status in _QUEUED_STATUSES)
        yield GaugeMetricFamily("lightning_queue_length", "Rollouts in the queue.", queued)
        if not queued:
            statistics = {**statistics, "oldest_queued_age": 0.0}
        for key, (name, text) in _GAUGES.items():
            if key in statistics:
                yield GaugeMetricFamily(name, text, statistics[key])
        for key, (name, text) in _COUNTERS.items():
            if key in statistics:
                yield CounterMetricFamily(name, text, statistics[key])
        for key, (name, text) in _BY_STATUS.items():
            yield _labelled(GaugeMetricFamily(name, text, labels=("status",)), statistics.get(key, {}))
        expired = CounterMetricFamily(
            "lightning_expired_attempts",
            "Attempts that the watchdog closed, by what they became.",
            labels=("status",),
        )
        yield _labelled(expired, statistics.get("expired_attempts", {}))


class _StoreFigures:
    """Asks for the store's figures at each look."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        """Empty, so that the store is not asked before somebody looks."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        return self._metrics.figures()


def _labelled(family: Any, values: Mapping[str, int]) -> Any:
    for label, value in values.items():
        family.add_metric((label,), value)
    return family

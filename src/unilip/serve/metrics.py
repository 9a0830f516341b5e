"""What an operator wants to know of answers, batches and the queue: the page /metrics, in Prometheus' text format."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class Metrics:
    """Counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        counter, seconds = partial(Counter, registry=own), partial(Histogram, registry=own, buckets=_SECONDS)
        self.requests = counter("unilip_requests", "Answers by route and status", ("route", "status"))
        self.latency = seconds("unilip_request_seconds", "Seconds from a request to the end of its answer", ("route",))
        self.batch_size = seconds("unilip_batch_size", "Pictures or questions in a batch", ("verb",), buckets=_SIZES)
        self.batch_seconds = seconds("unilip_batch_seconds", "Seconds that a batch took", ("verb",))
        self.results = counter("unilip_results", "Pictures and answers given", ("verb",))
        self.queued = Gauge("unilip_queue_length", "Pictures and questions that wait", registry=own)
        self.running = Gauge("unilip_running", "Pictures and questions in the present batch", registry=own)

    def batch(self, verb: str, size: int, seconds: float) -> None:
        """Count a batch; an engine's `on_batch`."""
        self.batch_size.labels(verb).observe(size)
        self.batch_seconds.labels(verb).observe(seconds)

    def answer(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.latency.labels(route).observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self.registry)

"""What the server counts, in the text form that Prometheus reads."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.metrics_core import GaugeMetricFamily

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self):
        self._registry = CollectorRegistry(auto_describe=True)
        own = {"registry": self._registry}
        self.requests = Counter("k25_requests", "Requests by route and status.", ["route", "status"], **own)
        self.open = Gauge("k25_requests_open", "Requests that are being answered.", **own)
        self.left = Counter("k25_clients_left", "Clients that left, or read nothing any more, before the end.", **own)
        self.seconds = Histogram("k25_request_seconds", "From request to answer.", ["route"], buckets=SECONDS, **own)
        self.first = Histogram("k25_first_token_seconds", "From request to first token.", buckets=SECONDS, **own)
        self.tokens = Counter("k25_tokens", "Tokens read in prompts and drawn.", ["kind"], **own)
        self._engine: Mapping[str, int] = {}
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What the engine says of itself; called by the registry."""
        for name, value in self._engine.items():
            yield GaugeMetricFamily(f"k25_engine_{name}", f"The engine's {name.replace('_', ' ')}.", value)

    def text(self, engine: Mapping[str, int]) -> bytes:
        """All figures, with those of the engine as they are now."""
        self._engine = engine
        return generate_latest(self._registry)

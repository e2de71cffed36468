"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from step35.api.sampler import AsyncSampler

FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
NEXT_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Telemetry:
    """Counts requests and tokens, measures latencies, and shows the sampler's own statistics."""

    def __init__(self, sampler: AsyncSampler) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "step35_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.tokens = Counter("step35_tokens", "Tokens read and written.", ["kind"], registry=self.registry)
        self.first_token = Histogram(
            "step35_time_to_first_token_seconds",
            "From the start of a generation to its first token.",
            buckets=FIRST_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.next_token = Histogram(
            "step35_inter_token_seconds",
            "Between two updates of a generation, for each token of the second.",
            buckets=NEXT_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.registry.register(SamplerStatistics(sampler))

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class SamplerStatistics(Collector):
    """The sampler's counters and gauges, read when they are asked for."""

    def __init__(self, sampler: AsyncSampler) -> None:
        self.sampler = sampler

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield one gauge for each statistic."""
        for name, value in self.sampler.statistics().items():
            metric = "step35_engine_" + re.sub(r"\W", "_", name)
            yield GaugeMetricFamily(metric, f"The sampler's {name}.", value=float(value))

"""Figures for Prometheus, under the names that vLLM gave them, with `qwen2:` in front."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from qwen2.inference import EngineThread, Output

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


@dataclass
class Course:
    """How far a request has come, as far as its outputs tell."""

    prompt_tokens: int
    embed: bool
    arrived: float = field(default_factory=time.monotonic)
    tokens: int = 0
    last: float = 0.0  # when the last tokens came, or it arrived

    def __post_init__(self) -> None:
        self.last = self.arrived


class Metrics:
    """One server's figures."""

    def __init__(self, engine: EngineThread, model: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, model))
        self._model = model

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"qwen2:{name}", what, ["model_name"], buckets=buckets, registry=self.registry
            )
            return made.labels(model)

        self._first = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", SECONDS
        )
        self._between = histogram(
            "inter_token_latency_seconds", "From one token to the next.", SECONDS
        )
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._output = histogram("request_generation_tokens", "Tokens of a completion.", TOKENS)
        self._ended = Counter(
            "qwen2:request_success",
            "Requests that have ended, by how.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._answers = Counter(
            "qwen2:http_requests",
            "HTTP answers, by route and status.",
            ["route", "status"],
            registry=self.registry,
        )

    def answered(self, route: str, status: int) -> None:
        """An HTTP request was answered."""
        self._answers.labels(route, str(status)).inc()

    def observe(self, course: Course, output: Output) -> None:
        """What an output says of time; called on the engine's thread."""
        now = time.monotonic()
        if count := len(output.token_ids):
            histogram = self._between if course.tokens else self._first
            histogram.observe((now - course.last) / count)
            course.last = now
            course.tokens += count
        if output.finish_reason is not None:
            self._whole.observe(now - course.arrived)
            self._prompt.observe(course.prompt_tokens)
            if not course.embed:
                self._output.observe(course.tokens)
            reason = "abort" if output.finish_reason == "cancelled" else output.finish_reason
            self._ended.labels(self._model, reason).inc()

    def text(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """What the engine itself counts, read when it is asked for."""

    def __init__(self, engine: EngineThread, model: str) -> None:
        self._engine, self._model = engine, model

    def collect(self) -> Iterator[Metric]:
        """The figures of now."""
        stats = self._engine.engine.stats
        gauges = {
            "num_requests_running": (stats.running, "Requests being worked on."),
            "num_requests_waiting": (stats.waiting, "Requests in the queue."),
            "kv_cache_usage_perc": (stats.kv_used, "Share of the cache that is held, 0 to 1."),
            "engine_alive": (int(self._engine.alive), "1 while the engine works."),
        }
        counters = {
            "prefix_cache_queries": (stats.prefix_queries, "Prompt tokens that were looked up."),
            "prefix_cache_hits": (stats.prefix_hits, "Prompt tokens that were cached."),
            "num_preemptions": (stats.preemptions, "Times a request gave its place back."),
            "prompt_tokens": (stats.prompt_tokens, "Prompt tokens."),
            "generation_tokens": (stats.generated_tokens, "Tokens generated."),
            "spec_decode_num_draft_tokens": (stats.spec_proposed, "Tokens that were guessed."),
            "spec_decode_num_accepted_tokens": (stats.spec_accepted, "Guesses that were right."),
        }
        for name, (value, what) in gauges.items():
            gauge = GaugeMetricFamily(f"qwen2:{name}", what, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (value, what) in counters.items():
            counter = CounterMetricFamily(f"qwen2:{name}", what, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter

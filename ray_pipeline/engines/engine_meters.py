"""Metrics of a vLLM engine, on Ray's Prometheus endpoint of its node.

vLLM's own logger for this needs Ray Serve. This one exports the figures that an operator needs: requests running and
waiting, KV cache usage, and request latencies.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

#: Seconds between two values of a gauge; the engine reports every step.
_EVERY = 1.0
#: Upper bounds of the latency histogram's buckets, in seconds.
_LATENCIES = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


class EngineMeters:
    """A stat logger in vLLM's sense (`vllm.v1.metrics.loggers.StatLoggerBase`), for an engine inside Ray."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._tags = {"model": os.path.basename(str(vllm_config.model_config.model).rstrip("/"))}
        tags = ("model",)
        self._requests = Gauge("quorum_engine_requests", "requests in an engine", tag_keys=("model", "state"))
        self._cache = Gauge("quorum_engine_kv_cache_usage", "share of the KV cache that is in use", tag_keys=tags)
        self._finished = Counter("quorum_engine_finished_total", "requests that ended", tag_keys=tags)
        self._preempted = Counter("quorum_engine_preempted_total", "requests preempted by others", tag_keys=tags)
        self._latency = Histogram(
            "quorum_engine_latency_seconds", "from a request's arrival to its end", boundaries=_LATENCIES, tag_keys=tags
        )
        self._told = 0.0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """One step of the engine; either part may be missing."""
        now = time.monotonic()
        idle = scheduler_stats is not None and not scheduler_stats.num_running_reqs
        if scheduler_stats is not None and (idle or now - self._told >= _EVERY):
            self._told = now
            self._requests.set(scheduler_stats.num_running_reqs, {**self._tags, "state": "running"})
            self._requests.set(scheduler_stats.num_waiting_reqs, {**self._tags, "state": "waiting"})
            self._cache.set(scheduler_stats.kv_cache_usage, self._tags)
        if iteration_stats is None:
            return
        if iteration_stats.num_preempted_reqs:
            self._preempted.inc(iteration_stats.num_preempted_reqs, self._tags)
        for request in iteration_stats.finished_requests:
            self._finished.inc(1, self._tags)
            self._latency.observe(request.e2e_latency, self._tags)

    def log(self) -> None:
        """Do nothing: values are exported as they arrive."""

    def log_engine_initialized(self) -> None:
        """Do nothing."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Engines do not sleep here."""


def stat_loggers() -> list[Any] | None:
    """Inside Ray, a logger to its Prometheus endpoint; otherwise None, for vLLM's own."""
    ray = sys.modules.get("ray")
    return [EngineMeters] if ray is not None and ray.is_initialized() else None

"""Counters and gauges of a run on Ray's Prometheus endpoint, with run, stage and judge as tags.

Ray exports them on every node's metrics port with `ray_` before their names; `cluster/grafana_quorum.json` is a
dashboard of them. They live in the progress board, which hears of everything, so that no worker pays for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray_pipeline.engines.usage import Usage

#: Name → (kind, what it is, tags beside `run` and `stage`).
METERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "quorum_rows_total": ("counter", "rows done; rows of a restarted shard count again", ()),
    "quorum_calls_total": ("counter", "LLM calls; source is engine or log", ("source",)),
    "quorum_tokens_total": ("counter", "tokens of engine calls; kind is prompt, completion or cached", ("kind",)),
    "quorum_cost_total": ("counter", "what endpoints asked for, in the currency of their prices", ()),
    "quorum_device_seconds_total": ("counter", "seconds of GPUs (without GPUs: of engines) that actors held", ()),
    "quorum_replies_total": ("counter", "replies of judges; read is true or false", ("judge", "read")),
    "quorum_shards": ("gauge", "shards of a stage; state is all, done or failed", ("state",)),
    "quorum_stage_seconds": ("gauge", "seconds since the stage began in this session", ()),
}

#: Counter of the board → (meter, its further tags).
_FED_BY: dict[str, tuple[str, dict[str, str]]] = {
    "rows": ("quorum_rows_total", {}),
    "calls_engine": ("quorum_calls_total", {"source": "engine"}),
    "calls_log": ("quorum_calls_total", {"source": "log"}),
    "prompt_tokens": ("quorum_tokens_total", {"kind": "prompt"}),
    "completion_tokens": ("quorum_tokens_total", {"kind": "completion"}),
    "cached_tokens": ("quorum_tokens_total", {"kind": "cached"}),
    "cost": ("quorum_cost_total", {}),
    "device_seconds": ("quorum_device_seconds_total", {}),
}


def ray_meter(name: str) -> Any:
    """A meter of `ray.util.metrics`."""
    from ray.util.metrics import Counter, Gauge

    kind, words, tags = METERS[name]
    return {"counter": Counter, "gauge": Gauge}[kind](name, description=words, tag_keys=("run", "stage", *tags))


class Meters:
    """The meters of one run.

    Args:
        make: name → something with `inc(value, tags=…)` or `set(value, tags=…)`.
    """

    def __init__(self, run: str, make: Callable[[str], Any] = ray_meter) -> None:
        self._run = run
        self._of = {name: make(name) for name in METERS}

    def add(self, stage: str, usage: Usage, rows: float) -> None:
        """Differences, as workers report them."""
        counts = {"rows": rows, **vars(usage)}
        for key, (name, tags) in _FED_BY.items():
            if counts[key] > 0:
                self._of[name].inc(counts[key], tags=self._tags(stage, **tags))

    def replies(self, stage: str, counts: Mapping[tuple[str, bool], int]) -> None:
        """(judge, whether its reply was read) → replies since the last report."""
        for (judge, read), number in counts.items():
            tags = self._tags(stage, judge=judge, read="true" if read else "false")
            self._of["quorum_replies_total"].inc(number, tags=tags)

    def look(self, stage: str, shards: int, done: int, failed: int, seconds: float) -> None:
        """The state of a stage, as often as somebody looks at the board."""
        for state, number in (("all", shards), ("done", done), ("failed", failed)):
            self._of["quorum_shards"].set(number, tags=self._tags(stage, state=state))
        self._of["quorum_stage_seconds"].set(seconds, tags=self._tags(stage))

    def _tags(self, stage: str, **more: str) -> dict[str, str]:
        return {"run": self._run, "stage": stage, **more}

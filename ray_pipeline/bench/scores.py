"""Scores of the public benchmarks: one list over all of them, and what the module of a benchmark computes them from."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray_pipeline.bench.tables import Tables
from ray_pipeline.stats.protocol import Protocol, PublishedProtocol, ScoreName, score_name


@dataclasses.dataclass(frozen=True)
class Score:
    """One figure of one model.

    Attributes:
        benchmark, metric: what is measured, in our terms ("mt_bench", "turn 1").
        name: what it may be called, by its protocol.
        value: None where nothing could be read, with the reason in `note`.
        low, high: 95 % interval, None where there is none.
        unit: "1–10" or "%".
        rows: what the value is the mean of; `unread` more could not be read.
        worst, best: the value had all unread rows been the worst or the best.
    """

    model: str
    benchmark: str
    metric: str
    name: ScoreName
    protocol: Protocol
    value: float | None
    low: float | None
    high: float | None
    unit: str
    rows: int
    unread: int
    worst: float | None
    best: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How one model's answers were read on one benchmark, beside its scores. Shares are between 0 and 1."""

    model: str
    benchmark: str
    statuses: Mapping[str, int]
    contradictory: int = 0
    flip_rate: float | None = None
    mean_chars: float | None = None
    chance: int = 0


@dataclasses.dataclass(frozen=True)
class Judge:
    """Who judges, for the protocol: identity, and settings beside the sampling that an exact protocol has none of."""

    identity: str
    setup: str = ""

    def marked(self, protocol: Protocol) -> Protocol:
        """The protocol with the judge's own settings in it."""
        if not self.setup:
            return protocol
        return dataclasses.replace(protocol, judge_sampling=f"{protocol.judge_sampling} {self.setup}")


def make_score(
    model: str,
    benchmark: str,
    metric: str,
    protocol: Protocol,
    published: PublishedProtocol | None,
    value: float | None,
    **more: Any,
) -> Score:
    return Score(model, benchmark, metric, score_name(protocol, published), protocol, value, **more)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What scores are computed from.

    Attributes:
        names: of the measured models, floors last.
        judges: by the keys that the benchmarks name.
        draws, seed: of every bootstrap.
    """

    tables: Tables
    names: Sequence[str]
    judges: Mapping[str, Judge]
    draws: int
    seed: int


@dataclasses.dataclass
class Scored:
    """What one benchmark adds to the page: scores, how answers were read, and its own tables by name."""

    scores: list[Score] = dataclasses.field(default_factory=list)
    readings: list[Reading] = dataclasses.field(default_factory=list)
    tables: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def add(self, scores: Sequence[Score], reading: Reading, table: str, rows: Sequence[Any]) -> None:
        """Add one model's part."""
        self.scores += scores
        self.readings.append(reading)
        self.tables.setdefault(table, []).extend(rows)


def percent(share: float | None) -> float | None:
    """A share as a percentage."""
    return None if share is None else 100 * share


def count_statuses(statuses: Iterable[str]) -> dict[str, int]:
    """How often each status occurs, by name."""
    return dict(sorted(collections.Counter(statuses).items()))
